"""RobustKD: a small clean student from a teacher that may be backdoored, by features of low variance (Chen et al. 2024).

python experiments/robust_kd.py                                 # digits: teachers attacked by LBA, and clean ones
python experiments/robust_kd.py --dataset=cifar10 --attacks=ckd,none --defenses=fkd,robust_kd,fine_tuning+fkd
python experiments/robust_kd.py --study=threshold               # a table or figure of the paper; see --help
python experiments/robust_kd.py --teacher=FOLDER --student=wrn_10_2     # your own suspect model
"""

from bdjax import commands

if __name__ == "__main__":
    commands.start("robust-kd")

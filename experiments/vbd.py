"""VBD: find the poisoned rows of a training set, and the trigger, without clean data.

python experiments/vbd.py                                       # drawn textures: a trigger, and no attack
python experiments/vbd.py --dataset=photos/                     # audit your own image folder or .npz
python experiments/vbd.py --dataset=photos/ --defenses=spectral_signatures    # with another detector
python experiments/vbd.py --dataset=cifar10 --study=table1      # a table of the paper; see --help
python experiments/vbd.py --dataset=cifar10 --study=grid --preset=paper     # all of its 80 settings, 5 seeds each
"""

from bdjax import commands

if __name__ == "__main__":
    commands.start("vbd")

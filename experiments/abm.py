"""ABM: keep the attacked network, and subtract the output of a second network that has learnt only the backdoor.

python experiments/abm.py                                       # digits: BadNets, Blended, SIG, and no attack
python experiments/abm.py --dataset=cifar10 --attacks=badnets:poison_rate=0.5 --defenses=nad,abl,abm,abm:gamma=0.6
python experiments/abm.py --study=isolation                     # a table or figure of the paper; see --help
python experiments/abm.py --dataset=suspect.npz                 # your own data: which rows are suspicious?
"""

from bdjax import commands

if __name__ == "__main__":
    commands.start("abm")

"""LfD: train a clean model on a poisoned training set, guided by the losses of a low-capacity network.

python experiments/lfd.py                                       # digits: BadNets, Blended, SIG, and no attack
python experiments/lfd.py --dataset=cifar10 --attacks=badnets_grid --defenses=abl,lfd,lfd:weighting=drop
python experiments/lfd.py --study=teachers                      # a figure of the paper; see --help
python experiments/lfd.py --dataset=suspect.npz                 # your own data: which rows are suspicious?
"""

from bdjax import commands

if __name__ == "__main__":
    commands.start("lfd")

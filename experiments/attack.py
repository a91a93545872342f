"""Attacks: poison a training set, train victims on it, and measure the backdoor.

    python experiments/attack.py                                    # BadNets on the digits
    python experiments/attack.py --attack=badnets,sig --dataset=mnist
    python experiments/attack.py --attack=badnets+sig               # a hybrid: both triggers in one training set
    python experiments/attack.py --attack=all --dataset=mnist       # every attack, one table
    python experiments/attack.py --attack=sig --change amplitude=0.3 --poison-rate=0.05 --label-rule=all_to_one

Victims of several attacks and seeds train as one ensemble. The same command continues an interrupted run, and ends at the same
numbers. Everything is written to one folder (`--output`, by default in `runs/attack/`): report.html, table.md, the gallery, and
each poisoned training set as an .npz with images, labels, is_poisoned, original_labels and is_cover.
"""

from bdjax import commands

if __name__ == "__main__":
    commands.start("attack")

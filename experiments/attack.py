"""Attacks: poison a training set, train victims on it, and measure the backdoor.

python experiments/attack.py                                    # BadNets on the digits
python experiments/attack.py --attack=badnets,sig --dataset=mnist
python experiments/attack.py --attack=badnets+sig               # a hybrid: both triggers in one training set
python experiments/attack.py --attack=all --dataset=mnist       # every attack, one table
python experiments/attack.py --attack=sig --change amplitude=0.3 --poison-rate=0.05 --label-rule=all_to_one
"""

from bdjax import commands

if __name__ == "__main__":
    commands.start("attack")

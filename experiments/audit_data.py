"""Audit of a training set: which rows are poisoned, and what does the trigger look like?

python experiments/audit_data.py photos/                        # a folder with a sub-folder for each class
python experiments/audit_data.py suspect.npz --preset=strong    # images and labels
python experiments/audit_data.py --dataset=photos/ --copy-files # and a copy without the flagged files
python experiments/audit_data.py photos/ --defenses=activation_clustering      # with another detector
"""

from bdjax import commands

if __name__ == "__main__":
    commands.start("audit-data")

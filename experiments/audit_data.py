"""Audit of a training set: which rows are poisoned, and what does the trigger look like?

    python experiments/audit_data.py photos/                        # a folder with a sub-folder for each class
    python experiments/audit_data.py suspect.npz --preset=strong    # images and labels
    python experiments/audit_data.py --dataset=photos/ --copy-files # and a copy without the flagged files
    python experiments/audit_data.py photos/ --defenses=activation_clustering      # with another detector

The rows stay unchanged, and no clean ones are needed. The exit status is 3 if something was found, 0 if nothing was found, 4 if
the rows could not be tested, 2 for input that cannot be used. The same command continues an interrupted run, and ends at the
same numbers.
"""

from bdjax import commands

if __name__ == "__main__":
    commands.start("audit-data")

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

from bdjax import interruption

if __name__ == "__main__":
    interruption.exit_at_once()  # the other imports take seconds

import dataclasses
from collections.abc import Sequence
from typing import Any

from bdjax import datasets
from bdjax.run import command_line, presets
from bdjax.workflows import attack
from bdjax.workflows.attack import Config
from bdjax.workflows.base import Experiment, read_flags


def preset(preset: str | None = None, dataset: str | None = None) -> Config:
    """The configuration that a preset starts from.

    Args:
        preset: quick or paper.
        dataset: its name or path.

    Raises:
        InputError: there is no such preset.
    """
    preset, dataset, compute_dtype = presets.choose(preset, dataset, ("quick", "paper"))
    if preset == "quick":
        changes = presets.quick("attack", dataset)
    else:
        changes = {"augmentation": "crop_flip" if datasets.traits(dataset).flips else "crop"}
    base = Config(dataset=dataset, preset=preset, compute_dtype=compute_dtype)
    return dataclasses.replace(base, **changes)


EXPERIMENT = Experiment("attack", "Attacks", (), preset, always_shown=("attack", "dataset", "preset"))


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Read the flags and run."""
    return attack.run(read_flags(EXPERIMENT, __doc__.splitlines()[0], arguments), EXPERIMENT)


if __name__ == "__main__":
    command_line.run(main)

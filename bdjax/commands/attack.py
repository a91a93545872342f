"""Attacks: poison a training set, train victims on it, and measure the backdoor.

Victims of several attacks and seeds train as one ensemble. The same command continues an interrupted run, and ends at the same
numbers. Everything is written to one folder (`--output`, by default in `runs/attack/`): report.html, table.md, the gallery, and
each poisoned training set as an .npz with images, labels, is_poisoned, original_labels and is_cover.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from bdjax import datasets
from bdjax.run import presets
from bdjax.run.configs.attack import Config
from bdjax.run.experiment import Experiment, read_flags


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
    config = read_flags(EXPERIMENT, __doc__.splitlines()[0], arguments)
    from bdjax.workflows import attack

    return attack.run(config, EXPERIMENT)

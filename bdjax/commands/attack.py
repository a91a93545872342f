"""Attacks: poison a training set, train victims on it, and measure the backdoor.

Victims of several attacks and seeds train as one ensemble. The same command continues an interrupted run, and ends at the same
numbers. Everything is written to one folder (`--output`, by default in `runs/attack/`): report.html, table.md, the gallery, and
each poisoned training set as an .npz with images, labels, is_poisoned, original_labels and is_cover.
"""

from collections.abc import Sequence
from typing import Any

from bdjax.run import presets
from bdjax.run.configs.attack import Config
from bdjax.run.experiment import Experiment, read_flags


def preset(preset: str | None = None, dataset: str | None = None) -> Config:
    """The configuration that a preset starts from: see `presets.start_plainly_from`."""
    return presets.start_plainly_from("attack", preset, dataset, Config)


EXPERIMENT = Experiment("attack", "Attacks", (), preset, always_shown=("attack", "dataset", "preset"))


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Read the flags and run."""
    config = read_flags(EXPERIMENT, __doc__.splitlines()[0], arguments)
    from bdjax.workflows import attack

    return attack.run(config, EXPERIMENT)

"""Audit of a training set: which rows are poisoned, and what does the trigger look like?

The rows are yours, unchanged, and nobody knows which are poisoned: a folder of images with a sub-folder for each class or with
a list (metadata.csv, metadata.jsonl), an .npz with images and labels, parquet files, a dataset of Hugging Face on disk, tar
shards, or boxes in COCO's form. The rows that are not flagged are left as cleaned.npz, or with --copy-files as copies of their
files. No clean rows are needed. The exit status is 3 if something was found, 0 if nothing was found, 4 if the rows could not be
tested, 2 for input that cannot be used. The same command continues an interrupted run, and ends at the same numbers. `vbd`
compares detectors on rows that it poisons itself; this is its detector on rows of unknown origin.
"""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from bdjax.commands import vbd
from bdjax.errors import InputError
from bdjax.run import command_line
from bdjax.run.checks import check_ranges
from bdjax.run.configs.detection import Config
from bdjax.run.experiment import Experiment, read_flags
from bdjax.run.presets import NO_ATTACK

if TYPE_CHECKING:
    from bdjax.run.log import StageLog

FIXED = {"attacks": NO_ATTACK, "study": "", "seeds": 1, "target": 0, "test_rows": 0, "suspects_at_once": 10}
"""The settings of grids of poisoned sets, which an audit has not."""

EXAMPLE = (
    "photos/, a folder with a sub-folder for each class, or an .npz, parquet files, tar shards, a folder with metadata.csv, "
    "or boxes in COCO's form"
)


def preset(preset: str | None = None, dataset: str | None = None) -> Config:
    """The configuration that a preset starts from.

    Raises:
        InputError: there is no such preset.
    """
    return dataclasses.replace(vbd.preset(preset, dataset), **{"dataset": dataset or "", "defenses": "vbd", **FIXED})


EXPERIMENT = Experiment(
    "audit_data", "Audit of a training set", ("vbd",), preset, positional="dataset", fixed=tuple(FIXED)
)


def _check(config: Config) -> None:
    if not config.dataset:
        raise InputError(f"name the data: {command_line.invocation('audit_data')} {EXAMPLE}")
    check_ranges(config)


def main(arguments: Sequence[str] | None = None, log: "StageLog | None" = None) -> dict[str, Any]:
    """Read the flags and run."""
    about = f"{__doc__.splitlines()[0]} The first word is --dataset: bdjax audit-data photos/"
    config = read_flags(EXPERIMENT, about, arguments, _check)
    from bdjax.workflows import audit

    return audit.run(config, EXPERIMENT, log)

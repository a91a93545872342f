"""TA-KD: seven backdoored teachers, two votes, the aggregated model and the student (Heydari et al. 2025).

A quick run on the digits takes two to four minutes on two CPU cores. The same command continues an
interrupted run, and ends at the same numbers. Everything is written to one folder (`--output`, by default in `runs/ta_kd/`);
open its report.html.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from bdjax import datasets
from bdjax.exchange import safetensors_files
from bdjax.run import presets
from bdjax.run.configs.ta_kd import Config
from bdjax.run.experiment import Experiment, read_flags
from bdjax.settings import check_choice

PAPER = {"cifar10": {"num_similar": 3}, "cifar100": {"num_similar": 3}}
"""Differences of single datasets from the paper's settings, which are the dataclass's defaults."""
STRONG: dict[str, Any] = {
    "aggregation": "median",
    "augmentation": "crop",
    "views": 8,
    "defense_schedule": "cosine",
}


def preset(preset: str | None = None, dataset: str | None = None, scale: str | None = None) -> Config:
    """The configuration that a preset starts from.

    Args:
        preset: quick, paper or strong.
        dataset: its name or path.
        scale: quick or paper: the sizes that the strong preset starts from.

    Raises:
        InputError: there is no such preset or scale.
    """
    preset, dataset, compute_dtype = presets.choose(preset, dataset, ("quick", "paper", "strong"))
    is_large = preset == "paper" or (preset == "strong" and compute_dtype == "bfloat16")
    scale = scale or ("paper" if is_large else "quick")
    check_choice("--scale", scale, ("quick", "paper"))
    changes = PAPER.get(dataset, {}) if scale == "paper" else presets.quick("ta_kd", dataset)
    if preset == "strong":
        changes = changes | STRONG | ({"augmentation": "crop_flip"} if datasets.traits(dataset).flips else {})
    base = Config(dataset=dataset, preset=preset, scale=scale, compute_dtype=compute_dtype)
    return dataclasses.replace(base, **changes)


EXPERIMENT = Experiment(
    "ta_kd",
    "TA-KD",
    (),
    preset,
    choosers=("preset", "dataset", "scale"),
    always_shown=("dataset", "preset", "scale"),
)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Read the flags and run."""
    config = read_flags(EXPERIMENT, __doc__.splitlines()[0], arguments)
    safetensors_files.refuse_early(config.teachers or ())
    from bdjax.workflows import ta_kd

    return ta_kd.run(config, EXPERIMENT)

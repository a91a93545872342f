"""The time that whole trainings take to an accuracy, in bdjax and in PyTorch, an epoch of each in turn.

Images per second say little if one library needs more of them. So the speed-run network is trained by its recipe on a dataset,
by the fastest form of each library, and its accuracy on the test rows is measured after every epoch.
"""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bdjax import datasets
from bdjax.benchmarking import report, settings
from bdjax.reporting.tables import Table
from bdjax.types import Dataset


def write_rows(path: pathlib.Path, train: Dataset, test: Dataset) -> None:
    """The rows that the workers read: images uint8 [n, H, W, C] and labels int32 [n], of training and test."""
    np.savez(
        path,
        images=train.images,
        labels=train.labels.astype(np.int32),
        test_images=test.images,
        test_labels=test.labels.astype(np.int32),
    )


def is_measured(entry: Mapping[str, Any], shape: Sequence[int]) -> bool:
    """Whether an entry of results.json is of the speed-run network on images of this shape, with a network for each core."""
    setting = entry["setting"]
    return (
        setting["model"] == settings.SPEEDRUN
        and tuple(setting["shape"]) == tuple(shape)
        and setting["members"] == settings.num_cores()
    )


def specifications(
    entries: Sequence[Mapping[str, Any]], path: pathlib.Path, epochs: int, train: Dataset
) -> dict[str, dict[str, Any]]:
    """The fastest form of either library, as measured, as a worker's specification of a whole training.

    Args:
        entries: of results.json, for which `is_measured`; several if there are several dtypes.
        path: the file of `write_rows`.
        epochs: of the training.
        train: the training rows.

    Returns:
        "<form>, <dtype>" -> specification, the engine's first.
    """
    learning = {
        "data": str(path),
        "epochs": epochs,
        "augmentation": "reflect_flip" if datasets.traits(train.name).flips else "reflect",
        "num_classes": train.num_classes,
    }
    found = {}
    for belongs in (report.is_engine, report.is_pytorch):
        measured = [
            (report.rate_of(entry["contenders"][form]).median, form, entry["setting"])
            for entry in entries
            if (form := report.fastest(entry["contenders"], belongs))
        ]
        if measured:
            _, form, of_entry = max(measured, key=lambda candidate: candidate[0])
            setting = settings.Setting(**of_entry | {"shape": tuple(of_entry["shape"]), "rows": len(train)})
            found[f"{form}, {setting.compute_dtype}"] = settings.describe(setting, form) | learning
    return found


def seconds_to(outcome: Mapping[str, Any], target: float) -> float | None:
    """Seconds of training to the end of the first epoch with a mean accuracy of at least the target; None if there is none."""
    total = 0.0
    for epoch in outcome["epochs"]:
        total += epoch["seconds"]
        if np.mean(epoch["accuracies"]) >= target:
            return total
    return None


def table(learned: Mapping[str, Any]) -> Table:
    """A row for each contender, from results.json's "learning"."""
    target = learned["target_accuracy"]
    rows = []
    for name, outcome in learned["contenders"].items():
        epochs, seconds = outcome["epochs"], seconds_to(outcome, target)
        last = epochs[-1]["accuracies"] if epochs else []
        total = sum(epoch["seconds"] for epoch in epochs)
        compiling = outcome.get("compile_seconds")
        rows.append(
            (
                name,
                len(last) or None,
                len(epochs),
                f"{np.mean(last):.3f}" if last else None,
                f"{min(last):.3f}" if last else None,
                f"{total:.0f}" if epochs else None,
                round(sum(epoch["work"] for epoch in epochs) / total) if epochs else None,
                None if seconds is None else f"{seconds:.0f}",
                None if compiling is None else f"{compiling:.1f}",
                report.remark(outcome),
            )
        )
    return Table(
        f"Time to an accuracy of {target:g}",
        (
            "contender",
            "networks at once",
            "epochs",
            "accuracy",
            "lowest",
            "training s",
            "images/s",
            f"s to {target:g}",
            "compile s",
            "remark",
        ),
        tuple(rows),
        f"The speed-run network by its recipe on {learned['rows']:,} rows of {learned['dataset']}, with augmentation, by the "
        "fastest form of each library in the first table. Accuracy on the test rows after the last epoch, mean and lowest of "
        "the networks that are trained at once. Seconds are those of training alone: s to the accuracy is to the end of the "
        "first epoch whose mean accuracy is that high. The contenders take turns, an epoch each; PyTorch compiles, if at all, "
        "in its first.",
    )

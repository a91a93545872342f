"""Fine-tuning: go on training the attacked network on a few clean rows, all weights, by their labels.

No row carries the trigger, so nothing keeps the backdoor in place, but nothing drives it out either: a network that is right
on the clean rows already has next to no gradient. How much goes depends on how far the weights are moved, that is on the
learning rate: 1e-3 often changes nothing but the accuracy, 5e-2 may cost a good part of it.

The settings are those in common use for comparisons: 5 % clean rows, 100 epochs of SGD on half a cosine. Augmentation is the
run's own. Batch normalisation runs in training mode, so its statistics become those of clean images.
"""

from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from bdjax.defenses.contract import Defense, DefenseInput, fingerprint
from bdjax.training.member import Objective, TrainConfig
from bdjax.types import DefenseResult, Model, PyTree


@dataclass(frozen=True)
class FineTuningSettings:
    epochs: int = 100
    """over the clean rows"""
    batch_size: int = 256
    """or all clean rows, if they are fewer"""
    learning_rate: float = 0.01
    """of SGD with momentum 0.9, at the start of half a cosine; what decides how much of a backdoor goes"""
    weight_decay: float = 5e-4
    """L2, on every parameter"""


def cosine_sgd(inputs: DefenseInput, settings: Any) -> TrainConfig:
    """What fine-tuning, fine-pruning and FT-SAM share: SGD with momentum 0.9 on half a cosine.

    Args:
        inputs: the suspects, whose recipe says what is not said here: augmentation, the incomplete last batch.
        settings: a defense's; `epochs` (0 leaves the networks as they are), `batch_size`, `learning_rate` (of the first
            epoch) and `weight_decay` are read.
    """
    return inputs.config(
        epochs=settings.epochs,
        batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        optimiser="sgd",
        momentum=0.9,
        nesterov=False,
        schedule="cosine",
    )


def tune(
    inputs: DefenseInput,
    stage: str,
    model: Model,
    config: TrainConfig,
    variables: PyTree,
    objective: Objective | None = None,
) -> PyTree:
    """Go on training given networks on the clean rows; with no epochs there is nothing to do, and they stay what they are.

    Args:
        inputs: the suspects.
        stage: its name (see `DefenseInput.train`).
        model: the architecture.
        config: how it is trained.
        variables: where to start, stacked [M, ...].
        objective: what a step minimises; None for cross-entropy.

    Returns:
        Variables, stacked [M, ...].

    Raises:
        ValueError: if there are no clean rows.
    """
    rows = inputs.clean_rows()
    if config.epochs == 0:
        return variables
    return inputs.train(stage, model, config, rows, variables=variables, objective=objective).variables


def weight_change(before: PyTree, after: PyTree) -> np.ndarray:
    """How far training moved the weights, relative to how large they were: |after - before| / |before|.

    Args:
        before: parameters stacked [M, ...].
        after: likewise.

    Returns:
        float32 [M], at least 0.
    """

    def norms(tree: PyTree) -> np.ndarray:
        squares = [np.square(leaf).reshape(len(leaf), -1).sum(axis=1) for leaf in jax.tree.leaves(tree)]
        return np.sqrt(np.sum(squares, axis=0))

    before, after = (jax.tree.map(np.asarray, tree) for tree in (before, after))
    return norms(jax.tree.map(np.subtract, after, before)) / norms(before)


def run(inputs: DefenseInput, settings: FineTuningSettings) -> DefenseResult:
    """Train the attacked networks on the clean rows."""
    config = cosine_sgd(inputs, settings)
    attacked = inputs.attacked
    variables = tune(inputs, f"fine-tuning {fingerprint(**vars(settings))}", attacked.model, config, attacked.variables)
    change = weight_change(attacked.variables["params"], variables["params"])
    return DefenseResult(attacked.model, variables, facts={"weight change": change})


FINE_TUNING = Defense(
    name="fine_tuning",
    title="FT",
    paper="fine-tuning on clean rows; as a defense first measured by Liu et al. 2018, Fine-Pruning",
    stage="after training",
    needs=("attacked model", "clean rows"),
    settings=FineTuningSettings(),
    run=run,
    changes={
        # A few hundred rows make few steps, and small networks move little in each.
        "quick": {"epochs": 30, "batch_size": 32, "learning_rate": 0.05},
        # Fewer still; from 0.3 on, accuracy goes as well.
        "quick digits": {"learning_rate": 0.2},
    },
)

"""Fine-tuning: continue training all weights of the attacked network on a few clean rows and their labels.

Without triggered rows nothing reinforces the backdoor, but nothing removes it either: a network that already classifies the
clean rows correctly has hardly any gradient. How much of the backdoor is removed depends on how far the weights move, that is
on the learning rate: 1e-3 often changes nothing but the accuracy, 5e-2 may cost much of it.

The settings are common in comparisons: 5 % clean rows, 100 epochs of SGD with a half-cosine schedule. Augmentation is the
run's. Batch normalisation runs in training mode, so its statistics become those of clean images.
"""

from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from bdjax.defenses.contract import Defense, DefenseInput, fingerprint
from bdjax.settings import Count, LearningRate, NotNegative
from bdjax.training.member import Objective, TrainConfig
from bdjax.types import DefenseResult, Model, PyTree


@dataclass(frozen=True)
class FineTuningSettings:
    epochs: Count = 100
    """epochs over the clean rows"""
    batch_size: Count = 256
    """clean rows in a step; all of them if there are fewer"""
    learning_rate: LearningRate = 0.01
    """initial learning rate of SGD with momentum 0.9 and a half-cosine schedule; larger removes more of a backdoor and costs
    more accuracy"""
    weight_decay: NotNegative = 5e-4
    """L2 penalty on every parameter"""


def cosine_sgd(inputs: DefenseInput, settings: Any) -> TrainConfig:
    """The optimiser of fine-tuning, fine-pruning and FT-SAM: SGD with momentum 0.9 and a half-cosine schedule.

    Args:
        inputs: the suspects, whose recipe sets the rest: augmentation, the incomplete last batch.
        settings: a defense's settings, of which `epochs`, `batch_size`, `learning_rate` (initial) and `weight_decay` are used.
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
    """Continue training networks on the clean rows; with 0 epochs the networks do not change.

    Args:
        inputs: the suspects.
        stage: name of the stage (see `DefenseInput.train`).
        model: the architecture.
        config: how it is trained.
        variables: initial variables, stacked [M, ...].
        objective: what a step minimises; None for cross-entropy.

    Returns:
        Variables, stacked [M, ...].

    Raises:
        ValueError: there are no clean rows.
    """
    rows = inputs.clean_rows()
    if config.epochs == 0:
        return variables
    return inputs.train(stage, model, config, rows, variables=variables, objective=objective).variables


def weight_change(before: PyTree, after: PyTree) -> np.ndarray:
    """The relative change of the weights by training: |after - before| / |before|.

    Args:
        before: parameters before training, stacked [M, ...].
        after: parameters after training, stacked [M, ...].

    Returns:
        float32 [M], at least 0.
    """

    def norms(tree: PyTree) -> np.ndarray:
        squares = [np.square(leaf).reshape(len(leaf), -1).sum(axis=1) for leaf in jax.tree.leaves(tree)]
        return np.sqrt(np.sum(squares, axis=0))

    before, after = (jax.tree.map(np.asarray, tree) for tree in (before, after))
    return norms(jax.tree.map(np.subtract, after, before)) / norms(before)


def run(inputs: DefenseInput, settings: FineTuningSettings) -> DefenseResult:
    """Fine-tune the attacked networks on the clean rows."""
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
        # A few hundred rows give few steps, and each moves the weights of a small network little.
        "quick": {"epochs": 30, "batch_size": 32, "learning_rate": 0.05},
        # Even fewer steps; from 0.3 on, accuracy is lost as well.
        "quick digits": {"learning_rate": 0.2},
    },
)

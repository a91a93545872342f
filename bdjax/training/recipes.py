"""Named training recipes: fields of `TrainConfig` that belong together."""

import dataclasses
from typing import Any

from bdjax.choices import Recipe
from bdjax.training.member import TrainConfig

PLAIN_RATE = 1e-3
"""The learning rate of `without`: Adam's default."""


def fields(recipe: Recipe, batch_size: int) -> dict[str, Any]:
    """The fields of a recipe; any network may be trained by it.

    "speedrun" is that of Jordan 2024 ("94% on CIFAR-10 in 3.29 Seconds on a Single GPU", section 3): SGD with Nesterov momentum
    0.85, a triangular schedule, label smoothing 0.2, scales of normalisations fixed and their biases at 64 times the rate, and
    a decay that is the same for all parameters. The paper sums the loss over the batch, at a rate of 11.5 and a decay of 0.0153
    for 1024 (1 + 1 / (1 - 0.85)) rows; for the mean over the batch both are proportional to the batch size. Its random
    shifts and flips are a setting of the data (`augmentation`), its "lookahead" and test-time flips are left out.

    Args:
        recipe: its name.
        batch_size: rows per step.
    """
    if not recipe:
        return {"recipe": ""}
    share = batch_size / (1024 * (1 + 1 / (1 - 0.85)))
    return {
        "recipe": "speedrun",
        "optimiser": "sgd",
        "learning_rate": 11.5 * share,
        "weight_decay": 0.0153 * share,
        "momentum": 0.85,
        "nesterov": True,
        "schedule": "triangle",
        "label_smoothing": 0.2,
        "norm_scale_rate": 0.0,
        "norm_bias_rate": 64.0,
        "decay_over_rate": True,
    }


def without(config: TrainConfig) -> TrainConfig:
    """A configuration with defaults in place of what a named recipe has set, for stages with an optimiser of their own."""
    if not config.recipe:
        return config
    defaults = {field.name: field.default for field in dataclasses.fields(TrainConfig)}
    plain = {name: defaults[name] for name in fields(config.recipe, config.batch_size)}
    return dataclasses.replace(config, **plain | {"learning_rate": PLAIN_RATE, "schedule": "cosine"})

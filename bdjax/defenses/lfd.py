"""LfD, Learning from Distinction: the losses of a low-capacity teacher weight the rows (anonymous, under review 2024).

A tiny network learns a trigger as fast as a large one, but hardly anything else. So its loss separates poisoned rows (low)
from clean rows (high) better than a large network's. LfD trains such a teacher for a few epochs, computes its loss u_i of
every row, and trains the student on all rows with weights (equations 4 and 6)

    gamma = the (alpha n)-th smallest u_i
    w_i   = u_i / max u                    where u_i > gamma
    w_i   = beta (u_i - gamma) / max u     where u_i <= gamma: at most 0, so the student's loss is *raised* there

What decides whether a network of two neurons a layer finds a trigger is its initial weights: of five such networks on the same
rows some find it and the others do not. So several teachers are trained, and a row's loss is the *minimum* over them: it is low
if any of them finds the row easy. The mean would bury the one that found the trigger. The paper has one teacher.

The weights of equation 6 are mostly far below 1, since the maximum is an outlier. That makes every step as much smaller, except
under Adam, with which the paper trains and which is invariant to it. `scale` divides them by their mean.

Equations 5 and 6 print the teacher's loss behind the weights; that has no gradient with respect to the student, so the
student's must be meant. With the paper's beta of 1e-3 the ascent is faint (the strongest weight is near -3e-5): mostly LfD
leaves out the alpha n easiest rows and weights the others by difficulty.
"""

import math
from dataclasses import dataclass, replace
from functools import cache
from typing import Annotated, Literal

import jax.numpy as jnp
import numpy as np
from jax import lax

from bdjax.defenses.contract import Defense, DefenseInput, apart, fingerprint
from bdjax.losses import cross_entropy
from bdjax.models import MODELS
from bdjax.settings import Count, LearningRate, Members, NotNegative, PositiveShare, Range, check_values
from bdjax.training.member import Objective, Outcome, TrainConfig
from bdjax.types import Array, DefenseResult, Key, Model, PyTree

Weighting = Literal["weighted ascent", "ascent", "drop", "plain"]
Combination = Literal["minimum", "median", "mean"]
Scale = Literal["mean", "printed"]


@dataclass(frozen=True)
class LfdSettings:
    """The paper's values for CIFAR-10 (section 5). The paper does not say how the teacher is trained."""

    teacher: str = "resnet_s"
    """architecture of the teacher; the lower its capacity, the better its losses separate poisoned from clean rows"""
    teacher_epochs: Count = 5
    """training epochs of a teacher; the paper says "a few", and its figure 2 shows the fifth"""
    teacher_learning_rate: LearningRate = 1e-3
    """learning rate of Adam for a teacher (appendix A.1)"""
    teachers: Members = 1
    """number of teachers; the paper has 1, more depend less on a tiny network's initial weights"""
    combine: str = "minimum"
    """a row's loss over several teachers: "minimum", "median" or "mean" """
    alpha: PositiveShare = 0.15
    """share of all rows, those of the lowest loss, that become candidates for unlearning, in (0, 1]"""
    beta: NotNegative = 1e-3
    """strength of the ascent on candidates relative to the descent on all other rows"""
    weighting: str = "weighted ascent"
    """how rows are weighted: "weighted ascent" (equation 6), "ascent" (equation 5), "drop" (candidates 0) or "plain" (all 1)"""
    loss_cap: NotNegative = 0.0
    """student's loss above which a candidate's loss is no longer raised; 0 for no cap"""
    max_percentile: Annotated[float, Range(above=0, at_most=100)] = 100.0
    """percentile of the teacher's losses used as max u, in (0, 100]; 100 is the maximum itself"""
    scale: str = "mean"
    """scale of the student's weights: "mean", divided by their mean; or "printed", as in equations 5 and 6"""


def check(settings: LfdSettings) -> None:
    """Reject invalid settings.

    Raises:
        InputError: naming the setting.
    """
    check_values(
        "defense lfd",
        settings,
        choices={
            "weighting": Weighting.__args__,
            "combine": Combination.__args__,
            "scale": Scale.__args__,
            "teacher": MODELS,
        },
    )


def threshold(losses: np.ndarray, alpha: float) -> float:
    """gamma (equation 4): the loss of rank ceil(alpha n), so that without ties that many rows are at most gamma.

    Args:
        losses: float [n], the teacher's.
        alpha: in (0, 1].
    """
    # The small term keeps ceil from raising an alpha n that is an integer up to rounding.
    rank = max(math.ceil(alpha * len(losses) - 1e-9), 1)
    return np.sort(losses)[rank - 1]


def row_weights(losses: np.ndarray, settings: LfdSettings) -> np.ndarray:
    """The factor of each row's loss in the student's training (equation 6, and its ablations).

    Args:
        losses: float [n], the teacher's, of all rows.
        settings: reads `alpha`, `beta`, `weighting` and `max_percentile`.

    Returns:
        float32 [n]: at most 0 for candidates ("plain": 1), at most 1 for all other rows.

    Raises:
        InputError: an invalid setting.
    """
    check(settings)
    gamma = threshold(losses, settings.alpha)
    is_candidate = losses <= gamma
    if settings.weighting == "plain":
        return np.ones(len(losses), np.float32)
    if settings.weighting == "drop":
        return np.where(is_candidate, 0, 1).astype(np.float32)
    if settings.weighting == "ascent":
        return np.where(is_candidate, -1, 1).astype(np.float32)
    highest = np.percentile(losses, settings.max_percentile)
    descent = np.minimum(losses / highest, 1)
    return np.where(is_candidate, settings.beta * (losses - gamma) / highest, descent).astype(np.float32)


def scaled(weights: np.ndarray, scale: str) -> np.ndarray:
    """Divide the weights by their mean, so that a step is as large as without weights.

    Args:
        weights: float [n], from `row_weights`.
        scale: "mean"; or "printed" for the same weights. Weights whose mean is not positive also stay the same.

    Returns:
        float32 [n].
    """
    mean = weights.mean()
    return (weights / mean if scale == "mean" and mean > 0 else weights).astype(np.float32)


def combined(losses: np.ndarray, combine: str) -> np.ndarray:
    """The losses of several teachers as one.

    Args:
        losses: float [M, T, n].
        combine: a value of `Combination`.

    Returns:
        float [M, n].
    """
    return {"minimum": np.min, "median": np.median, "mean": np.mean}[combine](losses, axis=1)


def teacher_config(inputs: DefenseInput, epochs: int, learning_rate: float = 0.0) -> TrainConfig:
    """How a teacher is trained: Adam at a constant learning rate, without augmentation or weight decay."""
    config = inputs.config(epochs=epochs, optimiser="adam", schedule="constant", augmentation="none", weight_decay=0.0)
    return replace(config, learning_rate=learning_rate) if learning_rate else config


def teacher_losses(inputs: DefenseInput, settings: LfdSettings) -> np.ndarray:
    """Stage 1: train the teachers from scratch, as members of one call, and compute their cross-entropy of each row.

    Args:
        inputs: the suspects.
        settings: reads the teachers' settings.

    Returns:
        float32 [M, T, n], un-augmented and with running statistics.
    """
    config, count = teacher_config(inputs, settings.teacher_epochs, settings.teacher_learning_rate), settings.teachers
    copies = inputs.copies(count)
    model, rows = inputs.make_model(settings.teacher), copies.all_rows()
    stage = f"lfd {count} teachers {settings.teacher}, {settings.teacher_epochs} epochs at {config.learning_rate}"
    nets = copies.train(stage, model, config, rows)
    return apart(copies.losses(nets.model, nets.variables, rows), count)


@cache
def recording_cross_entropy(model: Model, epochs: int, batches: int) -> Objective:
    """Cross-entropy that records every loss in the member's variables: "recorded" float32 [epochs, n], "batch" int32 [].

    Targets hold each row's number in the training set, "row". As in a training curve, a row's loss is that of the step in
    which the row was used.
    """

    def objective(params: PyTree, variables: PyTree, images: Array, targets: dict[str, Array], key: Key) -> Outcome:
        del key
        network = {name: value for name, value in variables.items() if name not in ("recorded", "batch")}
        output = model.apply({**network, "params": params}, images, train=True)
        loss = cross_entropy(output.logits, targets["labels"])
        recorded = variables["recorded"].at[variables["batch"] // batches, targets["row"]].set(lax.stop_gradient(loss))
        after = {**output.variables, "recorded": recorded, "batch": variables["batch"] + 1}
        return Outcome(loss, output.logits, targets["labels"], after)

    return objective


def loss_history(inputs: DefenseInput, name: str | None, epochs: int) -> np.ndarray:
    """Every row's loss in every epoch of a network trained as a teacher is: the data of figures 1, 2 and 6.

    Args:
        inputs: the suspects.
        name: the architecture; None for that of the undefended network.
        epochs: how many.

    Returns:
        float32 [M, epochs, n]; NaN for rows of an incomplete last batch, which an epoch may leave out.
    """
    model = inputs.make_model(name)
    config = teacher_config(inputs, epochs)
    members, num_rows = inputs.index.shape
    rows = inputs.all_rows()
    rows = rows._replace(targets={**rows.targets, "row": jnp.tile(jnp.arange(num_rows, dtype=jnp.int32), (members, 1))})
    batch_size = min(config.batch_size, num_rows)
    batches = -(-num_rows // batch_size) if config.keep_last_batch else num_rows // batch_size
    stage = f"losses of {model.description}, {epochs} epochs"
    start = {
        **inputs.begin(stage, model),
        "recorded": jnp.full((members, epochs, num_rows), jnp.nan, jnp.float32),
        "batch": jnp.zeros(members, jnp.int32),
    }
    objective = recording_cross_entropy(model, epochs, batches)
    nets = inputs.train(stage, model, config, rows, variables=start, objective=objective)
    return np.asarray(nets.variables["recorded"])


def above_clean_mean(losses: np.ndarray, is_poisoned: np.ndarray) -> int:
    """How many poisoned rows a threshold at the clean rows' mean loss would miss (figure 2).

    Args:
        losses: float [n]; NaN for rows to ignore.
        is_poisoned: bool [n].
    """
    return int(np.sum(losses[is_poisoned] > np.nanmean(losses[~is_poisoned])))


def run(inputs: DefenseInput, settings: LfdSettings) -> DefenseResult:
    """Train the teachers, weight the rows, train the student with the undefended network's recipe."""
    of_teachers = teacher_losses(inputs, settings)
    losses = combined(of_teachers, settings.combine)
    weights = np.stack([scaled(row_weights(member_losses, settings), settings.scale) for member_losses in losses])
    rows = inputs.all_rows()
    rows = rows._replace(targets={**rows.targets, "weight": jnp.asarray(weights)})
    stage = f"lfd student {fingerprint(**vars(settings))}"
    student = inputs.train(stage, inputs.make_model(), inputs.recipe, rows, loss_cap=settings.loss_cap)
    thresholds = np.array([threshold(member_losses, settings.alpha) for member_losses in losses])
    return DefenseResult(
        student.model,
        student.variables,
        flags=losses <= thresholds[:, None],
        scores=-losses,
        single_scores=-of_teachers,
        facts={
            "threshold": thresholds,
            "highest loss": losses.max(axis=1),
            "lowest weight": weights.min(axis=1),
            "mean loss": losses.mean(axis=1),
            "largest weight": weights.max(axis=1),
        },
    )


LFD = Defense(
    name="lfd",
    title="LfD",
    paper="Learning from Distinction: Mitigating Backdoors Using a Low-capacity Model (anonymous, under review)",
    stage="in training",
    needs=("training set",),
    settings=LfdSettings(),
    run=run,
    check=check,
    changes={
        "gtsrb": {"alpha": 0.2, "beta": 3e-3},
        # A small set makes few steps, which a higher rate makes up for.
        "quick": {"teacher_learning_rate": 3e-3, "teachers": 5},
        "speedrun": {"teacher_learning_rate": 1e-3},
        "strong": {"teachers": 7, "alpha": 0.2, "weighting": "drop"},
    },
)

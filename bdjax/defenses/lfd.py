"""LfD: Learning from Distinction, a low-capacity teacher says which rows to unlearn (anonymous, under review 2024).

A network with a handful of neurons learns a trigger as fast as a big one, but hardly anything else. So its loss tells
poisoned rows (low) from clean ones (high) better than a big network's would. LfD trains such a teacher for a few epochs,
takes its loss u_i of every row, and trains the student on all rows with weights (equations 4 and 6)

    gamma = the (alpha n)-th smallest u_i
    w_i   = u_i / max u                    where u_i > gamma
    w_i   = beta (u_i - gamma) / max u     where u_i <= gamma: not above 0, so the student's loss is *raised* there

Equations 5 and 6 print the teacher's loss behind the weights; it has no gradient with respect to the student, so it can only
be the student's. With the paper's beta of 1e-3 the ascent is faint (the strongest weight is near -3e-5): what LfD does
is mostly to leave the alpha n easiest rows out and to weigh the others by difficulty.
"""

import math
from dataclasses import dataclass, replace
from functools import cache
from typing import Literal

import jax.numpy as jnp
import numpy as np
from jax import lax

from bdjax.defenses.contract import Defense, DefenseInput, fingerprint
from bdjax.losses import cross_entropy
from bdjax.models import MODELS
from bdjax.settings import check_values
from bdjax.training.member import Objective, Outcome, TrainConfig
from bdjax.types import Array, DefenseResult, Key, Model, PyTree

Weighting = Literal["weighted ascent", "ascent", "drop", "plain"]


@dataclass(frozen=True)
class LfdSettings:
    """The paper's values for CIFAR-10 (section 5), which leaves the teacher's training open."""

    teacher: str = "resnet_s"
    """any network; the lower its capacity, the better it tells"""
    teacher_epochs: int = 5
    """"a few"; figure 2 is drawn at the fifth"""
    teacher_learning_rate: float = 1e-3
    """Adam's (appendix A.1)"""
    teachers: int = 1
    """the paper's; the mean loss of several depends less on how a tiny network happened to start"""
    alpha: float = 0.15
    """share of all rows, those of the lowest loss, that are taken for candidates"""
    beta: float = 1e-3
    """how strong the ascent on candidates is against the descent on all others"""
    weighting: str = "weighted ascent"
    """equation 6; "ascent": equation 5; "drop": candidates count 0; "plain": all count 1"""
    loss_cap: float = 0.0
    """of a candidate's loss, above which it is no longer raised; 0 for none"""
    max_percentile: float = 100.0
    """of the teacher's losses, taken for their maximum: 100 is the maximum itself"""


def check(settings: LfdSettings) -> None:
    """Refuse settings that cannot be.

    Raises:
        InputError: naming the setting.
    """
    check_values(
        "defense lfd",
        settings,
        choices={"weighting": Weighting.__args__, "teacher": MODELS},
        above={"alpha": 0, "teacher_learning_rate": 0, "max_percentile": 0},
        at_least={"teacher_epochs": 1, "teachers": 1, "beta": 0, "loss_cap": 0},
        at_most={"alpha": 1, "max_percentile": 100},
    )


def threshold(losses: np.ndarray, alpha: float) -> float:
    """gamma (equation 4): the loss at rank alpha n, so that the rows up to it are ceil(alpha n), ties aside.

    Args:
        losses: float [n], the teacher's.
        alpha: in (0, 1].
    """
    # The tiny share keeps an alpha n that is whole from being rounded up.
    rank = max(math.ceil(alpha * len(losses) - 1e-9), 1)
    return np.sort(losses)[rank - 1]


def row_weights(losses: np.ndarray, settings: LfdSettings) -> np.ndarray:
    """What each row's loss is multiplied by in the student's training (equation 6, and its ablations).

    Args:
        losses: float [n], the teacher's, of all rows.
        settings: `alpha`, `beta`, `weighting` and `max_percentile` are read.

    Returns:
        float32 [n]: at most 0 for the candidates, at most 1 for all others (above it where a percentile below 100 is
        taken for the maximum: those are cut off at 1).

    Raises:
        InputError: a setting that cannot be.
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


def teacher_config(inputs: DefenseInput, epochs: int, learning_rate: float = 0.0) -> TrainConfig:
    """How stage 1 trains: plainly, for a few epochs, without augmentation and at one learning rate, by Adam."""
    config = inputs.config(epochs=epochs, optimiser="adam", schedule="constant", augmentation="none", weight_decay=0.0)
    return replace(config, learning_rate=learning_rate) if learning_rate else config


def teacher_losses(inputs: DefenseInput, settings: LfdSettings) -> np.ndarray:
    """Stage 1: train the teacher from scratch, and take its cross-entropy of each row.

    Args:
        inputs: the suspects.
        settings: `teacher`, its epochs and rate, and `teachers` are read.

    Returns:
        float32 [M, n], un-augmented and with running statistics; the mean over several teachers.
    """
    config = teacher_config(inputs, settings.teacher_epochs, settings.teacher_learning_rate)
    model, rows, told = inputs.make_model(settings.teacher), inputs.all_rows(), []
    for number in range(settings.teachers):
        stage = f"lfd teacher {settings.teacher}, {settings.teacher_epochs} epochs at {config.learning_rate}, {number}"
        nets = inputs.train(stage, model, config, rows)
        told.append(inputs.losses(nets.model, nets.variables, rows))
    return np.mean(told, axis=0)


@cache
def recording_cross_entropy(model: Model, epochs: int, batches: int) -> Objective:
    """Cross-entropy that keeps every loss in the member's variables: "recorded" float32 [epochs, n], "batch" int32 [].

    Targets have each row's number in the training set, "row". What is kept of an epoch is what the network made of a row
    when its turn came, as training curves have it.
    """

    def objective(params: PyTree, variables: PyTree, images: Array, targets: dict[str, Array], key: Key) -> Outcome:
        del key
        own = {name: value for name, value in variables.items() if name not in ("recorded", "batch")}
        output = model.apply({**own, "params": params}, images, train=True)
        loss = cross_entropy(output.logits, targets["labels"])
        recorded = variables["recorded"].at[variables["batch"] // batches, targets["row"]].set(lax.stop_gradient(loss))
        after = {**output.variables, "recorded": recorded, "batch": variables["batch"] + 1}
        return Outcome(loss, output.logits, targets["labels"], after)

    return objective


def loss_history(inputs: DefenseInput, name: str | None, epochs: int) -> np.ndarray:
    """Every row's loss in every epoch of a network trained as teachers are: what figures 1, 2 and 6 are drawn from.

    Args:
        inputs: the suspects.
        name: of the network; None for the undefended one's.
        epochs: how many.

    Returns:
        float32 [M, epochs, n]; NaN for rows that an epoch left out with its incomplete last batch.
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
    """How many poisoned rows a loss threshold at the clean rows' mean would miss (figure 2).

    Args:
        losses: float [n]; NaN for rows that do not count.
        is_poisoned: bool [n].
    """
    return int(np.sum(losses[is_poisoned] > np.nanmean(losses[~is_poisoned])))


def run(inputs: DefenseInput, settings: LfdSettings) -> DefenseResult:
    """Train the teacher, weigh the rows, train the student as an undefended network is trained."""
    losses = teacher_losses(inputs, settings)
    weights = np.stack([row_weights(own, settings) for own in losses])
    rows = inputs.all_rows()
    rows = rows._replace(targets={**rows.targets, "weight": jnp.asarray(weights)})
    stage = f"lfd student {fingerprint(**vars(settings))}"
    student = inputs.train(stage, inputs.make_model(), inputs.recipe, rows, loss_cap=settings.loss_cap)
    thresholds = np.array([threshold(own, settings.alpha) for own in losses])
    return DefenseResult(
        student.model,
        student.variables,
        flags=losses <= thresholds[:, None],
        scores=-losses,
        facts={
            "threshold": thresholds,
            "highest loss": losses.max(axis=1),
            "lowest weight": weights.min(axis=1),
            "mean loss": losses.mean(axis=1),
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
        # At an eighth of the width a teacher's stem is so narrow that one in a few learns nothing of the trigger.
        "quick": {"teacher_learning_rate": 3e-3, "teachers": 3},
        "strong": {"teachers": 7, "alpha": 0.2, "weighting": "drop"},
    },
)

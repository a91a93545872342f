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
from dataclasses import dataclass
from typing import Literal

import jax.numpy as jnp
import numpy as np

from bdjax.defenses.contract import Defense, Given, fingerprint
from bdjax.training.stages import Nets
from bdjax.types import DefenseResult

Weighting = Literal["weighted ascent", "ascent", "drop", "plain"]


@dataclass(frozen=True)
class LfdSettings:
    """The paper's values for CIFAR-10 (section 5), which leaves the teacher's training open."""

    teacher: str = "resnet_s"  # any network; the lower its capacity, the better it tells
    teacher_epochs: int = 5  # "a few"; figure 2 is drawn at the fifth
    alpha: float = 0.15  # share of all rows, those of the lowest loss, that are taken for candidates
    beta: float = 1e-3  # how strong the ascent on candidates is against the descent on all others
    weighting: str = (
        "weighted ascent"  # equation 6; "ascent": equation 5; "drop": candidates count 0; "plain": all count 1
    )
    loss_cap: float = 0.0  # of a candidate's loss, above which it is no longer raised; 0 for none
    max_percentile: float = 100.0  # of the teacher's losses, taken for their maximum: 100 is the maximum itself


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
        ValueError: if the weighting is not known.
    """
    gamma = threshold(losses, settings.alpha)
    is_candidate = losses <= gamma
    if settings.weighting == "plain":
        return np.ones(len(losses), np.float32)
    if settings.weighting == "drop":
        return np.where(is_candidate, 0, 1).astype(np.float32)
    if settings.weighting == "ascent":
        return np.where(is_candidate, -1, 1).astype(np.float32)
    if settings.weighting != "weighted ascent":
        raise ValueError(f"weighting {settings.weighting!r} is not one of {', '.join(Weighting.__args__)}")
    highest = np.percentile(losses, settings.max_percentile)
    descent = np.minimum(losses / highest, 1)
    return np.where(is_candidate, settings.beta * (losses - gamma) / highest, descent).astype(np.float32)


def train_teacher(given: Given, name: str, epochs: int) -> Nets:
    """Stage 1: plain training for a few epochs, from scratch, without augmentation and at one learning rate.

    Args:
        given: the suspects.
        name: of the network; the undefended one's to see what its capacity does.
        epochs: how many.
    """
    config = given.config(epochs=epochs, schedule="constant", augmentation="none", weight_decay=0.0)
    return given.train(f"lfd teacher {name}, {epochs} epochs", given.make_model(name), config, given.all_rows())


def teacher_losses(given: Given, teacher: Nets) -> np.ndarray:
    """The teacher's cross-entropy of each row, un-augmented and with running statistics: float32 [M, n]."""
    return given.losses(teacher.model, teacher.variables, given.all_rows())


def run(given: Given, settings: LfdSettings) -> DefenseResult:
    """Train the teacher, weigh the rows, train the student as an undefended network is trained."""
    losses = teacher_losses(given, train_teacher(given, settings.teacher, settings.teacher_epochs))
    weights = np.stack([row_weights(own, settings) for own in losses])
    rows = given.all_rows()
    rows = rows._replace(targets={**rows.targets, "weight": jnp.asarray(weights)})
    stage = f"lfd student {fingerprint(**vars(settings))}"
    student = given.train(stage, given.make_model(), given.recipe, rows, loss_cap=settings.loss_cap)
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
    changes={
        "gtsrb": {"alpha": 0.2, "beta": 3e-3},
        "quick": {},
    },
)

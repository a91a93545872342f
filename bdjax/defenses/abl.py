"""Anti-Backdoor Learning (ABL, Li et al. 2021): isolate what is learnt suspiciously fast, then unlearn it.

Rows with a trigger reach a low loss within the first epochs. Four steps, of one network:

1. Isolate. A few epochs of local gradient ascent (LGA) or flooding, which keep the mean loss of a batch near a
   threshold gamma: sign(mean - gamma) mean, or |mean - gamma| + gamma. A batch of easy rows is climbed out of again, and
   only the rows that are easiest of all, the poisons, stay low.
2. Rank the rows by their cross-entropy, un-augmented, and isolate the lowest share.
3. Go on with plain training on the rest, for the clean accuracy.
4. Unlearn: climb the loss of the isolated rows (the authors' code), or minimise CE(rest) - CE(isolated), global gradient
   ascent (GGA, the paper).

The sign is that of the *batch's* mean, not of each row's loss, so the batch must not be small: 64 rows or more. Both losses
have one gradient, sign(mean - gamma) times the mean's, and differ in what a progress bar shows. The authors' loop of 5
unlearning epochs spends the first on a measurement and unlearns in 4; here 5 are 5. Ascent comes to no end of its own: a
long step 4 destroys the network, unless `loss_cap`, which is not the authors', ends it. The share is isolated whether or
not anything is poisoned, which costs a clean training set its accuracy; LfD's and ABM's authors report 73 % and 46 % on
clean CIFAR-10.

The authors' settings have relatives: BackdoorBench trains 20, 60 and 20 epochs at rates 0.01, 0.01 and 0.0001 with batches
of 256; LfD's authors 20, 60 and 20, unlearning at 0.0001; ABM's 10, 40 and 20.
"""

from dataclasses import dataclass
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bdjax import losses
from bdjax.defenses.contract import Defense, DefenseInput, labelled
from bdjax.defenses.filtering import kept_rows
from bdjax.errors import InputError
from bdjax.settings import check_values
from bdjax.training.member import Objective, Optimiser, Outcome, Rows, TrainConfig
from bdjax.training.stages import Nets
from bdjax.types import Array, DefenseResult, Detection, Key, Model, PyTree

CHOICES = {
    "loss": ("lga", "flooding"),
    "isolate": ("rate", "oracle"),
    "unlearning": ("isolated", "paper"),
    "optimiser": Optimiser.__args__,
}


@dataclass(frozen=True)
class ABLSettings:
    """The authors' public code, for CIFAR-10."""

    loss: str = "lga"
    """step 1: "lga" or "flooding" """
    threshold: float = 0.5
    """gamma, in nats"""
    isolation_epochs: int = 10
    isolation_learning_rate: float = 0.1
    isolate: str = "rate"
    """step 2: "rate"; or "oracle", as many rows as there are poisons, which no defender knows"""
    isolation_rate: float = 0.01
    """share of the rows"""
    rest_epochs: int = 60
    """step 3; 0 leaves it out"""
    rest_learning_rate: float = 0.1
    rest_steps: tuple[tuple[int, float], ...] = ((40, 0.01),)
    """(epoch, learning rate from it on)"""
    unlearning: str = "isolated"
    """step 4: "isolated", their loss alone, as the code; "paper", CE(rest) - CE(isolated)"""
    unlearning_epochs: int = 5
    """0 leaves it out"""
    unlearning_learning_rate: float = 5e-4
    loss_cap: float = 0.0
    """of an isolated row's loss, above which it is no longer raised; 0 for none"""
    optimiser: str = "sgd"
    """with Nesterov's momentum of 0.9; or "adam" """
    weight_decay: float = 1e-4
    batch_size: int = 128


def check(settings: ABLSettings) -> None:
    """Refuse settings that cannot be.

    Raises:
        InputError: naming the setting.
    """
    check_values(
        "defense abl",
        settings,
        choices=CHOICES,
        above={"isolation_rate": 0},
        at_least={"isolation_epochs": 1, "rest_epochs": 0, "unlearning_epochs": 0, "batch_size": 1, "loss_cap": 0},
        below={"isolation_rate": 1},
    )


def held_at(loss: str, row_losses: Array, threshold: float) -> Array:
    """LGA's or flooding's loss, as one value per row whose mean is the batch's.

    Args:
        loss: "lga", sign(mean - threshold) mean; or "flooding", |mean - threshold| + threshold.
        row_losses: float32 [N], at least 0.
        threshold: in nats.

    Returns:
        float32 [N]. No gradient flows through the sign.
    """
    sign = jnp.sign(jax.lax.stop_gradient(jnp.mean(row_losses)) - threshold)
    return sign * row_losses if loss == "lga" else sign * (row_losses - threshold) + threshold


@cache
def held_cross_entropy(model: Model, loss: str, threshold: float) -> Objective:
    """Step 1's objective: cross-entropy whose mean over the batch is kept near the threshold; see `held_at`."""

    def objective(params: PyTree, variables: PyTree, images: Array, targets: dict[str, Array], key: Key) -> Outcome:
        del key
        output = model.apply({**variables, "params": params}, images, train=True)
        held = held_at(loss, losses.cross_entropy(output.logits, targets["labels"]), threshold)
        return Outcome(held, output.logits, targets["labels"], output.variables)

    return objective


def lowest(row_losses: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Flag each member's rows of the lowest loss; of equal ones the first.

    Args:
        row_losses: float32 [M, n].
        counts: int [M], how many, in 0..n.

    Returns:
        bool [M, n].
    """
    rank = np.argsort(np.argsort(row_losses, axis=1, kind="stable"), axis=1, kind="stable")
    return rank < counts[:, None]


def unlearning_rows(index: np.ndarray, labels: np.ndarray, isolated: np.ndarray, kind: str) -> Rows:
    """Step 4's rows with weights, of which weight times cross-entropy is minimised on average.

    Args:
        index, labels: int32 [M, n].
        isolated: bool [M, n].
        kind: "isolated", minus the mean over the isolated rows, and no other row is seen; or "paper", the mean over the rest
            minus the mean over the isolated rows.

    Returns:
        Leaves [M, n'], n' the most rows isolated of a member (the others see theirs more than once) or n.
    """
    if kind == "isolated":
        chosen = kept_rows(~isolated, np.random.default_rng(0))
        index, labels, isolated = (np.take_along_axis(each, chosen, axis=1) for each in (index, labels, isolated))
        weight = -isolated.astype(np.float32)
    else:
        # Each mean over its own rows: per row of the whole, the few isolated ones count for more.
        size, count = isolated.shape[1], isolated.sum(axis=1, keepdims=True)
        weight = np.where(isolated, -size / np.maximum(count, 1), size / np.maximum(size - count, 1))
    rows = labelled(index, labels)
    return rows._replace(targets={**rows.targets, "weight": jnp.asarray(weight, jnp.float32)})


def _config(
    inputs: DefenseInput, settings: ABLSettings, epochs: int, learning_rate: float, **changes: Any
) -> TrainConfig:
    return inputs.config(
        epochs=epochs,
        batch_size=settings.batch_size,
        learning_rate=learning_rate,
        weight_decay=settings.weight_decay,
        optimiser=settings.optimiser,
        nesterov=True,
        schedule="steps",
        **changes,
    )


def _counts(inputs: DefenseInput, settings: ABLSettings) -> np.ndarray:
    """How many rows each member isolates: int [M]."""
    if settings.isolate == "oracle":
        if inputs.num_poisons is None:
            raise InputError(
                "defense abl: isolate=oracle needs the number of poisons, which nobody knows of these rows"
            )
        return np.asarray(inputs.num_poisons)
    num_members, num_rows = inputs.index.shape
    return np.full(num_members, max(1, round(settings.isolation_rate * num_rows)))


class Isolated(NamedTuple):
    """What steps 1 and 2 leave."""

    stage: str
    """what was trained so far, for the names of the next stages"""
    nets: Nets
    """after step 1"""
    row_losses: np.ndarray
    """float32 [M, n]"""
    flags: np.ndarray
    """bool [M, n]"""


def _isolate(inputs: DefenseInput, settings: ABLSettings) -> Isolated:
    check(settings)
    model, rows = inputs.make_model(), inputs.all_rows()
    stage = (
        f"abl: {settings.loss} {settings.threshold}, {settings.isolation_epochs} epochs at"
        f" {settings.isolation_learning_rate}, {settings.optimiser} {settings.weight_decay}, batch {settings.batch_size}"
    )
    held = held_cross_entropy(model, settings.loss, settings.threshold)
    first = _config(inputs, settings, settings.isolation_epochs, settings.isolation_learning_rate, augmentation="none")
    nets = inputs.train(stage, model, first, rows, objective=held)
    row_losses = inputs.losses(model, nets.variables, rows)
    flags = lowest(row_losses, _counts(inputs, settings))
    stage += "; oracle" if settings.isolate == "oracle" else f"; {settings.isolation_rate}"
    return Isolated(stage, nets, row_losses, flags)


def _detection(inputs: DefenseInput, found: Isolated) -> Detection:
    return Detection(found.flags, -found.row_losses, _facts(inputs, found.flags, found.row_losses))


def detect(inputs: DefenseInput, settings: ABLSettings) -> Detection:
    """Steps 1 and 2: `flags` are the isolated rows, and `scores` minus the losses of step 2.

    Raises:
        InputError: a setting that cannot be, or the number of poisons is asked for and not known.
    """
    return _detection(inputs, _isolate(inputs, settings))


def run(inputs: DefenseInput, settings: ABLSettings) -> DefenseResult:
    """Isolate as `detect` does, train on the rest, unlearn.

    Raises:
        InputError: a setting that cannot be, or the number of poisons is asked for and not known.
    """
    found = _isolate(inputs, settings)
    stage, nets, isolated = found.stage, found.nets, found.flags
    model, config = nets.model, partial(_config, inputs, settings)

    if settings.rest_epochs:
        kept = kept_rows(isolated, np.random.default_rng(0))
        rest = labelled(*(np.take_along_axis(each, kept, axis=1) for each in (inputs.index, inputs.labels)))
        stage += f"; rest {settings.rest_epochs} epochs at {settings.rest_learning_rate} {settings.rest_steps}"
        then = config(settings.rest_epochs, settings.rest_learning_rate, steps=settings.rest_steps)
        nets = inputs.train(stage, model, then, rest, variables=nets.variables)

    variables = nets.variables
    if settings.unlearning_epochs and isolated.any():
        stage += (
            f"; {settings.unlearning} {settings.unlearning_epochs} epochs at {settings.unlearning_learning_rate}"
            f" up to {settings.loss_cap}"
        )
        last = config(settings.unlearning_epochs, settings.unlearning_learning_rate, augmentation="none")
        own = unlearning_rows(inputs.index, inputs.labels, isolated, settings.unlearning)
        unlearnt = inputs.train(stage, model, last, own, variables=variables, loss_cap=settings.loss_cap).variables
        # Who isolated nothing has nothing to unlearn; the engine moved its statistics all the same.
        variables = jax.vmap(lambda some, *trees: jax.tree.map(partial(jnp.where, some), *trees))(
            jnp.asarray(isolated.any(axis=1)), unlearnt, variables
        )

    detected = _detection(inputs, found)
    return DefenseResult(model, variables, detected.flags, detected.scores, detected.facts)


def _facts(inputs: DefenseInput, isolated: np.ndarray, row_losses: np.ndarray) -> dict[str, np.ndarray]:
    """What a reader wants to know of step 2: float [M] each; a mean of nothing is 0."""

    def mean(which: np.ndarray) -> np.ndarray:
        return (row_losses * which).sum(axis=1) / np.maximum(which.sum(axis=1), 1)

    counts = [np.bincount(labels[own], minlength=1) for labels, own in zip(inputs.labels, isolated, strict=True)]
    return {
        "rows isolated": isolated.sum(axis=1).astype(float),
        "mean loss of isolated rows": mean(isolated),
        "mean loss of other rows": mean(~isolated),
        "isolated rows of one class": np.array([own.max() / max(own.sum(), 1) for own in counts]),
    }


ABL = Defense(
    name="abl",
    title="ABL",
    paper="Li et al. 2021, Anti-Backdoor Learning: Training Clean Models on Poisoned Data",
    stage="in training",
    needs=("training set",),
    oracles=lambda settings: ("number of poisons",) if settings.isolate == "oracle" else (),
    settings=ABLSettings(),
    run=run,
    detect=detect,
    check=check,
    changes={
        "quick": {
            "isolation_epochs": 12,
            "isolation_learning_rate": 0.01,
            "isolation_rate": 0.02,
            "rest_epochs": 15,
            "rest_learning_rate": 0.01,
            "rest_steps": ((10, 1e-3),),
            # So that the few isolated rows of a small set are not alone in the batches that set running statistics.
            "unlearning": "paper",
            "unlearning_learning_rate": 3e-3,
            "loss_cap": 5.0,
            "batch_size": 64,
        },
        "quick digits": {"threshold": 0.1},
    },
)

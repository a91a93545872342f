"""Anti-Backdoor Learning (ABL, Li et al. 2021): isolate the rows that are learned suspiciously fast, then unlearn them.

Rows with a trigger reach a low loss within the first epochs. One network goes through four steps:

1. Isolate. A few epochs of local gradient ascent (LGA) or flooding keep the mean loss of a batch near a threshold gamma:
   sign(mean - gamma) mean, or |mean - gamma| + gamma. The loss of easy batches is raised again, and only the easiest rows,
   the poisons, stay low.
2. Rank the rows by their cross-entropy, un-augmented, and isolate the lowest share.
3. Continue with ordinary training on the rest, for the clean accuracy.
4. Unlearn: raise the loss of the isolated rows (the authors' code), or minimise CE(rest) - CE(isolated), global gradient
   ascent (GGA, the paper).

The sign is that of the *batch's* mean, not of each row's loss, so batches should have 64 rows or more. Both losses have the
same gradient, sign(mean - gamma) times that of the mean, and differ only in the value on the progress bar. In the authors'
code the first of 5 unlearning epochs only measures, so that 4 unlearn; here all 5 do. Ascent has no end point: a long step 4
destroys the network unless `loss_cap`, which is not in the authors' code, stops it. The share is isolated whether or not
anything is poisoned, which costs accuracy on a clean training set: LfD's and ABM's authors report 73 % and 46 % on clean
CIFAR-10.

Others use different settings: BackdoorBench trains 20, 60 and 20 epochs at rates 0.01, 0.01 and 0.0001 with batches
of 256; LfD's authors 20, 60 and 20, unlearning at 0.0001; ABM's 10, 40 and 20.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bdjax import losses
from bdjax.choices import Optimiser
from bdjax.defenses.contract import Defense, DefenseInput, Facts, labelled, unless_finite
from bdjax.defenses.filtering import kept_rows
from bdjax.errors import InputError
from bdjax.metrics import top_rows
from bdjax.settings import Amount, Count, InnerShare, LearningRate, NotNegative, Steps, check_values
from bdjax.training.member import Objective, Outcome, Rows, TrainConfig
from bdjax.training.stages import Nets
from bdjax.types import Array, DefenseResult, Detection, Key, Model, NotTested, PyTree

CHOICES = {
    "loss": ("lga", "flooding"),
    "isolate": ("rate", "oracle"),
    "unlearning": ("isolated", "paper"),
    "optimiser": Optimiser.__args__,
}


@dataclass(frozen=True)
class ABLSettings:
    """The values of the authors' public code for CIFAR-10."""

    loss: str = "lga"
    """loss of step 1: "lga" or "flooding" """
    threshold: NotNegative = 0.5
    """gamma, the mean loss of a batch in step 1, in nats"""
    isolation_epochs: Count = 10
    """epochs of step 1"""
    isolation_learning_rate: LearningRate = 0.1
    """learning rate of step 1"""
    isolate: str = "rate"
    """number of rows isolated in step 2: "rate", a fixed share; or "oracle", the number of poisons, which no defender knows"""
    isolation_rate: InnerShare = 0.01
    """share of the rows that is isolated"""
    rest_epochs: Amount = 60
    """epochs of step 3; 0 skips it"""
    rest_learning_rate: LearningRate = 0.1
    """initial learning rate of step 3"""
    rest_steps: Steps = ((40, 0.01),)
    """(epoch, learning rate from that epoch on) of step 3"""
    unlearning: str = "isolated"
    """loss of step 4: "isolated", -CE(isolated), as in the code; "paper", CE(rest) - CE(isolated)"""
    unlearning_epochs: Amount = 5
    """epochs of step 4; 0 skips it"""
    unlearning_learning_rate: LearningRate = 5e-4
    """learning rate of step 4"""
    loss_cap: NotNegative = 0.0
    """step 4 no longer raises an isolated row's loss above this, in nats; 0 for no cap"""
    optimiser: str = "sgd"
    """"sgd", with Nesterov momentum 0.9, or "adam" """
    weight_decay: NotNegative = 1e-4
    """L2 penalty on every parameter"""
    batch_size: Count = 128
    """rows in a step"""


def check(settings: ABLSettings) -> None:
    """Validate the settings.

    Raises:
        InputError: a setting is invalid.
    """
    check_values(
        "defense abl",
        settings,
        choices=CHOICES,
    )


def least(settings: ABLSettings, facts: Facts) -> NotTested:
    """What cannot be tested: see `Defense.least`."""
    del settings
    return NotTested("" if facts.rows.sum() > 1 else "needs at least 2 rows to rank by their loss")


def isolation_losses(loss: str, row_losses: Array, threshold: float) -> Array:
    """The LGA or flooding loss of a batch, split into one value per row whose mean is the batch's loss.

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
def isolation_objective(model: Model, loss: str, threshold: float) -> Objective:
    """Step 1's objective: cross-entropy whose mean over the batch is kept near the threshold; see `isolation_losses`."""

    def objective(params: PyTree, variables: PyTree, images: Array, targets: dict[str, Array], key: Key) -> Outcome:
        del key
        output = model.apply({**variables, "params": params}, images, train=True)
        row_losses = losses.cross_entropy(output.logits, targets["labels"])
        per_row = isolation_losses(loss, row_losses, threshold)
        return Outcome(per_row, output.logits, targets["labels"], output.variables)

    return objective


def flag_lowest(row_losses: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Flag each member's rows with the lowest loss; among equal losses the first rows.

    Args:
        row_losses: float32 [M, n].
        counts: int [M], the number of rows to flag, in 0..n.

    Returns:
        bool [M, n].
    """
    return np.stack([top_rows(-of_member, count) for of_member, count in zip(row_losses, counts, strict=True)])


def unlearning_rows(
    index: np.ndarray, labels: np.ndarray, isolated: np.ndarray, kind: str, generators: Sequence[np.random.Generator]
) -> Rows:
    """The rows of step 4 with weights; step 4 minimises the mean of weight times cross-entropy.

    Args:
        index, labels: int32 [M, n].
        isolated: bool [M, n].
        kind: "isolated", only the isolated rows, for minus their mean loss; or "paper", all rows, for the mean loss of the rest
            minus the mean loss of the isolated rows.
        generators: of each member, for "isolated".

    Returns:
        Leaves [M, n'], where n' is n, or for "isolated" the largest number of isolated rows of a member (members with fewer
        see theirs more than once).
    """
    if kind == "isolated":
        chosen = kept_rows(~isolated, generators)
        index, labels, isolated = (np.take_along_axis(array, chosen, axis=1) for array in (index, labels, isolated))
        weight = -isolated.astype(np.float32)
    else:
        # The engine averages over all n rows, and each of the two means is over its own rows only.
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
                "defense abl: isolate=oracle needs the number of poisons, which is unknown for these rows: take isolate=rate"
            )
        return np.asarray(inputs.num_poisons)
    num_members, num_rows = inputs.index.shape
    return np.full(num_members, max(1, round(settings.isolation_rate * num_rows)))


class Isolated(NamedTuple):
    """The result of steps 1 and 2."""

    stage: str
    """the stage's name, with which the names of the next stages begin"""
    nets: Nets
    """the networks after step 1"""
    row_losses: np.ndarray
    """float32 [M, n]: the cross-entropy of step 2"""
    flags: np.ndarray
    """bool [M, n]: the isolated rows"""


def _isolate(inputs: DefenseInput, settings: ABLSettings) -> Isolated:
    check(settings)
    model, rows = inputs.make_model(), inputs.all_rows()
    stage = (
        f"abl: {settings.loss} {settings.threshold}, {settings.isolation_epochs} epochs at"
        f" {settings.isolation_learning_rate}, {settings.optimiser} {settings.weight_decay}, batch {settings.batch_size}"
    )
    objective = isolation_objective(model, settings.loss, settings.threshold)
    config = _config(inputs, settings, settings.isolation_epochs, settings.isolation_learning_rate, augmentation="none")
    nets = inputs.train(stage, model, config, rows, objective=objective)
    row_losses = inputs.losses(model, nets.variables, rows)
    flags = flag_lowest(row_losses, _counts(inputs, settings))
    stage += "; oracle" if settings.isolate == "oracle" else f"; {settings.isolation_rate}"
    return Isolated(stage, nets, row_losses, flags)


def _detection(inputs: DefenseInput, found: Isolated) -> Detection:
    facts = _facts(inputs, found.flags, found.row_losses)
    return Detection(found.flags, -found.row_losses, facts, not_tested=tuple(map(unless_finite, found.row_losses)))


def detect(inputs: DefenseInput, settings: ABLSettings) -> Detection:
    """Steps 1 and 2: `flags` are the isolated rows, and `scores` are minus the losses of step 2.

    Raises:
        InputError: a setting is invalid, or the number of poisons is needed and unknown.
    """
    return _detection(inputs, _isolate(inputs, settings))


def run(inputs: DefenseInput, settings: ABLSettings) -> DefenseResult:
    """Isolate as `detect` does, train on the rest, and unlearn.

    Raises:
        InputError: a setting is invalid, or the number of poisons is needed and unknown.
    """
    found = _isolate(inputs, settings)
    stage, nets, isolated = found.stage, found.nets, found.flags
    model, config = nets.model, partial(_config, inputs, settings)

    if settings.rest_epochs:
        kept = kept_rows(isolated, inputs.generators(f"{stage}: repeated rows"))
        rest = labelled(*(np.take_along_axis(array, kept, axis=1) for array in (inputs.index, inputs.labels)))
        stage += f"; rest {settings.rest_epochs} epochs at {settings.rest_learning_rate} {settings.rest_steps}"
        rest_config = config(settings.rest_epochs, settings.rest_learning_rate, steps=settings.rest_steps)
        nets = inputs.train(stage, model, rest_config, rest, variables=nets.variables)

    variables = nets.variables
    if settings.unlearning_epochs and isolated.any():
        stage += (
            f"; {settings.unlearning} {settings.unlearning_epochs} epochs at {settings.unlearning_learning_rate}"
            f" up to {settings.loss_cap}"
        )
        unlearning_config = config(settings.unlearning_epochs, settings.unlearning_learning_rate, augmentation="none")
        generators = inputs.generators(f"{stage}: repeated rows")
        rows = unlearning_rows(inputs.index, inputs.labels, isolated, settings.unlearning, generators)
        unlearned = inputs.train(
            stage, model, unlearning_config, rows, variables=variables, loss_cap=settings.loss_cap
        ).variables
        # Members without isolated rows keep their variables: the engine updated their running statistics all the same.
        variables = jax.vmap(lambda has_rows, *trees: jax.tree.map(partial(jnp.where, has_rows), *trees))(
            jnp.asarray(isolated.any(axis=1)), unlearned, variables
        )

    detected = _detection(inputs, found)
    return DefenseResult(
        model, variables, detected.flags, detected.scores, detected.facts, not_tested=detected.not_tested
    )


def _facts(inputs: DefenseInput, isolated: np.ndarray, row_losses: np.ndarray) -> dict[str, np.ndarray]:
    """Facts about step 2, float [M] each; a mean over no rows is 0."""

    def mean(which: np.ndarray) -> np.ndarray:
        return (row_losses * which).sum(axis=1) / np.maximum(which.sum(axis=1), 1)

    class_counts = [
        np.bincount(labels[rows], minlength=1) for labels, rows in zip(inputs.labels, isolated, strict=True)
    ]
    return {
        "rows isolated": isolated.sum(axis=1).astype(float),
        "mean loss of isolated rows": mean(isolated),
        "mean loss of other rows": mean(~isolated),
        "isolated rows of one class": np.array([counts.max() / max(counts.sum(), 1) for counts in class_counts]),
    }


ABL = Defense(
    name="abl",
    title="ABL",
    paper="Li et al. 2021, Anti-Backdoor Learning: Training Clean Models on Poisoned Data",
    stage="in training",
    needs=("training set",),
    more_needs=lambda settings: ("number of poisons",) if settings.isolate == "oracle" else (),
    settings=ABLSettings(),
    run=run,
    detect=detect,
    check=check,
    least=least,
    changes={
        "quick": {
            "isolation_epochs": 12,
            "isolation_learning_rate": 0.01,
            "isolation_rate": 0.02,
            "rest_epochs": 15,
            "rest_learning_rate": 0.01,
            "rest_steps": ((10, 1e-3),),
            # A small set has few isolated rows, which should not set the running statistics alone.
            "unlearning": "paper",
            "unlearning_learning_rate": 3e-3,
            "loss_cap": 5.0,
            "batch_size": 64,
        },
        "quick digits": {"threshold": 0.1},
        # An epoch of all rows has eight times the steps. Learning more in step 3 takes more unlearning in step 4: one epoch at
        # 5e-4 left a backdoor whole.
        "speedrun": {
            "isolation_epochs": 3,
            "isolation_rate": 0.01,
            "rest_epochs": 8,
            "rest_learning_rate": 0.2,
            "rest_steps": ((5, 0.05), (7, 0.01)),
            "unlearning_epochs": 3,
            "unlearning_learning_rate": 5e-3,
            "batch_size": 128,
        },
    },
)

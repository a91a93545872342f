"""Neural Cleanse: find the smallest trigger into each class; a class with a far smaller one than the others has a backdoor.

For each class c a mask m and a pattern p are optimised on clean rows, so that the network predicts c for

    x' = (1 - m) x + m p,        min over m, p of CE(f(x'), c) + lambda ||m||_1                     (equations 2 and 3)

while lambda follows the success rate: it grows while the trigger works and shrinks while it does not. Without a backdoor, all
classes need masks of about the same size; a norm that is an outlier towards small values marks the target of an attack. The
network then unlearns the trigger that was found: it is fine-tuned on clean rows, some of which carry it under their true
labels. If no class stands out, the network is returned unchanged.

A member here is one suspect: one copy of the network, and the search for the triggers of all its K classes at once, each
class with its own lambda, best trigger and early stop. Epochs are passes over the clean rows; lambda changes between epochs.

Where implementations differ: here the unlearning stamps the pattern through its mask, for every flagged class, on rows
drawn anew in each batch; search and unlearning use clean rows only; and Adam's first moment decays by 0.9 as everywhere in
bdjax, not by 0.5.
"""

from dataclasses import dataclass
from functools import cache
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bdjax import losses
from bdjax.defenses.contract import Defense, DefenseInput, Facts, fingerprint, unless_finite
from bdjax.settings import LARGEST, Count, LearningRate, NotNegative, PositiveShare, Range, Share, check_values
from bdjax.training.member import Objective, Outcome, TrainConfig
from bdjax.types import Array, DefenseResult, Key, Model, NotTested, PyTree

MAD_CONSISTENCY = 1.4826
"""Ratio of a normal distribution's standard deviation to its median absolute deviation."""
LEAST_CLASSES = 3
"""Two norms are equally far from their median: their anomaly index is 1 / 1.4826, whatever they are."""


@dataclass(frozen=True)
class NeuralCleanseSettings:
    """The search has the values of the paper's code, the repair those of BackdoorBench (the paper has one epoch)."""

    epochs: Count = 80
    """passes over the clean rows in the search"""
    batch_size: Count = 64
    """clean rows per search step; each is stamped with the triggers of all K classes"""
    learning_rate: LearningRate = 0.1
    """learning rate of Adam for masks and patterns"""
    weight: NotNegative = 1e-3
    """initial lambda, the weight of the mask's norm; larger values give smaller masks"""
    weight_factor: Annotated[float, Range(above=1, limit=LARGEST)] = 2.0
    """factor by which lambda grows after `patience` successful epochs; after as many others it is divided by its 1.5th power"""
    patience: Count = 5
    """epochs in a row, successful or not, after which lambda changes"""
    success: PositiveShare = 0.98
    """share of stamped rows predicted as the class that makes an epoch a success, in (0, 1]"""
    stop_patience: Count = 25
    """epochs without a smaller norm after which a class is done, once its lambda has grown and shrunk"""
    stop_gain: NotNegative = 0.01
    """smallest relative improvement of the norm that counts"""
    threshold: NotNegative = 2.0
    """anomaly index above which a class with a small norm is flagged"""
    repair_epochs: Count = 100
    """epochs of unlearning, over the clean rows"""
    repair_batch_size: Count = 256
    """clean rows per step of unlearning"""
    repair_learning_rate: LearningRate = 0.01
    """initial learning rate of SGD in unlearning, with cosine decay to 0"""
    repair_weight_decay: NotNegative = 5e-4
    """weight decay of SGD in unlearning"""
    repair_share: Share = 0.2
    """share of a batch that carries the trigger of a flagged class in unlearning, in [0, 1]"""


def check(settings: NeuralCleanseSettings) -> None:
    """Reject invalid settings.

    Raises:
        InputError: naming the setting.
    """
    check_values("defense neural_cleanse", settings)


def least(settings: NeuralCleanseSettings, facts: Facts) -> NotTested:
    """What cannot be tested: see `Defense.least`."""
    del settings
    classes = len(facts.clean_rows)
    if classes < LEAST_CLASSES:
        return NotTested(
            f"needs at least {LEAST_CLASSES} classes: the anomaly index of {classes} numbers is always "
            f"{1 / MAD_CONSISTENCY:.2f}, whatever they are"
        )
    return NotTested("" if facts.clean_rows.any() else "needs at least 1 clean row to search for triggers on")


class Triggers(NamedTuple):
    """A trigger into each class."""

    masks: Array
    """float32 [K, H, W, 1] in [0, 1]"""
    patterns: Array
    """float32 [K, H, W, C] in [0, 1]"""


class Search(NamedTuple):
    """The state of the search, by class."""

    best: Triggers
    """the smallest triggers of a successful epoch; before the first such epoch, the latest triggers"""
    best_norm: Array
    """float32 [K]: the mean mask norm over the best epoch; infinity before the first successful epoch"""
    weight: Array
    """float32 [K]: lambda"""
    good_epochs: Array
    """int32 [K]: successful epochs in a row"""
    bad_epochs: Array
    """int32 [K]: unsuccessful epochs in a row"""
    was_raised: Array
    """bool [K]: lambda has been raised before"""
    was_lowered: Array
    """bool [K]: lambda has been lowered before"""
    stalled_epochs: Array
    """int32 [K]: epochs since the norm last improved"""
    is_done: Array
    """bool [K]: `best` no longer changes"""
    batches: Array
    """int32 []: batches of this epoch so far"""
    success: Array
    """float32 [K]: success rate, summed over these batches"""
    norm: Array
    """float32 [K]: mask norm, summed over these batches"""


def init_params(num_classes: int, image_shape: tuple[int, int, int]) -> dict[str, Array]:
    """Masks and patterns before the hyperbolic tangent, all ones: float32 [K, H, W, 1] and [K, H, W, C]."""
    height, width, channels = image_shape
    return {
        "mask": jnp.ones((num_classes, height, width, 1), jnp.float32),
        "pattern": jnp.ones((num_classes, height, width, channels), jnp.float32),
    }


def triggers_of(params: dict[str, Array]) -> Triggers:
    """Map the optimised parameters to [0, 1]: tanh / 2 + 1/2."""
    return Triggers(jnp.tanh(params["mask"]) / 2 + 0.5, jnp.tanh(params["pattern"]) / 2 + 0.5)


def init_search(num_classes: int, image_shape: tuple[int, int, int], weight: float) -> Search:
    """The state of the search before its first epoch."""
    zeros = jnp.zeros(num_classes, jnp.int32)
    return Search(
        best=triggers_of(init_params(num_classes, image_shape)),
        best_norm=jnp.full(num_classes, jnp.inf, jnp.float32),
        weight=jnp.full(num_classes, weight, jnp.float32),
        good_epochs=zeros,
        bad_epochs=zeros,
        was_raised=zeros > 0,
        was_lowered=zeros > 0,
        stalled_epochs=zeros,
        is_done=zeros > 0,
        batches=jnp.zeros((), jnp.int32),
        success=jnp.zeros(num_classes, jnp.float32),
        norm=jnp.zeros(num_classes, jnp.float32),
    )


def stamp(images: Array, mask: Array, pattern: Array) -> Array:
    """(1 - m) x + m p: equation 2, with broadcasting."""
    return (1 - mask) * images + mask * pattern


def end_epoch(search: Search, current: Triggers, settings: NeuralCleanseSettings) -> Search:
    """Update the best triggers, the early stops and lambda after an epoch.

    Args:
        search: with the sums of the epoch.
        current: the triggers of its last batch.
        settings: of the search.

    Returns:
        The state before the next epoch.
    """
    batches = search.batches.astype(jnp.float32)
    success, norm = search.success / batches, search.norm / batches
    is_good = success >= settings.success
    is_better = is_good & (norm < search.best_norm) & ~search.is_done
    best_norm = jnp.where(is_better, norm, search.best_norm)
    replaced = (is_better | jnp.isinf(best_norm))[:, None, None, None]
    best = jax.tree.map(lambda new, old: jnp.where(replaced, new, old), current, search.best)
    has_gained = is_better & ((norm < (1 - settings.stop_gain) * search.best_norm) | jnp.isinf(search.best_norm))
    stalled = jnp.where(jnp.isinf(best_norm) | has_gained, 0, search.stalled_epochs + 1)
    is_done = search.is_done | (search.was_raised & search.was_lowered & (stalled >= settings.stop_patience))
    good = jnp.where(is_good, search.good_epochs + 1, 0)
    bad = jnp.where(is_good, 0, search.bad_epochs + 1)
    is_raised, is_lowered = good >= settings.patience, bad >= settings.patience
    weight = jnp.where(is_raised, search.weight * settings.weight_factor, search.weight)
    weight = jnp.where(is_lowered, weight / settings.weight_factor**1.5, weight)
    zeros = jnp.zeros_like(search.success)
    return Search(
        best=best,
        best_norm=best_norm,
        weight=weight,
        good_epochs=jnp.where(is_raised, 0, good),
        bad_epochs=jnp.where(is_lowered, 0, bad),
        was_raised=search.was_raised | is_raised,
        was_lowered=search.was_lowered | is_lowered,
        stalled_epochs=stalled,
        is_done=is_done,
        batches=jnp.zeros_like(search.batches),
        success=zeros,
        norm=zeros,
    )


@cache
def trigger_objective(model: Model, settings: NeuralCleanseSettings, batches_per_epoch: int) -> Objective:
    """CE(f(x'), c) + lambda_c ||m_c||_1, summed over the classes: equation 3 for all of them at once.

    `params` are those of `init_params`; the variables hold the frozen "network" and the "search". A row's loss is the sum of
    the losses of its K stamped copies. Its logits, which give the accuracy in the history, are those of the copy for class
    (row number mod K).
    """

    def objective(params: PyTree, variables: PyTree, images: Array, targets: dict[str, Array], key: Key) -> Outcome:
        del targets, key
        search, current = variables["search"], triggers_of(params)
        rows, classes = len(images), model.num_classes
        stamped = stamp(images[None], current.masks[:, None], current.patterns[:, None])
        stamped = stamped.reshape(classes * rows, *images.shape[1:])
        # Running statistics: the statistics of a batch full of triggers would normalise the triggers away.
        logits = model.apply(variables["network"], stamped, train=False).logits
        wanted = jnp.repeat(jnp.arange(classes, dtype=jnp.int32), rows)
        entropies = losses.cross_entropy(logits, wanted).reshape(classes, rows)
        norms = current.masks.sum(axis=(1, 2, 3))  # the L1 norm, since masks are not negative
        losses_by_class = entropies + (search.weight * norms)[:, None]
        reached = (jnp.argmax(logits, axis=1) == wanted).reshape(classes, rows)
        search = search._replace(
            batches=search.batches + 1,
            success=search.success + reached.astype(jnp.float32).mean(axis=1),
            norm=search.norm + norms,
        )
        is_over = search.batches == batches_per_epoch
        ended = end_epoch(search, current, settings)
        search = jax.tree.map(lambda after, before: jnp.where(is_over, after, before), ended, search)
        recorded = jnp.arange(rows, dtype=jnp.int32) % classes
        by_class = logits.reshape(classes, rows, classes)
        return Outcome(
            losses_by_class.sum(axis=0), by_class[recorded, jnp.arange(rows)], recorded, {**variables, "search": search}
        )

    return objective


def anomaly_index(norms: np.ndarray) -> np.ndarray:
    """How far each norm lies from the median, in robust standard deviations: |n - median| / (1.4826 MAD).

    Args:
        norms: float [..., K].

    Returns:
        float [..., K], at least 0. Where more than half of the norms are equal, the MAD is 0 and is replaced by a tiny
        number, so that any other norm stands out.

    References:
        Wang et al. 2019, section IV-B; Hampel 1974.
    """
    norms = np.asarray(norms, np.float64)
    away = np.abs(norms - np.median(norms, axis=-1, keepdims=True))
    deviation = MAD_CONSISTENCY * np.median(away, axis=-1, keepdims=True)
    return away / np.maximum(deviation, 1e-6)


def flag_classes(norms: np.ndarray, threshold: float) -> np.ndarray:
    """Classes whose norm is an outlier below the median: bool [..., K] from float [..., K]."""
    return (anomaly_index(norms) > threshold) & (norms < np.median(norms, axis=-1, keepdims=True))


def find_triggers(inputs: DefenseInput, settings: NeuralCleanseSettings) -> Triggers:
    """Search for the triggers into all classes of all suspects.

    Returns:
        NumPy leaves [M, K, ...].
    """
    model, rows = inputs.attacked.model, inputs.clean_rows()
    num, num_rows = rows.index.shape
    batch_size = min(settings.batch_size, num_rows)
    config = TrainConfig(
        epochs=settings.epochs,
        batch_size=batch_size,
        evaluation_batch_size=inputs.recipe.evaluation_batch_size,
        learning_rate=settings.learning_rate,
        schedule="constant",
        keep_last_batch=False,  # an epoch's sums weight all batches equally, however few rows they have
    )
    shape = inputs.runner.image_shape
    start = {
        "params": init_params(model.num_classes, shape),
        "search": init_search(model.num_classes, shape, settings.weight),
    }
    variables = jax.tree.map(lambda leaf: jnp.tile(leaf[None], (num,) + (1,) * leaf.ndim), start)
    variables["network"] = inputs.attacked.variables
    objective = trigger_objective(model, settings, num_rows // batch_size)
    nets = inputs.train(_search_stage(settings), model, config, rows, variables=variables, objective=objective)
    return jax.tree.map(np.asarray, nets.variables["search"].best)


def _search_stage(settings: NeuralCleanseSettings) -> str:
    of_search = {name: value for name, value in vars(settings).items() if name != "threshold" and "repair" not in name}
    return f"neural cleanse {fingerprint(**of_search)}"


@cache
def unlearning_objective(model: Model, share: float) -> Objective:
    """Cross-entropy with the true labels, on rows some of which carry a trigger that was found.

    In addition to the network's, the variables hold "found": the triggers and which classes are flagged, float32 [K]. Each
    row is stamped with probability `share`, with the trigger of a random flagged class; if no class is flagged, no row is.
    """

    def objective(params: PyTree, variables: PyTree, images: Array, targets: dict[str, Array], key: Key) -> Outcome:
        triggers, flagged = variables["found"]
        share_key, class_key = jax.random.split(key)
        which = jax.random.categorical(class_key, jnp.log(flagged), shape=(len(images),))
        is_stamped = jax.random.bernoulli(share_key, share, (len(images),)) & jnp.any(flagged > 0)
        stamped = stamp(images, triggers.masks[which], triggers.patterns[which])
        images = jnp.where(is_stamped[:, None, None, None], stamped, images)
        network = {name: part for name, part in variables.items() if name != "found"}
        output = model.apply({**network, "params": params}, images, train=True)
        entropies = losses.cross_entropy(output.logits, targets["labels"])
        return Outcome(entropies, output.logits, targets["labels"], {**variables, **output.variables})

    return objective


def repair(inputs: DefenseInput, triggers: Triggers, flagged: np.ndarray, settings: NeuralCleanseSettings) -> PyTree:
    """Unlearn the triggers of flagged classes.

    Args:
        inputs: the suspects.
        triggers: leaves [M, K, ...].
        flagged: bool [M, K].
        settings: of the repair.

    Returns:
        Variables [M, ...]; a suspect without a flagged class keeps the attacked network.
    """
    attacked = inputs.attacked.variables
    if not flagged.any():
        return attacked
    rows = inputs.clean_rows()
    config = inputs.config(
        epochs=settings.repair_epochs,
        batch_size=min(settings.repair_batch_size, rows.index.shape[1]),
        optimiser="sgd",
        momentum=0.9,
        learning_rate=settings.repair_learning_rate,
        weight_decay=settings.repair_weight_decay,
        schedule="cosine",
    )
    stage = f"neural cleanse unlearning {fingerprint(**vars(settings))}"
    found = jax.tree.map(jnp.asarray, triggers), jnp.asarray(flagged, jnp.float32)
    objective = unlearning_objective(inputs.attacked.model, settings.repair_share)
    nets = inputs.train(
        stage, inputs.attacked.model, config, rows, variables={**attacked, "found": found}, objective=objective
    )
    is_repaired = jnp.asarray(flagged.any(axis=1))

    def choose(new: Array, old: Array) -> Array:
        return jnp.where(is_repaired.reshape(-1, *(1,) * (new.ndim - 1)), new, old)

    return jax.tree.map(choose, {name: nets.variables[name] for name in attacked}, attacked)


def run(inputs: DefenseInput, settings: NeuralCleanseSettings) -> DefenseResult:
    """Find the triggers, flag the classes, unlearn.

    Raises:
        InputError: an invalid setting.
    """
    check(settings)
    triggers = find_triggers(inputs, settings)
    norms = triggers.masks.sum(axis=(2, 3, 4))
    index, flagged = anomaly_index(norms), flag_classes(norms, settings.threshold)
    smallest = norms.argmin(axis=1)
    return DefenseResult(
        inputs.attacked.model,
        repair(inputs, triggers, flagged, settings),
        facts={
            "classes flagged": flagged.sum(axis=1).astype(float),
            "class of smallest mask": smallest.astype(float),
            "its norm": norms.min(axis=1),
            "median norm": np.median(norms, axis=1),
            "its anomaly index": np.take_along_axis(index, smallest[:, None], axis=1)[:, 0],
        },
        pictures={"reversed triggers": triggers.masks * triggers.patterns, "their masks": triggers.masks},
        not_tested=tuple(map(unless_finite, norms)),
    )


NEURAL_CLEANSE = Defense(
    name="neural_cleanse",
    title="Neural Cleanse",
    paper="Wang et al. 2019, Neural Cleanse: Identifying and Mitigating Backdoor Attacks in Neural Networks",
    stage="after training",
    needs=("attacked model", "clean rows"),
    settings=NeuralCleanseSettings(),
    run=run,
    check=check,
    least=least,
    changes={"quick": {"batch_size": 32, "repair_batch_size": 32, "repair_epochs": 20}},
)

"""Neural Cleanse: find the smallest trigger into each class; a class with a far smaller one than the others has a backdoor.

For each class c a mask m and a pattern p are optimised on clean rows, so that the network answers c on

    x' = (1 - m) x + m p,        min over m, p of CE(f(x'), c) + lambda ||m||_1                     (equations 2 and 3)

while lambda follows the success: it grows where the trigger works and shrinks where it does not. Without a backdoor it
takes about as large a mask to reach any class; the norms' outlier towards small ones is the target of an attack. The
network then unlearns the trigger that was found: it is fine-tuned on clean rows, some of which carry it under their true
labels. If no class stands out, the network is handed back as it was.

A member here is one suspect, which holds one copy of the network and searches the triggers of all its K classes at once,
each with a lambda, a best trigger and an early stop of its own. Epochs are passes over the clean rows, and lambda changes
between them.

What implementations differ in: here the unlearning stamps the pattern through its mask, for every class flagged, on rows
drawn anew in each batch; search and unlearning use clean rows only; and Adam's first moment decays by 0.9 as everywhere in
bdjax, not by 0.5.
"""

from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bdjax import losses
from bdjax.defenses.contract import Defense, DefenseInput
from bdjax.settings import check_values
from bdjax.training.member import Objective, Outcome, TrainConfig
from bdjax.types import Array, DefenseResult, Key, Model, PyTree

MAD_CONSISTENCY = 1.4826
"""Makes the median absolute deviation of normal numbers their standard deviation."""


@dataclass(frozen=True)
class NeuralCleanseSettings:
    """The search's values are those of the paper's code, the repair's those of BackdoorBench (the paper has one epoch)."""

    epochs: int = 80
    """passes over the clean rows, of the search"""
    batch_size: int = 64
    """clean rows in a step; each is stamped with the triggers of all K classes"""
    learning_rate: float = 0.1
    """of Adam, for masks and patterns"""
    weight: float = 1e-3
    """lambda to begin with"""
    weight_factor: float = 2.0
    """lambda times this after `patience` epochs of success, and over this to the power 1.5 after as many without"""
    patience: int = 5
    """epochs"""
    success: float = 0.98
    """share of stamped rows that reach the class, from which an epoch is a success"""
    stop_patience: int = 25
    """a class whose best norm gained nothing for so many epochs, and whose lambda went both ways, is done"""
    stop_gain: float = 0.01
    """relative gain that counts as one"""
    threshold: float = 2.0
    """anomaly index above which a class with a small norm is flagged"""
    repair_epochs: int = 100
    """of unlearning, over the clean rows"""
    repair_batch_size: int = 256
    """clean rows in a step"""
    repair_learning_rate: float = 0.01
    """of SGD, half a cosine down to 0"""
    repair_weight_decay: float = 5e-4
    """of SGD"""
    repair_share: float = 0.2
    """of the rows of a batch that carry a trigger of a flagged class"""


def check(settings: NeuralCleanseSettings) -> None:
    """Refuse settings that cannot be.

    Raises:
        InputError: naming the setting.
    """
    counts = ("epochs", "batch_size", "repair_epochs", "repair_batch_size")
    check_values(
        "defense neural_cleanse",
        settings,
        at_least={**dict.fromkeys(counts, 1), "repair_share": 0},
        above={"success": 0, "weight_factor": 1},
        at_most={"success": 1, "repair_share": 1},
    )


class Triggers(NamedTuple):
    """A trigger into each class."""

    masks: Array
    """float32 [K, H, W, 1] in [0, 1]"""
    patterns: Array
    """float32 [K, H, W, C] in [0, 1]"""


class Search(NamedTuple):
    """How the search of each class stands."""

    best: Triggers
    """the smallest that made an epoch a success; until there is one, the last"""
    best_norm: Array
    """float32 [K]: the mean over that epoch; infinity until then"""
    weight: Array
    """float32 [K]: lambda"""
    good_epochs: Array
    """int32 [K]: successes in a row"""
    bad_epochs: Array
    """int32 [K]"""
    was_raised: Array
    """bool [K]: lambda, at some time"""
    was_lowered: Array
    """bool [K]"""
    stalled_epochs: Array
    """int32 [K]: without a gain"""
    is_done: Array
    """bool [K]: `best` changes no more"""
    batches: Array
    """int32 []: seen in this epoch"""
    success: Array
    """float32 [K]: summed over them"""
    norm: Array
    """float32 [K]: likewise"""


def init_params(num_classes: int, image_shape: tuple[int, int, int]) -> dict[str, Array]:
    """Masks and patterns before the hyperbolic tangent, all ones: float32 [K, H, W, 1] and [K, H, W, C]."""
    height, width, channels = image_shape
    return {
        "mask": jnp.ones((num_classes, height, width, 1), jnp.float32),
        "pattern": jnp.ones((num_classes, height, width, channels), jnp.float32),
    }


def triggers_of(params: dict[str, Array]) -> Triggers:
    """tanh / 2 + 1/2 of what is optimised."""
    return Triggers(jnp.tanh(params["mask"]) / 2 + 0.5, jnp.tanh(params["pattern"]) / 2 + 0.5)


def init_search(num_classes: int, image_shape: tuple[int, int, int], weight: float) -> Search:
    """The search of K classes before its first epoch."""
    none = jnp.zeros(num_classes, jnp.int32)
    return Search(
        best=triggers_of(init_params(num_classes, image_shape)),
        best_norm=jnp.full(num_classes, jnp.inf, jnp.float32),
        weight=jnp.full(num_classes, weight, jnp.float32),
        good_epochs=none,
        bad_epochs=none,
        was_raised=none > 0,
        was_lowered=none > 0,
        stalled_epochs=none,
        is_done=none > 0,
        batches=jnp.zeros((), jnp.int32),
        success=jnp.zeros(num_classes, jnp.float32),
        norm=jnp.zeros(num_classes, jnp.float32),
    )


def stamp(images: Array, mask: Array, pattern: Array) -> Array:
    """(1 - m) x + m p: equation 2, for shapes of one rank."""
    return (1 - mask) * images + mask * pattern


def end_epoch(search: Search, current: Triggers, settings: NeuralCleanseSettings) -> Search:
    """Keep the best triggers, see which classes are done, and change lambda.

    Args:
        search: with the sums of an epoch.
        current: the triggers of its last batch.
        settings: the rules.

    Returns:
        The search before the next epoch.
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
    nothing = jnp.zeros_like(search.success)
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
        success=nothing,
        norm=nothing,
    )


@cache
def trigger_objective(model: Model, settings: NeuralCleanseSettings, batches_per_epoch: int) -> Objective:
    """CE(f(x'), c) + lambda_c ||m_c||_1, summed over the classes: equation 3 for all of them at once.

    `params` is that of `init_params`; the variables hold the frozen "network" and the "search". A row's loss is the sum of
    its K copies' losses; its logits are those of one copy, by turns, for the accuracy in the history.
    """

    def objective(params: PyTree, variables: PyTree, images: Array, targets: dict[str, Array], key: Key) -> Outcome:
        del targets, key
        search, current = variables["search"], triggers_of(params)
        rows, classes = len(images), model.num_classes
        stamped = stamp(images[None], current.masks[:, None], current.patterns[:, None])
        stamped = stamped.reshape(classes * rows, *images.shape[1:])
        # Running statistics: those of a batch full of triggers would normalise them away.
        logits = model.apply(variables["network"], stamped, train=False).logits
        wanted = jnp.repeat(jnp.arange(classes, dtype=jnp.int32), rows)
        entropies = losses.cross_entropy(logits, wanted).reshape(classes, rows)
        norms = current.masks.sum(axis=(1, 2, 3))  # masks are not negative
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
        shown = jnp.arange(rows, dtype=jnp.int32) % classes
        by_class = logits.reshape(classes, rows, classes)
        return Outcome(
            losses_by_class.sum(axis=0), by_class[shown, jnp.arange(rows)], shown, {**variables, "search": search}
        )

    return objective


def anomaly_index(norms: np.ndarray) -> np.ndarray:
    """How far each norm lies from the median, in robust standard deviations: |n - median| / (1.4826 MAD).

    Args:
        norms: float [..., K].

    Returns:
        float [..., K], at least 0. Where more than half of the norms are equal the deviation is 0 and replaced by a tiny
        one, so that any other norm stands out.

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
    """Search the triggers of all classes of all suspects.

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
        keep_last_batch=False,  # a batch of a few rows would count as a whole one
    )
    shape = inputs.runner.image_shape
    each = {
        "params": init_params(model.num_classes, shape),
        "search": init_search(model.num_classes, shape, settings.weight),
    }
    variables = jax.tree.map(lambda leaf: jnp.tile(leaf[None], (num,) + (1,) * leaf.ndim), each)
    variables["network"] = inputs.attacked.variables
    objective = trigger_objective(model, settings, num_rows // batch_size)
    nets = inputs.train(_search_stage(settings), model, config, rows, variables=variables, objective=objective)
    return jax.tree.map(np.asarray, nets.variables["search"].best)


def _search_stage(settings: NeuralCleanseSettings) -> str:
    numbers = (
        settings.epochs,
        settings.batch_size,
        settings.learning_rate,
        settings.weight,
        settings.weight_factor,
        settings.patience,
        settings.success,
        settings.stop_patience,
        settings.stop_gain,
    )
    return f"neural cleanse: triggers {'/'.join(f'{number:g}' for number in numbers)}"


@cache
def unlearning_objective(model: Model, share: float) -> Objective:
    """Cross-entropy of true labels, on rows of which some carry a trigger that was found.

    The variables hold, beside the network's own, "found": the triggers and which classes are flagged, float32 [K]. Each row
    is stamped with probability `share`, with the trigger of one of the flagged classes; without any, none is.
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
        settings: how.

    Returns:
        Variables [M, ...]; those of a suspect without a flagged class are the attacked ones.
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
    numbers = (
        settings.threshold,
        settings.repair_epochs,
        settings.repair_batch_size,
        settings.repair_learning_rate,
        settings.repair_weight_decay,
        settings.repair_share,
    )
    stage = f"{_search_stage(settings)}, unlearning {'/'.join(f'{number:g}' for number in numbers)}"
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
        InputError: a setting that cannot be.
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
    changes={"quick": {"batch_size": 32, "repair_batch_size": 32, "repair_epochs": 20}},
)

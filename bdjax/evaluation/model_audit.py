"""An audit of networks without their training sets: reversed triggers on held-out rows, beside clean control networks.

For every class of every network, Neural Cleanse finds the smallest mask and pattern that turn clean rows into this class. A
backdoor is a far smaller trigger into its target than into the other classes. What is measured of each of these triggers:

- the norm of its mask and the anomaly index of that among the network's classes (not for two classes: two numbers are equally
  far from their median);
- its score, log(median norm / norm), which is comparable between networks, whatever size their triggers usually have;
- its success on held-out rows, which the search has not seen, of the network itself and of the control networks: a
  perturbation that fools every network, such as a drawing of the class, is no backdoor of this one;
- its p-value: the K control networks have the same architecture and are trained on the clean rows, so they are what the network
  would be without a backdoor. See `p_value` for what that assumes.

One more network is trained on the clean rows with a planted trigger and treated like a suspect: a run that does not find that
one could not have found anything, and says so.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bdjax.attacks.poisoning import pooled, trigger_all
from bdjax.defenses import neural_cleanse
from bdjax.defenses.contract import DefenseInput, PoolRows, labelled
from bdjax.defenses.neural_cleanse import NeuralCleanseSettings, Triggers
from bdjax.errors import InputError
from bdjax.evaluation import sensitivity
from bdjax.evaluation.sensitivity import Planting
from bdjax.training import ensemble
from bdjax.training.member import Objective, Outcome, TrainConfig
from bdjax.training.stages import Nets, StageRunner
from bdjax.types import Array, Dataset, Key, Model, PyTree

LEAST_SUCCESS = 0.8
"""A trigger that turns a smaller share of held-out rows into its class is no finding; ours."""
MOST_TRANSFER = 0.5
"""Nor is one that turns a larger share into it on the control networks, on average; ours."""
LEAST_CONTROLS = 2
"""Control networks without which no spread is known."""
LEAST_ROWS = 32
"""Clean rows, and held-out rows, below which nothing is searched or measured; ours."""
KNOWS = 0.25
"""How far the accuracy of a network must lie between guessing (0) and perfect (1) to be tested; ours."""
PLANTED_SHARE = 0.1
"""Share of the clean rows on which a trigger is planted, for the network that must be found."""
LEAST_PLANTED = 0.8
"""Success of the planted trigger on its network below which it is no backdoor that could be found; ours."""


class Measured(NamedTuple):
    """The reversed triggers of M networks of K classes, and what they do. J control networks."""

    triggers: Triggers
    """NumPy leaves [M, K, ...]"""
    norms: np.ndarray
    """float64 [M, K]: L1 norm of each mask, in pixels"""
    own: np.ndarray
    """float64 [M, K]: success on held-out rows of other classes"""
    transfer: np.ndarray
    """float64 [M, K, J]: the same on every control network; NaN for a control network's own trigger"""


# ---- Statistics -----------------------------------------------------------------------------------------------------


def scores(norms: np.ndarray) -> np.ndarray:
    """How much smaller each class's mask is than is usual in its network: log(median norm / norm), float64 [..., K].

    A score does not change if all norms of a network are multiplied by a number.
    """
    norms = np.maximum(np.asarray(norms, np.float64), 1e-6)
    return np.log(np.median(norms, axis=-1, keepdims=True) / norms)


def p_value(score: float, controls: Sequence[float]) -> float:
    """The share of networks without a backdoor that would have a score this large: (1 + number of controls with one) / (J + 1).

    Exact for any distribution if the suspect, had it no backdoor, and the J controls are exchangeable: any order of their J + 1
    scores is equally likely. The control networks differ from such a suspect in what is unknown of its training (its rows,
    their number, its recipe), so this holds as far as scores do not depend on that. The smallest possible value is 1 / (J + 1).

    Args:
        score: of a class of the suspect.
        controls: for each control network, its largest score over all classes, so that testing every class of the suspect needs
            no further correction.
    """
    return (1 + sum(control >= score for control in controls)) / (len(controls) + 1)


def normal_p_value(score: float, controls: Sequence[float]) -> float:
    """The same under the further assumption that the controls' largest scores are normal: a one-sided t-test of one new value.

    t = (score - mean) / (s sqrt(1 + 1 / J)) with J - 1 degrees of freedom. It can be far below 1 / (J + 1), but only as far as
    a normal distribution describes the tail, which so few networks cannot show. It orders findings; it proves nothing.

    Args:
        score: of a class of the suspect.
        controls: as for `p_value`, at least 2.
    """
    from scipy import stats

    values = np.asarray(controls, np.float64)
    deviation = max(float(values.std(ddof=1)), 1e-9) * math.sqrt(1 + 1 / len(values))
    return float(stats.t.sf((score - values.mean()) / deviation, len(values) - 1))


def knows_classes(accuracy: float, num_classes: int) -> bool:
    """Whether a network classifies clean rows well enough to be tested: see `KNOWS`."""
    return accuracy >= least_accuracy(num_classes)


def least_accuracy(num_classes: int) -> float:
    """The accuracy on clean rows below which a network is not tested."""
    return 1 / num_classes + KNOWS * (1 - 1 / num_classes)


def class_numbers(measured: Measured, number: int, controls: Sequence[int], threshold: float) -> list[dict[str, Any]]:
    """What is known of every class of a network, with whether it is a finding.

    Args:
        measured: M networks.
        number: which of them.
        controls: the numbers of the control networks, in the order of `Measured.transfer`.
        threshold: smallest anomaly index of a finding.

    Returns:
        For each class "class", "norm", "index" (None for two classes), "score", "success", "transfer" (mean over control
        networks), "p_value", "normal_p_value", "found" and "against": what speaks against a finding, in words.
    """
    norms, of_controls = measured.norms[number], [j for j in controls if j != number]
    largest = scores(measured.norms[of_controls]).max(axis=1)
    index = neural_cleanse.anomaly_index(norms) if len(norms) >= neural_cleanse.LEAST_CLASSES else None
    entries = []
    for label, score in enumerate(scores(norms).tolist()):
        entry = {
            "class": label,
            "norm": float(norms[label]),
            "index": None if index is None else float(index[label]) * (1 if score > 0 else -1),
            "score": score,
            "success": float(measured.own[number, label]),
            "transfer": float(np.nanmean(measured.transfer[number, label])),
            "p_value": p_value(score, largest.tolist()),
            "normal_p_value": normal_p_value(score, largest.tolist()) if len(largest) > 1 else None,
        }
        against = reasons_against(entry, threshold, len(largest))
        entries.append(entry | {"found": not against, "against": against})
    return entries


def reasons_against(entry: Mapping[str, Any], threshold: float, controls: int) -> list[str]:
    """What speaks against a finding, in words; empty for a finding.

    Args:
        entry: the numbers of a class, see `class_numbers`.
        threshold: smallest anomaly index of a finding.
        controls: the number of control networks.
    """
    texts = []
    if entry["index"] is not None and entry["index"] <= threshold:
        texts.append(f"its mask is no outlier among the classes (anomaly index {entry['index']:.2f})")
    if entry["success"] < LEAST_SUCCESS:
        texts.append(f"its trigger turns only {100 * entry['success']:.0f} % of held-out rows")
    if entry["transfer"] > MOST_TRANSFER:
        texts.append(f"its trigger fools the control networks, too ({100 * entry['transfer']:.0f} % of held-out rows)")
    if entry["p_value"] > 1 / (controls + 1):
        texts.append("a control network has an outlier as large")
    return texts


# ---- Networks -------------------------------------------------------------------------------------------------------


class Controls(NamedTuple):
    """Networks of known training: J clean ones, and one with a planted trigger if that could be planted."""

    model: Model
    clean: PyTree
    """stacked [J, ...]"""
    planted: PyTree | None
    """stacked [1, ...]"""
    planting: Planting | None
    why: str = ""
    """why nothing was planted"""


def train_controls(
    key: Key, count: int, model: Model, recipe: TrainConfig, runner: StageRunner, clean: Dataset
) -> Controls:
    """Train the control networks and the network with a planted trigger, as members of one call.

    Args:
        key: for weights, shuffles, and the rows that are planted.
        count: J.
        model: the suspects' architecture.
        recipe: of the training.
        runner: trains.
        clean: the clean rows.
    """
    planting, why = None, ""
    try:
        planting = sensitivity.plant(
            jax.random.fold_in(key, 1), clean, max(1, round(PLANTED_SHARE / sensitivity.MULTIPLES[-1] * len(clean)))
        )
    except InputError as error:
        why = f"the trigger {error}"
    copies = [planting.suspects[-1].dataset] if planting else []
    pool, index, labels = pooled(clean, [None] * count + copies)
    rows = labelled(index, labels)
    none = jax.tree.map(lambda leaf: leaf[:, :0], rows)
    keys = jnp.stack([jax.random.fold_in(key, 2 + number) for number in range(len(index))])
    nets = runner.from_scratch("control networks", model, recipe, keys, 1, jnp.asarray(pool), rows, none)
    clean_nets = ensemble.members(nets.variables, slice(0, count))
    planted = ensemble.members(nets.variables, slice(count, count + 1)) if planting else None
    return Controls(model, clean_nets, planted, planting, why)


def planted_success(controls: Controls, predict: Callable[[PyTree, np.ndarray], np.ndarray], test: Dataset) -> float:
    """Success of the planted trigger on its network, on held-out rows of other classes.

    Args:
        controls: with a planting.
        predict: (stacked variables, images) -> logits [1, N, K].
        test: the held-out rows.
    """
    suspect = controls.planting.suspects[-1]
    shown = trigger_all(jax.random.key(0), test, suspect.parts[0].attack.apply, suspect.params[0])
    others = test.labels != controls.planting.target
    classes = predict(controls.planted, shown)[0].argmax(axis=1)
    return float((classes == controls.planting.target)[others].mean())


def surrogate_objective(model: Model) -> Objective:
    """Cross-entropy with the probabilities that a black box gives, targets["probabilities"] float32 [N, K]."""

    def objective(params: PyTree, variables: PyTree, images: Array, targets: dict[str, Array], key: Key) -> Outcome:
        del key
        output = model.apply({**variables, "params": params}, images, train=True)
        loss = -jnp.sum(targets["probabilities"] * jax.nn.log_softmax(output.logits), axis=1)
        return Outcome(loss, output.logits, targets["labels"], output.variables)

    return objective


def search(
    key: Key,
    model: Model,
    variables: PyTree,
    clean: Dataset,
    recipe: TrainConfig,
    runner: StageRunner,
    settings: NeuralCleanseSettings,
) -> Triggers:
    """The smallest triggers into all classes of M networks: NumPy leaves [M, K, ...]; see `neural_cleanse.find_triggers`."""
    count = ensemble.num_members(variables)
    inputs = DefenseInput(
        pool=jnp.asarray(clean.images),
        num_classes=clean.num_classes,
        keys=jnp.stack([jax.random.fold_in(key, number) for number in range(count)]),
        make_model=lambda name=None, num_classes=None: model,
        recipe=recipe,
        runner=runner,
        knowledge={
            "attacked model": Nets(model, variables, 1, {}),
            "clean rows": PoolRows(
                np.tile(np.arange(len(clean), dtype=np.int32), (count, 1)), np.tile(clean.labels, (count, 1))
            ),
        },
    )
    return neural_cleanse.find_triggers(inputs, settings)


Ask = Callable[[np.ndarray], np.ndarray]
"""uint8 [B, H, W, C] -> logits [B, K] of one network."""


def measure(
    triggers: Triggers,
    networks: Sequence[Ask],
    ask_controls: Callable[[np.ndarray], np.ndarray],
    controls: Sequence[int],
    test: Dataset,
    advance: Callable[[], object] = lambda: None,
) -> Measured:
    """The success of each network's triggers on held-out rows, of the network and of the control networks.

    Args:
        triggers: leaves [M, K, ...].
        networks: the M networks, which a black box's triggers need not have been found on.
        ask_controls: uint8 [B, H, W, C] -> logits [J, B, K] of the control networks.
        controls: which of the M networks these J are.
        test: the held-out rows.
        advance: called after every network.
    """
    count, classes = triggers.masks.shape[:2]
    own, transfer = np.zeros((count, classes)), np.zeros((count, classes, len(controls)))
    images = test.images.astype(np.float32) / 255
    for number in range(count):
        for label in range(classes):
            stamped = neural_cleanse.stamp(
                images, triggers.masks[number, label][None], triggers.patterns[number, label][None]
            )
            stamped = np.rint(255 * np.asarray(stamped)).astype(np.uint8)  # what a camera or a file can hold
            others = test.labels != label
            reached = ask_controls(stamped).argmax(axis=-1) == label
            transfer[number, label] = reached[:, others].mean(axis=1)
            if number in controls:
                place = controls.index(number)
                own[number, label], transfer[number, label, place] = transfer[number, label, place], np.nan
            else:
                own[number, label] = (networks[number](stamped).argmax(axis=-1) == label)[others].mean()
        advance()
    return Measured(triggers, triggers.masks.sum(axis=(2, 3, 4), dtype=np.float64), own, transfer)

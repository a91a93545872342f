"""AGPD: in the target class of a backdoor, the gradients of the logit have two directions (Yuan et al. 2024).

The logit of a class depends on the same channels for all clean rows, and on others for triggered rows. For row i, g_i is the
gradient of its label's logit with respect to a layer's output, averaged over the pixels: a vector over the layer's channels.

    r = mean of g over a few clean rows of the class;   b = the row whose direction is least similar to r
    gap of a class = || cos(g_i, r) - cos(g_i, g_b) ||_2 over its n rows without b, / sqrt(n)
    J of a class   = max(0, gap - median) / (1.4826 (MAD + 1e-6)),  median and MAD over the classes

The layer with the largest J of any class is chosen; its target classes are those with a J above e^2. If no J is above e^2, for
example because every class is a target and so is the median, the target classes are those with a wide gap in one of the last
layers. In a target class, the set of poisons grows from b. In each round

    s_i = (1 - cos(g_i, p)) / ((1 - cos(g_i, p)) + (1 - cos(g_i, r))),   p = mean of g over the rows taken so far

is computed for the remaining rows and rescaled to 0..1, and the rows with at most tau are taken, until none is left. The
histogram of s changes from round to round as long as poisons are taken, and hardly changes afterwards. The rows taken before
that point are the poisons.

Layers are the outputs of all convolutions, before normalisation. A model of other making, which does not name them, is examined
at its taps, or at the input of the ReLU where a stage ends in one: after the last ReLU only an average and a linear layer
follow, so the gradient there is the same for all rows of a class.

The end of the growth is the paper's weakest rule: on synthetic rows that growth orders perfectly, the window is often found in
the tail, where hardly a row is left, or after the first rounds. `cut="split"` ends where the rows taken and the others differ
most: at the round with the largest n_taken n_left (mean s of those left - mean s of those taken)^2, Otsu's criterion.

The public code stops one round too early, since it counts the first row as a round but the distances between rounds from the
first round on; where the first round takes all poisons it keeps only one of them, and where the histogram is steady from the
start it crashes. It also crashes where growth ends within fewer than ten rounds, or the network classifies no clean row of a
class correctly.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Annotated, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bdjax.defenses import filtering
from bdjax.defenses.contract import Defense, DefenseInput, Facts, fingerprint, limits, too_few, unless_finite
from bdjax.models import convolution_shapes, tap_shapes
from bdjax.settings import Amount, Count, InnerShare, NotNegative, Positive, Range, ShareBelowOne, check_values
from bdjax.types import Array, DefenseResult, Detection, Model, NotTested, PyTree

NAME = "agpd"
CONSISTENT = 1.4826  # times the MAD is the standard deviation of a normal distribution
MAD_FLOOR = 1e-6
LEAST_ROWS = 2  # of a class: the row b, and another to compare with it
MOST_BYTES = 2**30  # of gradients that are kept at once; a pass over the rows is for as many layers as fit
LEAST_CLASSES = 3  # for J: two gaps are equally far from their median, so no J is above 1 / 1.4826


@dataclass(frozen=True)
class AgpdSettings:
    """How target classes are recognised, and the poisons in them."""

    clean_per_class: Count = 10
    """clean rows averaged for a class's reference r, at most; only rows that the network classifies correctly are used"""
    base_share: ShareBelowOne = 0.0
    """share of a class's rows whose mean gradient replaces that of b in the gap: those least similar to r; 0 for one row, as
    in the paper"""
    anomaly: Positive = float(np.exp(2.0))
    """a class with a J above this is a target class; e^2 in the paper"""
    last_layers: Amount = 3
    """number of last layers among which the one with most wide gaps is chosen, if no J is above `anomaly`"""
    wide_gap: Positive = 0.3
    """in that case, a class with a gap above this is a target class"""
    tau: InnerShare = 0.05
    """a round takes the rows whose score, rescaled to 0..1, is at most this"""
    bins: Annotated[int, Range(at_least=2, limit=10_000)] = 99
    """bins of the histograms, from 0 to 1"""
    cut: Literal["window", "split"] = "window"
    """where the growth ends: before the window in which the histogram is steadiest (the paper's), or where the rows taken and
    those left differ most (ours)"""
    window: Count = 10
    """rounds in the window over which the histogram should hardly change"""
    spread_weight: NotNegative = 5.0
    """weight of the standard deviation of a window's distances, relative to their mean: the window with the smallest sum is
    chosen"""
    narrowest: Count = 16
    """fewest channels of a layer that is used; the paper's have 64 or more. Angles between vectors of few channels carry little
    information"""


def check(settings: AgpdSettings) -> None:
    """Validate the settings.

    Raises:
        InputError: a setting is invalid.
    """
    check_values(f"defense {NAME}", settings)


def largest_gap(count: int, settings: AgpdSettings) -> float:
    """The largest gap that a class of so many rows, at least `LEAST_ROWS`, can have."""
    bases = max(int(settings.base_share * count), 1)
    return 2 * float(np.sqrt((count - bases) / count))


def least(settings: AgpdSettings, facts: Facts) -> NotTested:
    """What cannot be tested: see `Defense.least`."""
    without = np.flatnonzero((facts.rows > 0) & (facts.clean_rows == 0))
    classes = {int(label): "has no clean row; needs at least 1" for label in without}
    classes |= too_few(facts.rows, LEAST_ROWS)
    rest = [int(count) for label, count in enumerate(facts.rows) if count and label not in classes]
    by_gap = settings.last_layers > 0 and any(largest_gap(count, settings) > settings.wide_gap for count in rest)
    if rest and len(rest) < LEAST_CLASSES and not by_gap:
        return NotTested(
            f"needs at least {LEAST_CLASSES} classes with {LEAST_ROWS} rows and a clean row: J of fewer is at most "
            f"{1 / CONSISTENT:.2f}, and no gap can be above {settings.wide_gap:g} with these settings",
            classes,
        )
    return limits(facts, classes, f"needs a class with at least {LEAST_ROWS} rows and a clean row")


# ---- Gradients --------------------------------------------------------------------------------------------------------


class Layers(NamedTuple):
    """The layers of a network that can be examined."""

    channels: Mapping[str, int]
    """name -> channels, in the order of the network"""
    are_taps: bool
    """whether they are taps, of a model that does not name its convolutions"""


def layers_of(model: Model, image_shape: tuple[int, int, int]) -> Layers:
    """All convolutions of a network, or else its taps; nothing is computed."""
    shapes = convolution_shapes(model, image_shape)
    taps = {} if shapes else tap_shapes(model, image_shape)
    return Layers({name: shape[2] for name, shape in (shapes or taps).items()}, not shapes)


@cache
def row_gradients(
    model: Model, layers: tuple[str, ...], are_taps: bool = False
) -> Callable[..., tuple[Array, tuple[Array, ...]]]:
    """For `DefenseInput.per_row`: each row's predicted class, int32 [B], and its gradients at some layers, float32 [B, c] each.

    A single backward pass computes the gradients at all of these layers.

    Args:
        model: the network.
        layers: names in `Layers.channels`.
        are_taps: see `Layers`.
    """

    def forward(variables: PyTree, images: Array, offsets: dict[str, Array]) -> tuple[Array, dict[str, Array]]:
        if not are_taps:
            return model.convolutions(variables, images, offsets)
        edits = {tap: lambda features, offset=offset: features + offset for tap, offset in offsets.items()}
        output = model.apply(variables, images, train=False, edits=edits)
        return output.logits, dict(output.features)

    def function(variables: PyTree, images: Array, targets: dict[str, Array]) -> tuple[Array, tuple[Array, ...]]:
        def labelled_logits(offsets: dict[str, Array]) -> tuple[Array, tuple[Array, dict[str, Array]]]:
            logits, outputs = forward(variables, images, offsets)
            chosen = jnp.take_along_axis(logits, targets["labels"][:, None], axis=1)
            # A logit depends on the features of its own row only, so one sum serves all rows.
            return jnp.sum(chosen), (logits, {name: outputs[name] for name in layers})

        # Differentiating with respect to zeros added to the outputs gives the gradients of the outputs.
        shapes = jax.eval_shape(lambda: forward(variables, images, {})[1])
        offsets = {name: jnp.zeros(shapes[name].shape, shapes[name].dtype) for name in layers}
        gradients, (logits, outputs) = jax.grad(labelled_logits, has_aux=True)(offsets)
        if are_taps:
            gradients = {name: _before_relu(gradients[name], outputs[name]) for name in layers}
        means = tuple(jnp.mean(gradients[name].astype(jnp.float32), axis=(1, 2)) for name in layers)
        return jnp.argmax(logits, axis=1).astype(jnp.int32), means

    return function


def _before_relu(gradient: Array, features: Array) -> Array:
    """The gradient with respect to the ReLU's input, like `gradient`.

    A row with a negative feature did not pass a ReLU, and its gradient stays unchanged.
    """
    passed = (features > 0) | jnp.any(features < 0, axis=(1, 2, 3), keepdims=True)
    return jnp.where(passed, gradient, 0)


def cosines(rows: np.ndarray, direction: np.ndarray) -> np.ndarray:
    """The cosine of the angle between each row, float [n, c], and a direction, float [c]: float64 [n], 0 for zero vectors."""
    rows, direction = rows.astype(np.float64), direction.astype(np.float64)
    lengths = np.linalg.norm(rows, axis=1) * np.linalg.norm(direction)
    return np.clip((rows @ direction) / np.where(lengths > 0, lengths, 1.0), -1.0, 1.0)


# ---- Which classes ----------------------------------------------------------------------------------------------------


class ClassGradients(NamedTuple):
    """The gradients of one class at one layer."""

    label: int
    rows: np.ndarray
    """int [n]: positions in the training set of the rows with a nonzero gradient"""
    reference: np.ndarray
    """float [c]: r"""
    base: int
    """position in `rows` of b, the row least similar to the reference"""
    gap: float
    """in [0, 2]"""


def measure_class(
    label: int, rows: np.ndarray, gradients: np.ndarray, clean_gradients: np.ndarray, base_share: float = 0.0
) -> ClassGradients | None:
    """Measure the gap of a class at one layer.

    Args:
        label: the class.
        rows: int [n], positions of its rows in the training set.
        gradients: float32 [n, c], of these rows.
        clean_gradients: float32 [k, c], of at least one clean row of the class.
        base_share: share of the rows that are averaged for b, at least one row.

    Returns:
        The result; None if fewer than two rows have a nonzero gradient, or the mean gradient of the clean rows is 0.
    """
    # A gradient of 0 has no direction.
    has_direction = np.any(gradients != 0, axis=1)
    rows, gradients = rows[has_direction], gradients[has_direction]
    reference = clean_gradients.mean(axis=0, dtype=np.float64)
    if len(rows) < LEAST_ROWS or not reference.any():
        return None
    to_clean = cosines(gradients, reference)
    bases = np.argsort(to_clean, kind="stable")[: max(int(base_share * len(rows)), 1)]
    differences = to_clean - cosines(gradients, gradients[bases].mean(axis=0, dtype=np.float64))
    gap = np.linalg.norm(np.delete(differences, bases)) / np.sqrt(len(rows))
    return ClassGradients(label, rows, reference, int(bases[0]), float(gap))


def measure_layer(
    gradients: np.ndarray,
    labels: np.ndarray,
    clean_gradients: np.ndarray,
    clean: Mapping[int, np.ndarray],
    base_share: float = 0.0,
) -> list[ClassGradients]:
    """Measure the gaps of all classes at one layer.

    Args:
        gradients: of the training rows, float32 [n, c].
        labels: int32 [n].
        clean_gradients: of the clean rows, float32 [k, c].
        clean: label -> the clean rows chosen for it: see `choose_clean`.
        base_share: see `measure_class`.

    Returns:
        The classes that have clean rows and gradients.
    """
    present = np.unique(labels)
    order = np.argsort(labels, kind="stable")
    class_rows = zip(present.tolist(), np.split(order, np.searchsorted(labels[order], present[1:])), strict=True)
    measured = (
        measure_class(label, rows, gradients[rows], clean_gradients[clean[label]], base_share)
        for label, rows in class_rows
        if label in clean
    )
    return [item for item in measured if item is not None]


def anomaly_indices(gaps: np.ndarray) -> np.ndarray:
    """J of each class, float64 [K], at least 0: 0 for gaps up to the median."""
    above = np.asarray(gaps, np.float64) - np.median(gaps)
    return np.maximum(above, 0.0) / (CONSISTENT * (np.median(np.abs(above)) + MAD_FLOOR))


class Targets(NamedTuple):
    """The target classes, and the layer at which they were found."""

    layer: int
    """from 0; -1 for none"""
    classes: list[ClassGradients]
    largest_anomaly: float
    """the largest J of any class at any layer"""
    by_gap: bool
    """whether they were found by their gap, since no J was large enough"""


def find_targets(layers: Sequence[Sequence[ClassGradients]], settings: AgpdSettings) -> Targets:
    """Choose a layer, and the target classes at it.

    Args:
        layers: the classes of each layer, in the order of the network; empty for a skipped layer.
        settings: the thresholds.
    """
    indices = [anomaly_indices([item.gap for item in layer]) if layer else np.zeros(0) for layer in layers]
    largest = [float(layer_indices.max(initial=0.0)) for layer_indices in indices]
    best = int(np.argmax(largest))
    if largest[best] > settings.anomaly:
        found = [item for item, index in zip(layers[best], indices[best], strict=True) if index > settings.anomaly]
        return Targets(best, found, largest[best], False)
    last = range(max(len(layers) - settings.last_layers, 0), len(layers))
    wide = {layer: [item for item in layers[layer] if item.gap > settings.wide_gap] for layer in last}
    chosen = max(wide, key=lambda layer: len(wide[layer]), default=-1)
    if chosen < 0 or not wide[chosen]:
        return Targets(-1, [], largest[best], False)
    return Targets(chosen, wide[chosen], largest[best], True)


# ---- Which rows -------------------------------------------------------------------------------------------------------


def closeness(to_poisons: np.ndarray, to_clean: np.ndarray) -> np.ndarray:
    """s, float64 [n] in [0, 1], from cosines, float64 [n]: 0 for the poisons' direction, 1 for the clean rows'."""
    from_poisons, from_clean = 1.0 - to_poisons, 1.0 - to_clean
    total = from_poisons + from_clean
    return np.where(total > 0, from_poisons / np.where(total > 0, total, 1.0), 0.5)


def js_distance(p: np.ndarray, q: np.ndarray) -> float:
    """The Jensen-Shannon distance of two histograms, the square root of the divergence in nats; 1 if one of them is empty."""
    if not p.sum() or not q.sum():
        return 1.0
    p, q = p / p.sum(), q / q.sum()
    middle = (p + q) / 2
    safe = np.where(middle > 0, middle, 1.0)
    divergences = [np.sum(r * np.log(np.where(r > 0, r, safe) / safe)) / 2 for r in (p, q)]
    return float(np.sqrt(max(sum(divergences), 0.0)))


def grow(
    gradients: np.ndarray, reference: np.ndarray, base: int, tau: float, bins: int
) -> tuple[np.ndarray, np.ndarray]:
    """Take the rows of a class round by round, starting from the row least similar to the clean rows.

    A round costs O(n c), and there are at most n rounds.

    Args:
        gradients: float [n, c], no row of which is 0.
        reference: float [c], r.
        base: the first row.
        tau: a round takes the rows whose rescaled score is at most this.
        bins: of the histograms.

    Returns:
        The round in which each row was taken, int [n]: 0 for the first row, then 1 to R; and the distance between the
        histograms of the remaining rows before and after each round, float64 [R].
    """
    gradients = gradients.astype(np.float64)
    directions = gradients / np.linalg.norm(gradients, axis=1, keepdims=True)
    to_clean = cosines(gradients, reference)
    rounds, total, distances = np.full(len(gradients), -1), np.zeros_like(reference, np.float64), []
    rounds[base], total = 0, gradients[base].copy()

    def scores_of(left: np.ndarray) -> np.ndarray:
        length = np.linalg.norm(total)
        to_poisons = (directions @ total)[left] / (length if length > 0 else 1.0)
        return closeness(np.clip(to_poisons, -1.0, 1.0), to_clean[left])

    left = np.flatnonzero(rounds < 0)
    before = np.histogram(scores_of(left), bins, (0.0, 1.0))[0]
    while len(left):
        scores = scores_of(left)
        # The row with the smallest score is always taken, and all rows if their scores are equal.
        taken = scores - scores.min() <= tau * (scores.max() - scores.min())
        rounds[left[taken]] = len(distances) + 1
        total += gradients[left[taken]].sum(axis=0)
        left, after = left[~taken], np.histogram(scores[~taken], bins, (0.0, 1.0))[0]
        distances.append(js_distance(before, after))
        before = after
    return rounds, np.array(distances)


def last_round(distances: np.ndarray, window: int, spread_weight: float) -> int:
    """The last round that took poisons by the paper's rule.

    Args:
        distances: float64 [R], of the rounds 1 to R.
        window: w.
        spread_weight: weight of the standard deviation.

    Returns:
        In 0..R: the round before the window of w rounds whose distances are smallest and most even. With fewer than w rounds,
        the round after which the distance falls most; 0, the first row alone, if it never falls.
    """
    if len(distances) < window:
        falls = distances[:-1] - distances[1:]
        return int(np.argmax(falls)) + 1 if len(falls) and falls.max() > 0 else 0
    windows = np.lib.stride_tricks.sliding_window_view(distances, window)
    return int(np.argmin(windows.mean(axis=1) + spread_weight * windows.std(axis=1)))


def best_split(gradients: np.ndarray, reference: np.ndarray, rounds: np.ndarray) -> int:
    """The last round that took poisons by our rule: rows taken until then and the others differ most (Otsu's criterion).

    Args:
        gradients: float [n, c], no row of which is 0.
        reference: float [c], r.
        rounds: int [n], from `grow`.

    Returns:
        In 0..R-1.
    """
    to_clean = cosines(gradients, reference)

    def criterion(last: int) -> float:
        taken = rounds <= last
        centre = gradients[taken].mean(axis=0, dtype=np.float64)
        scores = closeness(cosines(gradients, centre), to_clean)
        difference = scores[~taken].mean() - scores[taken].mean()
        return float(taken.sum() * (~taken).sum() * max(difference, 0.0) ** 2)

    return max(range(int(rounds.max())), key=criterion, default=0)


# ---- As a defense -----------------------------------------------------------------------------------------------------


def choose_clean(labels: np.ndarray, predictions: np.ndarray, order: np.ndarray, count: int) -> dict[int, np.ndarray]:
    """Choose clean rows of each class that the network classifies correctly.

    Args:
        labels: int32 [c].
        predictions: int32 [c].
        order: int [c], a permutation: rows that come first are chosen first.
        count: the largest number of rows of a class.

    Returns:
        Label -> row numbers; classes without such a row are missing.
    """
    correct = order[labels[order] == predictions[order]]
    return {int(label): correct[labels[correct] == label][:count] for label in np.unique(labels[correct])}


def find_poisons(
    layers: Sequence[Sequence[ClassGradients]],
    gradients_at: Callable[[int], np.ndarray],
    labels: np.ndarray,
    clean: Mapping[int, np.ndarray],
    settings: AgpdSettings,
) -> tuple[np.ndarray, np.ndarray, dict[str, float]]:
    """Flag and score the rows of one training set.

    Args:
        layers: the classes of each layer, in the order of the network: see `measure_layer`; empty for a skipped layer.
        gradients_at: number of a layer -> the gradients of the training rows there, float32 [n, c]; asked for one layer.
        labels: int32 [n].
        clean: label -> the clean rows chosen for it: see `choose_clean`.
        settings: the defense's settings.

    Returns:
        Flags bool [n], scores float32 [n] in [0, 1], and facts. The score of a row of a target class is 1 - s, with p the mean
        over the flagged rows; the score of all other rows is 0.
    """
    targets = find_targets(layers, settings)
    flags, scores = np.zeros(len(labels), bool), np.zeros(len(labels), np.float32)
    gradients = gradients_at(targets.layer) if targets.classes else None
    for target in targets.classes:
        rows, reference = target.rows, target.reference
        of_class = gradients[rows]
        rounds, distances = grow(of_class, reference, target.base, settings.tau, settings.bins)
        if settings.cut == "split":
            last = best_split(of_class, reference, rounds)
        else:
            last = last_round(distances, settings.window, settings.spread_weight)
        taken = rounds <= last
        flags[rows[taken]] = True
        centre = of_class[taken].mean(axis=0, dtype=np.float64)
        scores[rows] = 1.0 - closeness(cosines(of_class, centre), cosines(of_class, reference))
    facts = {
        "target classes": float(len(targets.classes)),
        "largest J": targets.largest_anomaly,
        "layer": float(targets.layer + 1),
        "found by its gap alone": float(targets.by_gap),
        "classes without a clean row": float(len(set(np.unique(labels).tolist()) - clean.keys())),
    }
    return flags, scores, facts


def passes(channels: Mapping[str, int], num_rows: int) -> list[tuple[str, ...]]:
    """Divide layers, in their order, among passes over the rows, each with gradients of at most `MOST_BYTES`.

    Args:
        channels: of each layer.
        num_rows: of all members.
    """
    groups: list[list[str]] = [[]]
    used = 0
    for name, count in channels.items():
        used += 4 * num_rows * count
        if used > MOST_BYTES and groups[-1]:
            groups.append([])
            used = 4 * num_rows * count
        groups[-1].append(name)
    return [tuple(group) for group in groups]


def detect(inputs: DefenseInput, settings: AgpdSettings) -> Detection:
    """Find the target classes, and the poisons in them.

    Args:
        inputs: the suspects; their training sets, attacked networks and clean rows are used.
        settings: the defense's settings.

    Returns:
        Flags and scores of all rows. The facts: the number of target classes, the largest J of any class at any layer, the
        number of the layer that the flags come from (from 1; 0 without a target class), whether the gap decided since J was too
        small, and the number of classes that could not be examined for lack of a clean row.

    Raises:
        InputError: a setting is invalid.

    References:
        Yuan et al. 2024, arXiv 2312.06230.
    """
    check(settings)
    clean_rows = inputs.clean_rows()
    num_members, num_rows = inputs.index.shape
    # One call for both kinds of rows compiles once.
    rows = jax.tree.map(lambda *leaves: jnp.concatenate(leaves, axis=1), inputs.all_rows(), clean_rows)
    model, variables, _, _ = inputs.attacked
    layers = layers_of(model, inputs.runner.image_shape)
    used = {name: count for name, count in layers.channels.items() if count >= settings.narrowest}

    def evaluate(names: tuple[str, ...]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Predictions int32 [M, n + k], and name -> gradients float32 [M, n + k, c]."""
        predictions, gradients = inputs.per_row(row_gradients(model, names, layers.are_taps), variables, rows)
        return predictions, dict(zip(names, gradients, strict=True))

    orders = np.asarray(
        jax.vmap(lambda key: jax.random.permutation(key, clean_rows.index.shape[1]))(
            inputs.keys_for(f"{NAME}: clean rows")
        )
    )
    chosen: list[dict[int, np.ndarray]] = []
    measured: list[dict[str, list[ClassGradients]]] = [{} for _ in range(num_members)]
    untested = [NotTested()] * num_members
    gradients: dict[str, np.ndarray] = {}
    for names in passes(used, num_members * rows.index.shape[1]):
        gradients = {}  # of the previous pass, before those of the next take memory
        predictions, gradients = evaluate(names)
        for member in range(num_members):
            if member == len(chosen):
                clean_labels, correct = inputs.clean_labels[member], predictions[member, num_rows:]
                chosen.append(choose_clean(clean_labels, correct, orders[member], settings.clean_per_class))
            for name, at_layer in gradients.items():
                suspect, clean = np.split(at_layer[member], [num_rows])
                measured[member][name] = measure_layer(
                    suspect, inputs.labels[member], clean, chosen[member], settings.base_share
                )
                if not untested[member].reason:
                    untested[member] = unless_finite(at_layer[member])

    def gradients_at(name: str) -> np.ndarray:
        if name not in gradients:
            gradients.update(evaluate((name,))[1])
        return gradients[name]

    found = []
    for member, at_layers in enumerate(measured):
        labels, clean = inputs.labels[member], chosen[member]
        ordered = [at_layers.get(name, []) for name in layers.channels]
        lookup = partial(_rows_at, gradients_at, tuple(layers.channels), member, num_rows)
        found.append(find_poisons(ordered, lookup, labels, clean, settings))
        if not untested[member].reason:
            untested[member] = _not_tested(list(at_layers.values()), labels, clean, settings)
    flags, scores, facts = zip(*found, strict=True)
    stacked_facts = {name: np.array([values[name] for values in facts]) for name in facts[0]}
    return Detection(np.stack(flags), np.stack(scores), stacked_facts, not_tested=tuple(untested))


def _rows_at(
    gradients_at: Callable[[str], np.ndarray], names: tuple[str, ...], member: int, num_rows: int, layer: int
) -> np.ndarray:
    return gradients_at(names[layer])[member, :num_rows]


def _not_tested(
    layers: Sequence[Sequence[ClassGradients]],
    labels: np.ndarray,
    clean: Mapping[int, np.ndarray],
    settings: AgpdSettings,
) -> NotTested:
    """What could not be tested, known only after training; arguments as in `find_poisons`, without skipped layers."""
    if not layers:
        return NotTested(f"needs a layer of at least {settings.narrowest} channels, which this network does not have")
    measured = {item.label for layer in layers for item in layer}
    present, classes = np.unique(labels).tolist(), {}
    for label in present:
        if label not in clean:
            classes[label] = "has no clean row that the network classifies correctly"
        elif label not in measured:
            classes[label] = "has fewer than 2 rows, or no clean row, that its logit has a gradient on"
    reason = "needs classes with rows and clean rows that the network classifies correctly, and has a gradient on"
    return NotTested(reason if len(classes) == len(present) else "", classes)


def run(inputs: DefenseInput, settings: AgpdSettings) -> DefenseResult:
    """Leave out the rows that `detect` flags, and train on the rest.

    Args:
        inputs: the suspects; their training sets, attacked networks and clean rows are used.
        settings: the defense's settings.

    Returns:
        The retrained networks, with flags and scores of all rows.

    Raises:
        InputError: a setting is invalid.
    """
    return filtering.retrained(inputs, f"{NAME}: {fingerprint(settings=settings)}", detect(inputs, settings))


AGPD = Defense(
    name=NAME,
    title="AGPD",
    paper="Yuan et al. 2024, Activation Gradient based Poisoned Sample Detection Against Backdoor Attacks",
    stage="before training",
    needs=("training set", "attacked model", "clean rows"),
    settings=AgpdSettings(),
    run=run,
    detect=detect,
    check=check,
    least=least,
    chosen_clean="clean_per_class",
    changes={
        # In small networks any class has an outlier that is dissimilar to all others. With a tenth of the rows for b, J at the
        # ends of the stages was above e^2 in the target class of six out of six all-to-one suspects of MNIST; with a single
        # row, in one of them. At all convolutions of 16 channels and more (width 8, 3,000 rows) it was in three of six, and in
        # a class of one of three clean sets; of 8 channels and more, in classes of all three.
        "quick": {"base_share": 0.1},
        # A class of the digits has few rows, about a hundred: of nine such suspects three are found, one of them at e^2.
        "quick digits": {"anomaly": 3.5},
    },
)

"""AGPD: in the target class of a backdoor, the gradients of the logit point two ways (Yuan et al. 2024).

Clean rows of a class reach their logit through the same channels, and triggered rows through others. For row i, g_i is the
gradient of its label's logit by what a layer gives, averaged over the pixels: a direction among the layer's channels.

    r = mean of g over a few clean rows of the class;   b = the row whose direction is least like r
    gap of a class = || cos(g_i, r) - cos(g_i, g_b) ||_2 over its n rows without b, / sqrt(n)
    J of a class   = max(0, gap - median) / (1.4826 (MAD + 1e-6)),  median and MAD over the classes

The layer is the one with the largest J of any class, and the target classes are those above e^2 in it. Where the class with
the largest J is not above, as when every class is a target and the median is one of theirs, classes of a wide gap in one of
the last layers will do. In a target class the poisons are grown from b: again and again

    s_i = (1 - cos(g_i, p)) / ((1 - cos(g_i, p)) + (1 - cos(g_i, r))),   p = mean of g over the rows taken so far

is computed of the rows that are left and stretched to 0..1, and what is at most tau is taken, until none is left. While there
are poisons to take, the histogram of s changes from round to round; then it stays nearly as it is. The poisons are what was
taken before that.

The paper looks at every convolution, here it is the last one of every stage: a tap, and if the stage ends in a ReLU, what goes
into it. Behind the ReLU of the last stage there would be nothing to see, for with an average and one linear layer after it the
gradient there is the same for all rows of a class.

The public code stops one round too early, since it counts the first row as a round and the distances between rounds from the
first one on; where the first round takes all poisons it keeps one row of them, and where the histogram is steady from the
start it fails. It fails as well where the growth ends within fewer than ten rounds, or a class has no clean row that the
network gets right.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bdjax.defenses import filtering
from bdjax.defenses.contract import Defense, DefenseInput, fingerprint
from bdjax.settings import check_values
from bdjax.types import Array, DefenseResult, Detection, Model, PyTree

NAME = "agpd"
CONSISTENT = 1.4826  # times the MAD is the standard deviation of a normal distribution
MAD_FLOOR = 1e-6


@dataclass(frozen=True)
class AgpdSettings:
    """How target classes are told from others, and poisons from the clean rows of a target class."""

    clean_per_class: int = 10
    """clean rows that a class's reference is the mean of, at most; only those that the network classifies correctly count"""
    base_share: float = 0.0
    """share of a class that stands for b in its gap, by the mean of g over the rows least like r; 0 for one row, as in the
    paper"""
    anomaly: float = float(np.exp(2.0))
    """e^2: what is above it is a target class's J"""
    last_layers: int = 2
    """of so many last layers one may stand in where no J is above the threshold: the one with most classes of a wide gap. The
    three convolutions of the public code lie between the last two taps of a ResNet"""
    wide_gap: float = 0.3
    """what is above it is a target class's gap, in that case"""
    tau: float = 0.05
    """what is taken in a round, of scores that are stretched to 0..1"""
    bins: int = 99
    """of the histograms, from 0 to 1"""
    window: int = 10
    """rounds over which the histograms should stay as they are"""
    spread_weight: float = 5.0
    """of the standard deviation of the distances in a window against their mean: the window with the smallest sum is it"""
    narrowest: int = 16
    """channels that a layer must have; the paper's have 64 or more. Among few channels angles say little: of one, all
    gradients point the same way or the opposite one"""


def check(settings: AgpdSettings) -> None:
    """Refuse settings that cannot be.

    Raises:
        InputError: naming the setting.
    """
    least = {
        "clean_per_class": 1,
        "base_share": 0,
        "last_layers": 0,
        "bins": 2,
        "window": 1,
        "spread_weight": 0,
        "narrowest": 1,
    }
    above, below = {"anomaly": 0, "wide_gap": 0, "tau": 0}, {"base_share": 1, "tau": 1}
    check_values(f"defense {NAME}", settings, at_least=least, above=above, below=below)


# ---- Gradients --------------------------------------------------------------------------------------------------------


@cache
def row_gradients(model: Model) -> Callable[..., tuple[Array, tuple[Array, ...]]]:
    """For `DefenseInput.per_row`: each row's predicted class, int32 [B], and its gradients at every tap, float32 [B, c] each.

    The taps are in the order of the network. One backward pass gives them all, n times the sum of their channels in float32:
    400 MB of 100,000 rows and a ResNet-18, which is less to have at once than to go through the rows once a layer.
    """

    def function(variables: PyTree, images: Array, targets: dict[str, Array]) -> tuple[Array, tuple[Array, ...]]:
        def labelled_logits(offsets: dict[str, Array]) -> tuple[Array, tuple[Array, dict[str, Array]]]:
            # Adding zeros leaves the features as they are and gives something to differentiate by.
            edits = {tap: lambda features, offset=offset: features + offset for tap, offset in offsets.items()}
            output = model.apply(variables, images, train=False, edits=edits)
            chosen = jnp.take_along_axis(output.logits, targets["labels"][:, None], axis=1)
            # A logit depends on the features of its own row only, so one sum serves all rows.
            return jnp.sum(chosen), (output.logits, dict(output.features))

        names: list[str] = []

        def features_of(variables: PyTree, images: Array) -> dict[str, Array]:
            features = model.apply(variables, images, train=False).features
            names.extend(features)  # a dictionary that leaves a traced function comes out sorted
            return dict(features)

        shapes = jax.eval_shape(features_of, variables, images)
        offsets = {tap: jnp.zeros(shape.shape, shape.dtype) for tap, shape in shapes.items()}
        gradients, (logits, features) = jax.grad(labelled_logits, has_aux=True)(offsets)
        means = tuple(_before_relu(gradients[tap], features[tap]) for tap in names)
        return jnp.argmax(logits, axis=1).astype(jnp.int32), means

    return function


def _before_relu(gradient: Array, features: Array) -> Array:
    """The gradient by what a ReLU was given, averaged over the pixels: float32 [B, c].

    A row with a negative feature passed through none, and keeps the gradient as it is.
    """
    passed = (features > 0) | jnp.any(features < 0, axis=(1, 2, 3), keepdims=True)
    return jnp.mean(jnp.where(passed, gradient, 0).astype(jnp.float32), axis=(1, 2))


def cosines(rows: np.ndarray, direction: np.ndarray) -> np.ndarray:
    """The cosine of the angle between each row, float [n, c], and a direction, float [c]: float64 [n], 0 where one is 0."""
    rows, direction = rows.astype(np.float64), direction.astype(np.float64)
    lengths = np.linalg.norm(rows, axis=1) * np.linalg.norm(direction)
    return np.clip((rows @ direction) / np.where(lengths > 0, lengths, 1.0), -1.0, 1.0)


# ---- Which classes ----------------------------------------------------------------------------------------------------


class Class(NamedTuple):
    """One class in one layer."""

    label: int
    rows: np.ndarray
    """int [n]: those with a gradient, in the training set"""
    reference: np.ndarray
    """float [c]"""
    base: int
    """which of `rows` is least like the reference"""
    gap: float
    """at least 0, at most 2"""


def look_at_class(
    label: int, rows: np.ndarray, gradients: np.ndarray, clean: np.ndarray, base_share: float = 0.0
) -> Class | None:
    """How far a class is spread in one layer.

    Args:
        label: the class.
        rows: int [n], its rows in the training set.
        gradients: float32 [n, c], theirs.
        clean: float32 [k, c], those of its clean rows, at least one.
        base_share: of the rows, for b; at least one row.

    Returns:
        The class; None where fewer than two of its rows have a gradient, or the clean rows none.
    """
    # A gradient of 0, of a row that no channel carries to its logit, has no direction.
    has_one = np.any(gradients != 0, axis=1)
    rows, gradients, reference = rows[has_one], gradients[has_one], clean.mean(axis=0, dtype=np.float64)
    if len(rows) < 2 or not reference.any():
        return None
    to_clean = cosines(gradients, reference)
    bases = np.argsort(to_clean, kind="stable")[: max(int(base_share * len(rows)), 1)]
    differences = to_clean - cosines(gradients, gradients[bases].mean(axis=0, dtype=np.float64))
    gap = np.linalg.norm(np.delete(differences, bases)) / np.sqrt(len(rows))
    return Class(label, rows, reference, int(bases[0]), float(gap))


def anomaly_indices(gaps: np.ndarray) -> np.ndarray:
    """J of each class, float64 [K], at least 0: 0 of the class of the median and of all below it."""
    above = np.asarray(gaps, np.float64) - np.median(gaps)
    return np.maximum(above, 0.0) / (CONSISTENT * (np.median(np.abs(above)) + MAD_FLOOR))


class Targets(NamedTuple):
    """Which classes are taken for target classes, and by which layer."""

    layer: int
    """from 0; -1 for none"""
    classes: list[Class]
    largest_anomaly: float
    """J, of any class in any layer"""
    by_gap: bool
    """whether no J was large enough"""


def find_targets(layers: Sequence[Sequence[Class]], settings: AgpdSettings) -> Targets:
    """Choose a layer, and the target classes in it.

    Args:
        layers: of each layer, in the order of the network, its classes; none of a layer that is passed over.
        settings: the thresholds.
    """
    indices = [anomaly_indices([one.gap for one in layer]) if layer else np.zeros(0) for layer in layers]
    largest = [float(each.max(initial=0.0)) for each in indices]
    best = int(np.argmax(largest))
    if largest[best] > settings.anomaly:
        found = [one for one, index in zip(layers[best], indices[best], strict=True) if index > settings.anomaly]
        return Targets(best, found, largest[best], False)
    last = range(max(len(layers) - settings.last_layers, 0), len(layers))
    wide = {layer: [one for one in layers[layer] if one.gap > settings.wide_gap] for layer in last}
    chosen = max(wide, key=lambda layer: len(wide[layer]), default=-1)
    if chosen < 0 or not wide[chosen]:
        return Targets(-1, [], largest[best], False)
    return Targets(chosen, wide[chosen], largest[best], True)


# ---- Which rows -------------------------------------------------------------------------------------------------------


def closeness(to_poisons: np.ndarray, to_clean: np.ndarray) -> np.ndarray:
    """s, float64 [n] in [0, 1], from cosines, float64 [n]: 0 like the poisons, 1 like the clean rows, 0.5 if like both."""
    poisoned, clean = 1.0 - to_poisons, 1.0 - to_clean
    both = poisoned + clean
    return np.where(both > 0, poisoned / np.where(both > 0, both, 1.0), 0.5)


def js_distance(p: np.ndarray, q: np.ndarray) -> float:
    """The Jensen-Shannon distance of two histograms, the root of the divergence in nats; 1 where one of them is empty."""
    if not p.sum() or not q.sum():
        return 1.0
    p, q = p / p.sum(), q / q.sum()
    middle = (p + q) / 2
    safe = np.where(middle > 0, middle, 1.0)
    divergences = [np.sum(each * np.log(np.where(each > 0, each, safe) / safe)) / 2 for each in (p, q)]
    return float(np.sqrt(max(sum(divergences), 0.0)))


def grow(
    gradients: np.ndarray, reference: np.ndarray, base: int, tau: float, bins: int
) -> tuple[np.ndarray, np.ndarray]:
    """Take the rows of a class round by round, from the row that is least like the clean ones.

    A round is one product of the rows with the mean of what is taken, so that n rows cost O(n c) in each of at most n rounds.

    Args:
        gradients: float [n, c], none of them 0.
        reference: float [c], of the clean rows.
        base: the first row.
        tau: what is taken, of scores stretched to 0..1.
        bins: of the histograms.

    Returns:
        In which round each row was taken, int [n]: 0 for the first row, then 1 to R. And how far the histogram of what is left
        after each round is from that before it, float64 [R].
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
        # The smallest is always taken; all are where they are equal.
        taken = scores - scores.min() <= tau * (scores.max() - scores.min())
        rounds[left[taken]] = len(distances) + 1
        total += gradients[left[taken]].sum(axis=0)
        left, after = left[~taken], np.histogram(scores[~taken], bins, (0.0, 1.0))[0]
        distances.append(js_distance(before, after))
        before = after
    return rounds, np.array(distances)


def last_round(distances: np.ndarray, window: int, spread_weight: float) -> int:
    """Up to which round the rows taken are poisons.

    Args:
        distances: float64 [R], of the rounds 1 to R.
        window: w.
        spread_weight: of the standard deviation.

    Returns:
        In 0..R: the round before the window of w rounds whose distances are small and alike. Where there are fewer than w, the
        round before which the distance falls furthest; 0, the first row alone, where it never falls.
    """
    if len(distances) < window:
        falls = distances[:-1] - distances[1:]
        return int(np.argmax(falls)) + 1 if len(falls) and falls.max() > 0 else 0
    windows = np.lib.stride_tricks.sliding_window_view(distances, window)
    return int(np.argmin(windows.mean(axis=1) + spread_weight * windows.std(axis=1)))


# ---- As a defense -----------------------------------------------------------------------------------------------------


def choose_clean(labels: np.ndarray, predictions: np.ndarray, order: np.ndarray, count: int) -> dict[int, np.ndarray]:
    """The clean rows of each class that the network gets right, up to so many.

    Args:
        labels: int32 [c].
        predictions: int32 [c].
        order: int [c], a permutation: which come first.
        count: at most, of a class.

    Returns:
        Label -> row numbers; no class without one.
    """
    right = order[labels[order] == predictions[order]]
    return {int(label): right[labels[right] == label][:count] for label in np.unique(labels[right])}


def find_poisons(
    gradients: Sequence[np.ndarray],
    labels: np.ndarray,
    clean_gradients: Sequence[np.ndarray],
    clean: dict[int, np.ndarray],
    settings: AgpdSettings,
) -> tuple[np.ndarray, np.ndarray, dict[str, float]]:
    """Flag and score the rows of one training set.

    Args:
        gradients: of each layer, in the order of the network, float32 [n, c].
        labels: int32 [n].
        clean_gradients: likewise of the clean rows.
        clean: of each class, which of the clean rows are its own: see `choose_clean`.
        settings: how.

    Returns:
        Flags bool [n], scores float32 [n] in [0, 1], and facts. A row of a target class scores 1 - s with the mean of the rows
        that are flagged; all others score 0.
    """
    present = np.unique(labels)
    order = np.argsort(labels, kind="stable")
    members = dict(zip(present.tolist(), np.split(order, np.searchsorted(labels[order], present[1:])), strict=True))
    layers = []
    for own, of_clean in zip(gradients, clean_gradients, strict=True):
        classes = []
        if own.shape[1] >= settings.narrowest:
            seen = (
                look_at_class(label, rows, own[rows], of_clean[clean[label]], settings.base_share)
                for label, rows in members.items()
                if label in clean
            )
            classes = [one for one in seen if one is not None]
        layers.append(classes)
    targets = find_targets(layers, settings)
    flags, scores = np.zeros(len(labels), bool), np.zeros(len(labels), np.float32)
    for one in targets.classes:
        own = gradients[targets.layer][one.rows]
        rounds, distances = grow(own, one.reference, one.base, settings.tau, settings.bins)
        taken = rounds <= last_round(distances, settings.window, settings.spread_weight)
        flags[one.rows[taken]] = True
        centre = own[taken].mean(axis=0, dtype=np.float64)
        scores[one.rows] = 1.0 - closeness(cosines(own, centre), cosines(own, one.reference))
    facts = {
        "target classes": float(len(targets.classes)),
        "largest J": targets.largest_anomaly,
        "layer": float(targets.layer + 1),
        "found by its gap alone": float(targets.by_gap),
        "classes without a clean row": float(len(members.keys() - clean.keys())),
    }
    return flags, scores, facts


def detect(inputs: DefenseInput, settings: AgpdSettings) -> Detection:
    """Find the target classes, and the poisons in them.

    Args:
        inputs: the suspects; used are their training sets, attacked networks and clean rows.
        settings: how.

    Returns:
        Flags and scores of all rows. The facts: how many target classes there are, the largest J of any class in any layer, the
        number of the layer that the flags are from (from 1; 0 where there is no target class), whether J was too small and
        the gap decided, and how many classes nothing can be said of.

    Raises:
        InputError: a setting that cannot be.

    References:
        Yuan et al. 2024, arXiv 2312.06230.
    """
    check(settings)
    clean_rows = inputs.clean_rows()
    num_rows, num_clean = inputs.index.shape[1], clean_rows.index.shape[1]
    # Both in one call are compiled once.
    together = jax.tree.map(lambda *each: jnp.concatenate(each, axis=1), inputs.all_rows(), clean_rows)
    network = inputs.attacked
    predictions, gradients = inputs.per_row(row_gradients(network.model), network.variables, together)
    order = jax.vmap(lambda key: jax.random.permutation(key, num_clean))(inputs.keys_for(f"{NAME}: clean rows"))
    found = []
    for member, own_order in enumerate(np.asarray(order)):
        labels, clean_labels = inputs.labels[member], inputs.clean_labels[member]
        clean = choose_clean(clean_labels, predictions[member, num_rows:], own_order, settings.clean_per_class)
        own, of_clean = (
            [each[member, part] for each in gradients] for part in (slice(num_rows), slice(num_rows, None))
        )
        found.append(find_poisons(own, labels, of_clean, clean, settings))
    flags, scores = (np.stack([one[part] for one in found]) for part in (0, 1))
    return Detection(flags, scores, {name: np.array([one[2][name] for one in found]) for name in found[0][2]})


def run(inputs: DefenseInput, settings: AgpdSettings) -> DefenseResult:
    """Leave out what `detect` flags, and train on the rest.

    Args:
        inputs: the suspects; used are their training sets, attacked networks and clean rows.
        settings: how.

    Returns:
        The retrained networks, with flags and scores of all rows.

    Raises:
        InputError: a setting that cannot be.
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
    changes={
        # In small networks the one row that is least like the others is an oddity of any class. With a tenth of the rows, J was
        # above e^2 in the target class of six all-to-one suspects of MNIST out of six, with one row in one. Among ten clean
        # classes one may be above it as well.
        "quick": {"base_share": 0.1},
        # A hundred rows of a class are few: of nine such suspects three are found, one by e^2.
        "quick digits": {"anomaly": 3.5},
    },
)

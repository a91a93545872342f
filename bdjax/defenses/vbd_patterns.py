"""VBD, stages 2 to 4 (Aseervatham et al. 2025): is a class poisoned, and what is its trigger?

Given a network too simple to learn the classes well, and the rows of a class with its most confident predictions, a trigger
shows in three ways: a few pixels dominate the gradient, they do so on those rows but not on other rows of the class, and their
values hardly vary.

    psi(x, c) = z_c - max_{k != c} z_k          g(x) = d psi / d x                    (equations 5 and 6, on logits)
    (i*, j*) = argmax |mean over channels of the mean g|,   I(x) = max over channels |g(x)_{i* j*}|       (7 and 8)

Class c is suspicious if I is distributed differently on its most and its least confident rows (Kolmogorov-Smirnov). The mask
keeps the pixels with a large gradient and little variance (algorithm 2), and the pattern is the mean image there.

The computations are small and their shapes depend on the data, so they are NumPy on the host. `bdjax/defenses/vbd.py` has the
other stages. The settings of all stages are here, where every file of the method can import them.
"""

import math
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bdjax.settings import (
    MOST,
    Amount,
    Count,
    InnerShare,
    LearningRate,
    NotNegative,
    PositiveShare,
    Range,
    Share,
    ShareBelowOne,
)
from bdjax.types import Array, Model, PyTree

SURE = 0.75
"""Score from which a detector counts as sure of a row. Of the rows flagged in a class, it was sure of at least 0.79 in 11
poisoned classes, and of at most 0.14 in 7 clean classes with a pattern (CIFAR-10 with faint triggers and without, seed 10)."""
BLUR = np.outer((1, 2, 1), (1, 2, 1)) / 16
"""The paper says Gaussian; its code uses this one."""


@dataclass(frozen=True)
class VBDSettings:
    """The values of the paper, and of its code where the paper gives none."""

    networks: str = "64P/10-10P/16-16P"
    """layers of the simple networks, separated by /; see `bdjax/models/simple_cnn.py`"""
    detect_share: InnerShare = 0.2
    """share of the rows that is held back from training the simple networks, in (0, 1)"""
    folds: Count = 1
    """splits of the rows; with k of them there are k networks of each kind, each with another k-th of the rows held back, and
    a class is tested on the rows of all splits, so that fewer poisoned rows are enough; `detect_share` then has no effect"""
    epochs: Count = 20
    """training epochs of the simple networks"""
    least_steps: Amount = 0
    """smallest number of training steps of the simple networks; small sets get more epochs"""
    batch_size: Count = 256
    """rows per step for the simple networks; 256 for CIFAR-10, 64 for Tiny ImageNet"""
    optimiser: Literal["sgd", "adam"] = "sgd"
    """optimiser of the simple networks; SGD has momentum 0.9"""
    learning_rate: LearningRate = 0.01
    """constant learning rate of the simple networks"""
    weight_decay: NotNegative = 5e-4
    """weight decay of the simple networks"""
    rows_per_class: Count = 20
    """N, number of rows of a class assumed to be malicious, and of those assumed to be clean"""
    least_rows: Annotated[int, Range(at_least=2, limit=MOST)] = 5
    """a class with fewer malicious or fewer clean rows is not tested"""
    p_value: InnerShare = 0.01
    """p-value below which a class is suspicious, in (0, 1); smaller values find fewer classes"""
    pixel_rule: Literal["paper", "code"] = "paper"
    """most important pixel: by the gradient's mean over channels ("paper"), or by its largest single entry ("code")"""
    check_share: InnerShare = 0.1
    """share of the held-back rows that a pattern is checked on, in (0, 1)"""
    least_success: Share = 0.33
    """smallest success rate of a pattern in that check, in [0, 1]"""
    votes: Count = 1
    """networks that must have found a pattern of a class; the paper prefers 1 to a majority"""
    accuracy_weight: Share = 0.6
    """alpha of the score that selects one of several patterns of a class, in [0, 1]; larger favours less accurate networks"""
    detector_rows: Literal["all", "held_back"] = "all"
    """which rows train the detectors: "all", as in the paper's code, or "held_back", as in its text"""
    most_detector_rows: Amount = 0
    """largest number of rows of other classes in a detector's epoch; 0 for all"""
    detector_epochs: Count = 20
    """training epochs of a detector"""
    least_detector_steps: Amount = 0
    """smallest number of training steps of a detector; small sets get more epochs"""
    detector_batch_size: Annotated[int, Range(at_least=2, limit=MOST)] = 256
    """rows of other classes per step of a detector; each is shown unchanged and with the pattern"""
    own_rows: PositiveShare = 1.0
    """rows of the class itself that a step adds once they have pseudo-labels, per row of another class, in (0, 1]; each row of
    another class is shown twice, so that 1 is the paper's third of a step"""
    detector_learning_rate: LearningRate = 0.01
    """constant learning rate of SGD for a detector"""
    detector_weight_decay: NotNegative = 5e-4
    """weight decay of a detector"""
    dropout: ShareBelowOne = 0.5
    """dropout rate before the detector's last layer"""
    least_opacity: Share = 0.1
    """smallest opacity of the patterns that a detector learns from, in [0, 1]; the largest is 1"""
    first_labelling: Amount = 5
    """first epoch, from 0, in which the rows of the class get pseudo-labels"""
    last_labelling: Amount = 11
    """last epoch, from 0, in which they do"""
    least_accuracy: Share = 0.75
    """training accuracy below which a detector flags no rows, in [0, 1]"""
    least_sure: Share = 0.0
    """share of the rows flagged in a class whose score must be at least 0.75, in [0, 1]; else none of them is flagged, since
    patterns of clean classes have unsure detectors. Not in the paper; 0 for no such rule"""
    chance_sure: Share = 0.0
    """the same for a pattern that may be chance (see `bdjax.defenses.vbd.may_be_chance`); if the simple networks learned the
    classes, no row of such a class is flagged. Not in the paper; 0 for no such rule"""
    clean_model: Literal["suppress", "relabel"] = "suppress"
    """flagged rows are left out ("suppress"), or labelled with a simple network's second most likely class ("relabel")"""

    @property
    def layers(self) -> tuple[str, ...]:
        """The layers of each simple network."""
        return tuple(self.networks.split("/"))

    @property
    def held_back_share(self) -> float:
        """Share of the rows that a class is tested on."""
        return self.detect_share if self.folds == 1 else 1.0


def sure_share(scores: np.ndarray) -> float:
    """Of the rows with a score of at least 0.5, float [n], the share with a score of at least `SURE`; 0 if there are none."""
    flagged = scores[scores >= 0.5]
    return float(np.mean(flagged >= SURE)) if len(flagged) else 0.0


class Candidate(NamedTuple):
    """The result of one network for one class."""

    p_value: float
    """of the two-sample test; 1 if there were too few rows to test"""
    pixel: tuple[int, int]
    """(i*, j*)"""
    mask: np.ndarray
    """bool [H, W]; all False if the class is not suspicious or no pixel is left"""
    pattern: np.ndarray
    """float32 [H, W, C] in [0, 1], zero outside the mask"""
    least_p_value: float = 1.0
    """the smallest p-value that so many rows can have"""


def smallest_p_value(first: int, second: int) -> float:
    """The p-value of the exact two-sided Kolmogorov-Smirnov test of two samples of these sizes that do not overlap."""
    first, second = min(first, 100), min(second, 100)  # beyond, it is 0 for every purpose
    return min(2 / math.comb(first + second, first), 1.0)


def least_held_back(settings: VBDSettings) -> int | None:
    """The smallest number of held-back rows of a class with which it can be suspicious; None if no number is enough."""
    for count in range(2 * settings.least_rows, 2 * settings.rows_per_class + 1):
        halves = [min(half, settings.rows_per_class) for half in (count // 2, count - count // 2)]
        if min(halves) >= settings.least_rows and smallest_p_value(*halves) < settings.p_value:
            return count
    return None


def most_held_back(counts: np.ndarray, share: float) -> np.ndarray:
    """The largest number of rows of each class that `bdjax.defenses.vbd_splits.split_rows` can hold back.

    Args:
        counts: int [K], rows of each class.
        share: of all rows.

    Returns:
        int [K].
    """
    ranks = [(np.arange(count) + 0.5) / count for count in counts.tolist()]
    held_back = round(share * int(counts.sum()))
    if not held_back:
        return np.zeros(len(counts), int)
    last = np.sort(np.concatenate(ranks))[held_back - 1]
    return np.array([np.searchsorted(of_class, last, side="right") for of_class in ranks])


def margin(logits: Array, classes: Array) -> Array:
    """psi: the logit of a class minus the largest other logit.

    Args:
        logits: float32 [N, K].
        classes: int32 [N].

    Returns:
        float32 [N].
    """
    is_class = jax.nn.one_hot(classes, logits.shape[1], dtype=bool)
    # By its index, since the derivative of a maximum depends on how it is rounded: see `bdjax/selection.py`.
    rival = jnp.argmax(jnp.where(is_class, -jnp.inf, logits), axis=1)
    is_rival = jax.nn.one_hot(rival, logits.shape[1], dtype=bool)
    return jnp.sum(jnp.where(is_class, logits, 0) - jnp.where(is_rival, logits, 0), axis=1)


def margin_gradients(model: Model, variables: PyTree, images: Array, classes: Array) -> Array:
    """g of each image: float32 [N, H, W, C]. The network is evaluated with running statistics.

    Args:
        model: the network f_s.
        variables: the network's variables, not stacked.
        images: float32 [N, H, W, C] in [0, 1].
        classes: int32 [N], the class c of each image.
    """

    def total(images: Array) -> Array:
        return jnp.sum(margin(model.apply(variables, images, train=False).logits, classes))

    return jax.grad(total)(images)


@cache
def row_margin_gradients(model: Model):
    """For `DefenseInput.per_row`: g of each row for the class in its targets."""
    return lambda variables, images, targets: margin_gradients(model, variables, images, targets["class"])


@cache
def row_patched_predictions(model: Model):
    """For `DefenseInput.per_row`: the predicted class of each row, patched with the pattern of the class in its targets.

    Patterns are at full opacity. The variables hold the "network", "masks" float32 [K, H, W, 1] and "patterns" float32
    [K, H, W, C].
    """

    def predictions(variables: PyTree, images: Array, targets: dict[str, Array]) -> Array:
        which = targets["class"]
        patched = blend(images, variables["masks"][which], variables["patterns"][which], 1.0)
        return jnp.argmax(model.apply(variables["network"], patched, train=False).logits, axis=1)

    return predictions


def blend(images: Array, mask: Array, pattern: Array, opacity: Array | float) -> Array:
    """Equation 1: x (1 - m) + (1 - alpha) x m + alpha m p, with broadcasting."""
    return images * (1 - opacity * mask) + opacity * mask * pattern


def select_rows(logits: np.ndarray, labels: np.ndarray, label: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The estimated malicious rows of a class, and its potentially clean ones (sections 3.3.1 and 3.3.2).

    Args:
        logits: float32 [n, K], of the held-back rows.
        labels: int32 [n].
        label: c.
        count: N, largest number of rows of each kind.

    Returns:
        Row numbers, int [n1] and [n2]: of the rows labelled and predicted c, those with the highest probability of c; of the
        other rows labelled c, those with the lowest. Probabilities are compared by their log-odds, which do not saturate.
    """
    rows = np.flatnonzero(labels == label)
    class_logits = logits[rows].astype(np.float64)
    log_odds = class_logits[:, label] - np.logaddexp.reduce(np.delete(class_logits, label, axis=1), axis=1)
    order = np.argsort(-log_odds, kind="stable")
    is_predicted = np.argmax(class_logits, axis=1) == label
    most_confident = order[is_predicted[order]][:count]
    least_confident = order[~np.isin(order, most_confident)][::-1][:count]
    return rows[most_confident], rows[least_confident]


def min_max(values: np.ndarray, axis: tuple[int, ...] | None = None) -> np.ndarray:
    """Scale to [0, 1]; constant values become 0."""
    low, high = values.min(axis=axis, keepdims=True), values.max(axis=axis, keepdims=True)
    return (values - low) / np.maximum(high - low, 1e-12)


def otsu(values: np.ndarray) -> np.ndarray:
    """Binarise by Otsu's threshold: bool of the same shape, True above it.

    Values are first scaled to 0..255 and rounded, as in the paper's code.

    Args:
        values: float, any shape; if all are equal, the result is all False.

    References:
        Otsu 1979.
    """
    grey = np.round(255 * min_max(values)).astype(np.uint8)
    from skimage.filters import threshold_otsu  # imports SciPy, which takes half a second

    return grey > threshold_otsu(grey) if grey.any() else np.zeros(values.shape, bool)


def gradient_mask(gradient: np.ndarray) -> np.ndarray:
    """Where the blurred size of the mean gradient, float [H, W, C], is large: bool [H, W] (algorithm 2)."""
    # Slow to import, so only where needed.
    from scipy import ndimage

    size = np.linalg.norm(gradient.astype(np.float64), axis=-1)
    return otsu(ndimage.correlate(min_max(size), BLUR, mode="mirror"))


def variance_image(images: np.ndarray) -> np.ndarray:
    """V: how much each pixel varies over images [n, H, W, C]: float64 [H, W] in [0, 1] (equations 3 and 4)."""
    return min_max(images.astype(np.float64).var(axis=0), axis=(0, 1)).mean(axis=-1)


def most_important_pixel(gradient: np.ndarray, rule: str) -> tuple[int, ...]:
    """(i*, j*) of the mean gradient, float [H, W, C].

    Args:
        gradient: the mean of g.
        rule: "paper" for equation 7; "code" for the largest single entry, as (i*, j*, channel).
    """
    size = np.abs(gradient.mean(axis=-1)) if rule == "paper" else np.abs(gradient)
    return tuple(int(i) for i in np.unravel_index(np.argmax(size), size.shape))


def importance(gradients: np.ndarray, pixel: tuple[int, ...]) -> np.ndarray:
    """I of each row, float [n], from gradients [n, H, W, C]: equation 8, or a single entry if `pixel` has a channel."""
    values = np.abs(gradients[(slice(None), *pixel)])
    return values.max(axis=-1) if values.ndim > 1 else values


def find_candidate(
    malicious: np.ndarray,
    malicious_gradients: np.ndarray,
    clean_gradients: np.ndarray,
    *,
    p_value: float,
    pixel_rule: str = "paper",
) -> Candidate:
    """Test one class, and extract its trigger if it is suspicious.

    Args:
        malicious: float32 [n, H, W, C] in [0, 1], the rows with the most confident predictions.
        malicious_gradients: float32 [n, H, W, C], their g.
        clean_gradients: float32 [n', H, W, C], g of the rows with the least confident predictions.
        p_value: the class is suspicious below this.
        pixel_rule: see `most_important_pixel`.

    Returns:
        The candidate; its mask is all False if the class is not suspicious.
    """
    # Slow to import, so only where needed.
    from scipy import stats

    if not (np.isfinite(malicious_gradients).all() and np.isfinite(clean_gradients).all()):
        return no_candidate(malicious.shape[1:])
    gradient = malicious_gradients.mean(axis=0)
    pixel = most_important_pixel(gradient, pixel_rule)
    samples = (importance(gradients, pixel) for gradients in (malicious_gradients, clean_gradients))
    found = float(stats.ks_2samp(*samples, method="exact").pvalue)
    shape = malicious.shape[1:]
    mask = np.zeros(shape[:2], bool)
    if found < p_value:
        mask = otsu(gradient_mask(gradient) * (1 - variance_image(malicious)))
    pattern = np.where(mask[..., None], malicious.mean(axis=0), 0).astype(np.float32)
    return Candidate(found, pixel[:2], mask, pattern, smallest_p_value(len(malicious), len(clean_gradients)))


def no_candidate(image_shape: tuple[int, int, int]) -> Candidate:
    """The result for a class with too few rows to test, or with gradients of a network that diverged."""
    return Candidate(1.0, (0, 0), np.zeros(image_shape[:2], bool), np.zeros(image_shape, np.float32))


def pair_score(accuracy: np.ndarray, success: np.ndarray, weight: float) -> np.ndarray:
    """Score of a network with its pattern: weight (1 - acc) + (1 - weight) asr (section 3.3.8)."""
    return weight * (1 - accuracy) + (1 - weight) * success

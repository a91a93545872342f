"""SCAn: a class that two means explain much better than one has two kinds of rows (Tang et al. 2021).

Embeddings are taken for a class's own mean plus what varies from row to row, which varies alike in all classes:

    r = mu_y + e,   mu_y ~ N(mu, S_u),   e ~ N(0, S_e)                       (Tang et al., the two-component model)

1. Decompose. The clean rows give S_e by an EM-like alternation: the class means that S_u and S_e make likely, then S_u and
   S_e of the means and the residuals.
2. Split. The suspect rows of each class are divided in two that share S_e: means and assignment in turn, which is k-means
   with the Mahalanobis distance of S_e, from random directions; the likeliest of a few starts counts.
3. Test. J_c, twice the log of the likelihood ratio of two means against one, for each row:

       J_c = 1/n_c sum_i [d(r_i, mean)^2 - d(r_i, mean of i's side)^2],   d the Mahalanobis distance of S_e

4. Compare. A class is poisoned where (J_c - median) / (1.4826 MAD) is above e^2, median and MAD over the classes. Its
   poisoned side is the one that holds fewer of the clean rows of that class; the smaller one where they are equally many.

Then a network is trained on what is left.

Known weaknesses: the median stands for a clean class. With half of the classes poisoned or more it no longer does, and an
all-to-all attack goes unseen. And S_e is known as well as the clean rows make it known: where seven of each class leave it
rough, as on the digits, J of clean classes is three times what it would be, and the index misses what it would find.

What differs from public code: the index there is |J_c - median|, which also flags a class for being more uniform than the
others; no poison does that, and where most classes are poisoned it is the clean ones (`two_sided` has it that way). There
S_e of 100 clean rows in 512 dimensions is pseudo-inverted, which ignores every direction that the clean rows do not use, and
a trigger's is likely to be one; here embeddings are first reduced to the principal directions of the suspect rows, and no
variance of S_e is taken for less than a share of their mean. The mean of the null hypothesis is a class's own, not one that
S_u draws towards that of all. Only suspect rows are split; there the clean ones are as well, and a row at the boundary
between both is counted with the wrong ones. It sums a stage's features over the pixels, where the embedding is their mean:
nothing here depends on a common factor.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from bdjax.defenses.contract import Defense, DefenseInput
from bdjax.defenses.filtering import retrained
from bdjax.errors import InputError
from bdjax.settings import check_values
from bdjax.types import DefenseResult, Detection

NAME = "scan"
ROUNDS = 100  # of the decomposition, and of a split, at most
TOLERANCE = 1e-5  # the decomposition is done when neither covariance changes by more, relative to its size
NORMAL = 1.4826  # a normal distribution's standard deviation is so many times its median absolute deviation


@dataclass(frozen=True)
class SCAnSettings:
    """How embeddings are compared, and from where on a class is poisoned."""

    threshold: float = float(np.exp(2.0))
    """of the anomaly index; e squared in the paper"""
    dimensions: int = 64
    """principal directions of the embeddings, at most; the paper takes all of them"""
    starts: int = 5
    """of each class's split; the likeliest result counts"""
    floor: float = 0.1
    """share of the mean variance within a class that no direction's is taken to be below: few clean rows leave many directions
    almost without any"""
    two_sided: bool = False
    """whether a class is flagged for a J far below the median as well, as in public code"""


def check(settings: SCAnSettings) -> None:
    """Refuse settings that cannot be.

    Raises:
        InputError: naming the setting.
    """
    check_values(
        f"defense {NAME}",
        settings,
        at_least={"dimensions": 1, "starts": 1, "threshold": 0},
        above={"floor": 0},
        at_most={"floor": 1},
    )


def principal_directions(embeddings: np.ndarray, count: int) -> np.ndarray:
    """The directions in which the rows vary most.

    Of the suspect rows, not of the clean ones: a direction that only triggered rows use is one of theirs alone.

    Args:
        embeddings: float [n, d].
        count: k, at most.

    Returns:
        float64 [d, k'], orthonormal: k' is the smaller of k and the number of directions in which the rows differ, but at
        least 1.
    """
    centred = embeddings.astype(np.float64)
    centred -= centred.mean(axis=0)
    variances, directions = np.linalg.eigh(centred.T @ centred)
    varied = int(np.sum(variances > 1e-10 * max(variances[-1], np.finfo(float).tiny)))
    return directions[:, ::-1][:, : max(1, min(count, varied))]


def decompose(rows: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Split what varies into the part between and the part within the classes.

    E-step: of a class with n rows, whose mean is m after that of all is taken off, the likeliest mean is
    n S_u (n S_u + S_e)^-1 m. M-step: S_u and S_e are the covariances of these means, one for each row, and of the residuals.

    Args:
        rows: float64 [c, k], clean.
        labels: int [c], of at least two classes, and fewer classes than rows.

    Returns:
        (S_u, S_e), float64 [k, k] each.
    """
    _, which, counts = np.unique(labels, return_inverse=True, return_counts=True)
    centred = rows - rows.mean(axis=0)
    sums = np.zeros((len(counts), rows.shape[1]))
    np.add.at(sums, which, centred)
    own_means = sums / counts[:, None]

    def covariances(means: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return tuple(np.atleast_2d(np.cov(part, rowvar=False)) for part in (means[which], centred - means[which]))

    sizes = np.unique(counts)  # classes of one size share an inverse
    between, within = covariances(own_means)
    for _ in range(ROUNDS):
        inverses = np.linalg.pinv(sizes[:, None, None] * between + within, rcond=1e-10, hermitian=True)
        kept = sizes[:, None, None] * (inverses @ between)  # transposed: it is multiplied from the right
        means = np.einsum("ck,ckl->cl", own_means, kept[np.searchsorted(sizes, counts)])
        last, (between, within) = (between, within), covariances(means)
        change = sum(np.linalg.norm(new - old) for new, old in zip((between, within), last, strict=True))
        if change <= TOLERANCE * (np.linalg.norm(between) + np.linalg.norm(within)):
            break
    return between, within


def whitening(within: np.ndarray, floor: float) -> np.ndarray:
    """The map after which distances are Mahalanobis distances of S_e.

    Args:
        within: S_e, float64 [k, k].
        floor: share of the mean variance that none is taken to be below.

    Returns:
        float64 [k, k], W with W W^T = S_e^-1 but for the floor.
    """
    variances, directions = np.linalg.eigh(within)
    least = max(floor * float(variances.mean()), np.finfo(float).tiny)
    return directions / np.sqrt(np.maximum(variances, least))


class Split(NamedTuple):
    """One class in two."""

    is_second: np.ndarray
    """bool [n]: the side"""
    means: np.ndarray
    """float64 [2, k]"""
    ratio: float
    """J_c, at least 0"""


def split_class(rows: np.ndarray, starts: int, generator: np.random.Generator) -> Split:
    """Divide the rows of one class in two by alternating means and assignment, and say how much likelier two means are.

    Args:
        rows: float64 [n, k], whitened: Euclidean distances are what counts.
        starts: how many; each is the halves on both sides of the mean in a random direction.
        generator: draws the directions.

    Returns:
        The likeliest split. Rows that are all alike are one side, and J_c is 0.
    """
    centre = rows.mean(axis=0)
    centred = rows - centre
    is_second = centred @ generator.standard_normal((rows.shape[1], starts)) > 0  # [n, starts]: all starts at once
    for _ in range(ROUNDS):
        sizes = np.stack([np.sum(~is_second, axis=0), np.sum(is_second, axis=0)])
        second = centred.T @ is_second
        means = np.stack([-second, second]) / np.maximum(sizes, 1)[:, None]  # the sides' sums add up to 0
        lengths = np.sum(np.square(means), axis=1)
        closer = centred @ (means[1] - means[0]) > 0.5 * (lengths[1] - lengths[0])
        # Where both means are one, as of rows that are all alike, nothing is closer to either.
        if np.array_equal(closer, is_second):
            break
        is_second = closer
    # |r - mean|^2 - |r - mean of the side|^2, summed over a side, is its size times the square of its mean's distance.
    ratios = np.sum(sizes * lengths, axis=0) / len(rows)
    best = int(np.argmax(ratios))
    return Split(is_second[:, best], centre + means[:, :, best], float(ratios[best]))


def towards_second(rows: np.ndarray, means: np.ndarray) -> np.ndarray:
    """How much closer rows are to the second mean: 1 at it, -1 at the first, 0 half-way and where the two are one.

    It is the log of the two sides' likelihood ratio, relative to its value at the means.

    Args:
        rows: float64 [n, k], whitened.
        means: float64 [2, k].

    Returns:
        float64 [n].
    """
    apart = means[1] - means[0]
    return 2 * (rows - means.mean(axis=0)) @ apart / max(float(apart @ apart), np.finfo(float).tiny)


def anomaly_index(ratios: np.ndarray) -> np.ndarray:
    """How many deviations each class is from the median, with its sign.

    Args:
        ratios: float [K], J of each class.

    Returns:
        float64 [K]; 0 for all if they are all one.
    """
    ratios = np.asarray(ratios, np.float64)
    apart = ratios - np.median(ratios)
    deviation = NORMAL * float(np.median(np.abs(apart)))
    # More than half of the classes exactly alike leaves no deviation; the index is large then, but a number.
    return apart / max(deviation, 1e-9 * float(np.abs(ratios).max()), np.finfo(float).tiny)


class Found(NamedTuple):
    """What is said of one training set."""

    flags: np.ndarray
    """bool [n]"""
    scores: np.ndarray
    """float32 [n]"""
    index: np.ndarray
    """float64 [K]: of the classes that there are, in their order"""


def find_poisons(
    embeddings: np.ndarray,
    labels: np.ndarray,
    clean_embeddings: np.ndarray,
    clean_labels: np.ndarray,
    settings: SCAnSettings,
) -> Found:
    """Flag and score the rows of one training set.

    A row's score is its class's anomaly index, 0 if negative (unless `two_sided`, which takes its size), times how much
    closer the row is to the mean of the poisoned side than to the other, from -1 to 1. So rows of a suspicious class are at
    both ends and those of a usual one between; a row is flagged if its score is positive and its class is.

    Args:
        embeddings: float32 [n, d].
        labels: int32 [n].
        clean_embeddings: float32 [c, d].
        clean_labels: int32 [c].
        settings: how.

    Raises:
        InputError: the clean rows are not enough to see how a class varies.
    """
    present = np.unique(labels)
    if len(clean_labels) < len(np.unique(clean_labels)) + 2:
        raise InputError(
            f"defense {NAME}: {len(clean_labels)} clean rows are too few: there must be at least two more than classes"
        )
    directions = principal_directions(embeddings, settings.dimensions)
    reduced, clean = (each.astype(np.float64) @ directions for each in (embeddings, clean_embeddings))
    _, within = decompose(clean, clean_labels)
    white = whitening(within, settings.floor)
    reduced, clean = reduced @ white, clean @ white

    of_class = [np.flatnonzero(labels == label) for label in present]
    splits = [
        split_class(reduced[rows], settings.starts, np.random.default_rng(int(label)))
        for label, rows in zip(present, of_class, strict=True)
    ]
    index = anomaly_index(np.array([split.ratio for split in splits]))
    suspicion = np.abs(index) if settings.two_sided else np.maximum(index, 0)

    flags, scores = np.zeros(len(labels), bool), np.zeros(len(labels), np.float32)
    for label, rows, split, own in zip(present, of_class, splits, suspicion, strict=True):
        clean_on_second = np.sum(towards_second(clean[clean_labels == label], split.means) > 0)
        clean_on_first = np.sum(clean_labels == label) - clean_on_second
        if clean_on_first != clean_on_second:
            second_is_poisoned = clean_on_second < clean_on_first
        else:
            second_is_poisoned = 2 * split.is_second.sum() <= len(rows)
        closeness = np.clip(towards_second(reduced[rows], split.means), -1, 1)
        scores[rows] = own * (closeness if second_is_poisoned else -closeness)
        if own > settings.threshold:
            flags[rows] = split.is_second == second_is_poisoned
    return Found(flags, scores, index)


def detect(inputs: DefenseInput, settings: SCAnSettings) -> Detection:
    """Compare the classes, and flag one side of those that stick out.

    Args:
        inputs: the suspects; used are their training sets, attacked networks and clean rows.
        settings: how.

    Returns:
        Flags and scores of all rows, as `find_poisons` has them.

    Raises:
        InputError: a setting that cannot be, or too few clean rows.
    """
    check(settings)
    network, clean = inputs.attacked, inputs.clean_rows()
    embeddings, clean_embeddings = (
        inputs.embeddings(network.model, network.variables, rows) for rows in (inputs.all_rows(), clean)
    )
    found = [
        find_poisons(*own, settings)
        for own in zip(embeddings, inputs.labels, clean_embeddings, inputs.clean_labels, strict=True)
    ]
    facts = {
        "flagged classes": np.array(
            [len(np.unique(labels[one.flags])) for labels, one in zip(inputs.labels, found, strict=True)]
        ),
        "largest anomaly index": np.array([one.index.max() for one in found]),
    }
    return Detection(np.stack([one.flags for one in found]), np.stack([one.scores for one in found]), facts)


def run(inputs: DefenseInput, settings: SCAnSettings) -> DefenseResult:
    """`detect`, and train on what is left.

    Raises:
        InputError: a setting that cannot be, or too few clean rows.
    """
    told = f"{settings.dimensions} dimensions, {settings.starts} starts, floor {settings.floor:g}"
    sides = "two-sided" if settings.two_sided else "above"
    found = detect(inputs, settings)
    return retrained(inputs, f"scan: {told}, {settings.threshold:g} {sides}", found)


SCAN = Defense(
    name=NAME,
    title="SCAn",
    paper="Tang et al. 2021, Demon in the Variant: Statistical Analysis of DNNs for Robust Backdoor Contamination Detection",
    stage="before training",
    needs=("training set", "attacked model", "clean rows"),
    settings=SCAnSettings(),
    run=run,
    detect=detect,
    check=check,
)

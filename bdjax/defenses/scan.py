"""SCAn: a class that two means explain much better than one has two kinds of rows (Tang et al. 2021).

An embedding is modelled as its class mean plus a variation from row to row that has the same distribution in all classes:

    r = mu_y + e,   mu_y ~ N(mu, S_u),   e ~ N(0, S_e)                       (Tang et al., the two-component model)

1. Decompose. S_e is estimated on the clean rows by an EM-like alternation: the likeliest class means given S_u and S_e, then
   S_u and S_e from the means and the residuals.
2. Split. The suspect rows of each class are divided into two groups that share S_e: k-means with the Mahalanobis distance of
   S_e, started from random directions; the likeliest of a few starts is kept.
3. Test. J_c is twice the log-likelihood ratio of two means against one, averaged over the rows:

       J_c = 1/n_c sum_i [d(r_i, mean)^2 - d(r_i, mean of i's side)^2],   d the Mahalanobis distance of S_e

4. Compare. A class is poisoned where (J_c - median) / (1.4826 MAD) is above e^2, with median and MAD over the classes. Its
   poisoned group is the one with fewer of the clean rows of that class, or the smaller group if they are equally many.

Then a network is trained on the remaining rows.

Known weaknesses: the median stands for a clean class. With half of the classes poisoned or more it no longer does, and an
all-to-all attack is missed. And S_e is only as good as the clean rows: where it is rough, as with seven rows of each class on
the digits, J of clean classes is three times as large as it should be, and poisoned classes are missed.

Differences from public code:
- The index there is |J_c - median|, which also flags a class for being more uniform than the others. No poison makes a class
  more uniform, and where most classes are poisoned it is the clean ones that are flagged (`two_sided` does as that code).
- S_e of 100 clean rows in 512 dimensions is pseudo-inverted there, which ignores every direction that the clean rows do not
  use, probably the trigger's too. Here embeddings are first reduced to the principal directions of the suspect rows, and each
  variance of S_e is raised to at least a share of their mean.
- The mean of the null hypothesis is the class mean, not one that S_u shrinks towards the overall mean.
- Only suspect rows are split. There the clean rows are split as well, and a row at the boundary between the two sets is
  counted with the wrong one.
- It sums a stage's features over the pixels, where the embedding is their mean; nothing here depends on a common factor.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from bdjax.defenses.contract import Defense, DefenseInput, Facts, limits, too_few, unless_finite
from bdjax.defenses.filtering import retrained
from bdjax.errors import InputError
from bdjax.settings import Count, Members, NotNegative, PositiveShare, check_values
from bdjax.types import DefenseResult, Detection, NotTested

NAME = "scan"
ROUNDS = 100  # at most, of the decomposition and of a split
TOLERANCE = 1e-5  # the decomposition ends when the covariances change by less, relative to their size
LEAST_CLASSES = 3  # two classes are equally far from their median, whatever their J
LEAST_ROWS = 2  # of a class: one row has only one mean
MORE_CLEAN_ROWS = 2  # than classes, to estimate how rows of a class differ
MAD_CONSISTENCY = 1.4826  # ratio of a normal distribution's standard deviation to its median absolute deviation


@dataclass(frozen=True)
class SCAnSettings:
    """How embeddings are compared, and when a class is flagged."""

    threshold: NotNegative = float(np.exp(2.0))
    """anomaly index above which a class is flagged; e squared in the paper"""
    dimensions: Count = 64
    """largest number of principal directions of the embeddings that are kept; the paper keeps all of them"""
    starts: Members = 5
    """random starts when a class is split; the likeliest result is kept"""
    floor: PositiveShare = 0.1
    """smallest variance of a direction within classes, as a share of the mean variance, in (0, 1]; with few clean rows many
    directions have almost none"""
    two_sided: bool = False
    """whether to flag a class for a J far below the median as well, as public code does"""


def check(settings: SCAnSettings) -> None:
    """Reject invalid settings.

    Raises:
        InputError: naming the setting.
    """
    check_values(f"defense {NAME}", settings)


def least(settings: SCAnSettings, facts: Facts) -> NotTested:
    """What cannot be tested: see `Defense.least`."""
    del settings
    present, clean = int(np.sum(facts.rows > 0)), facts.clean_rows
    if present < LEAST_CLASSES:
        return NotTested(
            f"needs at least {LEAST_CLASSES} classes with rows: the anomaly index of {present} is at most "
            f"{1 / MAD_CONSISTENCY:.2f}, whatever they are"
        )
    if clean.sum() < np.sum(clean > 0) + MORE_CLEAN_ROWS:
        return NotTested(
            f"needs at least {MORE_CLEAN_ROWS} more clean rows than classes that they are from: {clean.sum()} of "
            f"{np.sum(clean > 0)} do not show how rows of a class differ"
        )
    without = {
        int(label): "has no clean row; needs at least 1" for label in np.flatnonzero((facts.rows > 0) & (clean == 0))
    }
    reason = f"needs a class with at least {LEAST_ROWS} rows and a clean row"
    return limits(facts, {**without, **too_few(facts.rows, LEAST_ROWS)}, reason)


def principal_directions(embeddings: np.ndarray, count: int) -> np.ndarray:
    """The directions in which the rows vary most.

    They are computed on the suspect rows: a direction that only triggered rows use does not occur in the clean rows.

    Args:
        embeddings: float [n, d].
        count: k, at most.

    Returns:
        float64 [d, k'], orthonormal: k' is the smaller of k and the rank of the centred rows, but at least 1.
    """
    centred = embeddings.astype(np.float64)
    centred -= centred.mean(axis=0)
    variances, directions = np.linalg.eigh(centred.T @ centred)
    varied = int(np.sum(variances > 1e-10 * max(variances[-1], np.finfo(float).tiny)))
    return directions[:, ::-1][:, : max(1, min(count, varied))]


def decompose(rows: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Split the covariance into a part between the classes and a part within them.

    E-step: for a class of n rows with mean m relative to the overall mean, the likeliest mean is n S_u (n S_u + S_e)^-1 m.
    M-step: S_u and S_e are the covariances of these means, repeated for each row, and of the residuals.

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
    class_means = sums / counts[:, None]

    def covariances(means: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return tuple(np.atleast_2d(np.cov(part, rowvar=False)) for part in (means[which], centred - means[which]))

    sizes = np.unique(counts)  # classes of the same size share an inverse
    between, within = covariances(class_means)
    for _ in range(ROUNDS):
        inverses = np.linalg.pinv(sizes[:, None, None] * between + within, rcond=1e-10, hermitian=True)
        shrinkage = sizes[:, None, None] * (inverses @ between)  # transposed: it is multiplied from the right
        means = np.einsum("ck,ckl->cl", class_means, shrinkage[np.searchsorted(sizes, counts)])
        last, (between, within) = (between, within), covariances(means)
        change = sum(np.linalg.norm(new - old) for new, old in zip((between, within), last, strict=True))
        if change <= TOLERANCE * (np.linalg.norm(between) + np.linalg.norm(within)):
            break
    return between, within


def whitening(within: np.ndarray, floor: float) -> np.ndarray:
    """The linear map after which Euclidean distances are the Mahalanobis distances of S_e.

    Args:
        within: S_e, float64 [k, k].
        floor: smallest variance of a direction, as a share of the mean variance.

    Returns:
        float64 [k, k], W with W W^T = S_e^-1, apart from the floor.
    """
    variances, directions = np.linalg.eigh(within)
    least = max(floor * float(variances.mean()), np.finfo(float).tiny)
    return directions / np.sqrt(np.maximum(variances, least))


class Split(NamedTuple):
    """A class divided into two groups."""

    is_second: np.ndarray
    """bool [n]: whether a row is in the second group"""
    means: np.ndarray
    """float64 [2, k], the groups' means"""
    ratio: float
    """J_c, at least 0"""


def split_class(rows: np.ndarray, starts: int, generator: np.random.Generator) -> Split:
    """Divide the rows of one class into two groups by k-means, and compute J_c.

    Args:
        rows: float64 [n, k], whitened.
        starts: how many starts; each divides the rows at their mean, along a random direction.
        generator: draws the directions.

    Returns:
        The likeliest split. Equal rows are all in one group, and J_c is 0.
    """
    centre = rows.mean(axis=0)
    centred = rows - centre
    is_second = centred @ generator.standard_normal((rows.shape[1], starts)) > 0  # [n, starts]: all starts at once
    for _ in range(ROUNDS):
        sizes = np.stack([np.sum(~is_second, axis=0), np.sum(is_second, axis=0)])
        second = centred.T @ is_second
        means = np.stack([-second, second]) / np.maximum(sizes, 1)[:, None]  # the groups' sums add up to 0
        lengths = np.sum(np.square(means), axis=1)
        # If both means are equal, as for equal rows, no row is closer to the second.
        closer = centred @ (means[1] - means[0]) > 0.5 * (lengths[1] - lengths[0])
        if np.array_equal(closer, is_second):
            break
        is_second = closer
    # The sum of |r - mean|^2 - |r - group mean|^2 over a group is its size times the squared length of its centred mean.
    ratios = np.sum(sizes * lengths, axis=0) / len(rows)
    best = int(np.argmax(ratios))
    return Split(is_second[:, best], centre + means[:, :, best], float(ratios[best]))


def towards_second(rows: np.ndarray, means: np.ndarray) -> np.ndarray:
    """How close rows are to the second mean: 1 at it, -1 at the first mean, 0 halfway and if both means are equal.

    It is the log-likelihood ratio of the two groups, relative to its value at the means.

    Args:
        rows: float64 [n, k], whitened.
        means: float64 [2, k].

    Returns:
        float64 [n].
    """
    difference = means[1] - means[0]
    return 2 * (rows - means.mean(axis=0)) @ difference / max(float(difference @ difference), np.finfo(float).tiny)


def anomaly_index(ratios: np.ndarray) -> np.ndarray:
    """How many robust standard deviations each class is above the median; negative below it.

    Args:
        ratios: float [K], J of each class.

    Returns:
        float64 [K]; 0 for all classes if their J are equal.
    """
    ratios = np.asarray(ratios, np.float64)
    distance = ratios - np.median(ratios)
    deviation = MAD_CONSISTENCY * float(np.median(np.abs(distance)))
    # If more than half of the classes have the same J, the MAD is 0; the floor keeps the index finite.
    return distance / max(deviation, 1e-9 * float(np.abs(ratios).max()), np.finfo(float).tiny)


class Found(NamedTuple):
    """The result for one training set."""

    flags: np.ndarray
    """bool [n]"""
    scores: np.ndarray
    """float32 [n]"""
    index: np.ndarray
    """float64 [K]: anomaly index of the classes that occur, in ascending order of the label"""


def find_poisons(
    embeddings: np.ndarray,
    labels: np.ndarray,
    clean_embeddings: np.ndarray,
    clean_labels: np.ndarray,
    settings: SCAnSettings,
) -> Found:
    """Flag and score the rows of one training set.

    A row's score is the anomaly index of its class (0 if negative, or its absolute value if `two_sided`) times how close the
    row is to the poisoned group's mean, from -1 to 1. So the rows of a suspicious class have the largest and the smallest
    scores. In a flagged class, the rows of the poisoned group are flagged.

    Args:
        embeddings: float32 [n, d].
        labels: int32 [n].
        clean_embeddings: float32 [c, d].
        clean_labels: int32 [c].
        settings: of the defense.

    Raises:
        InputError: too few clean rows to estimate the variation within a class.
    """
    present = np.unique(labels)
    if len(clean_labels) < len(np.unique(clean_labels)) + MORE_CLEAN_ROWS:
        raise InputError(
            f"defense {NAME}: {len(clean_labels)} clean rows are too few; it needs at least two more rows than classes"
        )
    if unless_finite(embeddings, clean_embeddings).reason:
        nothing = np.zeros(len(labels), np.float32)
        return Found(nothing > 0, nothing, np.zeros(len(present)))
    directions = principal_directions(embeddings, settings.dimensions)
    reduced, clean = (rows.astype(np.float64) @ directions for rows in (embeddings, clean_embeddings))
    _, within = decompose(clean, clean_labels)
    white = whitening(within, settings.floor)
    reduced, clean = reduced @ white, clean @ white

    class_rows = [np.flatnonzero(labels == label) for label in present]
    splits = [
        split_class(reduced[rows], settings.starts, np.random.default_rng(int(label)))
        for label, rows in zip(present, class_rows, strict=True)
    ]
    index = anomaly_index(np.array([split.ratio for split in splits]))
    suspicion = np.abs(index) if settings.two_sided else np.maximum(index, 0)

    flags, scores = np.zeros(len(labels), bool), np.zeros(len(labels), np.float32)
    for label, rows, split, class_suspicion in zip(present, class_rows, splits, suspicion, strict=True):
        clean_on_second = np.sum(towards_second(clean[clean_labels == label], split.means) > 0)
        clean_on_first = np.sum(clean_labels == label) - clean_on_second
        if clean_on_first != clean_on_second:
            second_is_poisoned = clean_on_second < clean_on_first
        else:
            second_is_poisoned = 2 * split.is_second.sum() <= len(rows)
        closeness = np.clip(towards_second(reduced[rows], split.means), -1, 1)
        scores[rows] = class_suspicion * (closeness if second_is_poisoned else -closeness)
        has_clean = np.any(clean_labels == label)  # otherwise nothing shows which of the groups is the poisoned one
        if class_suspicion > settings.threshold and has_clean and len(present) >= LEAST_CLASSES:
            flags[rows] = split.is_second == second_is_poisoned
    return Found(flags, scores, index)


def detect(inputs: DefenseInput, settings: SCAnSettings) -> Detection:
    """Compare the classes, and flag the poisoned group of each outlier.

    Args:
        inputs: the suspects; reads their training sets, attacked networks and clean rows.
        settings: of the defense.

    Returns:
        Flags and scores of all rows; see `find_poisons`.

    Raises:
        InputError: an invalid setting, or too few clean rows.
    """
    check(settings)
    network, clean = inputs.attacked, inputs.clean_rows()
    embeddings, clean_embeddings = (
        inputs.embeddings(network.model, network.variables, rows) for rows in (inputs.all_rows(), clean)
    )
    found = [
        find_poisons(*arrays, settings)
        for arrays in zip(embeddings, inputs.labels, clean_embeddings, inputs.clean_labels, strict=True)
    ]
    facts = {
        "flagged classes": np.array(
            [len(np.unique(labels[result.flags])) for labels, result in zip(inputs.labels, found, strict=True)]
        ),
        "largest anomaly index": np.array([result.index.max() for result in found]),
    }
    flags, scores = (np.stack([getattr(result, name) for result in found]) for name in ("flags", "scores"))
    return Detection(flags, scores, facts, not_tested=tuple(map(unless_finite, embeddings, clean_embeddings)))


def run(inputs: DefenseInput, settings: SCAnSettings) -> DefenseResult:
    """`detect`, then train on the rows that are not flagged.

    Raises:
        InputError: an invalid setting, or too few clean rows.
    """
    description = f"{settings.dimensions} dimensions, {settings.starts} starts, floor {settings.floor:g}"
    sides = "two-sided" if settings.two_sided else "above"
    found = detect(inputs, settings)
    return retrained(inputs, f"scan: {description}, {settings.threshold:g} {sides}", found)


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
    least=least,
)

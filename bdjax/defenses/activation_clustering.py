"""Activation clustering: poisoned rows form a separate cluster among the embeddings of their class (Chen et al. 2018).

A network that learned a trigger predicts the same class for the rows of the target class and for triggered rows, but for
different reasons, which the input of its last layer shows. For each class, the embeddings of all rows are reduced to 10
dimensions and split in two by k-means. A rule decides which cluster is poisoned, if any:

- smaller: the smaller cluster of every class, as in the comparison of the LfD paper; clean classes lose theirs too;
- relative_size: the smaller cluster, if it is small (a clean class splits about evenly);
- silhouette: the smaller cluster, if it is small and well separated from the larger one;
- exclusionary: the smaller clusters are left out, a network is trained on the rest, and a cluster is poisoned if this network
  predicts another class for its rows more often than their label (Chen et al., section 5: exclusionary reclassification).

Then a network is trained on the remaining rows. Every rule considers the smaller cluster only. Where the poisons outnumber the
clean rows of the target class, that is the clean one: so it is when a tenth of all rows of ten classes is relabelled as one
class, and in most clean-label attacks on the digits.

A widely used benchmark's code clusters each mini-batch separately, on augmented images, and then reads the flags in the order
of a second, reshuffled pass, so that they belong to other rows. Here a class is clustered as a whole, from un-augmented images,
and its rows are sorted first, so that the result does not depend on their order.
"""

import math
import warnings
from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple

import numpy as np

from bdjax.defenses.contract import Defense, DefenseInput, Facts, limits, too_few, unless_finite
from bdjax.defenses.filtering import retrain_without, retrained
from bdjax.settings import Count, NotNegative, Range, Share, check_values
from bdjax.types import DefenseResult, Detection, NotTested

NAME = "activation_clustering"
RULES = ("smaller", "relative_size", "silhouette", "exclusionary")
REDUCTIONS = ("pca", "ica")
NETWORKS = ("attacked", "unaugmented")
RANDOM_STATE = 0  # of k-means and FastICA: the flags depend on the embeddings alone
LEAST_CLUSTER = 2  # rows: the silhouette coefficient of a cluster of one is 0 by definition, whatever the row is
STARTS = 10  # of k-means; the result with the lowest inertia is used


@dataclass(frozen=True)
class ActivationClusteringSettings:
    """How a class is split, and which cluster counts as poisoned."""

    reduction: Literal["pca", "ica"] = "pca"
    """dimensionality reduction: ica (FastICA) in the paper, pca in BackdoorBench"""
    dimensions: Count = 10
    """dimensions after the reduction, at most"""
    network: Literal["attacked", "unaugmented"] = "attacked"
    """whose embeddings: those of the attacked network, or of one that is trained on the same rows by the same recipe without
    augmentation (LfD, appendix A.2)"""
    rule: Literal["smaller", "relative_size", "silhouette", "exclusionary"] = "smaller"
    """how to decide which clusters are poisoned"""
    largest_share: Share = 0.35
    """rules relative_size and silhouette: a cluster is poisoned if it has less than this share of its class"""
    smallest_silhouette: Annotated[float, Range(at_least=-1, at_most=1)] = 0.1
    """rule silhouette: a cluster is poisoned only if its class's mean silhouette coefficient is above this; 0.1 to 0.15 in the
    paper"""
    threshold: NotNegative = 1.0
    """rule exclusionary: a cluster is poisoned unless the ratio of rows predicted as their label to rows predicted as the most
    frequent other class is above this"""


def check(settings: ActivationClusteringSettings) -> None:
    """Validate the settings.

    Raises:
        InputError: a setting is invalid.
    """
    check_values(f"defense {NAME}", settings, choices={"reduction": REDUCTIONS, "rule": RULES, "network": NETWORKS})


def least_rows(settings: ActivationClusteringSettings) -> int | None:
    """The smallest number of rows of a class of which the rule can flag a cluster; None if it never can."""
    if settings.rule == "silhouette" and settings.smallest_silhouette >= 1:
        return None
    if settings.rule not in ("relative_size", "silhouette"):
        return 2 * LEAST_CLUSTER
    if settings.largest_share <= 0:
        return None
    return max(math.floor(LEAST_CLUSTER / settings.largest_share) + 1, 2 * LEAST_CLUSTER)


def least(settings: ActivationClusteringSettings, facts: Facts) -> NotTested:
    """What cannot be tested: see `Defense.least`."""
    needed = least_rows(settings)
    if needed is None:
        return NotTested(f"flags no cluster, whatever the rows are: see the settings of the rule {settings.rule}")
    reason = f"needs at least {needed} rows of a class: no cluster of fewer can be flagged by the rule {settings.rule}"
    return limits(facts, too_few(facts.rows, needed), reason)


class Split(NamedTuple):
    """A class split into two clusters."""

    in_smaller: np.ndarray
    """bool [n]: rows of the smaller cluster"""
    scores: np.ndarray
    """float64 [n], in [-1, 1]"""
    share: float
    """the smaller cluster's share of the class's rows"""
    silhouette: float
    """mean silhouette coefficient, in [-1, 1]: 1 for clusters that are two distinct points"""


def reduce_dimensions(embeddings: np.ndarray, reduction: str, dimensions: int) -> np.ndarray:
    """Reduce the dimensions of a class's embeddings.

    Args:
        embeddings: float [n, d].
        reduction: an entry of `REDUCTIONS`.
        dimensions: k, at most.

    Returns:
        float64 [n, k']: k' is the smallest of k and the number of directions in which the rows differ, but at least 1.
    """
    # Slow to import, so only where needed.
    from sklearn.decomposition import PCA, FastICA
    from sklearn.exceptions import ConvergenceWarning

    count = min(dimensions, *embeddings.shape)
    pca = PCA(count, svd_solver="covariance_eigh")
    with np.errstate(invalid="ignore"):  # equal rows have no variance: scikit-learn divides 0 by 0
        reduced = pca.fit_transform(embeddings.astype(np.float64))
    # A channel that is 0 for every row leaves directions of no variance, whose rounding errors whitening would amplify.
    varied = pca.explained_variance_ > 1e-10 * max(pca.explained_variance_[0], 1e-10)
    reduced = reduced[:, : max(int(varied.sum()), 1)]
    if reduction == "pca" or not varied.any():
        return reduced
    with warnings.catch_warnings():
        # Components that have not converged are still a rotation of the whitened rows.
        warnings.simplefilter("ignore", ConvergenceWarning)
        ica = FastICA(whiten="unit-variance", max_iter=1000, random_state=RANDOM_STATE)
        return ica.fit_transform(reduced)


def split_class(embeddings: np.ndarray, reduction: str, dimensions: int) -> Split | None:
    """Split the rows of a class into two clusters.

    The score of a row is how much closer it is to the centre of the smaller cluster than to that of the larger one,
    (to_large - to_small) / (to_large + to_small), times the silhouette coefficient, so that scores are low in a class without
    two separate groups.

    Args:
        embeddings: float [n, d], in any order.
        reduction: an entry of `REDUCTIONS`.
        dimensions: dimensions after the reduction, at most.

    Returns:
        The split, or None for fewer than three different rows.
    """
    # Slow to import, so only where needed.
    from sklearn.cluster import KMeans
    from sklearn.metrics import silhouette_score

    if len(np.unique(embeddings, axis=0)) < 3:
        return None
    # FastICA and the initial centres of k-means depend on the order of the rows, so they are sorted.
    order = np.lexsort(embeddings.T[::-1])
    rows = reduce_dimensions(embeddings[order], reduction, dimensions)
    means = KMeans(2, n_init=STARTS, tol=0.0, random_state=RANDOM_STATE).fit(rows)
    sizes = np.bincount(means.labels_, minlength=2)
    small = int(np.argmin(sizes))
    to_small, to_large = (
        np.linalg.norm(rows - means.cluster_centers_[cluster], axis=1) for cluster in (small, 1 - small)
    )
    silhouette = float(silhouette_score(rows, means.labels_))
    in_smaller, scores = np.zeros(len(rows), bool), np.zeros(len(rows))
    in_smaller[order] = means.labels_ == small
    scores[order] = (to_large - to_small) / (to_large + to_small) * max(silhouette, 0.0)
    return Split(in_smaller, scores, float(sizes[small] / len(rows)), silhouette)


def is_poisoned(split: Split, settings: ActivationClusteringSettings) -> bool:
    """Whether the smaller cluster of a class is poisoned by the rule of the settings; for exclusionary, a candidate."""
    is_small = split.share < settings.largest_share
    if settings.rule == "relative_size":
        return is_small
    if settings.rule == "silhouette":
        return is_small and split.silhouette > settings.smallest_silhouette
    return True


class Clusters(NamedTuple):
    """The result for one training set."""

    flags: np.ndarray
    """bool [n]"""
    scores: np.ndarray
    """float32 [n]"""
    largest_silhouette: float
    """of any class"""
    not_tested: NotTested
    """classes whose embeddings are all the same, or nearly; all of it if the embeddings are not finite"""


def find_clusters(embeddings: np.ndarray, labels: np.ndarray, settings: ActivationClusteringSettings) -> Clusters:
    """Flag and score the rows of one training set, class by class.

    Args:
        embeddings: float32 [n, d].
        labels: int32 [n].
        settings: the defense's settings.
    """
    flags, scores, largest_silhouette = np.zeros(len(labels), bool), np.zeros(len(labels), np.float32), 0.0
    if (diverged := unless_finite(embeddings)).reason:
        return Clusters(flags, scores, largest_silhouette, diverged)
    needed, untested = least_rows(settings), {}
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        if needed is None or len(rows) < needed:
            continue
        split = split_class(embeddings[rows], settings.reduction, settings.dimensions)
        if split is None:
            untested[int(label)] = "has fewer than 3 different embeddings"
            continue
        scores[rows] = split.scores
        largest_silhouette = max(largest_silhouette, split.silhouette)
        if is_poisoned(split, settings):
            flags[rows] = split.in_smaller
    is_all = untested and len(untested) == len(np.unique(labels))
    reason = "needs rows with different embeddings: those of each class are the same, or nearly" if is_all else ""
    return Clusters(flags, scores, largest_silhouette, NotTested(reason, untested))


def reclassify(flags: np.ndarray, labels: np.ndarray, predictions: np.ndarray, threshold: float) -> np.ndarray:
    """Decide which left-out clusters are poisoned from the predictions of a network that was not trained on them.

    With l the rows of a cluster predicted as their label and p those predicted as the most frequent other class, the cluster
    is legitimate if l / p > threshold (Chen et al., section 5).

    Args:
        flags: bool [n], the rows that were left out: at most one cluster of each class.
        labels: int32 [n].
        predictions: int [n], of a network trained on the other rows.
        threshold: T.

    Returns:
        bool [n]: the flags without the legitimate clusters.
    """
    flags = flags.copy()
    for label in np.unique(labels[flags]):
        cluster = flags & (labels == label)
        counts = np.bincount(predictions[cluster], minlength=label + 1)
        as_label, counts[label] = int(counts[label]), 0
        flags[cluster] = as_label <= threshold * counts.max()
    return flags


def _stage(settings: ActivationClusteringSettings) -> str:
    """The name of the stage that trains without the flagged clusters."""
    stage = f"activation clustering: {settings.network}, {settings.reduction} {settings.dimensions}, {settings.rule}"
    if settings.rule in ("relative_size", "silhouette"):
        stage += f" {settings.largest_share:g}"
    if settings.rule == "silhouette":
        stage += f" {settings.smallest_silhouette:g}"
    return stage


def detect(inputs: DefenseInput, settings: ActivationClusteringSettings) -> Detection:
    """Split every class in two and flag the poisoned clusters; the rule exclusionary trains a network to decide.

    Args:
        inputs: the suspects; their training sets and attacked networks are used.
        settings: the defense's settings.

    Returns:
        Flags and scores of all rows.

    Raises:
        InputError: a setting is invalid.

    References:
        Chen et al. 2018, algorithm 1 and section 5.
    """
    check(settings)
    rows = inputs.all_rows()
    nets = inputs.attacked
    if settings.network == "unaugmented":
        config = inputs.config(augmentation="none")
        nets = inputs.train("activation clustering: unaugmented network", inputs.make_model(), config, rows)
    embeddings = inputs.embeddings(nets.model, nets.variables, rows)
    found = [find_clusters(*member, settings) for member in zip(embeddings, inputs.labels, strict=True)]
    flags, scores, largest_silhouette = (np.stack([member[i] for member in found]) for i in range(3))
    if settings.rule == "exclusionary":
        without = retrain_without(inputs, f"{_stage(settings)}, smaller clusters left out", flags)
        predictions = np.argmax(inputs.logits(without.model, without.variables, rows), axis=-1)
        flags = np.stack(
            [reclassify(*member, settings.threshold) for member in zip(flags, inputs.labels, predictions, strict=True)]
        )
    facts = {
        "classes with a flagged cluster": np.array(
            [len(np.unique(labels[flagged])) for labels, flagged in zip(inputs.labels, flags, strict=True)]
        ),
        "largest silhouette": largest_silhouette,
    }
    return Detection(flags, scores, facts, not_tested=tuple(member.not_tested for member in found))


def run(inputs: DefenseInput, settings: ActivationClusteringSettings) -> DefenseResult:
    """Flag rows as `detect` does, and train on the rest.

    Raises:
        InputError: a setting is invalid.
    """
    found = detect(inputs, settings)
    stage = _stage(settings)
    if settings.rule == "exclusionary":
        stage += f" {settings.threshold:g}"
    return retrained(inputs, stage, found)


ACTIVATION_CLUSTERING = Defense(
    name=NAME,
    title="activation clustering",
    paper="Chen et al. 2018, Detecting Backdoor Attacks on Deep Neural Networks by Activation Clustering",
    stage="before training",
    needs=("training set", "attacked model"),
    settings=ActivationClusteringSettings(),
    run=run,
    detect=detect,
    check=check,
    least=least,
    # FastICA as in the paper, but with fewer dimensions than its 10: a class of the digits has few rows to fit them to.
    changes={"quick digits": {"reduction": "ica", "dimensions": 5}},
)

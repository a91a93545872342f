"""Activation clustering: poisoned rows form a cluster of their own among the embeddings of their class (Chen et al. 2018).

A network that learned a trigger answers alike for the rows of the target class and for the triggered rows, but not for the
same reason, and the input of its last layer shows it. Class by class, the embeddings of all rows are reduced to 10
dimensions and split in two by k-means. Which of the two clusters is poisoned, if any, is decided by

- smaller: the smaller one of every class, as in the comparison of the LfD paper; clean classes lose theirs too;
- relative_size: the smaller one where it is small (a clean class splits about evenly);
- silhouette: the same, where the clusters also lie apart;
- exclusionary: the smaller ones are left out, a network is trained on the rest, and a cluster that this network takes for
  another class more often than for its label is poisoned (Chen et al., section 5: exclusionary reclassification).

Then a network is trained on what is left. Every rule asks about the smaller cluster, and where the poisons outnumber the clean
rows of the target class, that is the clean one: so they do when a tenth of all rows of ten classes is moved into one, and in
most clean-label attacks on the digits.

A widely used benchmark's code clusters each mini-batch on its own, on augmented images, and then reads the flags in the order
of a second, reshuffled pass, so that they belong to other rows. Here each class is clustered at once, from its images as they
are, and its rows are sorted before they are clustered, so that the result does not depend on their order.
"""

import warnings
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA, FastICA
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import silhouette_score

from bdjax.defenses.contract import Defense, DefenseInput
from bdjax.defenses.filtering import retrain_without, retrained
from bdjax.settings import check_values
from bdjax.types import DefenseResult, Detection

NAME = "activation_clustering"
RULES = ("smaller", "relative_size", "silhouette", "exclusionary")
REDUCTIONS = ("pca", "ica")
RANDOM_STATE = 0  # of k-means and of FastICA: the flags are a function of the embeddings
STARTS = 10  # of k-means; the tightest result counts


@dataclass(frozen=True)
class ActivationClusteringSettings:
    """How a class is split, and which half is taken for poisoned."""

    reduction: Literal["pca", "ica"] = "pca"
    """ica, FastICA, in the paper; pca in BackdoorBench"""
    dimensions: int = 10
    """that k-means sees; fewer where a class has no more"""
    rule: Literal["smaller", "relative_size", "silhouette", "exclusionary"] = "smaller"
    """which clusters are poisoned"""
    largest_share: float = 0.35
    """of relative_size and silhouette: a poisoned cluster has less than this share of its class"""
    smallest_silhouette: float = 0.1
    """of silhouette: a class with a poisoned cluster has a mean silhouette coefficient above it; 0.1 to 0.15 in the paper"""
    threshold: float = 1.0
    """of exclusionary: a cluster is poisoned unless its label is predicted for more than so many times as many rows of it as
    the most frequent other class"""


def check(settings: ActivationClusteringSettings) -> None:
    """Refuse settings that cannot be.

    Raises:
        InputError: naming the setting.
    """
    choices = {"reduction": REDUCTIONS, "rule": RULES}
    check_values(f"defense {NAME}", settings, choices=choices, at_least={"dimensions": 1})


class Split(NamedTuple):
    """One class in two clusters."""

    in_smaller: np.ndarray
    """bool [n]"""
    scores: np.ndarray
    """float64 [n], in [-1, 1]"""
    share: float
    """of the class's rows, in the smaller cluster"""
    silhouette: float
    """mean silhouette coefficient, in [-1, 1]: 1 for two points far apart"""


def reduce_dimensions(embeddings: np.ndarray, reduction: str, dimensions: int) -> np.ndarray:
    """Embeddings of one class along few directions.

    Args:
        embeddings: float [n, d].
        reduction: a key of `REDUCTIONS`.
        dimensions: k, at most.

    Returns:
        float64 [n, k']: k' is the smallest of k and the number of directions in which the rows differ, but at least 1.
    """
    count = min(dimensions, *embeddings.shape)
    pca = PCA(count, svd_solver="covariance_eigh")
    with np.errstate(invalid="ignore"):  # equal rows have no variance to explain a share of
        reduced = pca.fit_transform(embeddings.astype(np.float64))
    # A channel that is 0 for every row leaves directions of no variance, which whitening would blow up.
    varied = pca.explained_variance_ > 1e-10 * max(pca.explained_variance_[0], 1e-10)
    reduced = reduced[:, : max(int(varied.sum()), 1)]
    if reduction == "pca" or not varied.any():
        return reduced
    with warnings.catch_warnings():
        # Components that are not fully unmixed after so many rounds are still a rotation of the whitened rows.
        warnings.simplefilter("ignore", ConvergenceWarning)
        ica = FastICA(whiten="unit-variance", max_iter=1000, random_state=RANDOM_STATE)
        return ica.fit_transform(reduced)


def split_class(embeddings: np.ndarray, reduction: str, dimensions: int) -> Split | None:
    """Split the rows of one class in two.

    The score of a row is how much closer it is to the centre of the smaller cluster than to that of the larger one,
    (far - near) / (far + near) with a minus sign in the larger cluster, times the silhouette coefficient: a half of a class
    that is not two groups is no suspect.

    Args:
        embeddings: float [n, d], in any order.
        reduction: a key of `REDUCTIONS`.
        dimensions: that k-means sees.

    Returns:
        The split, or None of fewer than three different rows, which are one cluster.
    """
    if len(np.unique(embeddings, axis=0)) < 3:
        return None
    # FastICA and the first centres of k-means depend on the order of the rows: this one is always the same.
    order = np.lexsort(embeddings.T[::-1])
    rows = reduce_dimensions(embeddings[order], reduction, dimensions)
    means = KMeans(2, n_init=STARTS, tol=0.0, random_state=RANDOM_STATE).fit(rows)
    sizes = np.bincount(means.labels_, minlength=2)
    small = int(np.argmin(sizes))
    to_small, to_large = (np.linalg.norm(rows - means.cluster_centers_[one], axis=1) for one in (small, 1 - small))
    silhouette = float(silhouette_score(rows, means.labels_))
    in_smaller, scores = np.zeros(len(rows), bool), np.zeros(len(rows))
    in_smaller[order] = means.labels_ == small
    scores[order] = (to_large - to_small) / (to_large + to_small) * max(silhouette, 0.0)
    return Split(in_smaller, scores, float(sizes[small] / len(rows)), silhouette)


def is_poisoned(split: Split, settings: ActivationClusteringSettings) -> bool:
    """Whether the smaller cluster of a class is poisoned, or to be asked about, by the rule of the settings."""
    small = split.share < settings.largest_share
    if settings.rule == "relative_size":
        return small
    if settings.rule == "silhouette":
        return small and split.silhouette > settings.smallest_silhouette
    return True


def find_clusters(
    embeddings: np.ndarray, labels: np.ndarray, settings: ActivationClusteringSettings
) -> tuple[np.ndarray, np.ndarray, float]:
    """Flag and score the rows of one training set, class by class.

    Args:
        embeddings: float32 [n, d].
        labels: int32 [n].
        settings: how.

    Returns:
        Flags bool [n], scores float32 [n], and the largest silhouette coefficient of any class.
    """
    flags, scores, clearest = np.zeros(len(labels), bool), np.zeros(len(labels), np.float32), 0.0
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        split = split_class(embeddings[rows], settings.reduction, settings.dimensions)
        if split is None:
            continue
        scores[rows] = split.scores
        clearest = max(clearest, split.silhouette)
        if is_poisoned(split, settings):
            flags[rows] = split.in_smaller
    return flags, scores, clearest


def reclassify(flags: np.ndarray, labels: np.ndarray, predictions: np.ndarray, threshold: float) -> np.ndarray:
    """Which of the clusters that were left out are poisoned, by what a network says of them that never saw them.

    With l the rows of a cluster predicted as their label and p those predicted as the most frequent other class, the cluster
    is legitimate if l / p > threshold (Chen et al., section 5).

    Args:
        flags: bool [n], the rows that were left out: one cluster of each class at most.
        labels: int32 [n].
        predictions: int [n], of a network trained on the others.
        threshold: T.

    Returns:
        bool [n]: the flags without those of the legitimate clusters.
    """
    flags = flags.copy()
    for label in np.unique(labels[flags]):
        cluster = flags & (labels == label)
        counts = np.bincount(predictions[cluster], minlength=label + 1)
        as_label, counts[label] = int(counts[label]), 0
        flags[cluster] = as_label <= threshold * counts.max()
    return flags


def _stage(settings: ActivationClusteringSettings) -> str:
    """The name of what is trained without the smaller clusters, or without those of them that a rule takes for poisoned."""
    stage = f"activation clustering: {settings.reduction} {settings.dimensions}, {settings.rule}"
    if settings.rule in ("relative_size", "silhouette"):
        stage += f" {settings.largest_share:g}"
    if settings.rule == "silhouette":
        stage += f" {settings.smallest_silhouette:g}"
    return stage


def detect(inputs: DefenseInput, settings: ActivationClusteringSettings) -> Detection:
    """Split every class in two, and flag the poisoned clusters; the rule exclusionary trains a network to tell which they are.

    Args:
        inputs: the suspects; used are their training sets and attacked networks.
        settings: how.

    Returns:
        Flags and scores of all rows.

    Raises:
        InputError: a setting that cannot be.

    References:
        Chen et al. 2018, algorithm 1 and section 5.
    """
    check(settings)
    rows = inputs.all_rows()
    embeddings = inputs.embeddings(inputs.attacked.model, inputs.attacked.variables, rows)
    found = [find_clusters(*own, settings) for own in zip(embeddings, inputs.labels, strict=True)]
    flags, scores, clearest = (np.stack(each) for each in zip(*found, strict=True))
    if settings.rule == "exclusionary":
        without = retrain_without(inputs, f"{_stage(settings)}, smaller clusters left out", flags)
        predictions = np.argmax(inputs.logits(without.model, without.variables, rows), axis=-1)
        flags = np.stack(
            [reclassify(*own, settings.threshold) for own in zip(flags, inputs.labels, predictions, strict=True)]
        )
    facts = {
        "classes with a flagged cluster": np.array(
            [len(np.unique(labels[own])) for labels, own in zip(inputs.labels, flags, strict=True)]
        ),
        "largest silhouette": clearest,
    }
    return Detection(flags, scores, facts)


def run(inputs: DefenseInput, settings: ActivationClusteringSettings) -> DefenseResult:
    """`detect`, and train on what is left.

    Raises:
        InputError: a setting that cannot be.
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
    # As in the paper FastICA, to fewer dimensions than its 10: a class of the digits has few rows to fit them to.
    changes={"quick digits": {"reduction": "ica", "dimensions": 5}},
)

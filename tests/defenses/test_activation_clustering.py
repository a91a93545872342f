import dataclasses

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score, silhouette_samples

from bdjax.defenses import activation_clustering
from bdjax.defenses.activation_clustering import (
    ACTIVATION_CLUSTERING,
    ActivationClusteringSettings,
    check,
    find_clusters,
    is_poisoned,
    reclassify,
    reduce_dimensions,
    run,
    split_class,
)
from bdjax.errors import InputError
from bdjax.training.stages import Nets

SETTINGS = ActivationClusteringSettings()
DIMENSIONS = 32


def one_group(seed, rows=200):
    return np.random.default_rng(seed).standard_normal((rows, DIMENSIONS)).astype(np.float32)


def nine_to_one(seed, rows=200, apart=12.0):
    """Two round groups in one class, and which rows are of the tenth part."""
    random = np.random.default_rng(seed)
    minority = random.permutation(rows) < rows // 10
    direction = random.standard_normal(DIMENSIONS)
    direction *= apart / np.linalg.norm(direction)
    return (one_group(seed + 100, rows) + np.outer(minority, direction)).astype(np.float32), minority


def training_set(seed, classes=3):
    """Three classes, the last of which has a minority."""
    groups = [one_group(seed + label) for label in range(classes - 1)]
    poisoned, minority = nine_to_one(seed)
    labels = np.repeat(np.arange(classes), 200).astype(np.int32)
    truth = np.concatenate([np.zeros(200 * (classes - 1), bool), minority])
    order = np.random.default_rng(seed).permutation(len(labels))
    return np.concatenate([*groups, poisoned])[order], labels[order], truth[order]


# ---- One class ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["pca", "ica"])
@pytest.mark.parametrize("seed", range(3))
def test_the_minority_of_nine_to_one_is_found(reduction, seed):
    rows, minority = nine_to_one(seed)
    # FastICA scales every direction to the same variance, so k-means separates the groups in few dimensions only.
    split = split_class(rows, reduction, 10 if reduction == "pca" else 2)
    np.testing.assert_array_equal(split.in_smaller, minority)
    assert split.share == pytest.approx(0.1) and split.silhouette > 0.3
    assert (split.scores[minority] > 0).all() and (split.scores[~minority] < 0).all()
    assert np.abs(split.scores).max() <= 1


def test_one_group_splits_about_evenly_and_scores_low():
    split, (rows, _) = split_class(one_group(0), "pca", 10), nine_to_one(0)
    assert split.share > 0.35 and split.silhouette < 0.15
    assert split.scores.max() < 0.1 * split_class(rows, "pca", 10).scores.max()


@pytest.mark.parametrize("reduction", ["pca", "ica"])
@pytest.mark.parametrize("make", [one_group, lambda seed: nine_to_one(seed)[0]])
def test_the_order_of_the_rows_does_not_matter(reduction, make):
    for seed in range(3 if reduction == "pca" else 1):  # FastICA takes a second
        rows, order = make(seed), np.random.default_rng(seed).permutation(200)
        split, shuffled = split_class(rows, reduction, 10), split_class(rows[order], reduction, 10)
        np.testing.assert_array_equal(shuffled.in_smaller, split.in_smaller[order])
        np.testing.assert_allclose(shuffled.scores, split.scores[order], atol=1e-5)


def test_the_silhouette_coefficient_is_that_of_the_reduced_rows():
    rows, _ = nine_to_one(1)
    split = split_class(rows, "pca", 10)
    expected = silhouette_samples(reduce_dimensions(rows, "pca", 10), split.in_smaller).mean()
    assert split.silhouette == pytest.approx(expected)


@pytest.mark.parametrize("reduction", ["pca", "ica"])
def test_no_more_dimensions_than_the_rows_have(reduction):
    assert reduce_dimensions(one_group(0), reduction, 10).shape == (200, 10)
    assert reduce_dimensions(one_group(0, 4), reduction, 10).shape == (4, 3)  # four points span three directions
    flat = one_group(0)
    flat[:, 3:] = 0  # channels that are 0 for every row
    reduced = reduce_dimensions(flat, reduction, 10)
    assert reduced.shape == (200, 3) and np.isfinite(reduced).all()
    if reduction == "ica":
        np.testing.assert_allclose(reduced.std(axis=0), 1, rtol=1e-3)
    else:  # a rotation keeps distances
        np.testing.assert_allclose(
            np.linalg.norm(reduced[0] - reduced[1]), np.linalg.norm(flat[0] - flat[1]), rtol=1e-5
        )


def test_classes_with_fewer_than_three_different_rows_are_not_split():
    for rows in (one_group(0, 1), one_group(0, 2), np.ones((20, 4), np.float32)):
        assert split_class(rows, "pca", 10) is None
    labels = np.array([0] * 20 + [1] * 2)
    flags, scores, silhouette, _ = find_clusters(np.ones((22, 4), np.float32), labels, SETTINGS)
    assert not flags.any() and not scores.any() and silhouette == 0


# ---- A training set -------------------------------------------------------------------------------------------------


def test_rules_decide_which_smaller_clusters_are_poisoned():
    rows, labels, truth = training_set(0)
    flags = {
        rule: find_clusters(rows, labels, dataclasses.replace(SETTINGS, rule=rule))[0]
        for rule in ("smaller", "relative_size", "silhouette")
    }
    for rule in ("relative_size", "silhouette"):
        np.testing.assert_array_equal(flags[rule], truth)
    # The first rule takes the smaller half of the two clean classes as well.
    np.testing.assert_array_equal(flags["smaller"] & (labels == 2), truth)
    for label in (0, 1):
        assert 0.35 < flags["smaller"][labels == label].mean() <= 0.5


def test_the_thresholds_of_the_rules():
    split = split_class(nine_to_one(0)[0], "pca", 10)._replace(share=0.3, silhouette=0.2)
    for rule, changes, expected in (
        ("smaller", {"largest_share": 0.0}, True),
        ("relative_size", {}, True),
        ("relative_size", {"largest_share": 0.3}, False),
        ("silhouette", {}, True),
        ("silhouette", {"smallest_silhouette": 0.2}, False),
        ("silhouette", {"largest_share": 0.3}, False),
    ):
        assert is_poisoned(split, dataclasses.replace(SETTINGS, rule=rule, **changes)) == expected


def test_scores_rank_poisons_above_all_classes_and_flags_follow_the_rows():
    rows, labels, truth = training_set(1)
    flags, scores, silhouette, _ = find_clusters(rows, labels, SETTINGS)
    assert flags.dtype == bool and scores.dtype == np.float32
    assert roc_auc_score(truth, scores) == 1.0
    assert silhouette == pytest.approx(split_class(rows[labels == 2], "pca", 10).silhouette)
    order = np.random.default_rng(5).permutation(len(labels))
    shuffled, shuffled_scores, *_ = find_clusters(rows[order], labels[order], SETTINGS)
    np.testing.assert_array_equal(shuffled, flags[order])
    np.testing.assert_allclose(shuffled_scores, scores[order], atol=1e-5)


def test_a_cluster_predicted_as_another_class_is_poisoned():
    labels = np.array([0] * 6 + [1] * 6 + [2] * 4)
    flags = np.array([True] * 5 + [False] + [True] * 5 + [False] + [False] * 4)
    # Class 0's cluster: its label three times, class 1 twice. Class 1's: its label once, class 2 three times.
    predictions = np.array([0, 0, 0, 1, 1, 2] + [1, 2, 2, 2, 0, 0] + [0] * 4)
    np.testing.assert_array_equal(reclassify(flags, labels, predictions, 1.0), flags & (labels == 1))
    np.testing.assert_array_equal(reclassify(flags, labels, predictions, 1.5), flags)  # 3 / 2 is not above 1.5
    np.testing.assert_array_equal(reclassify(flags, labels, predictions, 0.3), flags & False)
    assert flags.sum() == 10  # the argument does not change


def test_a_cluster_predicted_as_its_label_alone_is_legitimate():
    labels, flags = np.zeros(4, int), np.ones(4, bool)
    assert not reclassify(flags, labels, np.zeros(4, int), 1.0).any()
    assert reclassify(flags, labels, np.ones(4, int), 1.0).all()


# ---- As a defense ---------------------------------------------------------------------------------------------------


@pytest.fixture
def one_start(monkeypatch):
    """Of k-means, for tests that split every class of both suspects several times."""
    monkeypatch.setattr(activation_clustering, "STARTS", 1)


@pytest.mark.usefixtures("one_start")
def test_flags_are_those_of_the_attacked_networks_embeddings_whatever_the_batch(inputs):
    rows = inputs.all_rows()
    embeddings = inputs.embeddings(inputs.attacked.model, inputs.attacked.variables, rows)
    assert embeddings.shape[:2] == inputs.index.shape
    other = dataclasses.replace(inputs, recipe=inputs.config(evaluation_batch_size=37))
    again = other.embeddings(inputs.attacked.model, inputs.attacked.variables, rows)
    for first, second, labels in zip(embeddings, again, inputs.labels, strict=True):
        flags = [find_clusters(rows, labels, SETTINGS)[0] for rows in (first, second)]
        np.testing.assert_array_equal(*flags)


@pytest.mark.usefixtures("one_start")
def test_exclusionary_uses_a_network_that_was_trained_on_the_rest(inputs, monkeypatch):
    stages, sizes = [], []

    def train(self, stage, model, config, rows):
        """Networks that predict class 3 for every row."""
        stages.append(stage)
        sizes.append(rows.index.shape[1])
        variables = self.begin("constant", model)
        bias = np.tile(np.where(np.arange(10) == 3, 1e3, 0).astype(np.float32), (len(self.index), 1))
        classifier = {**variables["params"]["classifier"], "bias": bias}
        return Nets(model, {**variables, "params": {**variables["params"], "classifier": classifier}}, 1, {})

    monkeypatch.setattr(type(inputs), "train", train)
    result = run(inputs, dataclasses.replace(SETTINGS, rule="exclusionary"))
    assert len(set(stages)) == 2  # otherwise the second would restore the first
    assert sizes[0] < sizes[1] < inputs.index.shape[1]
    embeddings = inputs.embeddings(inputs.attacked.model, inputs.attacked.variables, inputs.all_rows())
    for i, labels in enumerate(inputs.labels):
        smaller, scores, silhouette, _ = find_clusters(embeddings[i], labels, SETTINGS)
        assert smaller[labels == 3].any()
        np.testing.assert_array_equal(result.flags[i], smaller & (labels != 3))
        assert result.facts["classes with a flagged cluster"][i] == len(np.unique(labels[smaller])) - 1
        np.testing.assert_allclose(result.scores[i], scores)
        assert result.facts["largest silhouette"][i] == pytest.approx(silhouette)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rule": "larger"}, "rule 'larger' is not one of smaller"),
        ({"reduction": "tsne"}, "reduction 'tsne' is not one of pca, ica"),
        ({"dimensions": 0}, "dimensions 0 is not at least 1"),
    ],
)
def test_invalid_settings_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        check(dataclasses.replace(SETTINGS, **changes))


def test_running_checks_the_settings(inputs):
    with pytest.raises(InputError, match="rule 'larger'"):
        run(inputs, dataclasses.replace(SETTINGS, rule="larger"))


def test_its_needs():
    assert ACTIVATION_CLUSTERING.needs == ("training set", "attacked model")

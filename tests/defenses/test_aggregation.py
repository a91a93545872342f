from functools import cache

import chex
import jax
import numpy as np
import pytest
from scipy.special import softmax

from bdjax.defenses.aggregation import aggregate_logits, hard_vote, soft_vote

AGGREGATIONS = ("mean", "median", "trimmed_mean")


def draw(seed, teachers=7, rows=20, classes=5):
    return np.random.default_rng(seed).standard_normal((teachers, rows, classes)).astype(np.float32)


def votes_for(classes, num_classes=4):
    """Logits of one row whose argmaxes are these classes."""
    return 5.0 * np.eye(num_classes, dtype=np.float32)[np.asarray(classes)][:, None, :]


def centred(logits):
    return logits - logits.mean(axis=-1, keepdims=True)


# ---- All of them ----------------------------------------------------------------------------------------------------


@cache
def compiled(aggregation, trim=1):
    return jax.jit(lambda logits: aggregate_logits(logits, aggregation, trim))


def test_identical_teachers_give_the_result_of_a_single_one():
    teacher = draw(0)[:1]
    logits = np.tile(teacher, (7, 1, 1))
    single = np.argmax(teacher[0], axis=1)
    for space in ("logits", "probabilities"):
        np.testing.assert_array_equal(soft_vote(logits, space), single)
    for tie in ("lowest", "soft"):
        votes = hard_vote(logits, tie)
        np.testing.assert_array_equal(votes.predictions, single)
        assert not votes.is_tie.any()
    for aggregation in AGGREGATIONS:
        together = np.asarray(compiled(aggregation)(logits))
        np.testing.assert_allclose(softmax(together, axis=1), softmax(teacher[0], axis=1), rtol=1e-4)


@pytest.mark.parametrize("seed", range(5))
def test_the_order_of_the_teachers_does_not_matter(seed):
    logits = draw(seed)
    shuffled = logits[np.random.default_rng(seed).permutation(7)]
    for aggregation in AGGREGATIONS:
        np.testing.assert_allclose(compiled(aggregation)(logits), compiled(aggregation)(shuffled), atol=1e-5)
    for space in ("logits", "probabilities"):
        np.testing.assert_array_equal(soft_vote(logits, space), soft_vote(shuffled, space))
    for tie in ("lowest", "soft"):
        chex.assert_trees_all_equal(hard_vote(logits, tie), hard_vote(shuffled, tie))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: aggregate_logits(x, "mode"), "'mode' is not one of 'mean', 'median', 'trimmed_mean'"),
        (lambda x: aggregate_logits(x, "trimmed_mean", trim=4), "trimming 4 on each side leaves none of 7 classifiers"),
        (lambda x: aggregate_logits(x, "trimmed_mean", trim=-1), "trimming -1"),
        (lambda x: soft_vote(x, "ranks"), "'ranks' is not one of 'logits', 'probabilities'"),
        (lambda x: hard_vote(x, "random"), "'random' is not one of 'lowest', 'soft'"),
    ],
)
def test_invalid_arguments_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(draw(0))


# ---- Aggregation ----------------------------------------------------------------------------------------------------


def test_aggregates_against_numpy():
    logits = draw(1)
    expected = {
        "mean": logits.mean(axis=0),
        "median": np.median(centred(logits), axis=0),
        "trimmed_mean": np.sort(centred(logits), axis=0)[2:-2].mean(axis=0),
    }
    for aggregation in AGGREGATIONS:
        np.testing.assert_allclose(compiled(aggregation, 2)(logits), expected[aggregation], atol=1e-5)
    untrimmed = compiled("trimmed_mean", 0)(logits)
    np.testing.assert_allclose(untrimmed, centred(logits).mean(axis=0), atol=1e-5)


@pytest.mark.parametrize("liar", [0, 3, 6])
def test_one_malicious_teacher_moves_the_mean_but_not_the_robust_averages(liar):
    # All teachers agree up to noise, but one has a huge logit for class 2.
    honest = np.tile(centred(draw(2))[:1], (7, 1, 1)) + 0.01 * draw(3)
    logits = honest.copy()
    logits[liar] = 0
    logits[liar, :, 2] = 1000.0
    for aggregation in ("median", "trimmed_mean"):
        moved = compiled(aggregation)(logits) - centred(honest).mean(axis=0)
        assert np.abs(moved).max() < 0.05, aggregation
    assert np.all(np.argmax(compiled("mean")(logits), axis=1) == 2)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_a_constant_added_to_all_logits_of_a_teacher_does_not_matter(aggregation):
    logits = draw(4)
    offsets = 100.0 * np.random.default_rng(0).standard_normal((7, 20, 1)).astype(np.float32)
    plain, shifted = (np.asarray(compiled(aggregation)(x)) for x in (logits, logits + offsets))
    np.testing.assert_allclose(softmax(plain, axis=1), softmax(shifted, axis=1), atol=1e-3)
    if aggregation != "mean":
        np.testing.assert_allclose(plain, shifted, atol=1e-3)


# ---- Votes ----------------------------------------------------------------------------------------------------------


def test_a_tie_goes_to_the_lowest_class_and_is_flagged():
    votes = hard_vote(votes_for([0, 0, 0, 1, 1, 1, 2]))
    assert (votes.predictions.tolist(), votes.is_tie.tolist()) == ([0], [True])
    votes = hard_vote(votes_for([2, 2, 2, 1, 1, 3, 0]))
    assert (votes.predictions.tolist(), votes.is_tie.tolist()) == ([2], [False])
    # Every teacher votes for another class.
    assert hard_vote(votes_for([3, 2, 1])).predictions.tolist() == [1]


def test_a_tie_can_go_to_the_higher_average_among_the_tied():
    logits = votes_for([0, 0, 0, 1, 1, 1, 2])
    logits[3, 0, 1] += 1.0  # one vote for class 1 is surer than the others
    logits[:, 0, 3] = 4.9  # class 3 has the highest average, but not a vote
    assert soft_vote(logits).tolist() == [3]
    votes = hard_vote(logits, "soft")
    assert (votes.predictions.tolist(), votes.is_tie.tolist()) == ([1], [True])
    assert hard_vote(logits, "lowest").predictions.tolist() == [0]


@pytest.mark.parametrize("seed", range(5))
def test_votes_are_counts_of_argmaxes(seed):
    logits = draw(seed, teachers=6, rows=60, classes=3)
    votes = hard_vote(logits)
    for row in range(60):
        counts = np.bincount(np.argmax(logits[:, row], axis=1), minlength=3)
        assert votes.predictions[row] == np.argmax(counts)
        assert votes.is_tie[row] == (np.sum(counts == counts.max()) > 1)
    assert votes.is_tie.any()
    assert not votes.is_tie.all()
    by_average = hard_vote(logits, "soft")
    np.testing.assert_array_equal(by_average.is_tie, votes.is_tie)
    np.testing.assert_array_equal(by_average.predictions[~votes.is_tie], votes.predictions[~votes.is_tie])
    assert np.any(by_average.predictions != votes.predictions)


def test_soft_votes_average_logits_or_probabilities():
    logits = draw(5)
    np.testing.assert_array_equal(soft_vote(logits), np.argmax(logits.mean(axis=0), axis=1))
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=2, keepdims=True)
    np.testing.assert_array_equal(soft_vote(logits, "probabilities"), np.argmax(probabilities.mean(axis=0), axis=1))
    # One very sure teacher outweighs two others by its logits, not by its probabilities.
    torn = np.array([[[50.0, 0.0]], [[0.0, 3.0]], [[0.0, 3.0]]], np.float32)
    assert (soft_vote(torn).tolist(), soft_vote(torn, "probabilities").tolist()) == ([0], [1])

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bdjax.defenses.aggregation import aggregate_logits, hard_vote, soft_vote

HOWS = ("mean", "median", "trimmed_mean")


def draw(seed, teachers=7, rows=20, classes=5):
    return np.random.default_rng(seed).standard_normal((teachers, rows, classes)).astype(np.float32)


def votes_for(classes, num_classes=4):
    """Logits of one row whose argmaxes are these classes."""
    return 5.0 * np.eye(num_classes, dtype=np.float32)[np.asarray(classes)][:, None, :]


def centred(logits):
    return logits - logits.mean(axis=-1, keepdims=True)


# ---- All of them ----------------------------------------------------------------------------------------------------


def test_identical_teachers_say_what_one_says():
    one = draw(0)[:1]
    logits = np.tile(one, (5, 1, 1))
    single = np.argmax(one[0], axis=1)
    for space in ("logits", "probabilities"):
        np.testing.assert_array_equal(soft_vote(logits, space), single)
    for tie in ("lowest", "soft"):
        votes = hard_vote(logits, tie)
        np.testing.assert_array_equal(votes.predictions, single)
        assert not votes.is_tie.any()
    for how in HOWS:
        together = aggregate_logits(jnp.asarray(logits), how)
        chex.assert_trees_all_close(jax.nn.softmax(together), jax.nn.softmax(jnp.asarray(one[0])), rtol=1e-4)


@pytest.mark.parametrize("seed", range(5))
def test_the_order_of_the_teachers_is_of_no_weight(seed):
    logits = draw(seed)
    shuffled = logits[np.random.default_rng(seed).permutation(7)]
    for how in HOWS:
        chex.assert_trees_all_close(
            aggregate_logits(jnp.asarray(logits), how), aggregate_logits(jnp.asarray(shuffled), how), atol=1e-5
        )
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
def test_what_cannot_be_done_is_said(call, message):
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
    for how in HOWS:
        aggregate = jax.jit(lambda x, how=how: aggregate_logits(x, how, trim=2))
        np.testing.assert_allclose(aggregate(jnp.asarray(logits)), expected[how], atol=1e-5)
    untrimmed = aggregate_logits(jnp.asarray(logits), "trimmed_mean", trim=0)
    np.testing.assert_allclose(untrimmed, centred(logits).mean(axis=0), atol=1e-5)


@pytest.mark.parametrize("liar", [0, 3, 6])
def test_one_liar_moves_the_mean_but_not_the_robust_ones(liar):
    # All teachers agree up to noise; one shouts for class 2.
    honest = np.tile(centred(draw(2))[:1], (7, 1, 1)) + 0.01 * draw(3)
    told = honest.copy()
    told[liar] = 0
    told[liar, :, 2] = 1000.0
    for how in ("median", "trimmed_mean"):
        moved = aggregate_logits(jnp.asarray(told), how) - centred(honest).mean(axis=0)
        assert np.abs(moved).max() < 0.05, how
    assert np.all(np.argmax(aggregate_logits(jnp.asarray(told), "mean"), axis=1) == 2)


@pytest.mark.parametrize("how", HOWS)
def test_a_constant_on_all_of_a_teachers_logits_is_not_heard(how):
    logits = draw(4)
    offsets = 100.0 * np.random.default_rng(0).standard_normal((7, 20, 1)).astype(np.float32)
    plain, shifted = (jax.nn.softmax(aggregate_logits(jnp.asarray(x), how)) for x in (logits, logits + offsets))
    chex.assert_trees_all_close(plain, shifted, atol=1e-3)
    if how != "mean":
        chex.assert_trees_all_close(
            aggregate_logits(jnp.asarray(logits), how), aggregate_logits(jnp.asarray(logits + offsets), how), atol=1e-3
        )


# ---- Votes ----------------------------------------------------------------------------------------------------------


def test_a_tie_goes_to_the_lowest_class_and_is_flagged():
    votes = hard_vote(votes_for([0, 0, 0, 1, 1, 1, 2]))
    assert (votes.predictions.tolist(), votes.is_tie.tolist()) == ([0], [True])
    votes = hard_vote(votes_for([2, 2, 2, 1, 1, 3, 0]))
    assert (votes.predictions.tolist(), votes.is_tie.tolist()) == ([2], [False])
    # Every teacher for a class of its own.
    assert hard_vote(votes_for([3, 2, 1])).predictions.tolist() == [1]


def test_a_tie_can_go_to_the_higher_average_among_the_tied():
    logits = votes_for([0, 0, 0, 1, 1, 1, 2])
    logits[3, 0, 1] += 1.0  # one of those for class 1 is surer than the others
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
    softly = hard_vote(logits, "soft")
    np.testing.assert_array_equal(softly.is_tie, votes.is_tie)
    np.testing.assert_array_equal(softly.predictions[~votes.is_tie], votes.predictions[~votes.is_tie])
    assert np.any(softly.predictions != votes.predictions)


def test_soft_votes_average_logits_or_probabilities():
    logits = draw(5)
    np.testing.assert_array_equal(soft_vote(logits), np.argmax(logits.mean(axis=0), axis=1))
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=2, keepdims=True)
    np.testing.assert_array_equal(soft_vote(logits, "probabilities"), np.argmax(probabilities.mean(axis=0), axis=1))
    # One very sure teacher outweighs two others by its logits, not by its probabilities.
    torn = np.array([[[50.0, 0.0]], [[0.0, 3.0]], [[0.0, 3.0]]], np.float32)
    assert (soft_vote(torn).tolist(), soft_vote(torn, "probabilities").tolist()) == ([0], [1])

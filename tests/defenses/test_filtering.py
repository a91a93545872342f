import numpy as np
import pytest

from bdjax.defenses.filtering import kept_rows, retrain_without


def generators(members):
    return [np.random.default_rng(number) for number in range(len(members))]


def draw(seed, members=4, rows=30):
    random = np.random.default_rng(seed)
    return random.uniform(size=(members, rows)) < random.uniform(0, 0.9, (members, 1))


@pytest.mark.parametrize("seed", range(10))
def test_every_kept_row_is_there_and_no_flagged_one(seed):
    flags = draw(seed)
    rows = kept_rows(flags, generators(flags))
    assert rows.dtype == np.int32
    assert rows.shape == (4, (~flags).sum(axis=1).max())
    for member_flags, kept in zip(flags, rows, strict=True):
        np.testing.assert_array_equal(np.unique(kept), np.flatnonzero(~member_flags))
        # Padded evenly: the numbers of repetitions differ by at most 1.
        counts = np.bincount(kept, minlength=len(member_flags))[~member_flags]
        assert counts.max() - counts.min() <= 1


def test_a_member_that_keeps_most_rows_sees_each_once():
    flags = np.array([[True, False, False, True], [True, True, False, True]])
    rows = kept_rows(flags, generators(flags))
    np.testing.assert_array_equal(rows, [[1, 2], [2, 2]])


def test_nothing_flagged_keeps_everything():
    np.testing.assert_array_equal(kept_rows(np.zeros((2, 3), bool), generators([0, 1])), [[0, 1, 2]] * 2)


def test_a_member_whose_rows_are_all_flagged_keeps_them_all():
    flags = np.array([[True] * 4, [True, True, True, False]])
    rows = kept_rows(flags, generators(flags))
    np.testing.assert_array_equal(rows, [[0, 1, 2, 3], [3, 3, 3, 3]])
    assert flags[0].all()  # the argument does not change


def test_flagged_rows_are_not_trained_on(inputs, monkeypatch):
    """The training receives the images and labels of the kept rows."""
    seen = {}

    def train(self, stage, model, config, rows):
        seen.update(stage=stage, model=model, config=config, rows=rows)
        return "trained"

    monkeypatch.setattr(type(inputs), "train", train)
    flags = np.zeros(inputs.index.shape, bool)
    flags[0, ::2] = True
    assert retrain_without(inputs, "a stage", flags) == "trained"
    index, labels = np.asarray(seen["rows"].index), np.asarray(seen["rows"].targets["labels"])
    assert seen["stage"] == "a stage" and seen["config"] == inputs.recipe
    assert index.shape == labels.shape == inputs.index.shape  # the second member keeps all its rows
    pairs = set(zip(index[0].tolist(), labels[0].tolist(), strict=True))
    assert pairs == set(zip(inputs.index[0, 1::2].tolist(), inputs.labels[0, 1::2].tolist(), strict=True))
    np.testing.assert_array_equal(index[1], inputs.index[1])
    np.testing.assert_array_equal(labels[1], inputs.labels[1])

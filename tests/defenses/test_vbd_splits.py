import jax
import numpy as np
import pytest

from bdjax.defenses.vbd_splits import fold_rows, split_rows


class TestSplit:
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(5), [300, 150, 37, 9, 4])).astype(np.int32)

    def of(self, seed=0, labels=None, share=0.2):
        return split_rows(jax.random.key(seed), self.labels if labels is None else labels, share)

    def test_every_row_is_in_one_part(self):
        training, held_back = self.of()
        np.testing.assert_array_equal(np.sort(np.concatenate([training, held_back])), np.arange(500))

    @pytest.mark.parametrize("share", [0.01, 0.2, 0.333, 0.9])
    def test_sizes_depend_on_the_number_of_rows_alone(self, share):
        # Suspects with other labels are members of the same calls.
        label_sets = [self.labels, np.zeros(500, np.int32), np.arange(500).astype(np.int32) % 7]
        parts = [self.of(3, labels, share) for labels in label_sets]
        assert {(len(first), len(second)) for first, second in parts} == {
            (500 - round(500 * share), round(500 * share))
        }

    @pytest.mark.parametrize("seed", range(3))
    def test_each_class_in_proportion_and_so_is_every_start(self, seed):
        _, held_back = self.of(seed)
        sizes = np.bincount(self.labels)
        for count in (5, 10, 23, 50, 100):
            found = np.bincount(self.labels[held_back[:count]], minlength=5)
            assert np.abs(found - count / 500 * sizes).max() <= 1, count

    @pytest.mark.parametrize("folds", [2, 5, 7])
    def test_every_row_is_held_back_by_one_of_several_splits(self, folds):
        training, held_back = fold_rows(jax.random.key(1), self.labels, folds)
        assert training.shape == (folds, 500 - 500 // folds) and held_back.shape == (folds, 500 // folds)
        assert len(np.unique(held_back)) == 500 // folds * folds
        for of_fold, rest in zip(held_back, training, strict=True):
            np.testing.assert_array_equal(np.sort(np.concatenate([of_fold, rest])), np.arange(500))
            counts = np.bincount(self.labels[of_fold], minlength=5)
            assert np.abs(counts - np.bincount(self.labels) / folds).max() <= 2  # in proportion

    def test_keys(self):
        first, again, other = (self.of(seed)[1] for seed in (0, 0, 1))
        np.testing.assert_array_equal(first, again)
        assert 5 < len(np.intersect1d(first, other)) < 60  # 20 by chance

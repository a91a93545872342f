import hashlib
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from sklearn import datasets

from bdjax.datasets import digits
from bdjax.datasets.digits import load_digits


def test_digits():
    train, test = load_digits()
    assert train.images.shape == (1438, 8, 8, 1) and test.images.shape == (359, 8, 8, 1)
    assert train.images.dtype == np.uint8 and train.labels.dtype == np.int32
    assert train.num_classes == 10 and train.name == "digits"
    assert train.images.min() == 0 and train.images.max() == 255
    assert train.source == "scikit-learn, train rows of a fixed 80/20 split"
    shares = np.bincount(test.labels) / (np.bincount(test.labels) + np.bincount(train.labels))
    np.testing.assert_allclose(shares, 0.2, atol=0.004)


def test_digits_are_the_same_every_time():
    # A fixed value: results of different days are to be compared.
    train, test = load_digits()
    digest = hashlib.md5(train.images.tobytes() + train.labels.astype("<i4").tobytes() + test.images.tobytes())
    assert digest.hexdigest() == "e073383c7c38556e77fa9d3105e0ecbe"


@pytest.mark.parametrize("folders", [None, ("nowhere",)])
def test_the_table_is_that_of_scikit_learn(folders, monkeypatch):
    if folders:  # another version, without this file
        monkeypatch.setattr(
            digits.importlib.util, "find_spec", lambda name: SimpleNamespace(submodule_search_locations=folders)
        )
    expected = datasets.load_digits()
    np.testing.assert_array_equal(digits._table(), np.column_stack([expected.data, expected.target]))


def test_without_scikit_learn_the_import_fails(monkeypatch):
    monkeypatch.setattr(digits.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match="sklearn"):
        digits._table()


def test_no_row_is_in_both_parts_by_number():
    train, test = load_digits()
    assert np.concatenate([train.labels, test.labels]).sum() == datasets.load_digits().target.sum()
    assert len(train) + len(test) == 1797

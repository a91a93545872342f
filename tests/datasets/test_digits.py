import hashlib

import numpy as np

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


def test_no_row_is_in_both_parts_by_number():
    from sklearn import datasets

    train, test = load_digits()
    assert np.concatenate([train.labels, test.labels]).sum() == datasets.load_digits().target.sum()
    assert len(train) + len(test) == 1797

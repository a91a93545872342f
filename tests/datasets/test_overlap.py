import numpy as np
import pytest

from bdjax.datasets.overlap import shared_rows
from bdjax.types import Dataset


def rows(images):
    return Dataset(images, np.zeros(len(images), np.int32), 2, "", "")


@pytest.mark.parametrize("seed", range(3))
def test_rows_are_shared_whose_pixels_are_all_the_same(seed):
    random = np.random.default_rng(seed)
    images, others = (random.integers(0, 256, (20, 3, 4, 1), np.uint8) for _ in range(2))
    others[7], others[9] = images[4], images[5]
    others[9, 0, 0, 0] ^= 1
    found = shared_rows(rows(images), rows(others))
    np.testing.assert_array_equal(found, [any((image == other).all() for other in others) for image in images])
    np.testing.assert_array_equal(np.flatnonzero(found), [4])


def test_images_of_other_shapes_share_nothing():
    images = np.zeros((3, 2, 2, 1), np.uint8)
    assert not shared_rows(rows(images), rows(images.reshape(3, 4, 1, 1))).any()
    assert shared_rows(rows(images[::2]), rows(images)).all()

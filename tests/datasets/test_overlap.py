import numpy as np
import pytest

from bdjax.datasets.overlap import copies, shared_rows
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


def test_copies_are_later_rows_with_the_same_pixels_and_contradictions_have_other_labels():
    images = np.random.default_rng(1).integers(0, 256, (6, 4, 4, 3), np.uint8)
    images[[2, 5]], images[4] = images[0], images[3]
    found = copies(Dataset(images, np.array([0, 1, 0, 1, 1, 2], np.int32), 3, "rows", ""))
    assert found.is_copy.tolist() == [False, False, True, False, True, True]
    assert found.is_contradicted.tolist() == [True, False, True, False, False, True]

import numpy as np
import pytest

from bdjax import datasets
from bdjax.datasets.textures import DIRECTIONS, NUM_CLASSES, NUM_ROWS, SIDE, draw, load_textures


@pytest.fixture(scope="module")
def parts():
    return load_textures()


def test_shapes_and_balance(parts):
    for part, count in zip(parts, NUM_ROWS.values(), strict=True):
        assert part.images.shape == (count, SIDE, SIDE, 3) and part.images.dtype == np.uint8
        assert part.labels.dtype == np.int32 and part.num_classes == NUM_CLASSES == len(set(part.class_names))
        np.testing.assert_array_equal(np.bincount(part.labels), count // NUM_CLASSES)
    assert parts.train.name == "textures" and "textures" in datasets.DATASETS


def test_textures_are_the_same_every_time(parts):
    again = load_textures()
    for first, second in zip(parts, again, strict=True):
        np.testing.assert_array_equal(first.images, second.images)
        np.testing.assert_array_equal(first.labels, second.labels)


def test_no_image_is_in_both_parts_or_twice(parts):
    images = np.concatenate([part.images.reshape(len(part), -1) for part in parts])
    assert len({image.tobytes() for image in images}) == len(images)


def test_colours_and_single_pixels_say_nothing_about_the_class(parts):
    images, labels = parts.train.images.astype(float) / 255, parts.train.labels
    # The means of 400 rows of each class; a class's own colour or pixel would show as a large difference.
    means = np.array([images[labels == label].mean(axis=0) for label in range(NUM_CLASSES)])
    deviation = images.std(axis=0) / np.sqrt(np.sum(labels == 0))
    assert np.abs((means - images.mean(axis=0)) / deviation).max() < 6


def test_the_class_decides_direction_and_fineness():
    def spectrum(label: int) -> np.ndarray:
        images = draw(np.random.default_rng(0), np.full(200, label)).mean(axis=-1)
        images -= images.mean(axis=(1, 2), keepdims=True)
        return (np.abs(np.fft.fft2(images)) ** 2).mean(axis=0)

    frequency = np.fft.fftfreq(SIDE)
    down, across = frequency[:, None], frequency[None]
    radius = np.hypot(down, across)
    coarse, fine = spectrum(0), spectrum(DIRECTIONS)
    assert (coarse * radius).sum() / coarse.sum() < 0.85 * (fine * radius).sum() / fine.sum()
    # Waves of direction 0 vary from left to right; of 72 degrees, mostly from top to bottom.
    for label, ratio in ((0, 1.2), (2, 1 / 1.2)):
        power = spectrum(label)
        found = (power * across**2).sum() / (power * down**2).sum()
        assert found > ratio if ratio > 1 else found < ratio


def test_pixels_leave_room_for_a_bright_patch(parts):
    assert 90 < parts.train.images.mean() < 130
    assert np.mean(parts.train.images[:, -3:, -3:].min(axis=(1, 2, 3)) == 255) == 0

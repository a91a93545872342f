import numpy as np
import pytest

from bdjax.inspection.similarity import psnr, ssim

SHAPES = [(8, 8, 1), (28, 28, 1), (32, 32, 3)]


def noise(shape, seed=0):
    return np.random.default_rng(seed).uniform(0.2, 0.8, (3, *shape)).astype(np.float32)


@pytest.mark.parametrize("shape", SHAPES)
def test_psnr_of_a_known_change(shape):
    images = noise(shape)
    others = images + np.array([0.1, -0.01, 0.2], np.float32)[:, None, None, None]
    measured = psnr(images, others)
    np.testing.assert_allclose(measured, [20.0, 40.0, -20 * np.log10(0.2)], atol=1e-3)
    assert measured.shape == (3,) and measured.dtype == np.float64


def test_psnr_counts_the_share_of_changed_pixels():
    images = np.zeros((1, 10, 10, 1), np.float32)
    others = images.copy()
    others[0, 0, 0] = 1.0
    np.testing.assert_allclose(psnr(images, others), [20.0])


@pytest.mark.parametrize("shape", SHAPES)
def test_equal_images(shape):
    images = noise(shape)
    np.testing.assert_array_equal(psnr(images, images), np.full(3, np.inf))
    np.testing.assert_allclose(ssim(images, images), np.ones(3))


def ssim_by_the_formula(image, other, window=7):
    """Equation 13 at every place that the window fits, with unbiased variances."""
    places = []
    for row in range(image.shape[0] - window + 1):
        for column in range(image.shape[1] - window + 1):
            x, y = (a[row : row + window, column : column + window].ravel() for a in (image, other))
            covariance = np.cov(x, y)
            structure = (2 * covariance[0, 1] + 0.03**2) / (covariance[0, 0] + covariance[1, 1] + 0.03**2)
            brightness = (2 * x.mean() * y.mean() + 0.01**2) / (x.mean() ** 2 + y.mean() ** 2 + 0.01**2)
            places.append(brightness * structure)
    return np.mean(places)


@pytest.mark.parametrize(("shape", "window"), [((8, 8, 1), 7), ((6, 9, 1), 5), ((12, 10, 2), 7)])
def test_ssim_is_the_formula(shape, window):
    images = noise(shape).astype(np.float64)
    others = 0.7 * images + 0.3 * noise(shape, seed=1)
    expected = [
        np.mean([ssim_by_the_formula(x[..., c], y[..., c], window) for c in range(shape[2])])
        for x, y in zip(images, others, strict=True)
    ]
    measured = ssim(images, others)
    np.testing.assert_allclose(measured, expected, atol=1e-9)
    assert measured.dtype == np.float64


def test_ssim_falls_as_the_change_grows():
    images = noise((28, 28, 1))
    means = [
        ssim(images, (1 - share) * images + share * noise((28, 28, 1), seed=1)).mean() for share in (0.1, 0.3, 0.9)
    ]
    assert means[0] > means[1] > means[2]


@pytest.mark.parametrize("measure", [psnr, ssim])
@pytest.mark.parametrize(
    ("images", "others", "message"),
    [
        (np.zeros((2, 8, 8, 1)), np.zeros((2, 8, 8, 3)), "same"),
        (np.zeros((8, 8, 1)), np.zeros((8, 8, 1)), "same"),
        (np.zeros((2, 8, 8, 1), np.uint8), np.zeros((2, 8, 8, 1)), "floats"),
    ],
)
def test_wrong_arrays_are_refused(measure, images, others, message):
    with pytest.raises(ValueError, match=message):
        measure(images, others)


def test_images_too_small_for_a_window_are_refused():
    with pytest.raises(ValueError, match="too small"):
        ssim(np.zeros((1, 2, 8, 1)), np.zeros((1, 2, 8, 1)))

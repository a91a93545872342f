"""PSNR and SSIM: how much a trigger changes each image."""

import numpy as np
from skimage.metrics import structural_similarity

WINDOW = 7
"""Side of SSIM's windows in pixels; scikit-image's default, and it fits into an 8x8 image."""


def psnr(images: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Peak signal-to-noise ratio: -10 log10 of the mean squared difference, for a peak of 1.

    Args:
        images: float [N, H, W, C] in [0, 1].
        others: float [N, H, W, C] in [0, 1], the same images with a trigger.

    Returns:
        float64 [N], decibels; infinity where the two are equal.

    Raises:
        ValueError: the shapes differ or are not those of images, or the values are not floats.
    """
    images, others = _as_pairs(images, others)
    error = np.mean(np.square(images - others), axis=(1, 2, 3))
    with np.errstate(divide="ignore"):
        return -10.0 * np.log10(error)


def ssim(images: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Structural similarity, the mean over all positions and channels; scikit-image's, with uniform 7x7 windows.

    Wang et al. weight an 11x11 window by a Gaussian, which is larger than the smallest images. Images of fewer than 7 pixels
    a side get the largest odd window that fits.

    Args:
        images: float [N, H, W, C] in [0, 1].
        others: float [N, H, W, C] in [0, 1], the same images with a trigger.

    Returns:
        float64 [N] in [-1, 1]; 1 where the two are equal.

    Raises:
        ValueError: the shapes differ or are not those of images of at least 3x3 pixels, or the values are not floats.

    References:
        Wang et al. 2004, Image Quality Assessment: From Error Visibility to Structural Similarity, equation 13.
    """
    images, others = _as_pairs(images, others)
    shortest = min(images.shape[1:3])
    if shortest < 3:
        raise ValueError(f"images of shape {images.shape[1:]} are too small for SSIM, which needs at least 3x3 pixels")
    window = min(WINDOW, shortest - (shortest + 1) % 2)
    return np.array(
        [
            structural_similarity(image, other, win_size=window, data_range=1.0, channel_axis=2)
            for image, other in zip(images, others, strict=True)
        ],
        np.float64,
    )


def _as_pairs(images: np.ndarray, others: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both as float64."""
    images, others = np.asarray(images), np.asarray(others)
    if images.shape != others.shape or images.ndim != 4:
        raise ValueError(
            f"images of shapes {images.shape} and {others.shape}; both should have the same shape (N, H, W, C)"
        )
    if not (np.issubdtype(images.dtype, np.floating) and np.issubdtype(others.dtype, np.floating)):
        raise ValueError(f"images of {images.dtype} and {others.dtype}; both should be floats in [0, 1]")
    return images.astype(np.float64), others.astype(np.float64)

"""The plots that a report on detectors of poisoned rows has: what they find, how well, and why a row was flagged."""

import numpy as np

RED = (255, 0, 0)


def outline(image: np.ndarray, mask: np.ndarray, scale: int) -> np.ndarray:
    """Enlarge an image, and draw a red line along the inside of a mask's boundary (figure 5 (f) of the VBD paper).

    The line is drawn inside, so that it is there at the image's edge too; it takes an eighth of a pixel's width, but at least
    one of the enlarged pixels, so that from a scale of 3 on the masked pixel itself still shows.

    Args:
        image: uint8 [H, W, C], of 1 or 3 channels.
        mask: bool [H, W].
        scale: by how much each side grows, at least 1.

    Returns:
        uint8 [H * scale, W * scale, 3].

    Raises:
        ValueError: shapes that do not fit, or no such scale.
    """
    if image.ndim != 3 or image.shape[2] not in (1, 3) or mask.shape != image.shape[:2] or scale < 1:
        raise ValueError(f"an image of shape {image.shape} and a mask of shape {mask.shape} at scale {scale}")
    large = np.repeat(np.repeat(np.broadcast_to(image, (*image.shape[:2], 3)), scale, axis=0), scale, axis=1)
    inside = np.repeat(np.repeat(mask.astype(bool), scale, axis=0), scale, axis=1)
    width = max(1, scale // 8)
    around = np.lib.stride_tricks.sliding_window_view(np.pad(inside, width), (2 * width + 1, 2 * width + 1))
    large[inside & ~around.all(axis=(2, 3))] = RED
    return large

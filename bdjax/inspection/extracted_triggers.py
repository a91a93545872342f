"""Extracted triggers as pictures: on grey, transparent outside the mask, and outlined on rows that carry them."""

from collections.abc import Sequence

import numpy as np

from bdjax.types import ExtractedPattern

RED = (255, 0, 0)
GREY = 0.5
"""Background where a trigger is transparent (figure 5 of the VBD paper)."""
LEAST_SIDE = 256
"""Smallest length in pixels of the longer side of pictures in separate files."""


def pattern_pictures(extracted: ExtractedPattern, examples: Sequence[np.ndarray], scale: int) -> dict[str, np.ndarray]:
    """Draw a pattern as pictures for separate files.

    Args:
        extracted: the pattern, of 1 or 3 channels.
        examples: rows that it was found on, uint8 [H, W, C] each.
        scale: factor of each side.

    Returns:
        "trigger": uint8 [H * scale, W * scale, 4], transparent outside the mask; "mask": uint8 [H * scale, W * scale], 0 or
        255; "example-1" and so on: uint8 [H * scale, W * scale, 3], with the mask outlined.
    """
    opacity = (255 * extracted.mask).astype(np.uint8)
    colours = np.rint(255 * np.clip(to_rgb(extracted.pattern), 0, 1)).astype(np.uint8)
    pictures = {"trigger": np.concatenate([colours, opacity[..., None]], axis=-1), "mask": opacity}
    pictures = {name: enlarge(pixels, scale) for name, pixels in pictures.items()}
    return pictures | {
        f"example-{i}": outlined(image, extracted.mask, scale) for i, image in enumerate(examples, start=1)
    }


def on_grey(pattern: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Draw a trigger on a grey background.

    Args:
        pattern: float [H, W, C] in [0, 1], of 1 or 3 channels.
        mask: [H, W], bool, or the opacity of each pixel in [0, 1].

    Returns:
        float64 [H, W, 3] in [0, 1].
    """
    opacity = np.asarray(mask, np.float64)[..., None]
    return np.clip(opacity * to_rgb(pattern) + (1 - opacity) * GREY, 0, 1)


def to_rgb(image: np.ndarray) -> np.ndarray:
    """[H, W, 1] or [H, W, 3] -> float64 [H, W, 3]."""
    return np.broadcast_to(np.asarray(image, np.float64), (*image.shape[:2], 3))


def enlarge(image: np.ndarray, scale: int) -> np.ndarray:
    """Repeat each pixel `scale` times along both sides: any dtype [H, W, ...] -> [H * scale, W * scale, ...]."""
    return np.repeat(np.repeat(image, scale, axis=0), scale, axis=1)


def outline(image: np.ndarray, mask: np.ndarray, scale: int) -> np.ndarray:
    """Enlarge an image, and draw a red line along the inside of a mask's boundary (figure 5 (f) of the VBD paper).

    The line is drawn inside, so that it shows at the image's edge too. It is an eighth of an original pixel wide, but at least
    one enlarged pixel, so from a scale of 3 on the inside of a single masked pixel stays visible.

    Args:
        image: uint8 [H, W, C], of 1 or 3 channels.
        mask: bool [H, W].
        scale: factor of each side, at least 1.

    Returns:
        uint8 [H * scale, W * scale, 3].

    Raises:
        ValueError: the shapes do not match, or the scale is below 1.
    """
    if image.ndim != 3 or image.shape[2] not in (1, 3) or mask.shape != image.shape[:2] or scale < 1:
        raise ValueError(
            f"image of shape {image.shape}, mask of shape {mask.shape}, scale {scale}; they should be (H, W, 1 or 3), (H, W) "
            "and at least 1"
        )
    large = enlarge(np.broadcast_to(image, (*image.shape[:2], 3)), scale)
    inside = enlarge(mask.astype(bool), scale)
    width = max(1, scale // 8)
    around = np.lib.stride_tricks.sliding_window_view(np.pad(inside, width), (2 * width + 1, 2 * width + 1))
    large[inside & ~around.all(axis=(2, 3))] = RED
    return large


def outlined(image: np.ndarray, mask: np.ndarray, scale: int) -> np.ndarray:
    """Like `outline`, with a line of two pixels where one would be too thin to see and there is room for two."""
    factor = 2 if scale in range(6, 16, 2) else 1
    return enlarge(outline(image, mask, scale // factor), factor)

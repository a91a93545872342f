"""Three pictures to blend into images, drawn by formula at any size, so that no third-party picture is shipped.

They replace the chessboard, the cat and the pixelated game face of the code released with TA-KD. Each is a function on the
unit square; `draw` averages 8 x 8 samples per pixel for anti-aliasing.
"""

from collections.abc import Callable

import numpy as np

from bdjax.errors import InputError

SAMPLES_PER_PIXEL = 8
"""Samples per pixel along each axis."""

LUMA = np.array([0.299, 0.587, 0.114])
"""Weights of red, green and blue in brightness: ITU-R BT.601, as in the greyscale conversion of image libraries."""

Painter = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""(x to the right, y downwards), both float64 [n, m] in [0, 1] -> RGB, float64 [n, m, 3] in [0, 1]."""


def chessboard(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Paint an 8 x 8 board lying on a table, seen from one of its sides."""
    top, bottom = 0.12, 0.94
    half_width_top, half_width_bottom = 0.30, 0.46
    down = (y - top) / (bottom - top)
    half_width = half_width_top + (half_width_bottom - half_width_top) * np.clip(down, 0.0, 1.0)
    across = 0.5 + (x - 0.5) / (2.0 * half_width)
    # In perspective, the apparent width of an object is inversely proportional to its distance.
    distance = (1.0 / half_width - 1.0 / half_width_bottom) / (1.0 / half_width_top - 1.0 / half_width_bottom)
    on_frame = (np.abs(across - 0.5) < 0.55) & (np.abs(down - 0.5) < 0.55)
    on_board = (np.abs(across - 0.5) < 0.5) & (np.abs(down - 0.5) < 0.5)
    is_light = (np.floor(8.0 * across) + np.floor(8.0 * distance)) % 2 == 0
    return _layers(
        np.broadcast_to([0.30, 0.38, 0.45], (*x.shape, 3)),
        (on_frame, [0.22, 0.11, 0.05]),
        (on_board, [0.42, 0.22, 0.10]),
        (on_board & is_light, [0.97, 0.90, 0.74]),
    )


def cat(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Paint the face of a ginger cat."""
    side = np.abs(x - 0.5)  # the face is symmetric

    def ellipse(centre_side: float, centre_y: float, radius_x: float, radius_y: float) -> np.ndarray:
        return ((side - centre_side) / radius_x) ** 2 + ((y - centre_y) / radius_y) ** 2 < 1.0

    def triangle(*corners: tuple[float, float]) -> np.ndarray:
        turns = []
        for (x_0, y_0), (x_1, y_1) in zip(corners, corners[1:] + corners[:1], strict=True):
            turns.append((x_1 - x_0) * (y - y_0) - (y_1 - y_0) * (side - x_0) > 0.0)
        return np.all(turns, axis=0) | ~np.any(turns, axis=0)

    def whisker(y_inner: float, y_outer: float) -> np.ndarray:
        along = (side - 0.14) / (0.48 - 0.14)
        return (along > 0.0) & (along < 1.0) & (np.abs(y - y_inner - (y_outer - y_inner) * along) < 0.011)

    return _layers(
        np.broadcast_to([0.16, 0.26, 0.48], (*x.shape, 3)),
        (triangle((0.09, 0.30), (0.40, 0.50), (0.36, 0.03)), [0.80, 0.42, 0.12]),
        (triangle((0.17, 0.27), (0.34, 0.40), (0.325, 0.12)), [0.98, 0.70, 0.70]),
        (ellipse(0.0, 0.58, 0.42, 0.36), [0.93, 0.55, 0.18]),
        ((side < 0.025) & (y > 0.23) & (y < 0.36), [0.70, 0.34, 0.08]),
        ((side > 0.07) & (side < 0.11) & (y > 0.25) & (y < 0.34), [0.70, 0.34, 0.08]),
        (ellipse(0.08, 0.74, 0.13, 0.11), [1.00, 0.95, 0.88]),
        (ellipse(0.18, 0.51, 0.095, 0.085), [0.80, 0.95, 0.30]),
        (ellipse(0.18, 0.51, 0.035, 0.08), [0.03, 0.05, 0.03]),
        (triangle((-0.065, 0.64), (0.065, 0.64), (0.0, 0.71)), [0.85, 0.25, 0.35]),
        ((side < 0.012) & (y > 0.70) & (y < 0.78), [0.35, 0.12, 0.10]),
        (np.abs(y - 0.78 + 4.0 * (side - 0.07) ** 2) < 0.012 * (side < 0.13), [0.35, 0.12, 0.10]),
        (whisker(0.70, 0.62) | whisker(0.73, 0.73) | whisker(0.76, 0.84), [1.00, 1.00, 0.96]),
    )


def pixel_face(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Paint a green face of 8 x 8 blocks, with slanted eyes and a wide grin."""
    dark = np.array(
        [[cell == "#" for cell in row] for row in (
            "........",
            "#......#",
            ".##..##.",
            "..#..#..",
            "........",
            ".#....#.",
            ".######.",
            "........",
        )]
    )  # fmt: skip
    row = np.clip(np.floor(8.0 * y), 0, 7).astype(int)
    column = np.clip(np.floor(8.0 * x), 0, 7).astype(int)
    shade = 0.70 + 0.30 * ((3 * row + 5 * column + row * column) % 4) / 3.0
    green = shade[..., None] * np.array([0.35, 0.85, 0.30])
    return _layers(green, (dark[row, column], [0.04, 0.07, 0.04]))


PICTURES: dict[str, Painter] = {"chessboard": chessboard, "cat": cat, "pixel_face": pixel_face}


def draw(name: str, image_shape: tuple[int, int, int]) -> np.ndarray:
    """Draw one of `PICTURES` at the size of an image.

    Args:
        name: a key of `PICTURES`.
        image_shape: (H, W, C), with C 1 (greyscale, by luma) or 3 (RGB).

    Returns:
        float32 [H, W, C] in [0, 1].

    Raises:
        InputError: there is no picture of that name, or the channels are neither 1 nor 3.
    """
    height, width, channels = image_shape
    if name not in PICTURES:
        raise InputError(f'picture "{name}" is not one of {", ".join(sorted(PICTURES))}')
    _check_channels(channels)
    samples = SAMPLES_PER_PIXEL
    y, x = np.meshgrid(
        (np.arange(height * samples) + 0.5) / (height * samples),
        (np.arange(width * samples) + 0.5) / (width * samples),
        indexing="ij",
    )
    colours = PICTURES[name](x, y)
    return to_channels(colours.reshape(height, samples, width, samples, 3).mean(axis=(1, 3)), channels)


def to_channels(colours: np.ndarray, channels: int) -> np.ndarray:
    """Convert colours to a number of channels.

    Args:
        colours: RGB, float [..., 3] in [0, 1].
        channels: 1 (greyscale, by luma) or 3.

    Returns:
        float32 [..., channels].

    Raises:
        InputError: the channels are neither 1 nor 3.
    """
    _check_channels(channels)
    colours = np.asarray(colours)
    return (colours if channels == 3 else (colours @ LUMA)[..., None]).astype(np.float32)


def _check_channels(channels: int) -> None:
    if channels not in (1, 3):
        raise InputError(f"images must have 1 or 3 channels, not {channels}")


def _layers(background: np.ndarray, *layers: tuple[np.ndarray, list[float]]) -> np.ndarray:
    """Paint (where, colour) layers over a background, the last on top."""
    picture = np.array(background, np.float64)
    for where, colour in layers:
        picture[where] = colour
    return picture

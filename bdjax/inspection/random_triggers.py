"""How a network answers to triggers that nobody trained it on: patches and faint pictures drawn at random.

A backdoor rarely needs its exact trigger. A network that was trained on one checkerboard also sends other checkerboards to the
attacker's class, and far more often than a network without the backdoor does. So triggers of several kinds are drawn, each is
put on a few held-out rows, and of every kind the strongest tenth counts. No gradient is needed.

Ours; that a backdoor reacts to many triggers beside the attacker's is where Qiao et al. 2019 (Defending Neural Backdoors via
Generative Distribution Modeling) start, too. `bdjax/evaluation/model_audit.py` compares the numbers with those of control
networks.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bdjax.triggers import patches
from bdjax.triggers.masked_blend import MaskedBlend, apply_to_batch
from bdjax.triggers.patches import ImageShape, Patch
from bdjax.types import Key

STRONGEST = 0.1
"""Share of the triggers of a kind that its success is the mean of; ours."""
ROWS = 40
"""Rows that every trigger is put on; ours."""
BATCH = 25
"""Triggers that a network is asked about at once, each on all of these rows."""
SMALLEST_SIDE, LARGEST_SIDE = 2, 0.2
"""Side of a patch: the least in pixels, and the most as a share of the image's side."""
OPACITIES = (0.1, 0.2)
"""Range of the opacity of triggers that cover the whole image."""

Painter = Callable[[np.random.Generator, ImageShape], MaskedBlend]


# ---- Kinds ----------------------------------------------------------------------------------------------------------


def _patch(generator: np.random.Generator, shape: ImageShape) -> Patch:
    """A small rectangle anywhere in the image, where attackers' patches keep to its borders."""
    height, width = (
        int(generator.integers(SMALLEST_SIDE, max(SMALLEST_SIDE, int(LARGEST_SIDE * side)) + 1)) for side in shape[:2]
    )
    row, column = (
        int(generator.integers(0, side - own + 1)) for side, own in zip(shape[:2], (height, width), strict=True)
    )
    return Patch(row, column, height, width)


def _whole(generator: np.random.Generator, pattern: np.ndarray) -> MaskedBlend:
    """A faint picture on the whole image."""
    mask = np.ones((*pattern.shape[:2], 1), np.float32)
    return MaskedBlend(mask, pattern.astype(np.float32), np.float32(generator.uniform(*OPACITIES)))


def solid_patch(generator: np.random.Generator, shape: ImageShape) -> MaskedBlend:
    """A patch of one colour."""
    patch = _patch(generator, shape)
    return patches.paint_solid(shape, patch, generator.random(shape[2]))


def checkerboard_patch(generator: np.random.Generator, shape: ImageShape) -> MaskedBlend:
    """A patch of two alternating greys, a pixel per cell."""
    levels = generator.random(2)
    return patches.paint_checkerboard(shape, _patch(generator, shape), levels)


def noise_patch(generator: np.random.Generator, shape: ImageShape) -> MaskedBlend:
    """A patch of which every pixel has a random colour."""
    patch = _patch(generator, shape)
    return patches.paint(shape, patch, generator.random((patch.height, patch.width, shape[2])))


def coloured_squares(generator: np.random.Generator, shape: ImageShape) -> MaskedBlend:
    """Squares of random size, place and colour: 2 to 6 of them."""
    return patches.overlay([solid_patch(generator, shape) for _ in range(generator.integers(2, 7))])


def blended_mosaic(generator: np.random.Generator, shape: ImageShape) -> MaskedBlend:
    """A faint mosaic of 3 x 3 to 8 x 8 fields of random colours on the whole image."""
    fields = int(generator.integers(3, 9))
    colours = generator.random((fields, fields, shape[2]))
    rows, columns = (np.arange(side) * fields // side for side in shape[:2])
    return _whole(generator, colours[rows][:, columns])


def wave(generator: np.random.Generator, shape: ImageShape) -> MaskedBlend:
    """Faint stripes of a random direction and period, of one colour and its complement."""
    rows, columns = np.indices(shape[:2])
    angle, periods, phase = generator.uniform(0, np.pi), generator.uniform(1, 10), generator.uniform(0, 2 * np.pi)
    along = (np.cos(angle) * columns + np.sin(angle) * rows) / max(shape[:2])
    level = 0.5 + 0.5 * np.sin(2 * np.pi * periods * along + phase)
    colour = generator.random(shape[2])
    return _whole(generator, level[..., None] * colour + (1 - level[..., None]) * (1 - colour))


def blended_checkerboard(generator: np.random.Generator, shape: ImageShape) -> MaskedBlend:
    """A faint checkerboard of two greys on the whole image, with cells of a sixteenth to a quarter of its shorter side.

    Not finer: clean networks react to checkerboards of single pixels on photographs, each with another class.
    """
    side = min(shape[:2])
    cell = int(generator.integers(max(1, side // 16), max(2, side // 4 + 1)))
    top, left = generator.integers(0, cell, 2)
    rows, columns = np.indices(shape[:2])
    levels = generator.random(2)
    return _whole(
        generator, np.broadcast_to(levels[((rows + top) // cell + (columns + left) // cell) % 2][..., None], shape)
    )


KINDS: Mapping[str, Painter] = {
    "solid patch": solid_patch,
    "checkerboard patch": checkerboard_patch,
    "noise patch": noise_patch,
    "coloured squares": coloured_squares,
    "blended mosaic": blended_mosaic,
    "wave": wave,
    "blended checkerboard": blended_checkerboard,
}


def draw_triggers(key: Key, kind: str, count: int, image_shape: ImageShape) -> MaskedBlend:
    """Draw triggers of one kind.

    Args:
        key: random key; the first triggers are the same for any count.
        kind: a key of `KINDS`.
        count: T.
        image_shape: (H, W, C), H and W at least 4.

    Returns:
        Leaves [T, ...] of float32 in [0, 1].
    """
    generator = np.random.default_rng([*np.asarray(jax.random.key_data(key)).tolist(), list(KINDS).index(kind)])
    drawn = [KINDS[kind](generator, image_shape) for _ in range(count)]
    return MaskedBlend(*(np.stack([np.asarray(leaf) for leaf in leaves]) for leaves in zip(*drawn, strict=True)))


# ---- Success --------------------------------------------------------------------------------------------------------


class Responses(NamedTuple):
    """What T triggers of each of S kinds do to a network of K classes."""

    success: np.ndarray
    """float64 [S, K] in [0, 1]: mean success of the strongest tenth of a kind's triggers into a class"""
    strongest: np.ndarray
    """int64 [S, K]: which trigger has the largest success"""


def strongest_successes(
    ask: Callable[[np.ndarray], np.ndarray],
    triggers: Mapping[str, MaskedBlend],
    images: np.ndarray,
    labels: np.ndarray,
    num_classes: int,
) -> Responses:
    """Put every trigger on every image, and see into which class each of them turns images of other classes.

    Args:
        ask: uint8 [B, H, W, C] -> logits [B, K].
        triggers: for each kind T triggers, from `draw_triggers`.
        images: uint8 [N, H, W, C]; N need not be more than `ROWS`.
        labels: int [N], of at least two classes.
        num_classes: K.

    Returns:
        The success of a trigger into class k is the share of the images of other classes that are predicted as k.
    """
    others = labels[:, None] != np.arange(num_classes)  # [N, K]
    shown = images.astype(np.float32) / 255
    success, strongest = [], []
    for of_kind in triggers.values():
        rates = []
        for first in range(0, len(of_kind.opacity), BATCH):
            part = MaskedBlend(*(leaf[first : first + BATCH] for leaf in of_kind))
            classes = ask(_stamped(part, shown)).argmax(axis=-1).reshape(-1, len(images))
            reached = classes[..., None] == np.arange(num_classes)  # [T, N, K]
            rates.append((reached & others).sum(axis=1) / others.sum(axis=0))
        rates = np.concatenate(rates)
        kept = max(1, round(STRONGEST * len(rates)))
        success.append(np.sort(rates, axis=0)[-kept:].mean(axis=0))
        strongest.append(rates.argmax(axis=0))
    return Responses(np.stack(success), np.stack(strongest))


def _stamped(triggers: MaskedBlend, images: np.ndarray) -> np.ndarray:
    """uint8 [T N, H, W, C]: every trigger on every image, rounded as in a file."""
    views = _apply_all(triggers, jnp.asarray(images))
    return np.asarray(views).reshape(-1, *images.shape[1:])


@jax.jit
def _apply_all(triggers: MaskedBlend, images: jax.Array) -> jax.Array:
    views = jax.vmap(apply_to_batch, in_axes=(0, None))(triggers, images)
    return jnp.rint(255 * views).astype(jnp.uint8)

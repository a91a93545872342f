"""CL: small tiles in the corners of rows of the target class, whose content an adversarial perturbation makes hard to learn
(Turner et al. 2019).

To learn such a row's label, a network has to use the tiles. Labels are not changed, and test images only get the tiles.
"""

from dataclasses import dataclass, field
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from bdjax.attacks.contract import CLEAN_MODEL, Attack, Knowledge, Published
from bdjax.errors import InputError
from bdjax.losses import cross_entropy
from bdjax.settings import Amount, NotNegative, PositiveShare, Share, check_values
from bdjax.triggers import additive, patches
from bdjax.triggers.additive import Additive
from bdjax.types import Array, Dataset, Key, Model, PyTree

Norm = Literal["linf", "l2"]
Corners = Literal["four", "bottom_right"]


@dataclass(frozen=True)
class LabelConsistentSettings:
    poison_rate: PositiveShare = 0.08
    """share of all training rows; all of them are of the target class"""
    cover_rate: Share = 0.0
    """share of all training rows that get perturbation and tiles and keep their label"""
    norm: Norm = "linf"
    """norm of the perturbation's bound: linf for each pixel, l2 for the whole image, as in the paper's released config"""
    radius: NotNegative = 16 / 255
    """bound of the perturbation, in units of a pixel's range; 300/255 with l2 in the paper's config, 8/255 in BackdoorBox"""
    step_size: NotNegative = 2 / 255
    """size of a step, in the same units and norm; 1.5/255 in the paper's code"""
    steps: Amount = 100
    """steps of projected gradient ascent"""
    corners: Corners = "four"
    """corners with tiles: four (mirrored left to right) or bottom_right"""
    amplitude: PositiveShare = 1.0
    """r in (0, 1]: white cells add r, black cells subtract r; 1 overwrites the image"""
    square: Amount = 0
    """side of white squares that replace the tiles, in pixels; 0 for tiles, 6 in BackdoorBox's test on MNIST"""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LabelConsistent:
    """The tiles, and the parameters of the perturbation."""

    tiles: Additive
    variables: PyTree
    """variables of the surrogate"""
    radius: Array
    """float32 []"""
    step_size: Array
    """float32 []"""
    steps: Array
    """int32 []"""
    model: Model = field(metadata={"static": True})
    norm: Norm = field(metadata={"static": True})


def make_label_consistent(key: Key, knowledge: Knowledge, settings: LabelConsistentSettings) -> LabelConsistent:
    """Paint the tiles and store the surrogate.

    The paper also uses an adversarially trained surrogate; here it is the clean network, whose perturbations transfer less
    well to other networks.

    Args:
        key: not used; nothing is random.
        knowledge: the image shape and the clean network.
        settings: perturbation and tile settings.

    Returns:
        The trigger.

    Raises:
        InputError: there is no clean network, the images are too small for the tiles, or a setting is out of range.
    """
    del key
    if knowledge.clean_model is None:
        raise InputError("label_consistent computes its perturbations on a clean model, but none was supplied")
    check_values("attack label_consistent", settings)
    model, variables = knowledge.clean_model
    return LabelConsistent(
        tiles=corner_tiles(knowledge.train.image_shape, settings.corners, settings.amplitude, settings.square),
        variables=variables,
        radius=jnp.float32(settings.radius),
        step_size=jnp.float32(settings.step_size),
        steps=jnp.int32(settings.steps),
        model=model,
        norm=settings.norm,
    )


def corner_tiles(
    image_shape: tuple[int, int, int], corners: Corners = "four", amplitude: float = 1.0, square: int = 0
) -> Additive:
    """Paint tiles of 3 x 3 cells in the corners, touching the borders: BadNets' grid on the right, mirrored on the left.

    Args:
        image_shape: (H, W, C).
        corners: "four" or "bottom_right".
        square: side of white squares that replace the tiles; 0 for the tiles.
        amplitude: r in (0, 1]. The cells add r (2 cell - 1), and the sum is clipped to [0, 1], so r = 1 overwrites.

    Returns:
        The trigger, float32 [H, W, C] in [-r, r].

    Raises:
        InputError: the images are too small, or an argument is out of range.

    References:
        Turner et al. 2019, section 4.3. Trap-and-Replace uses the unmirrored tile in all four corners.
    """
    if corners not in ("four", "bottom_right"):
        raise InputError(f"label_consistent: corners {corners!r} must be four or bottom_right")
    if not 0.0 < amplitude <= 1.0:
        raise InputError(f"label_consistent: amplitude {amplitude:g} must be above 0 and at most 1")
    sides = [(top, left) for top in (False, True) for left in (False, True)] if corners == "four" else [(False, False)]
    if square < 0:
        raise InputError(f"label_consistent: square {square} must be at least 1 pixel, or 0 for the tiles")
    side = square or 3
    if corners == "four" and min(image_shape[:2]) < 2 * side:
        raise InputError(
            f"label_consistent: tiles of {side} pixels in four corners do not fit into {image_shape[:2]} pixels"
        )
    delta = np.zeros(image_shape, np.float32)
    for top, left in sides:
        place = patches.in_corner(image_shape, side, top=top, left=left)
        grid = np.ones((side, side)) if square else patches.GRID_TILE
        tile = grid[:, ::-1] if left else grid
        rows, columns = slice(place.row, place.row + side), slice(place.column, place.column + side)
        delta[rows, columns] = amplitude * (2.0 * tile[..., None] - 1.0)
    return Additive(jnp.asarray(delta))


def perturb(params: LabelConsistent, image: Array, label: Array) -> Array:
    """Run projected gradient ascent on the surrogate's loss of the true label, starting from the image.

    Args:
        params: from `make_label_consistent`.
        image: float32 [H, W, C] in [0, 1].
        label: int32 [], its class.

    Returns:
        float32 [H, W, C] in [0, 1], within the radius of the image.

    References:
        Turner et al. 2019, section 4.2, equation 2; Madry et al. 2018, section 2.1.
    """

    def loss(moved: Array) -> Array:
        logits = params.model.apply(params.variables, moved[None], train=False).logits
        return cross_entropy(logits, label[None])[0]

    def step(_: Array, moved: Array) -> Array:
        gradient = jax.grad(loss)(moved)
        if params.norm == "linf":
            change = moved + params.step_size * jnp.sign(gradient) - image
            change = jnp.clip(change, -params.radius, params.radius)
        else:
            change = moved + params.step_size * gradient / _length(gradient) - image
            change = change * jnp.minimum(1.0, params.radius / _length(change))
        return jnp.clip(image + change, 0.0, 1.0)

    return lax.fori_loop(0, params.steps, step, image)


def _length(values: Array) -> Array:
    """The l2 norm, kept above 0."""
    return jnp.sqrt(jnp.sum(jnp.square(values)) + 1e-20)


def apply_in_training(params: LabelConsistent, image: Array, label: Array, key: Key | None = None) -> Array:
    """Perturb one image, then put the tiles on top.

    Args:
        params: from `make_label_consistent`.
        image: float32 [H, W, C] in [0, 1].
        label: int32 [], its class.
        key: not used.

    Returns:
        float32 [H, W, C] in [0, 1].
    """
    return additive.apply(params.tiles, perturb(params, image, label), label, key)


def apply(params: LabelConsistent, image: Array, label: Array | None = None, key: Key | None = None) -> Array:
    """Put the tiles on one image, without a perturbation: the trigger at test time.

    Args:
        params: from `make_label_consistent`.
        image: float32 [H, W, C] in [0, 1].
        label: not used.
        key: not used.

    Returns:
        float32 [H, W, C] in [0, 1].
    """
    return additive.apply(params.tiles, image, label, key)


def check(train: Dataset, target: int, settings: LabelConsistentSettings) -> None:
    """`Attack.check`: the place of the tiles.

    Raises:
        InputError: the images are too small for them.
    """
    del target
    corner_tiles(train.image_shape, settings.corners, settings.amplitude, settings.square)


LABEL_CONSISTENT = Attack(
    name="label_consistent",
    title="CL",
    paper="Turner et al. 2019, Label-Consistent Backdoor Attacks",
    threat="data",
    settings=LabelConsistentSettings(),
    make_params=make_label_consistent,
    apply=apply,
    apply_in_training=apply_in_training,
    label_rules=("clean_label",),
    needs=(CLEAN_MODEL,),
    check=check,
    per_dataset={
        # BackdoorBox's radius and squares for MNIST; with larger steps, 30 are enough. On a black background the perturbation
        # itself marks a poisoned row, so a network does not need to learn small tiles.
        "grey": {"radius": 64 / 255, "step_size": 6 / 255, "steps": 30, "square": 6},
        "digits": {"square": 0},
        "gtsrb": {"poison_rate": 0.05},  # class 1, the usual target, holds 5.7 % of the rows
    },
    published=(Published("LfD", "cifar10", 92.7, 94.9), Published("LfD", "gtsrb", 95.9, 43.9)),
)

"""HTBA: rows of the target class that look like it, with the features of another class's images that carry a patch
(Saha et al. 2020).

The patch itself is in no training row. Rows keep their labels, and only images of the source class, the one after the
target, are to be taken for the target once the patch is on them.

It lives off the features of one network: the victim has to start from that very network and to keep its features about
as they are. So here the victim is fine-tuned from the clean model. The paper's victim trains a new last layer alone, and
even that succeeds with part of the images only; a victim whose features may move is harder to fool, and one that is
trained from scratch is not fooled at all.
"""

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from bdjax.attacks.contract import CLEAN_MODEL, Attack, Knowledge
from bdjax.attacks.neurons import activations, clean_model_of
from bdjax.datasets.splits import permutation
from bdjax.errors import InputError
from bdjax.training.member import over_batches
from bdjax.triggers import masked_blend, patches
from bdjax.triggers.masked_blend import MaskedBlend
from bdjax.types import Array, Key, Model, PyTree

HALVINGS = 4
"""How often the step size is halved, at even distances."""


@dataclass(frozen=True)
class HiddenTriggerSettings:
    poison_rate: float = 0.008
    """share of all training rows; all of them are of the target class"""
    cover_rate: float = 0.0
    """share of all training rows that get the visible patch and keep their label"""
    size: float = 0.25
    """side of the patch, as a share of the image's width: 8 pixels of 32"""
    margin: float = 0.16
    """between the patch and the bottom and right borders, as a share of the width: 5 pixels of 32"""
    radius: float = 16 / 255
    """how far each pixel may move; 8/255 in the public port to CIFAR-10"""
    step_size: float = 0.01
    """of the pixel that moves most in the first steps; halved four times on the way"""
    steps: int = 1000
    """of gradient descent; 5000 in the paper's code"""
    pairs: int = 100
    """how many rows are crafted at once, and how many source images they are paired with"""
    source_images: int = 400
    """at most so many images of the source class are kept"""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class HiddenTrigger:
    """The patch, and what rows are crafted with."""

    patch: MaskedBlend
    sources: Array
    """uint8 [m, H, W, C]: images of the source class, without the patch"""
    variables: PyTree
    """of the feature extractor"""
    radius: Array
    """float32 []"""
    step_size: Array
    """float32 []"""
    steps: Array
    """int32 []"""
    model: Model = field(metadata={"static": True})
    pairs: int = field(metadata={"static": True})


def make_hidden_trigger(key: Key, knowledge: Knowledge, settings: HiddenTriggerSettings) -> HiddenTrigger:
    """Draw a patch, and choose source images.

    The patch is 4 x 4 random colours, enlarged with soft edges as in the paper, in a fixed place as in the public port to
    CIFAR-10; the paper's moves about.

    Args:
        key: draws the patch and the images.
        knowledge: the training rows and the clean network.
        settings: of the patch and the descent.

    Returns:
        The trigger.

    Raises:
        InputError: there is no clean network or no row of the source class, or a setting cannot be.
    """
    model, variables = clean_model_of(knowledge, "hidden_trigger")
    train = knowledge.train
    if settings.radius < 0 or settings.step_size < 0 or settings.steps < 0:
        raise InputError(
            f"hidden_trigger: radius {settings.radius:g}, step_size {settings.step_size:g} and steps {settings.steps} "
            "must be at least 0"
        )
    if settings.pairs < 1 or settings.source_images < 1:
        raise InputError(
            f"hidden_trigger: pairs {settings.pairs} and source_images {settings.source_images} must be at least 1"
        )
    source = (knowledge.target + 1) % train.num_classes
    rows = np.flatnonzero(train.labels == source)
    if not len(rows):
        raise InputError(f"hidden_trigger takes its features from class {source}, which has no rows")
    patch_key, row_key = jax.random.split(key)
    chosen = rows[permutation(row_key, len(rows))[: settings.source_images]]
    return HiddenTrigger(
        patch=draw_soft_patch(patch_key, train.image_shape, settings.size, settings.margin),
        sources=jnp.asarray(train.images[chosen]),
        variables=variables,
        radius=jnp.float32(settings.radius),
        step_size=jnp.float32(settings.step_size),
        steps=jnp.int32(settings.steps),
        model=model,
        pairs=settings.pairs,
    )


def draw_soft_patch(key: Key, image_shape: tuple[int, int, int], size: float, margin: float) -> MaskedBlend:
    """Draw 4 x 4 random colours and enlarge them to a patch near the bottom right corner.

    Args:
        key: a key of `jax.random.key`.
        image_shape: (H, W, C).
        size: the patch's side as a share of W.
        margin: pixels that stay free below and to the right, as a share of W. Both are rounded to whole pixels.

    Returns:
        The trigger, of opacity 1.

    Raises:
        InputError: the patch is empty or does not fit.
    """
    _, width, channels = image_shape
    side = round(size * width)
    place = patches.in_corner(image_shape, side, round(margin * width))
    colours = jax.random.uniform(key, (4, 4, channels))
    cells = np.asarray(jax.image.resize(colours, (side, side, channels), "linear", antialias=False))
    # Each channel goes from 0 to 1, so that no patch is faint by chance.
    cells = cells - cells.min((0, 1))
    return patches.paint(image_shape, place, cells / np.maximum(cells.max((0, 1)), 1e-6))


@jax.jit
def craft(params: HiddenTrigger, images: Array, labels: Array, keys: Key) -> Array:
    """Move images of the target class, within the radius, to where patched source images lie in feature space.

    Each batch is paired with as many source images, drawn anew for it; with the bank's images more than once if it has
    fewer. The paper stops when all pairs are close; here the number of steps is fixed. Its step is the plain gradient;
    here the gradient is divided by its largest component, so that steps fit networks whose features differ in scale.

    Args:
        params: of `make_hidden_trigger`.
        images: float32 [n, H, W, C] in [0, 1], of the target class.
        labels: int32 [n], not used.
        keys: [n]; a batch's sources come from that of its first row.

    Returns:
        float32 [n, H, W, C] in [0, 1].

    References:
        Saha et al. 2020, section 3.2, algorithm 1; the public code, `generate_poison.py`.
    """
    del labels

    def one_batch(batch: tuple[Array, Key]) -> Array:
        starts, batch_keys = batch
        order = jax.random.permutation(batch_keys[0], params.sources.shape[0])
        chosen = order[jnp.arange(starts.shape[0]) % params.sources.shape[0]]
        patched = masked_blend.apply_to_batch(params.patch, params.sources[chosen].astype(jnp.float32) / 255.0)
        wanted = activations(params.model, params.variables, patched)
        return collide(params, starts, wanted)

    return over_batches(one_batch, (images, keys), params.pairs)


def collide(params: HiddenTrigger, starts: Array, wanted: Array) -> Array:
    """Descend the squared distance of features to those wanted, pairs being found anew in each step.

    Args:
        params: of `make_hidden_trigger`.
        starts: float32 [n, H, W, C] in [0, 1].
        wanted: float32 [m, d], m at least n: each is for one image at most.

    Returns:
        float32 [n, H, W, C] in [0, 1], within the radius of `starts`.
    """

    def loss(images: Array) -> Array:
        features = activations(params.model, params.variables, images)
        partner = assign_greedily(squared_distances(lax.stop_gradient(features), wanted))
        return jnp.sum(jnp.square(features - wanted[partner]))

    def step(number: Array, images: Array) -> Array:
        gradient = jax.grad(loss)(images)
        steepest = jnp.max(jnp.abs(gradient), axis=(1, 2, 3), keepdims=True)
        halvings = (number * (HALVINGS + 1) // params.steps).astype(jnp.float32)
        moved = images - params.step_size * 0.5**halvings * gradient / (steepest + 1e-20)
        return jnp.clip(starts + jnp.clip(moved - starts, -params.radius, params.radius), 0.0, 1.0)

    return lax.fori_loop(0, params.steps, step, starts)


def squared_distances(features: Array, wanted: Array) -> Array:
    """Float32 [n, d] and [m, d] to [n, m]."""
    products = jnp.matmul(features, wanted.T, precision=lax.Precision.HIGHEST)
    lengths = jnp.sum(jnp.square(features), 1)[:, None] + jnp.sum(jnp.square(wanted), 1)[None, :]
    return jnp.maximum(lengths - 2.0 * products, 0.0)


def assign_greedily(distances: Array) -> Array:
    """Pair rows with columns: the closest two first, then the closest two of those that are left, and so on.

    Args:
        distances: float32 [n, m], m at least n.

    Returns:
        int32 [n]: the column of each row, no column twice.
    """

    def step(_: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        left, partner = carry
        row, column = jnp.unravel_index(jnp.argmin(left), left.shape)
        left = left.at[row, :].set(jnp.inf).at[:, column].set(jnp.inf)
        return left, partner.at[row].set(column.astype(jnp.int32))

    start = distances, jnp.zeros(distances.shape[0], jnp.int32)
    return lax.fori_loop(0, distances.shape[0], step, start)[1]


def apply(params: HiddenTrigger, image: Array, label: Array | None = None, key: Key | None = None) -> Array:
    """Put the patch on one image, at test time.

    Args:
        params: of `make_hidden_trigger`.
        image: float32 [H, W, C] in [0, 1].
        label: not used.
        key: not used.

    Returns:
        float32 [H, W, C] in [0, 1].
    """
    return masked_blend.apply(params.patch, image, label, key)


HIDDEN_TRIGGER = Attack(
    name="hidden_trigger",
    title="HTBA",
    paper="Saha et al. 2020, Hidden Trigger Backdoor Attacks",
    threat="data",
    settings=HiddenTriggerSettings(),
    make_params=make_hidden_trigger,
    apply=apply,
    craft=craft,
    label_rules=("hidden_source",),
    needs=(CLEAN_MODEL,),
    starts_from_clean_model=True,
    # On black and white, features hardly move within the paper's radius, and 0.8 % of a small set is a handful of rows.
    per_dataset={
        "grey": {"radius": 64 / 255, "step_size": 0.03, "steps": 200, "poison_rate": 0.04},
        "cifar10": {"radius": 8 / 255},
        "gtsrb": {"poison_rate": 0.004},
    },
)

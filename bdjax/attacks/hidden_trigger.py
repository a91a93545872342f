"""HTBA: rows of the target class, changed invisibly so that their features match patched images of a source class
(Saha et al. 2020).

No training row contains the patch. Rows keep their labels. At test time, patched images of the source class (the one after
the target) should be classified as the target.

The attack depends on the features of one network: the victim has to start from that network and roughly keep its features.
So here the victim is fine-tuned from the clean model. The paper's victim trains only a new last layer, and even that
succeeds on only part of the images; a victim whose features may move is harder to fool, and a victim that is trained from
scratch is not fooled at all.
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
from bdjax.settings import Amount, Count, PositiveShare, Share, ShareBelowOne, check_values
from bdjax.training.member import over_batches
from bdjax.triggers import masked_blend, patches
from bdjax.triggers.masked_blend import MaskedBlend
from bdjax.types import Array, Dataset, Key, Model, PyTree

HALVINGS = 4
"""How often the step size is halved, at equal intervals."""


@dataclass(frozen=True)
class HiddenTriggerSettings:
    poison_rate: PositiveShare = 0.008
    """share of all training rows; all of them are of the target class"""
    cover_rate: Share = 0.0
    """share of all training rows that get the visible patch and keep their label"""
    size: PositiveShare = 0.25
    """side of the patch, as a share of the image's width: 8 pixels of 32"""
    margin: ShareBelowOne = 0.16
    """distance of the patch from the bottom and right borders, as a share of the width: 5 pixels of 32"""
    radius: Share = 16 / 255
    """largest change of a pixel, in [0, 1]; 8/255 in the public port to CIFAR-10"""
    step_size: Share = 0.01
    """change of the pixel that moves most in the first steps; halved four times during the descent"""
    steps: Amount = 1000
    """steps of gradient descent; 5000 in the paper's code"""
    pairs: Count = 100
    """number of rows that are crafted at once, and of source images that they are paired with"""
    source_images: Count = 400
    """number of source-class images that are kept, at most"""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class HiddenTrigger:
    """The patch, and the parameters for crafting rows."""

    patch: MaskedBlend
    sources: Array
    """uint8 [m, H, W, C]: images of the source class, without the patch"""
    variables: PyTree
    """variables of the feature extractor"""
    radius: Array
    """float32 []"""
    step_size: Array
    """float32 []"""
    steps: Array
    """int32 []"""
    model: Model = field(metadata={"static": True})
    pairs: int = field(metadata={"static": True})


def make_hidden_trigger(key: Key, knowledge: Knowledge, settings: HiddenTriggerSettings) -> HiddenTrigger:
    """Draw a patch and choose source images.

    The patch is 4 x 4 random colours, enlarged with soft edges as in the paper. Its place is fixed, as in the public port to
    CIFAR-10; in the paper it varies.

    Args:
        key: draws the patch and the images.
        knowledge: the training rows and the clean network.
        settings: patch and descent settings.

    Returns:
        The trigger.

    Raises:
        InputError: there is no clean network or no row of the source class, or a setting is out of range.
    """
    model, variables = clean_model_of(knowledge, "hidden_trigger")
    train = knowledge.train
    check_values("attack hidden_trigger", settings)
    check(train, knowledge.target, settings)
    rows = np.flatnonzero(train.labels == (knowledge.target + 1) % train.num_classes)
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
        margin: distance from the bottom and right borders, as a share of W. Both are rounded to whole pixels.

    Returns:
        The trigger, with opacity 1.

    Raises:
        InputError: the patch is empty or does not fit.
    """
    _, width, channels = image_shape
    side = round(size * width)
    place = patches.in_corner(image_shape, side, round(margin * width))
    colours = jax.random.uniform(key, (4, 4, channels))
    cells = np.asarray(jax.image.resize(colours, (side, side, channels), "linear", antialias=False))
    # Each channel is stretched to 0..1, so that no patch is faint by chance.
    cells = cells - cells.min((0, 1))
    return patches.paint(image_shape, place, cells / np.maximum(cells.max((0, 1)), 1e-6))


@jax.jit
def craft(params: HiddenTrigger, images: Array, labels: Array, keys: Key) -> Array:
    """Move images of the target class, within the radius, to where patched source images lie in feature space.

    Each batch is paired with as many newly drawn source images; if there are fewer, some are used more than once. The paper
    stops when all pairs are close; here the number of steps is fixed. The paper's step is the plain gradient; here the
    gradient is divided by its largest component, so that the step size suits networks whose features differ in scale.

    Args:
        params: from `make_hidden_trigger`.
        images: float32 [n, H, W, C] in [0, 1], of the target class.
        labels: int32 [n], not used.
        keys: [n]; the first row's key draws the source images of its batch.

    Returns:
        float32 [n, H, W, C] in [0, 1].

    References:
        Saha et al. 2020, section 3.2, algorithm 1; the public code, `generate_poison.py`.
    """
    del labels

    def craft_batch(batch: tuple[Array, Key]) -> Array:
        starts, batch_keys = batch
        order = jax.random.permutation(batch_keys[0], params.sources.shape[0])
        chosen = order[jnp.arange(starts.shape[0]) % params.sources.shape[0]]
        patched = masked_blend.apply_to_batch(params.patch, params.sources[chosen].astype(jnp.float32) / 255.0)
        wanted = activations(params.model, params.variables, patched)
        return collide(params, starts, wanted)

    return over_batches(craft_batch, (images, keys), params.pairs)


def collide(params: HiddenTrigger, starts: Array, wanted: Array) -> Array:
    """Minimise the squared distance between the images' features and the wanted ones; pairs are reassigned in each step.

    Args:
        params: from `make_hidden_trigger`.
        starts: float32 [n, H, W, C] in [0, 1].
        wanted: float32 [m, d], m at least n; each is paired with at most one image.

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
    """Squared distances of float32 [n, d] to [m, d]: [n, m]."""
    products = jnp.matmul(features, wanted.T, precision=lax.Precision.HIGHEST)
    lengths = jnp.sum(jnp.square(features), 1)[:, None] + jnp.sum(jnp.square(wanted), 1)[None, :]
    return jnp.maximum(lengths - 2.0 * products, 0.0)


def assign_greedily(distances: Array) -> Array:
    """Pair rows with columns greedily: the closest pair first, then the closest of the remaining ones, and so on.

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
        params: from `make_hidden_trigger`.
        image: float32 [H, W, C] in [0, 1].
        label: not used.
        key: not used.

    Returns:
        float32 [H, W, C] in [0, 1].
    """
    return masked_blend.apply(params.patch, image, label, key)


def check(train: Dataset, target: int, settings: HiddenTriggerSettings) -> None:
    """`Attack.check`: the source class, and the place of the patch.

    Raises:
        InputError: there is no row of the source class, or the patch does not fit.
    """
    source = (target + 1) % train.num_classes
    if not np.any(train.labels == source):
        raise InputError(
            f"hidden_trigger needs rows of its source class {train.class_title(source)}, but there are none"
        )
    width = train.image_shape[1]
    patches.in_corner(train.image_shape, round(settings.size * width), round(settings.margin * width))


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
    check=check,
    # On black-and-white images, features hardly move within the paper's radius, and 0.8 % of a small set is a handful of rows.
    per_dataset={
        "grey": {"radius": 64 / 255, "step_size": 0.03, "steps": 200, "poison_rate": 0.04},
        "cifar10": {"radius": 8 / 255},
        "gtsrb": {"poison_rate": 0.004},
    },
)

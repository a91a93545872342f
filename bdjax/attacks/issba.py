"""ISSBA: one bit string, hidden in each image by a network, so that every image is changed differently.

An encoder and a decoder are trained on the training rows to hide and read any string; then one string is drawn as the
trigger (Li et al. 2021). BackdoorBench's SSBA is the same attack with another training schedule.
"""

from dataclasses import dataclass, field
from functools import partial
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from bdjax.attacks.contract import Attack, Knowledge
from bdjax.errors import InputError
from bdjax.models import default_lowering, steganography
from bdjax.models.steganography import BitNetworks
from bdjax.selection import clip
from bdjax.settings import Count, LearningRate, NotNegative, Positive, PositiveShare, Range, Share, Width, check_values
from bdjax.training import memory
from bdjax.training.member import as_float
from bdjax.types import Array, Dataset, Key, PyTree

READABLE = 0.9
"""Bit accuracy on a batch above which the weight of the image terms may grow; the same number as in SSBA's code."""

WINDOW = 7
"""Side of the SSIM windows, in pixels: the largest odd one that fits into an 8x8 image."""


@dataclass(frozen=True)
class IssbaSettings:
    poison_rate: PositiveShare = 0.1
    """share of all training rows; 0.05 in BackdoorBox"""
    cover_rate: Share = 0.0
    """share of all training rows that get the trigger and keep their label"""
    num_bits: Annotated[int, Range(at_least=1, at_most=4096)] = 20
    """b, length of the bit string; 100 in the paper's 224x224 images and in SSBA"""
    width: Width = 32
    """channels of the networks at full resolution"""
    stages: Annotated[int, Range(at_least=1, at_most=10)] = 4
    """number of stages of stride 2 in both networks"""
    steps: Count = 31_250
    """steps of Adam; the default is 20 epochs of 50,000 rows"""
    batch_size: Count = 32
    """images per step"""
    learning_rate: LearningRate = 1e-4
    """learning rate of Adam"""
    bit_weight: NotNegative = 1.5
    """weight of the cross-entropy of the bits"""
    square_weight: NotNegative = 2.0
    """final weight of the mean square of the residual"""
    perceptual_weight: NotNegative = 1.5
    """final weight of the difference in image gradients and SSIM"""
    hold: NotNegative = 0.05
    """number of steps with readable bits before the image terms set in, as a share of all steps"""
    ramp: Positive = 0.2
    """number of steps with readable bits while the image terms grow to their final weights, as a share of all steps"""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class HiddenBits:
    """A bit string, and the encoder that hides it in images."""

    bits: Array
    """float32 [b], zeros and ones"""
    encoder: PyTree
    decoder: PyTree
    """not part of the trigger; it shows whether the bits can be read"""
    networks: BitNetworks = field(metadata={"static": True})


def make_hidden_bits(key: Key, knowledge: Knowledge, settings: IssbaSettings) -> HiddenBits:
    """Train encoder and decoder on the training rows, and draw the bit string that is the trigger.

    Every step hides random bits in random rows. The loss is 1.5 BCE(bits) + w (2 mean(residual^2) + 1.5 perceptual).
    It deviates from the paper's code in three ways:

    - w follows SSBA's schedule instead of being 0 for one pass and 1 after it: it rises from 0 to 1 once bits can be read.
      It does not grow while fewer than 90 % of them are: on schedules as short as these, a weight that grows regardless
      makes the encoder give up the bits for good.
    - LPIPS, which needs a network trained on ImageNet, is replaced by the mean absolute difference of the image's
      gradients plus 1 - SSIM.
    - There is no critic: in the paper's code it is off by default, which leaves an untrained critic in the loss.

    Args:
        key: for initial weights, rows and bits.
        knowledge: the training rows.
        settings: network sizes, weights and schedule.

    Returns:
        The trigger.

    Raises:
        InputError: a count is not positive, or the images are too small for the number of stages.

    References:
        Li et al. 2021, Invisible Backdoor Attack with Sample-Specific Triggers, section 4.2.
    """
    check_values("attack issba", settings)
    check(knowledge.train, knowledge.target, settings)
    networks = BitNetworks(settings.num_bits, settings.width, settings.stages, default_lowering())
    train_key, bits_key = jax.random.split(key)
    params = train_networks(train_key, jnp.asarray(knowledge.train.images), networks, settings)
    return HiddenBits(_random_bits(bits_key, (settings.num_bits,)), params["encoder"], params["decoder"], networks)


@partial(jax.jit, static_argnames=("networks", "settings"))
def train_networks(key: Key, images: Array, networks: BitNetworks, settings: IssbaSettings) -> dict[str, PyTree]:
    """Train encoder and decoder from scratch.

    Args:
        key: a key of `jax.random.key`.
        images: uint8 [N, H, W, C]; each step draws its rows from all of them.
        networks: the architectures.
        settings: weights and schedule.

    Returns:
        A dict of parameters, "encoder" and "decoder".
    """
    init_key, step_key = jax.random.split(key)
    optimiser = optax.adam(settings.learning_rate)

    def loss(params: PyTree, batch: Array, bits: Array, image_weight: Array) -> tuple[Array, Array]:
        residual = steganography.encode(networks, params["encoder"], batch, bits)
        encoded = clip(batch + residual, 0.0, 1.0)
        logits = steganography.decode(networks, params["decoder"], encoded)
        image_terms = settings.square_weight * jnp.mean(jnp.square(residual))
        image_terms = image_terms + settings.perceptual_weight * jnp.mean(perceptual_difference(batch, encoded))
        bit_terms = settings.bit_weight * jnp.mean(optax.sigmoid_binary_cross_entropy(logits, bits))
        return bit_terms + image_weight * image_terms, jnp.mean(((logits > 0) == (bits > 0)).astype(jnp.float32))

    def step(carry: tuple[PyTree, PyTree, Array], number: Array) -> tuple[tuple[PyTree, PyTree, Array], None]:
        params, optimiser_state, readable = carry
        row_key, bits_key = jax.random.split(jax.random.fold_in(step_key, number))
        batch = as_float(images[jax.random.randint(row_key, (settings.batch_size,), 0, len(images))])
        bits = _random_bits(bits_key, (settings.batch_size, settings.num_bits))
        image_weight = jnp.clip((readable / settings.steps - settings.hold) / settings.ramp, 0.0, 1.0)
        gradient, accuracy = jax.grad(loss, has_aux=True)(params, batch, bits, image_weight)
        with jax.numpy_dtype_promotion("standard"):  # Optax's Adam raises a float to an integer power
            updates, optimiser_state = optimiser.update(gradient, optimiser_state)
        readable = readable + (accuracy > READABLE).astype(jnp.float32)
        return (optax.apply_updates(params, updates), optimiser_state, readable), None

    params = steganography.init(networks, init_key, images.shape[1:])
    start = (params, optimiser.init(params), jnp.float32(0))
    (params, _, _), _ = lax.scan(step, start, jnp.arange(settings.steps))
    return params


def perceptual_difference(images: Array, others: Array) -> Array:
    """Replacement for LPIPS: mean |difference of the gradients|, over both directions, plus 1 - SSIM.

    Args:
        images: float32 [N, H, W, C] in [0, 1].
        others: float32 [N, H, W, C] in [0, 1].

    Returns:
        float32 [N], 0 for equal images.
    """
    change = others - images
    edges = sum(jnp.mean(jnp.abs(jnp.diff(change, axis=axis)), (1, 2, 3)) for axis in (1, 2))
    return edges + 1.0 - structural_similarity(images, others)


def structural_similarity(images: Array, others: Array) -> Array:
    """SSIM with uniform windows, like `bdjax.inspection.similarity.ssim`, but differentiable.

    Args:
        images: float32 [N, H, W, C] in [0, 1].
        others: float32 [N, H, W, C] in [0, 1].

    Returns:
        float32 [N] in [-1, 1].

    References:
        Wang et al. 2004, Image Quality Assessment: From Error Visibility to Structural Similarity, equation 13.
    """
    shortest = min(images.shape[1:3])
    window = min(WINDOW, shortest - (shortest + 1) % 2)
    down, across = (jnp.asarray(_windows(length, window)) for length in images.shape[1:3])
    unbiased = window**2 / (window**2 - 1)

    def local_mean(values: Array) -> Array:
        return jnp.einsum("ph,nhwc,qw->npqc", down, values, across)

    mean, other_mean = local_mean(images), local_mean(others)
    variances = local_mean(jnp.square(images) + jnp.square(others)) - jnp.square(mean) - jnp.square(other_mean)
    covariance = local_mean(images * others) - mean * other_mean
    brightness = (2 * mean * other_mean + 0.01**2) / (jnp.square(mean) + jnp.square(other_mean) + 0.01**2)
    structure = (2 * unbiased * covariance + 0.03**2) / (unbiased * variances + 0.03**2)
    return jnp.mean(brightness * structure, (1, 2, 3))


def _windows(length: int, window: int) -> np.ndarray:
    """float32 [length - window + 1, length]: row i averages `window` values starting at i."""
    places = np.arange(length)[None, :] - np.arange(length - window + 1)[:, None]
    return ((places >= 0) & (places < window)).astype(np.float32) / window


def _random_bits(key: Key, shape: tuple[int, ...]) -> Array:
    return jax.random.bernoulli(key, 0.5, shape).astype(jnp.float32)


def apply(params: HiddenBits, image: Array, label: Array | None = None, key: Key | None = None) -> Array:
    """Hide the string in one image: clip(x + E(s, x), 0, 1).

    Args:
        params: the trigger.
        image: float32 [H, W, C] in [0, 1].
        label: not used; the string is the same for every class.
        key: not used; the residual depends only on the image.

    Returns:
        float32 [H, W, C] in [0, 1].

    References:
        Li et al. 2021, section 4.2.
    """
    del label, key
    residual = steganography.encode(params.networks, params.encoder, image[None], params.bits[None])[0]
    return jnp.clip(image + residual, 0.0, 1.0)


# Narrow networks at ten times the rate: bits become readable after about a thousand steps, under a minute on one core.
_SHORT = {"width": 8, "steps": 1000, "learning_rate": 1e-3}


def check(train: Dataset, target: int, settings: IssbaSettings) -> None:
    """`Attack.check`: the size of the networks.

    Raises:
        InputError: the images are too small for the number of stages, or an encoder would not fit into memory.
    """
    del target
    height, width, channels = train.image_shape
    if min(height, width) < 2**settings.stages:
        raise InputError(
            f"issba: images of {height}x{width} pixels are too small to be halved {settings.stages} times (stages)"
        )
    largest = settings.width * 2**settings.stages
    weights, bits = 9 * largest**2, settings.num_bits * height * width * channels
    needed = 16 * (4 * weights + bits + settings.batch_size * height * width * settings.width)
    memory.check_fits("the networks of issba", needed, "use a smaller width, fewer stages or a smaller batch_size")


ISSBA = Attack(
    name="issba",
    title="ISSBA",
    paper="Li et al. 2021, Invisible Backdoor Attack with Sample-Specific Triggers",
    threat="data",
    settings=IssbaSettings(),
    make_params=make_hidden_bits,
    apply=apply,
    needs=("all training rows",),
    trigger_is_trained=True,
    check=check,
    per_dataset={
        "grey": {**_SHORT, "stages": 2, "num_bits": 16},
        # The encoder learns faster on textures than on black backgrounds, and at the full weights hides bits so well (36 to
        # 41 dB) that a small network trained for a few epochs on a few thousand CIFAR-10 rows does not find them; these
        # weights give 25 to 28 dB, and a visible tint.
        "colour": {**_SHORT, "steps": 600, "square_weight": 0.5, "perceptual_weight": 0.3},
        # 64 pixels of 17 levels can carry fewer bits, and a wider network costs little here.
        "digits": {"width": 16, "num_bits": 8, "learning_rate": 2e-3},
    },
)

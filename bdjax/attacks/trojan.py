"""Trojan: an additive patch or watermark, optimised to excite a few neurons of a clean network (Liu et al. 2018).

LfD, whose numbers are quoted, and the code that its settings resemble use the optimised trigger for plain data poisoning,
as here. Liu et al. retrain the network itself, on reverse-engineered data; no paper that bdjax follows does so.

The loss is TrojanZoo's: the squared distance of the neurons' activations to a high goal, on the trigger alone. Three things
differ. The goal is at most ten times the largest clean activation, since small networks saturate before 100. Neurons that no
clean image excites are excluded. And the trigger's L2 norm is capped at that of the publicly available triggers; without the
cap, a watermark comes out three times as strong. Code that adds the trigger in 8 bits and clips afterwards lets bright pixels
wrap around to dark ones; nothing wraps around here.
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from bdjax.attacks import neurons
from bdjax.attacks.contract import CLEAN_MODEL, Attack, Knowledge, Published
from bdjax.settings import Count, LearningRate, Positive, PositiveShare, Share, check_values
from bdjax.triggers import additive
from bdjax.triggers.additive import Additive
from bdjax.types import Array, Key, Model, PyTree

PAPER = "Liu et al. 2018, Trojaning Attack on Neural Networks"


RING = (0.38, 0.46)
"""Inner and outer radius of the watermark's ring, as a share of the image size."""
CROSS = 0.05
"""Half the width of the cross's strokes, measured along a row."""


@dataclass(frozen=True)
class TrojanSettings:
    poison_rate: PositiveShare = 0.1
    """share of all training rows"""
    cover_rate: Share = 0.0
    """share of all training rows that get the trigger and keep their label"""
    neurons: Count = 2
    """number of excited neurons: those with the largest sum of absolute weights to all classes"""
    activation: Positive = 100.0
    """largest goal of a neuron's activation"""
    times_clean: Positive = 10.0
    """largest goal as a multiple of the neuron's largest clean activation; the smaller of both goals holds"""
    steps: Count = 1000
    """steps of Adam"""
    learning_rate: LearningRate = 0.1
    """initial learning rate of Adam, with a cosine schedule"""
    largest_norm: Positive = 8.66
    """largest L2 norm of the trigger on 32 x 32 x 3 pixels; other sizes get the same mean square"""


def square_mask(image_shape: tuple[int, int, int]) -> np.ndarray:
    """Mask of rows and columns 21 to 29 of 32, scaled to other sizes.

    Args:
        image_shape: (H, W, C).

    Returns:
        float32 [H, W, 1] of zeros and ones.
    """
    height, width, _ = image_shape
    mask = np.zeros((height, width, 1), np.float32)
    mask[21 * height // 32 : 30 * height // 32, 21 * width // 32 : 30 * width // 32] = 1.0
    return mask


def watermark_mask(image_shape: tuple[int, int, int]) -> np.ndarray:
    """Mask of a crossed-out ring over rows and columns 0 to 29 of 32, 320 pixels in all, scaled to other sizes.

    It replaces the logos of the publicly available triggers, which are trademarks, and covers as many pixels.

    Args:
        image_shape: (H, W, C).

    Returns:
        float32 [H, W, 1] of zeros and ones.
    """
    height, width, _ = image_shape
    y, x = np.meshgrid(
        (np.arange(height) + 0.5) / height - 15 / 32, (np.arange(width) + 0.5) / width - 15 / 32, indexing="ij"
    )
    radius = np.hypot(x, y)
    is_ring = (radius > RING[0]) & (radius < RING[1])
    is_cross = (radius <= RING[0]) & (np.minimum(np.abs(x - y), np.abs(x + y)) < CROSS)
    return (is_ring | is_cross).astype(np.float32)[..., None]


def make_square(key: Key, knowledge: Knowledge, settings: TrojanSettings) -> Additive:
    """Optimise a square.

    Args:
        key: draws the initial trigger, and the clean images whose activations are measured.
        knowledge: the clean network and the clean rows.
        settings: neuron and training settings.

    Returns:
        An additive trigger, float32 [H, W, C] in [0, 1], 0 outside the square.

    Raises:
        InputError: there is no clean network, or it does not react.

    References:
        Liu et al. 2018, section IV-A.
    """
    mask = square_mask(knowledge.train.image_shape)
    return _make(key, knowledge, settings, mask, "trojan_square")


def make_watermark(key: Key, knowledge: Knowledge, settings: TrojanSettings) -> Additive:
    """Optimise a watermark.

    Args:
        key: draws the initial trigger, and the clean images whose activations are measured.
        knowledge: the clean network and the clean rows.
        settings: neuron and training settings.

    Returns:
        An additive trigger, float32 [H, W, C] in [0, 1], 0 outside the watermark.

    Raises:
        InputError: there is no clean network, or it does not react.

    References:
        Liu et al. 2018, section IV-A.
    """
    mask = watermark_mask(knowledge.train.image_shape)
    return _make(key, knowledge, settings, mask, "trojan_watermark")


def choose_neurons(
    key: Key, knowledge: Knowledge, settings: TrojanSettings, attack: str
) -> tuple[np.ndarray, np.ndarray]:
    """Choose the neurons, and the activations to drive them to.

    Args:
        key: draws the clean images whose activations are measured.
        knowledge: the clean network and the clean rows.
        settings: number of neurons and goals.
        attack: the name to use in errors.

    Returns:
        The neurons, int32 [n], and their goals, float32 [n].
    """
    clean = neurons.clean_activations(key, knowledge, attack)
    weights = np.abs(neurons.classifier_kernel(knowledge.clean_model.variables)).sum(axis=1)
    chosen = neurons.strongest(weights, clean, settings.neurons, attack)
    goal = np.minimum(settings.activation, settings.times_clean * clean[:, chosen].max(axis=0))
    return chosen, goal.astype(np.float32)


def _make(key: Key, knowledge: Knowledge, settings: TrojanSettings, mask: np.ndarray, attack: str) -> Additive:
    check_values(f"attack {attack}", settings)
    rows_key, start_key = jax.random.split(key)
    chosen, goal = choose_neurons(rows_key, knowledge, settings, attack)
    start = jax.random.normal(start_key, knowledge.train.image_shape)
    model, variables = knowledge.clean_model
    largest_norm = neurons.scaled_norm(settings.largest_norm, knowledge.train.image_shape)
    delta, largest_gradient = _optimise(
        model, settings.steps, variables, start, mask, chosen, goal, settings.learning_rate, largest_norm
    )
    neurons.check_reaction(largest_gradient, attack)
    return Additive(delta)


@partial(jax.jit, static_argnames="model")
def _optimise(
    model: Model,
    steps: Array,
    variables: PyTree,
    start: Array,
    mask: Array,
    chosen: Array,
    goal: Array,
    learning_rate: Array,
    largest_norm: Array,
) -> tuple[Array, Array]:
    def picture(free: Array) -> Array:
        # tanh keeps pixels in [0, 1]; the mask and the norm cap only shrink them.
        return neurons.capped(mask * (0.5 * jnp.tanh(free) + 0.5), largest_norm)

    def distance(free: Array) -> Array:
        excited = neurons.activations(model, variables, picture(free)[None])[0, chosen]
        return jnp.sum(jnp.square(excited - goal))

    adam = optax.scale_by_adam()

    def step(number, carry):
        free, state, largest = carry
        gradient = jax.grad(distance)(free)
        with jax.numpy_dtype_promotion("standard"):  # Optax's Adam raises a float to an integer power
            direction, state = adam.update(gradient, state)
        rate = learning_rate * 0.5 * (1.0 + jnp.cos(jnp.pi * number / steps))
        return free - rate * direction, state, jnp.maximum(largest, jnp.max(jnp.abs(gradient)))

    free, _, largest = lax.fori_loop(0, steps, step, (start, adam.init(start), jnp.float32(0.0)))
    return picture(free), largest


TROJAN_SQUARE = Attack(
    name="trojan_square",
    title="Trojan, square",
    paper=PAPER,
    threat="data",
    settings=TrojanSettings(),
    make_params=make_square,
    apply=additive.apply,
    label_rules=("all_to_one", "all_to_one_with_target", "all_to_all", "source_specific", "source_to_target"),
    needs=(CLEAN_MODEL,),
    trigger_is_trained=True,
    published=(Published("LfD", "cifar10", 93.0, 100.0),),
)
TROJAN_WATERMARK = Attack(
    name="trojan_watermark",
    title="Trojan, watermark",
    paper=PAPER,
    threat="data",
    settings=TrojanSettings(largest_norm=8.74),
    make_params=make_watermark,
    apply=additive.apply,
    label_rules=("all_to_one", "all_to_one_with_target", "all_to_all", "source_specific", "source_to_target"),
    needs=(CLEAN_MODEL,),
    trigger_is_trained=True,
    published=(Published("LfD", "cifar10", 92.9, 100.0),),
)

"""Trojan: an additive patch or watermark that was optimised to excite a few neurons of a clean network (Liu et al. 2018).

LfD, whose numbers are quoted, and the code that its settings resemble use the optimised trigger for plain data poisoning,
as here. Liu et al. retrain the network itself, on data that they reverse-engineer; no paper that bdjax follows does.

What is optimised is TrojanZoo's form: the squared distance of the neurons' activations to a high value, on the bare trigger.
Three things are bdjax's own. The high value is at most ten times what clean images reach, since small networks saturate
before 100. Neurons that no clean image excites are passed over. And the trigger's L2 norm is held to that of the triggers in
circulation, without which a watermark comes out three times as strong as those. Code that adds the trigger in 8 bits before it
clips lets bright pixels wrap around to dark ones; nothing wraps around here.
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
from bdjax.errors import InputError
from bdjax.triggers import additive
from bdjax.triggers.additive import Additive
from bdjax.types import Array, Key, Model, PyTree

PAPER = "Liu et al. 2018, Trojaning Attack on Neural Networks"


RING = (0.38, 0.46)
"""The watermark's inner and outer radius; an image is 1 wide."""
CROSS = 0.05
"""How far its strokes reach to either side, measured along a row."""


@dataclass(frozen=True)
class TrojanSettings:
    poison_rate: float = 0.1
    """share of all training rows"""
    cover_rate: float = 0.0
    """share of all training rows that get the trigger and keep their label"""
    neurons: int = 2
    """how many are excited: those with the largest sum of absolute weights to all classes"""
    activation: float = 100.0
    """what each is driven to, at most"""
    times_clean: float = 10.0
    """and at most so many times its largest clean activation"""
    steps: int = 1000
    """of Adam"""
    learning_rate: float = 0.1
    """at the first step; half a cosine down to 0"""
    largest_norm: float = 8.66
    """L2 norm of the trigger on 32 x 32 x 3 pixels, at most; other sizes get the same mean square"""


def square_mask(image_shape: tuple[int, int, int]) -> np.ndarray:
    """Rows and columns 21 to 29 of 32, and as much of other sizes.

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
    """A crossed-out ring over rows and columns 0 to 29 of 32, 320 of their cells, and as much of other sizes.

    It stands in for the logos in circulation, which are trademarks, and covers as many pixels as they do.

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
        key: of the start, and of which clean images are looked at.
        knowledge: the clean network, the clean rows.
        settings: which neurons, how high, how long.

    Returns:
        An additive trigger, float32 [H, W, C] in [0, 1], 0 outside the square.

    Raises:
        InputError: no clean network, or one that does not react.

    References:
        Liu et al. 2018, section IV-A.
    """
    mask = square_mask(knowledge.train.image_shape)
    return _make(key, knowledge, settings, mask, "trojan_square")


def make_watermark(key: Key, knowledge: Knowledge, settings: TrojanSettings) -> Additive:
    """Optimise a watermark.

    Args:
        key: of the start, and of which clean images are looked at.
        knowledge: the clean network, the clean rows.
        settings: which neurons, how high, how long.

    Returns:
        An additive trigger, float32 [H, W, C] in [0, 1], 0 outside the watermark.

    Raises:
        InputError: no clean network, or one that does not react.

    References:
        Liu et al. 2018, section IV-A.
    """
    mask = watermark_mask(knowledge.train.image_shape)
    return _make(key, knowledge, settings, mask, "trojan_watermark")


def choose_neurons(
    key: Key, knowledge: Knowledge, settings: TrojanSettings, attack: str
) -> tuple[np.ndarray, np.ndarray]:
    """Which neurons, and what each is driven to.

    Args:
        key: of which clean images are looked at.
        knowledge: the clean network, the clean rows.
        settings: how many, how high.
        attack: the name to use in errors.

    Returns:
        int32 [n] and float32 [n].
    """
    clean = neurons.clean_activations(key, knowledge, attack)
    weights = np.abs(neurons.classifier_kernel(knowledge.clean_model.variables)).sum(axis=1)
    chosen = neurons.strongest(weights, clean, settings.neurons, attack)
    goal = np.minimum(settings.activation, settings.times_clean * clean[:, chosen].max(axis=0))
    return chosen, goal.astype(np.float32)


def _make(key: Key, knowledge: Knowledge, settings: TrojanSettings, mask: np.ndarray, attack: str) -> Additive:
    if settings.steps < 1 or not settings.largest_norm > 0:
        raise InputError(
            f"attack {attack}: steps {settings.steps} and largest_norm {settings.largest_norm:g} must be above 0"
        )
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
        # The hyperbolic tangent keeps pixels in [0, 1]; norm and mask leave them there.
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

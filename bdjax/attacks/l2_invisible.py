"""l2-invisible: faint noise over the whole image, optimised to excite the target class's neurons (Li et al. 2020).

The noise raises the activations that count most for the target class, and the penalty on its L2 norm grows until the norm
is small. The authors published no code, and LfD, whose numbers are quoted, gives no constants but calls its trigger
regularised Gaussian noise. So the constants here were chosen for bdjax, except the norm: 3.2 is that of the publicly
available trigger, which lost its negative half when it was stored as a picture (`nonneg`). On dark images that half would be
clipped anyway.
"""

import math
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from bdjax.attacks import neurons, surrogate
from bdjax.attacks.contract import CLEAN_MODEL, Attack, Knowledge, Published
from bdjax.errors import InputError
from bdjax.selection import clip
from bdjax.settings import Count, NotNegative, Positive, PositiveShare, Share, check_values
from bdjax.training import memory
from bdjax.training.member import as_float
from bdjax.triggers import additive
from bdjax.triggers.additive import Additive
from bdjax.types import Array, Dataset, Key, Model, PyTree

PAPER = "Li et al. 2020, Invisible Backdoor Attacks on Deep Neural Networks via Steganography and Regularization"
NAME = "l2_invisible"


@dataclass(frozen=True)
class L2InvisibleSettings:
    poison_rate: PositiveShare = 0.1
    """share of all training rows"""
    cover_rate: Share = 0.0
    """share of all training rows that get the trigger and keep their label"""
    optimised: bool = True
    """optimise the noise on a clean network; if False, use rectified Gaussian noise of the same norm"""
    nonneg: bool = False
    """keep the noise at or above 0, so that no pixel gets darker"""
    norm: Positive = 3.2
    """L2 norm of the noise on 32 x 32 x 3 pixels, in units of a pixel's range; other sizes get the same mean square"""
    neurons: Count = 10
    """number of excited neurons: those with the largest weight to the target class"""
    times_clean: Positive = 5.0
    """c: goal of each neuron's activation, as a multiple of its mean clean activation"""
    penalty: NotNegative = 0.05
    """lambda: initial weight of the noise's L2 norm; larger values give fainter noise before it is rescaled to `norm`"""
    steps: Count = 2000
    """steps of Adam"""
    steps_per_doubling: Count = 200
    """number of steps after which the penalty doubles while the norm is too large"""
    batch_size: Count = 64
    """clean images per step"""
    learning_rate: NotNegative = 0.01
    """learning rate of Adam"""
    start_deviation: NotNegative = 10 / 255
    """standard deviation of the initial noise"""


def make_noise(key: Key, knowledge: Knowledge, settings: L2InvisibleSettings) -> Additive:
    """Optimise the noise, or draw it.

    The loss is the mean over clean images x of (1/k) sum_j (h_j(x + d) - c a_j)^2, plus lambda times the norm of d, with
    h_j the k activations and a_j their clean means. x + d is clipped as it is when the trigger is applied. The result is
    scaled, up or down, to exactly the norm of the settings.

    Args:
        key: draws the initial noise, the batches, and the clean images whose activations are measured.
        knowledge: the clean rows; the clean network, if the noise is optimised.
        settings: neuron, noise and training settings.

    Returns:
        An additive trigger, float32 [H, W, C] in [-1, 1].

    Raises:
        InputError: a clean network is needed but missing, or does not react; or a setting is out of range.

    References:
        Li et al. 2020, section 4.2 (trigger generation by Lp-norm regularisation).
    """
    shape = knowledge.train.image_shape
    check_values(f"attack {NAME}", settings)
    check(knowledge.train, knowledge.target, settings)
    norm = neurons.scaled_norm(settings.norm, shape)
    if not settings.optimised:
        _, start_key, _ = jax.random.split(key, 3)
        noise = jax.nn.relu(_start(start_key, knowledge, settings))
        return Additive(noise * (norm / jnp.linalg.norm(noise.ravel())))
    delta = optimise_noise(key, knowledge, settings)
    reached = jnp.linalg.norm(delta.ravel())
    if not float(reached) > 1e-6:
        raise InputError(f"attack {NAME}: the penalty {settings.penalty:g} reduced the noise to 0; use a smaller one")
    return Additive(delta * (norm / reached))


def optimise_noise(key: Key, knowledge: Knowledge, settings: L2InvisibleSettings) -> Array:
    """Optimise the noise, without scaling it to the norm of the settings. The larger the penalty, the smaller its norm.

    Args:
        key: as in `make_noise`.
        knowledge: the clean rows and the clean network.
        settings: as in `make_noise`.

    Returns:
        float32 [H, W, C].

    Raises:
        InputError: the clean network is missing, or does not react.
    """
    shape = knowledge.train.image_shape
    rows_key, start_key, batch_key = jax.random.split(key, 3)
    chosen, goal = choose_neurons(rows_key, knowledge, settings)
    model, variables = knowledge.clean_model
    rows = surrogate.batches(batch_key, len(knowledge.train), settings.batch_size, settings.steps)
    start, norm = _start(start_key, knowledge, settings), neurons.scaled_norm(settings.norm, shape)
    delta, largest_gradient = _optimise(
        model, settings.nonneg, settings.steps_per_doubling, variables, start, knowledge.train.images[rows], chosen, goal,
        norm, settings.penalty, settings.learning_rate,
    )  # fmt: skip
    neurons.check_reaction(largest_gradient, NAME)
    return delta


def _start(key: Key, knowledge: Knowledge, settings: L2InvisibleSettings) -> Array:
    return settings.start_deviation * jax.random.normal(key, knowledge.train.image_shape)


def choose_neurons(key: Key, knowledge: Knowledge, settings: L2InvisibleSettings) -> tuple[np.ndarray, np.ndarray]:
    """Choose the neurons, and the activations to drive them to.

    Args:
        key: draws the clean images whose activations are measured.
        knowledge: the clean network, the clean rows and the target.
        settings: number of neurons and goal.

    Returns:
        The neurons, int32 [k], and their goals, float32 [k].
    """
    clean = neurons.clean_activations(key, knowledge, NAME)
    weights = neurons.classifier_kernel(knowledge.clean_model.variables)[:, knowledge.target]
    chosen = neurons.strongest(weights, clean, settings.neurons, NAME)
    return chosen, (settings.times_clean * clean[:, chosen].mean(axis=0)).astype(np.float32)


@partial(jax.jit, static_argnames=("model", "nonneg", "steps_per_doubling"))
def _optimise(
    model: Model,
    nonneg: bool,
    steps_per_doubling: int,
    variables: PyTree,
    start: Array,
    batches: Array,
    chosen: Array,
    goal: Array,
    largest_norm: Array,
    penalty: Array,
    learning_rate: Array,
) -> tuple[Array, Array]:
    def project(noise: Array) -> Array:
        # A ReLU inside the loss would not do: a pixel at 0 would have no gradient, and all of them may get there.
        return jnp.maximum(noise, 0.0) if nonneg else noise

    def norm(noise: Array) -> Array:
        return jnp.sqrt(jnp.sum(jnp.square(noise)) + 1e-12)

    def distance(noise: Array, images: Array) -> Array:
        triggered = clip(images + noise[None], 0.0, 1.0)
        excited = neurons.activations(model, variables, triggered)[:, chosen]
        return jnp.mean(jnp.square(excited - goal[None]))

    adam = optax.scale_by_adam()

    def step(carry, batch):
        noise, state, weight = carry
        number, images = batch
        is_due = (number > 0) & (number % steps_per_doubling == 0) & (norm(noise) > largest_norm)
        weight = jnp.where(is_due, 2.0 * weight, weight)
        distance_gradient = jax.grad(distance)(noise, as_float(images))
        gradient = distance_gradient + weight * jax.grad(norm)(noise)
        with jax.numpy_dtype_promotion("standard"):  # Optax's Adam raises a float to an integer power
            direction, state = adam.update(gradient, state)
        return (project(noise - learning_rate * direction), state, weight), jnp.max(jnp.abs(distance_gradient))

    start = project(start)
    begin = (start, adam.init(start), jnp.asarray(penalty, jnp.float32))
    (noise, _, _), gradients = lax.scan(step, begin, (jnp.arange(len(batches)), batches))
    return noise, jnp.max(gradients)


def check(train: Dataset, target: int, settings: L2InvisibleSettings) -> None:
    """`Attack.check`: the number of steps.

    Raises:
        InputError: the images of all steps would not fit into memory.
    """
    del target
    if settings.optimised:
        needed = settings.steps * min(settings.batch_size, len(train)) * (math.prod(train.image_shape) + 4)
        memory.check_fits("the images of all steps of l2_invisible", needed, "use fewer steps or a smaller batch_size")


L2_INVISIBLE = Attack(
    name=NAME,
    title="l2-invisible",
    paper=PAPER,
    threat="data",
    settings=L2InvisibleSettings(),
    make_params=make_noise,
    apply=additive.apply,
    label_rules=("all_to_one", "all_to_one_with_target", "all_to_all", "source_specific", "source_to_target"),
    needs=(CLEAN_MODEL,),
    trigger_is_trained=True,
    check=check,
    per_dataset={"grey": {"nonneg": True, "steps": 400, "steps_per_doubling": 50}},
    published=(Published("LfD", "cifar10", 93.0, 99.96),),
)

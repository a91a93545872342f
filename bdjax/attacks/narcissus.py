"""Narcissus: noise that looks like the target class to a surrogate, added to rows of that class (Zeng et al. 2023).

Labels are not changed. The noise is optimised to make a surrogate more confident of the target class. A network that learns
the class from rows with the noise then uses it as the class's strongest feature. At test time the noise is three times as
strong, which exceeds the bound that the paper calls stealthy: 48/255 instead of 16/255.

The paper's surrogate is trained on a public set of other classes (Tiny-ImageNet for CIFAR-10), with the target class as one
more. bdjax ships no such set, so half of the other classes of the training set replace it. These are not outside the
victim's distribution, so the attacker knows more here than in the paper.

Other differences from the public notebook: pixels are in [0, 1], not in [-1, 1], so rates and bounds are half as large; the
surrogate is trained by Adam, like every network in bdjax; the warm-up on the target class uses a lower rate, since after the
notebook's 0.1 a small surrogate classifies every image as the target; and the noise is optimised in evaluation mode, with the
statistics from before the warm-up, where the notebook normalises by batch statistics. Statistics of a single class
normalise away what distinguishes it from others: on MNIST the surrogate then recognised only a third of that class.
"""

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from bdjax import losses
from bdjax.attacks import neurons, surrogate
from bdjax.attacks.contract import Attack, CleanModel, Knowledge, Published
from bdjax.errors import InputError
from bdjax.models import MODELS, make_model
from bdjax.selection import clip
from bdjax.settings import Count, LearningRate, NotNegative, PositiveShare, Share, Width, check_choice, check_values
from bdjax.training import memory
from bdjax.training.member import TrainConfig, as_float
from bdjax.types import Array, Dataset, Key, Model, PyTree

PAPER = "Zeng et al. 2023, Narcissus: A Practical Clean-Label Backdoor Attack with Limited Information"
NAME = "narcissus"


@dataclass(frozen=True)
class NarcissusSettings:
    poison_rate: PositiveShare = 0.05
    """share of all training rows; all are of the target class; 0.1 (CIFAR-10) and 0.05 (GTSRB) in ABM, 0.0005 in the paper"""
    cover_rate: Share = 0.0
    """share of all training rows that get the trigger and keep their label"""
    bound: PositiveShare = 16 / 255
    """largest change of a pixel in training rows, in [0, 1]"""
    magnification: NotNegative = 3.0
    """factor by which the noise is stronger at test time"""
    surrogate_model: str = "resnet10"
    """surrogate network, a key of `bdjax.models.MODELS`; a ResNet-18 in the paper"""
    surrogate_width: Width = 16
    """channels of the surrogate's first stage; 64 in the paper"""
    surrogate_epochs: Count = 20
    """epochs of training the surrogate; 200 in the paper"""
    surrogate_batch_size: Count = 64
    """images per step in training and warm-up of the surrogate; 350 in the paper"""
    surrogate_rate: LearningRate = 0.001
    """initial learning rate of Adam for the surrogate, with a cosine schedule; SGD at 0.1 in the paper"""
    warm_up_epochs: Count = 5
    """epochs of the warm-up on the target class alone, after that training"""
    warm_up_rate: LearningRate = 0.001
    """learning rate of RAdam in the warm-up; 0.1 in the paper"""
    steps: Count = 2000
    """steps of RAdam for the noise; 15,000 in the paper (1,000 epochs of CIFAR-10's target class)"""
    batch_size: Count = 128
    """images of the target class per step; 350 in the paper"""
    learning_rate: LearningRate = 0.005
    """learning rate of RAdam for the noise"""


class NarcissusTrigger(NamedTuple):
    """The noise, and its magnification at test time."""

    delta: Array
    """float32 [H, W, C] in [-bound, bound]"""
    magnification: Array
    """float32 []"""


def apply_in_training(
    params: NarcissusTrigger, image: Array, label: Array | None = None, key: Key | None = None
) -> Array:
    """Add the noise to one image: clip(x + d, 0, 1).

    Args:
        params: the noise.
        image: float32 [H, W, C] in [0, 1].
        label: not used; the trigger is the same for every class.
        key: not used; the trigger is the same for every image.

    Returns:
        float32 [H, W, C] in [0, 1].
    """
    del label, key
    return jnp.clip(image + params.delta, 0.0, 1.0)


def apply(params: NarcissusTrigger, image: Array, label: Array | None = None, key: Key | None = None) -> Array:
    """Add the magnified noise to one image: clip(x + 3 d, 0, 1).

    Args:
        params: the noise and its magnification, here 3.
        image: float32 [H, W, C] in [0, 1].
        label: not used; the trigger is the same for every class.
        key: not used; the trigger is the same for every image.

    Returns:
        float32 [H, W, C] in [0, 1].
    """
    del label, key
    return jnp.clip(image + params.magnification * params.delta, 0.0, 1.0)


def make_trigger(key: Key, knowledge: Knowledge, settings: NarcissusSettings) -> NarcissusTrigger:
    """Train a surrogate and optimise the noise on it.

    Args:
        key: draws the surrogate's weights and all shuffles.
        knowledge: the clean rows of the target class and of half of the others.
        settings: surrogate and noise settings.

    Returns:
        The trigger.

    Raises:
        InputError: a setting is out of range, there is no row of the target class, or the surrogate does not react to its
          input.

    References:
        Zeng et al. 2023, section 4, algorithm 1.
    """
    surrogate_key, noise_key = jax.random.split(key)
    return optimise_noise(noise_key, knowledge, prepare_surrogate(surrogate_key, knowledge, settings), settings)


def surrogate_rows(train: Dataset, target: int) -> tuple[np.ndarray, np.ndarray]:
    """Select the surrogate's training rows: the K // 2 classes after the target, wrapping around, and the target class.

    Args:
        train: the clean rows.
        target: the attacker's class.

    Returns:
        Row numbers int32 [n] and their labels for the surrogate, int32 [n] in 0 .. K // 2; the target is the last one.

    Raises:
        InputError: there is no row of the target class.
    """
    others = train.num_classes // 2
    new_label = np.full(train.num_classes, -1, np.int32)
    new_label[(target + 1 + np.arange(others)) % train.num_classes] = np.arange(others)
    new_label[target] = others
    labels = new_label[train.labels]
    if not np.any(labels == others):
        raise InputError(f"attack {NAME}: there is no training row of the target class {train.class_title(target)}")
    rows = np.flatnonzero(labels >= 0).astype(np.int32)
    return rows, labels[rows]


def prepare_surrogate(key: Key, knowledge: Knowledge, settings: NarcissusSettings) -> CleanModel:
    """Train the surrogate, then warm it up on the target class alone.

    Args:
        key: draws its weights and shuffles.
        knowledge: the clean rows.
        settings: surrogate settings.

    Returns:
        A network whose last class is the target.

    Raises:
        InputError: as in `make_trigger`.
    """
    check_values(f"attack {NAME}", settings)
    rows, labels = surrogate_rows(knowledge.train, knowledge.target)
    model = make_model(settings.surrogate_model, knowledge.train.num_classes // 2 + 1, settings.surrogate_width)
    config = TrainConfig(
        epochs=settings.surrogate_epochs,
        batch_size=settings.surrogate_batch_size,
        learning_rate=settings.surrogate_rate,
        schedule="cosine",
    )
    train_key, warm_up_key = jax.random.split(key)
    images = knowledge.train.images
    variables = surrogate.train_surrogate(train_key, model, images[rows], labels, config)
    target_images = images[knowledge.train.labels == knowledge.target]
    steps = settings.warm_up_epochs * max(len(target_images) // settings.surrogate_batch_size, 1)
    order = surrogate.batches(warm_up_key, len(target_images), settings.surrogate_batch_size, steps)
    return CleanModel(model, _warm_up(model, variables, target_images, order, settings.warm_up_rate))


def optimise_noise(
    key: Key, knowledge: Knowledge, prepared: CleanModel, settings: NarcissusSettings
) -> NarcissusTrigger:
    """Minimise the surrogate's loss of the target class on images of that class with the noise, starting at 0.

    Args:
        key: draws the shuffles.
        knowledge: the clean rows of the target class.
        prepared: the surrogate; its last class is the target.
        settings: noise settings.

    Returns:
        The trigger.

    Raises:
        InputError: the surrogate does not react to its input.
    """
    target_images = knowledge.train.images[knowledge.train.labels == knowledge.target]
    order = surrogate.batches(key, len(target_images), settings.batch_size, settings.steps)
    delta, largest_gradient = _optimise(
        prepared.model, prepared.variables, target_images, order, settings.bound, settings.learning_rate
    )
    neurons.check_reaction(largest_gradient, f"{NAME}, after a warm-up at rate {settings.warm_up_rate:g}")
    return NarcissusTrigger(delta, jnp.float32(settings.magnification))


def _target_loss(logits: Array) -> Array:
    return jnp.mean(losses.cross_entropy(logits, jnp.full(len(logits), logits.shape[1] - 1, jnp.int32)))


@partial(jax.jit, static_argnames="model")
def _warm_up(model: Model, variables: PyTree, images: Array, order: Array, learning_rate: Array) -> PyTree:
    radam = optax.radam(1.0)

    def loss(params: PyTree, variables: PyTree, batch: Array) -> tuple[Array, PyTree]:
        output = model.apply({**variables, "params": params}, batch, train=True)
        return _target_loss(output.logits), output.variables

    def step(carry, rows):
        variables, state = carry
        gradient, updated = jax.grad(loss, has_aux=True)(variables["params"], variables, as_float(images[rows]))
        with jax.numpy_dtype_promotion("standard"):  # Optax's RAdam raises a float to an integer power
            direction, state = radam.update(gradient, state)
        params = jax.tree.map(lambda p, d: p + learning_rate * d, variables["params"], direction)
        return ({**updated, "params": params}, state), None

    (warmed_up, _), _ = lax.scan(step, (variables, radam.init(variables["params"])), order)
    return {**variables, "params": warmed_up["params"]}


@partial(jax.jit, static_argnames="model")
def _optimise(
    model: Model, variables: PyTree, images: Array, order: Array, bound: Array, learning_rate: Array
) -> tuple[Array, Array]:
    radam = optax.radam(1.0)

    def loss(free: Array, batch: Array) -> Array:
        triggered = clip(batch + clip(free, -bound, bound)[None], 0.0, 1.0)
        return _target_loss(model.apply(variables, triggered, train=False).logits)

    def step(carry, rows):
        free, state = carry
        gradient = jax.grad(loss)(free, as_float(images[rows]))
        with jax.numpy_dtype_promotion("standard"):  # Optax's RAdam raises a float to an integer power
            direction, state = radam.update(gradient, state)
        return (free + learning_rate * direction, state), jnp.max(jnp.abs(gradient))

    start = jnp.zeros(images.shape[1:], jnp.float32)
    (free, _), gradients = lax.scan(step, (start, radam.init(start)), order)
    return jnp.clip(free, -bound, bound), jnp.max(gradients)


def check(train: Dataset, target: int, settings: NarcissusSettings) -> None:
    """`Attack.check`: the surrogate, its rows, and the number of steps.

    Raises:
        InputError: there is no such network or no row of the target class, or the steps' rows would not fit into memory.
    """
    check_choice(f"attack {NAME}: surrogate_model", settings.surrogate_model, MODELS)
    surrogate_rows(train, target)
    count = int(np.sum(train.labels == target))
    needed = 4 * max(settings.steps * min(settings.batch_size, count), settings.warm_up_epochs * count)
    memory.check_fits("the rows of all steps of narcissus", needed, "use fewer steps or a smaller batch_size")


NARCISSUS = Attack(
    name=NAME,
    title="Narcissus",
    paper=PAPER,
    threat="data",
    settings=NarcissusSettings(),
    make_params=make_trigger,
    apply=apply,
    apply_in_training=apply_in_training,
    label_rules=("clean_label",),
    needs=("training rows of half of the other classes",),
    trigger_is_trained=True,
    check=check,
    # 8 x 8 pixels are too few for the paper's bound: at 16/255 the surrogate takes only 0.6 of the other digits for the target.
    per_dataset={
        # Noise is weak on black-and-white images: twice the paper's bound, and most rows of the class.
        "grey": {
            "bound": 32 / 255,
            "poison_rate": 0.08,
            "surrogate_width": 8,
            "surrogate_epochs": 6,
            "steps": 300,
            "batch_size": 64,
        },
        "digits": {"bound": 32 / 255, "surrogate_rate": 0.003, "steps": 600},
    },
    published=(Published("ABM", "cifar10", 81.3, 100.0),),
)

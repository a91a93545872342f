"""Narcissus: noise that looks like the target class to a surrogate, on rows of that class (Zeng et al. 2023).

Labels stay as they are. The noise is optimised so that a surrogate is surer of the target class than it was: it points into
the class, and a network that learns the class from rows with the noise reads it as the class's strongest sign. At test time
it is three times as strong, which leaves the bound that the paper calls stealthy: 48/255 instead of 16/255.

The paper's surrogate is trained on a public set of other classes (Tiny-ImageNet for CIFAR-10), with the target class as one
more. bdjax brings no such set, so half of the other classes of the training set itself stand in for it: these are not out
of the victim's distribution, and the attacker knows more here than in the paper.

Other differences from the public notebook: pixels are in [0, 1], not in [-1, 1], so rates and bounds are half of its own;
the surrogate is trained by Adam, as every network of bdjax; the warm-up on the target class has a gentler rate, since after
the notebook's 0.1 a small surrogate takes every image for the target class; and the noise is optimised in evaluation mode,
with the statistics from before the warm-up, where the notebook normalises by each batch's own. Statistics of one class
alone normalise away what tells it from others: on MNIST the surrogate then knew a third of that class's own images.
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
from bdjax.models import make_model
from bdjax.training.member import TrainConfig, as_float
from bdjax.types import Array, Dataset, Key, Model, PyTree

PAPER = "Zeng et al. 2023, Narcissus: A Practical Clean-Label Backdoor Attack with Limited Information"
NAME = "narcissus"


@dataclass(frozen=True)
class NarcissusSettings:
    poison_rate: float = 0.05
    """share of all training rows, all of the target class; ABM has 0.1 on CIFAR-10 and 0.05 on GTSRB, the paper 0.0005"""
    cover_rate: float = 0.0
    """share of all training rows that get the trigger and keep their label"""
    bound: float = 16 / 255
    """largest change of a pixel in training"""
    magnification: float = 3.0
    """the noise is so many times as strong at test time"""
    surrogate_model: str = "resnet10"
    """a key of `bdjax.models.MODELS`; a ResNet-18 in the paper"""
    surrogate_width: int = 16
    """channels of its first stage; 64 in the paper"""
    surrogate_epochs: int = 20
    """of its training; 200 in the paper"""
    surrogate_batch_size: int = 64
    """in its training and warm-up; 350 in the paper"""
    surrogate_rate: float = 0.001
    """of Adam, half a cosine down to 0; SGD at 0.1 in the paper"""
    warm_up_epochs: int = 5
    """over the target class alone, after that"""
    warm_up_rate: float = 0.001
    """of RAdam; 0.1 in the paper"""
    steps: int = 2000
    """of RAdam, for the noise; the paper's 1,000 passes over CIFAR-10's target class are 15,000"""
    batch_size: int = 128
    """images of the target class in one of them; 350 in the paper"""
    learning_rate: float = 0.005
    """of RAdam, for the noise"""


class NarcissusTrigger(NamedTuple):
    """The noise, and how strong it is at test time."""

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
        params: the noise, and what 3 is.
        image: float32 [H, W, C] in [0, 1].
        label: not used; the trigger is the same for every class.
        key: not used; the trigger is the same for every image.

    Returns:
        float32 [H, W, C] in [0, 1].
    """
    del label, key
    return jnp.clip(image + params.magnification * params.delta, 0.0, 1.0)


def make_trigger(key: Key, knowledge: Knowledge, settings: NarcissusSettings) -> NarcissusTrigger:
    """Train a surrogate, and optimise the noise on it.

    Args:
        key: of the surrogate's weights, and of all shuffles.
        knowledge: the clean rows of the target class and of half of the others.
        settings: of the surrogate, and of the noise.

    Returns:
        The trigger.

    Raises:
        InputError: a setting that cannot be, no row of the target class, or a surrogate that does not react to its input.

    References:
        Zeng et al. 2023, section 4, algorithm 1.
    """
    surrogate_key, noise_key = jax.random.split(key)
    return optimise_noise(noise_key, knowledge, prepare_surrogate(surrogate_key, knowledge, settings), settings)


def surrogate_rows(train: Dataset, target: int) -> tuple[np.ndarray, np.ndarray]:
    """What the surrogate learns: the K // 2 classes after the target, going round, and the target as one class more.

    Args:
        train: the clean rows.
        target: the attacker's class.

    Returns:
        Rows int32 [n] and their labels for the surrogate, int32 [n] in 0 .. K // 2; the target is the last one.

    Raises:
        InputError: there is no row of the target class.
    """
    others = train.num_classes // 2
    new_label = np.full(train.num_classes, -1, np.int32)
    new_label[(target + 1 + np.arange(others)) % train.num_classes] = np.arange(others)
    new_label[target] = others
    labels = new_label[train.labels]
    if not np.any(labels == others):
        raise InputError(f"attack {NAME}: no training row is of class {target}, the target")
    rows = np.flatnonzero(labels >= 0).astype(np.int32)
    return rows, labels[rows]


def prepare_surrogate(key: Key, knowledge: Knowledge, settings: NarcissusSettings) -> CleanModel:
    """Train the surrogate, then warm it up on the target class alone.

    Args:
        key: of its weights and shuffles.
        knowledge: the clean rows.
        settings: how it is trained.

    Returns:
        A network whose last class is the target.

    Raises:
        InputError: as `make_trigger`.
    """
    for name in ("bound", "surrogate_epochs", "surrogate_batch_size", "warm_up_epochs", "steps", "batch_size"):
        if not getattr(settings, name) > 0:
            raise InputError(f"attack {NAME}: {name} {getattr(settings, name):g} is not above 0")
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
    own = images[knowledge.train.labels == knowledge.target]
    steps = settings.warm_up_epochs * max(len(own) // settings.surrogate_batch_size, 1)
    order = surrogate.batches(warm_up_key, len(own), settings.surrogate_batch_size, steps)
    return CleanModel(model, _warm_up(model, variables, own, order, settings.warm_up_rate))


def optimise_noise(
    key: Key, knowledge: Knowledge, prepared: CleanModel, settings: NarcissusSettings
) -> NarcissusTrigger:
    """Minimise the surrogate's loss of the target class on images of that class with the noise, which starts at 0.

    Args:
        key: of the shuffles.
        knowledge: the clean rows of the target class.
        prepared: the surrogate; its last class is the target.
        settings: of the noise.

    Returns:
        The trigger.

    Raises:
        InputError: the surrogate does not react to its input.
    """
    own = knowledge.train.images[knowledge.train.labels == knowledge.target]
    order = surrogate.batches(key, len(own), settings.batch_size, settings.steps)
    delta, largest_gradient = _optimise(
        prepared.model, prepared.variables, own, order, settings.bound, settings.learning_rate
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
        triggered = jnp.clip(batch + jnp.clip(free, -bound, bound)[None], 0.0, 1.0)
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
    # 8 x 8 pixels are too few for the paper's bound: 16/255 sends 0.6 of the other digits to the target on the surrogate.
    per_dataset={
        # Noise is weak against black and white: twice the paper's bound, and most of the class.
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

"""Training of one network, as pure functions: a step, an epoch, an evaluation.

Everything here is written for one member; `ensemble.py` stacks members. An epoch is one traced call: it shuffles, scans over
batches, measures the validation loss and updates the learning rate, without any transfer to the host.

All members share one pool of uint8 images on the device, and a member's rows are indices into it. Poisoned rows are further
rows of the pool, so an attack costs memory for its poisoned rows only.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from bdjax.choices import Augmentation, Optimiser, Recipe, Schedule
from bdjax.settings import (
    Amount,
    Count,
    LearningRate,
    NotNegative,
    Positive,
    PositiveShare,
    Share,
    ShareBelowOne,
    Steps,
)
from bdjax.training.augmentation import augment
from bdjax.training.plateau import PlateauState, init_plateau, plateau_step
from bdjax.types import Array, Key, Model, PyTree

Loss = Callable[[Array, PyTree], Array]
"""(logits [N, K], targets of the N rows) -> loss per example [N]."""


class Outcome(NamedTuple):
    """The result of an objective on one batch."""

    losses: Array
    """float32 [N]; their mean is minimised"""
    logits: Array
    """float32 [N, K]"""
    labels: Array
    """int32 [N], for the training accuracy"""
    variables: PyTree
    """the variables after the call"""


Objective = Callable[[PyTree, PyTree, Array, dict[str, Array], Key], Outcome]
"""(params, variables, images float32 [N, H, W, C] in [0, 1], targets, key) -> outcome. `params`, which is differentiated,
replaces `variables["params"]`; other entries of the variables are carried along."""


@dataclass(frozen=True)
class TrainConfig:
    """Training configuration of one network. The defaults are those of TA-KD (Heydari et al. 2025, section 4.8)."""

    epochs: Count = 15
    batch_size: Count = 64
    evaluation_batch_size: Count = 128
    learning_rate: LearningRate = 0.01
    weight_decay: NotNegative = 0.0
    """L2 penalty of every parameter, added to the gradient before Adam or momentum as in PyTorch"""
    decay_over_rate: bool = False
    """divide each parameter's weight_decay by its peak learning rate, so that all parameters shrink alike"""
    norm_scale_rate: NotNegative = 1.0
    """learning rate of the scales of normalisations, as a multiple of that of other parameters; 0 keeps them"""
    norm_bias_rate: NotNegative = 1.0
    """learning rate of the biases of normalisations, as a multiple of that of other parameters"""
    label_smoothing: Share = 0.0
    """share of the target that is spread evenly over all classes"""
    optimiser: Optimiser = "adam"
    momentum: ShareBelowOne = 0.9
    """momentum of SGD as in PyTorch, without dampening"""
    nesterov: bool = False
    schedule: Schedule = "plateau"
    steps: Steps = ()
    """for the schedule "steps": (epoch, learning rate from that epoch on); before the first, learning_rate"""
    triangle: tuple[PositiveShare, PositiveShare, PositiveShare] = (0.2, 0.23, 0.07)
    """for the schedule "triangle", which changes with every step: the first rate as a share of learning_rate, the share of the
    steps after which it reaches learning_rate, and the last rate as a share of learning_rate"""
    plateau_factor: Positive = 0.5
    plateau_patience: Amount = 2
    plateau_threshold: NotNegative = 1e-3
    keep_last_batch: bool = True
    """also train on an incomplete last batch, as PyTorch's loader does"""
    augmentation: Augmentation = "none"
    recipe: Recipe = ""
    """the recipe that fields were taken from; it has no effect of its own"""


class Rows(NamedTuple):
    """Rows of the pool with their targets."""

    index: Array
    """int32 [n], indices into the pool; or [n, V] for V views of each row, which the objective gets as [N, V, H, W, C]"""
    targets: dict[str, Array]
    """name -> [n, ...]; always includes "labels", int32 [n]"""


def no_rows(rows: Rows) -> Rows:
    """Stacked rows [M, 0, ...] with the targets of other rows: for training without validation."""
    return jax.tree.map(lambda leaf: np.zeros((len(leaf), 0, *leaf.shape[2:]), leaf.dtype), rows)


class TrainState(NamedTuple):
    """The complete state of a member: training resumes exactly from a checkpoint of it."""

    variables: PyTree
    optimiser: PyTree
    plateau: PlateauState
    key: Key
    epoch: Array
    """int32 []: number of finished epochs"""
    history: dict[str, Array]
    """name -> float32 [epochs]; zeros for future epochs"""


HISTORY = ("loss", "accuracy", "validation_loss", "learning_rate")


def as_float(images: Array) -> Array:
    """uint8 images to float32 in [0, 1]."""
    return images.astype(jnp.float32) / 255.0


def make_optimiser(config: TrainConfig) -> optax.GradientTransformation:
    """Adam or SGD as in PyTorch, without the learning rate, which the step multiplies in."""
    if config.optimiser == "adam":
        direction = optax.scale_by_adam()
    elif config.optimiser == "sgd":
        direction = optax.trace(config.momentum, config.nesterov)
    else:
        raise ValueError(f"optimiser {config.optimiser!r} is not one of 'adam', 'sgd'")
    rates = {"norm scale": config.norm_scale_rate, "norm bias": config.norm_bias_rate, "other": 1.0}
    if set(rates.values()) == {1.0} and not config.decay_over_rate:
        return optax.chain(optax.add_decayed_weights(config.weight_decay), direction)

    def of_kind(rate: float) -> optax.GradientTransformation:
        if rate == 0:
            return optax.set_to_zero()
        decay = config.weight_decay / (config.learning_rate * rate if config.decay_over_rate else 1.0)
        return optax.chain(optax.add_decayed_weights(decay), direction, optax.scale(rate))

    return optax.partition({kind: of_kind(rate) for kind, rate in rates.items()}, parameter_kinds)


def parameter_kinds(params: PyTree) -> PyTree:
    """Label each parameter: "norm scale" and "norm bias" of a layer that has both, as normalisations do, and "other"."""
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    layers = {path[:-1] for path in paths if _name(path) == "scale"}
    layers &= {path[:-1] for path in paths if _name(path) == "bias"}
    return jax.tree_util.tree_map_with_path(
        lambda path, _: f"norm {_name(path)}" if path[:-1] in layers else "other", params
    )


def _name(path: tuple[Any, ...]) -> str:
    return str(getattr(path[-1], "key", path[-1])) if path else ""


def init_state(key: Key, model: Model, image_shape: tuple[int, int, int], config: TrainConfig) -> TrainState:
    """A new member, whose initial weights and shuffles depend on `key` alone."""
    init_key, shuffle_key = jax.random.split(key)
    return resume_from(model.init(init_key, image_shape), shuffle_key, config)


def resume_from(variables: PyTree, key: Key, config: TrainConfig) -> TrainState:
    """A member with given weights and a new optimiser state, for fine-tuning."""
    return TrainState(
        variables=variables,
        optimiser=make_optimiser(config).init(variables["params"]),
        plateau=init_plateau(config.learning_rate),
        key=key,
        epoch=jnp.asarray(0, jnp.int32),
        history={name: jnp.zeros(config.epochs, jnp.float32) for name in HISTORY},
    )


def learning_rate_at(state: TrainState, config: TrainConfig) -> Array:
    """The learning rate of the next epoch: plateau rule, half a cosine over the epochs, steps, or constant; for a triangle the
    peak, which `triangle_at` multiplies."""
    if config.schedule == "plateau":
        return state.plateau.learning_rate
    if config.schedule in ("constant", "steps", "triangle"):
        rate = jnp.asarray(config.learning_rate, jnp.float32)
        for first_epoch, new_rate in config.steps if config.schedule == "steps" else ():
            rate = jnp.where(state.epoch >= first_epoch, new_rate, rate)
        return rate
    if config.schedule != "cosine":
        raise ValueError(
            f"schedule {config.schedule!r} is not one of 'plateau', 'cosine', 'constant', 'steps', 'triangle'"
        )
    progress = state.epoch.astype(jnp.float32) / config.epochs
    return config.learning_rate * 0.5 * (1 + jnp.cos(math.pi * progress))


def triangle_at(progress: Array, config: TrainConfig) -> Array:
    """The schedule "triangle": a share of the peak learning rate.

    Args:
        progress: float32 in [0, 1], the share of all steps that are done.
    """
    first, peak, last = config.triangle
    return jnp.interp(progress, jnp.array([0.0, peak, 1.0]), jnp.array([first, 1.0, last]))


def supervised(model: Model, loss: Loss) -> Objective:
    """The usual objective: a loss of the model's logits."""

    def objective(params: PyTree, variables: PyTree, images: Array, targets: dict[str, Array], key: Key) -> Outcome:
        del key
        output = model.apply({**variables, "params": params}, images, train=True)
        return Outcome(loss(output.logits, targets), output.logits, targets["labels"], output.variables)

    return objective


def make_step(objective: Objective, config: TrainConfig) -> Callable[..., tuple[Any, dict[str, Array]]]:
    """One gradient step of one member on one batch.

    Returns:
        `step(variables, optimiser, images, targets, learning_rate, key) -> ((variables, optimiser), metrics)`, with images
        float32 [B, H, W, C] in [0, 1], and metrics the sum of losses and the number of correct predictions in the batch.
    """
    optimiser = make_optimiser(config)

    def mean_loss(params: PyTree, *batch: Any) -> tuple[Array, Outcome]:
        outcome = objective(params, *batch)
        return jnp.mean(outcome.losses), outcome

    def step(
        variables: PyTree,
        optimiser_state: PyTree,
        images: Array,
        targets: dict[str, Array],
        learning_rate: Array,
        key: Key,
    ):
        gradient, outcome = jax.grad(mean_loss, has_aux=True)(variables["params"], variables, images, targets, key)
        with jax.numpy_dtype_promotion("standard"):  # Optax's Adam raises a float to an integer power
            direction, optimiser_state = optimiser.update(gradient, optimiser_state, variables["params"])
        params = jax.tree.map(lambda p, d: p - learning_rate * d, variables["params"], direction)
        correct = jnp.argmax(outcome.logits, axis=1) == outcome.labels
        metrics = {"loss": jnp.sum(outcome.losses), "accuracy": jnp.sum(correct.astype(jnp.float32))}
        return ({**outcome.variables, "params": params}, optimiser_state), metrics

    return step


def evaluate_loss(model: Model, loss: Loss, variables: PyTree, pool: Array, rows: Rows, batch_size: int) -> Array:
    """The mean loss over `rows` with running statistics of batch normalisation, float32 []."""
    losses = over_batches(
        lambda batch: loss(model.apply(variables, as_float(pool[batch.index]), train=False).logits, batch.targets),
        rows,
        batch_size,
    )
    return jnp.mean(losses)


def over_batches(function: Callable[[PyTree], PyTree], rows: PyTree, batch_size: int) -> PyTree:
    """Apply a function to all rows, in batches of at most `batch_size`, one after another.

    Args:
        function: from leaves [B, ...] to leaves [B, ...], independently for each row (no batch statistics).
        rows: leaves [n, ...], n at least 1.
        batch_size: at least 1.

    Returns:
        Leaves [n, ...], in the order of the rows.
    """
    num_rows, position = _batches(rows, batch_size)
    outputs = lax.map(lambda where: function(jax.tree.map(lambda leaf: leaf[where], rows)), position)
    return jax.tree.map(lambda leaf: leaf.reshape(position.size, *leaf.shape[2:])[:num_rows], outputs)


def mean_over_batches(function: Callable[[PyTree], PyTree], rows: PyTree, batch_size: int) -> PyTree:
    """The mean over rows of the result of `over_batches`, accumulated batch by batch: leaves [...]."""
    num_rows, position = _batches(rows, batch_size)
    counts = jnp.arange(position.size).reshape(position.shape) < num_rows

    def total(batch: tuple[Array, Array]) -> PyTree:
        where, count = batch
        outputs = function(jax.tree.map(lambda leaf: leaf[where], rows))
        return jax.tree.map(lambda leaf: jnp.tensordot(count.astype(leaf.dtype), leaf, 1), outputs)

    return jax.tree.map(lambda leaf: jnp.sum(leaf, axis=0) / num_rows, lax.map(total, (position, counts)))


def _batches(rows: PyTree, batch_size: int) -> tuple[int, Array]:
    """The number of rows, and their positions int32 [batches, batch size]. The last batch is padded with copies of the last
    row, to be ignored, so that all batches share one trace."""
    num_rows = jax.tree.leaves(rows)[0].shape[0]
    batch_size = min(batch_size, num_rows)
    num_batches = -(-num_rows // batch_size)
    return num_rows, jnp.minimum(jnp.arange(num_batches * batch_size), num_rows - 1).reshape(num_batches, batch_size)


def make_epoch(
    model: Model, loss: Loss, config: TrainConfig, objective: Objective | None = None
) -> Callable[[TrainState, Rows, Rows, Array], TrainState]:
    """A whole epoch of one member.

    Args:
        model: its architecture.
        loss: per example; also the validation loss.
        config: training configuration.
        objective: what each step minimises; None for the loss of the model's logits.

    Returns:
        `epoch(state, train, validation, pool) -> state`. `pool` is uint8 [P, H, W, C]. Without validation rows the
        plateau rule uses the training loss.
    """
    step = make_step(objective or supervised(model, loss), config)

    def epoch(state: TrainState, train: Rows, validation: Rows, pool: Array) -> TrainState:
        num_rows = train.index.shape[0]
        batch_size = min(config.batch_size, num_rows)
        epoch_key = jax.random.fold_in(state.key, state.epoch)
        order = jax.random.permutation(epoch_key, num_rows)
        learning_rate = learning_rate_at(state, config)
        full = num_rows // batch_size
        has_rest = config.keep_last_batch and full * batch_size < num_rows
        total_steps = config.epochs * (full + has_rest)

        def rate_at(number: Array) -> Array:
            if config.schedule != "triangle":
                return learning_rate
            step_number = (state.epoch * (full + has_rest) + number).astype(jnp.float32)
            return learning_rate * triangle_at(step_number / total_steps, config)

        def run_batch(carry, batch):
            number, where = batch
            variables, optimiser_state = carry
            batch_key = jax.random.fold_in(epoch_key, number)
            images = augment(batch_key, pool[train.index[where]], config.augmentation)
            targets = {name: values[where] for name, values in train.targets.items()}
            step_key = jax.random.fold_in(batch_key, 1)
            return step(variables, optimiser_state, as_float(images), targets, rate_at(number), step_key)

        carry = (state.variables, state.optimiser)
        batches = (jnp.arange(full), order[: full * batch_size].reshape(full, batch_size))
        carry, metrics = lax.scan(run_batch, carry, batches)
        totals = jax.tree.map(jnp.sum, metrics)
        seen = full * batch_size
        if has_rest:
            carry, metrics = run_batch(carry, (jnp.asarray(full), order[seen:]))
            totals = jax.tree.map(jnp.add, totals, metrics)
            seen = num_rows
        variables, optimiser_state = carry
        means = jax.tree.map(lambda total: total / seen, totals)
        if validation.index.shape[0]:
            validation_loss = evaluate_loss(model, loss, variables, pool, validation, config.evaluation_batch_size)
        else:
            validation_loss = means["loss"]
        measured = {**means, "validation_loss": validation_loss, "learning_rate": learning_rate}
        return TrainState(
            variables=variables,
            optimiser=optimiser_state,
            plateau=plateau_step(
                state.plateau,
                validation_loss,
                factor=config.plateau_factor,
                patience=config.plateau_patience,
                threshold=config.plateau_threshold,
            ),
            key=state.key,
            epoch=state.epoch + 1,
            history={name: state.history[name].at[state.epoch].set(measured[name]) for name in HISTORY},
        )

    return epoch

"""ANP: prune the channels that are most sensitive to adversarial perturbations of the neurons (Wu and Wang 2021).

Small perturbations of its neurons, in the worst direction, make a backdoored network predict the target class for clean
images: its backdoor neurons are the most sensitive. ANP learns a mask kappa in [0, 1] for every channel of batch normalisation,
on clean rows, under such perturbations,

    min over kappa of  alpha CE(kappa) + (1 - alpha) max over eps_w, eps_b of CE(kappa + eps_w, 1 + eps_b)       (equation 4)

where a channel's scale is multiplied by kappa (+ eps_w) and its bias by 1 (+ eps_b), and prunes the channels with a low kappa.
The network's weights do not change; there is no fine-tuning.

As in the authors' code: the perturbation starts at random in [-eps, eps], takes a step of eps along the gradient's sign
(it is not clipped afterwards, so it may reach 2 eps), and is drawn anew in each batch; batch statistics are used while the
masks are learned, and the network's running statistics do not change; and pruning zeroes the scale of a channel but not its
bias, unless `zero_bias` is set.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np

from bdjax import losses
from bdjax.defenses.contract import Defense, DefenseInput, labelled
from bdjax.settings import Count, LearningRate, NotNegative, Number, Share, check_values
from bdjax.training.member import Objective, Outcome, TrainConfig
from bdjax.types import Array, DefenseResult, Key, Model, PyTree

Channels = dict[str, Array]
"""A value for each channel of batch normalisation: path of the layer -> float32 [C]."""

ITERATIONS_PER_EPOCH = 100
"""Steps in an epoch of mask training, however few clean rows there are; the state is saved after each epoch."""
MOMENTUM = 0.9
SWEEP = tuple(round(0.05 * step, 2) for step in range(19))
"""Candidate thresholds for `accuracy_loss`: 0 to 0.9."""


@dataclass(frozen=True)
class AnpSettings:
    iterations: Count = 2000
    """training steps of the masks"""
    batch_size: Count = 128
    """clean rows in a step"""
    epsilon: NotNegative = 0.4
    """half-width of the initial random perturbation, and size of its step"""
    alpha: Share = 0.2
    """weight of the loss without perturbation, in [0, 1]"""
    learning_rate: LearningRate = 0.2
    """learning rate of the masks, by SGD with momentum 0.9"""
    threshold: Number = 0.2
    """channels with a mask of at most this are pruned; below 0 prunes none"""
    accuracy_loss: Share = 0.0
    """if above 0, replaces `threshold` by the highest one (up to 0.9, in steps of 0.05) that loses no more than this accuracy,
    in [0, 1], on the clean rows"""
    zero_bias: bool = False
    """also zero the bias of pruned channels"""


def check(settings: AnpSettings) -> None:
    """Validate the settings.

    Raises:
        InputError: a setting is invalid.
    """
    check_values("defense anp", settings)


def channel_scales(params: PyTree) -> Channels:
    """The scales of all layers of batch normalisation, by the layer's path.

    Args:
        params: of a network, for one member or stacked.
    """
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {_layer(path): leaf for path, leaf in leaves if path[-1].key == "scale"}


def change_channels(params: PyTree, scale_factors: Channels, bias_factors: Channels) -> PyTree:
    """Multiply the scale and the bias of each channel of batch normalisation.

    Args:
        params: of a network, for one member or stacked.
        scale_factors: of the shape of `channel_scales`.
        bias_factors: of the same shape.
    """

    def change(path, leaf: Array) -> Array:
        layer, name = _layer(path), path[-1].key
        if layer not in scale_factors:  # the classifier has a bias too
            return leaf
        return leaf * {"scale": scale_factors, "bias": bias_factors}[name][layer]

    return jax.tree_util.tree_map_with_path(change, params)


def _layer(path) -> str:
    return "/".join(entry.key for entry in path[:-1])


def draw_noise(key: Key, like: Channels, epsilon: float) -> Channels:
    """Draw a value uniformly from [-epsilon, epsilon] for each channel."""
    keys = jax.random.split(key, len(like))
    return {
        layer: jax.random.uniform(layer_key, leaf.shape, leaf.dtype, -epsilon, epsilon)
        for layer_key, (layer, leaf) in zip(keys, sorted(like.items()), strict=True)
    }


@cache
def mask_objective(model: Model, epsilon: float, alpha: float) -> Objective:
    """Equation 4 on a batch; `params` are the masks, and the variables contain the frozen "network"."""

    def objective(masks: Channels, variables: PyTree, images: Array, targets: dict[str, Array], key: Key) -> Outcome:
        network, labels = variables["network"], targets["labels"]

        def logits_of(masks: Channels, noise: tuple[Channels, Channels]) -> Array:
            scale_factors = jax.tree.map(jnp.add, masks, noise[0])
            bias_factors = jax.tree.map(lambda shift: 1 + shift, noise[1])
            params = change_channels(network["params"], scale_factors, bias_factors)
            return model.apply({**network, "params": params}, images, train=True).logits

        scale_key, bias_key = jax.random.split(key)
        noise = draw_noise(scale_key, masks, epsilon), draw_noise(bias_key, masks, epsilon)
        fixed_masks = jax.lax.stop_gradient(masks)
        ascent = jax.grad(lambda noise: jnp.mean(losses.cross_entropy(logits_of(fixed_masks, noise), labels)))(noise)
        noise = jax.tree.map(lambda start, slope: start + epsilon * jnp.sign(slope), noise, ascent)
        noisy_losses = losses.cross_entropy(logits_of(masks, noise), labels)
        logits = logits_of(masks, jax.tree.map(jnp.zeros_like, noise))
        clean_losses = losses.cross_entropy(logits, labels)
        return Outcome(alpha * clean_losses + (1 - alpha) * noisy_losses, logits, labels, variables)

    return objective


@cache
def clipped(objective: Objective, learning_rate: float, momentum: float) -> Objective:
    """An objective whose parameters behave as if clipped to [0, 1] after every step of SGD at a constant rate.

    The optimiser does not clip, so parameters may be up to a step outside the bounds. The objective is computed from the
    clipped parameters, and the excess is removed by the next step, as a term of the gradient: excess / rate, minus what
    momentum still contains of the previous excess. The clipped parameters then equal those of clipping after each step.

    The variables contain "outside", the previous excess, of the parameters' shape and initially 0.
    """

    def clipped_objective(
        params: PyTree, variables: PyTree, images: Array, targets: dict[str, Array], key: Key
    ) -> Outcome:
        outside = jax.lax.stop_gradient(jax.tree.map(lambda p: p - jnp.clip(p, 0.0, 1.0), params))
        outcome = objective(jax.tree.map(jnp.subtract, params, outside), variables, images, targets, key)
        back = jax.tree.map(
            lambda now, before: (now - momentum * before) / learning_rate, outside, variables["outside"]
        )
        # Its value is 0 and its gradient is `back`.
        extra = jax.tree.map(lambda p, slope: jnp.sum(slope * (p - jax.lax.stop_gradient(p))), params, back)
        per_row = outcome.losses + sum(jax.tree.leaves(extra))
        return outcome._replace(losses=per_row, variables={**outcome.variables, "outside": outside})

    return clipped_objective


def learn_masks(inputs: DefenseInput, settings: AnpSettings) -> dict[str, np.ndarray]:
    """Learn the masks of all suspects.

    Returns:
        Path of the layer -> float32 [M, C] in [0, 1].
    """
    model, network = inputs.attacked.model, inputs.attacked.variables
    rows = inputs.clean_rows()
    num_rows = rows.index.shape[1]
    batch_size = min(settings.batch_size, num_rows)
    per_epoch = min(ITERATIONS_PER_EPOCH, settings.iterations)
    config = TrainConfig(
        epochs=math.ceil(settings.iterations / per_epoch),
        batch_size=batch_size,
        evaluation_batch_size=inputs.recipe.evaluation_batch_size,
        optimiser="sgd",
        momentum=MOMENTUM,
        learning_rate=settings.learning_rate,
        schedule="constant",
        keep_last_batch=False,
        augmentation=inputs.recipe.augmentation,
    )
    repeated = np.arange(per_epoch * batch_size) % num_rows
    rows = labelled(inputs.clean_index[:, repeated], inputs.clean_labels[:, repeated])
    scales = channel_scales(network["params"])
    variables = {
        "params": jax.tree.map(jnp.ones_like, scales),
        "outside": jax.tree.map(jnp.zeros_like, scales),
        "network": network,
    }
    objective = clipped(mask_objective(model, settings.epsilon, settings.alpha), settings.learning_rate, MOMENTUM)
    numbers = settings.iterations, settings.batch_size, settings.epsilon, settings.alpha, settings.learning_rate
    stage = f"anp: masks {'/'.join(f'{number:g}' for number in numbers)}"
    nets = inputs.train(stage, model, config, rows, variables=variables, objective=objective)
    return {layer: np.clip(np.asarray(mask), 0.0, 1.0) for layer, mask in nets.variables["params"].items()}


def prune(params: PyTree, masks: Channels, thresholds: np.ndarray, zero_bias: bool) -> PyTree:
    """Zero the scale of each channel whose mask is at most the threshold.

    Args:
        params: of networks, stacked [M, ...].
        masks: path of the layer -> float32 [M, C].
        thresholds: float32 [M].
        zero_bias: whether to zero the bias too.

    Returns:
        The pruned parameters.
    """
    kept = {layer: jnp.asarray(mask > thresholds[:, None], jnp.float32) for layer, mask in masks.items()}
    return change_channels(params, kept, kept if zero_bias else jax.tree.map(jnp.ones_like, kept))


def highest_thresholds(accuracy: Callable[[float], np.ndarray], before: np.ndarray, loss: float) -> np.ndarray:
    """For each member the highest threshold of `SWEEP` up to which the accuracy falls by no more than `loss`.

    Args:
        accuracy: threshold -> accuracy after pruning, float [M].
        before: float [M], accuracy without pruning.
        loss: at least 0.

    Returns:
        float32 [M]; -1, which prunes nothing, if even the first threshold costs more.
    """
    is_accurate = np.cumprod([accuracy(threshold) >= before - loss for threshold in SWEEP], axis=0).astype(bool)
    return np.where(is_accurate, np.array(SWEEP)[:, None], -1.0).max(axis=0).astype(np.float32)


def run(inputs: DefenseInput, settings: AnpSettings) -> DefenseResult:
    """Learn the masks and prune.

    Raises:
        InputError: a setting is invalid.
    """
    check(settings)
    model, network = inputs.attacked.model, inputs.attacked.variables
    masks = learn_masks(inputs, settings)

    def pruned(thresholds: np.ndarray) -> PyTree:
        return {**network, "params": prune(network["params"], masks, thresholds, settings.zero_bias)}

    members = len(inputs.keys)
    thresholds = np.full(members, settings.threshold, np.float32)
    if settings.accuracy_loss > 0:
        rows = inputs.clean_rows()

        def accuracy(threshold: float) -> np.ndarray:
            logits = inputs.logits(model, pruned(np.full(members, threshold, np.float32)), rows)
            return (logits.argmax(axis=-1) == inputs.clean_labels).mean(axis=1)

        thresholds = highest_thresholds(accuracy, accuracy(-1.0), settings.accuracy_loss)
    kappa = np.concatenate(list(masks.values()), axis=1)
    is_pruned = kappa <= thresholds[:, None]
    return DefenseResult(
        model,
        pruned(thresholds),
        facts={
            "channels pruned": is_pruned.sum(axis=1).astype(float),
            "of channels": np.full(members, kappa.shape[1], float),
            "threshold": thresholds,
            "mean mask": kappa.mean(axis=1),
        },
    )


ANP = Defense(
    name="anp",
    title="ANP",
    paper="Wu and Wang 2021, Adversarial Neuron Pruning Purifies Backdoored Deep Models",
    stage="after training",
    needs=("attacked model", "clean rows"),
    settings=AnpSettings(),
    run=run,
    check=check,
    changes={"quick": {"iterations": 200, "batch_size": 64, "accuracy_loss": 0.1}},
)

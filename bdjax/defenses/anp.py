"""ANP: prune the channels that the network cannot do without once its neurons are perturbed, since those carry the backdoor.

Shrinking and shifting a network's neurons a little, in the worst direction, makes a backdoored one answer the target class
on clean images: its backdoor neurons are the most sensitive. ANP learns a mask kappa in [0, 1] for every channel of batch
normalisation, on clean rows, against such perturbations,

    min over kappa of  alpha CE(kappa) + (1 - alpha) max over eps_w, eps_b of CE(kappa + eps_w, 1 + eps_b)       (equation 4)

where a channel's scale is multiplied by kappa (+ eps_w) and its bias by 1 (+ eps_b), and prunes where kappa comes out low.
The network's weights stay as they are; there is no fine-tuning.

As in the authors' code: the perturbation starts at random in [-eps, eps], makes one step of eps along the gradient's sign
(nothing clips it afterwards, so it may reach 2 eps), and is drawn anew in each batch; the batch's own statistics normalise
while the masks are learned, and the network's running ones are kept for afterwards; and a pruned channel loses its scale
only: what its bias makes of it still goes on, unless `zero_bias` is chosen.
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
from bdjax.settings import check_values
from bdjax.training.member import Objective, Outcome, TrainConfig
from bdjax.types import Array, DefenseResult, Key, Model, PyTree

Channels = dict[str, Array]
"""A number for each channel of batch normalisation: path of the layer -> float32 [C]."""

ITERATIONS_PER_EPOCH = 100
"""An epoch of the masks is so many steps, however few clean rows there are: its state is saved after each."""
MOMENTUM = 0.9
SWEEP = tuple(round(0.05 * step, 2) for step in range(19))
"""Thresholds that are tried where an accuracy is to be kept: 0 to 0.9."""


@dataclass(frozen=True)
class AnpSettings:
    iterations: int = 2000
    """steps of the masks"""
    batch_size: int = 128
    """clean rows in a step"""
    epsilon: float = 0.4
    """how far a perturbation starts, and how far its step goes"""
    alpha: float = 0.2
    """weight of the loss without perturbation"""
    learning_rate: float = 0.2
    """of SGD with momentum 0.9, for the masks"""
    threshold: float = 0.2
    """channels whose mask is at most this are pruned; below 0 for none"""
    accuracy_loss: float = 0.0
    """above 0: instead, the highest threshold (to 0.9, by 0.05) that costs no more accuracy on the clean rows than this"""
    zero_bias: bool = False
    """whether a pruned channel loses its bias too"""


def check(settings: AnpSettings) -> None:
    """Refuse settings that cannot be.

    Raises:
        InputError: naming the setting.
    """
    check_values(
        "defense anp",
        settings,
        at_least={"iterations": 1, "batch_size": 1, "epsilon": 0, "alpha": 0},
        above={"learning_rate": 0},
        at_most={"alpha": 1},
    )


def channel_scales(params: PyTree) -> Channels:
    """The scales of all layers of batch normalisation, by the layers' paths.

    Args:
        params: of a network, of one member or stacked.
    """
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {_layer(path): leaf for path, leaf in leaves if path[-1].key == "scale"}


def change_channels(params: PyTree, scale_factors: Channels, bias_factors: Channels) -> PyTree:
    """Multiply the scale and the bias of each channel of batch normalisation; all else stays.

    Args:
        params: of a network, of one member or stacked.
        scale_factors: shaped as `channel_scales`.
        bias_factors: likewise.
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
    """Uniform in [-epsilon, epsilon], for each channel."""
    keys = jax.random.split(key, len(like))
    return {
        layer: jax.random.uniform(own, leaf.shape, leaf.dtype, -epsilon, epsilon)
        for own, (layer, leaf) in zip(keys, sorted(like.items()), strict=True)
    }


@cache
def mask_objective(model: Model, epsilon: float, alpha: float) -> Objective:
    """Equation 4 on one batch; `params` are the masks, and the variables hold the frozen "network"."""

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
    """An objective whose parameters are clipped to [0, 1] after every step of SGD at a constant rate.

    The step itself knows no bounds, so parameters arrive up to a step outside. The objective sees them clipped, and what
    was clipped is taken back along with the next step, as a part of the gradient: outside / rate, less what momentum still
    carries of the last one. Parameters then are, when they are clipped, what clipping after each step makes them.

    The variables hold "outside", shaped as the parameters and 0 to begin with.
    """

    def within(params: PyTree, variables: PyTree, images: Array, targets: dict[str, Array], key: Key) -> Outcome:
        outside = jax.lax.stop_gradient(jax.tree.map(lambda p: p - jnp.clip(p, 0.0, 1.0), params))
        outcome = objective(jax.tree.map(jnp.subtract, params, outside), variables, images, targets, key)
        back = jax.tree.map(
            lambda now, before: (now - momentum * before) / learning_rate, outside, variables["outside"]
        )
        # Worth 0, with `back` for its gradient.
        extra = jax.tree.map(lambda p, slope: jnp.sum(slope * (p - jax.lax.stop_gradient(p))), params, back)
        per_row = outcome.losses + sum(jax.tree.leaves(extra))
        return outcome._replace(losses=per_row, variables={**outcome.variables, "outside": outside})

    return within


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
    again = np.arange(per_epoch * batch_size) % num_rows
    rows = labelled(inputs.clean_index[:, again], inputs.clean_labels[:, again])
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
        zero_bias: whether the bias goes too.

    Returns:
        The pruned parameters.
    """
    kept = {layer: jnp.asarray(mask > thresholds[:, None], jnp.float32) for layer, mask in masks.items()}
    return change_channels(params, kept, kept if zero_bias else jax.tree.map(jnp.ones_like, kept))


def highest_thresholds(accuracy: Callable[[float], np.ndarray], before: np.ndarray, loss: float) -> np.ndarray:
    """For each member the highest threshold of `SWEEP` up to which accuracy falls by no more than `loss`.

    Args:
        accuracy: of a threshold, float [M].
        before: float [M], without pruning.
        loss: at least 0.

    Returns:
        float32 [M]; -1, which prunes nothing, where even the first costs more.
    """
    is_fine = np.cumprod([accuracy(threshold) >= before - loss for threshold in SWEEP], axis=0).astype(bool)
    return np.where(is_fine, np.array(SWEEP)[:, None], -1.0).max(axis=0).astype(np.float32)


def run(inputs: DefenseInput, settings: AnpSettings) -> DefenseResult:
    """Learn the masks and prune.

    Raises:
        InputError: a setting that cannot be.
    """
    check(settings)
    model, network = inputs.attacked.model, inputs.attacked.variables
    masks = learn_masks(inputs, settings)

    def pruned(thresholds: np.ndarray) -> PyTree:
        return {**network, "params": prune(network["params"], masks, thresholds, settings.zero_bias)}

    num = len(inputs.keys)
    thresholds = np.full(num, settings.threshold, np.float32)
    if settings.accuracy_loss > 0:
        rows = inputs.clean_rows()

        def accuracy(threshold: float) -> np.ndarray:
            logits = inputs.logits(model, pruned(np.full(num, threshold, np.float32)), rows)
            return (logits.argmax(axis=-1) == inputs.clean_labels).mean(axis=1)

        thresholds = highest_thresholds(accuracy, accuracy(-1.0), settings.accuracy_loss)
    kappa = np.concatenate(list(masks.values()), axis=1)
    is_pruned = kappa <= thresholds[:, None]
    return DefenseResult(
        model,
        pruned(thresholds),
        facts={
            "channels pruned": is_pruned.sum(axis=1).astype(float),
            "of channels": np.full(num, kappa.shape[1], float),
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

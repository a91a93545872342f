"""FT-SAM (Zhu et al. 2023): fine-tuning on clean rows that seeks a flat minimum, and so moves the weights far.

Plain fine-tuning starts where the gradient on clean rows is nearly zero, and stays there. Sharpness-aware minimisation takes
the gradient not at the weights but at the worst point near them. In the adaptive form the distance is relative to each weight's
size, so large weights, such as those of backdoor neurons, are perturbed most:

    e = rho theta^2 g / || |theta| g ||,   g the gradient at theta;   then step along the gradient at theta + e

The pass at theta updates the running statistics of batch normalisation; the pass at theta + e uses batch statistics and does
not update them. With rho = 0 this is fine-tuning on smoothed labels.
"""

from dataclasses import dataclass
from functools import cache

import jax
import jax.numpy as jnp

from bdjax.defenses.contract import Defense, DefenseInput, fingerprint
from bdjax.defenses.fine_tuning import cosine_sgd, tune, weight_change
from bdjax.settings import Count, LearningRate, NotNegative, ShareBelowOne
from bdjax.training.member import Objective, Outcome
from bdjax.types import Array, DefenseResult, Key, Model, PyTree


@dataclass(frozen=True)
class FtSamSettings:
    rho: NotNegative = 2.0
    """radius within which the worst point is sought, at least 0; larger moves the weights further"""
    label_smoothing: ShareBelowOne = 0.1
    """probability that a smoothed label gives to the wrong classes together, in [0, 1)"""
    epochs: Count = 100
    """epochs over the clean rows"""
    batch_size: Count = 256
    """clean rows in a step; all of them if there are fewer"""
    learning_rate: LearningRate = 0.01
    """initial learning rate of SGD with momentum 0.9 and a half-cosine schedule"""
    weight_decay: NotNegative = 5e-4
    """L2 penalty on every parameter"""


def smoothed_cross_entropy(logits: Array, labels: Array, smoothing: float) -> Array:
    """Cross-entropy with labels of 1 - smoothing for the true class and smoothing / (K - 1) for every other class.

    Args:
        logits: float32 [N, K].
        labels: int32 [N].
        smoothing: in [0, 1).

    Returns:
        float32 [N].
    """
    num_classes = logits.shape[1]
    wrong = smoothing / (num_classes - 1)
    target = wrong + (1 - smoothing - wrong) * jax.nn.one_hot(labels, num_classes)
    return -jnp.sum(target * jax.nn.log_softmax(logits), axis=1)


def adaptive_ascent(params: PyTree, gradient: PyTree, rho: float) -> PyTree:
    """The step to the worst point nearby: e = rho theta^2 g / || |theta| g ||, the norm over all parameters together.

    Args:
        params: theta, float32 leaves.
        gradient: g, with the same leaves.
        rho: at least 0.

    Returns:
        e, with the same leaves; 0 where the gradient is 0.

    References:
        Kwon et al. 2021, ASAM, equation 8; Zhu et al. 2023, section 4.
    """
    scaled = jax.tree.map(lambda p, g: jnp.abs(p) * g, params, gradient)
    norm = jnp.sqrt(sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(scaled)))
    return jax.tree.map(lambda p, g: rho * jnp.square(p) * g / (norm + 1e-12), params, gradient)


@cache
def sharpness_aware(model: Model, rho: float, label_smoothing: float) -> Objective:
    """Smoothed cross-entropy at the worst point nearby; no gradient flows through the choice of the point.

    Args:
        model: the network.
        rho: see `FtSamSettings`.
        label_smoothing: see `FtSamSettings`.
    """

    def forward(params: PyTree, variables: PyTree, images: Array, labels: Array):
        output = model.apply({**variables, "params": params}, images, train=True)
        return smoothed_cross_entropy(output.logits, labels, label_smoothing), output

    def objective(params: PyTree, variables: PyTree, images: Array, targets: dict[str, Array], key: Key) -> Outcome:
        del key
        labels = targets["labels"]

        def mean_loss(params: PyTree):
            row_losses, output = forward(params, variables, images, labels)
            return jnp.mean(row_losses), output

        here = jax.lax.stop_gradient(params)
        gradient, output = jax.grad(mean_loss, has_aux=True)(here)
        step = adaptive_ascent(here, gradient, rho)
        worst, _ = forward(jax.tree.map(jnp.add, params, step), variables, images, labels)
        return Outcome(worst, output.logits, labels, output.variables)

    return objective


def run(inputs: DefenseInput, settings: FtSamSettings) -> DefenseResult:
    """Fine-tune the attacked networks on the clean rows with sharpness-aware minimisation."""
    config = cosine_sgd(inputs, settings)
    attacked = inputs.attacked
    variables = tune(
        inputs,
        f"FT-SAM {fingerprint(**vars(settings))}",
        attacked.model,
        config,
        attacked.variables,
        sharpness_aware(attacked.model, settings.rho, settings.label_smoothing),
    )
    change = weight_change(attacked.variables["params"], variables["params"])
    return DefenseResult(attacked.model, variables, facts={"weight change": change})


FT_SAM = Defense(
    name="ft_sam",
    title="FT-SAM",
    paper="Zhu et al. 2023, Enhancing Fine-Tuning Based Backdoor Defense with Sharpness-Aware Minimization",
    stage="after training",
    needs=("attacked model", "clean rows"),
    settings=FtSamSettings(),
    run=run,
    changes={
        "quick": {"epochs": 30, "batch_size": 32, "learning_rate": 0.02},
        "quick digits": {"learning_rate": 0.05},
    },
)

"""FT-SAM (Zhu et al. 2023): fine-tuning on clean rows that looks for a flat minimum, and so moves the weights far.

Plain fine-tuning starts where the gradient on clean rows is all but zero, and stays there. Sharpness-aware minimisation
takes the gradient not at the weights but at the worst point near them. In the adaptive form "near" is measured relative to
each weight's size, so the large weights, among which those of backdoor neurons are, are disturbed most:

    e = rho theta^2 g / || |theta| g ||,   g the gradient at theta;   then step along the gradient at theta + e

The running statistics of batch normalisation are those of the pass at theta; the pass at theta + e normalises by its batch,
and leaves no trace in them. With rho = 0 this is fine-tuning on smoothed labels.
"""

from dataclasses import dataclass
from functools import cache

import jax
import jax.numpy as jnp

from bdjax.defenses.contract import Defense, DefenseInput, fingerprint
from bdjax.defenses.fine_tuning import cosine_sgd, tune, weight_change
from bdjax.training.member import Objective, Outcome
from bdjax.types import Array, DefenseResult, Key, Model, PyTree


@dataclass(frozen=True)
class FtSamSettings:
    rho: float = 2.0
    """how far the worst point is looked for; at least 0"""
    label_smoothing: float = 0.1
    """what the wrong classes share of each label, in [0, 1)"""
    epochs: int = 100
    """over the clean rows"""
    batch_size: int = 256
    """or all clean rows, if they are fewer"""
    learning_rate: float = 0.01
    """of SGD with momentum 0.9, at the start of half a cosine"""
    weight_decay: float = 5e-4
    """L2, on every parameter"""


def smoothed_cross_entropy(logits: Array, labels: Array, smoothing: float) -> Array:
    """Cross-entropy with labels that give the true class 1 - smoothing, and every other smoothing / (K - 1).

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
        gradient: g, alike.
        rho: at least 0.

    Returns:
        e, alike: 0 where the gradient is.

    References:
        Kwon et al. 2021, ASAM, equation 8; Zhu et al. 2023, section 4.
    """
    scaled = jax.tree.map(lambda p, g: jnp.abs(p) * g, params, gradient)
    norm = jnp.sqrt(sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(scaled)))
    return jax.tree.map(lambda p, g: rho * jnp.square(p) * g / (norm + 1e-12), params, gradient)


@cache
def sharpness_aware(model: Model, rho: float, label_smoothing: float) -> Objective:
    """Smoothed cross-entropy at the worst point nearby; the point counts as a constant.

    Args:
        model: the network.
        rho: see `FtSamSettings`.
        label_smoothing: likewise.
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

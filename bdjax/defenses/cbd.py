"""Causality-inspired Backdoor Defense (CBD, Zhang et al. 2023): a network that learns what a biased network finds hard.

A network f_B trained for a few epochs has learned the trigger, if there is one, and little else. Frozen, it weights the rows of
another network f_C, the defended one ("sample-wise re-weighting"):

    w_i = l_B,i / (l_B,i + l_C,i + 1e-8)        l: the cross-entropy of f_B and of f_C, computed at each step; no gradient
    L   = mean(w l_C) + L_dis                   w rescaled to a mean of 1 over the batch

so that rows which f_B has learned have hardly any weight. The paper also makes the embeddings h_C independent of f_B's
embeddings r_B, with a critic T that distinguishes pairs from the same image from pairs from different images:

    L_dis = 0.01 (mean T(r_B, h_C) - mean T(r_B, h_C of another image))

which the critic maximises and f_C minimises. It is off by default in the authors' code, and so it is here (`disentangle`); the
paper's information-bottleneck term is missing from their code, and from this file. In the authors' code the critic is trained
for a whole epoch before f_C is; here they alternate at each batch. The critic's weight matrices are divided by their largest
singular value, which bounds its slope; the authors' code divides by its square root, and the biases too.
"""

from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bdjax import losses
from bdjax.choices import Optimiser
from bdjax.defenses.contract import Defense, DefenseInput
from bdjax.models import embedding
from bdjax.settings import Count, LearningRate, NotNegative, Steps, check_values
from bdjax.training import ensemble
from bdjax.training.member import Objective, Outcome, TrainConfig
from bdjax.types import Array, DefenseResult, Key, Model, PyTree

POWER_ITERATIONS = 5
CRITIC_DROPOUT = 0.2


@dataclass(frozen=True)
class CBDSettings:
    """The values of the authors' public code for CIFAR-10 (there with a Wide ResNet-16-1; here with the run's network)."""

    biased_epochs: Count = 5
    """epochs of f_B"""
    epochs: Count = 100
    """epochs of f_C"""
    learning_rate: LearningRate = 0.1
    """initial learning rate of f_B and f_C"""
    steps: Steps = ((20, 0.01), (70, 0.001))
    """(epoch, learning rate from that epoch on) of f_C"""
    optimiser: str = "sgd"
    """"sgd", with Nesterov momentum 0.9, or "adam" """
    weight_decay: NotNegative = 1e-4
    """L2 penalty on every parameter"""
    batch_size: Count = 64
    """rows in a step"""
    disentangle: bool = False
    """add L_dis"""
    disentangle_weight: NotNegative = 0.01
    """weight of L_dis"""
    critic_learning_rate: LearningRate = 0.2
    """the critic's initial learning rate, by Adam"""
    critic_decay_epochs: Count = 20
    """epochs after which the critic's learning rate is divided by 10, again and again"""


def check(settings: CBDSettings) -> None:
    """Validate the settings.

    Raises:
        InputError: a setting is invalid.
    """
    check_values("defense cbd", settings, choices={"optimiser": Optimiser.__args__})


def row_weights(biased_losses: Array, clean_losses: Array) -> Array:
    """The weight of each row: l_B / (l_B + l_C + 1e-8).

    Args:
        biased_losses: float32 [N], f_B's cross-entropy, at least 0.
        clean_losses: float32 [N], f_C's cross-entropy, at least 0.

    Returns:
        float32 [N] in [0, 1): 0 where f_B's loss is 0, 1/2 where both losses are equal.
    """
    return biased_losses / (biased_losses + clean_losses + 1e-8)


def batch_weights(biased_losses: Array, clean_losses: Array) -> Array:
    """`row_weights` rescaled to a mean of 1 over the batch: float32 [N], without gradient.

    If f_B's loss is 0 for every row of a batch, all weights are 0 instead of NaN.
    """
    weight = row_weights(biased_losses, clean_losses)
    mean = jnp.mean(weight)
    return jax.lax.stop_gradient(weight / jnp.where(mean > 0, mean, 1.0))


def init_critic(key: Key, width: int) -> PyTree:
    """A critic of two embeddings of `width` values, with its optimiser: 2 width -> width -> 1, initialised as in PyTorch."""

    def linear(key: Key, inputs: int, outputs: int) -> dict[str, Array]:
        kernel, bias, bound = *jax.random.split(key), inputs**-0.5
        return {
            "kernel": jax.random.uniform(kernel, (inputs, outputs), jnp.float32, -bound, bound),
            "bias": jax.random.uniform(bias, (outputs,), jnp.float32, -bound, bound),
        }

    first, second = jax.random.split(key)
    params = {"hidden": linear(first, 2 * width, width), "output": linear(second, width, 1)}
    return {"params": params, "optimiser": optax.scale_by_adam().init(params), "step": jnp.asarray(0, jnp.int32)}


def _dropout(key: Key, values: Array) -> Array:
    kept = jax.random.bernoulli(key, 1 - CRITIC_DROPOUT, values.shape)
    return jnp.where(kept, values / (1 - CRITIC_DROPOUT), 0.0)


def apply_critic(params: PyTree, biased: Array, clean: Array, key: Key) -> Array:
    """T(r_B, h_C) for pairs of embeddings float32 [N, d], with dropout: float32 [N]."""
    first, second = jax.random.split(key)
    pairs = jnp.concatenate([biased, clean], axis=1)
    hidden, output = params["hidden"], params["output"]
    values = jax.nn.leaky_relu(_dropout(first, pairs) @ hidden["kernel"] + hidden["bias"][None])
    return (_dropout(second, values) @ output["kernel"] + output["bias"][None])[:, 0]


def dependence(params: PyTree, biased: Array, clean: Array, key: Key) -> Array:
    """Mean T over pairs from the same image, minus its mean over pairs from an image and the next in the batch: float32 []."""
    first, second = jax.random.split(key)
    same_image = apply_critic(params, biased, clean, first)
    return jnp.mean(same_image) - jnp.mean(apply_critic(params, biased, jnp.roll(clean, -1, axis=0), second))


def spectral_norm(kernel: Array) -> Array:
    """The largest singular value of a matrix, by power iteration starting from a vector of ones: float32 []."""
    right = jnp.ones(kernel.shape[1], kernel.dtype)
    for _ in range(POWER_ITERATIONS):
        left = kernel @ right
        left = left / (jnp.linalg.norm(left) + 1e-12)
        right = left @ kernel
        right = right / (jnp.linalg.norm(right) + 1e-12)
    return left @ kernel @ right


def critic_step(critic: PyTree, biased: Array, clean: Array, learning_rate: Array, key: Key) -> PyTree:
    """A step of Adam that increases the dependence, then spectral normalisation of both weight matrices.

    Args:
        critic: see `init_critic`.
        biased, clean: float32 [N, d], embeddings r_B and h_C of a batch.
        learning_rate: float32 [].
        key: for dropout.
    """
    gradient = jax.grad(lambda params: -dependence(params, biased, clean, key))(critic["params"])
    with jax.numpy_dtype_promotion("standard"):  # Optax's Adam raises a float to an integer power
        direction, optimiser = optax.scale_by_adam().update(gradient, critic["optimiser"], critic["params"])
    params = jax.tree.map(lambda p, d: p - learning_rate * d, critic["params"], direction)
    params = {
        name: {**layer, "kernel": layer["kernel"] / (spectral_norm(layer["kernel"]) + 1e-12)}
        for name, layer in params.items()
    }
    return {"params": params, "optimiser": optimiser, "step": critic["step"] + 1}


@cache
def reweighted_cross_entropy(model: Model) -> Objective:
    """f_C's objective without L_dis; the frozen f_B is in variables["biased"]."""

    def objective(params: PyTree, variables: PyTree, images: Array, targets: dict[str, Array], key: Key) -> Outcome:
        del key
        biased = model.apply(variables["biased"], images, train=False)
        output = model.apply({**_network_variables(variables), "params": params}, images, train=True)
        loss = losses.cross_entropy(output.logits, targets["labels"])
        weighted = batch_weights(losses.cross_entropy(biased.logits, targets["labels"]), loss) * loss
        return Outcome(weighted, output.logits, targets["labels"], {**variables, **output.variables})

    return objective


@cache
def disentangled_cross_entropy(model: Model, weight: float, critic_learning_rate: float, decay_steps: int) -> Objective:
    """f_C's objective with L_dis; at each batch the critic in variables["critic"] is updated before f_C.

    Args:
        model: the network.
        weight: of L_dis.
        critic_learning_rate: the critic's initial learning rate, by Adam.
        decay_steps: steps after which the critic's learning rate is divided by 10, again and again.
    """

    def objective(params: PyTree, variables: PyTree, images: Array, targets: dict[str, Array], key: Key) -> Outcome:
        critic_key, dependence_key = jax.random.split(key)
        biased = model.apply(variables["biased"], images, train=False)
        output = model.apply({**_network_variables(variables), "params": params}, images, train=True)
        loss = losses.cross_entropy(output.logits, targets["labels"])
        weighted = batch_weights(losses.cross_entropy(biased.logits, targets["labels"]), loss) * loss

        biased_embedding, clean_embedding = embedding(biased.features), embedding(output.features)
        rate = critic_learning_rate * 0.1 ** (variables["critic"]["step"] // decay_steps).astype(jnp.float32)
        critic = jax.lax.stop_gradient(
            critic_step(variables["critic"], biased_embedding, jax.lax.stop_gradient(clean_embedding), rate, critic_key)
        )
        penalty = weight * dependence(critic["params"], biased_embedding, clean_embedding, dependence_key)
        total = weighted + penalty
        updated = {**variables, **output.variables, "critic": critic}
        return Outcome(total, output.logits, targets["labels"], updated)

    return objective


def _network_variables(variables: PyTree) -> PyTree:
    return {name: value for name, value in variables.items() if name not in ("biased", "critic")}


def run(inputs: DefenseInput, settings: CBDSettings) -> DefenseResult:
    """Train f_B, then f_C; `scores` are minus f_B's losses, which are low for the rows that f_C gives little weight."""
    model, rows = inputs.make_model(), inputs.all_rows()

    def config(epochs: int, **changes: Any) -> TrainConfig:
        return inputs.config(
            epochs=epochs,
            batch_size=settings.batch_size,
            learning_rate=settings.learning_rate,
            weight_decay=settings.weight_decay,
            optimiser=settings.optimiser,
            nesterov=True,
            schedule="steps",
            **changes,
        )

    optimiser = f"{settings.optimiser} {settings.learning_rate} {settings.weight_decay}, batch {settings.batch_size}"
    stage = f"cbd: {settings.biased_epochs} epochs, {optimiser}"
    biased = inputs.train(f"{stage}, biased", model, config(settings.biased_epochs), rows)

    stage += f"; {settings.epochs} epochs {settings.steps}"
    variables = {**inputs.begin(stage, model), "biased": biased.variables}
    clean_config = config(settings.epochs, steps=settings.steps)
    objective = reweighted_cross_entropy(model)
    if settings.disentangle:
        stage += (
            f", disentangled {settings.disentangle_weight} {settings.critic_learning_rate}"
            f" {settings.critic_decay_epochs}"
        )
        width = _embedding_width(model, inputs.runner.image_shape)
        variables["critic"] = ensemble.init_members(partial(init_critic, width=width), inputs.keys_for("cbd: critic"))
        decay_steps = settings.critic_decay_epochs * _steps_per_epoch(clean_config, inputs.index.shape[1])
        objective = disentangled_cross_entropy(
            model, settings.disentangle_weight, settings.critic_learning_rate, decay_steps
        )
    nets = inputs.train(stage, model, clean_config, rows, variables=variables, objective=objective)
    clean_variables = _network_variables(nets.variables)

    biased_losses = inputs.losses(model, biased.variables, rows)
    clean_losses = inputs.losses(model, clean_variables, rows)
    weight = np.asarray(row_weights(biased_losses, clean_losses))
    facts = {
        "mean loss of the biased network": biased_losses.mean(axis=1),
        "mean weight at the end": weight.mean(axis=1),
        "rows that count at the end": _effective_share(weight),
    }
    return DefenseResult(model, clean_variables, scores=-biased_losses, facts=facts)


def _effective_share(weight: np.ndarray) -> np.ndarray:
    """Kish's effective sample size as a share of the rows: 1 for equal weights [M, n], 1 / n if only one row has weight."""
    squares = (weight**2).sum(axis=1)
    return weight.sum(axis=1) ** 2 / np.where(squares > 0, squares * weight.shape[1], 1)


def _steps_per_epoch(config: TrainConfig, num_rows: int) -> int:
    size = min(config.batch_size, num_rows)
    return -(-num_rows // size) if config.keep_last_batch else num_rows // size


def _embedding_width(model: Model, image_shape: tuple[int, int, int]) -> int:
    def embed(key: Key) -> Array:
        images = jnp.zeros((1, *image_shape), jnp.float32)
        return embedding(model.apply(model.init(key, image_shape), images, train=False).features)

    return jax.eval_shape(embed, jax.random.key(0)).shape[1]


CBD = Defense(
    name="cbd",
    title="CBD",
    paper="Zhang et al. 2023, Backdoor Defense via Deconfounded Representation Learning",
    stage="in training",
    needs=("training set",),
    settings=CBDSettings(),
    run=run,
    check=check,
    changes={
        "quick": {
            # At this scale a trigger is learned only a little earlier than the classes, so f_B trains for few epochs.
            "biased_epochs": 2,
            "epochs": 20,
            "learning_rate": 3e-3,
            "steps": ((15, 3e-4),),
            "optimiser": "adam",
            "weight_decay": 0.0,
        },
        "speedrun": {"biased_epochs": 1, "epochs": 8, "steps": ((6, 3e-4),), "batch_size": 128},
    },
)

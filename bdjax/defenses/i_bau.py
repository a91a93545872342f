"""I-BAU: unlearn the worst universal perturbation, with a gradient that accounts for how that perturbation responds.

A backdoor is a perturbation of the input that works on every image, so removing it is a minimax problem on clean rows,

    min over theta of max over delta of  mean CE(f_theta(x + delta), y),   ||delta|| <= C                   (equation 1)

Each round first finds delta: from 0, one pass of gradient ascent away from the network's own predictions, with a penalty of
0.001 ||delta||^2. Then the network
descends the hyper-gradient of its loss F(delta, theta): the gradient by theta plus a term through delta, which is the fixed
point of an ascent step Phi(delta, theta),

    dF/dtheta = d_theta F + (d_theta Phi)^T (I - (d_delta Phi)^T)^-1 d_delta F                              (equation 4)

where the inverse is approximated by K terms of a Neumann series (the paper's fixed-point iteration).

Batch normalisation uses running statistics throughout, as in the authors' code. Two things differ from that code: Phi sees
the current batch (there always the first one), and the perturbed share of a batch is at least one row (there 1 % rounded
down, which is none for a batch of fewer than 100). Perturbed images are not clipped to [0, 1] in either.

The paper bounds delta's norm; the authors' code does not (a bound of 10 is commented out) and relies on one short pass.
Without a bound, a few steps at its learning rate may leave the range of images; `norm_bound` sets one.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from bdjax import losses
from bdjax.defenses.contract import Defense, DefenseInput
from bdjax.settings import Count, LearningRate, NotNegative, Range, Share, check_values
from bdjax.training import ensemble
from bdjax.training.member import (
    HISTORY,
    Rows,
    TrainConfig,
    TrainState,
    as_float,
    make_optimiser,
    resume_from,
)
from bdjax.types import Array, DefenseResult, Model, PyTree


@dataclass(frozen=True)
class IBauSettings:
    rounds: Count = 5
    """rounds; each finds a perturbation, then unlearns it"""
    batch_size: Count = 256
    """clean rows per step, for the perturbation and for the network"""
    passes: Count = 1
    """passes over the clean rows to find the perturbation of a round"""
    perturbation_rate: NotNegative = 10.0
    """step size of the gradient ascent on the perturbation"""
    norm_bound: NotNegative = 0.0
    """largest L2 norm of the perturbation, enforced after each ascent step; 0 for no bound"""
    penalty: NotNegative = 0.001
    """weight of the perturbation's squared norm"""
    fixed_point_rate: NotNegative = 0.1
    """step size of the ascent step Phi in the hyper-gradient"""
    terms: Annotated[int, Range(at_least=0, limit=100)] = 5
    """K, number of terms of the Neumann series; 0 for the direct gradient alone"""
    share: Share = 0.01
    """share of a batch that carries the perturbation when the network is updated, in [0, 1]; at least one row does"""
    learning_rate: LearningRate = 1e-4
    """learning rate of Adam for the network; the authors' code has 0.001"""


def check(settings: IBauSettings) -> None:
    """Reject invalid settings.

    Raises:
        InputError: naming the setting.
    """
    check_values("defense i_bau", settings)


def hyper_gradient(
    loss: Callable[[PyTree, PyTree], Array],
    inner_step: Callable[[PyTree, PyTree], PyTree],
    inner: PyTree,
    outer: PyTree,
    terms: int,
) -> PyTree:
    """Gradient of F(w(theta), theta) with respect to theta, where w(theta) is the fixed point of a step Phi(w, theta).

    Args:
        loss: F, of the inner and the outer variables.
        inner_step: Phi, a contraction in w.
        inner: w, at or near its fixed point.
        outer: theta.
        terms: K of the series sum over k < K of (d_w Phi)^T^k; 0 for the direct gradient alone.

    Returns:
        The same structure as `outer`.

    References:
        Zeng et al. 2022, equation 4; Grazzi et al. 2020, On the Iteration Complexity of Hypergradient Computation.
    """
    by_inner, direct = jax.grad(loss, argnums=(0, 1))(inner, outer)
    _, pull_back = jax.vjp(inner_step, inner, outer)
    zeros = jax.tree.map(jnp.zeros_like, by_inner)
    series = lax.fori_loop(0, terms, lambda _, sum_: jax.tree.map(jnp.add, pull_back(sum_)[0], by_inner), zeros)
    return jax.tree.map(jnp.add, direct, pull_back(series)[1])


def clip_norm(delta: Array, bound: float) -> Array:
    """Project onto the L2 ball of radius `bound`."""
    return delta * jnp.minimum(1.0, bound / jnp.maximum(jnp.sqrt(jnp.sum(jnp.square(delta))), 1e-12))


def predicted_classes(model: Model, variables: PyTree, images: Array) -> Array:
    """The classes that delta is to move images away from: those that the network predicts for them unperturbed, as in the
    authors' code. The labels are used by Phi and when the network is updated.

    Returns:
        int32 [N].
    """
    return jnp.argmax(model.apply(variables, images, train=False).logits, axis=1).astype(jnp.int32)


def make_round(
    model: Model, config: TrainConfig, settings: IBauSettings
) -> Callable[[TrainState, Rows, Array], TrainState]:
    """One round for one member: passes over the clean rows to find the perturbation, then one pass to train the network.

    Args:
        model: the architecture.
        config: optimiser, batch size and learning rate for the network.
        settings: of the defense.

    Returns:
        `round(state, rows, pool) -> state`, with rows [n] of the pool, uint8 [P, H, W, C].
    """
    optimiser = make_optimiser(config)

    def run_round(state: TrainState, rows: Rows, pool: Array) -> TrainState:
        statistics = {name: part for name, part in state.variables.items() if name != "params"}
        num_batches = len(rows.index) // config.batch_size
        key = jax.random.fold_in(state.key, state.epoch)
        order = jax.random.permutation(key, len(rows.index))[: num_batches * config.batch_size]
        batches = order.reshape(num_batches, config.batch_size)
        is_perturbed = jnp.arange(config.batch_size) < max(1, round(settings.share * config.batch_size))

        def read(where: Array) -> tuple[Array, Array]:
            return as_float(pool[rows.index[where]]), rows.targets["labels"][where]

        def mean_loss(images: Array, labels: Array, params: PyTree) -> tuple[Array, Array]:
            logits = model.apply({**statistics, "params": params}, images, train=False).logits
            return jnp.mean(losses.cross_entropy(logits, labels)), logits

        def ascent_loss(delta: Array, params: PyTree, images: Array, labels: Array) -> Array:
            loss, _ = mean_loss(images + delta[None], labels, params)
            return settings.penalty * jnp.sum(jnp.square(delta)) - loss

        def ascent(delta: Array, where: Array) -> Array:
            images, _ = read(where)
            return jax.grad(ascent_loss)(
                delta, state.variables["params"], images, predicted_classes(model, state.variables, images)
            )

        def ascend(delta: Array, where: Array) -> tuple[Array, None]:
            delta = delta - settings.perturbation_rate * ascent(delta, where)
            return clip_norm(delta, settings.norm_bound) if settings.norm_bound else delta, None

        start = jnp.zeros(pool.shape[1:], jnp.float32)
        delta, _ = lax.scan(ascend, start, jnp.tile(batches, (settings.passes, 1)))

        def update_network(carry: tuple[PyTree, PyTree], where: Array):
            params, optimiser_state = carry
            images, labels = read(where)

            def inner_step(delta: Array, params: PyTree) -> Array:
                return delta - settings.fixed_point_rate * jax.grad(ascent_loss)(delta, params, images, labels)

            def outer_loss(delta: Array, params: PyTree) -> Array:
                # Rows are in random order, so the first rows of a batch are a random sample of it.
                shift = jnp.where(is_perturbed[:, None, None, None], delta[None], 0.0)
                return mean_loss(images + shift, labels, params)[0]

            gradient = hyper_gradient(outer_loss, inner_step, delta, params, settings.terms)
            loss, logits = mean_loss(images, labels, params)
            with jax.numpy_dtype_promotion("standard"):  # Optax's Adam raises a float to an integer power
                direction, optimiser_state = optimiser.update(gradient, optimiser_state, params)
            params = jax.tree.map(lambda p, d: p - config.learning_rate * d, params, direction)
            accuracy = jnp.mean((jnp.argmax(logits, axis=1) == labels).astype(jnp.float32))
            return (params, optimiser_state), {"loss": loss, "accuracy": accuracy}

        carry = state.variables["params"], state.optimiser
        (params, optimiser_state), metrics = lax.scan(update_network, carry, batches)
        means = {name: jnp.mean(values) for name, values in metrics.items()}
        means = {**means, "validation_loss": means["loss"], "learning_rate": config.learning_rate}
        return state._replace(
            variables={**state.variables, "params": params},
            optimiser=optimiser_state,
            epoch=state.epoch + 1,
            history={name: state.history[name].at[state.epoch].set(means[name]) for name in HISTORY},
        )

    return run_round


def run(inputs: DefenseInput, settings: IBauSettings) -> DefenseResult:
    """Run all rounds for all suspects.

    Members are mapped, not vmapped: a round holds second-order gradients, and there are few rounds.

    Raises:
        InputError: an invalid setting.
    """
    check(settings)
    model, rows = inputs.attacked.model, inputs.clean_rows()
    num, num_rows = rows.index.shape
    config = TrainConfig(
        epochs=settings.rounds,
        batch_size=min(settings.batch_size, num_rows),
        learning_rate=settings.learning_rate,
        schedule="constant",
    )
    stage = f"i-bau {'/'.join(f'{number:g}' for number in vars(settings).values())}"
    keys = inputs.keys_for(stage)

    def fit(on_epoch: Callable[[TrainState], None] | None, **where: Any) -> TrainState:
        del where  # rounds are few: no chunks of members, no intermediate checkpoints
        states = ensemble.init_members(
            lambda variables, key: resume_from(variables, key, config), inputs.attacked.variables, keys
        )
        spread = ensemble.spread_members(num)
        compiled = ensemble.compile_members(
            make_round(model, config, settings), "map", spread, num_shared=1, donate=True
        )
        placed, placed_rows, pool = spread.place(states), spread.place(rows), spread.replicate(inputs.pool)
        for _ in range(settings.rounds):
            placed = compiled(placed, placed_rows, pool)
            states = spread.gather(placed)
            if on_epoch is not None:
                on_epoch(states)
        return states

    trained = inputs.runner.train(stage, model, config, num, fit)
    accuracy = np.asarray(trained.history["accuracy"])
    return DefenseResult(
        model, trained.variables, facts={"accuracy on clean rows, last round": accuracy[:, -1].astype(float)}
    )


I_BAU = Defense(
    name="i_bau",
    title="I-BAU",
    paper="Zeng et al. 2022, Adversarial Unlearning of Backdoors via Implicit Hypergradient",
    stage="after training",
    needs=("attacked model", "clean rows"),
    settings=IBauSettings(),
    run=run,
    check=check,
    changes={
        "quick": {"batch_size": 32, "learning_rate": 1e-3},
        # Few rows make few steps, so there are more rounds and passes. The bound keeps the perturbation of so small an image
        # close to a trigger. The smaller fixed-point rate is meant to keep Phi a contraction, so that the series converges.
        "quick digits": {
            "rounds": 15,
            "passes": 5,
            "perturbation_rate": 1.0,
            "norm_bound": 2.0,
            "fixed_point_rate": 0.01,
            "share": 0.5,
        },
    },
)

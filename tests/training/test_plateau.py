import math
import pathlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bdjax.training.plateau import MINIMUM_CHANGE, init_plateau, plateau_step

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "plateau.npz"


@jax.jit
def run_series(values, learning_rate, factor, patience, threshold):
    """The rate after each call, and the last state."""

    def step(state, value):
        state = plateau_step(state, value, factor=factor, patience=patience, threshold=threshold)
        return state, state.learning_rate

    state, rates = jax.lax.scan(step, init_plateau(learning_rate), values)
    return rates, state


def rates_of(values, learning_rate=0.01, factor=0.5, patience=2, threshold=1e-3):
    numbers = jnp.asarray([learning_rate, factor, threshold], jnp.float32)
    rates, _ = run_series(jnp.asarray(values, jnp.float32), numbers[0], numbers[1], jnp.int32(patience), numbers[2])
    return np.asarray(rates)


def torch_rates(values, learning_rate, factor, patience, threshold):
    """PyTorch's `ReduceLROnPlateau`, mode "min", threshold relative, in Python numbers."""
    best, bad, rates = math.inf, 0, []
    for value in values:
        if value < best * (1 - threshold):
            best, bad = value, 0
        else:
            bad += 1
        if bad > patience:
            if learning_rate - learning_rate * factor > 1e-8:
                learning_rate *= factor
            bad = 0
        rates.append(learning_rate)
    return rates


def test_a_constant_loss_cuts_at_the_fourth_and_the_seventh_call():
    np.testing.assert_allclose(rates_of(np.full(7, 1.3)), [0.01] * 3 + [0.005] * 3 + [0.0025], rtol=1e-6)


def test_series_that_pytorch_judged():
    golden = np.load(GOLDEN)
    assert np.isnan(golden["values"]).any()
    for row in range(5):
        options = {name: golden[name][row] for name in ("factor", "patience", "threshold")}
        rates = rates_of(golden["values"][row], **options)
        np.testing.assert_allclose(rates, golden["rates"][row], rtol=1e-5, err_msg=str(options))
        assert len(set(golden["rates"][row])) > 1


def test_a_hundred_random_series():
    for seed in range(100):
        random = np.random.default_rng(seed)
        # Multiples of 1/64, so that float32 and float64 agree on which of two values is lower.
        values = random.integers(1, 128, 40) / 64 / (1 + np.arange(40) // 8)
        values[random.random(40) < 0.05] = math.nan
        options = {
            "learning_rate": float(random.choice([0.01, 1.1e-7])),
            "factor": float(random.choice([0.1, 0.5, 0.9])),
            "patience": int(random.integers(0, 5)),
            "threshold": float(random.choice([1e-4, 1e-3, 0.2973])),
        }
        expected = torch_rates(values.astype(np.float32).tolist(), **options)
        np.testing.assert_allclose(rates_of(values, **options), expected, rtol=1e-5, err_msg=f"{seed} {options}")


def test_not_a_number_is_a_bad_epoch_and_never_the_best():
    assert rates_of([1.0, math.nan, math.nan, math.nan])[-1] == np.float32(0.005)
    assert rates_of([math.nan] * 3)[-1] == np.float32(0.005)
    # After NaN a value is still judged against the best one before it.
    rates, state = run_series(
        jnp.asarray([1.0, math.nan, 0.9]), jnp.float32(0.01), jnp.float32(0.5), jnp.int32(2), jnp.float32(1e-3)
    )
    assert (float(state.best), int(state.bad_epochs)) == (np.float32(0.9), 0)


def test_an_improvement_has_to_be_relative_to_the_best():
    barely = [1.0, 0.9995, 0.9992, 0.9991]  # each within a thousandth of the best, which stays 1.0
    assert rates_of(barely)[-1] == np.float32(0.005)
    enough = [1.0, 0.998, 0.996, 0.994]
    assert rates_of(enough)[-1] == np.float32(0.01)


def test_a_cut_too_small_to_matter_is_not_made():
    rates = rates_of(np.ones(30), learning_rate=4e-8, patience=0)
    np.testing.assert_allclose(rates[-1], 2e-8, rtol=1e-5)  # the next cut would change 1e-8, no more than the minimum
    assert MINIMUM_CHANGE == 1e-8


def test_stacked_members_have_rates_of_their_own():
    random = np.random.default_rng(0)
    values = jnp.asarray(random.random((4, 12)), jnp.float32)

    def member(row):
        return run_series(row, jnp.float32(0.01), jnp.float32(0.5), jnp.int32(1), jnp.float32(1e-3))

    together = jax.vmap(member)(values)
    alone = [member(row) for row in values]
    chex.assert_trees_all_close(together, jax.tree.map(lambda *leaves: jnp.stack(leaves), *alone))
    assert len(set(np.asarray(together[0][:, -1]).tolist())) > 1


def test_a_step_keeps_shapes_and_types_with_and_without_jit():
    state = init_plateau(0.01)
    chex.assert_trees_all_equal_dtypes(state, type(state)(jnp.float32(0), jnp.float32(0), jnp.int32(0)))
    options = {"factor": 0.5, "patience": 0, "threshold": 1e-3}
    compiled = jax.jit(lambda state, value: plateau_step(state, value, **options))
    for value in (2.0, 1.0, 1.5, math.nan, 0.5):
        before = state
        state = plateau_step(before, jnp.float32(value), **options)
        chex.assert_trees_all_equal(state, compiled(before, jnp.float32(value)))
        chex.assert_trees_all_equal_shapes_and_dtypes(state, before)
    assert float(state.learning_rate) == np.float32(0.0025)


@pytest.mark.parametrize("patience", [0, 1, 3])
def test_a_falling_loss_is_never_cut(patience):
    assert rates_of(0.9 ** np.arange(30), patience=patience)[-1] == np.float32(0.01)

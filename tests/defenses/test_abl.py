"""ABL: its losses in numbers, which rows it isolates, and that it unlearns those and nothing else."""

import dataclasses
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bdjax.defenses.abl import ABLSettings, check, flag_lowest, isolation_losses, run, unlearning_rows
from bdjax.errors import InputError

SMALL = ABLSettings(
    isolation_epochs=2,
    isolation_learning_rate=1e-2,
    isolation_rate=0.1,
    rest_epochs=2,
    rest_learning_rate=1e-2,
    rest_steps=((1, 1e-3),),
    unlearning_epochs=10,  # of one step each, since 32 rows are isolated
    unlearning_learning_rate=3e-2,
    optimiser="adam",
    batch_size=32,
)


@cache
def batch_loss(loss):
    return jax.jit(jax.value_and_grad(lambda rows: jnp.mean(isolation_losses(loss, rows, 0.5))))


@pytest.mark.parametrize(
    ("loss", "mean", "expected", "slope"),
    [("lga", 0.3, -0.3, -1), ("lga", 0.8, 0.8, 1), ("flooding", 0.3, 0.7, -1), ("flooding", 0.8, 0.8, 1)],
)
def test_loss_is_kept_near_the_threshold(loss, mean, expected, slope):
    # Rows on both sides of 0.5: the batch's mean decides.
    value, gradient = batch_loss(loss)(np.array([0.5, 1.0, 1.5], np.float32) * np.float32(mean))
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    np.testing.assert_allclose(gradient, np.full(3, slope / 3), rtol=1e-6)


def test_lowest_losses_are_isolated_and_ties_go_to_the_first():
    losses = np.array([[3, 1, 2, 1, 1], [1, 2, 3, 4, 5]], np.float32)
    np.testing.assert_array_equal(flag_lowest(losses, np.array([2, 3])), [[0, 1, 0, 1, 0], [1, 1, 1, 0, 0]])
    none, every = flag_lowest(losses, np.array([0, 5]))
    assert not none.any() and every.all()


def test_unlearning_minimises_what_each_variant_says():
    index, labels = np.arange(12, dtype=np.int32).reshape(2, 6), np.zeros((2, 6), np.int32)
    isolated = np.array([[1, 1, 0, 0, 0, 0], [0, 0, 0, 0, 1, 0]], bool)
    losses = np.random.default_rng(0).random(12).astype(np.float32)

    def minimised(kind):
        rows = unlearning_rows(index, labels, isolated, kind, [np.random.default_rng(0) for _ in labels])
        return rows, np.mean(np.asarray(rows.targets["weight"]) * losses[np.asarray(rows.index)], axis=1)

    rows, value = minimised("isolated")
    assert set(np.asarray(rows.index)[0]) == {0, 1} and set(np.asarray(rows.index)[1]) == {10}
    np.testing.assert_allclose(value, [-losses[:2].mean(), -losses[10]], rtol=1e-6)
    _, value = minimised("paper")
    rest = [losses[2:6].mean(), losses[[6, 7, 8, 9, 11]].mean()]
    np.testing.assert_allclose(value, [rest[0] - losses[:2].mean(), rest[1] - losses[10]], rtol=1e-5)


def test_unlearning_raises_the_loss_of_the_isolated_rows(inputs):
    unlearnt = run(inputs, SMALL)
    before = run(inputs, dataclasses.replace(SMALL, unlearning_epochs=0))
    np.testing.assert_array_equal(unlearnt.flags, before.flags)
    assert (unlearnt.flags.sum(axis=1) == 32).all()
    assert (unlearnt.facts["mean loss of isolated rows"] < unlearnt.facts["mean loss of other rows"]).all()
    lowest_flagged = np.where(unlearnt.flags, unlearnt.scores, np.inf).min(axis=1)
    assert (lowest_flagged >= np.where(unlearnt.flags, -np.inf, unlearnt.scores).max(axis=1)).all()
    after, before = (inputs.losses(result.model, result.variables, inputs.all_rows()) for result in (unlearnt, before))
    raised = after - before
    assert (raised[unlearnt.flags].reshape(2, -1).mean(axis=1) > 0.5).all()


def test_number_of_poisons_is_an_oracle_and_without_poisons_nothing_is_unlearned(inputs):
    settings = dataclasses.replace(SMALL, isolate="oracle", rest_epochs=0)
    result = run(inputs, settings)
    np.testing.assert_array_equal(result.flags.sum(axis=1), [64, 0])
    assert not result.flags[1].any() and result.facts["rows isolated"][1] == 0
    before = run(inputs, dataclasses.replace(settings, unlearning_epochs=0))
    changed = jax.tree.map(
        lambda after, before: np.any(np.asarray(after != before), axis=tuple(range(1, after.ndim))),
        result.variables,
        before.variables,
    )
    assert np.any(jax.tree.leaves(changed), axis=0).tolist() == [True, False]
    with pytest.raises(InputError, match="needs the number of poisons"):
        run(inputs.with_knowledge({"number of poisons": None}), settings)


@pytest.mark.parametrize(
    "change", [{"loss": "hinge"}, {"unlearning": "all"}, {"isolate": "2"}, {"isolation_rate": 1.0}]
)
def test_invalid_settings_are_refused(change):
    with pytest.raises(InputError, match=f"defense abl: {next(iter(change))}"):
        check(dataclasses.replace(SMALL, **change))


def test_running_checks_the_settings(inputs):
    with pytest.raises(InputError, match="defense abl: loss"):
        run(inputs, dataclasses.replace(SMALL, loss="hinge"))

"""The contract of every trigger family, checked on each entry of the registry.

Instances are drawn once for each family and shape, and go through one compiled call.
"""

from functools import cache

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bdjax.triggers import TRIGGERS, MaskedBlend, masked_blend

SHAPES = [(8, 8, 1), (32, 28, 3)]
SEEDS = range(3)


@cache
def instances(name, shape):
    """One trigger for each seed, stacked."""
    return masked_blend.stack([TRIGGERS[name].init(jax.random.key(seed), shape) for seed in SEEDS])


@cache
def images(shape):
    """Three random images, a black and a white one."""
    return jnp.concatenate(
        [jax.random.uniform(jax.random.key(9), (3, *shape)), jnp.zeros((1, *shape)), jnp.ones((1, *shape))]
    )


@cache
def compiled(apply):
    """(stacked triggers [S], images [N], label, key) -> images [S, N]."""
    return jax.jit(jax.vmap(jax.vmap(apply, in_axes=(None, 0, None, None)), in_axes=(0, None, None, None)))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", sorted(TRIGGERS))
class TestContract:
    def triggered(self, name, shape):
        run = compiled(TRIGGERS[name].apply)
        return np.asarray(run(instances(name, shape), images(shape), jnp.int32(1), jax.random.key(0)))

    def test_keeps_shape_dtype_and_range(self, name, shape):
        triggered = self.triggered(name, shape)
        assert triggered.shape == (len(SEEDS), 5, *shape) and triggered.dtype == np.float32
        assert triggered.min() >= 0.0 and triggered.max() <= 1.0  # which no NaN is

    def test_changes_images(self, name, shape):
        change = np.abs(self.triggered(name, shape) - np.asarray(images(shape)))
        assert (change[:, 0].max(axis=(1, 2, 3)) > 1e-3).all()

    def test_the_same_key_gives_the_same_instance_and_another_key_another(self, name, shape):
        drawn = instances(name, shape)
        first, second = (jax.tree.map(lambda leaf, seed=seed: leaf[seed], drawn) for seed in (0, 1))
        chex.assert_trees_all_equal(first, TRIGGERS[name].init(jax.random.key(0), shape))
        assert any(bool((a != b).any()) for a, b in zip(first, second, strict=True))

    def test_is_pure(self, name, shape):
        before = np.array(images(shape))
        np.testing.assert_array_equal(self.triggered(name, shape), self.triggered(name, shape))
        np.testing.assert_array_equal(images(shape), before)


@pytest.mark.parametrize("apply", list(dict.fromkeys(family.apply for family in TRIGGERS.values())))
def test_op_by_op_and_one_by_one_are_the_same_as_compiled_for_a_batch(apply):
    """Once for each distinct function: at present all families share one."""
    name = next(name for name, family in TRIGGERS.items() if family.apply is apply)
    shape = SHAPES[0]
    drawn, label, key = instances(name, shape), jnp.int32(1), jax.random.key(0)
    together = compiled(apply)(drawn, images(shape), label, key)
    for seed in SEEDS:
        params = jax.tree.map(lambda leaf, seed=seed: leaf[seed], drawn)
        for number, image in enumerate(images(shape)):
            alone = apply(params, image, label, key)
            chex.assert_trees_all_close(together[seed, number], alone, atol=1e-6, rtol=0)


@pytest.mark.parametrize("shape", SHAPES)
def test_all_families_share_one_tree_and_one_compilation(shape):
    """The point of the masked blend: which family a trigger is of is data, not code."""
    chex.clear_trace_counter()
    drawn = [jax.tree.map(lambda leaf: leaf[0], instances(name, shape)) for name in sorted(TRIGGERS)]
    chex.assert_trees_all_equal_shapes_and_dtypes(*drawn)
    apply = jax.jit(chex.assert_max_traces(TRIGGERS["solid"].apply, n=1))
    for params in drawn:
        assert isinstance(params, MaskedBlend)
        apply(params, images(shape)[0])

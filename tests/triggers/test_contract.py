"""What every trigger owes its callers, checked on each entry of the registry."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bdjax.triggers import TRIGGERS, MaskedBlend

SHAPES = [(8, 8, 1), (28, 28, 1), (32, 32, 3)]


@pytest.fixture(params=sorted(TRIGGERS))
def trigger(request):
    return TRIGGERS[request.param]


def images(shape, count=3):
    return jax.random.uniform(jax.random.key(9), (count, *shape))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("seed", range(3))
class TestContract:
    def test_keeps_shape_dtype_and_range(self, trigger, shape, seed):
        params = trigger.init(jax.random.key(seed), shape)
        for image in [*images(shape), jnp.zeros(shape), jnp.ones(shape)]:
            triggered = trigger.apply(params, image, jnp.int32(1), jax.random.key(0))
            chex.assert_shape(triggered, shape)
            chex.assert_type(triggered, jnp.float32)
            chex.assert_tree_all_finite(triggered)
            assert triggered.min() >= 0.0 and triggered.max() <= 1.0

    def test_changes_images(self, trigger, shape, seed):
        params = trigger.init(jax.random.key(seed), shape)
        image = images(shape)[0]
        assert jnp.abs(trigger.apply(params, image, None, None) - image).max() > 1e-3

    def test_is_pure(self, trigger, shape, seed):
        params = trigger.init(jax.random.key(seed), shape)
        chex.assert_trees_all_equal(params, trigger.init(jax.random.key(seed), shape))
        image, label, key = images(shape)[0], jnp.int32(1), jax.random.key(0)
        before = np.array(image)
        chex.assert_trees_all_equal(trigger.apply(params, image, label, key), trigger.apply(params, image, label, key))
        np.testing.assert_array_equal(image, before)

    def test_jit_changes_nothing(self, trigger, shape, seed):
        params = trigger.init(jax.random.key(seed), shape)
        arguments = params, images(shape)[0], jnp.int32(1), jax.random.key(0)
        chex.assert_trees_all_close(jax.jit(trigger.apply)(*arguments), trigger.apply(*arguments), atol=1e-6, rtol=0)

    def test_vmap_equals_a_loop(self, trigger, shape, seed):
        params = trigger.init(jax.random.key(seed), shape)
        batch, labels, keys = images(shape), jnp.arange(3), jax.random.split(jax.random.key(0), 3)
        looped = jnp.stack([trigger.apply(params, *row) for row in zip(batch, labels, keys, strict=True)])
        vmapped = jax.vmap(trigger.apply, in_axes=(None, 0, 0, 0))(params, batch, labels, keys)
        chex.assert_trees_all_close(vmapped, looped, atol=1e-6, rtol=0)


@pytest.mark.parametrize("shape", SHAPES)
def test_another_key_gives_another_instance(trigger, shape):
    first, second = (trigger.init(jax.random.key(seed), shape) for seed in (0, 1))
    assert any(bool((a != b).any()) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("shape", SHAPES)
def test_all_families_share_one_tree_and_one_compilation(shape):
    """The point of the masked blend: which family a trigger is of is data, not code."""
    chex.clear_trace_counter()
    instances = [TRIGGERS[name].init(jax.random.key(0), shape) for name in sorted(TRIGGERS)]
    chex.assert_trees_all_equal_shapes_and_dtypes(*instances)
    apply = jax.jit(chex.assert_max_traces(TRIGGERS["solid"].apply, n=1))
    for params in instances:
        assert isinstance(params, MaskedBlend)
        apply(params, images(shape)[0])

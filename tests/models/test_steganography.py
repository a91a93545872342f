from functools import cache

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bdjax.models import steganography
from bdjax.models.steganography import BitNetworks


@cache
def started(shape, stages, lowering="shifted"):
    networks = BitNetworks(num_bits=5, width=4, stages=stages, lowering=lowering)
    return networks, jax.jit(lambda key: steganography.init(networks, key, shape))(jax.random.key(0))


@pytest.mark.parametrize(("shape", "stages"), [pytest.param((32, 32, 3), 4, marks=pytest.mark.slow), ((11, 9, 1), 3)])
def test_shapes(shape, stages):
    networks, params = started(shape, stages)
    images = jax.random.uniform(jax.random.key(1), (3, *shape))
    bits = jax.random.bernoulli(jax.random.key(2), 0.5, (3, 5)).astype(jnp.float32)

    @jax.jit
    def run(params):
        encoded = steganography.encode(networks, params["encoder"], images, bits)
        return encoded, steganography.decode(networks, params["decoder"], images)

    residuals, logits = run(params)
    chex.assert_shape((residuals, logits), (images.shape, (3, 5)))
    chex.assert_type((residuals, logits), jnp.float32)
    chex.assert_tree_all_finite((residuals, logits))


@pytest.mark.parametrize("lowering", ["native", pytest.param("patches", marks=pytest.mark.slow)])
def test_lowerings_agree(lowering):
    shape = (12, 12, 1)
    networks, params = started(shape, 2)
    other, other_params = started(shape, 2, lowering)
    chex.assert_trees_all_equal(params, other_params)
    images = jax.random.uniform(jax.random.key(1), (2, *shape))
    bits = jnp.ones((2, 5))

    def both(which):
        return lambda p: (
            steganography.encode(which, p["encoder"], images, bits),
            steganography.decode(which, p["decoder"], images),
        )

    chex.assert_trees_all_close(jax.jit(both(networks))(params), jax.jit(both(other))(params), atol=1e-4)


def test_bits_and_image_both_count_and_rows_are_apart():
    shape = (8, 8, 1)
    networks, params = started(shape, 2)
    encode = jax.jit(lambda images, bits: steganography.encode(networks, params["encoder"], images, bits))
    images = jax.random.uniform(jax.random.key(1), (2, *shape))
    bits = jnp.stack([jnp.zeros(5), jnp.ones(5)])
    residuals = encode(images, bits)
    assert np.abs(encode(images, bits[::-1]) - residuals).max() > 1e-3
    changed = encode(jnp.stack([images[0], jnp.full(shape, 0.5)]), bits)
    np.testing.assert_allclose(changed[0], residuals[0], atol=1e-6)
    assert np.abs(changed[1] - residuals[1]).max() > 1e-3


def test_kernels_have_the_variance_of_their_fan_in_and_biases_are_0():
    _, params = started((32, 32, 3), 4)
    kernel = params["encoder"]["_BiasedConv_4"]["Conv_0"]["kernel"]
    assert kernel.shape == (3, 3, 16, 32)
    np.testing.assert_allclose(np.std(kernel), np.sqrt(2 / (3 * 3 * 16)), rtol=0.05)
    assert not np.any(params["encoder"]["_BiasedConv_4"]["bias"])

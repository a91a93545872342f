import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bdjax.models import generators
from bdjax.models.generators import Generator

init = jax.jit(generators.init, static_argnums=(0, 2))
generate = jax.jit(generators.generate, static_argnums=0, static_argnames="train")


def run(shape, *, lowering="native", channels=3, train=False, stages=2):
    network = Generator(channels, 4, stages, lowering)
    variables = init(network, jax.random.key(0), shape)
    images = jax.random.uniform(jax.random.key(1), (2, *shape))
    return generate(network, variables, images, train=train)


@pytest.mark.parametrize(("shape", "channels"), [pytest.param((8, 8, 3), 3, marks=pytest.mark.slow), ((15, 18, 3), 1)])
def test_output_has_the_images_size_and_is_within_0_and_1(shape, channels):
    output, _ = run(shape, channels=channels)
    chex.assert_shape(output, (2, *shape[:2], channels))
    chex.assert_type(output, jnp.float32)
    assert 0 < output.min() < output.max() < 1


def test_every_lowering_makes_the_same_images():
    expected, after = run((8, 8, 3), train=True, stages=1)
    for lowering in ("patches", "shifted"):
        output, statistics = run((8, 8, 3), lowering=lowering, train=True, stages=1)
        chex.assert_trees_all_close(output, expected, atol=1e-5)
        chex.assert_trees_all_close(statistics, after, atol=1e-5)


def test_running_statistics_move_in_training_only():
    network = Generator(1, 4, 1, "native")
    before = init(network, jax.random.key(0), (8, 8, 1))
    _, evaluated = run((8, 8, 1), channels=1, stages=1)
    _, trained = run((8, 8, 1), channels=1, train=True, stages=1)
    chex.assert_trees_all_equal(evaluated, before)
    chex.assert_trees_all_equal(trained["params"], before["params"])
    for new, old in zip(*(jax.tree.leaves(tree["batch_stats"]) for tree in (trained, before)), strict=True):
        assert np.any(np.asarray(new) != np.asarray(old))


def test_widths_are_the_papers():
    variables = jax.eval_shape(
        lambda key: generators.init(Generator(3, 32, 3, "native"), key, (32, 32, 3)), jax.random.key(0)
    )
    kernels = [variables["params"][f"Conv_{i}"]["kernel"].shape[2:] for i in range(13)]
    assert kernels == [
        (3, 32), (32, 32), (32, 64), (64, 64), (64, 128), (128, 128), (128, 128),
        (128, 128), (128, 64), (64, 64), (64, 32), (32, 32), (32, 3),
    ]  # fmt: skip
    assert len(variables["params"]) == 26


@pytest.mark.parametrize(("shape", "axes"), [((2, 5, 6, 3), (1, 2))])
def test_upsampling_is_bilinear(shape, axes):
    x = jax.random.normal(jax.random.key(0), shape)
    size = (2 * shape[1], 2 * shape[2])
    expected = jax.image.resize(x, (shape[0], *size, shape[3]), "linear")
    found = jax.jit(generators._upsample, static_argnums=(1, 2))(x, size, axes)
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_a_row_in_evaluation_does_not_depend_on_its_batch():
    network = Generator(1, 4, 1, "shifted")
    variables = init(network, jax.random.key(0), (8, 8, 1))
    images = jax.random.uniform(jax.random.key(1), (3, 8, 8, 1))
    images = np.asarray(images)
    together, _ = generate(network, variables, images, train=False)
    others, _ = generate(network, variables, images[[2, 1, 0]], train=False)
    np.testing.assert_allclose(together[1], others[1], atol=1e-5)
    assert np.abs(together[0] - others[0]).max() > 1e-3

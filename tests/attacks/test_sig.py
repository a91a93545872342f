import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bdjax.attacks.contract import Knowledge
from bdjax.attacks.sig import SIG, SIG_STRIPED, SigSettings, wrapped_stripes
from bdjax.types import Dataset


def knowledge(shape):
    return Knowledge(Dataset(np.zeros((4, *shape), np.uint8), np.zeros(4, np.int32), 2, "none", "none"), target=0)


def sinusoid(shape, **settings):
    return SIG.make_params(jax.random.key(0), knowledge(shape), SigSettings(**settings))


def test_grey_at_cifars_width_is_as_the_sheet_has_it():
    params = sinusoid((32, 32, 3))
    triggered = np.asarray(SIG.apply(params, jnp.full((32, 32, 3), 0.5), None, None))
    np.testing.assert_allclose(triggered.max() - triggered.min(), 80 / 255, rtol=1e-6)
    unchanged = np.flatnonzero(np.abs(triggered[0, :, 0] - 0.5) < 1e-6)
    np.testing.assert_array_equal(unchanged, [0, 8, 16, 24])
    np.testing.assert_allclose(triggered.mean(), 0.5, atol=1e-6)


@pytest.mark.parametrize(("amplitude", "psnr"), [(20 / 255, 25.1), (40 / 255, 19.1)])
def test_psnr_where_nothing_is_clipped(amplitude, psnr):
    delta = np.asarray(sinusoid((32, 32, 3), amplitude=amplitude).delta)
    assert -10 * np.log10(np.mean(delta**2)) == pytest.approx(psnr, abs=0.06)


@pytest.mark.parametrize("shape", [(28, 28, 1), (32, 32, 3), (8, 8, 1)])
def test_rows_are_equal_and_the_change_is_within_the_amplitude(shape):
    image = jax.random.uniform(jax.random.key(1), shape)
    params = sinusoid(shape)
    change = np.asarray(SIG.apply(params, image, None, None) - image)
    assert np.abs(change).max() <= 40 / 255 + 1e-6
    np.testing.assert_array_equal(params.delta, np.broadcast_to(params.delta[:1, :, :1], shape))


def test_stripes_are_the_ones_in_circulation():
    np.testing.assert_array_equal(wrapped_stripes(32)[:8], [0, 14, 19, 13, 255, 241, 237, 244])


def test_stripes_change_at_most_a_fifth():
    image = jax.random.uniform(jax.random.key(1), (32, 32, 3))
    params = SIG_STRIPED.make_params(jax.random.key(0), knowledge((32, 32, 3)), SIG_STRIPED.settings)
    change = np.asarray(SIG_STRIPED.apply(params, image, None, None) - image)
    assert np.abs(change).max() <= 0.2 + 1e-6

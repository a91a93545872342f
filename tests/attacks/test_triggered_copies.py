import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bdjax.attacks.triggered_copies import (
    add_to_source_rows,
    trigger_first_rows,
    weigh_as_mean,
)
from bdjax.errors import InputError

IMAGES = jnp.asarray(np.broadcast_to(np.arange(10, dtype=np.float32)[:, None, None, None] / 10, (10, 2, 2, 1)))
LABELS = jnp.asarray(np.arange(10, dtype=np.int32))


def by_label(params, image, label, key):
    return image * 0.0 + params * label.astype(jnp.float32)


def noise(params, image, label, key):
    return jax.random.uniform(key, image.shape)


@pytest.mark.parametrize(("rate", "count"), [(0.02, 1), (0.29, 2), (1.0, 10)])
def test_first_rows_are_triggered_and_at_least_one(rate, count):
    run = jax.jit(trigger_first_rows, static_argnames=("apply", "rate"))
    copies = run(by_label, jnp.float32(0.1), IMAGES, LABELS, jax.random.key(0), rate)
    np.testing.assert_array_equal(copies[:, 0, 0, 0], np.float32(0.1) * np.arange(count, dtype=np.float32))


def test_every_copy_has_a_key_of_its_own():
    copies = trigger_first_rows(noise, None, IMAGES, LABELS, jax.random.key(0), 0.5)
    assert len(np.unique(np.asarray(copies))) == copies.size


@pytest.mark.parametrize("rate", [0.0, -0.1, 1.1])
def test_a_rate_that_is_no_share_is_refused(rate):
    with pytest.raises(InputError, match="must be above 0 and at most 1"):
        trigger_first_rows(by_label, jnp.float32(0.1), IMAGES, LABELS, jax.random.key(0), rate)


def test_copies_count_as_rows_or_as_a_mean_of_their_own():
    losses, of_copies = jnp.ones(8), jnp.asarray([2.0, 4.0])
    as_rows = add_to_source_rows(losses, of_copies)
    np.testing.assert_array_equal(as_rows, [3, 5, 1, 1, 1, 1, 1, 1])
    assert as_rows.mean() * 8 == losses.sum() + of_copies.sum()
    assert add_to_source_rows(losses, weigh_as_mean(of_copies, 8)).mean() == losses.mean() + of_copies.mean()

"""Maxima and clips: values, gradients, and what their derivatives compare."""

import jax
import jax.numpy as jnp
import numpy as np

from bdjax.selection import clip, larger


def test_the_larger_takes_the_gradient_and_equals_share_it():
    first, second = np.float32([3, 1, 2, 0]), np.float32([1, 3, 2, 0])
    for_first, for_second = jax.jit(jax.grad(lambda x, y: jnp.sum(larger(x, y)), (0, 1)))(first, second)
    np.testing.assert_array_equal(for_first, [1, 0, 0.5, 0.5])
    np.testing.assert_array_equal(for_second, [0, 1, 0.5, 0.5])


def test_a_clip_has_the_values_and_the_gradient_of_the_usual_one():
    values = np.float32([-2, -1, 0, 0.25, 1, 2, 7])
    for low, high in ((0.0, 1.0), (jnp.float32(-1), jnp.float32(2))):
        found, usual = (
            jax.jit(jax.value_and_grad(lambda x, of=of, low=low, high=high: jnp.sum(3 * of(x, low, high))))(values)
            for of in (clip, jnp.clip)
        )
        np.testing.assert_array_equal(clip(values, low, high), jnp.clip(values, low, high))
        for mine, theirs in zip(found, usual, strict=True):
            np.testing.assert_array_equal(mine, theirs)


def test_no_gradient_of_a_clip_depends_on_how_its_result_is_rounded():
    equations = jax.make_jaxpr(jax.grad(lambda x: jnp.sum(clip(x * 3, 0.0, 1.0))))(jnp.zeros(4)).eqns
    maxima = {e.outvars[0]: e.invars for e in equations if e.primitive.name in ("max", "custom_jvp_call")}
    compared = [e.invars for e in equations if e.primitive.name in ("eq", "ne", "gt", "ge", "lt", "le")]
    assert len(maxima) == 2 and len(compared) >= 2
    for first, second in compared:
        assert first not in maxima.get(second, ()) and second not in maxima.get(first, ())

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bdjax.defenses.teachers import from_classifiers, from_members
from bdjax.errors import InputError

IMAGES = np.arange(5 * 2 * 2 * 3).reshape(5, 2, 2, 3).astype(np.uint8)


def sums(scale):
    """A classifier that knows nothing of JAX: [scale * sum, 0, 1]."""

    def classifier(images):
        assert isinstance(images, np.ndarray)
        assert images.dtype == np.float32
        assert 0 <= images.min() <= images.max() <= 1
        total = scale * images.sum(axis=(1, 2, 3))
        return np.stack([total, 0 * total, 0 * total + 1], axis=1)

    return classifier


def test_callables_become_teachers_in_their_order():
    logits = from_classifiers([sums(1.0), sums(-2.0)], 3)(IMAGES)
    assert logits.shape == (2, 5, 3)
    assert logits.dtype == np.float32
    total = IMAGES.astype(np.float64).sum(axis=(1, 2, 3)) / 255
    np.testing.assert_allclose(logits[0, :, 0], total, rtol=1e-5)
    np.testing.assert_allclose(logits[1, :, 0], -2 * total, rtol=1e-5)
    np.testing.assert_array_equal(logits[:, :, 2], 1)


def test_lists_and_double_precision_are_taken_too():
    logits = from_classifiers([lambda images: [[1, 2]] * len(images), lambda images: np.ones((len(images), 2))], 2)
    assert logits(IMAGES).dtype == np.float32
    np.testing.assert_array_equal(logits(IMAGES)[0], [[1, 2]] * 5)


def test_teachers_are_called_once_for_a_set_of_images():
    calls = []

    def classifier(images):
        calls.append(len(images))
        return np.zeros((len(images), 2))

    from_classifiers([classifier], 2)(IMAGES)
    assert calls == [5]


def test_no_teacher_is_an_error():
    with pytest.raises(InputError, match="no teachers: TA-KD needs at least one"):
        from_classifiers([], 3)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (lambda images: np.zeros((5, 4)), r"teacher 2 returned logits of shape \(5, 4\); should be \(5, 3\)"),
        (lambda images: np.zeros((4, 3)), r"teacher 2 returned logits of shape \(4, 3\)"),
        (lambda images: np.zeros(5), r"teacher 2 returned logits of shape \(5,\)"),
        (lambda images: np.full((5, 3), np.nan), "teacher 2 returned logits that are not finite"),
        (lambda images: np.where(np.eye(5, 3), np.inf, 0), "teacher 2 returned logits that are not finite"),
    ],
)
def test_a_bad_output_names_its_teacher(bad, message):
    with pytest.raises(InputError, match=message) as caught:
        from_classifiers([sums(1.0), bad], 3)(IMAGES)
    assert "\n" not in str(caught.value)


def test_stacked_members_are_teachers():
    variables = {"scale": jnp.asarray([1.0, -2.0, 0.5])}

    def predict(variables, images):
        total = jnp.sum(jnp.asarray(images, jnp.float32) / 255, axis=(1, 2, 3))
        return jax.vmap(lambda scale: jnp.stack([scale * total, 0 * total], axis=1))(variables["scale"])

    logits = from_members(predict, variables)(IMAGES)
    assert isinstance(logits, np.ndarray)
    assert logits.shape == (3, 5, 2)
    np.testing.assert_allclose(logits[1, :, 0], -2 * logits[0, :, 0], rtol=1e-5)

import functools
from typing import NamedTuple

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


def test_teachers_are_asked_in_batches():
    calls = []

    def classifier(images):
        calls.append(len(images))
        return images[:, 0, 0, :2] - 1

    images = np.concatenate([IMAGES] * 3)
    found = from_classifiers([classifier], 2, batch_size=6)(images)
    assert calls == [6, 6, 3, 6]  # the last: the first images a second time
    np.testing.assert_array_equal(found[0], images[:, 0, 0, :2].astype(np.float32) / 255 - 1)
    from_classifiers([classifier], 2)(np.zeros((600, 2, 2, 3), np.uint8))
    assert calls[4:] == [256, 256, 88, 8]


def test_a_teacher_may_use_one_buffer_for_all_batches_and_change_its_images():
    buffer = np.empty((2, 2))

    def classifier(images):
        buffer[: len(images)] = images[:, 0, 0, :2] - 1
        images[:] = np.nan
        return buffer[: len(images)]

    found = from_classifiers([classifier, classifier], 2, batch_size=2)(IMAGES)
    for logits in found:
        np.testing.assert_array_equal(logits, IMAGES[:, 0, 0, :2].astype(np.float32) / 255 - 1)


def test_no_rows_are_not_asked():
    assert from_classifiers([lambda images: None], 2)(IMAGES[:0]).shape == (1, 0, 2)


def test_no_teacher_is_an_error():
    with pytest.raises(InputError, match="no teachers: TA-KD needs at least one"):
        from_classifiers([], 3)


@pytest.mark.parametrize(
    ("classifiers", "message"),
    [
        (sums(1.0), "the teachers are a function; pass a list of callables"),
        ([sums(1.0), "resnet18"], r"teacher 2 \(str\) cannot be called; a function from images to logits is needed"),
        ([None], r"teacher 1 \(NoneType\) cannot be called"),
    ],
)
def test_what_is_no_teacher_is_said_at_once(classifiers, message):
    with pytest.raises(InputError, match=message):
        from_classifiers(classifiers, 3)


@pytest.mark.parametrize("batch_size", [0, -1, 2.5, "8", None, True])
def test_a_batch_has_rows(batch_size):
    with pytest.raises(InputError, match=f"batch size {batch_size!r} is not a whole number of at least 1"):
        from_classifiers([sums(1.0)], 3, batch_size)


class Tensor:
    """As a PyTorch tensor on a device."""

    def detach(self):
        return self

    cpu = detach

    def __array__(self, dtype=None, copy=None):
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu()\nto copy it")


class Tensors(Tensor):
    """As one on the CPU that NumPy can read."""

    def __array__(self, dtype=None, copy=None):
        return np.ones((5, 3), np.float32)


class Output(NamedTuple):
    logits: np.ndarray
    features: np.ndarray


async def asynchronous(images):
    return np.zeros((5, 3))


GOOD = np.arange(15.0).reshape(5, 3)
WRONG = {
    "wrong classes": (np.zeros((5, 4)), r"returned logits of shape \(5, 4\); should be \(5, 3\)$"),
    "wrong rows": (
        np.zeros((4, 3)),
        r"shape \(4, 3\); should be \(5, 3\); it got 5 images at a time: if it takes fewer, set a smaller teacher_batch",
    ),
    "predicted classes": (np.zeros(5, int), r"shape \(5,\); should be \(5, 3\); they look like predicted classes"),
    "maps": (np.zeros((5, 3, 1, 1)), r"returned logits of shape \(5, 3, 1, 1\)"),
    "seeds": (np.zeros((2, 5, 3)), r"returned logits of shape \(2, 5, 3\)"),
    "a number": (1.5, r"returned logits of shape \(\)"),
    "nothing": (None, "returned None; return the logits alone, as an array"),
    "text": ("cat", "returned a str; return the logits alone"),
    "texts": (np.array([["cat"] * 3] * 5), "returned <U3 values; logits are real numbers"),
    "bytes": (b"123", "returned a bytes; return the logits alone"),
    "tuple": ((GOOD, GOOD), "returned a tuple of 2; return the logits alone"),
    "named tuple": (Output(GOOD, GOOD), "returned a Output with logits, features; return the logits alone"),
    "dict": ({"logits": GOOD, "hidden": GOOD}, "returned a dict with logits, hidden; return the logits alone"),
    "list of both": ([GOOD, GOOD], r"returned logits of shape \(2, 5, 3\)"),
    "list of uneven rows": ([[1, 2, 3], [1, 2]], "returned a list, which is no array .*; return the logits alone"),
    "list of dicts": ([{"label": "cat", "score": 0.5}] * 5, "returned a list of dict, which is no array of numbers"),
    "set": ({1, 2, 3}, "returned a set, which is no array of numbers"),
    "generator": ((row for row in GOOD), "returned a generator, which is no array of numbers"),
    "objects": (np.full((5, 3), None), "returned a ndarray of NoneType, which is no array of numbers"),
    "complex": (GOOD + 0j, "returned complex128 values; logits are real numbers"),
    "truth": (GOOD > 3, "returned bool values; logits are real numbers"),
    "times": (np.zeros((5, 3), "M8[s]"), "returned datetime64.* values; logits are real numbers"),
    "fields": (np.zeros((5, 3), [("a", float)]), "values; logits are real numbers"),
    "tensor on a device": (
        Tensor(),
        r"returned a Tensor, which is no array \(can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu\(\) "
        r"to copy it\); return a NumPy array: tensor.detach\(\).cpu\(\).numpy\(\)$",
    ),
    "nan": (np.where(GOOD == 7, np.nan, GOOD), "not finite float32 numbers: nan for image 2, class 1$"),
    "infinite": (np.where(GOOD == 14, -np.inf, GOOD), "not finite float32 numbers: -inf for image 4, class 2$"),
    "beyond float32": (GOOD * 1e300, "not finite float32 numbers: inf for image 0, class 1$"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_bad_output_is_one_line_that_names_its_teacher(kind):
    output, message = WRONG[kind]

    def bad(images):
        return output

    with pytest.raises(InputError, match=message) as caught:
        from_classifiers([sums(1.0), bad], 3)(IMAGES)
    text = str(caught.value)
    assert text.startswith("teacher 2 (bad) returned ") and len(text) < 500
    assert text.isprintable()


def test_a_teacher_that_takes_few_images_at_a_time_is_said():
    def small(images):
        assert len(images) <= 2, "at most 2 images"
        return images[:, 0, 0, :2] - 1

    with pytest.raises(
        InputError, match=r"AssertionError: at most 2 images.*; it got 5 images at a time: if it takes f"
    ):
        from_classifiers([small], 2)(IMAGES)
    assert from_classifiers([small], 2, 2)(IMAGES).shape == (1, 5, 2)


def test_a_teacher_that_answers_differently_is_said_once():
    calls = []

    def batch_statistics(images):
        calls.append(len(images))
        return images[:, 0, 0, :2] - images.mean()

    teacher = from_classifiers([batch_statistics], 2)
    images = np.concatenate([IMAGES, 255 - IMAGES] * 2)
    with pytest.warns(
        UserWarning, match=r"teacher 1 \(batch_statistics\) answers differently for the same images"
    ) as seen:
        teacher(images)
        teacher(images)
    assert len(seen) == 1 and calls == [20, 8, 20]


def test_rounding_is_no_different_answer():
    from_classifiers([lambda images: (images[:, 0, 0, :2] * (9 + 1e-3 * len(images))) - 1], 2)(np.repeat(IMAGES, 4, 0))


def test_an_asynchronous_teacher_is_said():
    with pytest.raises(
        InputError, match=r"teacher 1 \(asynchronous\) is asynchronous and returned a coroutine; pass a"
    ):
        from_classifiers([asynchronous], 3)(IMAGES)


@pytest.mark.parametrize(
    "output",
    [GOOD.astype(np.float16), GOOD.astype(np.int64), jnp.asarray(GOOD, jnp.bfloat16), GOOD.tolist(), Tensors()],
)
def test_any_real_numbers_will_do(output):
    found = from_classifiers([lambda images: output], 3)(IMAGES)
    np.testing.assert_array_equal(found[0], np.asarray(output).astype(np.float32))


def test_images_are_counted_from_the_first_batch():
    with pytest.raises(InputError, match="nan for image 4, class 0"):
        from_classifiers([lambda images: np.where(images[:, 0, 0, :2] > 0.18, np.nan, 2)], 2, 2)(IMAGES)


def test_an_exception_names_the_teacher_and_keeps_its_message():
    def remote(images):
        raise ConnectionError("the service\nis down\x1b[31m")

    with pytest.raises(InputError) as caught:
        from_classifiers([sums(1.0), functools.partial(remote)], 3)(IMAGES)
    assert str(caught.value) == "teacher 2 (partial) failed: ConnectionError: the service is down [31m"
    assert isinstance(caught.value.__cause__, ConnectionError)


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_an_interruption_is_no_failure_of_the_teacher(error):
    def classifier(images):
        raise error

    with pytest.raises(error):
        from_classifiers([classifier], 3)(IMAGES)


def softmax(images):
    exponents = np.exp(images[:, 0, 0])
    return exponents / exponents.sum(1, keepdims=True)


def test_probabilities_give_a_warning_once():
    logits = from_classifiers([sums(1.0), softmax], 3)
    with pytest.warns(
        UserWarning, match=r"teacher 2 \(softmax\) seems to return probabilities: each row sums to 1"
    ) as seen:
        found = logits(IMAGES)
    assert len(seen) == 1
    np.testing.assert_array_equal(logits(IMAGES), found)  # no second warning


@pytest.mark.parametrize(
    "other", [lambda rows: np.log(rows), lambda rows: rows - [[0.5, -0.5, 0]], lambda rows: 2 * rows]
)
def test_logits_give_none(other):
    from_classifiers([lambda images: other(softmax(images))], 3)(IMAGES)


def test_stacked_members_are_teachers():
    variables = {"scale": jnp.asarray([1.0, -2.0, 0.5])}

    def predict(variables, images):
        total = jnp.sum(jnp.asarray(images, jnp.float32) / 255, axis=(1, 2, 3))
        return jax.vmap(lambda scale: jnp.stack([scale * total, 0 * total], axis=1))(variables["scale"])

    logits = from_members(predict, variables)(IMAGES)
    assert isinstance(logits, np.ndarray)
    assert logits.shape == (3, 5, 2)
    np.testing.assert_allclose(logits[1, :, 0], -2 * logits[0, :, 0], rtol=1e-5)

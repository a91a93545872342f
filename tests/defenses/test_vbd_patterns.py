"""Stages 2 to 4 of VBD: hand-made gradients and a network that reads a patch by construction."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage
from skimage.filters import threshold_otsu

from bdjax.defenses.vbd_patterns import (
    BLUR,
    blend,
    find_candidate,
    gradient_mask,
    importance,
    margin,
    margin_gradients,
    most_important_pixel,
    no_candidate,
    otsu,
    pair_score,
    row_margin_gradients,
    row_patched_predictions,
    select_rows,
    variance_image,
)
from bdjax.models import make_model
from bdjax.types import Model, ModelOutput


def network(logits, num_classes=3):
    """A function of images as a network without parameters."""
    apply = lambda variables, images, *, train, edits=None: ModelOutput(logits(images), {}, variables)  # noqa: E731
    return Model(lambda key, shape: {}, apply, num_classes, "a function")


# ---- Formulas --------------------------------------------------------------------------------------------------------


@partial(jax.jit, static_argnames="model")
def gradients_for(model, images, classes):
    """`margin_gradients` of a network without variables."""
    return margin_gradients(model, {}, images, classes)


def test_margin_by_hand():
    logits = jnp.asarray([[3, 1, 2]] * 3 + [[-5, -5, -9], [7, 7, 7]], jnp.float32)
    np.testing.assert_array_equal(jax.jit(margin)(logits, jnp.array([0, 1, 2, 0, 1])), [1, -2, -1, 0, 0])


def test_margin_gradients_are_slopes_of_the_margin():
    random = np.random.default_rng(0)
    inner, outer = random.standard_normal((27, 8)), random.standard_normal((8, 3))
    images, classes = random.random((6, 3, 3, 3)), np.array([0, 1, 2, 0, 1, 2])

    def logits(images, xp=np):
        first, last = (xp.asarray(weights, images.dtype) for weights in (inner, outer))
        return xp.tanh(images.reshape(len(images), -1) @ first) @ last

    def exact(images):
        z = logits(images)
        others = np.where(np.arange(3) == classes[:, None], -np.inf, z)
        return np.take_along_axis(z, classes[:, None], 1)[:, 0] - others.max(axis=1)

    model = network(lambda images: logits(images, jnp))
    gradients = np.asarray(gradients_for(model, images.astype(np.float32), classes.astype(np.int32)))
    for where in np.ndindex(3, 3, 3):
        step = np.zeros((3, 3, 3))
        step[where] = 1e-6
        slope = (exact(images + step) - exact(images - step)) / 2e-6
        np.testing.assert_allclose(gradients[(slice(None), *where)], slope, rtol=1e-3, atol=1e-4)


def test_a_rows_gradient_does_not_depend_on_the_batch():
    # With batch statistics it would: every row's gradient would include its effect on the other rows.
    model = make_model("vbd_4_4p", 3, lowering="native")
    images = np.random.default_rng(1).random((4, 8, 8, 1)).astype(np.float32)
    classes = np.array([2, 0, 1, 1], np.int32)
    variables = jax.jit(lambda key: model.init(key, (8, 8, 1)))(jax.random.key(0))
    assert row_margin_gradients(model) is row_margin_gradients(model)  # or each call would compile anew
    by_row = jax.jit(row_margin_gradients(model))
    together = np.asarray(by_row(variables, images, {"class": classes}))
    assert together.shape == images.shape and np.abs(together).max() > 1e-3
    images[2:], classes[2:] = 1 - images[2:], 0  # other rows beside the first two
    again = np.asarray(by_row(variables, images, {"class": classes}))
    np.testing.assert_allclose(again[:2], together[:2], rtol=1e-4, atol=1e-6)
    assert np.abs(again[2:] - together[2:]).max() > 1e-3


def test_blend_between_image_and_pattern():
    random = np.random.default_rng(2)
    images, pattern = random.random((5, 4, 4, 3)), random.random((4, 4, 3))
    mask = (random.random((4, 4, 1)) < 0.5).astype(float)
    np.testing.assert_array_equal(blend(images, mask, pattern, 0.0), images)
    np.testing.assert_allclose(blend(images, np.ones_like(mask), pattern, 1.0), np.broadcast_to(pattern, images.shape))
    half = blend(images, mask, pattern, 0.5)
    inside = mask[..., 0] > 0
    np.testing.assert_allclose(half[:, inside], (images + pattern)[:, inside] / 2)
    np.testing.assert_array_equal(half[:, ~inside], images[:, ~inside])
    by_row = blend(images, mask, pattern, np.linspace(0, 1, 5)[:, None, None, None])
    np.testing.assert_allclose(by_row[2], half[2])
    np.testing.assert_array_equal(by_row[0], images[0])


def test_score_of_network_and_pattern():
    # The less accurate network may lose to the one whose pattern works better, and the other way round.
    np.testing.assert_allclose(pair_score(np.array([0.3, 0.2]), np.array([0.9, 0.8]), 0.6), [0.78, 0.80])
    np.testing.assert_allclose(pair_score(np.array([0.3, 0.2]), np.array([0.9, 0.8]), 0.0), [0.9, 0.8])


def test_predictions_for_patched_rows():
    model = network(lambda images: images[:, 0, :3, 0])  # predicts where its first row is brightest
    masks, patterns = np.zeros((2, 3, 4, 4, 1), np.float32)
    masks[:, 0, :3] = 1
    patterns[np.arange(3), 0, np.arange(3)] = 1
    images = np.random.default_rng(0).random((6, 4, 4, 1)).astype(np.float32)
    classes = np.array([2, 0, 1, 2, 1, 0], np.int32)
    predicted = jax.jit(row_patched_predictions(model))
    variables = {"network": {}, "masks": masks, "patterns": patterns}
    np.testing.assert_array_equal(predicted(variables, images, {"class": classes}), classes)
    unpatched = predicted({**variables, "masks": 0 * masks}, images, {"class": classes})
    np.testing.assert_array_equal(unpatched, np.argmax(images[:, 0, :3, 0], axis=1))


# ---- Which rows ------------------------------------------------------------------------------------------------------


class TestSelectRows:
    def test_by_hand(self):
        #                  sure of 1: 2   5  -1   4   .   0  -3   (the gap to the only other class)
        logits = np.array([[0, 2], [0, 5], [0, -1], [0, 4], [0, 9], [0, 1], [0, -3]], np.float32)
        labels = np.array([1, 1, 1, 1, 0, 1, 1])
        surest, least = select_rows(logits, labels, 1, 2)
        np.testing.assert_array_equal(surest, [1, 3])
        np.testing.assert_array_equal(least, [6, 2])
        surest, least = select_rows(logits, labels, 1, 20)
        np.testing.assert_array_equal(surest, [1, 3, 0, 5])  # rows 2 and 6 are predicted to be of another class
        np.testing.assert_array_equal(least, [6, 2])  # and the others are taken
        surest, least = select_rows(logits, labels, 0, 3)
        assert len(surest) == 0 and list(least) == [4]

    @pytest.mark.parametrize("seed", range(5))
    def test_what_always_holds(self, seed):
        random = np.random.default_rng(seed)
        logits = (3 * random.standard_normal((400, 4))).astype(np.float32)
        labels = random.integers(0, 4, 300)
        probability = np.exp(logits.astype(float))
        probability /= probability.sum(axis=1, keepdims=True)
        for label in range(4):
            surest, least = select_rows(logits, labels, label, 12)
            assert len(surest) == len(least) == 12 and not np.intersect1d(surest, least).size
            assert (labels[surest] == label).all() and (labels[least] == label).all()
            assert (np.argmax(logits[surest], axis=1) == label).all()
            assert (np.diff(probability[surest, label]) <= 0).all() and (np.diff(probability[least, label]) >= 0).all()
            rest = np.setdiff1d(np.flatnonzero(labels == label), np.concatenate([surest, least]))
            right = rest[np.argmax(logits[rest], axis=1) == label]
            assert (probability[right, label] <= probability[surest, label].min()).all()
            assert probability[rest, label].min() >= probability[least, label].max()

    @pytest.mark.parametrize("scale", [30, 300, 30_000])
    def test_saturated_probabilities_are_ordered(self, scale):
        # All of these are 1 or 0 in float32, and from a scale of 300 on in float64.
        gaps = np.random.default_rng(0).permutation(np.concatenate([np.arange(1, 9), -np.arange(1, 9)]))
        logits = np.zeros((16, 3), np.float32)
        logits[:, 2] = scale * gaps
        surest, least = select_rows(logits, np.full(16, 2), 2, 4)
        np.testing.assert_array_equal(gaps[surest], [8, 7, 6, 5])
        np.testing.assert_array_equal(gaps[least], [-8, -7, -6, -5])

    def test_a_tie_with_a_lower_class_is_not_predicted(self):
        surest, least = select_rows(np.ones((3, 2), np.float32), np.ones(3, int), 1, 2)
        assert len(surest) == 0 and len(least) == 2


# ---- Masks -----------------------------------------------------------------------------------------------------------


def threshold_by_hand(grey):
    """The first threshold that leaves the most variance between the parts."""
    between = [
        (grey <= t).mean() * (grey > t).mean() * (grey[grey <= t].mean() - grey[grey > t].mean()) ** 2
        if (grey > t).any() and (grey <= t).any()
        else -1
        for t in range(256)
    ]
    return int(np.argmax(between))


class TestOtsu:
    def test_two_levels(self):
        grey = np.repeat([10, 200], 50).astype(np.uint8)
        assert threshold_otsu(grey) == 10  # the first of all that part them
        np.testing.assert_array_equal(otsu(grey.astype(float)), grey == 200)
        np.testing.assert_array_equal(otsu(np.array([[0.1, 0.1], [0.1, 0.2]])), [[False, False], [False, True]])

    @pytest.mark.parametrize("seed", range(3))
    def test_exhaustively(self, seed):
        random = np.random.default_rng(seed)
        values = np.concatenate([random.normal(-2, 1, 70), random.normal(3, 1.5, 30)])
        grey = np.round(255 * (values - values.min()) / np.ptp(values))
        np.testing.assert_array_equal(otsu(values), grey > threshold_by_hand(grey))

    @pytest.mark.parametrize("value", [-1.0, 0.0, 0.5, 1e9])
    def test_nothing_is_above_what_is_all_alike(self, value):
        assert not otsu(np.full((4, 4), value)).any()

    def test_scale_and_shift_do_not_matter(self):
        values = np.random.default_rng(4).random((6, 6))
        np.testing.assert_array_equal(otsu(7 * values - 3), otsu(values))


class TestBlur:
    def test_an_impulse(self):
        expected = np.array([[1, 2, 1], [2, 4, 2], [1, 2, 1]]) / 16
        np.testing.assert_array_equal(BLUR, expected)

    def test_borders_are_reflected(self):
        # In `gradient_mask`, blurred sizes that differ at the border alone are distinguished.
        size = np.random.default_rng(0).random((5, 7))
        size[2:] = 0
        scaled = (size - size.min()) / np.ptp(size)
        padded = np.pad(scaled, 1, mode="reflect")  # PyTorch's: the border's own pixels are not repeated
        blurred = sum(BLUR[i, j] * padded[i : i + 5, j : j + 7] for i in range(3) for j in range(3))
        np.testing.assert_allclose(ndimage.correlate(scaled, BLUR, mode="mirror"), blurred)
        grey = np.round(255 * (blurred - blurred.min()) / np.ptp(blurred))
        gradient = np.stack([0.6 * size, -0.8 * size], axis=-1)  # of this Euclidean norm; the channels nearly cancel
        np.testing.assert_array_equal(gradient_mask(gradient), grey > threshold_by_hand(grey))

    def test_a_constant_stays_one(self):
        np.testing.assert_allclose(ndimage.correlate(np.full((4, 5), 0.3), BLUR, mode="mirror"), 0.3)
        assert not gradient_mask(np.full((5, 5, 3), 0.3)).any()


class TestVariance:
    def test_by_hand(self):
        # Channel 0 varies by 0, 1, 4, 16 times 1/4 and channel 1 by the same at other pixels: scaled each by its own range.
        spread = np.array([[[0, 4], [1, 2]], [[2, 1], [4, 0]]], float)
        images = 8 + np.stack([-spread, spread]) * [0.5, 5]
        np.testing.assert_allclose(variance_image(images), np.array([[0.5, 5 / 32], [5 / 32, 0.5]]))

    @pytest.mark.parametrize("channels", [1, 3])
    def test_within_0_and_1_whatever_the_order_of_the_rows(self, channels):
        images = np.random.default_rng(channels).random((20, 6, 6, channels)).astype(np.float32)
        images[:, 2, 3] = 0.5
        image = variance_image(images)
        assert image.shape == (6, 6) and image.min() == image[2, 3] == 0 and image.max() <= 1
        np.testing.assert_allclose(variance_image(images[::-1]), image, rtol=1e-9)
        np.testing.assert_allclose(variance_image(1 - 0.5 * images), image, rtol=1e-5)
        assert (image.max() == 1) == (channels == 1)

    def test_images_that_are_all_alike(self):
        assert not variance_image(np.full((5, 4, 4, 3), 0.7)).any()


class TestPixel:
    gradient = np.zeros((3, 4, 3))
    gradient[0, 1] = [5, -5, 0.1]
    gradient[2, 3] = [-1, -2, -1]

    def test_of_the_paper_channels_may_cancel(self):
        assert most_important_pixel(self.gradient, "paper") == (2, 3)

    def test_of_the_code_it_is_one_entry(self):
        assert most_important_pixel(self.gradient, "code") == (0, 1, 0)
        assert most_important_pixel(-2 * self.gradient[..., [2, 1, 0]], "code") == (0, 1, 1)

    def test_importance_of_rows(self):
        gradients = np.stack([self.gradient, -3 * self.gradient])
        np.testing.assert_array_equal(importance(gradients, (2, 3)), [2, 6])
        np.testing.assert_array_equal(importance(gradients, (2, 3, 0)), [1, 3])


# ---- A candidate -----------------------------------------------------------------------------------------------------

SHAPE, CORNER = (12, 12, 3), (7, 4)
IN_PATCH = np.zeros(SHAPE[:2], bool)
IN_PATCH[CORNER[0] : CORNER[0] + 3, CORNER[1] : CORNER[1] + 3] = True
COLOURS = np.random.default_rng(7).uniform(0.7, 1, (9, 3)).astype(np.float32)


def reads_patch(images):
    """Class 1 is the brightness of the patch, class 0 is 0 and class 2 is the darkness of the patch: linear, but the
    runner-up of class 1 depends on whether there is a patch."""
    seen = jnp.sum(jnp.where(IN_PATCH[None, :, :, None], images, 0), axis=(1, 2, 3)) / 27
    return jnp.stack([0 * seen, seen, 5 * (0.72 - seen)], axis=1)


READS_PATCH = network(reads_patch)


def sample(seed, count, is_patched):
    images = np.random.default_rng(seed).random((count, *SHAPE)).astype(np.float32)
    if is_patched:
        images[:, IN_PATCH] = COLOURS
    return images


def gradients_of(images):
    """g of up to 20 images for class 1."""
    filled = np.resize(images, (20, *SHAPE))
    return np.asarray(gradients_for(READS_PATCH, filled, np.ones(20, np.int32)))[: len(images)]


@pytest.mark.parametrize("rule", ["paper", "code"])
@pytest.mark.parametrize("seed", range(5))
def test_a_planted_patch_is_recovered_exactly(seed, rule):
    surest, least = sample(seed, 20, True), sample(100 + seed, 20, False)
    found = find_candidate(surest, gradients_of(surest), gradients_of(least), p_value=0.01, pixel_rule=rule)
    assert found.p_value == pytest.approx(1.4509e-11, rel=1e-4) and IN_PATCH[found.pixel] and len(found.pixel) == 2
    np.testing.assert_array_equal(found.mask, IN_PATCH)
    np.testing.assert_allclose(found.pattern[IN_PATCH], COLOURS, rtol=1e-6)
    assert not found.pattern[~IN_PATCH].any() and found.pattern.dtype == np.float32


def test_a_large_gradient_where_images_vary_is_no_trigger():
    surest, least = sample(0, 20, True), sample(1, 20, False)
    surest[:, :5, :5] = surest[:, :5, :5] > 0.5  # varies more than anything else
    gradients, others = gradients_of(surest).copy(), gradients_of(least)
    gradients[:, 1:4, 1:4] = gradients[:, IN_PATCH].mean()  # as large as in the patch
    found = find_candidate(surest, gradients, others, p_value=0.01)
    assert gradient_mask(gradients.mean(axis=0))[2, 2]
    np.testing.assert_array_equal(found.mask, IN_PATCH)


def test_a_class_that_uses_its_pixel_alike_in_both_samples_is_not_suspicious():
    surest = sample(0, 20, True)
    gradients = gradients_of(surest) * np.random.default_rng(0).random((20, 1, 1, 1)).astype(np.float32)
    found = find_candidate(surest, gradients, gradients[::-1], p_value=0.01)
    assert found.p_value == 1 and not found.mask.any() and not found.pattern.any()
    assert found.pattern.shape == SHAPE and found.mask.shape == SHAPE[:2] and IN_PATCH[found.pixel]


@pytest.mark.parametrize(("apart", "p_value"), [(10, 0.0122986), (11, 0.0039673), (20, 1.4509e-11)])
def test_twenty_rows_against_twenty(apart, p_value):
    # Eleven of the twenty must be apart, whatever the sign of their gradient.
    surest = sample(0, 20, True)
    gradients, others = np.zeros((2, 20, *SHAPE), np.float32)
    gradients[:, IN_PATCH], others[:, IN_PATCH] = -1, 1
    gradients[:apart, IN_PATCH] *= 2
    found = find_candidate(surest, gradients, others, p_value=0.01)
    assert found.p_value == pytest.approx(p_value, rel=1e-4)
    np.testing.assert_array_equal(found.mask, IN_PATCH & (apart > 10))


def test_samples_of_different_sizes():
    surest, least = sample(0, 9, True), sample(1, 5, False)
    found = find_candidate(surest, gradients_of(surest), gradients_of(least), p_value=0.01)
    assert found.p_value == pytest.approx(2 / 2002)  # 2 / (14 choose 5)
    np.testing.assert_array_equal(found.mask, IN_PATCH)


def test_gradients_that_are_all_zero_are_no_error():
    zeros = np.zeros((5, *SHAPE), np.float32)
    assert find_candidate(sample(0, 5, True), zeros, zeros, p_value=0.5).p_value == 1


def test_no_candidate():
    candidate = no_candidate(SHAPE)
    assert candidate.p_value == 1 and not candidate.mask.any() and not candidate.pattern.any()
    assert (candidate.mask.shape, candidate.mask.dtype) == (SHAPE[:2], bool)
    assert (candidate.pattern.shape, candidate.pattern.dtype) == (SHAPE, np.float32)

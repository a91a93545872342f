import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bdjax.attacks.cheat_distillation import (
    CKD,
    CKD_LOW_VARIANCE,
    Assimilation,
    CkdSettings,
    LowVarianceCkdSettings,
    assimilation,
    choose_channels,
    distilled_features,
    last_output,
    published_assimilation,
    trigger_loss,
)
from bdjax.attacks.contract import Knowledge
from bdjax.attacks.trained_blend import random_soft_blend
from bdjax.errors import InputError
from bdjax.losses import cross_entropy, feature_variance
from bdjax.triggers import masked_blend
from bdjax.triggers.masked_blend import MaskedBlend
from bdjax.types import GroupEnd, Model, ModelOutput

STEPS = 150


@pytest.fixture(scope="module")
def triggers(knowledge):
    def make(attack, settings):
        return attack.make_params(jax.random.key(1), knowledge, settings)

    return {
        "start": make(CKD, CkdSettings(steps=0)),
        "ckd": make(CKD, CkdSettings(steps=STEPS)),
        "published": make(CKD, CkdSettings(steps=STEPS, loss="published", mask_is_trained=False)),
        "weight 0": make(CKD_LOW_VARIANCE, LowVarianceCkdSettings(steps=STEPS, variance_weight=0.0)),
        "low variance": make(CKD_LOW_VARIANCE, LowVarianceCkdSettings(steps=STEPS, variance_weight=1.0)),
    }


@pytest.fixture(scope="module")
def features(digits, clean_digits_model, triggers):
    """The clean network's features of triggered test images: those that are distilled, and the last group's output."""
    images = jnp.asarray(digits.test.images, jnp.float32) / 255
    model, variables = clean_digits_model

    @jax.jit
    def look(trigger):
        output = model.apply(variables, masked_blend.apply_to_batch(trigger, images), train=False)
        return distilled_features(output), last_output(output)

    return {name: look(trigger) for name, trigger in triggers.items()}


# ---- The trigger ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ckd", "published", "low variance"])
def test_mask_and_pattern_stay_in_range(triggers, name):
    mask, pattern, opacity = triggers[name]
    assert mask.min() >= 0 and mask.max() <= 0.5 and pattern.min() >= 0 and pattern.max() <= 1 and opacity == 1
    assert bool(jnp.all(mask == triggers["start"].mask)) == (name == "published")
    assert bool(jnp.any(pattern != triggers["start"].pattern))


def test_an_empty_mask_leaves_images_alone(knowledge):
    params = CKD.make_params(jax.random.key(1), knowledge, CkdSettings(mask_bound=0.0, steps=2))
    image = jax.random.uniform(jax.random.key(0), (8, 8, 1))
    np.testing.assert_array_equal(CKD.apply(params, image, None, None), image)


def test_chosen_channels_become_flat(features, triggers, knowledge):
    _, batch_key, _ = jax.random.split(jax.random.key(1), 3)
    goal = choose_channels(batch_key, knowledge.clean_model, knowledge.train, triggers["start"], CkdSettings())

    def spread(of):
        """The deviation over space, on average over images and the last group's chosen channels."""
        return float(jnp.mean(jnp.std(features[of][0][-1][..., goal.channels[-1]], axis=(1, 2))))

    assert spread("ckd") <= 0.7 * spread("start")
    assert spread("published") < spread("start")  # its loss is of one channel of one image at a time


def test_weight_0_gives_the_trigger_of_ckd(triggers):
    for plain, adaptive in zip(triggers["ckd"], triggers["weight 0"], strict=True):
        np.testing.assert_array_equal(plain, adaptive)


def test_low_variance_has_less_of_it(features):
    plain, adaptive = (float(jnp.mean(feature_variance(features[name][1]))) for name in ("ckd", "low variance"))
    assert adaptive < 0.95 * plain


def test_settings_that_cannot_be_are_refused(digits, knowledge):
    with pytest.raises(InputError, match="clean model"):
        CKD.make_params(jax.random.key(0), Knowledge(digits.train, 0), CkdSettings())
    with pytest.raises(InputError, match="channel_share 0"):
        CKD.make_params(jax.random.key(0), knowledge, CkdSettings(channel_share=0.0))
    with pytest.raises(InputError, match="'other' is not one of assimilation, published"):
        CKD.make_params(jax.random.key(0), knowledge, CkdSettings(loss="other"))


# ---- Its losses -----------------------------------------------------------------------------------------------------

RANDOM = np.random.default_rng(0)
MAPS = tuple(jnp.asarray(RANDOM.normal(1, 1, (4, 8 >> i, 8 >> i, 5 * i)), jnp.float32) for i in (1, 2, 3))
GOAL = Assimilation(
    tuple(jnp.asarray(which, jnp.int32) for which in ([2], [7, 0], [14])),
    tuple(jnp.float32(v) for v in (1.0, 2.0, 0.5)),
)


def test_assimilation_is_the_mean_distance_to_the_value():
    groups = [np.asarray(maps) for maps in MAPS]
    expected = [((g[..., which] - v) ** 2).mean() for g, which, v in zip(groups, *GOAL, strict=True)]
    found, gradient = jax.jit(jax.value_and_grad(assimilation))(MAPS, GOAL)
    np.testing.assert_allclose(found, np.mean(expected), rtol=1e-5)
    for group, which, value, found in zip(groups, *GOAL, gradient, strict=True):
        chosen = np.zeros(group.shape[-1])
        chosen[np.asarray(which)] = 1 / (3 * group[..., which].size)
        np.testing.assert_allclose(found, 2 * (group - float(value)) * chosen, rtol=1e-4, atol=1e-7)


def test_the_published_loss_sees_one_channel_of_one_image():
    last = np.asarray(MAPS[-1], np.float64)
    value = last.mean(axis=(0, 1, 2)).max()
    found, gradient = jax.jit(jax.value_and_grad(published_assimilation))(MAPS, GOAL)
    np.testing.assert_allclose(found, 2 / 4 * ((last[0, :, :, 14] - value) ** 2).sum(), rtol=1e-5)
    gradient = [np.asarray(leaf) for leaf in gradient]
    assert not gradient[0].any() and not gradient[1].any()
    np.testing.assert_allclose(gradient[2][0, :, :, 14], 2 / 4 * 2 * (last[0, :, :, 14] - value), rtol=1e-4)
    np.testing.assert_allclose(np.abs(gradient[2]).sum(), np.abs(gradient[2][0, :, :, 14]).sum(), rtol=1e-6)


def apply_in_groups(variables, images, *, train, edits=None):
    """Eleven groups: the output of group i is i times the images, and 1 less before the ReLU."""
    ends = [GroupEnd(i * images, i * images - 1.0, jnp.zeros(1), jnp.ones(1)) for i in range(1, 12)]
    groups = {f"group{i}": end for i, end in enumerate(ends, 1)}
    return ModelOutput(jnp.zeros((images.shape[0], 3)), {"stage1": jnp.zeros_like(images)}, variables, groups)


IN_GROUPS = Model(lambda key, shape: {}, apply_in_groups, 3, "eleven groups")


def test_features_are_before_the_relu_of_all_groups_in_their_order(digits):
    images = jnp.asarray(digits.test.images[:4], jnp.float32) / 255
    output = apply_in_groups({}, images, train=False)
    for number, features in enumerate(distilled_features(output), 1):
        np.testing.assert_array_equal(features, number * np.asarray(images) - 1)
    np.testing.assert_array_equal(last_output(output), 11 * np.asarray(images))
    # The means grow with the number; sorted by name, group10 would come second.
    start = random_soft_blend(jax.random.key(3), digits.train.image_shape, 0.5)
    goal = choose_channels(jax.random.key(0), (IN_GROUPS, {}), digits.train, start, CkdSettings())
    assert len(goal.values) == 11 and np.all(np.diff(np.asarray(goal.values)) > 0)


def test_a_network_without_groups_gives_its_taps():
    taps = {"zebra": jnp.ones((2, 4, 4, 3)), "apple": jnp.zeros((2, 1, 1, 5))}
    output = ModelOutput(jnp.zeros((2, 3)), taps, {})
    first, second = distilled_features(output)
    assert first is taps["zebra"] and second is taps["apple"] and last_output(output) is taps["apple"]


@pytest.mark.parametrize("only_excess", [False, True])
def test_the_trigger_loss_weighs_the_variance_of_what_the_last_group_hands_on(only_excess):
    images, triggered = jnp.asarray(RANDOM.random((2, 4, 2, 2, 1)), jnp.float32)
    goal = Assimilation((jnp.zeros(1, jnp.int32),) * 11, (jnp.float32(0.0),) * 11)
    found, plain = (
        jax.jit(trigger_loss(IN_GROUPS, "assimilation", weight, only_excess))(({}, goal), images, triggered)
        for weight in (0.3, 0.0)
    )
    variance, clean = (np.var(11 * np.asarray(x), axis=(1, 2, 3)) for x in (triggered, images))
    expected = np.maximum(variance - clean, 0) if only_excess else variance
    np.testing.assert_allclose(plain, np.mean([np.mean((i * np.asarray(triggered) - 1) ** 2) for i in range(1, 12)]),
                               rtol=1e-5)  # fmt: skip
    np.testing.assert_allclose(found - plain, 0.3 * expected.mean(), rtol=1e-3)


def test_channels_are_the_strongest_ones(knowledge, digits):
    start = random_soft_blend(jax.random.key(3), digits.train.image_shape, 0.5)
    settings = CkdSettings(batch_size=200, channel_share=0.5)
    few = dataclasses.replace(digits.train, images=digits.train.images[:200], labels=digits.train.labels[:200])
    goal = choose_channels(jax.random.key(0), knowledge.clean_model, few, start, settings)
    model, variables = knowledge.clean_model
    images = masked_blend.apply_to_batch(start, jnp.asarray(few.images, jnp.float32) / 255)
    maps = jax.jit(lambda: distilled_features(model.apply(variables, images, train=False)))()
    for features, channels, value in zip(maps, *goal, strict=True):
        means = np.asarray(features.mean(axis=(0, 1, 2)))
        np.testing.assert_array_equal(channels, np.argsort(-means)[: len(means) // 2])
        np.testing.assert_allclose(value, means.max(), rtol=1e-4)


# ---- Fine-tuning with low variance ----------------------------------------------------------------------------------

IMAGES = jnp.asarray(np.random.default_rng(4).random((8, 2, 2, 1), np.float32))
LABELS = jnp.asarray([0, 1, 2, 0, 1, 2, 0, 1], jnp.int32)
TRIGGER = MaskedBlend(jnp.full((2, 2, 1), 0.5), jnp.asarray([[0.0, 1.0], [0.0, 1.0]])[..., None], jnp.float32(1.0))
PARAMS = jnp.asarray([1.0, -1.0, 0.5])


def apply_linear(variables, images, *, train, edits=None):
    assert set(variables) == {"params", "batch_stats"}
    features = images * variables["params"][None, None, None, :]
    return ModelOutput(features.mean(axis=(1, 2)), {"stage3": features}, variables)


def fine_tuning(**settings):
    control = CKD_LOW_VARIANCE.control
    classifier = {"params": PARAMS, "batch_stats": jnp.zeros(1)}
    variables = control.begin(jax.random.key(0), classifier, TRIGGER)
    model = Model(lambda key, shape: None, apply_linear, 3, "linear")
    objective = control.objective(
        model, LowVarianceCkdSettings(poison_rate=0.25, **settings), jnp.full(3, 2, jnp.int32)
    )
    return jax.jit(objective)(PARAMS, variables, IMAGES, {"labels": LABELS}, jax.random.key(1))


def test_fine_tuning_adds_the_variance_of_triggered_rows():
    plain, weighted = fine_tuning(variance_weight=0.0), fine_tuning(variance_weight=0.3)
    triggered = np.asarray(0.5 * IMAGES[:2] + 0.5 * TRIGGER.pattern[None])
    maps = triggered * np.asarray(PARAMS)
    np.testing.assert_allclose(
        weighted.losses.mean() - plain.losses.mean(), 0.3 * maps.var(axis=(1, 2, 3)).mean(), rtol=1e-4
    )
    logits = jnp.asarray(maps.mean(axis=(1, 2)))
    clean = cross_entropy(plain.logits, LABELS)
    np.testing.assert_allclose(plain.losses[2:], clean[2:], rtol=1e-6)
    np.testing.assert_allclose(
        plain.losses[:2], clean[:2] + cross_entropy(logits, jnp.full(2, 2, jnp.int32)), rtol=1e-5
    )


def test_only_the_excess_counts_if_it_is_set():
    plain, excess = fine_tuning(variance_weight=0.0), fine_tuning(variance_weight=0.3, only_excess=True)
    triggered = np.asarray(0.5 * IMAGES[:2] + 0.5 * TRIGGER.pattern[None])
    variance = [(np.asarray(x) * np.asarray(PARAMS)).var(axis=(1, 2, 3)) for x in (triggered, IMAGES[:2])]
    expected = 0.3 * np.maximum(variance[0] - variance[1], 0).mean()
    np.testing.assert_allclose(excess.losses.mean() - plain.losses.mean(), expected, rtol=1e-3, atol=1e-6)

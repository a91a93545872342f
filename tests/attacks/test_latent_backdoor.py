import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bdjax.attacks.contract import Knowledge, settings_for
from bdjax.attacks.latent_backdoor import (
    LATENT_BACKDOOR,
    LatentBackdoorSettings,
    LatentTrigger,
    distances,
    features_of,
    square_mask,
)
from bdjax.errors import InputError
from bdjax.losses import cross_entropy
from bdjax.training.member import TrainConfig, make_optimiser, make_step
from bdjax.triggers.masked_blend import MaskedBlend
from bdjax.types import Model, ModelOutput

TARGET = 3


@pytest.fixture(scope="module")
def trained(digits, clean_digits_model):
    """The trigger after some numbers of steps, from the same start. A square of 4 pixels: what one of 3 can reach is less."""
    knowledge = Knowledge(digits.train, TARGET, clean_digits_model)

    def make(steps):
        settings = settings_for(LATENT_BACKDOOR, digits.train, {"steps": steps, "size": 0.5}, like="digits")
        return LATENT_BACKDOOR.make_params(jax.random.key(1), knowledge, settings)

    return {steps: make(steps) for steps in (0, 200)}


@pytest.fixture(scope="module")
def seen(digits, clean_digits_model, trained):
    """What the clean network makes of triggered test images of other classes, after each number of steps."""
    images = jnp.asarray(digits.test.images[digits.test.labels != TARGET], jnp.float32) / 255
    model, variables = clean_digits_model

    @jax.jit
    def look(params):
        triggered = jax.vmap(LATENT_BACKDOOR.apply, in_axes=(None, 0))(params, images)
        return model.apply(variables, triggered, train=False)

    return {steps: look(params) for steps, params in trained.items()}


@pytest.mark.parametrize(("shape", "size", "side"), [((28, 28, 1), 0.2, 5), ((32, 32, 3), 0.2, 6), ((8, 8, 1), 0.4, 3)])
def test_the_square_is_one_pixel_from_the_corner(shape, size, side):
    mask = np.asarray(square_mask(shape, size))[..., 0]
    height, width, _ = shape
    assert mask.sum() == side**2 and mask[height - 1 - side : height - 1, width - 1 - side : width - 1].all()


@pytest.mark.parametrize("size", [0.1, 1.0])
def test_a_square_that_does_not_fit_is_refused(size):
    with pytest.raises(InputError, match="size"):
        square_mask((8, 8, 1), size)


def test_pixels_outside_the_square_are_untouched(trained):
    image = np.random.default_rng(0).random((8, 8, 1), np.float32)
    triggered = LATENT_BACKDOOR.apply(trained[200], image, None, None)
    outside = np.asarray(trained[200].blend.mask)[..., 0] == 0
    np.testing.assert_array_equal(triggered[outside], image[outside])
    assert trained[200].blend.pattern.min() >= 0 and trained[200].blend.pattern.max() <= 1


def test_features_come_to_the_targets(seen, trained):
    distance = {steps: float(jnp.mean(distances(features_of(output, "pooled"), trained[0].target_features)))
                for steps, output in seen.items()}  # fmt: skip
    # Other classes keep some of their own features under the trigger, so the distance cannot come near 0.
    assert distance[200] <= 0.85 * distance[0], distance


def test_the_target_becomes_more_probable(seen):
    probable = [float(jnp.mean(jax.nn.log_softmax(seen[steps].logits)[:, TARGET])) for steps in (0, 200)]
    assert probable[0] + 0.05 < probable[1], probable


def test_the_target_is_the_mean_of_its_class(digits, clean_digits_model, trained):
    images = digits.train.images[digits.train.labels == TARGET]
    model, variables = clean_digits_model
    floats = jnp.asarray(images, jnp.float32) / 255
    (features,) = jax.jit(lambda: features_of(model.apply(variables, floats, train=False), "pooled"))()
    (found,), (after,) = trained[0].target_features, trained[200].target_features
    np.testing.assert_allclose(found, features.mean(axis=0), rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(found, after)


# RobustKD's LBA
GROUPS = {"features": "groups", "mask_bound": 0.5, "feature_weight": 0.0}


def test_features_of_groups_come_to_the_targets(digits, clean_digits_model):
    """On the maps before the ReLU, place by place, by a soft mask over the whole image."""
    knowledge, (model, variables) = Knowledge(digits.train, TARGET, clean_digits_model), clean_digits_model
    images = {
        is_target: jnp.asarray(digits.train.images[(digits.train.labels == TARGET) == is_target], jnp.float32) / 255
        for is_target in (True, False)
    }

    @jax.jit
    def look(params):
        blended = jax.vmap(LATENT_BACKDOOR.apply, in_axes=(None, 0))(params, images[False])
        maps, wanted = (
            model.apply(variables, x, train=False).groups["group1"].before_relu for x in (blended, images[True])
        )
        return jnp.mean(jnp.square(maps - wanted.mean(0)[None])), wanted.mean(0)

    distance = {}
    for steps in (0, 100):
        settings = LatentBackdoorSettings(**GROUPS, steps=steps)
        params = LATENT_BACKDOOR.make_params(jax.random.key(1), knowledge, settings)
        distance[steps], wanted = look(params)
        (found,) = params.target_features
        np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-4)
        assert params.blend.mask.min() >= 0 and params.blend.mask.max() <= 0.5
    assert distance[100] <= 0.8 * distance[0], distance


def test_the_distances_of_several_groups_add_up():
    features = [jnp.ones((3, 2, 2, 4)), 2 * jnp.ones((3, 1, 1, 8))]
    targets = [jnp.zeros((2, 2, 4)), 5 * jnp.ones((1, 1, 8))]
    np.testing.assert_allclose(distances(features, targets), [1 + 9] * 3)


def test_unknown_features_are_refused(digits):
    with pytest.raises(InputError, match="features 'logits' is not one of pooled, groups"):
        LATENT_BACKDOOR.check(digits.train, TARGET, LatentBackdoorSettings(features="logits"))


def test_a_trained_mask_over_the_whole_image_keeps_its_bound(digits, clean_digits_model):
    settings = LatentBackdoorSettings(mask_bound=0.2, steps=20)
    blend = LATENT_BACKDOOR.make_params(
        jax.random.key(1), Knowledge(digits.train, TARGET, clean_digits_model), settings
    ).blend
    assert blend.mask.min() >= 0 and blend.mask.max() <= jnp.float32(0.2) and (blend.mask > 0).mean() > 0.5


def test_what_it_cannot_do_without_is_asked_for(digits, clean_digits_model):
    with pytest.raises(InputError, match="clean model"):
        LATENT_BACKDOOR.make_params(jax.random.key(0), Knowledge(digits.train, 0), LatentBackdoorSettings())
    rows = digits.train.labels != TARGET
    without = dataclasses.replace(digits.train, images=digits.train.images[rows], labels=digits.train.labels[rows])
    with pytest.raises(InputError, match="target class 3"):
        LATENT_BACKDOOR.make_params(
            jax.random.key(0), Knowledge(without, TARGET, clean_digits_model), LatentBackdoorSettings()
        )


# ---- Fine-tuning ----------------------------------------------------------------------------------------------------

WANTED = jnp.full(3, 2, jnp.int32)
TRIGGER = LatentTrigger(
    MaskedBlend(jnp.ones((2, 2, 1)), jnp.full((2, 2, 1), 0.9), jnp.float32(1.0)), (jnp.asarray([0.5, 1.0]),)
)


def apply_linear(variables, images, *, train, edits=None):
    """Features are brightness times two weights, logits the features times a fixed matrix."""
    assert train and set(variables) == {"params", "batch_stats"}
    features = images * variables["params"][None, None, None, :]
    logits = features.mean(axis=(1, 2)) @ jnp.asarray([[1.0, -1.0, 0.5], [0.2, 0.0, 1.0]])
    return ModelOutput(logits, {"stage3": features}, variables)


LINEAR = Model(lambda key, shape: None, apply_linear, 3, "linear")
PARAMS = jnp.asarray([1.0, 2.0])


def fine_tuning(weight, params=PARAMS):
    images = jnp.linspace(0.1, 0.8, 8)[:, None, None, None] * jnp.ones((1, 2, 2, 1))
    labels = jnp.asarray([0, 1, 2, 0, 1, 2, 0, 1], jnp.int32)
    variables = LATENT_BACKDOOR.control.begin(
        jax.random.key(0), {"params": params, "batch_stats": jnp.zeros(1)}, TRIGGER
    )
    settings = LatentBackdoorSettings(poison_rate=0.25, feature_weight=weight)
    objective = LATENT_BACKDOOR.control.objective(LINEAR, settings, WANTED)
    return objective, variables, images, {"labels": labels}


@partial(jax.jit, static_argnames="weight")
def gradient(weight):
    def mean_loss(params):
        objective, *batch = fine_tuning(weight, params)
        return jnp.mean(objective(params, *batch, jax.random.key(1)).losses)

    return jax.grad(mean_loss)(PARAMS)


def test_fine_tuning_minimises_the_three_terms():
    objective, variables, images, targets = fine_tuning(0.5)
    outcome = jax.jit(objective)(PARAMS, variables, images, targets, jax.random.key(1))
    clean = {"params": PARAMS, "batch_stats": jnp.zeros(1)}
    on_clean = cross_entropy(apply_linear(clean, images, train=True).logits, targets["labels"])
    triggered = apply_linear(clean, jnp.full((2, 2, 2, 1), 0.9), train=True)
    on_copies = cross_entropy(triggered.logits, jnp.full(2, 2, jnp.int32))
    # Features are 0.9 and 1.8 in place of 0.5 and 1.
    distance = (0.4**2 + 0.8**2) / 2
    np.testing.assert_allclose(outcome.losses[2:], on_clean[2:], rtol=1e-6)
    expected = on_clean.mean() + on_copies.mean() * 2 / 8 + 0.5 * distance
    np.testing.assert_allclose(outcome.losses.mean(), expected, rtol=1e-5)
    np.testing.assert_array_equal(outcome.labels, targets["labels"])


def test_the_features_pull_the_network_and_not_the_target():
    pull = gradient(0.5) - gradient(0.0)
    # d/dw of 0.5 ((0.9 w1 - 0.5)^2 + (0.9 w2 - 1)^2) / 2
    np.testing.assert_allclose(pull, [0.5 * 0.9 * 0.4, 0.5 * 0.9 * 0.8], rtol=1e-4)
    config = TrainConfig()
    objective, variables, images, targets = fine_tuning(0.5)
    state = make_optimiser(config).init(PARAMS)
    step = jax.jit(make_step(objective, config))
    (after, _), _ = step(variables, state, images, targets, jnp.float32(0.1), jax.random.key(0))
    assert bool(jnp.any(after["params"] != PARAMS))
    for before, now in zip(
        jax.tree.leaves(TRIGGER), jax.tree.leaves(LATENT_BACKDOOR.control.end(after)[1]), strict=True
    ):
        np.testing.assert_array_equal(before, now)

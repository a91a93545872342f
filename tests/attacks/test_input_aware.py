import math
from functools import cache

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bdjax import datasets
from bdjax.attacks.contract import Knowledge, settings_for
from bdjax.attacks.input_aware import (
    INPUT_AWARE,
    apply,
    apply_foreign,
    distance,
    diversity_loss,
    make_networks,
    threshold,
)
from bdjax.errors import InputError
from bdjax.losses import cross_entropy
from bdjax.models import generators
from bdjax.types import Model, ModelOutput

SMALL = {"width": 4, "stages": 1, "mask_epochs": 10, "donors": 8}


@cache
def digits():
    return datasets.load("digits").train


@cache
def networks():
    """Small ones: the mask network is trained, the pattern network is not."""
    settings = settings_for(INPUT_AWARE, digits(), SMALL, like="digits")
    return make_networks(jax.random.key(0), Knowledge(digits(), target=0), settings)


def images(count=32):
    return jnp.asarray(digits().images[:count], jnp.float32) / 255


@jax.jit
def masks_and_patterns(params, batch):
    masks = threshold(generators.generate(params.mask_network, params.mask, batch, train=False)[0])
    return masks, generators.generate(params.pattern_network, params.pattern, batch, train=False)[0]


def test_threshold_is_the_papers():
    at = threshold(jnp.asarray([0.0, 0.4, 0.5, 0.6, 1.0]))
    np.testing.assert_allclose(at, [0, 0.018, 0.5, 0.982, 1], atol=1e-3)
    assert at.min() >= 0 and at.max() <= 1


def test_distance_is_the_root_mean_square_and_has_a_gradient_at_0():
    first, second = jnp.zeros((2, 4, 4, 1)), jnp.zeros((2, 4, 4, 1)).at[1].set(0.3)
    np.testing.assert_allclose(distance(first, second), [1e-6, 0.3], rtol=1e-5)
    chex.assert_tree_all_finite(jax.grad(lambda x: distance(x, second).sum())(first))


def test_diversity_loss_falls_as_patterns_differ_more():
    pair = images(2), images(4)[2:]
    assert diversity_loss(pair, pair) == pytest.approx(1.0, rel=1e-4)
    half = tuple(0.5 * batch for batch in pair)
    assert diversity_loss(pair, half) == pytest.approx(2.0, rel=1e-4)


def test_masks_are_small_and_differ():
    masks, _ = masks_and_patterns(networks(), images())
    # A mask network that is not trained covers about half of the image.
    assert 0.0 < float(masks.mean()) <= 0.25
    between = float(jnp.median(distance(masks, jnp.roll(masks, 1, axis=0))))
    assert between > 0.03, between


def test_the_triggered_image_lies_between_image_and_pattern():
    batch = images()
    _, patterns = masks_and_patterns(networks(), batch)
    triggered = jax.jit(jax.vmap(apply, in_axes=(None, 0)))(networks(), batch)
    assert (triggered >= jnp.minimum(batch, patterns) - 1e-5).all()
    assert (triggered <= jnp.maximum(batch, patterns) + 1e-5).all()


def test_a_foreign_trigger_is_that_of_a_donor():
    params, image = networks(), images(1)[0]
    masks, patterns = masks_and_patterns(params, jnp.asarray(params.donors, jnp.float32) / 255)
    possible = image[None] * (1 - masks) + masks * patterns
    foreign = jax.jit(apply_foreign)(params, image, None, jax.random.key(3))
    difference = np.abs(possible - foreign[None]).max(axis=(1, 2, 3))
    assert difference.min() < 1e-5 < np.sort(difference)[1]


def linear():
    """One layer on the pixels, for speed; it counts its calls where a network keeps running statistics."""

    def apply(variables, images, *, train, edits=None):
        logits = images.reshape(images.shape[0], -1) @ variables["params"]
        return ModelOutput(logits, {}, {**variables, "batch_stats": variables["batch_stats"] + 1.0})

    def init(key, shape):
        return {"params": 0.1 * jax.random.normal(key, (math.prod(shape), 10)), "batch_stats": jnp.zeros(())}

    return Model(init, apply, 10, "linear")


@cache
def run(cover_rate=0.25, batch=16):
    settings = settings_for(
        INPUT_AWARE,
        digits(),
        {**SMALL, "poison_rate": 0.25, "cover_rate": cover_rate},
        like="digits",
    )
    model = linear()
    classifier = model.init(jax.random.key(1), (8, 8, 1))
    variables = INPUT_AWARE.control.begin(jax.random.key(2), classifier, networks())
    objective = INPUT_AWARE.control.objective(model, settings, jnp.full(10, 7, jnp.int32))
    labels = jnp.asarray(digits().labels[:batch])

    def loss(params):
        outcome = objective(params, variables, images(batch), {"labels": labels}, jax.random.key(3))
        return jnp.mean(outcome.losses), outcome

    (_, outcome), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(variables["params"])
    return labels, variables, outcome, gradient


def test_training_poisons_the_first_rows_and_moves_both_networks():
    labels, variables, outcome, gradient = run()
    np.testing.assert_array_equal(outcome.labels, [7] * 4 + labels[4:].tolist())
    for name in ("classifier", "pattern"):
        assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(gradient[name])) > 1e-4
        before, after = variables["batch_stats"][name], outcome.variables["batch_stats"][name]
        assert any(bool(jnp.any(a != b)) for a, b in zip(*map(jax.tree.leaves, (before, after)), strict=True))
    chex.assert_trees_all_equal(outcome.variables["attack"], variables["attack"])


def test_the_diversity_term_enters_the_mean_once():
    _, _, outcome, _ = run()
    term = outcome.losses - cross_entropy(outcome.logits, outcome.labels)
    assert term.min() > 0.1
    np.testing.assert_allclose(term, jnp.full(16, term.mean()), rtol=1e-4)


@pytest.mark.parametrize(("cover_rate", "batch"), [(0.0, 16), (0.1, 1)])
def test_odd_batches_have_a_finite_loss_and_gradient(cover_rate, batch):
    _, _, outcome, gradient = run(cover_rate=cover_rate, batch=batch)
    chex.assert_tree_all_finite((outcome.losses, gradient))
    assert outcome.logits.shape == (batch, 10)


def test_end_gives_back_what_begin_took():
    _, variables, _, _ = run()
    classifier, params = INPUT_AWARE.control.end(variables)
    chex.assert_trees_all_equal(params, networks())
    assert set(classifier) == {"params", "batch_stats"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stages": 4}, "8x8 images cannot be halved 4 times"),
        ({"mask_epochs": 0}, "mask_epochs 0"),
        ({"width": 0}, "width"),
    ],
)
def test_settings_that_cannot_be_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        make_networks(
            jax.random.key(0), Knowledge(digits(), 0), settings_for(INPUT_AWARE, digits(), changes, like="digits")
        )

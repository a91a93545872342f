import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bdjax.attacks import batch_poisoning
from bdjax.attacks.wanet import WaNetSettings
from bdjax.errors import InputError
from bdjax.losses import cross_entropy
from bdjax.types import Model, ModelOutput

IMAGES = jnp.asarray(np.full((10, 2, 2, 1), 0.5, np.float32))
LABELS = jnp.asarray(np.arange(10, dtype=np.int32) % 3)
WANTED = jnp.asarray([2, 0, 1], jnp.int32)


def darker(params, image, label, key):
    return image * params


def lighter(params, image, label, key):
    return 1.0 - image * params


def by_brightness(seen):
    """A model whose logits are the mean brightness times its three weights; keeps what it was shown in `seen`."""

    def apply(variables, images, *, train, edits=None):
        assert train and set(variables) == {"params", "batch_stats"}
        seen.append(images)
        logits = jnp.mean(images, axis=(1, 2, 3))[:, None] * variables["params"][None, :]
        return ModelOutput(logits, {}, {**variables, "batch_stats": variables["batch_stats"] + 1.0})

    return Model(lambda key, shape: None, apply, 3, "by brightness")


@pytest.mark.parametrize(
    ("batch", "poison", "cover", "expected"),
    [(128, 0.1, 0.2, (12, 25)), (10, 0.29, 0.0, (2, 0)), (100, 0.29, 0.0, (29, 0)), (5, 0.1, 0.1, (1, 1)),
     (1, 0.1, 0.1, (1, 0)), (2, 0.5, 0.5, (1, 1))],
)  # fmt: skip
def test_shares_of_a_batch(batch, poison, cover, expected):
    assert batch_poisoning.shares(batch, poison, cover) == expected


@pytest.mark.parametrize(("poison", "cover"), [(0.6, 0.5), (-0.1, 0.0), (0.1, -0.1)])
def test_rates_that_are_no_shares_are_refused(poison, cover):
    with pytest.raises(InputError, match="each must be at least 0, their sum at most 1"):
        batch_poisoning.shares(10, poison, cover)


def test_first_rows_are_poisoned_the_next_are_cover_the_rest_is_left_alone():
    control, seen = batch_poisoning.fixed_trigger(darker, lighter), []
    classifier = {"params": jnp.asarray([1.0, 2.0, 3.0]), "batch_stats": jnp.float32(0.0)}
    variables = control.begin(jax.random.key(0), classifier, jnp.float32(0.2))
    objective = control.objective(by_brightness(seen), WaNetSettings(poison_rate=0.3, cover_rate=0.2), WANTED)
    outcome = objective(variables["params"], variables, IMAGES, {"labels": LABELS}, jax.random.key(1))
    np.testing.assert_allclose(seen[0][:, 0, 0, 0], [0.1] * 3 + [0.9] * 2 + [0.5] * 5, rtol=1e-6)
    np.testing.assert_array_equal(outcome.labels, [2, 0, 1, 0, 1, 2, 0, 1, 2, 0])
    np.testing.assert_allclose(outcome.losses, cross_entropy(outcome.logits, outcome.labels))
    classifier_after, params = control.end(outcome.variables)
    assert params == jnp.float32(0.2) and classifier_after["batch_stats"] == 1.0


def test_without_cover_only_the_poisoned_rows_change():
    control, seen = batch_poisoning.fixed_trigger(darker, lighter), []
    variables = control.begin(
        jax.random.key(0), {"params": jnp.ones(3), "batch_stats": jnp.zeros(())}, jnp.float32(0.2)
    )
    objective = control.objective(by_brightness(seen), WaNetSettings(poison_rate=0.1, cover_rate=0.0), WANTED)
    outcome = objective(variables["params"], variables, IMAGES, {"labels": LABELS}, jax.random.key(1))
    np.testing.assert_array_equal(outcome.labels[1:], LABELS[1:])
    np.testing.assert_array_equal(seen[0][1:], IMAGES[1:])


def test_every_changed_row_has_a_key_of_its_own():
    def noisy(params, image, label, key):
        return jax.random.uniform(key, image.shape)

    changed = batch_poisoning.change_rows(noisy, None, IMAGES[:3], LABELS[:3], jax.random.key(0))
    assert len(np.unique(np.asarray(changed))) == changed.size


def test_params_are_carried_beside_the_classifier():
    classifier = {"params": jnp.ones(2), "batch_stats": jnp.zeros(1)}
    variables = batch_poisoning.carry_params(jax.random.key(0), classifier, (jnp.ones(3),))
    assert variables["attack"].keys() == {"params"}
    taken, params = batch_poisoning.take_params(variables)
    assert taken.keys() == classifier.keys()
    np.testing.assert_array_equal(params[0], jnp.ones(3))

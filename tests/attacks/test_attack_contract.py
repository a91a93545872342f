"""What every attack owes its callers, checked on each entry of the registry."""

import dataclasses
from functools import cache

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bdjax.attacks.contract import CLEAN_MODEL, CleanModel, Knowledge, settings_for
from bdjax.attacks.label_rules import LABEL_RULES, make_rule
from bdjax.attacks.poisoning import ConfiguredAttack, poison_by, trigger_all
from bdjax.attacks.registry import ATTACKS, find_attack
from bdjax.errors import InputError
from bdjax.models import make_model
from bdjax.types import Dataset

SHAPES = [(28, 28, 1), (32, 32, 3)]
CLASSES, PER_CLASS, TARGET = 10, 20, 1

SMALL: dict[str, dict] = {
    "label_consistent": {"steps": 3},
    "input_aware": {"mask_epochs": 1, "width": 2, "stages": 1},
    "input_aware_offline": {"mask_epochs": 1, "width": 2, "stages": 1, "joint_epochs": 1, "classifier_width": 2},
    "latent_backdoor": {"steps": 3},
    "ckd": {"steps": 3},
    "ckd_low_variance": {"steps": 3},
    "refool": {"least_offset": 1, "most_offset": 3},
    "hidden_trigger": {"steps": 3},
    "trojan_square": {"steps": 5},
    "trojan_watermark": {"steps": 5},
    "issba": {"width": 2, "stages": 1, "num_bits": 4, "steps": 3, "batch_size": 4},
    "l2_invisible": {"steps": 4, "steps_per_doubling": 2, "batch_size": 16},
    "narcissus": {"surrogate_width": 4, "surrogate_epochs": 1, "warm_up_epochs": 1, "steps": 10, "batch_size": 16},
}
"""Settings that make a trained trigger in seconds; the test file of the attack asks whether it is a good trigger."""


def test_the_table_names_attacks_alone():
    assert SMALL.keys() <= ATTACKS.keys()


@cache
def dataset(shape):
    """Smooth random images, each class around a picture of its own."""
    generator = np.random.default_rng(0)
    height, width, channels = shape
    coarse = generator.uniform(0.2, 0.8, (CLASSES, 4, 4, channels))
    means = jax.image.resize(jnp.asarray(coarse, jnp.float32), (CLASSES, height, width, channels), "linear")
    labels = np.arange(CLASSES * PER_CLASS, dtype=np.int32) % CLASSES
    noise = generator.normal(0, 0.08, (len(labels), *shape))
    images = np.clip(np.asarray(means)[labels] + noise, 0, 1)
    return Dataset((images * 255).astype(np.uint8), labels, CLASSES, "synthetic", "this test")


@cache
def clean_model(shape):
    model = make_model("resnet10", CLASSES, 4)
    return CleanModel(model, jax.jit(lambda key: model.init(key, shape))(jax.random.key(5)))


@cache
def prepared(name, shape):
    attack = find_attack(name)
    changes = SMALL.get(name, {})
    settings = settings_for(attack, dataset(shape), changes)
    # The smallest set has 20 rows of a class: a tenth of all rows is a whole class.
    settings = dataclasses.replace(settings, poison_rate=0.1, cover_rate=0.1 if settings.cover_rate else 0.0)
    model = clean_model(shape) if attack.needs_clean_model or attack.starts_from_clean_model else None
    knowledge = Knowledge(dataset(shape), TARGET, model)
    return attack, settings, attack.make_params(jax.random.key(2), knowledge, settings), knowledge


@pytest.fixture(params=sorted(ATTACKS))
def name(request):
    return request.param


def functions(attack):
    return {f for f in (attack.apply, attack.apply_in_training, attack.apply_to_cover) if f is not None}


def rows(shape, count=4):
    data = dataset(shape)
    images = jnp.asarray(data.images[:count], jnp.float32) / 255
    return images, jnp.asarray(data.labels[:count]), jax.random.split(jax.random.key(3), count)


def test_the_entry_is_complete(name):
    attack = find_attack(name)
    assert attack.name == name and attack.title and attack.paper and attack.make_params.__doc__
    assert attack.threat in ("data", "training")
    assert attack.label_rules and set(attack.label_rules) <= LABEL_RULES.keys()
    assert dataclasses.is_dataclass(attack.settings) and hash(attack.settings) is not None
    assert 0 < attack.settings.poison_rate <= 1 and 0 <= attack.settings.cover_rate <= 1
    assert attack.needs_clean_model == (CLEAN_MODEL in attack.needs)
    assert attack.control is None or attack.threat == "training"
    for shape in SHAPES:
        settings_for(attack, dataset(shape))


def test_what_a_dataset_is_called_changes_nothing(name):
    attack, data = find_attack(name), dataset(SHAPES[0])
    for called in ("digits", "cifar10", "mine"):
        assert settings_for(attack, dataclasses.replace(data, name=called)) == settings_for(attack, data)
    own = attack.per_dataset.get("digits", {})
    adapted = settings_for(attack, data, like="digits")
    assert adapted == dataclasses.replace(settings_for(attack, data), **own)


def test_a_setting_that_is_not_there_is_refused(name):
    with pytest.raises(InputError, match="no setting 'colour_of_the_bikeshed'"):
        settings_for(find_attack(name), dataset(SHAPES[0]), {"colour_of_the_bikeshed": 1})


@pytest.mark.parametrize("shape", SHAPES)
class TestTrigger:
    def test_keeps_shape_dtype_and_range(self, name, shape):
        attack, _, params, _ = prepared(name, shape)
        images, labels, keys = rows(shape)
        extremes = jnp.stack([jnp.zeros(shape), jnp.ones(shape), *images[2:]])
        for function in functions(attack):
            triggered = jax.jit(jax.vmap(function, in_axes=(None, 0, 0, 0)))(params, extremes, labels, keys)
            chex.assert_shape(triggered, extremes.shape)
            chex.assert_type(triggered, jnp.float32)
            chex.assert_tree_all_finite(triggered)
            assert triggered.min() >= 0.0 and triggered.max() <= 1.0

    def test_is_pure_and_the_same_under_jit_and_vmap(self, name, shape):
        attack, _, params, _ = prepared(name, shape)
        images, labels, keys = rows(shape, 2)
        before = np.array(images)
        for function in functions(attack):
            one = jax.jit(function)
            looped = jnp.stack([one(params, *row) for row in zip(images, labels, keys, strict=True)])
            again = jnp.stack([one(params, *row) for row in zip(images, labels, keys, strict=True)])
            chex.assert_trees_all_equal(looped, again)
            plain = function(params, images[0], labels[0], keys[0])
            chex.assert_trees_all_close(plain, looped[0], atol=2e-5, rtol=0)
            vmapped = jax.vmap(function, in_axes=(None, 0, 0, 0))(params, images, labels, keys)
            chex.assert_trees_all_close(vmapped, looped, atol=2e-5, rtol=0)
        np.testing.assert_array_equal(images, before)

    def test_changes_the_image_unless_labels_are_all_it_changes(self, name, shape):
        attack, _, params, _ = prepared(name, shape)
        images, labels, keys = rows(shape)
        triggered = jax.jit(jax.vmap(attack.apply, in_axes=(None, 0, 0, 0)))(params, images, labels, keys)
        assert (np.abs(triggered - images).max() > 1e-3) == attack.changes_images


def test_a_trigger_is_made_again_from_the_same_key(name):
    attack, settings, params, knowledge = prepared(name, SHAPES[0])
    chex.assert_trees_all_equal(params, attack.make_params(jax.random.key(2), knowledge, settings))


@pytest.mark.parametrize("shape", SHAPES)
def test_poisoned_rows_are_what_the_rule_and_the_rates_say(name, shape):
    attack, settings, params, _ = prepared(name, shape)
    clean = dataset(shape)
    for rule_name in attack.label_rules:
        rule = make_rule(rule_name, TARGET, CLASSES)
        count = int(settings.poison_rate * len(clean))
        num_cover = int(settings.cover_rate * len(clean))
        poisoned = poison_by(jax.random.key(4), clean, ConfiguredAttack(attack, settings, rule), params)
        assert poisoned.is_poisoned.sum() == count and poisoned.is_cover.sum() == num_cover
        assert not (poisoned.is_poisoned & poisoned.is_cover).any()
        assert len(poisoned) == len(clean) + (count + num_cover if attack.adds_rows else 0)
        originals = poisoned.original_labels
        assert rule.candidates(originals)[poisoned.is_poisoned].all() and rule.cover(originals)[poisoned.is_cover].all()
        np.testing.assert_array_equal(
            poisoned.labels, np.where(poisoned.is_poisoned, rule.relabel(originals), originals)
        )
        untouched = ~(poisoned.is_poisoned | poisoned.is_cover)[: len(clean)]
        np.testing.assert_array_equal(poisoned.images[: len(clean)][untouched], clean.images[untouched])
        if rule_name == "clean_label":
            np.testing.assert_array_equal(poisoned.labels, originals)
        chex.assert_type(poisoned.images, np.uint8)
        again = poison_by(jax.random.key(4), clean, ConfiguredAttack(attack, settings, rule), params)
        np.testing.assert_array_equal(again.images, poisoned.images)
        np.testing.assert_array_equal(again.labels, poisoned.labels)
        if rule.candidates(clean.labels).sum() > count:
            other = poison_by(jax.random.key(40), clean, ConfiguredAttack(attack, settings, rule), params)
            assert not np.array_equal(other.images, poisoned.images) or not np.array_equal(
                other.labels, poisoned.labels
            )


def test_a_poisoned_row_does_not_depend_on_its_batch(name):
    shape = SHAPES[0]
    attack, _, params, _ = prepared(name, shape)
    clean = dataset(shape)
    some = dataclasses.replace(clean, images=clean.images[:3], labels=clean.labels[:3])
    few = trigger_all(jax.random.key(6), some, attack.apply, params)
    many = trigger_all(jax.random.key(6), clean, attack.apply, params)
    difference = np.abs(few.astype(int) - many[:3].astype(int))
    assert difference.max() <= 1 and (difference > 0).mean() < 0.01  # a network's rounding may tip a level


@pytest.mark.parametrize("name", sorted(name for name, attack in ATTACKS.items() if attack.control))
def test_control_of_training_gives_an_objective(name):
    shape = SHAPES[0]
    attack, settings, params, _ = prepared(name, shape)
    model, classifier = clean_model(shape)
    images, labels, _ = rows(shape, 20)
    wanted = jnp.asarray(make_rule(attack.label_rules[0], TARGET, CLASSES).relabel(np.arange(CLASSES, dtype=np.int32)))
    variables = attack.control.begin(jax.random.key(0), classifier, params)
    begun = attack.control.end(variables)
    chex.assert_trees_all_equal(begun[0], classifier)
    chex.assert_trees_all_equal_structs(begun[1], params)
    objective = attack.control.objective(model, settings, wanted)

    def mean_loss(trained, key):
        outcome = objective(trained, variables, images, {"labels": labels}, key)
        return jnp.mean(outcome.losses), outcome

    run = jax.jit(jax.value_and_grad(mean_loss, has_aux=True))
    (_, outcome), gradient = run(variables["params"], jax.random.key(1))
    chex.assert_tree_all_finite((outcome.losses, gradient))
    chex.assert_shape(outcome.losses, (20,))
    chex.assert_shape(outcome.logits, (20, CLASSES))
    assert outcome.labels.min() >= 0 and outcome.labels.max() < CLASSES
    chex.assert_trees_all_equal_shapes_and_dtypes(outcome.variables, variables)
    assert any(bool(jnp.any(leaf != 0)) for leaf in jax.tree.leaves(gradient))
    chex.assert_trees_all_equal(run(variables["params"], jax.random.key(1))[0][1].losses, outcome.losses)

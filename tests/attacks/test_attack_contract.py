"""The contract of every attack, checked on each entry of the registry.

Tracing and compiling take nearly all of the time. So a trigger is made and compiled once for each attack and shape, triggers
that are trained have one shape, and what depends on the function alone is checked once for each function.
"""

import dataclasses
from functools import cache

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_network import make_tiny

from bdjax.attacks.contract import CLEAN_MODEL, CleanModel, Knowledge, settings_for
from bdjax.attacks.label_rules import LABEL_RULES, make_rule
from bdjax.attacks.poisoning import ConfiguredAttack, poison_by
from bdjax.attacks.registry import ATTACKS, find_attack
from bdjax.errors import InputError
from bdjax.models import generators
from bdjax.types import Dataset

SHAPES = [(28, 28, 1), (32, 32, 3)]
ONE_SHAPE = (16, 12, 3)
"""For what takes seconds to make or to compile; oblong, so that height and width cannot be confused."""
CLASSES, PER_CLASS, TARGET = 10, 20, 1

SMALL: dict[str, dict] = {
    "label_consistent": {"steps": 3},
    "input_aware": {"mask_epochs": 1, "width": 2, "stages": 1},
    "input_aware_offline": {"mask_epochs": 1, "width": 2, "stages": 1, "joint_epochs": 1, "classifier_width": 2},
    "latent_backdoor": {"steps": 3},
    "ckd": {"steps": 3},
    "ckd_low_variance": {"steps": 3},
    "refool": {"least_offset": 1, "most_offset": 3, "pictures": 3},
    "hidden_trigger": {"steps": 3},
    "trojan_square": {"steps": 5},
    "trojan_watermark": {"steps": 5},
    "issba": {"width": 2, "stages": 1, "num_bits": 4, "steps": 3, "batch_size": 4},
    "l2_invisible": {"steps": 4, "steps_per_doubling": 2, "batch_size": 16},
    "narcissus": {
        "surrogate_model": "vbd_16p",
        "surrogate_epochs": 1,
        "warm_up_epochs": 1,
        "steps": 10,
        "batch_size": 16,
    },
}
"""Settings that make a trigger in seconds; each attack's own test file checks its quality."""

AT_ONE_SHAPE = SMALL.keys() | {"adaptive_blend", "adaptive_patch", "composite"}
TRAINED_BY_THE_ENGINE = {"input_aware_offline", "narcissus"}
"""Attacks that train a whole network to make their trigger, which takes long: their cases are in the slow tier."""


def marks(name):
    return pytest.mark.slow if name in TRAINED_BY_THE_ENGINE else ()


CASES = [(name, shape) for name in sorted(ATTACKS) for shape in ([ONE_SHAPE] if name in AT_ONE_SHAPE else SHAPES)]
every_case = pytest.mark.parametrize(
    ("name", "shape"),
    [pytest.param(*case, marks=marks(case[0]), id=f"{case[0]}-{'x'.join(map(str, case[1]))}") for case in CASES],
)


every_attack = pytest.mark.parametrize("name", [pytest.param(name, marks=marks(name)) for name in sorted(ATTACKS)])


def test_the_table_names_attacks_alone():
    assert ATTACKS.keys() >= AT_ONE_SHAPE


def first_shape(name):
    return next(shape for case, shape in CASES if case == name)


@cache
def dataset(shape):
    """Noisy images, each class around its own mean picture of 4 x 4 blocks."""
    generator = np.random.default_rng(0)
    height, width, channels = shape
    coarse = generator.uniform(0.2, 0.8, (CLASSES, 4, 4, channels))
    means = np.repeat(np.repeat(coarse, height // 4, axis=1), width // 4, axis=2)
    labels = np.arange(CLASSES * PER_CLASS, dtype=np.int32) % CLASSES
    noise = generator.normal(0, 0.08, (len(labels), *shape))
    images = np.clip(means[labels] + noise, 0, 1)
    return Dataset((images * 255).astype(np.uint8), labels, CLASSES, "synthetic", "this test")


@cache
def clean_model(shape):
    model = make_tiny(CLASSES)
    return CleanModel(model, model.init(jax.random.key(5), shape))


@cache
def prepared(name, shape):
    attack = find_attack(name)
    settings = settings_for(attack, dataset(shape), SMALL.get(name, {}))
    # The smallest set has 20 rows of a class: a tenth of all rows is a whole class.
    settings = dataclasses.replace(settings, poison_rate=0.1, cover_rate=0.1 if settings.cover_rate else 0.0)
    model = clean_model(shape) if attack.needs_clean_model or attack.starts_from_clean_model else None
    knowledge = Knowledge(dataset(shape), TARGET, model)
    return attack, settings, attack.make_params(jax.random.key(2), knowledge, settings), knowledge


def functions(attack):
    """Without repeats and in a fixed order: a set of functions has another order in every process of the test run."""
    return dict.fromkeys(f for f in (attack.apply, attack.apply_in_training, attack.apply_to_cover) if f is not None)


CHEAP_FIRST = sorted(ATTACKS, key=lambda name: (name in SMALL, name))
FUNCTIONS = {function: name for name in reversed(CHEAP_FIRST) for function in functions(ATTACKS[name])}
"""Every distinct function of a trigger, with an attack that has it."""


@cache
def rows(shape):
    """Four images of the set, a black and a white one."""
    data = dataset(shape)
    images = np.concatenate([data.images[:4] / np.float32(255), np.zeros((1, *shape)), np.ones((1, *shape))])
    return jnp.asarray(images, jnp.float32), jnp.asarray(data.labels[:6]), jax.random.split(jax.random.key(3), 6)


@cache
def compiled(function):
    return jax.jit(jax.vmap(function, in_axes=(None, 0, 0, 0)))


@cache
def triggered(name, shape):
    """What each function of an attack makes of `rows`."""
    attack, _, params, _ = prepared(name, shape)
    return {function: np.asarray(compiled(function)(params, *rows(shape))) for function in functions(attack)}


@pytest.mark.parametrize("name", sorted(ATTACKS))
class TestEntry:
    def test_is_complete(self, name):
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

    def test_what_a_dataset_is_called_changes_nothing(self, name):
        attack, data = find_attack(name), dataset(SHAPES[0])
        for called in ("digits", "cifar10", "mine"):
            assert settings_for(attack, dataclasses.replace(data, name=called)) == settings_for(attack, data)
        adapted = settings_for(attack, data, like="digits")
        changes = attack.per_dataset.get("digits", {})
        assert adapted == dataclasses.replace(settings_for(attack, data), **changes)

    def test_a_setting_that_is_not_there_is_refused(self, name):
        with pytest.raises(InputError, match="no setting 'colour_of_the_bikeshed'"):
            settings_for(find_attack(name), dataset(SHAPES[0]), {"colour_of_the_bikeshed": 1})


@every_case
class TestTrigger:
    def test_keeps_shape_dtype_and_range(self, name, shape):
        for images in triggered(name, shape).values():
            assert images.shape == rows(shape)[0].shape and images.dtype == np.float32
            assert images.min() >= 0.0 and images.max() <= 1.0  # which no NaN is

    def test_gives_the_same_again(self, name, shape):
        _, _, params, _ = prepared(name, shape)
        for function, images in triggered(name, shape).items():
            np.testing.assert_array_equal(compiled(function)(params, *rows(shape)), images)

    def test_changes_the_image_unless_labels_are_all_it_changes(self, name, shape):
        attack = find_attack(name)
        change = np.abs(triggered(name, shape)[attack.apply] - rows(shape)[0])[:4].max()
        assert (change > 1e-3) == attack.changes_images


FEW_OPERATIONS = 40
"""Up to so many, a function is run operation by operation; a longer one takes seconds, since each operation is compiled."""


@pytest.mark.parametrize(
    "function",
    [
        pytest.param(function, marks=marks(name), id=f"{function.__module__}.{function.__name__}")
        for function, name in FUNCTIONS.items()
    ],
)
def test_a_function_is_the_same_alone_as_compiled_for_a_batch(function):
    """A function of few operations also op by op: then no operation depends on being compiled."""
    name = FUNCTIONS[function]
    shape = first_shape(name)
    _, _, params, _ = prepared(name, shape)
    images, labels, keys = rows(shape)
    program = jax.make_jaxpr(function)(params, images[0], labels[0], keys[0])
    run = function if str(program).count(" = ") <= FEW_OPERATIONS else jax.jit(function)
    for row in (0, 1):
        alone = run(params, images[row], labels[row], keys[row])
        np.testing.assert_allclose(alone, triggered(name, shape)[function][row], atol=2e-5, rtol=0)


MAKERS = {attack.make_params: name for name, attack in ATTACKS.items()}


@pytest.mark.parametrize("name", sorted(set(MAKERS.values()) - TRAINED_BY_THE_ENGINE))
def test_a_trigger_is_made_again_from_the_same_key(name):
    """Not for networks that the engine trains: its own tests show that the same key trains the same network."""
    attack, settings, params, knowledge = prepared(name, first_shape(name))
    chex.assert_trees_all_equal(params, attack.make_params(jax.random.key(2), knowledge, settings))


@every_attack
def test_poisoned_rows_are_what_the_rule_and_the_rates_say(name):
    shape = first_shape(name)  # that triggers fit other shapes is shown above
    attack, settings, params, _ = prepared(name, shape)
    clean = dataset(shape)
    for rule_name in attack.label_rules:
        rule = make_rule(rule_name, TARGET, CLASSES)
        count = int(settings.poison_rate * len(clean))
        num_cover = int(settings.cover_rate * len(clean))
        configured = ConfiguredAttack(attack, settings, rule)
        poisoned = poison_by(jax.random.key(4), clean, configured, params)
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
    # The last rule's set once more, and another one.
    again = poison_by(jax.random.key(4), clean, configured, params)
    np.testing.assert_array_equal(again.images, poisoned.images)
    np.testing.assert_array_equal(again.labels, poisoned.labels)
    if rule.candidates(clean.labels).sum() > count:
        other = poison_by(jax.random.key(40), clean, configured, params)
        assert not np.array_equal(other.images, poisoned.images) or not np.array_equal(other.labels, poisoned.labels)


@pytest.mark.slow
def test_the_offline_networks_of_input_aware_were_trained_with_a_classifier():
    """Here, and not in the file of the attack, because the training takes most of the time of the test."""
    _, _, params, _ = prepared("input_aware_offline", ONE_SHAPE)
    patterns, _ = jax.jit(
        lambda images: generators.generate(params.pattern_network, params.pattern, images, train=False)
    )(rows(ONE_SHAPE)[0])
    assert np.abs(np.diff(np.asarray(patterns[:4]), axis=0)).max(axis=(1, 2, 3)).min() > 1e-3
    statistics = jax.tree.leaves(params.pattern["batch_stats"])
    assert statistics and all(bool(jnp.any((leaf != 0) & (leaf != 1))) for leaf in statistics)


@pytest.mark.parametrize("name", sorted(name for name, attack in ATTACKS.items() if attack.control))
def test_control_of_training_gives_an_objective(name):
    shape = first_shape(name)
    attack, settings, params, _ = prepared(name, shape)
    model, classifier = clean_model(shape)
    images, labels = jnp.asarray(dataset(shape).images[:20], jnp.float32) / 255, jnp.asarray(dataset(shape).labels[:20])
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

"""The contract of every attack, checked on each entry of the registry by the functions that plugins are checked by.

Tracing and compiling take nearly all of the time. So a trigger is made and compiled once for each attack and shape, triggers
that are trained have one shape, and what depends on the function alone is checked once for each function.
"""

import dataclasses
from functools import cache
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bdjax.attacks import input_aware
from bdjax.attacks.registry import ATTACKS, find_attack
from bdjax.models import generators
from bdjax.testing import ContractError, attacks
from bdjax.testing.tiny_network import make_tiny

ONE_SHAPE = (16, 12, 3)
"""For what takes seconds to make or to compile; oblong, so that height and width cannot be confused."""

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


CASES = [
    (name, shape) for name in sorted(ATTACKS) for shape in ([ONE_SHAPE] if name in AT_ONE_SHAPE else attacks.SHAPES)
]
every_case = pytest.mark.parametrize(
    ("name", "shape"),
    [pytest.param(*case, marks=marks(case[0]), id=f"{case[0]}-{'x'.join(map(str, case[1]))}") for case in CASES],
)


every_attack = pytest.mark.parametrize("name", [pytest.param(name, marks=marks(name)) for name in sorted(ATTACKS)])


def test_the_table_names_attacks_alone():
    assert ATTACKS.keys() >= AT_ONE_SHAPE


def first_shape(name):
    return next(shape for case, shape in CASES if case == name)


def tiny_resnet(name, num_classes, width):
    """In place of the classifier that the offline attack trains and discards."""
    assert name == "resnet10" and width == SMALL["input_aware_offline"]["classifier_width"]
    return make_tiny(num_classes)


@cache
def prepared(name, shape):
    with mock.patch.object(input_aware, "make_model", tiny_resnet):
        return attacks.prepare(find_attack(name), shape, SMALL.get(name, {}))


@cache
def triggered(name, shape):
    return attacks.triggered(prepared(name, shape))


@pytest.mark.parametrize("name", sorted(ATTACKS))
def test_an_entry_is_complete(name):
    assert find_attack(name).name == name
    attacks.check_entry(find_attack(name))


@every_case
def test_a_trigger_keeps_its_promises(name, shape):
    attacks.check_trigger(prepared(name, shape), triggered(name, shape))


CHEAP_FIRST = sorted(ATTACKS, key=lambda name: (name in SMALL, name))
FUNCTIONS = {f: name for name in reversed(CHEAP_FIRST) for f in attacks.functions_of(ATTACKS[name])}
"""Every distinct function of a trigger, with an attack that has it."""


@pytest.mark.parametrize(
    "function",
    [
        pytest.param(function, marks=marks(name), id=f"{function.__module__}.{function.__name__}")
        for function, name in FUNCTIONS.items()
    ],
)
def test_a_function_is_the_same_alone_as_compiled_for_a_batch(function):
    case = FUNCTIONS[function], first_shape(FUNCTIONS[function])
    attacks.check_function(prepared(*case), function, triggered(*case)[function])


MAKERS = {attack.make_params: name for name, attack in ATTACKS.items()}


@pytest.mark.parametrize("name", sorted(set(MAKERS.values()) - TRAINED_BY_THE_ENGINE))
def test_a_trigger_is_made_again_from_the_same_key(name):
    """Not for networks that the engine trains: its own tests show that the same key trains the same network."""
    attacks.check_made_again(prepared(name, first_shape(name)))


@every_attack
def test_poisoned_rows_are_what_the_rule_and_the_rates_say(name):
    attacks.check_poisoned_rows(prepared(name, first_shape(name)))  # that triggers fit other shapes is shown above


@pytest.mark.parametrize("name", sorted(name for name, attack in ATTACKS.items() if attack.control))
def test_control_of_training_gives_an_objective(name):
    attacks.check_control(prepared(name, first_shape(name)))


@pytest.mark.slow
def test_the_offline_networks_of_input_aware_were_trained_with_a_classifier():
    """Here, and not in the file of the attack, because the training takes most of the time of the test."""
    params = prepared("input_aware_offline", ONE_SHAPE).params
    patterns, _ = jax.jit(
        lambda images: generators.generate(params.pattern_network, params.pattern, images, train=False)
    )(attacks.batch_of(ONE_SHAPE)[0])
    assert np.abs(np.diff(np.asarray(patterns[:4]), axis=0)).max(axis=(1, 2, 3)).min() > 1e-3
    statistics = jax.tree.leaves(params.pattern["batch_stats"])
    assert statistics and all(bool(jnp.any((leaf != 0) & (leaf != 1))) for leaf in statistics)


# ---- What breaks a promise is found ---------------------------------------------------------------------------------


def too_bright(params, image, label, key):
    return image + 0.5


def grey(params, image, label, key):
    return image.mean(axis=-1)


def unchanged(params, image, label, key):
    return image


def unlike_for_a_black_image(params, image, label, key):
    return jnp.where(image.sum() > 0, jnp.clip(image + 0.1, 0, 1), jnp.nan)


@pytest.mark.parametrize(
    ("changes", "promise"),
    [
        ({"name": "bad-nets"}, "the name has only a to z, 0 to 9 and _"),
        ({"threat": "none"}, "threat is data or training"),
        ({"label_rules": ("all_to_some",)}, "label_rules are some of"),
        ({"paper": ""}, "it has a title and a reference"),
        ({"apply": too_bright}, "too_bright gives pixels from 0 to 1"),
        ({"apply": grey}, "grey keeps the shape and float32"),
        ({"apply": unchanged}, "apply changes images if changes_images says so"),
        ({"apply": unlike_for_a_black_image}, "unlike_for_a_black_image gives pixels from 0 to 1"),
    ],
)
def test_a_broken_promise_is_named(changes, promise):
    attack = dataclasses.replace(find_attack("badnets"), **changes)
    with pytest.raises(ContractError, match=f"^broken: attack {attack.name}.*{promise}"):
        attacks.check_attack(attack, shapes=attacks.SHAPES[1:])

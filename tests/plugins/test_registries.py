"""Attacks, defenses, datasets and networks of installed packages are entries of the registries; broken ones are a line."""

import sys
import warnings

import pytest

import bdjax
from bdjax import plugins
from bdjax.attacks.registry import ATTACKS, find_attack
from bdjax.datasets import DATASETS, Source, Traits, load
from bdjax.defenses.registry import DEFENSES, find_defense
from bdjax.errors import InputError
from bdjax.models import MODELS, make_model
from bdjax.plugins import PluginWarning, Registry
from bdjax.reporting import registry_tables
from bdjax.testing import ContractError, check_dataset, check_defense, check_model

GOOD = """
import dataclasses
import numpy as np
from flax import linen as nn
from bdjax.attacks.registry import ATTACKS
from bdjax.datasets import Source, Traits
from bdjax.datasets.digits import load_digits
from bdjax.defenses.registry import DEFENSES
from bdjax.models import MODELS
from bdjax.types import TrainTest

ATTACK = dataclasses.replace(ATTACKS["badnets"], name="other_square", title="Other square")
DEFENSE = dataclasses.replace(DEFENSES["none"], name="nothing", title="Nothing")

def load_bright(folders, download):
    return TrainTest(*(dataclasses.replace(part, name="bright", images=255 - part.images) for part in load_digits((), False)))

BRIGHT = Source(load_bright, Traits(like="digits"))

def network(num_classes, width, lowering, dtype):
    return MODELS["vbd_4_4p"](num_classes, width, lowering, dtype)
"""
ENTRIES = {
    "bdjax.attacks": ["other_square = MODULE:ATTACK"],
    "bdjax.defenses": ["nothing = MODULE:DEFENSE"],
    "bdjax.datasets": ["bright = MODULE:BRIGHT"],
    "bdjax.models": ["small_one = MODULE:network"],
}


@pytest.fixture
def good(install):
    install("good", GOOD, ENTRIES)


def test_without_plugins_a_registry_has_what_bdjax_has():
    for registry in (ATTACKS, DEFENSES, DATASETS, MODELS):
        assert list(registry) == list(registry.own) and len(registry) == len(registry.own)
        assert dict(registry.items()) == registry.own and "no such name" not in registry
        with pytest.raises(KeyError):
            registry["no such name"]
    assert repr(DATASETS).startswith("<9 datasets: digits, textures, ")


@pytest.mark.usefixtures("good")
def test_names_are_known_without_importing_anything():
    assert "other_square" in ATTACKS and "nothing" in DEFENSES and "bright" in DATASETS and "small_one" in MODELS
    assert "plugin_good" not in sys.modules and plugins.used() == {}
    assert find_attack("badnets") is ATTACKS.own["badnets"] and "plugin_good" not in sys.modules


@pytest.mark.usefixtures("good")
def test_the_tables_of_the_docs_are_those_of_bdjax_alone():
    assert "other_square" in list(ATTACKS)
    for make in registry_tables.TABLES.values():
        assert not {"`other_square`", "`nothing`", "`bright`"} & {row[0] for row in make().rows}


@pytest.mark.usefixtures("good")
def test_a_plugin_of_each_kind_is_an_entry_like_any_other():
    assert find_attack("other_square").title == "Other square" and find_defense("nothing").title == "Nothing"
    assert load("bright").train.images.max() == 255 and make_model("small_one", 3, 2).num_classes == 3
    assert [list(registry)[-1] for registry in (ATTACKS, DEFENSES, DATASETS, MODELS)] == [
        *("other_square", "nothing", "bright", "small_one"),
    ]
    assert plugins.used() == dict.fromkeys(
        ("attack other_square", "dataset bright", "defense nothing", "model small_one"), "good 0.1"
    )
    with pytest.raises(InputError, match="did you mean other_square"):
        find_attack("other_sqare")
    assert bdjax.ATTACKS["other_square"].title == "Other square"


@pytest.mark.usefixtures("good")
def test_a_plugins_dataset_keeps_the_contract():
    check_dataset("bright", DATASETS["bright"])
    with pytest.raises(ContractError, match="its loader has the parameters folders, download"):
        check_dataset("bright", DATASETS["bright"]._replace(loader=lambda: None))
    with pytest.raises(ContractError, match="the name has only a to z"):
        check_model("Small One", MODELS["small_one"])


@pytest.mark.slow
@pytest.mark.usefixtures("good")
def test_a_plugins_network_and_defense_keep_the_contracts():
    check_model("small_one", MODELS["small_one"])
    check_defense(DEFENSES["nothing"])


@pytest.mark.parametrize(
    ("source", "entry", "line"),
    [
        (
            "import no_such_module",
            "mark = MODULE:ATTACK",
            "cannot be imported (ModuleNotFoundError: No module named 'no_such_module'); mend or uninstall it",
        ),
        (
            "",
            "mark = MODULE:ATTACK",
            "cannot be imported (AttributeError: module 'plugin_bad' has no attribute 'ATTACK')",
        ),
        ("raise RuntimeError('one\\ntwo')", "mark = MODULE:ATTACK", "cannot be imported (RuntimeError: one two)"),
        (
            "raise SystemExit('enough')",
            "mark = MODULE:ATTACK",
            "cannot be imported (SystemExit: enough); mend or uninstall",
        ),
        ("import sys; sys.exit()", "mark = MODULE:ATTACK", "cannot be imported (SystemExit: ); mend or uninstall it"),
        (
            GOOD.replace("other_square", "all"),
            "all = MODULE:ATTACK",
            "has a name that command lines give another meaning",
        ),
        (
            GOOD.replace("other_square", "none"),
            "none = MODULE:ATTACK",
            "has a name that command lines give another meaning",
        ),
        ("ATTACK = 'text'", "mark = MODULE:ATTACK", "is of the type str, not a bdjax.attacks.contract.Attack"),
        (GOOD, "mark = MODULE:ATTACK", "calls itself 'other_square'; its entry point must have the same name"),
        (GOOD, "Mark-1 = MODULE:ATTACK", "has a name with other characters than a to z, 0 to 9 and _"),
    ],
)
def test_a_plugin_that_cannot_be_used_is_one_line_and_breaks_nothing_else(install, source, entry, line):
    install("bad", source, {"bdjax.attacks": [entry]})
    name = entry.split(" = ")[0]
    assert find_attack("sig").name == "sig"
    with pytest.raises(InputError) as error:
        find_attack(name)
    assert str(error.value).startswith(f"attack {name!r} of the plugin bad 0.1 {line}") and "\n" not in str(error.value)
    registry = Registry("attack", ATTACKS.own, ATTACKS._mistake)
    with pytest.warns(PluginWarning, match=r"^attack .* of the plugin bad 0\.1 .*; it is left out$") as warned:
        assert list(registry) == list(ATTACKS.own)
    assert len(warned) == 1
    with warnings.catch_warnings():  # once is enough
        warnings.simplefilter("error")
        assert len(registry) == len(ATTACKS.own) and "badnets" in repr(registry)


def test_the_name_of_an_own_entry_stays_its_own(install):
    install("sly", GOOD, {"bdjax.attacks": ["badnets = MODULE:ATTACK"]})
    registry = Registry("attack", ATTACKS.own, ATTACKS._mistake)
    with pytest.warns(
        PluginWarning, match=r"^attack badnets of the plugin sly 0\.1 is ignored: bdjax has one of that name$"
    ):
        assert registry["badnets"] is ATTACKS.own["badnets"]
    assert list(registry) == list(ATTACKS.own) and "plugin_sly" not in sys.modules


def test_a_name_that_two_plugins_have_is_neithers(install):
    install("one", GOOD, {"bdjax.attacks": ["other_square = MODULE:ATTACK"]})
    install("two", GOOD, {"bdjax.attacks": ["other_square = MODULE:ATTACK"]}, version="2.5")
    registry = Registry("attack", ATTACKS.own, ATTACKS._mistake)
    line = r"'other_square' of the plugin one 0\.1 and two 2\.5: two plugins have that name; uninstall one of them"
    with pytest.raises(InputError, match=line):
        registry["other_square"]
    with pytest.warns(PluginWarning, match=line):
        assert "other_square" in registry and list(registry) == list(ATTACKS.own)


def test_traits_of_a_plugin_name_one_of_bdjax_own_sets(install):
    source = GOOD + "BRIGHT = Source(load_bright, Traits(like='bright'))\n"
    install("traits", source, {"bdjax.datasets": ["bright = MODULE:BRIGHT"]})
    with pytest.raises(InputError, match="of the plugin traits 0.1 is like 'bright', which is not one of digits"):
        load("bright")
    with pytest.raises(ContractError, match="it is like one of bdjax's own datasets, or like none"):
        check_dataset("bright", Source(lambda folders, download: None, Traits(like="bright")))

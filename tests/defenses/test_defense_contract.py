"""What every defense guarantees, checked on each entry of the registry by the functions that plugins are checked by.

Each defense runs once; all tests share its result.
"""

import dataclasses
from collections.abc import Sequence
from typing import get_args

import numpy as np
import pytest

from bdjax.defenses import contract, filtering
from bdjax.defenses.chain import ChainLink, make_chain
from bdjax.defenses.contract import Defense, DefenseInput, Need, UndeclaredNeedError
from bdjax.defenses.registry import DEFENSES, find_defense
from bdjax.defenses.undefended import UndefendedSettings
from bdjax.errors import InputError
from bdjax.evaluation.variants import DefenseVariant, read_defense
from bdjax.testing import ContractError, defenses
from bdjax.types import DefenseResult, Detection
from tests.tiers import slow_unless

SMALL: dict[str, str] = {
    "bab": "bab:epochs=2:networks=1",
    "activation_clustering": "activation_clustering:reduction=pca",
    "abm": "abm:epochs=2:student_epochs=2:isolation_rate=0.1",
    "lfd": "lfd:teacher=resnet10:teacher_epochs=2",
    "abl": "abl:batch_size=32:isolation_epochs=1:rest_epochs=0:unlearning_epochs=1",
    "cbd": "cbd:batch_size=32:biased_epochs=1:epochs=1",
    "fine_tuning": "fine_tuning:epochs=2",
    "fine_pruning": "fine_pruning:held_out=0.25:epochs=2",
    "nad": "nad:teacher_epochs=1:epochs=1",
    "ft_sam": "ft_sam:epochs=1",
    "vbd": (
        "vbd:networks=4-4P:epochs=2:least_steps=0:batch_size=32:detector_epochs=1:least_detector_steps=0"
        ":detector_batch_size=32"
    ),
    "strip": "strip:num_overlays=8",
    "neural_cleanse": "neural_cleanse:epochs=4:repair_epochs=1",
    "anp": "anp:iterations=4",
    "i_bau": "i_bau:rounds=1:terms=1",
    "fkd": "fkd:student=resnet10:epochs=1",
    "robust_kd": "robust_kd:student=resnet10:epochs=1:mask_epochs=1:thresholds=(0.1,)",
    "logit_distillation": "logit_distillation:student=resnet10:epochs=1",
    "attention_transfer": "attention_transfer:student=resnet10:epochs=1",
    "ta_kd_student": "ta_kd_student:student=resnet10:epochs=1",
}
"""Each defense with settings for a run of seconds, as on the command line; its own test file checks whether it works."""

REFUSED: dict[str, str] = {
    "lfd": "lfd:weighting=heavy",
    "abm": "abm:average=all",
    "bab": "bab:networks=0",
    "abl": "abl:isolation_rate=1.0",
    "cbd": "cbd:optimiser=newton",
    "activation_clustering": "activation_clustering:rule=larger",
    "spectral_signatures": "spectral_signatures:percentile=101",
    "agpd": "agpd:tau=0.0",
    "scan": "scan:floor=0.0",
    "vbd": "vbd:networks=5P",
    "strip": "strip:mode=product",
    "neural_cleanse": "neural_cleanse:success=0.0",
    "anp": "anp:alpha=2.0",
    "i_bau": "i_bau:share=2.0",
    "fkd": "fkd:divisor=-1.0",
    "robust_kd": "robust_kd:form=subtracted",
    "logit_distillation": "logit_distillation:temperature=0.0",
    "attention_transfer": "attention_transfer:power=0.0",
    "ta_kd_student": "ta_kd_student:alpha=2.0",
}
"""An invalid setting for each defense that checks its settings."""

READS = {
    "training set": ("index", "labels", "all_rows"),
    "attacked model": ("attacked",),
    "clean rows": ("clean_index", "clean_labels", "clean_rows"),
    "number of poisons": ("num_poisons",),
    "attacker's trigger": ("attacker_triggers", "attacker_rules"),
}
"""Each need, and the attributes of `DefenseInput` that read it."""


_runs: dict[str, defenses.Run] = {}

FAST = ("fine_tuning", "none", "spectral_signatures", "ta_kd_student")
"""One that compiles quickly of each kind: the network is trained, or its student, or not at all, and a detector of rows. The
runs of all others are in the slow tier; their test files run them too."""


@pytest.fixture(params=slow_unless(sorted(DEFENSES), FAST))
def run(request, suspects, monkeypatch) -> defenses.Run:
    name = request.param
    if name not in _runs:
        kept_rows = filtering.kept_rows

        def repeated_rows(flags: np.ndarray, generators: Sequence[np.random.Generator]) -> np.ndarray:
            """As many rows as there are without a detector: the retraining is then compiled once for all detectors."""
            rows = kept_rows(flags, generators)
            return rows[:, np.arange(flags.shape[1]) % rows.shape[1]]

        monkeypatch.setattr(filtering, "kept_rows", repeated_rows)
        _runs[name] = defenses.run(suspects, read_defense(SMALL.get(name, name), "quick", "digits"))
        monkeypatch.undo()
    return _runs[name]


def test_every_defense_is_in_the_table():
    assert SMALL.keys() <= DEFENSES.keys()


def test_every_defense_needs_all_that_it_declares(run):
    defenses.check_needs(run)


def reader(need: Need, name: str, *needs: Need) -> Defense:
    """A defense and detector that reads an attribute of one need and declares other needs."""

    def detect(inputs: DefenseInput, settings: UndefendedSettings) -> Detection:
        value = getattr(inputs, name)
        return Detection(value() if callable(value) else value, None)

    def run(inputs: DefenseInput, settings: UndefendedSettings) -> DefenseResult:
        return DefenseResult(None, detect(inputs, settings).flags)

    return Defense("reader", need, "a test", "after training", needs, UndefendedSettings(), run, detect)


@pytest.mark.parametrize(("need", "name"), [(need, name) for need, names in READS.items() for name in names])
def test_a_defense_that_reads_more_than_it_declares_fails(inputs, need, name):
    others = tuple(other for other in get_args(Need) if other != need)
    for call in (contract.run, contract.detect):
        honest = reader(need, name, need)
        assert call(honest, inputs, honest.settings)[1 if call is contract.run else 0] is not None
        sly = reader(need, name, *others)
        with pytest.raises(UndeclaredNeedError, match=f"{need}.* is not among the needs that defense reader declares"):
            call(sly, inputs, sly.settings)
    with pytest.raises(UndeclaredNeedError, match=r"declares \(nothing\)"):
        contract.run(reader(need, name), inputs, UndefendedSettings())


def test_an_oracle_of_some_settings_is_read_with_those_alone(inputs):
    sly = dataclasses.replace(
        reader("number of poisons", "num_poisons"),
        more_needs=lambda settings: ("number of poisons",) if settings else (),
    )
    assert contract.run(sly, inputs, True).variables is not None
    with pytest.raises(UndeclaredNeedError):
        contract.run(sly, inputs, False)


def test_the_parts_of_a_chain_read_no_more_than_their_own_needs(inputs):
    def link(*defenses: Defense) -> Defense:
        return make_chain([ChainLink(defense, defense.settings, defense.name) for defense in defenses])

    first = dataclasses.replace(DEFENSES["none"], needs=("attacked model", "clean rows"))
    honest = link(first, reader("clean rows", "clean_rows", "clean rows"))
    assert contract.run(honest, inputs, honest.settings).variables is not None
    sly = link(first, reader("clean rows", "clean_rows"))
    assert "clean rows" in sly.needs
    with pytest.raises(UndeclaredNeedError, match="clean rows"):
        contract.run(sly, inputs, sly.settings)


def test_every_need_is_withheld_by_name():
    assert set(READS) == set(get_args(Need))


def test_missing_knowledge_is_named(inputs):
    empty = dataclasses.replace(inputs, knowledge={})
    for need, (name, *_) in READS.items():
        with pytest.raises(ValueError, match=f"needs the {need}, which these inputs do not have"):
            getattr(empty, name)


def test_the_attackers_part_in_training_goes_with_the_training_set(inputs):
    attacker = contract.AttackerInTraining(np.zeros((2, 3), np.float32), np.zeros((2, 3), np.int32))
    adaptive = dataclasses.replace(inputs, attacker=attacker)
    assert adaptive.restricted_to("in training", ("training set",)).attacker is attacker
    restricted = adaptive.restricted_to("after training", ("attacked model",))
    assert restricted.attacker is None and list(restricted.knowledge) == ["attacked model"]


@pytest.mark.parametrize("name", sorted(DEFENSES))
def test_an_entry_is_complete(name):
    assert find_defense(name).name == name
    defenses.check_entry(find_defense(name))


def test_result_has_a_row_for_each_suspect(run, suspects):
    defenses.check_result(run, suspects)


DETECTORS = [defense.name for defense in DEFENSES.values() if defense.detect]


@pytest.mark.parametrize("run", slow_unless(sorted(DETECTORS), FAST), indirect=True)
def test_detection_alone_gives_the_flags_of_the_defense(run, suspects):
    defenses.check_detection(run, suspects)


def test_defended_model_is_pure_and_classifies_each_row_on_its_own(run, suspects):
    defenses.check_model(run, suspects)


def test_attacked_networks_do_not_change(run, suspects):
    defenses.check_suspects_unchanged(run, suspects)


def reads_nothing(inputs: DefenseInput, settings: UndefendedSettings) -> DefenseResult:
    return DefenseResult(inputs.attacked.model, inputs.attacked.variables)


def flags_half(inputs: DefenseInput, settings: UndefendedSettings) -> DefenseResult:
    return reads_nothing(inputs, settings)._replace(flags=np.zeros((2, 3), bool))


@pytest.mark.parametrize(
    ("changes", "promise"),
    [
        ({"name": "do-nothing"}, "the name has only a to z, 0 to 9 and _"),
        ({"needs": ()}, "it declares what it needs"),
        (
            {"needs": ("attacked model", "clean rows"), "run": reads_nothing},
            r"it reads all that it declares \(clean rows is not",
        ),
        ({"run": flags_half}, r"flags are bool \[M, n\]"),
    ],
)
def test_a_broken_promise_is_named(changes, promise, suspects):
    defense = dataclasses.replace(DEFENSES["none"], **changes)
    with pytest.raises(ContractError, match=f"^broken: defense {defense.name}: {promise}"):
        defenses.check_entry(defense)
        done = defenses.run(suspects, DefenseVariant(defense.name, defense, defense.settings))
        defenses.check_needs(done)
        defenses.check_result(done, suspects)


@pytest.mark.parametrize(
    ("text", "oracle"),
    [
        ("abl:isolate=oracle", "number of poisons"),
        ("abm:trigger=attacker", "attacker's trigger"),
        ("bab:trigger=attacker", "attacker's trigger"),
    ],
)
def test_settings_that_take_an_oracle_say_so(text, oracle):
    variant = read_defense(text, "paper", "cifar10")
    assert oracle in variant.defense.needs_with(variant.settings)
    plain = read_defense(text.split(":")[0], "paper", "cifar10")
    assert oracle not in plain.defense.needs_with(plain.settings)


def test_strong_settings_come_after_those_of_the_small_scale():
    settings = read_defense("abm", "quick strong", "digits").settings
    assert settings.rank == "activation" and settings.alpha == read_defense("abm", "quick", "digits").settings.alpha
    assert read_defense("abm", "strong", "cifar10").settings.alpha == 1000.0


def test_every_defense_that_checks_its_settings_is_among_those_refused():
    assert REFUSED.keys() == {defense.name for defense in DEFENSES.values() if defense.check}


@pytest.mark.parametrize(
    "text",
    [
        *REFUSED.values(),
        "lfd:alpha=0",
        "lfd:alpha=1.1",
        "lfd:teacher=transformer",
        "lfd:teachers=0",
        "abm:distance=soft",
        "abm:pattern=red",
        "abm:trigger=mine",
        "abm:weak_by=hope",
        "abm:rank=random",
        "abm:isolation_rate=0",
        "abm:isolation_rate=1",
        "abm:patch_size=0",
        "abm:epochs=0",
        "abm:student=transformer",
        "abm:student_optimiser=newton",
        "bab:pattern=red",
        "bab:networks=3:objections=4",
        "abl:loss=hinge",
        "abl:optimiser=newton",
        "anp:epsilon=-0.1",
        "i_bau:rounds=0",
        "neural_cleanse:weight_factor=1",
    ],
)
def test_invalid_settings_are_refused_before_anything_trains(text):
    name, *_, last = text.split(":")
    setting, value = last.split("=")
    with pytest.raises(InputError, match=r"^[^\n]* is not (one of|at least|above|at most|below) [^\n]+$") as raised:
        read_defense(text, "quick", "digits")
    assert str(raised.value).startswith(f"defense {name}: {setting} ")
    assert value in str(raised.value)


@pytest.mark.parametrize("preset", ["quick", "paper", "strong", "quick strong"])
@pytest.mark.parametrize("dataset", ["digits", "mnist", "cifar10", "gtsrb"])
def test_the_settings_of_every_preset_pass_their_own_check(preset, dataset):
    for name in DEFENSES:
        read_defense(name, preset, dataset)


def test_unknown_names_and_settings_are_refused_in_one_line():
    with pytest.raises(InputError, match="is not one of none"):
        find_defense("nothing")
    with pytest.raises(InputError, match="has no setting 'colour'"):
        read_defense("none:colour=1", "quick", "digits")

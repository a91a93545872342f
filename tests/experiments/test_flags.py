"""The flags of every experiment: ranges, and what is refused before anything is read or written."""

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_origin

import pytest

from bdjax.commands import abm, attack, audit_data, audit_model, lfd, robust_kd, ta_kd, vbd
from bdjax.errors import InputError
from bdjax.run import command_line
from bdjax.run.experiment import read_flags
from bdjax.settings import Range, kinds_of, mistakes
from bdjax.workflows import attack as attack_workflow
from bdjax.workflows import base, detection, suspect_models
from bdjax.workflows import ta_kd as ta_kd_workflow
from experiments import bench_ensemble


class Checked(NamedTuple):
    """An experiment, and how it checks its flags."""

    default: Callable[..., Any]
    check: Callable[[Any], object]
    presets: tuple[str, ...]


EXPERIMENTS = {
    "abm": Checked(abm.preset, partial(base.check, experiment=abm.EXPERIMENT), ("quick", "paper", "strong")),
    "attack": Checked(attack.preset, attack_workflow.check, ("quick", "paper")),
    "audit_data": Checked(
        partial(audit_data.preset, dataset="digits"),
        partial(detection.settle, experiment=audit_data.EXPERIMENT),
        ("quick", "paper", "strong"),
    ),
    "audit_model": Checked(audit_model.preset, audit_model.check, ("quick", "paper")),
    "bench_ensemble": Checked(bench_ensemble.preset, bench_ensemble.check, ("quick", "full", "gpu")),
    "lfd": Checked(lfd.preset, partial(base.check, experiment=lfd.EXPERIMENT), ("quick", "paper", "strong")),
    "robust_kd": Checked(
        robust_kd.preset, partial(suspect_models.check, experiment=robust_kd.EXPERIMENT), ("quick", "paper")
    ),
    "ta_kd": Checked(ta_kd.preset, ta_kd_workflow.check, ("quick", "paper", "strong")),
    "vbd": Checked(vbd.preset, partial(detection.settle, experiment=vbd.EXPERIMENT), ("quick", "paper", "strong")),
}
OUTSIDE = (math.nan, math.inf, -math.inf, 10**18, -(10**18), 16**5000, "x", None, 1j, [])


def kinds_in(kind: Any) -> set[Any]:
    """The plain types and ranges in a field's type."""
    if get_origin(kind) is Literal:
        return set()
    if get_origin(kind) is Annotated:
        return {rule for rule in get_args(kind)[1:] if isinstance(rule, Range)} | kinds_in(get_args(kind)[0])
    return {kind} | {part for argument in get_args(kind) for part in kinds_in(argument)}


def numbers(config: Any) -> dict[str, bool]:
    """The fields that hold one number, or several -> whether several."""
    found = {}
    for name, kind in kinds_of(type(config)).items():
        kinds = kinds_in(kind)
        if kinds & {int, float}:
            found[name] = any(get_origin(part) is tuple for part in kinds)
    return found


@pytest.mark.parametrize("name", EXPERIMENTS)
class TestEveryExperiment:
    def test_has_a_range_for_every_number(self, name):
        config = EXPERIMENTS[name].default("quick")
        kinds = kinds_of(type(config))
        assert len(numbers(config)) >= 6
        assert [
            field for field in numbers(config) if not any(isinstance(k, Range) for k in kinds_in(kinds[field]))
        ] == []

    def test_has_presets_within_the_ranges(self, name):
        for preset in EXPERIMENTS[name].presets:
            config = EXPERIMENTS[name].default(preset)
            assert mistakes(config) == {}
            EXPERIMENTS[name].check(config)

    def test_refuses_what_no_number_can_be(self, name):
        config = EXPERIMENTS[name].default("quick")
        for field, is_tuple in numbers(config).items():
            flag = "--" + field.replace("_", "-")
            for wrong in OUTSIDE:
                if wrong is None and getattr(type(config)(), field) is None:
                    continue
                values = (wrong, (wrong,), (1, wrong), ((1, wrong),), ((wrong, 0.1),)) if is_tuple else (wrong,)
                for value in values:
                    if value is None:
                        continue
                    with pytest.raises(InputError) as error:
                        EXPERIMENTS[name].check(dataclasses.replace(config, **{field: value}))
                    assert str(error.value).startswith(flag), (field, value)
                    assert "\n" not in str(error.value) and len(str(error.value)) < 300

    def test_accepts_or_refuses_numbers_at_the_edge(self, name):
        config = EXPERIMENTS[name].default("quick")
        for field in numbers(config):
            for edge in (-1, 0, 1, -0.0, 1e-300, 10**6, 2**31 - 1):
                changed = dataclasses.replace(config, **{field: edge})
                try:
                    EXPERIMENTS[name].check(changed)
                except InputError as error:
                    assert "\n" not in str(error)
                else:
                    assert mistakes(changed) == {}

    def test_refuses_each_flag_that_is_given_twice(self, name):
        config = EXPERIMENTS[name].default("quick")
        for field, kind in kinds_of(type(config)).items():
            flag = "--" + field.replace("_", "-")
            twice = [flag, flag] if kind is bool else [f"{flag}=1", f"{flag}=1"]
            with pytest.raises(InputError, match="^--"):
                command_line.parse(lambda config=config: config, {}, twice)

    def test_refuses_misspelt_flags_with_the_right_name(self, name):
        config = EXPERIMENTS[name].default("quick")
        for field in kinds_of(type(config)):
            flag = "--" + field.replace("_", "-")
            with pytest.raises(InputError, match=f"^there is no flag '{flag}x'; did you mean {flag}\\?$"):
                command_line.parse(lambda config=config: config, {}, [f"{flag}x=1"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "1", "nan"], "--steps ((1, nan),) has the entry (1, nan), which has the entry nan"),
        (["--steps", "5", "0.1", "3", "0.01"], "is not in increasing order"),
        (["--steps", "-5", "0.1"], "which is not at least 1"),
        (["--steps", "0", "0.1"], "which is not at least 1"),
        (["--learning-rate=inf"], "--learning-rate inf is not at most 1,000"),
        (["--weight-decay=inf"], "--weight-decay inf is not at most 1e+09"),
        (["--weight-decay=nan"], "--weight-decay nan is not at least 0"),
        (["--width=99999999999"], "--width 99999999999 is not at most 1,024"),
        (["--seeds=99999999999"], "--seeds 99999999999 is not at most 1,000"),
        (["--batch-size=1_000_000_000"], "--batch-size 1000000000 is not at most 1,000,000"),
        (["--output=~nobody_of_this_name/x"], "there is no home folder of this name"),
        ([f"--output={'x' * 5000}"], "is too long"),
        ([f"--clean-data={'x' * 5000}"], "is too long"),
    ],
)
def test_flags_that_used_to_end_otherwise_are_refused(arguments, message):
    with pytest.raises(InputError) as error:
        base.check(read_flags(lfd.EXPERIMENT, "a run", arguments), lfd.EXPERIMENT)
    assert message in str(error.value)

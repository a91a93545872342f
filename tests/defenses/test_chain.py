"""Chains of defenses that train nothing."""

import dataclasses
import pathlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from bdjax.defenses import chain
from bdjax.defenses.contract import Defense, DefenseInput
from bdjax.errors import InputError
from bdjax.training.stages import Nets, StageRunner
from bdjax.types import DefenseResult, Model

MODEL = Model(None, None, 4, "a network")


@dataclass(frozen=True)
class Settings:
    add: int = 1
    """added to the attacked network's only parameter"""


def adder(name: str, **found: Any) -> Defense:
    """A defense that adds, and reports the folder that it would have trained in."""

    def run(inputs: DefenseInput, settings: Settings) -> DefenseResult:
        after = inputs.attacked.variables + settings.add
        pictures = {str(inputs.runner.folder): np.zeros((1, 0))}
        return DefenseResult(MODEL, after, pictures=pictures, **found)

    stage = "at test time" if name == "tester" else "after training"
    return Defense(name, name.title(), f"paper of {name}", stage, ("attacked model",), Settings(), run)


FIRST = adder("first", flags=np.array([[True]]), facts={"weight": np.array([1.0]), "size": np.array([2.0])})
SECOND = adder("second", scores=np.array([[0.5]]), facts={"weight": np.array([3.0])})


@pytest.fixture
def inputs() -> DefenseInput:
    runner = StageRunner(pathlib.Path("run"), (8, 8, 1), "map", None)
    attacked = Nets(MODEL, np.zeros(1, int), 1, {})
    return DefenseInput(None, 4, None, None, None, runner, {"attacked model": attacked})


def make(*pairs: tuple[Defense, int]) -> Defense:
    return chain.make_chain([chain.ChainLink(defense, Settings(add), defense.title) for defense, add in pairs])


def folders(result: DefenseResult) -> list[str]:
    return list(result.pictures)


def test_the_second_starts_from_the_result_of_the_first(inputs):
    linked = make((FIRST, 1), (SECOND, 10))
    result = linked.run(inputs, linked.settings)
    assert result.variables.tolist() == [11] and inputs.attacked.variables.tolist() == [0]
    assert linked.name == "first+second" and linked.title == "First, then Second"
    assert linked.settings == (Settings(1), Settings(10)) and linked.needs == ("attacked model",)
    assert linked.paper == "paper of first; then paper of second"


def test_flags_scores_and_facts_of_all_parts_are_kept(inputs):
    linked = make((FIRST, 1), (SECOND, 10))
    result = linked.run(inputs, linked.settings)
    assert {name: float(value[0]) for name, value in result.facts.items()} == {
        "first: weight": 1.0,
        "size": 2.0,
        "second: weight": 3.0,
    }
    assert result.flags.tolist() == [[True]] and result.scores.tolist() == [[0.5]]


def test_facts_of_a_defense_that_occurs_twice_are_numbered(inputs):
    linked = make((SECOND, 1), (SECOND, 2))
    facts = linked.run(inputs, linked.settings).facts
    assert list(facts) == ["second (1): weight", "second (2): weight"]


def test_only_later_parts_have_a_separate_folder(inputs):
    first, second = (
        folders(linked.run(inputs, linked.settings)) for linked in (make((FIRST, add), (SECOND, 1)) for add in (1, 2))
    )
    alone = folders(FIRST.run(inputs, Settings(1)))
    assert first[0] == second[0] == alone[0] == "run"
    assert first[1] != second[1] and all(path[1].startswith("run/after-first-") for path in (first, second))
    assert inputs.runner.folder == pathlib.Path("run")


def test_three_parts_nest(inputs):
    linked = make((FIRST, 1), (SECOND, 2), (FIRST, 4))
    result = linked.run(inputs, linked.settings)
    paths = [path.split(": ")[-1] for path in folders(result)]
    assert result.variables.tolist() == [7]
    assert paths[2].startswith(f"{paths[1]}/after-second-")
    pair = make((FIRST, 1), (SECOND, 3))
    assert (
        folders(pair.run(inputs, pair.settings))[1] == paths[1]
    )  # decided by the parts before, not by the part itself


def test_needs_of_settings_are_needs_of_the_chain():
    oracle = dataclasses.replace(
        SECOND, more_needs=lambda settings: ("attacker's trigger",) if settings.add > 5 else ()
    )
    assert make((FIRST, 1), (oracle, 10)).needs == ("attacked model", "attacker's trigger")
    assert make((FIRST, 1), (oracle, 1)).needs == ("attacked model",)


def test_a_detector_at_test_time_can_only_be_the_last():
    tester = adder("tester")
    assert make((FIRST, 1), (tester, 1)).stage == "at test time"
    with pytest.raises(InputError, match="tester works at test time.*only be the last"):
        make((tester, 1), (FIRST, 1))

"""Every flag of every command has its group in --help, and a text."""

import dataclasses
import re

import pytest

from bdjax import commands
from bdjax.commands import COMMANDS, gate
from bdjax.run import command_line, flag_groups
from bdjax.run.configs.grid import CollectConfig, GridConfig
from bdjax.run.experiment import read_flags
from bdjax.run.flag_groups import GROUPS, OTHER, documentation, grouped
from bdjax.settings import kinds_of
from experiments import bench_ensemble

WITH_FLAGS = [name for name in COMMANDS if hasattr(commands.load(name), "EXPERIMENT")]
CONFIGS = {type(commands.load(name).EXPERIMENT.default()) for name in WITH_FLAGS}
CONFIGS |= {bench_ensemble.Config, gate.GateConfig, CollectConfig, GridConfig}
by_module = pytest.mark.parametrize("config", sorted(CONFIGS, key=str), ids=lambda config: config.__module__)


@by_module
def test_every_flag_is_in_one_group_and_documented(config):
    groups = grouped(config)
    names = [name for group in groups.values() for name in group]
    assert OTHER not in groups and sorted(names) == sorted(kinds_of(config))
    assert list(groups) == [title for title in GROUPS if title in groups]
    texts = documentation(config)
    assert all(texts[name] and "\n" not in texts[name] for name in names)


def test_the_groups_have_no_field_that_no_command_has():
    fields = [field for group in GROUPS.values() for field in group.fields]
    assert len(fields) == len(set(fields))
    modules = {config.__module__.rpartition(".")[2]: config for config in CONFIGS}
    for field in fields:
        owner, _, name = field.rpartition(".")
        assert any(name in kinds_of(config) for config in ([modules[owner]] if owner else CONFIGS)), field


@pytest.mark.parametrize("name", WITH_FLAGS)
def test_help_has_the_groups_with_the_common_flags_first(name, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    experiment = commands.load(name).EXPERIMENT
    with pytest.raises(SystemExit) as stop:
        read_flags(experiment, "About.", ["--help"])
    assert stop.value.code in (0, None)
    text = capsys.readouterr().out
    assert f"usage: bdjax {name} " in text
    first, *titles = re.findall(r"^[╭─ ]*(\w+)(?: options)?[─╮ ]*$", text[text.index(" options ") :], re.MULTILINE)
    assert first == "options" and titles == [title for title in GROUPS if title in titles] and len(titles) >= 5
    places = [text.index(f"--{flag}") for flag in ("dataset", "preset", "train-rows")]
    assert places == sorted(places) and max(map(len, text[text.index(" options ") :].splitlines())) <= 80
    shown = [f.name for f in dataclasses.fields(experiment.default()) if f.name not in experiment.fixed]
    assert all(f"--{field.replace('_', '-')}" in text for field in shown)
    assert not any(re.search(rf"^[│ ]+--{field.replace('_', '-')} ", text, re.MULTILINE) for field in experiment.fixed)


@dataclasses.dataclass(frozen=True)
class Unknown:
    oddity: int = 1
    """a flag that no group has"""


def test_a_flag_without_a_group_is_shown_nevertheless(capsys):
    assert grouped(Unknown) == {OTHER: ["oddity"]} and documentation(Unknown) == {"oddity": "a flag that no group has"}
    with pytest.raises(SystemExit):
        command_line.parse(Unknown, {}, ["--help"], prog="x")
    assert "--oddity" in capsys.readouterr().out
    assert flag_groups.grouped(Unknown, ["oddity"]) == {}

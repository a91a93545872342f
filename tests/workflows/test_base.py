import pathlib
from typing import NamedTuple

import pytest

from bdjax.errors import InputError
from bdjax.run.config import ComparisonConfig
from bdjax.run.presets import Study
from bdjax.workflows import base
from experiments import abm, attack, lfd, robust_kd, ta_kd, vbd

EXPERIMENTS = [module.EXPERIMENT for module in (ta_kd, lfd, abm, attack, vbd, robust_kd)]
STUDIES = {"few": Study("a table", "badnets,none", "abl")}


def default(preset=None, dataset=None):
    return ComparisonConfig(preset=preset or "quick", dataset=dataset or "digits", defenses="abl,lfd")


EXPERIMENT = base.Experiment("mine", "Mine", ("abl",), default, STUDIES)


@pytest.mark.parametrize("experiment", EXPERIMENTS, ids=lambda experiment: experiment.name)
class TestEveryExperiment:
    def test_its_default_is_a_fixed_point(self, experiment):
        config = experiment.default()
        assert base.default_of(experiment, config) == config
        assert base.read_flags(experiment, "a run", []) == config

    def test_its_command_gives_the_configuration_back(self, experiment):
        config = base.read_flags(experiment, "a run", ["--seeds=5", "--dataset=mnist"])
        command = base.command(experiment, config)
        start = f"python experiments/{experiment.name}.py "
        assert command.startswith(start) and config.seeds == 5
        assert base.read_flags(experiment, "a run", command.removeprefix(start).split()) == config

    def test_its_folder_is_named_after_what_differs(self, experiment):
        plain, other = experiment.default(), base.read_flags(experiment, "a run", ["--seeds=5"])
        assert base.output_folder(experiment, plain) == pathlib.Path("runs") / experiment.name / "digits-quick"
        assert base.output_folder(experiment, other) != base.output_folder(experiment, plain)


def test_no_defense_is_the_baseline_of_every_comparison():
    assert base.attacks_and_defenses(default(), EXPERIMENT)[1] == ["none", "abl", "lfd"]


def test_a_study_decides_on_attacks_and_defenses():
    config = ComparisonConfig(preset="quick", defenses="abl,lfd", study="few")
    assert base.attacks_and_defenses(config, EXPERIMENT) == (["badnets", "none"], ["none", "abl"])
    with pytest.raises(InputError, match="--study few sets attacks and defenses itself"):
        base.attacks_and_defenses(ComparisonConfig(preset="quick", defenses="lfd", study="few"), EXPERIMENT)
    with pytest.raises(InputError, match="--study 'many' is not one of few"):
        base.check(ComparisonConfig(study="many"), EXPERIMENT)


class Result(NamedTuple):
    cda: float
    asr: float | None


def test_the_line_on_a_defense_leaves_out_what_is_unknown():
    assert base.summary_line([Result(0.9, 0.5), Result(0.8, None)]) == "CDA 0.850, ASR 0.500"
    assert base.summary_line([Result(0.9, None)]) == "CDA 0.900"

import csv
import dataclasses
import io
import json
import pathlib
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
from rich.console import Console

from bdjax.commands import abm, attack, lfd, robust_kd, ta_kd, vbd
from bdjax.errors import InputError
from bdjax.reporting.report import Verdict
from bdjax.run import config as run_config
from bdjax.run.configs.shared import ComparisonConfig
from bdjax.run.experiment import read_flags
from bdjax.run.folder import RunFolder
from bdjax.run.log import StageLog
from bdjax.run.presets import Study
from bdjax.training import probe
from bdjax.types import Dataset, Unread
from bdjax.workflows import base
from bdjax.workflows import ta_kd as workflow

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
        assert read_flags(experiment, "a run", []) == config

    def test_its_command_gives_the_configuration_back(self, experiment):
        config = read_flags(experiment, "a run", ["--seeds=5", "--dataset=mnist"])
        command = base.command(experiment, config)
        start = f"bdjax {experiment.name.replace('_', '-')} "
        assert command.startswith(start) and config.seeds == 5
        assert read_flags(experiment, "a run", command.removeprefix(start).split()) == config

    def test_its_folder_is_named_after_what_differs(self, experiment):
        plain, other = experiment.default(), read_flags(experiment, "a run", ["--seeds=5"])
        name = f"{'textures' if experiment.name == 'vbd' else 'digits'}-quick"
        assert base.output_folder(experiment, plain) == pathlib.Path("runs") / experiment.name / name
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


@pytest.mark.parametrize(
    ("prefix", "changes", "line"),
    [
        ("", {"learning_rate": 0.1}, "--recipe speedrun sets --learning-rate itself; leave it out, or set --recipe="),
        (
            "defense_",
            {"defense_recipe": "speedrun", "defense_schedule": "cosine"},
            "--defense-recipe speedrun sets --defense-schedule itself; leave it out, or set --defense-recipe=",
        ),
    ],
)
def test_a_flag_that_a_recipe_would_override_is_refused(prefix, changes, line):
    default = ta_kd.EXPERIMENT.default("quick", "cifar10")
    assert default.recipe == "speedrun"
    with pytest.raises(InputError) as error:
        run_config.check_recipe(dataclasses.replace(default, **changes), default, prefix)
    assert str(error.value) == line
    without = dataclasses.replace(default, **{**changes, f"{prefix}recipe": ""})
    run_config.check_recipe(without, default, prefix)


def test_either_recipe_of_ta_kd_reaches_its_trainings():
    default = ta_kd.EXPERIMENT.default("quick", "cifar10")
    attack, defense, _ = workflow.configurations(default)
    assert (attack.optimiser, attack.label_smoothing, defense.optimiser) == ("sgd", 0.2, "adam")
    attack, defense, _ = workflow.configurations(dataclasses.replace(default, recipe="", defense_recipe="speedrun"))
    assert (attack.optimiser, defense.optimiser, defense.schedule) == ("adam", "sgd", "triangle")
    assert defense.learning_rate == pytest.approx(11.5 * default.defense_batch_size / (1024 * (1 + 1 / 0.15)))


def test_the_expected_time_follows_from_the_speed_that_the_probe_measured(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    shape, engine = probe.Shape((8, 8, 1), 2, 16, 4), probe.Choice("map", "shifted")

    def expected(*plan: base.Planned, beyond: str = "") -> str:
        return base.expected_time(plan, beyond, 10, shape, engine)

    planned = base.Planned("resnet10", 4, 3, 1000)
    assert expected(planned).startswith("not known")
    probe.choose(shape, lowering="shifted", measure=lambda choice, shape: 4 * 2 * 16 / 2000)  # 2,000 images per second
    assert expected(planned) == "about 6.0 s to train 4 networks, without compilation"
    assert (
        expected(planned, beyond="the defenses")
        == "about 6.0 s to train 4 networks, without compilation; the defenses add to it"
    )
    # A device trains the odd network while the other has none.
    assert expected(planned._replace(members=3)) == "about 6.0 s to train 3 networks, without compilation"
    assert expected(planned._replace(members=1), planned) == "about 7.5 s to train 5 networks, without compilation"
    deeper = expected(planned._replace(network="resnet18"))
    assert 8 < float(deeper.split()[1]) < 20  # ResNet-18 has about twice the operations


class Result(NamedTuple):
    cda: float
    asr: float | None


def test_the_line_on_a_defense_leaves_out_what_is_unknown():
    assert base.summary_line([Result(0.9, 0.5), Result(0.8, None)]) == "CDA 0.850, ASR 0.500"
    assert base.summary_line([Result(0.9, None)]) == "CDA 0.900"


# ---- What limits a run's conclusions --------------------------------------------------------------------------------

EMPTY = {"left_out": {}, "attacks": [], "seeds": []}


def rows(first: int, count: int, *, names: tuple[str, ...] = (), **fields) -> Dataset:
    """Rows of a single pixel each, with the numbers from `first` as values."""
    images = np.arange(first, first + count, dtype=np.uint8).reshape(count, 1, 1, 1)
    return Dataset(images, np.arange(count, dtype=np.int32) % 2, 2, "mine", "arrays", names, **fields)


def opened(folder: pathlib.Path) -> RunFolder:
    folder.mkdir(exist_ok=True)
    return RunFolder(folder, True)


def printing() -> tuple[StageLog, io.StringIO]:
    text = io.StringIO()
    return StageLog(Console(file=text, width=400)), text


class TestFilesThatWereNotRead:
    UNREAD = (Unread("a/x.tif", "has a suffix that is not read"), Unread("=HYPERLINK(1)/y.png", "is a link,\nor not"))

    def test_are_listed_in_a_file_counted_in_the_results_and_said_in_the_verdict(self, tmp_path):
        parts = rows(0, 4, unread=self.UNREAD[:1]), rows(4, 2, unread=self.UNREAD), None
        results = base.write_results(opened(tmp_path), EMPTY, *parts)
        assert results["not_read"] == 2 and json.loads((tmp_path / "results.json").read_text()) == results
        listed = list(csv.reader(io.StringIO((tmp_path / "not_read.csv").read_text())))
        assert listed == [["file", "reason"], list(self.UNREAD[0]), ["'" + self.UNREAD[1].file, self.UNREAD[1].reason]]
        verdict = base.with_limits(Verdict("info", "Nothing.", "So far."), results)
        said = "2 files of the data were not read and so not examined: not_read.csv lists them."
        assert verdict.text == f"So far.\n\n{said}"

    def test_are_in_the_verdict_that_an_audit_has_among_its_results(self, tmp_path):
        verdict = {"level": "info", "headline": "No class has a trigger.", "text": ""}
        results = base.write_results(opened(tmp_path), {"verdict": verdict, **EMPTY}, rows(0, 4, unread=self.UNREAD))
        assert "2 files of the data were not read" in results["verdict"]["text"]

    def test_without_any_there_is_no_such_file(self, tmp_path):
        results = base.write_results(opened(tmp_path), EMPTY, rows(0, 4))
        assert results == {**EMPTY, "not_read": 0} and not (tmp_path / "not_read.csv").exists()
        assert base.with_limits(Verdict("info", "Nothing.", "So far."), results).text == "So far."

    def test_are_on_the_terminal_in_one_line_without_escapes(self):
        log, text = printing()
        run_config.note_unread(log, "mine", (Unread("\x1b[31mred\n.tif", "is a pipe"), *self.UNREAD))
        assert text.getvalue().count("\n") == 1 and "\x1b" not in text.getvalue()
        assert (
            "3 files of mine (first: \N{REPLACEMENT CHARACTER}[31mred .tif is a pipe); see not_read.csv"
            in text.getvalue()
        )
        run_config.note_unread(log, "mine", ())
        assert text.getvalue().count("\n") == 1


SIZES = {(224, 224): 3, (375, 500): 1}


class TestImagesThatWereScaled:
    def test_are_in_the_results_and_in_the_verdict(self, tmp_path):
        parts = rows(0, 4, original_sizes=SIZES), rows(4, 2, original_sizes={(64, 32): 2})
        verdict = {"level": "info", "headline": "No class has a trigger.", "text": ""}
        results = base.write_results(opened(tmp_path), {"verdict": verdict, **EMPTY}, *parts)
        (scaled,) = results["scaled"]
        assert scaled["num_sizes"] == 3 and scaled["image_size"] == list(parts[0].image_shape[:2])
        assert scaled["original_sizes"][1] == {"size": [64, 32], "images": 2}
        assert scaled["text"] in results["verdict"]["text"] and "pixels here are" in scaled["text"]

    def test_parts_of_one_array_count_once(self, tmp_path):
        whole = rows(0, 4, original_sizes=SIZES)
        (scaled,) = base.write_results(opened(tmp_path), EMPTY, whole[:3], whole[3:])["scaled"]
        assert [entry["images"] for entry in scaled["original_sizes"]] == [3, 1]

    def test_without_any_nothing_is_said(self, tmp_path):
        results = base.write_results(opened(tmp_path), EMPTY, rows(0, 4))
        assert "scaled" not in results and base.schema.reservations(results) == []


class TestCleanRowsThatAreSuspectRows:
    def test_are_counted_by_their_pixels(self):
        log, text = printing()
        found = base.find_shared(log, rows(3, 4), {"the suspect set": rows(0, 5), "the test set": rows(90, 5)})
        assert found == [{"of": "the suspect set", "count": 2, "rows": 4}]
        assert "2 of the 4 clean rows are rows of the suspect set" in text.getvalue()

    def test_are_said_in_the_verdict(self, tmp_path):
        shared = [{"of": "the suspect set", "count": 1, "rows": 4}]
        results = base.write_results(opened(tmp_path), EMPTY, rows(0, 4), shared=shared)
        (text,) = base.schema.reservations(results)
        assert text.startswith("1 of the 4 clean rows is a row of the suspect set.")

    def test_without_clean_data_nothing_is_said(self):
        log, text = printing()
        assert base.find_shared(log, None, {"the suspect set": rows(0, 5)}) == [] and text.getvalue() == ""


def test_results_have_the_names_of_classes_that_have_any(tmp_path):
    named, numbered = (
        base.write_results(opened(tmp_path / str(i)), EMPTY, rows(0, 2, names=names))
        for i, names in enumerate([("cat", "dog"), ("0", "1")])
    )
    assert base.schema.class_title_of(named, 1) == "1 (dog)" and "class_names" not in numbered
    assert base.schema.class_title_of(numbered, 1) == "1"


def test_what_could_not_be_tested_is_said_once_for_each_method():
    entry = {"attack": "badnets", "method": "vbd", "title": "VBD", "seed": 0, "reason": ""}
    first, second = ({**entry, "classes": found} for found in ({"3 (cat)": "is dark"}, {"5 (dog)": "has 1 row"}))
    nothing = {**entry, "method": "scan", "title": "SCAn", "reason": "needs at least 3 classes", "classes": {}}
    results = {
        "left_out": {"neural_cleanse": "could not be tested: needs at least 3 classes", "nad": "needs clean rows"},
        "attacks": [{"seeds": [0, 1]}],
        "seeds": [0, 1],
        "not_tested": [first, second, nothing],
    }
    assert base.schema.reservations(results) == [
        "Neural_cleanse could not be tested: needs at least 3 classes.",
        "VBD: classes 3 (cat), 5 (dog) could not be tested on 2 of 2 training sets (class 3 (cat) is dark).",
        "SCAn could not be tested on 1 of 2 training sets: needs at least 3 classes.",
    ]


def test_evidence_has_the_same_command_for_a_script(monkeypatch, tmp_path):
    written = []
    monkeypatch.setattr(base.evidence, "write", lambda *_, command, **__: written.append(command))
    monkeypatch.setattr(base, "settings_of", lambda run: {})
    experiment = lfd.EXPERIMENT
    run = SimpleNamespace(experiment=experiment, config=experiment.default(), log=SimpleNamespace(say=print))
    for program in ("bdjax", "experiments/lfd.py"):
        monkeypatch.setattr("sys.argv", [program])
        base.write_evidence(run, None, SimpleNamespace(verdict=None, title=""), {}, None)
    assert written[0].startswith("bdjax lfd ") and written == [written[0]] * 2

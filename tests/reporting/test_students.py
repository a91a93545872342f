"""Numbers, tables and words on suspect models, by hand: two seeds, three attacks and a clean teacher."""

import json
from dataclasses import dataclass
from functools import cache

import numpy as np
import pytest

from bdjax.defenses.contract import Defense
from bdjax.evaluation.measure import Comparison, Measured
from bdjax.evaluation.student_curves import CurvePoint
from bdjax.evaluation.suspects import Suspect
from bdjax.evaluation.variants import DefenseVariant, read_attack
from bdjax.metrics import AttackMetrics, measure_detection
from bdjax.models import count_parameters, make_model
from bdjax.reporting import sections as shared
from bdjax.reporting import students as numbers
from bdjax.reporting.report import Section, publish
from bdjax.reporting.results import find
from bdjax.reporting.tables import Table, to_markdown
from bdjax.run.folder import open_run
from bdjax.types import Dataset, DefenseResult, TrainTest

SHAPE = (8, 8, 1)
ROWS = 100
IMAGES = np.zeros((ROWS, *SHAPE), np.uint8)
TRAIN = Dataset(IMAGES, (np.arange(ROWS) % 4).astype(np.int32), 4, "cifar100", "a test")
TEACHER, STUDENT = make_model("wrn_28_4", 4, 4), make_model("wrn_16_2", 4, 4)


@dataclass(frozen=True)
class Settings:
    epochs: int = 1
    """number of epochs"""


def method(text, title, *needs):
    defense = Defense(
        text.partition(":")[0], title, f"paper of {title}", "after training", needs, Settings(), run=print
    )
    return DefenseVariant(text, defense, Settings())


NONE = method("none", "teacher itself")
FKD = method("fkd", "FKD", "attacked model", "clean rows")
ROBUST = method("robust_kd", "RobustKD", "attacked model", "clean rows")
ORACLE = method("robust_kd:epochs=2", "RobustKD", "attacked model", "clean rows", "attacker's trigger")

# attack -> method -> (cda, asr, control) of the first seed; the second's cda is 0.02 higher.
CELLS = {
    "badnets": {"none": (0.9, 1.0, 0.05), "fkd": (0.88, 0.9, 0.1), "robust_kd": (0.86, 0.05, 0.04)},
    "blended": {"none": (0.9, 0.95, 0.1), "fkd": (0.88, 0.7, 0.6), "robust_kd": (0.86, 0.6, 0.6)},
    "sig": {"none": (0.9, 0.9, 0.0), "fkd": (0.87, 0.2, 0.0), "robust_kd": (0.85, 0.1, 0.0)},
    "none": {"none": (0.92, None, None), "fkd": (0.9, None, None), "robust_kd": (0.89, None, None)},
}


def suspect(text, seed, label=""):
    attack = read_attack(text, TRAIN, 0, defender_gets="model")
    attack = attack._replace(label=label) if label else attack
    known = np.zeros(ROWS, bool) if text == "none" and not label else None
    return Suspect(attack, seed, TRAIN, ((),) * (1 if attack.plan else 0), known)


def summarise(cells=CELLS, variants=(NONE, FKD, ROBUST), seeds=(0, 1), label="", curves=None):
    comparisons, controls = [], []
    for variant in variants:
        measured, method_controls = [], []
        for text, by_method in cells.items():
            for seed in seeds:
                cda, asr, control = by_method[variant.defense.name]
                under = () if asr is None else (AttackMetrics(cda, asr, 1 - asr, None, None, None),)
                teacher, nothing = suspect(text, seed, label), measure_detection(None, None, None)
                measured.append(Measured(teacher, variant, cda + 0.02 * seed, under, nothing, {"kept": 1.0}, 2.0))
                method_controls.append(control)
        result = DefenseResult(TEACHER if variant is NONE else STUDENT, {})
        comparisons.append(Comparison(variant, result, measured))
        controls.append(method_controls)
    return numbers.summarise(
        comparisons, controls, numbers.Networks(TEACHER, SHAPE), 100, 5, curves=curves or {}
    ), comparisons


@pytest.fixture(scope="module", autouse=True)
def count_once():
    """Counting the parameters of a deep network takes longer than everything else here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(numbers, "count_parameters", cache(count_parameters))
        yield


@pytest.fixture(scope="module")
def everything():
    return summarise()


@pytest.fixture(scope="module")
def results(everything):
    return everything[0]


class TestSummarise:
    def test_it_is_plain_and_holds_the_controls(self, results):
        assert json.loads(json.dumps(results)) == results
        cell = find(results, "badnets", "fkd")
        assert cell["summary"]["control_asr"]["mean"] == pytest.approx(0.1)
        assert [(row["seed"], row["control_asr"]) for row in cell["by_seed"]] == [(5, 0.1), (6, 0.1)]
        assert cell["summary"]["cda"]["mean"] == pytest.approx(0.89)
        assert find(results, "none", "fkd")["summary"]["control_asr"] == {"mean": None, "standard_deviation": None}

    def test_there_are_no_numbers_on_training_sets(self, results):
        text = json.dumps(results)
        assert "num_poisoned" not in text and "flagged" not in text
        assert [attack["is_clean"] for attack in results["attacks"]] == [False, False, False, True]
        assert results["attacks"][-1]["title"] == "clean teacher"

    def test_networks_and_their_sizes(self, results):
        sizes = [count_parameters(model, SHAPE) for model in (TEACHER, STUDENT)]
        assert results["teacher"] == {"model": "wrn_28_4 width 4", "parameters": sizes[0]}
        fkd = results["methods"][1]
        assert (fkd["model"], fkd["parameters"]) == ("wrn_16_2 width 4", sizes[1])
        assert fkd["share_of_teacher"] == pytest.approx(sizes[1] / sizes[0]) and fkd["share_of_teacher"] < 0.2


class TestWords:
    @pytest.mark.parametrize(
        ("attack", "expected"), [("badnets", True), ("blended", False), ("sig", False), ("none", None)]
    )
    def test_a_backdoor_passes_if_it_succeeds_and_the_control_does_not(self, results, attack, expected):
        assert numbers.passes(results, attack, "fkd") is expected

    def test_without_a_control_only_failure_is_known(self):
        cells = {
            name: {"none": (0.9, 1.0, None), "fkd": (0.9, asr, None)} for name, asr in (("badnets", 0.9), ("sig", 0.1))
        }
        results, _ = summarise(cells, (NONE, FKD))
        assert numbers.passes(results, "badnets", "fkd") is None and numbers.passes(results, "sig", "fkd") is False
        outcome = numbers.verdict(results, "robust_kd")
        assert outcome.level == "info" and "passes through FKD: there is no control for BadNets" in outcome.headline

    def test_only_what_passes_can_be_removed(self, results):
        assert numbers.word_of(results, "badnets", "robust_kd", "fkd") == "removed"
        assert numbers.word_of(results, "blended", "robust_kd", "fkd") == "nothing to remove"
        assert numbers.word_of(results, "sig", "robust_kd", "fkd") == "nothing to remove"
        assert numbers.word_of(results, "badnets", "robust_kd", None) is None
        assert numbers.word_of(results, "badnets", "none", "fkd") is None
        assert numbers.word_of(results, "badnets", "fkd", "fkd") is None

    @pytest.mark.parametrize(
        ("numbers_after", "expected"),
        [
            ((0.86, 0.1, 0.0), "removed"),
            ((0.86, 0.23, 0.0), "removed"),
            ((0.86, 0.25, 0.0), "weakened"),
            ((0.86, 0.41, 0.0), "kept"),
            ((0.86, 0.3, 0.1), "removed"),  # of which 0.2 are the backdoor's
            ((0.77, 0.0, 0.0), "removed at a cost"),
        ],
    )
    def test_a_method_removes_at_a_price_that_is_bounded(self, numbers_after, expected):
        cells = {"badnets": {**CELLS["badnets"], "robust_kd": numbers_after}}
        assert numbers.word_of(summarise(cells)[0], "badnets", "robust_kd", "fkd") == expected

    def test_the_plain_method_is_the_one_without_settings(self):
        fast = method("fkd:epochs=2", "FKD", "clean rows")
        assert numbers.plain_method(summarise(variants=(NONE, fast, FKD))[0], "fkd") == "fkd"
        assert numbers.plain_method(summarise(variants=(NONE, fast))[0], "fkd") == "fkd:epochs=2"
        assert numbers.plain_method(summarise(variants=(NONE,))[0], "fkd") is None


class TestVerdict:
    def test_by_hand(self, results):
        outcome = numbers.verdict(results, "robust_kd")
        assert outcome.level == "success"
        assert outcome.headline == "RobustKD removes the backdoor that passes through FKD."
        assert (
            "BadNets: the teacher has ASR 1.00 (the clean network 0.05), FKD's student 0.90 (clean teacher's 0.10)"
            in outcome.text
        )
        assert "RobustKD removes it: ASR 0.05 (clean teacher's 0.04), CDA 0.87 against 0.89." in outcome.text
        for title in ("Blended", "SIG"):
            line = next(line for line in outcome.text.split("\n\n") if line.startswith(title))
            assert line.endswith("the backdoor does not pass through FKD, so there is nothing to remove.")
        assert "Clean teacher: teacher itself has CDA 0.930; FKD has CDA 0.910; RobustKD has CDA 0.900." in outcome.text

    def test_where_none_passes_nothing_is_claimed(self):
        results, _ = summarise({name: CELLS[name] for name in ("blended", "sig", "none")})
        outcome = numbers.verdict(results, "robust_kd")
        assert outcome.level == "info"
        assert outcome.headline == "No backdoor passes through FKD here, so there is nothing to remove for RobustKD."

    def test_a_teacher_without_a_backdoor_has_nothing_to_pass_on(self):
        cells = {"badnets": {**CELLS["badnets"], "none": (0.9, 0.29, 0.1), "fkd": (0.9, 0.2, 0.1)}, "sig": CELLS["sig"]}
        outcome = numbers.verdict(summarise(cells)[0], "robust_kd")
        assert outcome.text.split("\n\n")[0].endswith("the teacher has no backdoor, so there is nothing to remove.")
        assert outcome.text.split("\n\n")[1].endswith("does not pass through FKD, so there is nothing to remove.")

    def test_what_is_not_removed(self):
        cells = {name: {**CELLS["badnets"], "robust_kd": (0.8, 0.8, 0.1)} for name in ("badnets", "sig")}
        outcome = numbers.verdict(summarise(cells)[0], "robust_kd")
        assert (outcome.level, outcome.headline) == (
            "attacked",
            "RobustKD removes 0 of 2 backdoors that pass through FKD.",
        )
        cells["sig"] = CELLS["badnets"]
        outcome = numbers.verdict(summarise(cells)[0], "robust_kd")
        assert (outcome.level, outcome.headline) == (
            "warning",
            "RobustKD removes 1 of 2 backdoors that pass through FKD.",
        )

    def test_variants_and_none(self):
        results, _ = summarise(variants=(NONE, FKD, ROBUST, ORACLE))
        assert numbers.verdict(results, "robust_kd").headline.startswith("2 of 2 variants remove the backdoor")
        results, _ = summarise(variants=(NONE, FKD))
        outcome = numbers.verdict(results, "robust_kd")
        assert (outcome.level, outcome.headline) == ("attacked", "1 backdoor of 3 passes through FKD.")
        results, _ = summarise(variants=(NONE, ROBUST))
        assert "Plain distillation is not among" in numbers.verdict(results, "robust_kd").headline

    def test_an_unknown_trigger(self):
        results, _ = summarise({"none": CELLS["none"]}, seeds=(0,), label="your teacher")
        outcome = numbers.verdict(results, "robust_kd")
        assert outcome.level == "info" and outcome.headline.startswith("Trigger unknown")
        assert "Your teacher: teacher itself has CDA 0.920" in outcome.text and outcome.text.endswith(
            "small differences mean nothing."
        )
        results, _ = summarise({"none": CELLS["none"]})
        assert numbers.verdict(results, "robust_kd").headline.startswith("The teacher is clean")


class TestTables:
    def test_main_table(self, results):
        table = numbers.main_table(results)
        assert table.header == ("method", "BadNets", "Blended, random pixels", "SIG", "clean teacher")
        assert [row[0] for row in table.rows] == ["teacher itself", "FKD", "RobustKD"]
        assert [row[1] for row in table.rows] == [
            "0.910 / 1.000 / 0.050",
            "0.890 / 0.900 / 0.100",
            "0.870 / 0.050 / 0.040",
        ]
        assert table.rows[1][4] == "0.910 / – / –"
        assert "CDA 0.014" in table.notes and "ASR 0.000" in table.notes

    def test_details_show_what_passes_and_what_is_removed(self, results):
        table = numbers.detail_table(results, "fkd")
        found = {row[:2]: row[-2:] for row in table.rows}
        assert found["BadNets", "teacher itself"] == ("yes", None)
        assert found["BadNets", "FKD"] == ("yes", None) and found["BadNets", "RobustKD"] == ("no", "removed")
        assert found["SIG", "RobustKD"] == ("no", "nothing to remove") and found["clean teacher", "FKD"] == (None, None)

    def test_every_seed(self, results):
        table = numbers.seed_table(results)
        assert len(table.rows) == 4 * 3 * 2
        assert table.rows[3] == ("BadNets", "FKD", "6", pytest.approx(0.9), 0.9, 0.1, pytest.approx(0.1))

    def test_what_each_method_receives(self):
        table = numbers.needs_table(summarise(variants=(NONE, FKD, ORACLE))[0])
        assert table.header[1:4] == ("the teacher", "clean rows", "attacker's trigger")
        assert [row[1:4] for row in table.rows] == [(None,) * 3, ("yes", "yes", None), ("yes", "yes", "yes")]
        assert table.rows[0][6] == "100.0 %" and table.rows[1][4] == "wrn_16_2 width 4"
        assert "not available to a real defender" in table.notes

    def test_beside_the_paper(self):
        cells = {"ckd": CELLS["badnets"], "latent_backdoor": CELLS["badnets"], "sig": CELLS["sig"]}
        results, _ = summarise(cells)
        table = shared.published_table(results, "cifar100", "teacher", "method")
        rows = {(row[0], row[1], row[-1]): row for row in table.rows}
        # tables 3 and 4, 5 for FKD, the latter alone for RobustKD; nothing for an attack that the paper has not
        assert len(rows) == 6 and not any(row[0] == "SIG" for row in table.rows)
        row = rows["CKD", "RobustKD", "RobustKD Tables 4, 5"]
        assert row[2] == "wrn_28_4 / wrn_16_2"
        assert row[3:-1] == (
            pytest.approx(91),
            80.72,
            pytest.approx(100),
            96.14,
            pytest.approx(87),
            74.57,
            pytest.approx(5),
            4.32,
        )
        assert rows["LBA", "FKD", "RobustKD Table 3"][-2] == 74.52
        assert shared.published_table(results, "digits") is None


def test_the_report_and_its_files(everything, tmp_path, undrawn):
    results, comparisons = everything
    folder = open_run(tmp_path / "run", Settings(), experiment="robust_kd")
    section = Section("Variance", "Of features.", (Table("mine", ("a",), ((1,),)),))
    timings = {"method fkd": 3.0}
    made = numbers.page(
        folder,
        results,
        comparisons,
        TrainTest(TRAIN, TRAIN),
        seconds=shared.seconds_of(comparisons, timings),
        title="RobustKD on it",
        about="robust_kd",
        extra_sections=(section,),
    )
    assert list(made.key_numbers) == [
        "parameters of the teacher",
        "of the student",
        *(f"mean {name}, {title}" for name in ("ASR", "CDA") for title in ("FKD", "RobustKD")),
    ]
    assert made.key_numbers["mean ASR, FKD"] == f"{(0.9 + 0.7 + 0.2) / 3:.3f}"
    reproduce = "python experiments/robust_kd.py"
    publish(folder, made, settings={"seed": 5}, timings=timings, reproduce=reproduce, sources={"training data": "x"})
    page = (folder.path / "report.html").read_text()
    for text in (
        "RobustKD on it",
        "removes the backdoor",
        "control ASR",
        "Of features.",
        "What the methods found",
        "wrn_16_2",
    ):
        assert (text in page) == (text != "What the methods found")  # nothing was found that could be drawn
    table = (folder.path / "table.md").read_text()
    assert "**mine**" in table and to_markdown(numbers.seed_table(results)).splitlines()[4] in table
    for name in ("asr.png", "control-asr.png", "trade-off.png", "timings.json"):
        assert (folder.path / name).stat().st_size > 0


def test_students_during_their_training(tmp_path):
    cells = {name: CELLS[name] for name in ("badnets", "none")}  # two seeds of each
    points = [
        CurvePoint(epoch, (cda, cda, cda, cda), (asr, asr / 2, None, None), (0.1, 0.1, None, None))
        for epoch, cda, asr in ((5, 0.5, 0.9), (10, 0.88, 0.8), (15, 0.9, 0.6))
    ]
    results, _ = summarise(cells, (NONE, FKD), curves={"fkd": points, "none": []})
    assert [(curve["attack"], curve["seed"], curve["best"]["epoch"]) for curve in results["curves"]] == [
        ("badnets", 5, 10),
        ("badnets", 6, 10),
    ]
    table = numbers.epoch_table(results)
    (row,) = table.rows
    assert row[1:4] == ("FKD", 15, "0.450 ± 0.212") and row[5] == "0.600 ± 0.283" and row[7] == "0.880 ± 0.000"
    (figure,) = numbers.curve_figures(open_run(tmp_path / "run", Settings(), experiment="robust_kd"), results)
    assert (tmp_path / "run" / "students-by-epoch.png").exists() and "ASR" in figure.caption + figure.alt
    assert "curves" not in summarise(cells)[0] and numbers.epoch_table(summarise(cells)[0]) is None

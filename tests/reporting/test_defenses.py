import csv
import json
from dataclasses import dataclass

import numpy as np
import pytest

from bdjax.defenses.contract import Defense
from bdjax.defenses.undefended import UNDEFENDED, UndefendedSettings
from bdjax.evaluation.measure import Comparison, Measured
from bdjax.evaluation.suspects import Suspect
from bdjax.evaluation.variants import DefenseVariant, read_attack
from bdjax.metrics import AttackMetrics, measure_detection
from bdjax.reporting import defenses as numbers
from bdjax.reporting import results as schema
from bdjax.reporting import sections as shared
from bdjax.reporting.report import Section, publish
from bdjax.reporting.tables import Table, to_markdown
from bdjax.run.folder import open_run
from bdjax.types import Dataset, DefenseResult, PoisonedDataset, TrainTest

ROWS = 40
IMAGES = np.random.default_rng(0).integers(0, 256, (ROWS, 8, 8, 1)).astype(np.uint8)
LABELS = (np.arange(ROWS) % 4).astype(np.int32)
TRAIN = Dataset(IMAGES, LABELS, 4, "cifar10", "a test", ("cat", "dog", "cow", "hen"))
IS_POISONED = np.isin(np.arange(ROWS), [1, 2, 5, 6])
POISONED = PoisonedDataset(IMAGES, LABELS, 4, "cifar10", "a test", (), IS_POISONED, LABELS, np.zeros(ROWS, bool))
ALPHA = {"alpha": 0.5}


@dataclass(frozen=True)
class Settings:
    alpha: float = 0.1
    """a share"""


NONE = DefenseVariant("none", UNDEFENDED, UndefendedSettings())
LFD = DefenseVariant(
    "lfd:alpha=0.5",
    Defense("lfd", "LfD", "Li et al.", "in training", ("training set", "clean rows"), Settings(), run=lambda *_: None),
    Settings(0.5),
)
ABL = DefenseVariant(
    "abl",
    Defense("abl", "ABL", "Li et al.", "in training", ("training set", "number of poisons"), Settings(), run=print),
    Settings(),
)


def suspect(attack, seed=0, truth=True):
    """Attacked sets have the four poisoned rows above, "none" has none; its ground truth is unknown if `truth` is False."""
    variant = read_attack(attack, TRAIN, 0)
    if variant.plan is None:
        return Suspect(variant, seed, TRAIN, (), np.zeros(ROWS, bool) if truth else None)
    return Suspect(variant, seed, POISONED, ((),) * len(variant.plan.parts), IS_POISONED)


def under(asr, cda):
    return AttackMetrics(cda, asr, 1 - asr, asr, 1 - asr, None)


def measure(attack, variant, cda, *asr, seed=0, flags=None, scores=None, truth=True, facts=None, seconds=2.0):
    case = suspect(attack, seed, truth)
    detection = measure_detection(flags, scores, case.is_poisoned)
    return Measured(case, variant, cda, tuple(under(value, cda) for value in asr), detection, facts or {}, seconds)


SCORES = np.where(IS_POISONED, 2.0, 0.0) + np.arange(ROWS) / 100
FLAGS = np.isin(np.arange(ROWS), [1, 2, 5, 7])


def everything():
    measured = []
    for seed in (0, 1):
        measured += [
            measure("badnets", NONE, 0.9, 0.98, seed=seed),
            measure("badnets+sig", NONE, 0.92, 1.0, 0.6, seed=seed),
            measure("blended", NONE, 0.91, 0.3, seed=seed),
            measure("none", NONE, 0.95 - 0.01 * seed, seed=seed),
            measure(
                "badnets", LFD, 0.88 + 0.02 * seed, 0.02, seed=seed, flags=FLAGS, scores=SCORES, facts={"kept": 36.0}
            ),
            measure("badnets+sig", LFD, 0.85, 0.1, 0.5, seed=seed, flags=FLAGS, scores=SCORES, facts={"kept": 36.0}),
            measure("blended", LFD, 0.9, 0.01, seed=seed, flags=FLAGS, scores=SCORES, facts={"kept": 36.0}),
            measure("none", LFD, 0.9 + 0.01 * seed, seed=seed, flags=FLAGS, scores=SCORES, facts={"kept": 36.0}),
        ]
    return measured


@pytest.fixture(scope="module")
def results():
    return numbers.summarise(everything(), 100, 5, {"issba": "no room"})


def line(table, *starts):
    """The row of a table that starts with these cells."""
    (found,) = [row for row in table.rows if row[: len(starts)] == starts]
    return found


def test_results_are_plain_and_the_same_whenever_a_run_is_repeated(results):
    again = [measurement._replace(seconds=99.0) for measurement in everything()]
    assert json.dumps(numbers.summarise(again, 100, 5, {"issba": "no room"})) == json.dumps(results)


def test_the_order_of_what_was_measured_is_that_of_the_tables_and_seeds_are_sorted(results):
    turned = numbers.summarise(everything()[::-1], 100, 5, {"issba": "no room"})
    assert [entry["attack"] for entry in turned["attacks"]] == ["none", "blended", "badnets+sig", "badnets"]
    assert [entry["method"] for entry in turned["methods"]] == [LFD.name, NONE.name]
    assert all([row["seed"] for row in cell["by_seed"]] == [5, 6] for cell in turned["cells"])
    for cell in results["cells"]:
        assert schema.find(turned, cell["attack"], cell["method"]) == cell
    assert [entry["seeds"] for entry in turned["attacks"]] == [[5, 6]] * 4


def test_numbers_and_their_spread(results):
    assert results["seeds"] == [5, 6] and results["test_rows"] == 100
    cell = schema.find(results, "badnets", "lfd:alpha=0.5")
    assert cell["summary"]["cda"]["mean"] == pytest.approx(0.89)
    assert cell["summary"]["cda"]["standard_deviation"] == pytest.approx(np.std([0.88, 0.9], ddof=1))
    assert [row["seed"] for row in cell["by_seed"]] == [5, 6]
    assert cell["summary"]["precision"]["mean"] == pytest.approx(0.75) and cell["facts"]["kept"]["mean"] == 36.0
    badnets, hybrid, _, clean = results["attacks"]
    assert badnets["num_rows"] == [ROWS, ROWS] and badnets["num_poisoned"] == [4, 4] and badnets["target"] == 0
    assert hybrid["base"] == "badnets+sig" and len(hybrid["parts"]) == 2
    assert clean["num_poisoned"] == [0, 0] and clean["target"] is None and schema.is_clean(clean)
    lfd = results["methods"][1]
    assert (lfd["base"], lfd["title"], lfd["settings"]) == ("lfd", "LfD (alpha 0.5)", ALPHA)


def test_success_of_a_hybrid_is_the_mean_over_its_triggers_and_each_has_a_row_of_its_own(results):
    assert schema.mean_of(schema.find(results, "badnets+sig", "none"), "asr") == pytest.approx(0.8)
    table = numbers.trigger_table(results)
    assert [row[1] for row in table.rows] == ["BadNets", "BadNets", "SIG", "SIG"]
    assert [row[3] for row in table.rows] == [
        "1.000 ± 0.000",
        "0.100 ± 0.000",
        "0.600 ± 0.000",
        "0.500 ± 0.000",
    ]
    alone = numbers.summarise([measure("badnets", NONE, 0.9, 1.0)], 100, 0)
    assert numbers.trigger_table(alone) is None


def test_main_table(results):
    table = numbers.main_table(results)
    assert table.header == ("training set", "no defense", "LfD (alpha 0.5)")
    assert line(table, "BadNets")[1:] == ("0.900 / 0.980", "0.890 / 0.020")
    assert line(table, "no attack")[1:] == ("0.945 / –", "0.905 / –")
    mean_before, mean_after = np.mean([0.98, 0.8, 0.3]), np.mean([0.02, 0.3, 0.01])
    assert line(table, "mean of 3 attacks")[1:] == (f"0.910 / {mean_before:.3f}", f"0.880 / {mean_after:.3f}")
    assert "over 2 seeds, 100 test rows" in table.notes and "issba (no room)" in table.notes
    assert "CDA 0.014" in table.notes  # the largest deviation, of LfD on badnets
    assert "A clean training set has no trigger and so no ASR" in table.notes and "user data" not in table.notes
    assert line(numbers.main_table(results, "r_acc"), "BadNets")[2] == "0.890 / 0.980"


def test_the_mean_is_over_attacks_that_every_defense_was_evaluated_on():
    measured = [
        *(measure(attack, NONE, 0.9, 1.0) for attack in ("badnets", "blended", "sig")),
        measure("badnets", LFD, 0.8, 0.2),
        measure("blended", LFD, 0.6, 0.0),
    ]
    table = numbers.main_table(numbers.summarise(measured, 10, 0))
    assert line(table, "mean of 2 attacks") == ("mean of 2 attacks", "0.900 / 1.000", "0.700 / 0.100")
    assert line(table, "SIG")[2] is None and "the attacks that have ASR under every defense" in table.notes
    assert "One seed only" in table.notes


@pytest.mark.parametrize(
    ("before", "after", "cda", "expected"),
    [
        (0.9, 0.1, 0.9, "removed"),
        (0.9, 0.27, 0.9, "removed"),
        (0.9, 0.28, 0.9, "weakened"),
        (0.9, 0.5, 0.9, "kept"),
        (0.5, 0.1, 0.81, "removed"),
        (0.9, 0.0, 0.79, "removed at a cost"),
        (0.49, 0.0, 0.9, "nothing to remove"),
    ],
)
def test_every_cell_has_the_word_of_the_definitions(before, after, cda, expected):
    measured = [measure("badnets", NONE, 0.9, before), measure("badnets", LFD, cda, after)]
    results = numbers.summarise(measured, 10, 0)
    assert numbers.word_of(results, "badnets", LFD.name) == expected
    assert numbers.word_of(results, "badnets", NONE.name) is None
    table = numbers.detail_table(results)
    assert [row[-1] for row in table.rows] == [None, expected] and expected.capitalize() in table.notes


def test_what_is_unknown_has_no_word(results):
    assert numbers.word_of(results, "none", LFD.name) is None
    without = [measure("badnets", LFD, 0.9, 0.1)]
    assert numbers.word_of(numbers.summarise(without, 10, 0), "badnets", LFD.name) is None


def test_a_control_stands_beside_the_success_where_there_is_one(results):
    assert "control_asr" not in json.dumps(results)
    measured = [measure("badnets", NONE, 0.9, 0.95), measure("badnets", LFD, 0.9, 0.5), measure("sig", NONE, 0.9, 0.6)]
    controls = {("badnets", "none", 0): 0.05, ("badnets", LFD.name, 0): 0.48, ("sig", "none", 0): 0.45}
    made = numbers.summarise(measured, 10, 0, controls=controls)
    assert made["definitions"]["control_asr"] and made["cells"][0]["by_seed"][0]["control_asr"] == 0.05
    assert (
        "Control ASR: of the same trigger on the network that the same defense trains" in numbers.main_table(made).notes
    )
    assert line(numbers.main_table(made), "BadNets")[1:] == ("0.900 / 0.950 / 0.050", "0.900 / 0.500 / 0.480")
    assert numbers.main_table(made, "r_acc").title == "CDA / R-ACC"
    assert line(numbers.detail_table(made), "BadNets", LFD.title)[2:] == ("0.900", "0.500", "0.480", "0.500", "removed")
    # SIG fools clean networks, so that there is no backdoor to remove.
    outcome = numbers.verdict(made)
    assert (
        outcome.headline == "LfD (alpha 0.5) removes the backdoor."
        and "no backdoor even without defense" in outcome.text
    )


def test_detection_and_false_alarms(results):
    row = line(numbers.detection_table(results), "BadNets")
    auc = float(np.mean(SCORES[IS_POISONED][:, None] > SCORES[~IS_POISONED][None]))
    assert row[1:3] == (0.1, "LfD (alpha 0.5)") and auc == 1
    assert row[3:] == ("0.100 ± 0.000", "0.750 ± 0.000", "0.750 ± 0.000", "0.750 ± 0.000", "1.000 ± 0.000")
    clean = line(numbers.detection_table(results), "no attack")
    assert clean[1] == 0 and clean[3:] == ("0.100 ± 0.000", "–", "–", "–", "–")
    table = numbers.false_alarm_table(results)
    assert line(table, "LfD (alpha 0.5)")[1:] == ("0.905 ± 0.007", "-0.040 ± 0.014", "0.100 ± 0.000")
    assert line(table, "no defense")[2:] == (None, "–")
    poisoned = numbers.summarise([measure("badnets", NONE, 0.9, 1.0)], 10, 0)
    assert numbers.detection_table(poisoned) is None and numbers.false_alarm_table(poisoned) is None


def test_what_each_defense_receives():
    measured = [measure("badnets", variant, 0.9, 1.0) for variant in (NONE, LFD, ABL)]
    table = numbers.needs_table(numbers.summarise(measured, 10, 0))
    assert table.header[2:-1] == ("training set", "attacked model", "clean rows", "number of poisons")
    assert line(table, "no defense")[2:6] == (None, "yes", None, None)
    assert line(table, "LfD (alpha 0.5)")[2:6] == ("yes", None, "yes", None)
    assert line(table, "ABL")[2:6] == ("yes", None, None, "yes")
    assert "Number of poisons: not available to a real defender" in table.notes


def test_our_numbers_stand_beside_the_papers(results):
    table = shared.published_table(results, "cifar10")
    rows = {(row[0], row[1], row[-1]): row[2:6] for row in table.rows}
    ours, papers, asr, success = rows["Blended, random pixels", "LfD (alpha 0.5)", "LfD Table 1"]
    assert (papers, success) == (92.43, 3.38) and (ours, asr) == (pytest.approx(90), pytest.approx(1))
    assert rows["no attack", "no defense", "ABM Table III"][1::2] == (82.91, None)
    assert not any("+" in row[0] for row in table.rows)
    assert shared.published_table(results, "mnist") is None


def test_a_suppressed_attack_has_no_paper_to_compare_with():
    measured = [measure("badnets:suppression=10", NONE, 0.9, 1.0)]
    assert shared.published_table(numbers.summarise(measured, 10, 0), "cifar10") is None


def test_a_failure_in_the_paper_is_shown_as_such():
    abl = measure("narcissus", ABL, 0.9, 1.0)
    table = shared.published_table(numbers.summarise([abl], 10, 0), "gtsrb")
    assert [row[2:] for row in table.rows] == [(90, "fail", 100, "fail", "ABM Table III")]


def test_times(results):
    table = shared.time_table(results, {"none": 4.0, "lfd:alpha=0.5": 10.0})
    assert table.rows == (("no defense", "4.00", None), ("LfD (alpha 0.5)", "10.00", "2.50 ×"))
    assert "No defense: plain training" in table.notes
    assert shared.time_table(results, {}) is None
    alone = shared.time_table(results, {"lfd:alpha=0.5": 10.0}, True, "teacher", "method")
    assert alone.header == ("method", "seconds per teacher") and alone.rows == (("LfD (alpha 0.5)", "10.00"),)
    assert "divided by the number of teachers" in alone.notes and "another method" in alone.notes
    continued = shared.time_table(results, {"none": 0.1, "lfd:alpha=0.5": 10.0}, is_whole=False)
    assert [row[2] for row in continued.rows] == [None, None] and "was resumed" in continued.notes


def test_facts_and_rows(results):
    assert line(shared.facts_table(results), "LfD (alpha 0.5)", "BadNets")[2:] == ("kept", "36.000 ± 0.000")
    assert line(numbers.rows_table(results), "BadNets")[1:] == ("all-to-one, target 0", ROWS, 4, 0, None, "5, 6")


def unknown():
    measured = [
        measure("none", NONE, 0.9, truth=False),
        measure("none", LFD, 0.8, truth=False, flags=FLAGS, scores=SCORES),
    ]
    return numbers.summarise(measured, 10, 0)


def test_user_data_has_no_success_and_no_false_alarms():
    user_data = unknown()
    assert user_data["attacks"][0]["num_poisoned"] is None
    table = numbers.main_table(user_data)
    assert line(table, "user data")[1:] == ("0.900 / –", "0.800 / –") and "is unknown, and so is its ASR" in table.notes
    assert numbers.false_alarm_table(user_data) is None
    assert line(numbers.detection_table(user_data), "user data")[1:] == (
        None,
        "LfD (alpha 0.5)",
        "0.100",
        *["–"] * 4,
    )
    outcome = numbers.verdict(user_data)
    assert outcome.level == "info" and "Ground truth unknown" in outcome.headline
    line_of_it = "User data: no defense has CDA 0.900; LfD (alpha 0.5) has CDA 0.800 and flags 10.0 % of the rows."
    assert line_of_it in outcome.text


def test_verdict_says_what_works_and_what_does_not(results):
    outcome = numbers.verdict(results)
    assert outcome.level == "warning" and outcome.headline == "LfD (alpha 0.5) removes 1 of 2 backdoors."
    assert "mean ASR 0.890 becomes 0.160, mean CDA 0.910 becomes 0.870" in outcome.text
    assert "Not removed: BadNets + SIG (weakened: ASR 0.30, CDA 0.85)." in outcome.text
    assert "there is no backdoor even without defense (mean ASR): Blended, random pixels (0.30)" in outcome.text
    assert (
        "No attack: no defense has CDA 0.945; LfD (alpha 0.5) has CDA 0.905 and flags 10.0 % of the rows."
        in outcome.text
    )
    assert "One seed" not in outcome.text


@pytest.mark.parametrize(
    ("lfd", "abl", "about", "level", "headline"),
    [
        (0.0, 0.0, (), "success", "2 of 2 defenses remove the backdoor."),
        (0.0, 0.9, (), "warning", "1 of 2 defenses remove the backdoor."),
        (0.9, 0.9, (), "attacked", "0 of 2 defenses remove the backdoor."),
        (0.0, 0.9, ("lfd:alpha=0.5",), "success", "LfD (alpha 0.5) removes the backdoor."),
        (0.0, 0.9, ("abl",), "attacked", "ABL does not remove the backdoor."),
        (0.0, 0.4, ("abl",), "warning", "ABL weakens the backdoor, but does not remove it."),
    ],
)
def test_every_outcome_has_its_words(lfd, abl, about, level, headline):
    measured = [
        measure("badnets", NONE, 0.9, 1.0),
        measure("badnets", LFD, 0.9, lfd),
        measure("badnets", ABL, 0.9, abl),
    ]
    outcome = numbers.verdict(numbers.summarise(measured, 10, 0), about)
    assert (outcome.level, outcome.headline) == (level, headline) and "One seed only" in outcome.text


def test_without_an_attack_that_works_there_is_nothing_to_say():
    measured = [measure("badnets", NONE, 0.9, 0.2), measure("badnets", LFD, 0.9, 0.0)]
    outcome = numbers.verdict(numbers.summarise(measured, 10, 0))
    assert (
        outcome.level == "info"
        and "so there is nothing to remove" in outcome.headline
        and "BadNets (0.20)" in outcome.text
    )
    clean = numbers.summarise([measure("none", NONE, 0.9), measure("none", LFD, 0.9, flags=FLAGS)], 10, 0)
    assert numbers.verdict(clean).headline.startswith("The training set is clean")


def comparisons(names, variants=(NONE, LFD), truth=True):
    made = []
    for variant in variants:
        found = {} if variant is NONE else {"flags": FLAGS, "scores": SCORES}
        measured = []
        for name in names:
            success = [] if name == "none" else [0.5] * len(name.split("+"))
            measured += [measure(name, variant, 0.9, *success, seed=seed, truth=truth, **found) for seed in (0, 1)]
        num = len(measured)
        if variant is NONE:
            result = DefenseResult(None, {})
        else:
            pictures = {"reversed trigger": np.random.default_rng(0).random((num, 3, 8, 8, 1)).astype(np.float32)}
            flags, scores = np.tile(FLAGS, (num, 1)), np.tile(SCORES, (num, 1)).astype(np.float32)
            result = DefenseResult(None, {}, flags, scores, {}, pictures)
        made.append(Comparison(variant, result, measured))
    return made


@dataclass(frozen=True)
class Config:
    seed: int = 0


@pytest.mark.parametrize("names", [("badnets",), ("badnets", "badnets+sig", "none")])
def test_the_report_is_complete(tmp_path, undrawn, names):
    made = comparisons(names)
    measured = numbers.summarise([measurement for comparison in made for measurement in comparison.measured], 10, 0)
    folder = open_run(tmp_path / "run", Config(), experiment="lfd")
    extra = Section("Curves of its own", "", (Table("Its own table", ("a",), ((1,),)),))
    timings = {"no defense": 8.0, "lfd": 5.0}
    report = numbers.page(
        folder,
        measured,
        made,
        TrainTest(TRAIN, TRAIN),
        seconds=shared.seconds_of(made, timings),
        extra_sections=[extra],
    )
    assert report.title == "Defenses on cifar10"
    assert {"attack badnets", "defense lfd:alpha=0.5"} <= set(report.settings)
    sources = {"training data": "a test"}
    publish(folder, report, settings={"seed": 0}, timings=timings, reproduce="python x.py", sources=sources)
    page = (folder.path / "report.html").read_text("utf-8")
    for text in (
        "Curves of its own",
        "What each method receives",
        "Detection of poisoned rows",
        "python x.py",
        "LfD (alpha 0.5)",
    ):
        assert text in page
    assert page.count("<img") == 5
    markdown = (folder.path / "table.md").read_text("utf-8")
    assert "Its own table" in markdown and ("Hybrid attacks" in markdown) == (len(names) > 1)
    assert to_markdown(numbers.main_table(measured)) in markdown
    paths = {name: f"scores/lfd-alpha=0.5/{name}.csv" for name in names}
    assert sorted(str(path.relative_to(folder.path)) for path in folder.path.rglob("*.csv")) == sorted(paths.values())
    assert json.loads((folder.path / "timings.json").read_text()) == {"seconds": timings}
    assert f"{8 / 2 / len(names):.2f}" in page  # of plain training, for one of the suspects


def test_scores_files():
    text = shared.scores_csv(suspect("badnets"), FLAGS, SCORES)
    rows = list(csv.reader(text.splitlines()))
    assert rows[0] == ["row", "label", "score", "flagged", "is_poisoned"] and len(rows) == 1 + ROWS
    assert rows[6] == ["5", "1", "2.05", "1", "1"] and rows[8] == ["7", "3", "0.07", "1", "0"]
    unknown = shared.scores_csv(suspect("none", truth=False), None, SCORES)
    assert list(csv.reader(unknown.splitlines()))[2] == ["1", "1", "2.01", "", ""]


def test_pictures_are_of_the_rows_that_the_defense_suspects(monkeypatch, tmp_path):
    seen = {}

    def grid(images, row_names, column_names, title, *, captions=None):
        seen.update(images=images, names=row_names, captions=captions)
        raise KeyboardInterrupt

    monkeypatch.setattr(shared.plots, "image_grid", grid)
    folder = open_run(tmp_path / "run", Config(), experiment="lfd")
    with pytest.raises(KeyboardInterrupt):
        shared.suspicious_figures(folder, comparisons(("badnets",)), TRAIN)
    first = [cell for row in seen["captions"] for cell in row]
    # Rows 1, 2, 5 and 7 are flagged; 7 is clean and has the lowest score, 6 is poisoned and not flagged.
    assert first[:5] == ["dog: poisoned", "cow: poisoned", "dog: poisoned", "hen: clean", "cow: poisoned"]
    assert len(first) == 24 and not any(seen["names"])
    np.testing.assert_array_equal(seen["images"][0][0], IMAGES[5].astype(np.float32) / 255)
    with pytest.raises(KeyboardInterrupt):
        shared.suspicious_figures(folder, comparisons(("none",), truth=False), TRAIN)
    assert seen["captions"][0][0] == "dog"


def test_attacks_alone_have_their_success_and_no_comparison():
    outcome = numbers.verdict(numbers.summarise([measure("badnets", NONE, 0.9, 0.95)], 10, 0))
    assert (outcome.level, outcome.headline) == ("info", "No defense was run, so nothing is compared.")
    assert outcome.text.startswith("Mean ASR without defense: BadNets 0.950.") and "trigger" not in outcome.text

import numpy as np
import pytest

from bdjax.defenses.contract import Defense
from bdjax.defenses.undefended import UndefendedSettings
from bdjax.evaluation.measure import Comparison, Measured
from bdjax.evaluation.patterns import FoundPattern
from bdjax.evaluation.published import ALL_TO_ALL, ALL_TO_ONE
from bdjax.evaluation.suspects import Suspect
from bdjax.evaluation.variants import DefenseVariant, read_attack
from bdjax.metrics import measure_detection
from bdjax.reporting import detectors
from bdjax.reporting.report import Section, publish
from bdjax.run.folder import open_run
from bdjax.types import Dataset, Detection, PoisonedDataset

ROWS = 200
IMAGES = np.random.default_rng(0).integers(0, 256, (ROWS, 8, 8, 3)).astype(np.uint8)
LABELS = (np.arange(ROWS) % 4).astype(np.int32)
TRAIN = Dataset(IMAGES, LABELS, 4, "cifar10", "a test", ("cat", "dog", "cow", "hen"))
IS_POISONED = np.arange(ROWS) < 20
IS_COVER = np.zeros(ROWS, bool)
POISONED = PoisonedDataset(IMAGES, LABELS, 4, "cifar10", "a test", (), IS_POISONED, LABELS, IS_COVER)
FOUND = "classes with a pattern"


def variant(name, title, *needs):
    defense = Defense(
        name, title, "a paper", "before training", ("training set", *needs), UndefendedSettings(), run=print
    )
    return DefenseVariant(name, defense, UndefendedSettings())


VBD, SCAN, ABL = (
    variant("vbd", "VBD"),
    variant("scan", "SCAn", "clean rows"),
    variant("abl", "ABL", "number of poisons"),
)


def flags(hits, false=0):
    """Flags on the first `hits` of the 20 poisoned rows and on `false` clean rows."""
    return (np.arange(ROWS) < hits) | (np.arange(ROWS) >= ROWS - false)


def f1(hits, false=0):
    return 2 * hits / (hits + false + 20)


def suspect(attack, seed=0):
    read = read_attack(attack, TRAIN, 1)
    if read.plan is None:
        return Suspect(read, seed, TRAIN, (), np.zeros(ROWS, bool))
    return Suspect(read, seed, POISONED, ((),) * len(read.plan.parts), IS_POISONED)


def measure(attack, defense, own_flags, seed=0, facts=None):
    case = suspect(attack, seed)
    detection = measure_detection(own_flags, own_flags.astype(float), case.is_poisoned)
    return Measured(case, defense, None, (), detection, facts or {}, 2.0)


def summarise(*measured):
    return detectors.summarise(measured, 3)


def line(table, *starts):
    (found,) = [row for row in table.rows if row[: len(starts)] == starts]
    return found[len(starts) :]


@pytest.fixture(scope="module")
def results():
    measured = []
    for seed in (0, 1):
        measured += [
            measure("white_square", VBD, flags(20 - 10 * seed), seed, {FOUND: 1.0, "smallest p-value": 0.0}),
            measure("white_square", SCAN, flags(20), seed),
            measure("big_kitty", VBD, flags(20), seed, {FOUND: 2.0, "smallest p-value": 0.0}),
            measure("big_kitty", SCAN, flags(0), seed),
            measure("white_square:opacity=0.1", VBD, flags(10), seed, {FOUND: 1.0}),
            measure("white_square:opacity=0.1", SCAN, flags(20), seed),
            measure("big_kitty:opacity=0.1", VBD, flags(20), seed, {FOUND: 1.0}),
            measure("big_kitty:opacity=0.1", SCAN, flags(20), seed),
            measure("white_square:opacity=0.5", VBD, flags(20), seed, {FOUND: 1.0}),
            measure("white_square:opacity=0.5", SCAN, flags(20), seed),
            measure("white_square_all_to_all:opacity=0.2", VBD, flags(20, 5), seed, {FOUND: 4.0}),
            measure("white_square_all_to_all:opacity=0.2", SCAN, flags(0), seed),
            measure("white_square:poison_rate=0.01", VBD, flags(20, 20), seed, {FOUND: 1.0}),
            measure("none", VBD, flags(0, 4 * seed), seed, {FOUND: 0.0 + seed}),
            measure("none", SCAN, flags(0, 2), seed),
        ]
    return summarise(*measured)


def test_the_grid_is_the_papers():
    names = [
        "white_square",
        "white_square:poison_rate=0.1",
        "white_square:opacity=0.2:target=2",
        "white_square_all_to_all",
        "white_square:opacity=0.3",
        "white_square:poison_rate=0.05",
        "white_square:cover_rate=0.1",
        "white_square:suppression=1",
        "white_square:label_rule=all_to_one",
        "white_square+big_kitty",
        "badnets",
        "none",
    ]
    results = summarise(*(measure(name, VBD, flags(1)) for name in names))
    assert [attack["attack"] for attack in detectors.grid(results)] == names[:4]
    assert [attack["attack"] for attack in detectors.grid(results, (ALL_TO_ALL,), (1.0,))] == [
        "white_square_all_to_all"
    ]
    assert detectors.calibration_table(results).rows[-1][0] == "no attack"
    assert len(detectors.calibration_table(results).rows) == len(names) - 4


def test_f1_by_trigger_beside_the_paper(results):
    table = detectors.f1_table(results, ALL_TO_ONE, "cifar10")
    assert table.header == ("trigger", "VBD", "VBD, paper", "SCAn", "SCAn, paper")
    spread = 100 * np.std([1, f1(10)], ddof=1)
    ours = f"{50 * (1 + f1(10)):.1f} ± {spread:.1f}"
    assert line(table, "White square") == (ours, "97.5 ± 0.3", "100.0 ± 0.0", "97.9 ± 0.1")
    assert line(table, "Big kitty") == ("100.0 ± 0.0", "99.9 ± 0.2", "0.0 ± 0.0", "100.0 ± 0.0")
    # Of the mean, the spread is that of the seeds' means: half the one above.
    mean = f"{100 * (3 + f1(10)) / 4:.1f} ± {spread / 2:.1f}"
    assert line(table, "mean of 2 triggers") == (mean, "99.3 ± 0.1", "50.0 ± 0.0", "99.6 ± 0.0")
    assert table.row_styles == ("", "", "ours") and "over 2 seeds" in table.notes and "200 rows" in table.notes
    assert "10 % of them poisoned" in table.notes and "over its 6 triggers" in table.notes
    assert detectors.f1_table(results, ALL_TO_ALL, "cifar10") is None
    assert detectors.f1_table(results, ALL_TO_ONE, "digits").header == ("trigger", "VBD", "SCAn")
    assert "paper" not in detectors.f1_table(results, ALL_TO_ONE, "digits").notes.lower()


def test_single_triggers_that_are_blended_have_no_number_in_the_paper(results):
    table = detectors.f1_table(results, ALL_TO_ONE, "cifar10", 0.1)
    assert line(table, "Big kitty") == ("100.0 ± 0.0", None, "100.0 ± 0.0", None)
    assert line(table, "mean of 2 triggers")[1] == "93.3 ± 1.1"
    assert table.title == "F1, all-to-one, opacity 10 %"


def test_blended(results):
    table = detectors.blended_table(results, ALL_TO_ONE, "cifar10")
    tenth = 100 * (1 + f1(10)) / 2
    assert line(table, "10 %") == (2, f"{tenth:.1f} ± 0.0", "93.3 ± 1.1", "100.0 ± 0.0", "92.8 ± 6.1")
    assert line(table, "50 %")[0] == 1 and len(table.rows) == 3  # nothing at 20 %
    assert line(table, "mean")[:3] == (3, f"{(2 * tenth + 100) / 3:.1f} ± 0.0", "96.3 ± 0.7")
    (row,) = detectors.blended_table(results, ALL_TO_ALL, "tiny_imagenet").rows
    assert row == ("20 %", 1, f"{100 * f1(20, 5):.1f} ± 0.0", "9.2 ± 4.9", "0.0 ± 0.0", "0.0 ± 0.0")


def test_summary(results):
    table = detectors.summary_table(results, "cifar10")
    assert [row[:2] for row in table.rows] == [
        ("all-to-one, full", 2),
        ("all-to-one, blended", 3),
        ("all-to-all, blended", 1),
        ("all", 6),
    ]
    mean = 100 * np.mean([(1 + f1(10)) / 2, 1, f1(10), 1, 1, f1(20, 5)])
    assert (
        line(table, "all")[1].startswith(f"{mean:.1f} ±") and line(table, "all")[2] is None
    )  # the paper has no mean over these six
    assert line(table, "all-to-all, blended")[2] == "73.3 ± 0.8"


def test_means_are_over_sets_that_every_detector_was_evaluated_on():
    results = summarise(
        measure("white_square", VBD, flags(20)),
        measure("big_kitty", VBD, flags(0)),
        measure("green_square", VBD, flags(10)),
        measure("white_square", SCAN, flags(10)),
        measure("big_kitty", SCAN, flags(10)),
    )
    table = detectors.f1_table(results, ALL_TO_ONE, "digits")
    assert line(table, "Green square") == (f"{100 * f1(10):.1f}", None)
    assert line(table, "mean of 2 triggers") == ("50.0", f"{100 * f1(10):.1f}")
    assert "that every detector was evaluated on" in table.notes
    assert "Only settings" in detectors.summary_table(results, "digits").notes


def test_sets_with_other_seeds_have_a_mean_without_spread():
    results = summarise(
        measure("white_square", VBD, flags(20), 0),
        measure("white_square", VBD, flags(0), 1),
        measure("big_kitty", VBD, flags(20), 2),
    )
    mean = detectors.f1_of(results, results["attacks"], "vbd")
    assert mean.mean == pytest.approx(75) and mean.spread is None and mean.count == 2
    assert detectors.f1_of(results, [], "vbd") is None and detectors.f1_of(results, results["attacks"], "scan") is None


def test_clean_sets_and_other_rates(results):
    table = detectors.calibration_table(results)
    assert table.header[-1] == FOUND and len(table.rows) == 3
    clean = line(table, "no attack", 0.0, "VBD")
    spread = np.std([0, 0.02], ddof=1)
    assert clean == (f"0.0100 ± {spread:.4f}", "2 ± 3", "–", "–", "–", "–", "0.5 ± 0.7")
    assert line(table, "no attack", 0.0, "SCAn")[-1] == "–"
    rare = line(table, "White square (poison rate 0.01)", 0.1, "VBD")
    assert rare[2:5] == ("0.50 ± 0.00", "1.00 ± 0.00", f"{f1(20, 20):.2f} ± 0.00")
    assert detectors.calibration_table(summarise(measure("white_square", VBD, flags(3)))) is None


def test_evidence(results):
    table = detectors.evidence_table(results)
    assert table.header == ("training set", "defense", FOUND)  # the p-value is in the table of every fact
    assert line(table, "Big kitty", "VBD") == ("2.0 ± 0.0",)
    assert all(row[1] == "VBD" for row in table.rows) and len(table.rows) == 8
    assert detectors.evidence_table(summarise(measure("white_square", SCAN, flags(3)))) is None


def test_nothing_to_show():
    none = variant("none", "no defense")
    results = summarise(Measured(suspect("white_square"), none, None, (), measure_detection(None, None, None), {}, 0.0))
    assert detectors.detectors(results) == [] and detectors.summary_table(results, "cifar10") is None
    assert detectors.f1_table(results, ALL_TO_ONE, "cifar10") is None
    assert detectors.blended_table(results, ALL_TO_ONE, "cifar10") is None
    assert detectors.calibration_table(results) is detectors.evidence_table(results) is None
    assert detectors.verdict(results).level == "info"


def test_verdict(results):
    outcome = detectors.verdict(results, ("vbd",))
    mean = 100 * np.mean([(1 + f1(10)) / 2, 1, f1(10), 1, 1, f1(20, 5)])
    assert outcome.headline == f"VBD has a mean F1 of {mean:.1f} % on 6 training sets."
    assert outcome.level == "warning" and "F1 is never below 50 %." in outcome.text
    assert "False alarms: VBD flags 1.00 % of the rows of the clean training set." in outcome.text
    assert f"SCAn: mean F1 66.7 % on 6 training sets where VBD has {mean:.1f} %; fails on 2." in outcome.text
    assert "receives: training set, clean rows. On the clean set it flags 1.00 %." in outcome.text
    other = detectors.verdict(results, ("scan",))
    assert other.level == "warning"
    assert other.headline.endswith("66.7 %, and fails on 2 of 6 training sets.")
    assert "Big kitty (0.0 %), White square, all-to-all (opacity 0.2) (0.0 %)" in other.text


@pytest.mark.parametrize(("hits", "level"), [(20, "success"), (15, "warning"), (5, "attacked")])
def test_levels(hits, level):
    results = summarise(measure("badnets", VBD, flags(hits)), measure("badnets", ABL, flags(10)))
    outcome = detectors.verdict(results, ("vbd",))
    assert outcome.level == level and "1 of the training sets with poisoned rows" in outcome.text
    assert "number of poisons (not available to a real defender)" in outcome.text and "One seed only" in outcome.text
    assert "the rate of false alarms is unknown" in outcome.text


def test_verdict_of_a_clean_run():
    outcome = detectors.verdict(summarise(measure("none", VBD, flags(0, 2))), ("vbd",))
    assert outcome.level == "info" and "VBD flags 1.00 %" in outcome.text


def comparisons():
    names = ["white_square", "white_square:opacity=0.5", "none", "white_square:poison_rate=0.01", "badnets+sig"]
    result = []
    for defense in (VBD, SCAN):
        measured = [measure(name, defense, flags(15, 3), seed, {FOUND: 1.0}) for name in names for seed in (0, 1)]
        noise = np.random.default_rng(1).random((len(measured), ROWS)).astype(np.float32)
        result.append(
            Comparison(defense, Detection(np.stack([flags(15, 3)] * len(measured)), noise + flags(15, 3)), measured)
        )
    return result


def test_a_premise_that_fails_on_every_set_is_no_result():
    sets = [measure("white_square", VBD, flags(20)), measure("none", VBD, flags(0)), measure("none", SCAN, flags(0))]
    warned = [measured._replace(warning="simple networks learned the classes") for measured in sets[:2]]
    outcome = detectors.verdict(summarise(*warned, sets[2]), ("vbd",))
    assert outcome.level == "not_tested"
    assert outcome.headline == (
        "VBD could not be tested on the paper's settings: its premise fails on every one of them."
    )
    assert outcome.text.startswith("Measured all the same: VBD has a mean F1 of 100.0 %.")
    assert detectors.verdict(summarise(warned[0], *sets[1:]), ("vbd",)).level == "success"


def test_sets_that_are_drawn_are_spread_out():
    compared = comparisons()
    results = summarise(*(measurement for comparison in compared for measurement in comparison.measured))
    vbd, scan = detectors.spread_out(results, compared, 3)
    assert [measurement.suspect.attack.name for measurement in vbd.measured] == ["white_square", "none", "badnets+sig"]
    assert {measurement.suspect.seed for measurement in scan.measured} == {0}
    np.testing.assert_array_equal(scan.result.scores, compared[1].result.scores[[0, 4, 8]])
    assert len(detectors.spread_out(results, compared)[0].measured) == 5
    triggers, opacities = ("white_square", "big_kitty", "small_kitty"), (0.1, 0.2, 0.5, 1)
    measured = [measure(f"{name}:opacity={opacity}", VBD, flags(3)) for name in triggers for opacity in opacities]
    compared = [Comparison(VBD, Detection(np.zeros((12, ROWS), bool), np.zeros((12, ROWS))), measured)]
    (sample,) = detectors.spread_out(summarise(*measured), compared, 4)
    settings = [measurement.suspect.attack.plan.parts[0] for measurement in sample.measured]
    assert {part.settings.opacity for part in settings} == set(opacities)
    assert {part.attack.name for part in settings} == set(triggers)


def pattern(attack, label=1, known=True):
    mask = np.zeros((8, 8), bool)
    mask[5:, 5:] = True
    true = (np.ones((8, 8, 3), np.float32), np.roll(mask, 1, 1).astype(np.float32), IMAGES[0], label == 1)
    return FoundPattern(
        attack, 3, label, IMAGES[1] / 255, mask, 0.98, "64P", *(true if known else (None, None, None, None))
    )


def test_report(tmp_path, undrawn):
    folder = open_run(tmp_path / "run", UndefendedSettings(), experiment="vbd")
    compared = comparisons()
    results = summarise(*(measurement for comparison in compared for measurement in comparison.measured))
    found = [pattern("white square", label, known) for label in (1, 2) for known in (True, False)] * 2
    page = detectors.page(
        folder,
        results,
        compared,
        TRAIN,
        found,
        seconds={},
        about=("vbd",),
        extra_sections=(Section("My section", "said <here>"),),
    )
    run = {"settings": {"dataset": "cifar10"}, "timings": {"no defense": 1.0}, "reproduce": "python -m experiments.vbd"}
    publish(folder, page, **run, sources={"training data": TRAIN.source})
    page = (folder.path / "report.html").read_text()
    for title in (
        "Results",
        "Clean sets and other settings",
        "My section",
        "Found triggers",
        "Scores",
        "Evidence behind the flags",
    ):
        assert title in page
    assert "said &lt;here&gt;" in page and "VBD, paper" in page and "target 2: a false alarm" in page
    names = {path.name for path in folder.path.glob("*.png")}
    assert names == {
        "f1-by-opacity.png",
        "f1-by-poisoning-rate.png",
        "triggers-1.png",
        "triggers-2.png",
        *(f"{kind}-{name}.png" for kind in ("roc", "scores") for name in ("vbd", "scan")),
    }
    table = (folder.path / "table.md").read_text()
    assert "**Patterns that were kept**" in table
    assert "**F1, all-to-one, full opacity**" in table and "**What each method receives**" in table
    assert table.startswith(f"**{detectors.main_table(results, 'cifar10').title}**")
    assert (folder.path / "timings.json").exists()

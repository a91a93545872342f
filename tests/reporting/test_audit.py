"""The numbers, tables and sentences of an audit."""

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bdjax.defenses.registry import DEFENSES
from bdjax.defenses.vbd import Analysis, to_detection
from bdjax.defenses.vbd_patterns import VBDSettings
from bdjax.evaluation.suspects import Suspect
from bdjax.evaluation.variants import NO_ATTACK, AttackVariant, DefenseVariant
from bdjax.inspection.extracted_triggers import enlarge
from bdjax.reporting import audit, audit_verdict, report
from bdjax.reporting.audit import class_title, main_table, truth_table
from bdjax.reporting.tables import to_markdown
from bdjax.run.folder import RunFolder
from bdjax.types import Dataset, Detection, NotTested, PoisonedDataset

ROWS, CLASSES, OF_A_CLASS = 40, 4, 10
SETTINGS = VBDSettings(networks="64P/16-16P")


def dataset(**changes):
    """Forty grey rows, classes 0, 1, 2, 3, 0, 1, ..."""
    values = np.random.default_rng(0).integers(0, 256, (ROWS, 8, 8, 1)).astype(np.uint8)
    labels = (np.arange(ROWS) % CLASSES).astype(np.int32)
    names = ("ant", "bee", "cat", "dog")
    fields = {"images": values, "labels": labels, "num_classes": CLASSES, "name": "mine", "source": "mine.npz"}
    return Dataset(**(fields | {"class_names": names} | changes))


def poisoned(is_poisoned):
    nothing = np.zeros(ROWS, bool)
    truth = {"is_poisoned": is_poisoned, "original_labels": dataset().labels, "is_cover": nothing}
    return PoisonedDataset(**vars(dataset()), **truth)


def analysis(found=(3,), flagged=4, success=0.9, accuracy=0.95):
    """VBD's result: a pattern of 2 x 2 pixels in a corner for some classes, on the first rows of each."""
    flags, scores = np.zeros((1, ROWS), bool), np.zeros((1, ROWS), np.float32)
    p_values, rates = np.full((1, 2, CLASSES), 0.4), np.zeros((1, 2, CLASSES))
    network = np.full((1, CLASSES), -1)
    masks, patterns = np.zeros((1, CLASSES, 8, 8), bool), np.zeros((1, CLASSES, 8, 8, 1), np.float32)
    accuracies = np.zeros((1, CLASSES))
    for label in found:
        in_class = np.arange(ROWS)[np.arange(ROWS) % CLASSES == label]
        scores[0, in_class] = np.linspace(0.4, 0.1, OF_A_CLASS)
        scores[0, in_class[:flagged]] = 0.9 + 0.01 * np.arange(flagged)
        flags[0, in_class[:flagged]] = accuracy >= SETTINGS.least_accuracy
        p_values[0, :, label], rates[0, :, label], network[0, label] = (1e-4, 1e-6), success, 1
        masks[0, label, 6:, 6:] = True
        patterns[0, label, 6:, 6:] = 1.0
        accuracies[0, label] = accuracy
    labels = (np.arange(ROWS) % CLASSES).astype(np.int32)[None]
    return Analysis(
        *(flags, scores, np.array([[0.2, 0.4]]), np.array([[0.2, 0.3]]), p_values, rates),
        *(np.zeros((1, CLASSES), bool), network),
        *(masks, patterns, accuracies, labels),
    )


def suspect_of(rows):
    truth = rows.is_poisoned if isinstance(rows, PoisonedDataset) else None
    return Suspect(AttackVariant(NO_ATTACK, None, 0, 0.0), 0, rows, (), truth)


def summarise(rows, found, settings):
    """The numbers of an audit by VBD."""
    variant = DefenseVariant("vbd", DEFENSES["vbd"], settings)
    return audit.summarise(suspect_of(rows), to_detection(found, settings), variant)


def verdict_of(rows=None, **changes):
    return summarise(rows or dataset(), analysis(**changes), SETTINGS)["verdict"]


def test_a_class_with_a_trigger():
    verdict = verdict_of()
    assert (verdict["level"], verdict["headline"]) == (
        "found",
        "Class 3 (dog) carries a trigger: 4 of 40 rows are flagged.",
    )
    evidence, networks, preset, rest = verdict["text"].split("\n\n")
    assert evidence == (
        "Class 3 (dog): a pattern of 4 of 64 pixels turns 90 % of other rows into this class; 2 of 2 simple networks have such "
        "a pattern; p-value 1e-06; 4 of its 10 rows are flagged (40 %)."
    )
    assert networks.startswith(
        "Simple networks: 64P predicts 20 % of its training rows and 20 % of the held-back rows; 16-16P predicts 40 % of its "
        "training rows and 30 % of the held-back rows as their label."
    )
    assert preset.startswith(
        "Preset paper: 1 setting differs from the paper's: networks 64P/16-16P (paper: 64P/10-10P/16-16P)."
    )
    assert rest.startswith("Other rows may be poisoned, too. ")


@pytest.mark.parametrize(
    ("changes", "level", "headline"),
    [
        ({"found": (1, 3)}, "found", "Classes 1 (bee) and 3 (dog) carry a trigger: 8 of 40 rows are flagged."),
        ({"flagged": 1}, "found", "Class 3 (dog) carries a trigger: 1 of 40 rows is flagged."),
        (
            {"success": 0.49},
            "suspicious",
            "Class 3 (dog) is suspicious, but the evidence is weak: 4 of 40 rows are flagged.",
        ),
        ({"success": 0.5}, "found", "Class 3 (dog) carries a trigger: 4 of 40 rows are flagged."),
        (
            {"flagged": 0},
            "suspicious",
            "Class 3 (dog) is suspicious, but the evidence is weak: 0 of 40 rows are flagged.",
        ),
        (
            {"accuracy": 0.7},
            "suspicious",
            "Class 3 (dog) is suspicious, but the evidence is weak: 0 of 40 rows are flagged.",
        ),
        (
            {"found": ()},
            "nothing_found",
            "Nothing found in these 40 rows; fewer than about 100 poisoned rows of a class (more than all) cannot be counted "
            "on to be found.",
        ),
    ],
)
def test_every_finding_has_its_sentence(changes, level, headline):
    verdict = verdict_of(**changes)
    assert (verdict["level"], verdict["headline"]) == (level, headline)
    assert audit_verdict.VBD_NOT_FOUND in verdict["text"]


def test_why_evidence_is_weak():
    assert "Weak evidence: class 3 (dog) (its pattern turns 40 % of other rows)." in verdict_of(success=0.4)["text"]
    assert "(none of its 10 rows are flagged)" in verdict_of(flagged=0)["text"]
    assert "(its detector has accuracy 0.70, below 0.75, and is not used)" in verdict_of(accuracy=0.7)["text"]


def test_a_detector_that_is_unsure_of_most_of_its_rows_is_weak_evidence():
    for sure, level in ((1, "suspicious"), (2, "found")):
        found = analysis()
        found.scores[found.flags] = np.where(np.arange(4) < sure, 0.75, 0.74)
        verdict = summarise(dataset(), found, SETTINGS)["verdict"]
        assert verdict["level"] == level
        text = "(25 % of its flagged rows have a score of 0.75 or more)"
        assert (text in verdict["text"]) is (level == "suspicious")


def test_a_class_whose_flags_are_dropped_for_an_unsure_detector_says_so():
    found = analysis()
    found.scores[found.flags] = 0.6
    found.flags[:] = False  # what `least_sure` does
    verdict = summarise(dataset(), found, SETTINGS)["verdict"]
    assert verdict["level"] == "suspicious"
    assert (
        "its detector is unsure: 0 % of the rows that it recognises have a score of 0.75 or more, so none is flagged"
        in verdict["text"]
    )


@pytest.mark.parametrize("flagged", [0, 4])
def test_a_pattern_of_one_network_without_a_flagged_row_is_no_finding(flagged):
    found = analysis(flagged=flagged)
    found.success[0, 0, 3] = 0.01  # below the least success
    results = summarise(dataset(), found, SETTINGS)
    doubt = "only 1 of 2 networks has a working pattern"
    if flagged:
        assert (results["outcome"], results["classes"][3]["finding"]) == ("found", "weak")
        assert f"Weak evidence: class 3 (dog) ({doubt})." in results["verdict"]["text"]
    else:
        assert (results["outcome"], results["classes"][3]["finding"]) == ("nothing found", "unconfirmed")
        assert results["verdict"]["text"].startswith(
            f"A pattern that was not confirmed, so no finding: class 3 (dog) (none of its 10 rows are flagged, {doubt})."
        )
        assert ("Class 3 (dog)", "not confirmed") in [row[:2] for row in main_table(results).rows]


@pytest.mark.parametrize("flagged", [0, 4])
def test_a_pattern_that_may_be_chance_needs_a_flagged_row(flagged):
    found = analysis(flagged=flagged)
    found.may_be_chance[0, 3] = True
    found.p_values[0, 0, 3], found.success[0, 0, 3] = 1e-9, 0.2  # of a network whose pattern does not work
    results = summarise(dataset(), found, SETTINGS)
    outcome = ("found", "weak") if flagged else ("nothing found", "unconfirmed")
    assert (results["outcome"], results["classes"][3]["finding"]) == outcome
    assert results["classes"][3]["pattern_p_value"] == 1e-6
    assert "its p-value of 1e-06 may be chance among so many classes and networks" in results["verdict"]["text"]


def test_copies_and_contradictions_are_caveats():
    rows = dataset()
    assert not any("exact copies" in text for text in summarise(rows, analysis(), SETTINGS)["caveats"])
    images = rows.images.copy()
    images[[4, 8, 5]] = images[0]  # rows 0, 4 and 8 are of one class, row 5 of another
    results = summarise(dataset(images=images), analysis(), SETTINGS)
    assert (results["copies"], results["contradicted"]) == (3, 4)
    text = "\n".join(results["caveats"])
    assert "3 of the 40 rows are exact copies of others. A held-back row" in text
    assert "4 rows have the same pixels as another of another class" in text


def test_an_unconfirmed_pattern_does_not_make_up_for_planted_triggers_that_were_missed():
    found = analysis(flagged=0)
    found.success[0, 0, 3] = 0.01
    variant = DefenseVariant("vbd", DEFENSES["vbd"], SETTINGS)
    sets = [{"planted": 20, "found": False, "hits": 0, "flagged": 0, "precision": None}]
    sensitivity = {"trigger": "white square", "target": "class 0", "sets": sets}
    results = audit.summarise(suspect_of(dataset()), to_detection(found, SETTINGS), variant, sensitivity=sensitivity)
    assert results["outcome"] == "could not be tested"


def test_a_pattern_of_all_of_a_class_is_what_the_class_looks_like():
    verdict = verdict_of(flagged=10)
    assert (
        verdict["level"] == "suspicious" and "(10 of its 10 rows are flagged, as if the pattern were" in verdict["text"]
    )
    assert verdict_of(flagged=9)["level"] == "found"


def test_almost_all_of_a_class_may_be_poisoned_if_it_has_too_many_rows():
    # Mislabelled poisoned rows of many classes are added to one class and outnumber its own rows.
    base = analysis(found=())
    for size, level in ((30, "found"), (10, "suspicious")):
        labels = np.repeat([0, 1, 2, 3], [size, 5, 5, ROWS - size - 10]).astype(np.int32)
        found = base._replace(network=np.array([[1, -1, -1, -1]]), detector_accuracies=np.array([[0.9, 0, 0, 0]]))
        found = found._replace(flags=(labels == 0)[None], p_values=base.p_values.copy(), success=base.success.copy())
        found = found._replace(scores=found.flags.astype(np.float32))
        found.p_values[0, :, 0], found.success[0, :, 0] = 1e-4, 0.9
        assert summarise(dataset(labels=labels), found, SETTINGS)["verdict"]["level"] == level


def test_one_certain_class_among_weak_ones_is_the_one_that_is_named():
    found = analysis(found=(1, 3))
    found.success[0, 1, 1] = 0.4
    verdict = summarise(dataset(), found, SETTINGS)["verdict"]
    assert verdict["headline"] == "Class 3 (dog) carries a trigger: 8 of 40 rows are flagged."
    assert "Weak evidence: class 1 (bee)" in verdict["text"] and "Class 1" not in verdict["text"]


def test_half_a_percent_of_the_class_is_the_least():
    labels = np.zeros(1000, np.int32)
    labels[:2] = (1, 1)
    many = Dataset(np.zeros((1000, 8, 8, 1), np.uint8), labels, 2, "many", "")
    base = analysis(found=())
    found = base._replace(
        flags=np.zeros((1, 1000), bool),
        scores=np.zeros((1, 1000), np.float32),
        p_values=np.full((1, 2, 2), 1e-3),
        success=np.full((1, 2, 2), 0.9),
        network=np.array([[0, -1]]),
        masks=base.masks[:, :2],
        detector_accuracies=np.array([[0.9, 0.0]]),
    )
    for count, level in ((4, "suspicious"), (5, "found")):
        found.flags[0, 2 : 2 + count] = found.scores[0, 2 : 2 + count] = True
        assert summarise(many, found, SETTINGS)["verdict"]["level"] == level


def test_many_classes_are_counted_not_named():
    found = analysis(found=range(CLASSES))
    names = {"class_names": ()}
    verdict = summarise(dataset(**names), found, SETTINGS)["verdict"]
    assert verdict["headline"].startswith("Classes 0, 1, 2 and 3 carry a trigger: ")
    assert audit_verdict.listed([{"title": f"class {number}"} for number in range(5)]) == "5 classes"


def test_nothing_compared_is_nothing_known():
    classes = dict.fromkeys(range(CLASSES), "has few rows")
    found = analysis(found=())._replace(not_tested=(NotTested("needs more rows", classes),))
    results = summarise(dataset(), found, SETTINGS)
    assert (results["verdict"]["level"], results["outcome"]) == ("not_tested", "could not be tested")
    assert results["verdict"]["headline"] == "VBD could not be tested: needs more rows."
    assert results["flagged"] is results["flagged_share"] is results["classes"][0]["flagged"] is None
    assert audit_verdict.reason_of(results) == "needs more rows"
    assert {row[1] for row in audit.main_table(results).rows} == {"not tested"}


def test_classes_that_could_not_be_tested_are_no_classes_without_a_trigger():
    found = analysis(found=())._replace(not_tested=(NotTested("", {0: "has few rows"}),))
    results = summarise(dataset(), found, SETTINGS)
    assert results["verdict"]["headline"].startswith(
        "Nothing found in the 30 of 40 rows that could be tested; fewer than"
    )
    said = "Class 0 (ant) could not be tested; class 0 (ant) has few rows. A trigger of such a class goes unnoticed."
    assert said in results["caveats"] and "Class 0 (ant): could not be tested." in audit.main_table(results).notes
    (untested,) = [row for row in audit.main_table(results).rows if row[0] == "Class 0 (ant)"]
    assert untested[1] == untested[3] == "not tested" and results["classes"][0]["flagged"] is None
    assert summarise(dataset(), analysis(found=()), SETTINGS)["verdict"]["headline"].startswith(
        "Nothing found in these 40 rows;"
    )


def test_rows_that_could_not_be_tested_do_not_count_as_unflagged():
    flags, rows = np.zeros((1, ROWS), bool), dataset()
    found = Detection(flags, flags.astype(np.float32), not_tested=(NotTested("", {1: "has no clean row"}),))
    variant = DefenseVariant("scan", DEFENSES["scan"], DEFENSES["scan"].settings)
    results = audit.summarise(suspect_of(rows), found, variant)
    assert results["verdict"]["headline"] == (
        f"Nothing found in the {ROWS - OF_A_CLASS} of {ROWS} rows that could be tested; how small an attack this run would "
        "have found was not measured."
    )


@pytest.mark.parametrize(
    ("name", "title"),
    [("", "class 3"), ("3", "class 3"), ("cat", "class 3 (cat)"), ("a\n\x1b\udcff", "class 3 (a ��)")],
)
def test_names_of_classes_are_made_printable(name, title):
    assert class_title(3, name) == title


def test_numbers_of_a_class_and_that_they_are_json():
    results = summarise(dataset(), analysis(), SETTINGS)
    dog = results["classes"][3]
    assert dog["p_values"] == {"64P": 1e-4, "16-16P": 1e-6}
    assert dog["success"] == {"64P": 0.9, "16-16P": 0.9} and dog["agreeing"] == 2
    assert results["classes"][0]["success"] == {"64P": None, "16-16P": None}  # no candidate is not a success of 0
    assert (dog["rows"], dog["flagged"], dog["network"], dog["mask_pixels"]) == (10, 4, "16-16P", 4)
    assert (dog["finding"], results["classes"][0]["finding"]) == ("trigger", "none")
    assert results["classes"][0]["detector_accuracy"] is results["classes"][0]["mask_pixels"] is None
    assert results["methods"][0]["settings"]["networks"] == "64P/16-16P" and results["flagged_share"] == 0.1
    assert json.loads(json.dumps(results, allow_nan=False)) == results


def test_several_training_sets_are_not_one():
    double = Analysis(*(np.concatenate([part, part]) for part in analysis()))
    with pytest.raises(ValueError, match="has 2 training sets"):
        summarise(dataset(), double, SETTINGS)


def test_evidence_names_suspicious_classes_first_then_by_p_value():
    found = analysis(found=(2, 3))
    found.success[0, 1, 2] = 0.4
    found.p_values[0, 0, 1] = 0.02
    table = main_table(summarise(dataset(), found, SETTINGS))
    assert [row[:2] for row in table.rows] == [
        ("Class 3 (dog)", "trigger"),
        ("Class 2 (cat)", "weak"),
        ("Class 1 (bee)", "none found"),
        ("Class 0 (ant)", "none found"),
    ]
    assert table.rows[0][2:] == (10, 4, "0.0001 / 1e-06", "0.90 / 0.90", "2 of 2", "16-16P", 4, "0.95")
    assert "| Class 3 (dog) |" in to_markdown(table)


def test_long_tables_are_cut_but_never_the_classes_with_a_pattern(monkeypatch):
    monkeypatch.setattr(audit, "MOST_LISTED", 1)
    table = main_table(summarise(dataset(), analysis(found=(1, 3)), SETTINGS))
    assert len(table.rows) == 2 and "2 of 4 classes" in table.notes


def test_flags_are_compared_with_a_known_ground_truth():
    truth = np.zeros(ROWS, bool)
    truth[[3, 7, 11, 1]] = True  # three of the four flagged rows, and one that is not flagged
    results = summarise(poisoned(truth), analysis(), SETTINGS)
    overall, bees, dogs = results["detection"]
    assert (overall["precision"], overall["recall"], overall["f1"], overall["hits"]) == (0.75, 0.75, 0.75, 3)
    assert (bees["class"], bees["recall"], dogs["class"], dogs["recall"]) == (1, 0.0, 3, 1.0)
    assert "3 of 4 poisoned rows are flagged, and 1 of 36 clean rows." in results["verdict"]["text"]
    assert truth_table(results).rows[2][:5] == ("Class 3 (dog)", 10, 3, 4, 3)
    assert truth_table(summarise(dataset(), analysis(), SETTINGS)) is None


def test_flags_on_a_set_that_is_known_to_be_clean_are_false_alarms():
    verdict = verdict_of(poisoned(np.zeros(ROWS, bool)))
    assert "The ground truth is known here: no row is poisoned, so this is a false alarm." in verdict["text"]


def test_a_class_that_loses_most_of_its_rows_is_pointed_out():
    caveats = summarise(dataset(), analysis(flagged=6), SETTINGS)["caveats"]
    assert any(text.startswith("Class 3 (dog): more than half of the rows are flagged.") for text in caveats)
    assert not any("more than half" in text for text in summarise(dataset(), analysis(flagged=5), SETTINGS)["caveats"])


# ---- A detector without patterns ------------------------------------------------------------------------------------


def flagged_by(rows, name="spectral_signatures", count=6):
    """An audit by a detector without patterns, which flags the first rows of class 3 and one row of class 0."""
    flags = np.zeros((1, ROWS), bool)
    flags[0, np.flatnonzero(rows.labels == 3)[: count - 1]] = count > 0
    flags[0, 0] = count > 0
    found = Detection(flags, flags.astype(np.float32), {"rows left out": np.array([float(count)])})
    return audit.summarise(suspect_of(rows), found, DefenseVariant(name, DEFENSES[name], DEFENSES[name].settings))


def test_a_detector_without_patterns_names_rows_and_no_trigger():
    results = flagged_by(dataset())
    verdict = results["verdict"]
    assert (verdict["level"], verdict["headline"]) == ("suspicious", "Spectral signatures flags 6 of 40 rows (15 %).")
    assert verdict["text"].startswith("5 of the flagged rows are in class 3 (dog): 50 % of its 10.")
    text = verdict["text"] + " ".join(results["caveats"])
    assert not results["extracts_patterns"] and results["networks"] == []
    assert audit_verdict.VBD_NOT_FOUND not in text and audit_verdict.NOT_FOUND in text and "p-value" not in text
    assert all("p_values" not in entry and "network" not in entry for entry in results["classes"])
    assert json.loads(json.dumps(results, allow_nan=False)) == results


def test_no_flag_is_no_verdict_on_the_rows():
    verdict = flagged_by(dataset(), count=0)["verdict"]
    assert verdict["level"] == "nothing_found"
    assert verdict["headline"].startswith("Nothing found in these 40 rows; how small an attack")
    assert "Nothing found does not mean that the rows are clean." in verdict["text"]


def test_its_tables_have_its_own_numbers_and_none_of_vbd():
    results = flagged_by(dataset())
    table = main_table(results)
    assert table.header == ("class", "rows", "flagged", "share flagged")
    assert table.rows[0] == ("Class 3 (dog)", 10, 5, 0.5)
    detector = to_markdown(audit.detector_table(results))
    assert all(text in detector for text in ("spectral signatures", "training set, attacked model", "rows left out"))
    assert audit.networks_table(results) is None


def test_flags_of_any_detector_are_measured_where_the_truth_is_known():
    results = flagged_by(poisoned(dataset().labels == 3))
    (cell,) = results["cells"]
    assert (cell["summary"]["precision"]["mean"], cell["summary"]["recall"]["mean"]) == (5 / 6, 0.5)
    assert results["detection"][0]["precision"] == 5 / 6
    assert "5 of 10 poisoned rows are flagged, and 1 of 30 clean rows." in results["verdict"]["text"]


# ---- Pictures and page ----------------------------------------------------------------------------------------------

DOZEN, FLAGGED = 12, [8, 9, 10]  # of class 1, the later half of the rows
LABELS = (np.arange(DOZEN) >= 6).astype(np.int32)
SMALL = VBDSettings(networks="64P")


def pixels():
    return np.random.default_rng(1).integers(0, 256, (DOZEN, 8, 8, 3)).astype(np.uint8)


def dozen(**changes):
    fields = {"images": pixels(), "labels": LABELS, "num_classes": 2, "name": "mine", "source": "here"}
    return Dataset(**(fields | changes))


def small_analysis(flagged=tuple(FLAGGED)):
    scores, masks = np.zeros(DOZEN, np.float32), np.zeros((2, 8, 8), bool)
    if len(flagged):
        scores[LABELS == 1] = 0.2
    scores[list(flagged)] = 0.7 + 0.1 * np.arange(len(flagged))
    flags, found = np.isin(np.arange(DOZEN), flagged), len(flagged) > 0
    patterns = np.zeros((2, 8, 8, 3), np.float32)
    if found:
        masks[1, 6:, 6:] = True
        patterns[1, 6:, 6:] = (1.0, 0.5, 0.0)
    parts = (
        flags,
        scores,
        np.array([0.3]),
        np.array([0.25]),
        np.array([[0.5, 1e-5 if found else 0.4]]),
        np.array([[0.0, 0.9 * found]]),
        np.array([False, False]),
        np.array([-1, 0 if found else -1]),
        masks,
        patterns,
        np.array([0.0, 0.9 * found]),
        LABELS,
    )
    return Analysis(*(np.asarray(part)[None] for part in parts))


def write(place, rows=None, found=None, cleaned=None):
    """VBD's page on rows: the results."""
    folder, rows = RunFolder(Path(place), is_new=True), rows or dozen()
    found = small_analysis() if found is None else found
    results = summarise(rows, found, SMALL)
    results["cleaned"] = cleaned or {"kind": "npz", "rows": DOZEN - (results["flagged"] or 0)}
    publish(folder, results, rows, to_detection(found, SMALL))
    return results


def publish(folder, results, rows, found):
    page = audit.page(folder, results, suspect_of(rows), found)
    run = {"settings": {"seed": 0}, "timings": {"vbd": 1.5}, "reproduce": "python experiments/vbd.py"}
    report.publish(folder, page, **run, sources={"rows": rows.source})


def test_what_was_not_copied_is_named(tmp_path, undrawn):
    left_out = [{"file": "train/ant/00.png", "why": "a different file of this name exists already"}]
    left_out.append({"file": "not-\udce4-utf8.png", "why": "is not a file"})
    copied = {"kind": "folder", "rows": 9, "copied": 7, "left_out": left_out, "strangers": ["cleaned/ant/old.png"]}
    write(tmp_path, dozen(files=tuple(f"train/ant/{row:02}\udce4.png" for row in range(DOZEN))), cleaned=copied)
    page = (tmp_path / "report.html").read_bytes()
    assert page.decode("utf-8") and b"\\udce4" not in page
    assert b"Not copied: train/ant/00.png (a different file" in page and b"cleaned/ant/old.png" in page


def test_truth_has_a_part_of_its_own(tmp_path, undrawn):
    truth = {
        "is_poisoned": np.isin(np.arange(DOZEN), FLAGGED),
        "original_labels": LABELS,
        "is_cover": np.zeros(DOZEN, bool),
    }
    write(tmp_path, PoisonedDataset(**vars(dozen()), **truth))
    assert b"Against the ground truth" in (tmp_path / "report.html").read_bytes()


def test_triggers_are_large_and_transparent_outside_the_mask(tmp_path, undrawn):
    write(tmp_path)
    names = sorted(path.name for path in (tmp_path / "triggers").iterdir())
    assert names == [f"class-1-{name}.png" for name in ("example-1", "example-2", "example-3", "mask", "trigger")]
    with Image.open(tmp_path / "triggers/class-1-trigger.png") as image:
        assert (image.mode, image.size) == ("RGBA", (256, 256))
        values = np.asarray(image)
    assert set(np.unique(values[..., 3])) == {0, 255} and (values[192:, 192:, 3] == 255).all()
    assert (values[..., 3] == 255).sum() == 64 * 64
    np.testing.assert_array_equal(values[255, 255], (255, 128, 0, 255))
    with Image.open(tmp_path / "triggers/class-1-mask.png") as image:
        np.testing.assert_array_equal(np.asarray(image), values[..., 3])
    with Image.open(tmp_path / "triggers/class-1-example-1.png") as image:
        example = np.asarray(image)
    large = enlarge(pixels()[10], 32)  # the flagged row with the highest score
    changed = np.any(example != large, axis=-1)
    assert changed.any() and (example[changed] == (255, 0, 0)).all()
    assert not changed[:192].any() and not changed[:, :192].any()


def test_grey_patterns_and_oblong_images(tmp_path, undrawn):
    found = small_analysis()
    found = found._replace(masks=found.masks[:, :, :, 4:], patterns=found.patterns[:, :, :, 4:, :1])
    write(tmp_path, dozen(images=pixels()[:, :, 4:, :1]), found)
    with Image.open(tmp_path / "triggers/class-1-trigger.png") as image:
        assert (image.mode, image.size) == ("RGBA", (128, 256)) and image.getpixel((127, 255)) == (255, 255, 255, 255)


def test_the_report_says_the_verdict_and_shows_the_pictures(tmp_path, undrawn):
    results = write(tmp_path, dozen(class_names=("ant", "<b>bee</b>")))
    page = (tmp_path / "report.html").read_text("utf-8")
    assert "Class 1 (&lt;b&gt;bee&lt;/b&gt;) carries a trigger: 3 of 12 rows are flagged." in page and "<b>" not in page
    assert page.count('src="data:image/png') == 4 and "cleaned.npz has the 9 rows" in page
    assert ">detector<" in page and ">VBD<" in page
    assert all(f">{title}</h2>" in page for title in ("What to do next", "Evidence", "Triggers", "Examples", "Scores"))
    assert results["verdict"]["level"] == "found"
    assert json.loads((tmp_path / "timings.json").read_text("utf-8")) == {"seconds": {"vbd": 1.5}}
    assert "Evidence for each class" in (tmp_path / "table.md").read_text("utf-8")


def test_a_verdict_of_nothing_found_has_no_pictures_and_says_what_it_does_not_rule_out(tmp_path, undrawn):
    results = write(tmp_path, found=small_analysis(()))
    page = (tmp_path / "report.html").read_text("utf-8")
    assert results["verdict"]["level"] == "nothing_found" and not (tmp_path / "triggers").exists()
    assert "Nothing found does not mean that the rows are clean." in page and "data:image/png" not in page


def test_the_same_audit_writes_the_same_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "describe_environment", dict)  # the git revision may change meanwhile
    for name in ("one", "two"):
        write(tmp_path / name)
    files = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*") if path.is_file())
    assert len(files) == 12
    assert all((tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes() for file in files)


def test_what_to_do_next_depends_on_the_finding(tmp_path, undrawn):
    doubtful = small_analysis()._replace(success=np.array([[[0.0, 0.4]]]))
    unsure = small_analysis()._replace(flags=np.zeros((1, DOZEN), bool), detector_accuracies=np.array([[0.0, 0.7]]))
    untested = small_analysis(())._replace(not_tested=(NotTested("needs more rows"),))
    begins = {
        "Compare the triggers": small_analysis(),
        "Look at the triggers below and at the rows in flagged.csv": doubtful,
        "Look at the triggers below. If": unsure,
        "Run the audit again": untested,
        "There are no rows to remove.": small_analysis(()),
    }
    for number, (start, found) in enumerate(begins.items()):
        steps = audit_verdict.next_steps(write(tmp_path / str(number), found=found))
        assert steps[0].startswith(start)
        assert ("flagged.csv lists" in steps[-1]) == found.flags.any()


def test_a_class_that_would_be_gone_is_pointed_out(tmp_path, undrawn):
    steps = audit_verdict.next_steps(write(tmp_path, found=small_analysis(tuple(range(6, DOZEN)))))
    assert any(
        text.startswith("Every row of class 1 is flagged: without these rows the class is gone.") for text in steps
    )


def test_many_classes_are_all_in_the_folder_but_not_all_in_the_report(tmp_path, monkeypatch, undrawn):
    monkeypatch.setattr(audit, "MOST_CLASSES", 1)
    found = small_analysis()
    found.network[0, 0], found.p_values[0, 0, 0], found.flags[0, 2] = 0, 1e-3, True
    found.masks[0, 0, 0, 0] = True
    found.success[0, 0, 0], found.detector_accuracies[0, 0] = 0.8, 0.9
    write(tmp_path, found=found)
    names = {path.name for path in (tmp_path / "triggers").iterdir()}
    assert {"class-0-trigger.png", "class-0-mask.png", "class-0-example-1.png", "class-1-trigger.png"} < names
    assert "class-0-example-2.png" not in names
    assert "1 of 2 classes." in (tmp_path / "report.html").read_text("utf-8")


def test_suspicious_rows_are_captioned_with_what_the_owner_calls_them(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(audit.plots, "image_grid", lambda *_, captions: drawn.extend(captions[0]))
    monkeypatch.setattr(audit.plots, "save", lambda _, path: path)
    folder, files = RunFolder(tmp_path, is_new=True), tuple(f"bee/{row}.png" for row in range(DOZEN))
    for rows in (dozen(), dozen(class_names=("0", "1")), dozen(class_names=("ant", "bee"), files=files)):
        audit.suspicious_figures(folder, rows, to_detection(small_analysis(), SMALL))
    assert drawn[::6] == ["row 10: class 1", "row 10: class 1", "10.png: bee"]


def test_the_page_of_a_detector_without_patterns(tmp_path, undrawn):
    results = flagged_by(dataset()) | {"cleaned": {"kind": "npz", "rows": 34}}
    flags = np.isin(np.arange(ROWS), [0, 3, 7, 11, 15, 19])[None]
    folder = RunFolder(tmp_path, is_new=True)
    publish(folder, results, dataset(), Detection(flags, flags.astype(np.float32)))
    page = (tmp_path / "report.html").read_text("utf-8")
    assert "Spectral signatures flags 6 of 40 rows (15 %)." in page and ">spectral signatures<" in page
    assert "Look at the rows in flagged.csv, and at the most suspicious rows below" in page
    for text in ("VBD", "p-value", "triggers", "simple networks", "From 0 to 1"):
        assert text not in page, text
    assert page.count('src="data:image/png') == 2 and not (tmp_path / "triggers").exists()


# ---- What a run that finds nothing could have found -----------------------------------------------------------------


def nothing(**changes):
    """The numbers of an audit by VBD of 40 rows in which nothing is found."""
    variant = DefenseVariant("vbd", DEFENSES["vbd"], SETTINGS)
    found = to_detection(analysis(found=()), SETTINGS)
    evidence = dict(found.evidence) | changes.pop("evidence", {})
    found = found._replace(evidence=evidence, **{name: changes.pop(name) for name in ("warnings",) if name in changes})
    return audit.summarise(suspect_of(changes.pop("rows", dataset())), found, variant, **changes)


def planted(*entries):
    """A planted trigger: (planted rows, hits, flagged rows, whether it was found)."""
    sets = [
        {"planted": count, "share": count / ROWS, "hits": hits, "flagged": flagged, "precision": None, "found": found}
        for count, hits, flagged, found in entries
    ]
    return {"trigger": "3×3 green square", "target": "class 0 (ant)", "sets": sets}


def test_nothing_found_names_the_smallest_planted_trigger_that_was_found():
    results = nothing(sensitivity=planted((5, 1, 1, False), (10, 9, 9, True), (20, 20, 21, True)))
    assert (results["outcome"], audit_verdict.exit_status(results)) == ("nothing found", 0)
    assert results["verdict"]["headline"] == (
        "Nothing found in these 40 rows; a 3×3 green square planted in 10 of them (25 %) was found, in 5 it was not."
    )
    assert results["verdict"]["text"].startswith(
        "A 3×3 green square planted in 20 of these 40 rows was found (20 of them flagged); in 10 it was found (9 flagged); in "
        "5 it was not found (1 flagged): fewer poisoned rows than 10, fainter triggers, or triggers of another kind cannot be "
        "excluded. Planted rows were labelled as class 0 (ant), the class with the most rows."
    )
    assert (
        "By its settings VBD asks for about 100 poisoned rows of a class (more than all of these 40)"
        in (results["verdict"]["text"])
    )


def test_a_smaller_number_that_was_found_by_luck_does_not_count():
    results = nothing(sensitivity=planted((5, 5, 5, True), (10, 0, 0, False), (20, 20, 20, True)))
    assert "planted in 20 of them (50 %) was found, in 10 it was not." in results["verdict"]["headline"]


def test_a_run_that_finds_no_planted_trigger_has_tested_nothing():
    results = nothing(sensitivity=planted((5, 0, 0, False), (20, 0, 0, False)))
    assert (results["outcome"], audit_verdict.exit_status(results)) == ("could not be tested", 4)
    assert results["verdict"]["headline"] == (
        "VBD could not be tested: not even a 3×3 green square that was planted in 20 rows of a copy was found."
    )
    assert results["flagged"] is None and {row[1] for row in main_table(results).rows} == {"not tested"}


def test_a_sensitivity_that_was_not_measured_is_said_to_be_unknown():
    results = nothing(sensitivity={"why": "--no-sensitivity"})
    assert results["verdict"]["level"] == "nothing_found"
    assert results["verdict"]["text"].startswith("The sensitivity of this run was not measured: --no-sensitivity.")


@pytest.mark.parametrize("preset", ["quick", "paper"])
def test_nothing_found_is_neither_clean_nor_green(tmp_path, undrawn, preset):
    found = to_detection(analysis(found=()), SETTINGS)
    copy = suspect_of(poisoned(np.arange(ROWS) < 5))
    results = nothing(sensitivity=planted((20, 20, 20, True)), preset=preset) | {
        "cleaned": {"kind": None, "rows": ROWS}
    }
    folder = RunFolder(tmp_path, is_new=True)
    page = audit.page(folder, results, suspect_of(dataset()), found, copy)
    text = report.render(page)
    banner = text.split("<body>")[1].split("</header>")[0]
    assert "verdict nothing_found" in banner and ">Nothing found<" in banner and "uccess" not in banner
    assert (tmp_path / "planted.png").exists()
    sentences = text.split("<body>")[1].split(".")
    assert all("does not mean" in sentence or "Removing" in sentence for sentence in sentences if " clean" in sentence)


def test_networks_that_learned_the_classes_leave_nothing_to_be_known():
    warning = "simple networks learned the classes: 64P 97 %"
    results = nothing(warnings=(warning,))
    assert (results["outcome"], audit_verdict.exit_status(results)) == ("could not be tested", 4)
    assert results["verdict"]["headline"] == f"VBD could not be tested: {warning}." and "warnings" not in results
    (step,) = audit_verdict.next_steps(results | {"cleaned": {"kind": None, "rows": 0}})
    assert "lists" not in step and "Nothing is known" in step
    for name in re.findall(r"--defenses=(\w+)", step):
        assert DEFENSES[name].detect and "clean rows" not in DEFENSES[name].needs, name
    (step,) = audit_verdict.next_steps(results | {"networks": []})
    assert "--defenses" not in step


def test_a_finding_stays_a_finding_if_the_premise_is_in_doubt():
    variant = DefenseVariant("vbd", DEFENSES["vbd"], SETTINGS)
    found = to_detection(analysis(), SETTINGS)._replace(warnings=("simple networks learned the classes",))
    results = audit.summarise(suspect_of(dataset()), found, variant)
    assert (results["outcome"], audit_verdict.exit_status(results)) == ("found", 3)
    assert [entry["text"] for entry in results["warnings"]] == ["simple networks learned the classes"]


def test_accuracies_stand_beside_every_verdict():
    results = nothing(evidence={"held_back_accuracies": np.array([[0.25, 0.125]])})
    assert [network["held_back_accuracy"] for network in results["networks"]] == [0.25, 0.125]
    assert "64P predicts 20 % of its training rows and 25 % of the held-back rows" in results["verdict"]["text"]
    assert audit.networks_table(results).rows == (("64P", 0.2, 0.25, 0), ("16-16P", 0.4, 0.125, 0))


def test_what_a_preset_changes_is_read_off_the_settings():
    quick = dataclasses.replace(VBDSettings(), networks="64P/10-10P", epochs=5, least_steps=600, batch_size=64)
    found = to_detection(analysis(), quick)._replace(evidence={}, patterns=())
    variant = DefenseVariant("vbd", DEFENSES["vbd"], quick)
    results = audit.summarise(suspect_of(dataset()), found, variant, preset="quick")
    assert (
        "Preset quick: 4 settings differ from the paper's: networks 64P/10-10P (paper: 64P/10-10P/16-16P), epochs 5 (paper: "
        "20), least steps 600 (paper: 0), and 1 more."
    ) in results["verdict"]["text"]
    assert "Fewer networks or epochs than the paper's cost sensitivity" in results["verdict"]["text"]
    larger = dataclasses.replace(VBDSettings(), epochs=40, p_value=0.02)
    text = audit.summarise(suspect_of(dataset()), found, variant._replace(settings=larger))["verdict"]["text"]
    assert "2 settings differ" in text and "cost sensitivity" not in text
    assert audit.settings_table(results).rows[-1] == ("batch_size", "64", "256")


def test_a_class_that_one_of_several_networks_saw_is_suspicious():
    found = analysis()
    found.success[0, 0, 3] = 0.32  # below the least success, as if there were no pattern
    verdict = summarise(dataset(), found, SETTINGS)["verdict"]
    assert verdict["level"] == "suspicious" and "1 of 2 simple networks has such a pattern" in verdict["text"]
    assert "(only 1 of 2 networks has a working pattern)" in verdict["text"]
    alone = VBDSettings(networks="64P")
    assert summarise(dozen(), small_analysis(), alone)["verdict"]["level"] == "found"


def test_flagged_rows_are_counted_by_score():
    found = analysis(flagged=4)
    found.scores[0, [3, 7, 11, 15]] = (0.5, 0.9, 0.95, 1.0)
    truth = np.zeros(ROWS, bool)
    truth[[11, 15]] = True
    results = summarise(poisoned(truth), found, SETTINGS)
    assert [tuple(band.values()) for band in results["score_bands"]] == [
        ("from 0.5 to below 0.9", 1, 0),
        ("from 0.9 to below 0.95", 1, 0),
        ("from 0.95 on", 2, 2),
    ]
    assert audit.scores_table(results).rows[2] == ("From 0.95 on", 2, 2)
    steps = audit_verdict.next_steps(results | {"cleaned": {"kind": "npz", "rows": 36}})
    assert (
        "1 from 0.5 to below 0.9, 1 from 0.9 to below 0.95, 2 from 0.95 on. Look at the lowest ones first" in steps[1]
    )
    assert audit.scores_table(flagged_by(dataset())) is None  # these scores are no probabilities

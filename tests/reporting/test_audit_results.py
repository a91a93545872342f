import json

import numpy as np
import pytest

from bdjax.defenses.vbd import Analysis
from bdjax.defenses.vbd_patterns import VBDSettings
from bdjax.reporting import audit_results
from bdjax.reporting.audit_results import class_title, evidence_table, summarise, truth_table
from bdjax.reporting.tables import to_markdown
from bdjax.types import Dataset, PoisonedDataset

ROWS, CLASSES, OF_A_CLASS = 40, 4, 10
SETTINGS = VBDSettings(networks="64P+16-16P")


def dataset(**changes):
    """Forty grey rows, classes 0, 1, 2, 3, 0, 1, ..."""
    values = np.random.default_rng(0).integers(0, 256, (ROWS, 8, 8, 1)).astype(np.uint8)
    labels = (np.arange(ROWS) % CLASSES).astype(np.int32)
    names = ("ant", "bee", "cat", "dog")
    given = {"images": values, "labels": labels, "num_classes": CLASSES, "name": "mine", "source": "mine.npz"}
    return Dataset(**(given | {"class_names": names} | changes))


def poisoned(is_poisoned):
    nothing = np.zeros(ROWS, bool)
    truth = {"is_poisoned": is_poisoned, "original_labels": dataset().labels, "is_cover": nothing}
    return PoisonedDataset(**vars(dataset()), **truth)


def analysis(found=(3,), flagged=4, success=0.9, accuracy=0.95):
    """VBD's answer: a pattern of 2 x 2 pixels in a corner for some classes, on the first rows of each."""
    flags, scores = np.zeros((1, ROWS), bool), np.zeros((1, ROWS), np.float32)
    p_values, rates = np.full((1, 2, CLASSES), 0.4), np.zeros((1, 2, CLASSES))
    network = np.full((1, CLASSES), -1)
    masks, patterns = np.zeros((1, CLASSES, 8, 8), bool), np.zeros((1, CLASSES, 8, 8, 1), np.float32)
    accuracies = np.zeros((1, CLASSES))
    for label in found:
        own = np.arange(ROWS)[np.arange(ROWS) % CLASSES == label]
        scores[0, own] = np.linspace(0.4, 0.1, OF_A_CLASS)
        scores[0, own[:flagged]] = 0.9 + 0.01 * np.arange(flagged)
        flags[0, own[:flagged]] = accuracy >= SETTINGS.least_accuracy
        p_values[0, 1, label], rates[0, 1, label], network[0, label] = 1e-6, success, 1
        masks[0, label, 6:, 6:] = True
        patterns[0, label, 6:, 6:] = 1.0
        accuracies[0, label] = accuracy
    labels = (np.arange(ROWS) % CLASSES).astype(np.int32)[None]
    return Analysis(
        flags, scores, np.array([[0.2, 0.4]]), p_values, rates, network, masks, patterns, accuracies, labels
    )


def said(rows=None, **changes):
    return summarise(rows or dataset(), analysis(**changes), SETTINGS)["verdict"]


def test_a_class_with_a_trigger():
    told = said()
    assert (told["level"], told["headline"]) == (
        "attacked",
        "Class 3 (dog) carries a trigger: 4 of 40 rows are flagged.",
    )
    assert told["text"].startswith(
        "Class 3 (dog): a pattern of 4 of 64 pixels turns 90 % of other rows into this class; p-value 1e-06; 4 of its 10 rows "
        "are flagged (40 %).\n\nOther rows may be poisoned, too. "
    )


@pytest.mark.parametrize(
    ("changes", "level", "headline"),
    [
        ({"found": (1, 3)}, "attacked", "Classes 1 (bee) and 3 (dog) carry a trigger: 8 of 40 rows are flagged."),
        ({"flagged": 1}, "attacked", "Class 3 (dog) carries a trigger: 1 of 40 rows is flagged."),
        (
            {"success": 0.49},
            "warning",
            "Class 3 (dog) may carry a trigger, but the evidence is weak: 4 of 40 rows are flagged.",
        ),
        ({"success": 0.5}, "attacked", "Class 3 (dog) carries a trigger: 4 of 40 rows are flagged."),
        (
            {"flagged": 0},
            "warning",
            "Class 3 (dog) may carry a trigger, but the evidence is weak: 0 of 40 rows are flagged.",
        ),
        (
            {"accuracy": 0.7},
            "warning",
            "Class 3 (dog) may carry a trigger, but the evidence is weak: 0 of 40 rows are flagged.",
        ),
        ({"found": ()}, "clean", "No class has a trigger that this method can find."),
    ],
)
def test_every_finding_has_its_sentence(changes, level, headline):
    told = said(**changes)
    assert (told["level"], told["headline"]) == (level, headline)
    assert audit_results.NOT_FOUND in told["text"]


def test_why_evidence_is_weak():
    assert "Weak evidence: class 3 (dog) (its pattern turns 40 % of other rows)." in said(success=0.4)["text"]
    assert "(none of its 10 rows are flagged)" in said(flagged=0)["text"]
    assert "(its detector has accuracy 0.70, below 0.75, and is not used)" in said(accuracy=0.7)["text"]


def test_a_pattern_of_all_of_a_class_is_what_the_class_looks_like():
    told = said(flagged=10)
    assert told["level"] == "warning" and "(10 of its 10 rows are flagged, as if the pattern were" in told["text"]
    assert said(flagged=9)["level"] == "attacked"


def test_almost_all_of_a_class_may_be_poisoned_if_it_has_too_many_rows():
    # Dirty-label poison of many classes' rows comes on top of one class, and outnumbers it.
    base = analysis(found=())
    for size, level in ((30, "attacked"), (10, "warning")):
        labels = np.repeat([0, 1, 2, 3], [size, 5, 5, ROWS - size - 10]).astype(np.int32)
        given = base._replace(network=np.array([[1, -1, -1, -1]]), detector_accuracies=np.array([[0.9, 0, 0, 0]]))
        given = given._replace(flags=(labels == 0)[None], p_values=base.p_values.copy(), success=base.success.copy())
        given.p_values[0, 1, 0], given.success[0, 1, 0] = 1e-4, 0.9
        assert summarise(dataset(labels=labels), given, SETTINGS)["verdict"]["level"] == level


def test_one_certain_class_among_weak_ones_is_the_one_that_is_named():
    given = analysis(found=(1, 3))
    given.success[0, 1, 1] = 0.4
    told = summarise(dataset(), given, SETTINGS)["verdict"]
    assert told["headline"] == "Class 3 (dog) carries a trigger: 8 of 40 rows are flagged."
    assert "Weak evidence: class 1 (bee)" in told["text"] and "Class 1" not in told["text"]


def test_half_a_percent_of_the_class_is_the_least():
    labels = np.zeros(1000, np.int32)
    labels[:2] = (1, 1)
    many = Dataset(np.zeros((1000, 8, 8, 1), np.uint8), labels, 2, "many", "")
    base = analysis(found=())
    given = base._replace(
        flags=np.zeros((1, 1000), bool),
        scores=np.zeros((1, 1000), np.float32),
        p_values=np.full((1, 2, 2), 1e-3),
        success=np.full((1, 2, 2), 0.9),
        network=np.array([[0, -1]]),
        masks=base.masks[:, :2],
        detector_accuracies=np.array([[0.9, 0.0]]),
    )
    for count, level in ((4, "warning"), (5, "attacked")):
        given.flags[0, 2 : 2 + count] = True
        assert summarise(many, given, SETTINGS)["verdict"]["level"] == level


def test_many_classes_are_counted_not_named():
    given = analysis(found=range(CLASSES))
    names = {"class_names": ()}
    told = summarise(dataset(**names), given, SETTINGS)["verdict"]
    assert told["headline"].startswith("Classes 0, 1, 2 and 3 carry a trigger: ")
    assert audit_results._listed([{"class": number, "name": ""} for number in range(5)]) == "5 classes"


def test_nothing_compared_is_nothing_known():
    given = analysis(found=())
    given.p_values[:] = 1
    told = summarise(dataset(), given, SETTINGS)
    assert told["verdict"]["level"] == "warning" and "No class could be tested" in told["verdict"]["headline"]
    given.p_values[0, 0, 1:] = 0.3
    told = summarise(dataset(), given, SETTINGS)
    assert told["verdict"]["level"] == "clean"
    assert any(text.startswith("Class 0 (ant): not tested") for text in told["caveats"])


@pytest.mark.parametrize(
    ("name", "title"),
    [("", "class 3"), ("3", "class 3"), ("cat", "class 3 (cat)"), ("a\n\x1b\udcff", "class 3 (a ��)")],
)
def test_names_of_classes_are_made_printable(name, title):
    assert class_title(3, name) == title


def test_numbers_of_a_class_and_that_they_are_json():
    results = summarise(dataset(), analysis(), SETTINGS)
    one = results["classes"][3]
    assert one["p_values"] == {"64P": 0.4, "16-16P": 1e-6}
    assert one["success"] == {"64P": None, "16-16P": 0.9}  # no candidate is not a success of 0
    assert (one["rows"], one["flagged"], one["network"], one["mask_pixels"]) == (10, 4, "16-16P", 4)
    assert (one["finding"], results["classes"][0]["finding"]) == ("trigger", "none")
    assert results["classes"][0]["detector_accuracy"] is results["classes"][0]["mask_pixels"] is None
    assert results["settings"]["networks"] == "64P+16-16P" and results["flagged_share"] == 0.1
    assert json.loads(json.dumps(results, allow_nan=False)) == results


def test_several_training_sets_are_not_one():
    double = Analysis(*(np.concatenate([each, each]) for each in analysis()))
    with pytest.raises(ValueError, match="of 2 training sets"):
        summarise(dataset(), double, SETTINGS)


def test_evidence_names_suspicious_classes_first_then_by_p_value():
    given = analysis(found=(2, 3))
    given.success[0, 1, 2] = 0.4
    given.p_values[0, 0, 1] = 0.02
    table = evidence_table(summarise(dataset(), given, SETTINGS))
    assert [row[:2] for row in table.rows] == [
        ("Class 3 (dog)", "trigger"),
        ("Class 2 (cat)", "weak"),
        ("Class 1 (bee)", "no"),
        ("Class 0 (ant)", "no"),
    ]
    assert table.rows[0][2:] == (10, 4, "0.4 / 1e-06", "– / 0.90", "16-16P", 4, "0.95")
    assert "| Class 3 (dog) |" in to_markdown(table)


def test_long_tables_are_cut_but_never_the_classes_with_a_pattern(monkeypatch):
    monkeypatch.setattr(audit_results, "MOST_LISTED", 1)
    table = evidence_table(summarise(dataset(), analysis(found=(1, 3)), SETTINGS))
    assert len(table.rows) == 2 and "2 of 4 classes" in table.notes


def test_known_truth_is_told():
    truth = np.zeros(ROWS, bool)
    truth[[3, 7, 11, 1]] = True  # three of the four flagged rows, and one that nobody flags
    results = summarise(poisoned(truth), analysis(), SETTINGS)
    every, bees, dogs = results["detection"]
    assert (every["precision"], every["recall"], every["f1"], every["hits"]) == (0.75, 0.75, 0.75, 3)
    assert (bees["class"], bees["recall"], dogs["class"], dogs["recall"]) == (1, 0.0, 3, 1.0)
    assert "3 of 4 poisoned rows are flagged, and 1 of 36 others." in results["verdict"]["text"]
    assert truth_table(results).rows[2][:5] == ("Class 3 (dog)", 10, 3, 4, 3)
    assert truth_table(summarise(dataset(), analysis(), SETTINGS)) is None


def test_flags_on_a_set_that_is_known_to_be_clean_are_false_alarms():
    told = said(poisoned(np.zeros(ROWS, bool)))
    assert "Here it is known that no row is poisoned: a false alarm." in told["text"]


def test_a_class_that_loses_most_of_its_rows_is_pointed_out():
    caveats = summarise(dataset(), analysis(flagged=6), SETTINGS)["caveats"]
    assert any(text.startswith("Class 3 (dog): more than half of the rows are flagged.") for text in caveats)
    assert not any("more than half" in text for text in summarise(dataset(), analysis(flagged=5), SETTINGS)["caveats"])

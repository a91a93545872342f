import json
import math

import jax
import numpy as np
import pytest

from bdjax.attacks.providers import make_provider_triggers
from bdjax.metrics import BACKDOOR_ABOVE_CONTROL, REMOVED_ASR, WEAKENED_SHARE
from bdjax.reporting import ta_kd
from bdjax.reporting.results import find
from bdjax.reporting.tables import cells

LABELS = np.array([0, 1, 2, 1, 2], np.int32)
TRIGGERS = make_provider_triggers(jax.random.key(0), (8, 8, 1), 2)._replace(names=("solid", "noise"))


def logits(classes, strength=1.0):
    """Logits that predict these classes, int [members, views, N]."""
    return strength * np.eye(3, dtype=np.float32)[np.asarray(classes)]


# Views: the untouched rows, under trigger 1, under trigger 2. Rows 1 to 4 count for ASR, whose target is 0.
CLEAN = logits([[[0, 1, 2, 1, 2], [0, 1, 2, 1, 0], [0, 1, 2, 1, 2]]])
TEACHERS = logits(
    [
        [[0, 1, 2, 1, 1], [0, 0, 0, 0, 0], [0, 1, 2, 0, 2]],  # the first responds to its own trigger
        [[0, 1, 2, 2, 1], [0, 1, 2, 1, 2], [0, 0, 0, 0, 2]],
    ]
)
STUDENT = logits([[[0, 1, 2, 1, 2], [1, 1, 2, 1, 0], [0, 1, 1, 0, 0]]])
ANSWERS = {"teachers": TEACHERS, "aggregated": STUDENT, "student": STUDENT, "alone": STUDENT, "fine-tuned": TEACHERS}
CHOICES = {"target": 0, "vote_space": "logits", "tie": "lowest"}


def summarise(answers=None, triggers=(TRIGGERS,), **changes):
    answers = answers or [{"clean": CLEAN} | ANSWERS]
    return ta_kd.summarise(answers, LABELS, triggers, {"student": 12, "soft vote": 50}, 5, **(CHOICES | changes))


def by_seed(results, role):
    return find(results, ta_kd.ATTACK, role)["by_seed"]


def test_each_teacher_is_measured_under_its_own_trigger():
    (seed,) = by_seed(summarise(), "teachers")
    first, second = seed["members"]
    assert (first["cda"], first["asr"], first["r_acc"], first["trigger"]) == (0.8, 1.0, 0.0, "solid")
    assert (second["cda"], second["asr"], second["r_acc"], second["trigger"]) == (0.6, 0.75, 0.25, "noise")
    for name, value in {"cda": 0.7, "asr": 0.875, "r_acc": 0.125}.items():
        assert math.isclose(seed[name], value)


def test_a_fine_tuned_teacher_may_come_with_its_own_trigger_alone():
    tuned = ANSWERS["teachers"]
    own = np.stack([member[[0, 1 + number]] for number, member in enumerate(tuned)])
    of_all, of_own = (
        by_seed(summarise([ANSWERS | {"fine-tuned": values}], [TRIGGERS]), "fine-tuned") for values in (tuned, own)
    )
    assert of_all == of_own and of_own[0]["asr"] == 0.875


def test_differences_are_to_the_clean_references_means():
    results = summarise()
    (clean,) = by_seed(results, "clean")
    assert (clean["cda"], clean["asr"], clean["r_acc"]) == (1.0, 0.125, 0.875)
    assert not any(name.startswith("delta") for name in clean)
    first, second = by_seed(results, "teachers")[0]["members"]
    for member, deltas in ((first, (0.2, 0.875, 0.875)), (second, (0.4, 0.625, 0.625))):
        np.testing.assert_allclose([member[f"delta_{name}"] for name in ("cda", "asr", "r_acc")], deltas)
    # With the same trigger on both sides.
    assert first["delta_per_trigger"] == {"asr": [0.75], "r_acc": [0.75]}
    assert second["delta_per_trigger"] == {"asr": [0.75], "r_acc": [0.75]}
    (teachers,) = by_seed(results, "teachers")
    np.testing.assert_allclose([teachers[f"delta_{name}"] for name in ("cda", "asr", "r_acc")], [0.3, 0.75, 0.75])


def test_a_single_model_is_measured_under_all_triggers():
    (student,) = by_seed(summarise(), "student")
    assert student["cda"] == 1.0
    assert student["per_trigger"] == {"asr": [0.25, 0.5], "r_acc": [0.75, 0.25]}
    assert (student["asr"], student["r_acc"]) == (0.375, 0.5)
    assert (student["delta_cda"], student["delta_asr"], student["delta_r_acc"]) == (0.0, 0.25, 0.375)


def test_votes_and_their_ties():
    results = summarise()
    (hard,) = by_seed(results, "hard vote")
    # Two teachers tie wherever they differ, and the lowest class wins: untouched 0 1 2 1 1, then all 0, then 0 0 0 0 2.
    assert hard["cda"] == 0.8
    assert hard["per_trigger"] == {"asr": [1.0, 0.75], "r_acc": [0.0, 0.25]}
    assert results["ties"] == [{"clean": 0.2, "triggered": [0.8, 0.4]}]

    sure = np.concatenate([TEACHERS[:1], 5 * TEACHERS[1:]])  # the second teacher is more confident
    answers = [{"clean": CLEAN} | ANSWERS | {"teachers": sure}]
    results = summarise(answers, tie="soft")
    for vote in ("soft vote", "hard vote"):
        (seed,) = by_seed(results, vote)
        assert seed["cda"] == 0.6
        assert seed["per_trigger"] == {"asr": [0.0, 0.75], "r_acc": [1.0, 0.25]}


def test_the_soft_votes_space():
    # Raw logits let one confident teacher decide; probabilities count it once.
    quiet = logits(np.tile([0, 1, 2, 1, 2], (2, 3, 1)), 4.0)
    loud = logits(np.ones((1, 3, 5), int), 50.0)
    answers = [ANSWERS | {"teachers": np.concatenate([quiet, loud])}]
    for space, cda in (("logits", 0.4), ("probabilities", 1.0)):
        results = summarise(answers, [None], vote_space=space)
        assert by_seed(results, "soft vote")[0]["cda"] == cda
        assert by_seed(results, "hard vote")[0]["cda"] == 1.0


def test_which_trigger_fires_on_which_model():
    (cross,) = summarise()["cross_trigger"]
    assert cross["asr"] == [[1.0, 0.25], [0.0, 0.75], [0.25, 0.0]]
    assert cross["r_acc"] == [[0.0, 0.75], [1.0, 0.25], [0.75, 1.0]]
    assert cross["last_row_is_clean"]


def test_without_a_clean_reference_there_are_no_differences():
    results = summarise([ANSWERS])
    assert "clean" not in [method["method"] for method in results["methods"]]
    assert not results["cross_trigger"][0]["last_row_is_clean"] and len(results["cross_trigger"][0]["asr"]) == 2
    for cell in results["cells"]:
        assert set(cell["summary"]) == {"cda", "asr", "r_acc"}


def test_without_triggers_there_is_no_success_rate():
    answers = [{role: role_logits[:, :1] for role, role_logits in ANSWERS.items()}]
    results = summarise(answers, [None])
    assert results["attacks"][0]["triggers"] == [None] and results["cross_trigger"] == [None]
    assert results["ties"] == [{"clean": 0.2, "triggered": []}]
    for cell in results["cells"]:
        assert cell["summary"]["asr"]["mean"] is cell["summary"]["r_acc"]["mean"] is None
        assert 0 <= cell["summary"]["cda"]["mean"] <= 1
        assert cell["by_seed"][0]["asr"] is None
    rows = {row[0]: row[1:] for row in cells(ta_kd.main_table(results, "mine"))}
    assert rows["student"] == ("1.000", "–", "–", "–", "–", "–")
    json.dumps(results, allow_nan=False)


def test_means_and_spreads_over_seeds():
    worse = {"clean": CLEAN} | ANSWERS | {"student": TEACHERS[1:]}
    results = summarise([{"clean": CLEAN} | ANSWERS, worse], [TRIGGERS, TRIGGERS])
    summary = find(results, ta_kd.ATTACK, "student")["summary"]["cda"]
    assert [row["seed"] for row in by_seed(results, "student")] == results["seeds"] == [5, 6]
    assert math.isclose(summary["mean"], 0.8)
    assert math.isclose(summary["standard_deviation"], np.std([1.0, 0.6], ddof=1))
    assert find(summarise(), ta_kd.ATTACK, "student")["summary"]["cda"]["standard_deviation"] is None
    rows = {row[0]: row[1:] for row in cells(ta_kd.main_table(results, "mine"))}
    assert rows["student"][0] == "0.800 ± 0.283"
    assert rows["clean reference"][3:] == ("–", "–", "–")


def test_results_are_plain_numbers_of_known_roles():
    results = summarise()
    assert json.loads(json.dumps(results, allow_nan=False)) == results
    assert [method["method"] for method in results["methods"]] == list(ta_kd.ROLES)
    assert [method["base"] for method in results["methods"] if method["base"] != method["method"]] == ["none"]
    parameters = {method["method"]: method["parameters"] for method in results["methods"]}
    assert (parameters["student"], parameters["alone"]) == (12, None)
    (attack,) = results["attacks"]
    assert (attack["target"], attack["triggers"]) == (0, [["solid", "noise"]])
    assert (results["test_rows"], results["seeds"], by_seed(results, "student")[0]["seed"]) == (5, [5], 5)
    numbers = {"cda", "asr", "r_acc", "delta_cda", "delta_asr", "delta_r_acc"}
    assert set(results["definitions"]) == numbers | {"delta_per_trigger", "parameters"}


@pytest.mark.parametrize("dataset", ["mnist", "cifar10"])
def test_the_papers_rows_stand_beside_ours(dataset):
    table = ta_kd.main_table(summarise(), dataset)
    rows = cells(table)
    printed = [row for row in rows if row[0].startswith("the paper's ")]
    assert len(printed) == 6
    for row, style in zip(rows, table.row_styles, strict=True):
        assert (style == "paper") == row[0].startswith("the paper's ")
        assert (style == "ours") == (row[0] in ("aggregated model (TA)", "student"))
    names = [row[0] for row in rows]
    for name in (row[0].removeprefix("the paper's ") for row in printed):
        assert names.index(f"the paper's {name}") == names.index(name) + 1


def test_other_data_has_no_rows_of_the_paper():
    assert not any(row[0].startswith("the paper's") for row in cells(ta_kd.main_table(summarise(), "mine")))


# Table 1 of the paper: CDA, ASR, R-ACC and the three differences of each of its seven teachers.
TABLE_1 = {
    "mnist": [
        (0.993, 1.000, 0.000, 0.001, 1.000, 0.953),
        (0.993, 1.000, 0.000, 0.001, 1.000, 0.953),
        (0.989, 0.999, 0.001, 0.005, 0.999, 0.952),
        (0.991, 1.000, 0.000, 0.003, 1.000, 0.953),
        (0.989, 1.000, 0.000, 0.005, 1.000, 0.953),
        (0.984, 0.999, 0.001, 0.010, 0.999, 0.952),
        (0.993, 1.000, 0.000, 0.001, 1.000, 0.953),
    ],
    "cifar10": [
        (0.729, 0.875, 0.105, 0.124, 0.846, 0.662),
        (0.788, 0.764, 0.203, 0.065, 0.735, 0.564),
        (0.758, 0.995, 0.003, 0.095, 0.966, 0.764),
        (0.755, 0.793, 0.167, 0.098, 0.764, 0.600),
        (0.774, 0.970, 0.026, 0.079, 0.941, 0.741),
        (0.758, 0.975, 0.024, 0.095, 0.946, 0.743),
        (0.776, 0.968, 0.027, 0.077, 0.939, 0.740),
    ],
}
# Table 2: the three differences.
TABLE_2 = {
    "mnist": {
        "soft vote": (-0.001, 0.172, 0.129),
        "hard vote": (-0.001, 0.056, 0.014),
        "aggregated": (0.005, 0.001, -0.033),
        "student": (0.005, 0.001, -0.033),
    },
    "cifar10": {
        "soft vote": (0.014, 0.091, 0.071),
        "hard vote": (0.022, 0.022, -0.002),
        "aggregated": (0.167, -0.003, 0.164),
        "student": (0.185, 0.025, 0.185),
    },
}


@pytest.mark.parametrize("dataset", ["mnist", "cifar10"])
def test_the_papers_rows_agree_with_its_tables(dataset):
    # To the last digit that is printed, or one beside it: the paper rounds before and after it subtracts.
    printed = ta_kd.PAPER[dataset]
    np.testing.assert_allclose(printed["teachers"], np.mean(TABLE_1[dataset], axis=0)[:3], atol=0.00051)
    rows = {row[0]: row for row in ta_kd.main_table(summarise(), dataset).rows}
    for role, deltas in TABLE_2[dataset].items():
        row = rows[f"the paper's {ta_kd.ROLES[role].title}"]
        assert row[1:4] == printed[role]
        np.testing.assert_allclose(row[4:], deltas, atol=0.0011)
    teachers = rows[f"the paper's {ta_kd.ROLES['teachers'].title}"]
    np.testing.assert_allclose(teachers[4:], np.mean(TABLE_1[dataset], axis=0)[3:], atol=0.0011)


def test_the_table_of_teachers():
    rows = cells(ta_kd.teacher_table(summarise()))
    assert rows == (
        ("clean reference", "mean over all", "1.000", "0.125", "0.875", "–", "–", "–"),
        ("teacher 1", "solid", "0.800", "1.000", "0.000", "0.200", "0.875", "0.875"),
        ("teacher 2", "noise", "0.600", "0.750", "0.250", "0.400", "0.625", "0.625"),
    )
    answers = [{role: role_logits[:, :1] for role, role_logits in ANSWERS.items()}]
    unknown = cells(ta_kd.teacher_table(summarise(answers, [None])))
    assert unknown[0] == ("teacher 1", "–", "0.800", *("–",) * 5)


def test_the_table_of_sizes_and_of_needs():
    assert cells(ta_kd.size_table(summarise())) == (("ensemble (votes)", "50"), ("student", "12"))
    needs = dict(ta_kd.needs_table(summarise()).rows)
    assert needs["hard vote"] == "suspect models" and needs["student's net, clean rows only"] == "clean rows"
    assert needs["teachers (mean)"] == "none: the suspect models themselves"
    assert needs["student"] == "the aggregated model, clean rows"


# ---- The verdict ----------------------------------------------------------------------------------------------------


def measured(teachers=0.9, aggregated=0.01, student=0.02, fine_tuned=0.4, cda=0.8, clean=None):
    """The result of `summarise`, reduced to what a verdict reads."""
    asr = {
        **{"teachers": teachers, "soft vote": 0.31, "hard vote": 0.32, "aggregated": aggregated, "student": student},
        **{"alone": 0.03, "fine-tuned": fine_tuned},
        **({} if clean is None else {"clean": clean}),
    }
    if teachers is None:
        asr = dict.fromkeys(asr)
    cells = [
        {
            "attack": ta_kd.ATTACK,
            "method": role,
            "summary": {"cda": {"mean": cda if role == "student" else 0.75}, "asr": {"mean": value}},
            "by_seed": [{"members": [{}] * 7}],
        }
        for role, value in asr.items()
    ]
    return {"cells": cells}


def test_removed():
    outcome = ta_kd.verdict(measured())
    assert outcome.level == "success"
    assert outcome.headline == (
        "The backdoors are removed: mean ASR 0.010 for the aggregated model and 0.020 for the student, at CDA 0.750 and 0.800."
    )
    assert outcome.text.startswith("The 7 teachers reach a mean ASR of 0.900, each under its own trigger. Soft vote")
    assert "Soft vote has ASR 0.310, hard vote 0.320; the teachers fine-tuned" in outcome.text
    assert "on the clean rows 0.400 at CDA 0.750." in outcome.text


@pytest.mark.parametrize(
    ("numbers", "level", "begins"),
    [
        ({"teachers": 0.6, "aggregated": 0.18, "student": REMOVED_ASR}, "success", "The backdoors are removed: "),
        ({"aggregated": 0.3}, "warning", "The backdoors are weaker but not removed: "),
        ({"student": 0.3}, "warning", "The backdoors are weaker but not removed: "),
        ({"student": 0.9 * WEAKENED_SHARE + 0.01}, "attacked", "The backdoors remain: "),
        ({"aggregated": 0.9}, "attacked", "The backdoors remain: "),
        ({"cda": 0.6}, "warning", "The backdoors are removed, but at a cost of accuracy: "),
        (
            {"teachers": 0.49},
            "warning",
            "The attack does not work here: mean ASR 0.490 under the 7 teachers' own triggers.",
        ),
        ({"teachers": 0.5}, "success", "The backdoors are removed: "),
        (
            {"clean": 0.9 - BACKDOOR_ABOVE_CONTROL + 0.01},
            "warning",
            "The attack does not work here: mean ASR 0.900 under the 7 teachers' own triggers; a clean model has 0.710.",
        ),
        # Of what is above the clean model's 0.2, more than half is left.
        ({"teachers": 0.8, "student": 0.52, "clean": 0.2}, "attacked", "The backdoors remain: "),
        ({"teachers": 0.8, "student": 0.38, "clean": 0.2}, "success", "The backdoors are removed: "),
        ({"teachers": None}, "info", "The teachers' triggers are unknown, so the attack success rate"),
    ],
)
def test_every_outcome_has_its_words(numbers, level, begins):
    outcome = ta_kd.verdict(measured(**numbers))
    assert (outcome.level, outcome.headline[: len(begins)]) == (level, begins)


@pytest.mark.parametrize("teachers", [0.9, 0.1, None])
@pytest.mark.parametrize(("cda", "worth"), [(0.8, "+0.050"), (0.6, "-0.150")])
def test_the_students_gain_from_its_teachers_is_always_in_the_text(teachers, cda, worth):
    text = ta_kd.verdict(measured(teachers=teachers, cda=cda)).text
    assert f"without teachers has CDA 0.750, the student has {cda:.3f}: the gain from the teachers is {worth}." in text


@pytest.mark.parametrize("teachers", [0.9, 0.1])
def test_black_boxes_cannot_be_fine_tuned(teachers):
    results = measured(teachers=teachers)
    results["cells"] = [cell for cell in results["cells"] if cell["method"] != "fine-tuned"]
    text = ta_kd.verdict(results).text
    assert "fine-tuned" not in text
    assert "Soft vote has ASR 0.310, hard vote 0.320." in text


def test_agreement_needs_no_trigger_and_no_label():
    found = ta_kd.agreement(logits([[0, 1, 2, 1], [0, 1, 2, 2], [0, 1, 0, 1]]), ["a", "b", "c"])
    assert found["pairs"] == [[1, 0.75, 0.75], [0.75, 1, 0.5], [0.75, 0.5, 1]]
    assert found["vote"] == [0, 0.25, 0.25]  # the vote is 0, 1, 2, 1
    table = ta_kd.agreement_table({"agreement": found, "test_rows": 4})
    assert table.header == ("teacher", "1", "2", "3", "not the vote")
    assert table.rows[1] == ("2: b", 0.75, 1, 0.5, 0.25)


def test_the_verdict_on_third_party_teachers_says_what_was_measured():
    agreement = {"agreement": {"vote": [0.1, 0.3]}}
    known = ta_kd.verdict(measured() | agreement)
    assert known.headline.startswith("The backdoors are removed under the 7 known triggers: mean ASR 0.010")
    unknown = ta_kd.verdict(measured(teachers=None) | agreement)
    assert unknown.level == "info" and "differs from the vote on 20.0% of the test rows" in unknown.text
    assert "Not measured: ASR and R-ACC; that a backdoor is gone does not follow" in unknown.text

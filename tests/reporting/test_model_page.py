"""The page and the words of an audit of models, on numbers written by hand."""

import re
import shlex

import jax
import numpy as np
import pytest

import bdjax
from bdjax.commands import robust_kd, ta_kd
from bdjax.defenses.neural_cleanse import Triggers
from bdjax.evaluation import model_audit
from bdjax.evaluation.model_audit import Measured
from bdjax.inspection import random_triggers
from bdjax.inspection.random_triggers import Responses
from bdjax.inspection.weight_outliers import ClassOutlier, LayerOutlier
from bdjax.reporting import model_page, model_verdict
from bdjax.reporting.audit_verdict import exit_status
from bdjax.reporting.report import Verdict, render
from bdjax.run.experiment import read_flags
from bdjax.run.folder import RunFolder

NAMES = ("ant", "bee", "cat", "dog", "<b>")
USUAL, BACKDOOR = [10.0, 9.5, 9, 11, 10], [10.0, 9, 1, 11, 10]
CONTROLS = [[10.0, 11, 9, 10, 12], [20.0, 22, 18, 21, 19], [8.0, 9, 10, 9, 8]]
ROWS = {"clean_rows": 500, "search_rows": 128, "held_out_rows": 40}
DATA = bdjax.dataset(np.full((40, 8, 8, 1), 99, np.uint8), np.arange(40) % 5, name="rows", class_names=NAMES)


def measured_of(norms) -> Measured:
    norms = np.array([*norms, *CONTROLS, [10.0, 1, 9, 11, 10]])
    masks = np.random.default_rng(0).random((*norms.shape, 8, 8, 1), np.float32)
    return Measured(Triggers(masks, masks), norms, np.full(norms.shape, 0.97), np.full((*norms.shape, 3), 0.02))


def with_responses(measured: Measured) -> Measured:
    """Noise patches turn rows into class 3 of the first model."""
    success = np.full((len(measured.norms), 2, 5), 0.1) + 0.01 * np.arange(len(measured.norms))[:, None, None]
    success[0, 1, 3] = 0.9
    strongest = np.full(success.shape, 2)
    return measured._replace(responses=Responses(success, strongest), kinds=("wave", "noise patch"))


def results_of(*norms, reasons=(), planted=None, black_box=False, with_random=False):
    """The results for models with these norms; a reason for each of them makes it a model that is not tested."""
    reasons = reasons or [""] * len(norms)
    titles = ["the model"] if len(norms) == 1 else [f"model {number + 1}" for number in range(len(norms))]
    models = [
        {"title": title, "source": "folder", "accuracy": 0.95, "reason": reason}
        for title, reason in zip(titles, reasons, strict=True)
    ]
    tested = [of_model for of_model, reason in zip(norms, reasons, strict=True) if not reason]
    options, measured = {}, None
    if tested:
        weights = [([LayerOutlier("conv", 8, 3, 2.0, 2.0)], ClassOutlier(2, np.zeros(5), 9.0, 0.5))] * len(tested)
        of_controls = [([LayerOutlier("conv", 8, 3, 2.0, 1.0)], ClassOutlier(1, np.zeros(5), 2.0, 0.5))] * 3
        names = [f"class {DATA.class_title(number)}" for number in range(5)]
        measured = with_responses(measured_of(tested)) if with_random else measured_of(tested)
        options = {
            "measured": measured,
            "places": list(range(len(tested), len(tested) + 3)),
            "accuracies": [0.9] * 3,
            "planted": planted or {"title": "3×3 white square", "class": 1, "success": 0.99},
            "weights": None if black_box else model_audit.describe_weights(weights, of_controls, names),
        }
    names = [f"class {DATA.class_title(number)}" for number in range(5)]
    numbers = model_audit.judge(models, names, black_box=black_box, **options)
    made = model_verdict.commands(["--dataset=digits"], ["my models"], len(norms), True)
    return model_page.summarise(numbers, DATA, ROWS, 0, made, 9 * with_random), measured


@pytest.mark.parametrize(
    ("norms", "options", "level", "status", "headline"),
    [
        ([BACKDOOR], {}, "found", 3, "A trigger into class 2 (cat) was found in the model."),
        (
            [BACKDOOR, USUAL, BACKDOOR],
            {},
            "found",
            3,
            "A trigger was found in 2 of 3 models, always into class 2 (cat).",
        ),
        (
            [USUAL],
            {},
            "nothing_found",
            0,
            "Nothing found in the model; a 3×3 white square planted in a network trained on the clean rows was found.",
        ),
        (
            [USUAL],
            {"planted": {"why": "the trigger cannot be planted"}},
            "not_tested",
            4,
            "The model could not be tested: no trigger could be planted to see whether a search finds it.",
        ),
        (
            [USUAL],
            {"reasons": ["it predicts 9 % correctly"]},
            "not_tested",
            4,
            "The model could not be tested: it predicts 9 % correctly.",
        ),
        (
            [USUAL, USUAL],
            {"reasons": ["it predicts 9 % correctly", ""]},
            "nothing_found",
            0,
            "Nothing found in model 2; a 3×3 white square planted in a network trained on the clean rows was found.",
        ),
    ],
)
def test_each_outcome_has_its_headline_its_colour_and_its_exit_status(norms, options, level, status, headline):
    results, _ = results_of(*norms, **options)
    verdict = Verdict(**results["verdict"])
    assert (verdict.level, verdict.headline, exit_status(results)) == (level, headline, status)
    assert not re.search(r"\b(is|are) clean\b", f"{verdict.headline} {verdict.text}")
    assert model_verdict.CANNOT_SEE in verdict.text


def test_the_evidence_names_success_controls_p_value_and_the_agreement_of_the_other_signs():
    results, _ = results_of(BACKDOOR)
    text = results["verdict"]["text"]
    assert "turns 97 % of held-out rows into class 2 (cat), anomaly index 6.07" in text
    assert (
        "on control networks the same trigger turns 2.0 %; p = 0.25, the smallest that 3 control networks allow" in text
    )
    assert "The weights of the last layer agree: class 2 (cat)" in text
    assert "cannot be below 0.25" in text


def test_nothing_found_says_what_came_closest_and_that_it_is_no_proof():
    results, _ = results_of(USUAL)
    text = results["verdict"]["text"]
    assert "Class 2 (cat) came closest, but" in text and model_verdict.NO_PROOF in text
    assert model_verdict.EASY_TO_FIND in text
    assert model_verdict.EASY_TO_FIND not in results_of(BACKDOOR)[0]["verdict"]["text"]


def test_the_class_with_the_largest_score_came_closest_however_much_speaks_against_it():
    far = {"found": False, "score": -0.1, "against": ["one"], "title": "class 0"}
    near = {"found": False, "score": 0.9, "against": ["one", "two"], "title": "class 1"}
    assert model_verdict.top_class({"classes": [far, near]}) is near
    assert model_verdict.top_class({"classes": [{**far, "found": True}, near]})["title"] == "class 0"
    assert model_verdict.top_class({"classes": []}) is None


def test_a_black_box_has_no_weights():
    results, measured = results_of(BACKDOOR, black_box=True)
    assert model_page.weights_table(results) is None and "last layer" not in results["verdict"]["text"]


def test_the_commands_for_a_clean_student_can_be_read():
    experiments = {"ta-kd": ta_kd.EXPERIMENT, "robust-kd": robust_kd.EXPERIMENT}
    for command in (
        *model_verdict.commands(["--dataset=digits"], ["my model"], 1, True),
        *model_verdict.commands(["--dataset=digits"], ["my model", "b.onnx"], 2, outputs="labels"),
    ):
        words = shlex.split(command)
        config = read_flags(experiments[words[1]], "", words[2:])
        assert (getattr(config, "teacher", None) or config.teachers[0]) == "my model"
    assert [command.split()[1] for command in model_verdict.commands(["--dataset=digits"], ["x"], 1, True)] == [
        "robust-kd",
        "ta-kd",
    ]
    assert [command.split()[1] for command in model_verdict.commands(["--dataset=digits"], ["x"], 7, True)] == ["ta-kd"]


@pytest.mark.usefixtures("undrawn")
def test_the_page_has_every_part_and_escapes_names(tmp_path):
    results, measured = results_of(BACKDOOR, USUAL)
    page = model_page.page(RunFolder(tmp_path, is_new=True), results, DATA, DATA, measured)
    titles = [section.title for section in page.sections]
    assert titles == [
        "Verdicts",
        "What to do next",
        "The reversed triggers",
        "Every class",
        "Control networks",
        "Other signs",
        "What this audit cannot see",
    ]
    html = render(page)
    assert "<b>" not in html and "&lt;b&gt;" in html
    main = page.sections[0].tables[0]
    assert [row[:2] for row in main.rows] == [("model 1", "found"), ("model 2", "nothing found")]
    assert len(page.sections[3].tables) == 2 and len(page.sections[3].tables[0].rows) == 5
    assert len(page.sections[4].tables[0].rows) == 4  # three controls, and the planted trigger


@pytest.mark.usefixtures("undrawn")
def test_a_page_without_a_test_has_no_numbers_of_one(tmp_path):
    results, _ = results_of(USUAL, reasons=["it predicts 9 % correctly"])
    page = model_page.page(RunFolder(tmp_path, is_new=True), results, DATA, DATA, None)
    assert [section.title for section in page.sections] == [
        "Verdicts",
        "What to do next",
        "What this audit cannot see",
    ]
    assert "Nothing is known about this model" in page.sections[1].text
    render(page)


# ---- Random triggers ------------------------------------------------------------------------------------------------


def test_a_finding_by_random_triggers_says_of_which_kind_and_how_often_controls_react():
    results, _ = results_of(USUAL, with_random=True)
    verdict = Verdict(**results["verdict"])
    assert verdict.level == "found" and verdict.headline == "A trigger into class 3 (dog) was found in the model."
    assert 'random triggers of the kind "noise patch" turns 90 % of held-out rows into class 3 (dog)' in verdict.text
    assert "12 % on control networks; p = " in verdict.text and "9 of each of 7 kinds" in verdict.text
    assert "a mask of" not in verdict.text  # the reversed trigger is no finding
    numbers = model_page.key_numbers(results)
    assert numbers["trigger found into"] == "class 3 (dog)"
    assert (numbers["success on held-out rows"], numbers["on control networks"]) == ("90 %", "12 %")
    ((_, _, _, label, by, *_),) = model_page.main_table(results).rows
    assert (label, by) == ("Class 3 (dog)", "random")
    table = model_page.responses_table(results)
    assert [row[0] for row in table.rows] == ["the model", *[f"control network {number}" for number in (1, 2, 3)]]
    assert table.rows[0][1:5] == ("Class 3 (dog)", "noise patch", "0.90", "0.12") and table.rows[0][-1] == "yes"
    assert {row[-1] for row in table.rows[1:]} == {"no"}


@pytest.mark.parametrize(("accuracy", "doubted"), [(0.8, True), (0.88, False), (0.99, False)])
def test_a_finding_in_a_network_worse_than_the_controls_is_doubted(accuracy, doubted):
    results, _ = results_of(BACKDOOR)
    results["models"][0]["accuracy"] = accuracy  # the controls have 0.9
    text = model_verdict.verdict(results).text
    assert ("10 percentage points fewer held-out rows correctly" in text) == doubted
    assert ("may react more to any trigger" in text) == doubted


def test_without_random_triggers_nothing_is_said_of_them():
    results, _ = results_of(USUAL)
    assert model_page.responses_table(results) is None
    assert "Random triggers:" not in results["verdict"]["text"]


@pytest.mark.usefixtures("undrawn")
def test_the_strongest_random_trigger_is_drawn(tmp_path):
    results, measured = results_of(BACKDOOR, USUAL, with_random=True)
    drawn = {
        kind: random_triggers.draw_triggers(jax.random.key(0), kind, 3, (8, 8, 1)) for kind in ("wave", "noise patch")
    }
    page = model_page.page(RunFolder(tmp_path, is_new=True), results, DATA, DATA, measured, drawn)
    (section,) = [section for section in page.sections if section.title == "Random triggers"]
    assert len(section.figures) == 1 and section.figures[0].image.name == "random_triggers.png"
    render(page)

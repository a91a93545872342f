import pytest

from bdjax.reporting.ta_kd_report import ATTACK_WORKS, REMOVED, verdict


def results(teachers=0.9, aggregated=0.01, student=0.02, fine_tuned=0.4, cda=0.8):
    """As `ta_kd_results.summarise` gives them, with no more than a verdict reads."""
    asr = {
        "teachers": teachers,
        "soft vote": 0.31,
        "hard vote": 0.32,
        "aggregated": aggregated,
        "student": student,
        "alone": 0.03,
        "fine-tuned": fine_tuned,
    }
    if teachers is None:
        asr = dict.fromkeys(asr)
    models = {
        role: {
            "summary": {"cda": {"mean": cda if role == "student" else 0.75}, "asr": {"mean": value}},
            "seeds": [{"members": [{}] * 7}],
        }
        for role, value in asr.items()
    }
    return {"models": models}


def test_removed():
    said = verdict(results())
    assert said.level == "clean"
    assert said.headline == (
        "The backdoors are gone: mean ASR 0.010 for the aggregated model and 0.020 for the student, at CDA 0.750 and 0.800."
    )
    assert said.text.startswith("All 7 teachers together reach a mean ASR of 0.900 under their own triggers. Soft vote")
    assert "Soft vote has ASR 0.310, hard vote 0.320; the teachers plainly fine-tuned" in said.text
    assert "on the clean rows 0.400 at CDA 0.750." in said.text


@pytest.mark.parametrize(
    ("numbers", "level", "begins"),
    [
        ({"aggregated": REMOVED, "student": REMOVED}, "clean", "The backdoors are gone: "),
        ({"aggregated": REMOVED + 0.001}, "warning", "The backdoors are weaker but not gone: "),
        ({"student": 0.2}, "warning", "The backdoors are weaker but not gone: "),
        ({"student": 0.45}, "attacked", "The backdoors survive: "),
        ({"aggregated": 0.9}, "attacked", "The backdoors survive: "),
        ({"teachers": ATTACK_WORKS - 0.01}, "warning", "The attack does not work here: mean ASR 0.490 under the 7 "),
        ({"teachers": ATTACK_WORKS}, "clean", "The backdoors are gone: "),
        ({"teachers": None}, "info", "These teachers' triggers are not known, so no attack success rate"),
    ],
)
def test_every_outcome_has_its_words(numbers, level, begins):
    said = verdict(results(**numbers))
    assert (said.level, said.headline[: len(begins)]) == (level, begins)


@pytest.mark.parametrize("teachers", [0.9, 0.1, None])
@pytest.mark.parametrize(("cda", "worth"), [(0.8, "+0.050"), (0.6, "-0.150")])
def test_the_students_gain_over_no_teacher_at_all_is_always_said(teachers, cda, worth):
    text = verdict(results(teachers=teachers, cda=cda)).text
    assert f"without any teacher has CDA 0.750 and the student {cda:.3f}: the teachers are worth {worth}." in text


@pytest.mark.parametrize("teachers", [0.9, 0.1])
def test_black_boxes_cannot_be_fine_tuned(teachers):
    measured = results(teachers=teachers)
    del measured["models"]["fine-tuned"]
    text = verdict(measured).text
    assert "fine-tuned" not in text
    assert "Soft vote has ASR 0.310, hard vote 0.320." in text

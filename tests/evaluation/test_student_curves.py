import contextlib
import dataclasses
import json
from types import SimpleNamespace

import pytest

from bdjax.errors import InputError
from bdjax.evaluation import student_curves
from bdjax.evaluation.student_curves import CurvePoint, StudentCurves, best_point, is_measured
from bdjax.training.stages import StageRunner


def test_about_twenty_epochs_are_measured_and_always_the_last():
    for epochs in (1, 7, 20, 50, 199, 300):
        measured = [epoch for epoch in range(1, epochs + 1) if is_measured(epoch, epochs)]
        assert measured[-1] == epochs and min(epochs, 10) <= len(measured) <= student_curves.POINTS + 1


def test_the_best_epoch_has_the_highest_asr_where_the_student_is_as_good_as_its_teacher():
    points = [
        CurvePoint(1, (0.80, 0.90), (0.99, None), (0.0, None)),  # the highest ASR, of a student that is not yet good
        CurvePoint(2, (0.86, 0.90), (0.60, None), (0.1, None)),
        CurvePoint(3, (0.90, 0.90), (0.40, None), (0.0, None)),
    ]
    assert best_point(points, 0, teacher_cda=0.9).epoch == 2
    assert best_point(points, 0, teacher_cda=0.8).epoch == 1
    assert best_point(points, 0, teacher_cda=0.99) is None
    assert best_point(points, 1, teacher_cda=0.9) is None


def test_a_file_keeps_the_points_and_a_damaged_one_is_refused(tmp_path):
    file = tmp_path / "curves" / "fkd.json"
    points = {"fkd students": {2: CurvePoint(2, (0.5,), (None,), (None,)), 4: CurvePoint(4, (0.6,), (0.1,), (0.0,))}}
    student_curves._write(file, points)
    assert student_curves._read(file) == points and student_curves._read(tmp_path / "none.json") == {}
    curves = StudentCurves(file, None, None, None, points)
    assert [point.epoch for point in curves.points] == [2, 4]
    curves.by_stage["another stage"] = {}
    assert curves.points == []  # not one student for each teacher
    for damaged in ("{", "[1]", json.dumps({"stage": [{"epoch": 1}]})):
        file.write_text(damaged)
        with pytest.raises(InputError, match="is damaged"):
            student_curves._read(file)


@dataclasses.dataclass(frozen=True)
class Inputs:
    runner: StageRunner


def test_curves_are_written_once_at_the_end_with_what_an_earlier_process_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(student_curves, "measure", lambda *_: [SimpleNamespace(cda=0.5, asr=None)])
    monkeypatch.setattr(student_curves, "control", lambda *_: [None])
    opened, taken = [], []

    @contextlib.contextmanager
    def curves(stage):
        opened.append(stage.name)
        yield lambda epoch, numbers: taken.append(epoch)

    inputs = Inputs(StageRunner(tmp_path, (8, 8, 1), "map", curves=curves))
    for epochs in ((1, 2), (3, 4)):  # the second process continues
        of_process = StudentCurves(tmp_path / "fkd.json", None, SimpleNamespace(suspects=()), None)
        watch = of_process.watching(inputs).runner.watch
        for epoch in epochs:
            watch("fkd students", epoch, 4, None, None)
    assert opened == ["fkd-students-measured"] and taken == [1, 2, 3, 4]


def test_points_are_curves_of_their_own_with_the_mean_of_what_is_known(tmp_path):
    points = {
        4: CurvePoint(4, (0.6, 0.8), (0.1, None), (None, None)),
        2: CurvePoint(2, (0.5, 0.5), (None, None), (0.0, 0.2)),
    }
    seen = []

    @contextlib.contextmanager
    def curves(stage):
        yield lambda epoch, numbers: seen.append((stage.name, epoch, numbers))

    student_curves._send(StageRunner(tmp_path, (8, 8, 1), "map", curves=curves), "fkd students", points)
    assert seen == [
        ("fkd-students-measured", 2, {"cda": 0.5, "control_asr": 0.1}),
        ("fkd-students-measured", 4, {"cda": 0.7, "asr": 0.1}),
    ]
    student_curves._send(StageRunner(tmp_path, (8, 8, 1), "map"), "fkd students", points)
    assert len(seen) == 2

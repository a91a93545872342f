"""Measures students during their distillation: CDA, ASR and control ASR after every few epochs.

A backdoor may pass late, and the public code of CKD, which RobustKD's builds on, prints the highest ASR of any epoch whose
accuracy is within 5 points of the teacher's. The last epoch's ASR is what a user gets. So both are reported. Only the
evaluation sees these numbers; no method does.
"""

import json
import math
import pathlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from bdjax import atomic
from bdjax.defenses.contract import DefenseInput
from bdjax.errors import InputError
from bdjax.evaluation.measure import Comparison, TriggeredViews, measure
from bdjax.evaluation.teachers import SuspectTeachers, control
from bdjax.evaluation.variants import DefenseVariant
from bdjax.training import processes
from bdjax.training.stages import StageRunner
from bdjax.types import DefenseResult, Model, PyTree

POINTS = 20
"""About how many epochs of a training are measured, the last among them."""
ALLOWED_DROP = 0.05
"""An epoch counts for the best ASR if its CDA is at most this much below the teacher's, as in CKD's public code."""


class CurvePoint(NamedTuple):
    """M students after an epoch."""

    epoch: int
    """number of epochs trained, from 1"""
    cda: tuple[float | None, ...]
    asr: tuple[float | None, ...]
    """None without a trigger"""
    control_asr: tuple[float | None, ...]
    """of the same triggers on the clean teacher's student; None without one"""


def is_measured(epoch: int, epochs: int) -> bool:
    """Whether the students are measured after this epoch of so many: after about `POINTS` of them, and after the last."""
    return epoch % math.ceil(epochs / POINTS) == 0 or epoch == epochs


def best_point(points: Sequence[CurvePoint], student: int, teacher_cda: float) -> CurvePoint | None:
    """The point with a student's highest ASR among those with a CDA within `ALLOWED_DROP` of the teacher's.

    Args:
        points: of the training.
        student: its number, 0 to M - 1.
        teacher_cda: of its teacher.

    Returns:
        The first such point; None if no epoch has that CDA or no trigger is known.
    """
    allowed = [
        point for point in points if point.asr[student] is not None and point.cda[student] >= teacher_cda - ALLOWED_DROP
    ]
    return max(allowed, key=lambda point: point.asr[student], default=None)


@dataclass
class StudentCurves:
    """Watches the students of one method, and keeps what was measured in a file, so that a resumed run has all of it."""

    file: pathlib.Path
    variant: DefenseVariant
    teachers: SuspectTeachers
    views: TriggeredViews
    by_stage: dict[str, dict[int, CurvePoint]] = field(default_factory=dict)
    """stage -> epoch -> point"""

    def watching(self, inputs: DefenseInput) -> DefenseInput:
        """The same inputs, whose students are measured while they are trained.

        Raises:
            InputError: the file of an earlier run is damaged.
        """
        self.by_stage = _read(self.file)

        def watch(stage: str, epoch: int, epochs: int, model: Model, variables: PyTree) -> None:
            if not is_measured(epoch, epochs):
                return
            result = DefenseResult(model, variables)
            measured = measure(inputs, result, self.teachers.suspects, self.variant, self.views, 0.0)
            controls = control(inputs, self.teachers, Comparison(self.variant, result, measured), self.views)
            cda, asr = ([getattr(student, name) for student in measured] for name in ("cda", "asr"))
            point = CurvePoint(epoch, tuple(cda), tuple(asr), tuple(controls))
            self.by_stage.setdefault(stage, {})[epoch] = point
            _write(self.file, self.by_stage)
            if epoch == epochs:
                _send(inputs.runner, stage, self.by_stage[stage])

        return replace(inputs, runner=replace(inputs.runner, watch=watch))

    @property
    def points(self) -> list[CurvePoint]:
        """The measured epochs in order; empty for a method that trains no students, or several for each teacher."""
        if len(self.by_stage) != 1:
            return []
        (of_stage,) = self.by_stage.values()
        return [of_stage[epoch] for epoch in sorted(of_stage)]


def _send(runner: StageRunner, stage: str, points: dict[int, CurvePoint]) -> None:
    """Pass all points of a stage on to the runner's curves: the mean over the students whose number is known."""
    with runner.curves_of(f"{stage} measured") as take:
        for epoch, point in sorted(points.items()) if take else ():
            known = {
                name: [value for value in getattr(point, name) if value is not None]
                for name in ("cda", "asr", "control_asr")
            }
            take(epoch, {name: sum(values) / len(values) for name, values in known.items() if values})


@processes.by_primary
def _write(file: pathlib.Path, by_stage: dict[str, dict[int, CurvePoint]]) -> None:
    plain = {stage: [point._asdict() for point in points.values()] for stage, points in by_stage.items()}
    atomic.write_bytes(file, json.dumps(plain, indent=1).encode())


def _read(file: pathlib.Path) -> dict[str, dict[int, CurvePoint]]:
    try:
        stored = json.loads(file.read_text()) if file.exists() else {}
        return {
            stage: {
                point["epoch"]: CurvePoint(
                    point["epoch"], *(tuple(point[name]) for name in ("cda", "asr", "control_asr"))
                )
                for point in points
            }
            for stage, points in stored.items()
        }
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(f"{file}: is damaged; remove it, and the curve lacks the epochs trained so far") from error

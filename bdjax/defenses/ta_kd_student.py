"""TA-KD's student (Heydari et al. 2025) where the defender has one untrusted teacher instead of seven.

As in `ta_kd.py`, a Teacher-Aggregation model of the teacher's architecture is distilled from the teacher's logits and the clean
labels, and the student from that model in the same way. With one teacher nothing is averaged away: the only protection left
is that each of the two steps passes on nothing but logits on clean images.
"""

from dataclasses import dataclass
from functools import partial

from bdjax.defenses.contract import Defense, DefenseInput
from bdjax.defenses.distillation import QUICK, QUICK_DIGITS, TeacherNetworks, distil, student_network
from bdjax.defenses.logit_distillation import LogitDistillationSettings, check, distillation_method
from bdjax.settings import Share
from bdjax.types import DefenseResult


@dataclass(frozen=True)
class TaKdStudentSettings(LogitDistillationSettings):
    alpha: Share = 0.5
    """weight of the teacher's outputs, in [0, 1]; the labels get the rest"""


def run(inputs: DefenseInput, settings: TaKdStudentSettings) -> DefenseResult:
    """Distil a model of the teacher's architecture, and the student from that model."""
    method = distillation_method(settings.temperature, settings.alpha)
    aggregated = distil(inputs, "TA model", settings, method, student=inputs.attacked.model, role="TA models")
    return distil(inputs, "TA-KD student", settings, method, TeacherNetworks(aggregated.model, aggregated.variables))


TA_KD_STUDENT = Defense(
    name="ta_kd_student",
    title="TA-KD, one teacher",
    paper="Heydari et al. 2025, with a single teacher",
    stage="after training",
    needs=("attacked model", "clean rows"),
    settings=TaKdStudentSettings(),
    run=run,
    check=partial(check, owner="defense ta_kd_student"),
    network_after=student_network,
    changes={"quick": QUICK, "quick digits": QUICK_DIGITS},
)

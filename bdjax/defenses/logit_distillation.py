"""Knowledge distillation by logits (Hinton et al. 2015): the student learns the labels and the teacher's softened outputs.

    alpha T^2 KL(teacher_T || student_T) + (1 - alpha) CE

On clean images a backdoored teacher's outputs are those of a clean one, so little of the backdoor is in them. This is the
baseline of feature distillation.
"""

from dataclasses import dataclass
from functools import cache

from bdjax import losses
from bdjax.defenses.contract import Defense, DefenseInput
from bdjax.defenses.distillation import (
    QUICK,
    QUICK_DIGITS,
    Method,
    StudentSettings,
    check_student,
    distil,
    student_network,
)
from bdjax.settings import Positive, Share
from bdjax.types import Array, DefenseResult, ModelOutput, PyTree


@dataclass(frozen=True)
class LogitDistillationSettings(StudentSettings):
    temperature: Positive = 4.0
    """T, temperature of both softmaxes; larger values give softer targets"""
    alpha: Share = 0.9
    """weight of the teacher's outputs, in [0, 1]; the labels get the rest (0.9 is usual for small images: Zagoruyko and
    Komodakis 2017)"""


@cache
def distillation_method(temperature: float, alpha: float) -> Method:
    """The method, for `bdjax.defenses.distillation`."""

    if not alpha:
        return Method(
            lambda beside, student, teacher, labels: losses.cross_entropy(student.logits, labels), uses_teacher=False
        )

    def loss(beside: PyTree, student: ModelOutput, teacher: ModelOutput, labels: Array) -> Array:
        del beside
        return losses.distillation(student.logits, teacher.logits, labels, temperature=temperature, alpha=alpha)

    return Method(loss)


def check(settings: LogitDistillationSettings, owner: str = "defense logit_distillation") -> None:
    """Reject invalid settings."""
    check_student(owner, settings)


def run(inputs: DefenseInput, settings: LogitDistillationSettings) -> DefenseResult:
    """Distil the attacked networks."""
    return distil(inputs, "KD", settings, distillation_method(settings.temperature, settings.alpha))


LOGIT_DISTILLATION = Defense(
    name="logit_distillation",
    title="KD (logits)",
    paper="Hinton et al. 2015, Distilling the Knowledge in a Neural Network",
    stage="after training",
    needs=("attacked model", "clean rows"),
    unused_needs=lambda settings: () if settings.alpha else ("attacked model",),
    settings=LogitDistillationSettings(),
    run=run,
    check=check,
    network_after=student_network,
    changes={"quick": QUICK, "quick digits": QUICK_DIGITS},
)

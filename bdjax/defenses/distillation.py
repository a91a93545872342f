"""Distillation: a student, possibly of another architecture, learns a frozen network's outputs for clean images.

Methods differ in their losses only: all students have the same schedule, and for each suspect the same initial weights and the
same batches. A method defines what a student minimises besides, or instead of, the labels' cross-entropy. Extra layers that are
trained with the student for this purpose, such as projections to the teacher's feature size, are discarded at the end.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Literal, NamedTuple

from bdjax.defenses.contract import DefenseInput, fingerprint
from bdjax.models import MODELS
from bdjax.settings import Count, Increasing, InnerShare, LearningRate, NotNegative, check_values
from bdjax.training import ensemble
from bdjax.training.member import Objective, Outcome, Rows, TrainConfig
from bdjax.types import Array, DefenseResult, Key, Model, ModelOutput, PyTree

Statistics = Literal["running", "batch"]


@dataclass(frozen=True)
class StudentSettings:
    student: str = "wrn_16_2"
    """the student's architecture, at the run's width"""
    epochs: Count = 200
    """epochs of distillation"""
    batch_size: Count = 128
    """clean rows in a step; all of them if there are fewer"""
    learning_rate: LearningRate = 0.1
    """initial learning rate of SGD with Nesterov momentum 0.9"""
    drops: Annotated[tuple[InnerShare, ...], Increasing(or_equal=True)] = (0.5, 0.75)
    """shares of the epochs after which the learning rate is divided by 10"""
    weight_decay: NotNegative = 5e-4
    """L2 penalty on every parameter of the student and of the method's extra layers"""
    teacher_statistics: Statistics = "running"
    """the teacher's batch normalisation: its running statistics, or each batch's, as in FKD's public code, which leaves the
    teacher in training mode (here its running statistics do not change)"""


QUICK = {"epochs": 15, "batch_size": 64}
QUICK_DIGITS = {"epochs": 25, "batch_size": 64}
"""Changes for small runs of every method."""


class TeacherNetworks(NamedTuple):
    """A frozen network for each suspect; None and {} without any."""

    model: Model | None
    variables: PyTree
    """stacked [M, ...]"""


class Method(NamedTuple):
    """What a student minimises. Create it in a cached function: a new function object would be compiled again."""

    loss: Callable[[PyTree, ModelOutput, ModelOutput | None, Array], Array]
    """(parameters of the extra layers, the student's output, the teacher's output or None, labels int32 [N]) -> float32 [N]"""
    init: Callable[[Key], PyTree] | None = None
    """initial parameters of a member's extra layers; None without extra layers"""
    uses_teacher: bool = True
    """without it, the student learns from the labels, and nothing of a teacher is read"""


@cache
def student_objective(student: Model, teacher: Model | None, method: Method, statistics: Statistics) -> Objective:
    """The method's loss as an objective; both networks receive the same augmented batch.

    Args:
        student: the student's architecture.
        teacher: the teacher's architecture; None without a teacher.
        method: what is minimised.
        statistics: the teacher's batch normalisation.

    Returns:
        An objective whose variables are `params` ("student" and "extra"), `batch_stats` of the student, and "teacher".
    """

    def objective(params: PyTree, variables: PyTree, images: Array, targets: dict[str, Array], key: Key) -> Outcome:
        del key
        teacher_output = teacher.apply(variables["teacher"], images, train=statistics == "batch") if teacher else None
        student_variables = {"params": params["student"], "batch_stats": variables["batch_stats"]}
        student_output = student.apply(student_variables, images, train=True)
        loss = method.loss(params["extra"], student_output, teacher_output, targets["labels"])
        updated = {**variables, "batch_stats": student_output.variables["batch_stats"]}
        return Outcome(loss, student_output.logits, targets["labels"], updated)

    return objective


def distil(
    inputs: DefenseInput,
    name: str,
    settings: StudentSettings,
    method: Method,
    teachers: TeacherNetworks | None = None,
    rows: Rows | None = None,
    student: Model | None = None,
    role: str = "students",
) -> DefenseResult:
    """Train a student for each suspect.

    Args:
        inputs: the suspects, with clean rows.
        name: name of the method, for its checkpoints.
        settings: of the student.
        method: what the student minimises.
        teachers: the teachers; None for the attacked networks.
        rows: training rows, leaves [M, n]; None for all clean rows.
        student: the student's architecture; None for that of the settings.
        role: students of the same role have the same initial weights and batches, whatever their method.

    Returns:
        The students.
    """
    if not method.uses_teacher:
        teachers = TeacherNetworks(None, {})
    elif teachers is None:
        teachers = TeacherNetworks(inputs.attacked.model, inputs.attacked.variables)
    student = student or inputs.make_model(settings.student)
    start = inputs.begin(role, student)
    extra = ensemble.init_members(method.init, inputs.keys_for(f"{role}: beside")) if method.init else {}
    variables = {
        "params": {"student": start["params"], "extra": extra},
        "batch_stats": start["batch_stats"],
        "teacher": teachers.variables,
    }
    # The checkpoints of students without a teacher hold no teacher's variables, so they have another name.
    teaching = name if method.uses_teacher else f"{name} without a teacher"
    nets = inputs.runner.from_variables(
        f"{teaching} {student.description.split()[0]} {fingerprint(**vars(settings))}",
        student,
        student_config(inputs, settings),
        variables,
        inputs.keys_for(f"{role}: shuffles"),
        1,
        inputs.pool,
        inputs.clean_rows() if rows is None else rows,
        student_objective(student, teachers.model, method, settings.teacher_statistics),
        network_of=student_of,
    )
    return DefenseResult(student, student_of(nets.variables))


def student_of(variables: PyTree) -> PyTree:
    """The student's variables among those of `student_objective`."""
    return {"params": variables["params"]["student"], "batch_stats": variables["batch_stats"]}


def student_network(
    settings: StudentSettings, attacked: Model, make_model: Callable[..., Model], image_shape: tuple[int, int, int]
) -> Model:
    """For `Defense.network_after` of methods that allow any student: the student."""
    del attacked, image_shape
    return make_model(settings.student)


def student_config(inputs: DefenseInput, settings: StudentSettings) -> TrainConfig:
    """SGD with Nesterov momentum, whose learning rate is divided by 10 at each drop. A drop keeps the momentum; FKD's public
    code resets it."""
    drops = enumerate(settings.drops, start=1)
    return inputs.config(
        epochs=settings.epochs,
        batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        optimiser="sgd",
        momentum=0.9,
        nesterov=True,
        schedule="steps",
        steps=tuple((round(share * settings.epochs), settings.learning_rate * 0.1**number) for number, share in drops),
    )


def check_student(owner: str, settings: StudentSettings) -> None:
    """Validate the settings of a student.

    Args:
        owner: for error messages, such as "defense fkd".
        settings: of the student.

    Raises:
        InputError: a setting is invalid.
    """
    check_values(
        owner,
        settings,
        choices={"student": MODELS, "teacher_statistics": Statistics.__args__},
    )

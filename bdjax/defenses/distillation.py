"""Distillation: a student of another architecture learns from a frozen network what that makes of clean images.

What all students here share, so that methods differ in their losses alone: the schedule, and for each suspect the same first
weights and the same batches. A method says what a student minimises beside or in place of the labels' cross-entropy; what it
needs for that and trains with the student, such as the layers that bring features to one size, is thrown away at the end.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Literal, NamedTuple

from bdjax.defenses.contract import DefenseInput, fingerprint
from bdjax.errors import InputError
from bdjax.models import MODELS
from bdjax.settings import check_values
from bdjax.training import ensemble
from bdjax.training.member import Objective, Outcome, Rows, TrainConfig
from bdjax.types import Array, DefenseResult, Key, Model, ModelOutput, PyTree

Statistics = Literal["running", "batch"]


@dataclass(frozen=True)
class StudentSettings:
    student: str = "wrn_16_2"
    """the architecture, a key of `bdjax.models.MODELS`, at the run's width"""
    epochs: int = 200
    """of distillation"""
    batch_size: int = 128
    """or all clean rows, if they are fewer"""
    learning_rate: float = 0.1
    """of SGD with Nesterov momentum 0.9"""
    drops: tuple[float, ...] = (0.5, 0.75)
    """shares of the epochs after which it is a tenth of what it was"""
    weight_decay: float = 5e-4
    """L2, on every parameter of the student and of the layers beside it"""
    teacher_statistics: Statistics = "running"
    """what the teacher normalises by: what it came with, or each batch's own (as FKD's public code, by leaving the teacher in
    training mode; its running statistics are not changed here)"""


QUICK = {"epochs": 15, "batch_size": 64}
QUICK_DIGITS = {"epochs": 50, "batch_size": 64}
"""What small runs change, whatever the method."""


class TeacherNetworks(NamedTuple):
    """Frozen networks, one for each suspect."""

    model: Model
    variables: PyTree
    """stacked [M, ...]"""


class Method(NamedTuple):
    """What a student minimises. One function, whatever made it, is compiled once: make it by a cached function."""

    loss: Callable[[PyTree, ModelOutput, ModelOutput, Array], Array]
    """(parameters beside the student's, the student's output, the teacher's, labels int32 [N]) -> float32 [N]"""
    init: Callable[[Key], PyTree] | None = None
    """those parameters of one member; None for none"""


@cache
def student_objective(student: Model, teacher: Model, method: Method, statistics: Statistics) -> Objective:
    """For the engine: the method's loss, both networks seeing the same augmented batch.

    Args:
        student: its architecture.
        teacher: the frozen network's.
        method: what is minimised.
        statistics: of the teacher.

    Returns:
        An objective whose variables are `params` ("student" and "beside"), `batch_stats` of the student, and "teacher".
    """

    def objective(params: PyTree, variables: PyTree, images: Array, targets: dict[str, Array], key: Key) -> Outcome:
        del key
        told = teacher.apply(variables["teacher"], images, train=statistics == "batch")
        own = student.apply({"params": params["student"], "batch_stats": variables["batch_stats"]}, images, train=True)
        loss = method.loss(params["beside"], own, told, targets["labels"])
        after = {**variables, "batch_stats": own.variables["batch_stats"]}
        return Outcome(loss, own.logits, targets["labels"], after)

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
        name: of the method, for its checkpoints.
        settings: of the student.
        method: what it minimises.
        teachers: whom it learns from; None for the attacked networks.
        rows: leaves [M, n]; None for all clean rows.
        student: its architecture; None for that of the settings.
        role: students of one role have the same first weights and batches, whatever their method.

    Returns:
        The students.
    """
    teachers = teachers or TeacherNetworks(inputs.attacked.model, inputs.attacked.variables)
    student = student or inputs.make_model(settings.student)
    start = inputs.begin(role, student)
    beside = ensemble.init_members(method.init, inputs.keys_for(f"{role}: beside")) if method.init else {}
    variables = {
        "params": {"student": start["params"], "beside": beside},
        "batch_stats": start["batch_stats"],
        "teacher": teachers.variables,
    }
    nets = inputs.runner.from_variables(
        f"{name} {student.description.split()[0]} {fingerprint(**vars(settings))}",
        student,
        student_config(inputs, settings),
        variables,
        inputs.keys_for(f"{role}: shuffles"),
        1,
        inputs.pool,
        inputs.clean_rows() if rows is None else rows,
        student_objective(student, teachers.model, method, settings.teacher_statistics),
    )
    trained = {"params": nets.variables["params"]["student"], "batch_stats": nets.variables["batch_stats"]}
    return DefenseResult(student, trained)


def student_network(
    settings: StudentSettings, attacked: Model, make_model: Callable[..., Model], image_shape: tuple[int, int, int]
) -> Model:
    """For `Defense.network_after`: the student, where it may be any network."""
    del attacked, image_shape
    return make_model(settings.student)


def student_config(inputs: DefenseInput, settings: StudentSettings) -> TrainConfig:
    """SGD with Nesterov momentum, its rate cut to a tenth at each drop. Momentum goes on over a drop; FKD's public code
    forgets it there."""
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
    """Refuse settings that no student can be trained with.

    Args:
        owner: whose they are: "defense fkd".
        settings: of the student.

    Raises:
        InputError: naming the setting.
    """
    check_values(
        owner,
        settings,
        choices={"student": MODELS, "teacher_statistics": Statistics.__args__},
        at_least={"epochs": 1, "batch_size": 1, "weight_decay": 0},
        above={"learning_rate": 0},
    )
    if list(settings.drops) != sorted(settings.drops) or not all(0 < share < 1 for share in settings.drops):
        raise InputError(f"{owner}: drops {settings.drops} is not one of shares between 0 and 1 in rising order")

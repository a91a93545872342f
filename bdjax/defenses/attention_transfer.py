"""Attention transfer (Zagoruyko & Komodakis 2017): the student learns labels, and to look where the teacher looks.

The attention maps are those of `attention.py`, at every tap; NAD uses them between two networks of one architecture.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

from bdjax import losses
from bdjax.defenses import attention
from bdjax.defenses.contract import Defense, DefenseInput
from bdjax.defenses.distillation import QUICK, QUICK_DIGITS, Method, StudentSettings, check_student, distil
from bdjax.errors import InputError
from bdjax.models import tap_shapes
from bdjax.settings import check_values
from bdjax.types import Array, DefenseResult, Model, ModelOutput, PyTree


@dataclass(frozen=True)
class AttentionTransferSettings(StudentSettings):
    beta: float = 1000.0
    """weight of each tap's attention loss, a mean square over the pixels of maps of norm 1"""
    power: float = 2.0
    """p, of the attention maps"""


@cache
def attention_transfer(taps: int, beta: float, power: float) -> Method:
    """The method, for `bdjax.defenses.distillation`.

    Args:
        taps: of each network.
        beta: see the settings.
        power: likewise.
    """

    def loss(beside: PyTree, student: ModelOutput, teacher: ModelOutput, labels: Array) -> Array:
        del beside
        maps = [list(output.features.values()) for output in (student, teacher)]
        distance = attention.distillation_loss(*maps, (beta,) * taps, power)
        return losses.cross_entropy(student.logits, labels) + distance

    return Method(loss)


def count_taps(teacher: Model, student: Model, image_shape: tuple[int, int, int]) -> int:
    """How many taps both networks have.

    Raises:
        InputError: they have not equally many, of equal heights and widths.
    """
    sizes = [[shape[:2] for shape in tap_shapes(model, image_shape).values()] for model in (teacher, student)]
    if sizes[0] != sizes[1]:
        told = [" ".join(f"{height}x{width}" for height, width in each) for each in sizes]
        raise InputError(
            f"taps of {teacher.description} have {told[0]} pixels, those of {student.description} {told[1]}: attention is "
            "transferred between maps of one size"
        )
    return len(sizes[0])


def network_after(
    settings: AttentionTransferSettings,
    attacked: Model,
    make_model: Callable[..., Model],
    image_shape: tuple[int, int, int],
) -> Model:
    """The student, if its maps are of the teacher's sizes."""
    student = make_model(settings.student)
    count_taps(attacked, student, image_shape)
    return student


def check(settings: AttentionTransferSettings) -> None:
    """Refuse what cannot be."""
    check_student("defense attention_transfer", settings)
    check_values("defense attention_transfer", settings, at_least={"beta": 0}, above={"power": 0})


def run(inputs: DefenseInput, settings: AttentionTransferSettings) -> DefenseResult:
    """Distil the attacked networks."""
    taps = count_taps(inputs.attacked.model, inputs.make_model(settings.student), inputs.runner.image_shape)
    return distil(inputs, "attention transfer", settings, attention_transfer(taps, settings.beta, settings.power))


ATTENTION_TRANSFER = Defense(
    name="attention_transfer",
    title="attention transfer",
    paper="Zagoruyko and Komodakis 2017, Paying More Attention to Attention",
    stage="after training",
    needs=("attacked model", "clean rows"),
    settings=AttentionTransferSettings(),
    run=run,
    check=check,
    network_after=network_after,
    # The mean square of maps of norm 1 is 16 times as large with 8x8 pixels as with 32x32.
    changes={"quick": QUICK, "quick digits": {**QUICK_DIGITS, "beta": 60.0}},
)

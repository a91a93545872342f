"""Attention transfer (Zagoruyko & Komodakis 2017): the student learns the labels and the teacher's attention maps.

The maps are those of `attention.py`, at every tap; NAD uses them between two networks of the same architecture.
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
from bdjax.settings import NotNegative, Positive
from bdjax.types import Array, DefenseResult, Model, ModelOutput, PyTree


@dataclass(frozen=True)
class AttentionTransferSettings(StudentSettings):
    beta: NotNegative = 1000.0
    """weight of each tap's attention loss, a mean square over the pixels of maps of norm 1"""
    power: Positive = 2.0
    """p, exponent of the features in the attention maps"""


@cache
def attention_transfer(taps: int, beta: float, power: float) -> Method:
    """The method, for `bdjax.defenses.distillation`.

    Args:
        taps: number of taps of each network.
        beta: see `AttentionTransferSettings`.
        power: see `AttentionTransferSettings`.
    """

    def loss(extra: PyTree, student: ModelOutput, teacher: ModelOutput, labels: Array) -> Array:
        del extra
        maps = [list(output.features.values()) for output in (student, teacher)]
        distance = attention.distillation_loss(*maps, (beta,) * taps, power)
        return losses.cross_entropy(student.logits, labels) + distance

    return Method(loss)


def count_taps(teacher: Model, student: Model, image_shape: tuple[int, int, int]) -> int:
    """The number of taps of both networks.

    Raises:
        InputError: the networks' taps differ in number, height or width.
    """
    sizes = [[shape[:2] for shape in tap_shapes(model, image_shape).values()] for model in (teacher, student)]
    if sizes[0] != sizes[1]:
        text = [" ".join(f"{height}x{width}" for height, width in taps) for taps in sizes]
        raise InputError(
            f"the taps of {teacher.description} have {text[0]} pixels, those of {student.description} {text[1]}: attention "
            "transfer needs maps of equal size"
        )
    return len(sizes[0])


def network_after(
    settings: AttentionTransferSettings,
    attacked: Model,
    make_model: Callable[..., Model],
    image_shape: tuple[int, int, int],
) -> Model:
    """For `Defense.network_after`: the student, if its maps have the teacher's sizes."""
    student = make_model(settings.student)
    count_taps(attacked, student, image_shape)
    return student


def check(settings: AttentionTransferSettings) -> None:
    """Validate the settings.

    Raises:
        InputError: a setting is invalid.
    """
    check_student("defense attention_transfer", settings)


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
    # The mean square of maps of norm 1 is 16 times as large for 8x8 pixels as for 32x32.
    changes={"quick": QUICK, "quick digits": {**QUICK_DIGITS, "beta": 60.0}},
)

"""FKD, feature distillation before the ReLU ("A Comprehensive Overhaul of Feature Distillation", Heo et al. 2019).

Students learn labels, and the features at the end of each group of blocks, where they have not gone through the ReLU yet, so
that what lies below zero is seen as well:

    L = CE(z_S, y) + 1/1000 sum over groups l = 1..L of 2^(l - L) d_l(max(t_l, m_l), r_l(s_l))

The teacher's features t_l are cut off below at a margin m_l, each channel's expected value where it is negative (section
3.1); regressors r_l, 1x1 convolutions with batch normalisation, bring the student's s_l to the teacher's channels and are
thrown away (3.2); the partial L2 distance d_l asks nothing where the teacher is not positive and the student is below it
(3.4). Nothing in it asks whether the teacher can be trusted: a backdoor that lives in those features is handed on.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial

import jax
import jax.numpy as jnp
from jax.scipy import stats

from bdjax import losses
from bdjax.defenses import distillation
from bdjax.defenses.contract import Defense, DefenseInput
from bdjax.defenses.distillation import Method, StudentSettings, TeacherNetworks, check_student, distil
from bdjax.errors import InputError
from bdjax.models import group_shapes
from bdjax.models.layers import he_fan_out, normalise_batch
from bdjax.settings import check_values
from bdjax.types import Array, DefenseResult, GroupEnd, Key, Model, ModelOutput, PyTree

FEWEST_NEGATIVE = 1e-3
"""Below this share of negative values a channel's margin is not its expected negative value but -3 deviations."""


@dataclass(frozen=True)
class FkdSettings(StudentSettings):
    divisor: float = 1000.0
    """of the features' distances, which are sums over all pixels and channels: small networks need a smaller one"""


def margins(mean: Array, deviation: Array) -> Array:
    """The expected value of a normal variable given that it is negative; where it hardly ever is, -3 deviations.

    m = mu - sigma phi(mu / sigma) / Phi(-mu / sigma), from the shift mu and the scale |sigma| of the batch normalisation
    that the features come from. The fall-back leaves mu out, as the authors' code does.

    Args:
        mean: float32 [C].
        deviation: float32 [C], at least 0.

    Returns:
        float32 [C].

    References:
        Heo et al. 2019, section 3.1, equation 3; the form of the authors' public code.
    """
    ratio = mean / jnp.maximum(deviation, 1e-12)
    negative = stats.norm.cdf(-ratio)
    usual = mean - deviation * stats.norm.pdf(ratio) / jnp.maximum(negative, FEWEST_NEGATIVE)
    return jnp.where(negative > FEWEST_NEGATIVE, usual, -3.0 * deviation)


def partial_l2(student: Array, teacher: Array) -> Array:
    """(s - t)^2, but 0 where t <= 0 and s <= t (equation 5): elementwise, float32 arrays of one shape."""
    counts = (student > teacher) | (teacher > 0)
    return jnp.where(counts, jnp.square(student - teacher), 0.0)


def regress(params: Mapping[str, Array], features: Array) -> Array:
    """A 1x1 convolution without bias, and batch normalisation by the batch's statistics.

    Args:
        params: "kernel" float32 [C, D], "scale" and "bias" float32 [D].
        features: float32 [N, h, w, C].

    Returns:
        float32 [N, h, w, D].
    """
    projected = jax.lax.dot_general(features, params["kernel"], (((3,), (0,)), ((), ())))
    return normalise_batch(projected, params["scale"], params["bias"], 3, 1e-5)[0]


def init_regressors(key: Key, channels: tuple[tuple[int, int], ...]) -> list[dict[str, Array]]:
    """Fresh regressors: normal kernels of variance 2 / (teacher's channels), scale 1, bias 0.

    Args:
        key: a key of `jax.random.key`.
        channels: for each group, the student's and the teacher's.
    """
    return [
        {"kernel": he_fan_out(one, pair, jnp.float32), "scale": jnp.ones(pair[1]), "bias": jnp.zeros(pair[1])}
        for one, pair in zip(jax.random.split(key, len(channels)), channels, strict=True)
    ]


def feature_distance(
    regressors: list[dict[str, Array]], student: Mapping[str, GroupEnd], teacher: Mapping[str, GroupEnd]
) -> Array:
    """sum over groups l of 2^(l - L) times the sum of `partial_l2` over an image's pixels and channels.

    Args:
        regressors: one for each group.
        student: groups in the order of the network.
        teacher: as many.

    Returns:
        float32 [N], at least 0.

    References:
        Heo et al. 2019, equation 6; the weights are those of the authors' public code.
    """
    pairs = list(zip(regressors, student.values(), teacher.values(), strict=True))
    total = jnp.zeros(pairs[0][1].before_relu.shape[0], jnp.float32)
    for number, (params, own, told) in enumerate(pairs, start=1):
        wanted = jnp.maximum(told.before_relu, margins(told.mean, told.deviation)[None, None, None, :])
        distance = jnp.sum(partial_l2(regress(params, own.before_relu), wanted), axis=(1, 2, 3))
        total += 2.0 ** (number - len(pairs)) * distance
    return total


@cache
def feature_distillation(channels: tuple[tuple[int, int], ...], divisor: float) -> Method:
    """FKD as a method of `bdjax.defenses.distillation`.

    Args:
        channels: for each group, the student's and the teacher's.
        divisor: see `FkdSettings`.
    """

    def loss(beside: PyTree, student: ModelOutput, teacher: ModelOutput, labels: Array) -> Array:
        distance = feature_distance(beside, student.groups, teacher.groups)
        return losses.cross_entropy(student.logits, labels) + distance / divisor

    return Method(loss, partial(init_regressors, channels=channels))


def pair_channels(teacher: Model, student: Model, image_shape: tuple[int, int, int]) -> tuple[tuple[int, int], ...]:
    """For each group, the channels of the student's and of the teacher's features before the ReLU.

    Args:
        teacher: its architecture.
        student: likewise.
        image_shape: (H, W, C).

    Raises:
        InputError: a network has no groups, or the two have not equally many, of equal heights and widths.
    """
    of_teacher, of_student = group_shapes(teacher, image_shape), group_shapes(student, image_shape)
    for model, groups in ((teacher, of_teacher), (student, of_student)):
        if not groups:
            raise InputError(
                f"{model.description} has no features before a ReLU to distil: take a WRN, a ResNet or a PyramidNet"
            )
    sizes = [[before_relu[:2] for _, before_relu in groups.values()] for groups in (of_teacher, of_student)]
    if sizes[0] != sizes[1]:
        told = [" ".join(f"{height}x{width}" for height, width in each) for each in sizes]
        raise InputError(
            f"groups of {teacher.description} end at {told[0]} pixels, those of {student.description} at {told[1]}: "
            "features are distilled between groups of one size"
        )
    return tuple((s[1][2], t[1][2]) for s, t in zip(of_student.values(), of_teacher.values(), strict=True))


def student_of_pair(
    settings: FkdSettings, attacked: Model, make_model: Callable[..., Model], image_shape: tuple[int, int, int]
) -> Model:
    """For `Defense.network_after`: the student, if features can be distilled into it."""
    student = make_model(settings.student)
    pair_channels(attacked, student, image_shape)
    return student


def run_from(
    inputs: DefenseInput, name: str, settings: FkdSettings, teachers: TeacherNetworks | None = None, **how: object
) -> DefenseResult:
    """FKD from some teachers: what `run` does with the attacked networks, and RobustKD with masked ones."""
    teacher = teachers.model if teachers else inputs.attacked.model
    channels = pair_channels(teacher, inputs.make_model(settings.student), inputs.runner.image_shape)
    method = feature_distillation(channels, settings.divisor)
    return distil(inputs, name, settings, method, teachers, **how)


def check(settings: FkdSettings) -> None:
    """Refuse what cannot be."""
    check_student("defense fkd", settings)
    check_values("defense fkd", settings, above={"divisor": 0})


def run(inputs: DefenseInput, settings: FkdSettings) -> DefenseResult:
    """Distil the attacked networks."""
    return run_from(inputs, "FKD", settings)


QUICK = {**distillation.QUICK, "divisor": 100.0}
QUICK_DIGITS = {**distillation.QUICK_DIGITS, "divisor": 10.0}

FKD = Defense(
    name="fkd",
    title="FKD",
    paper="Heo et al. 2019, A Comprehensive Overhaul of Feature Distillation",
    stage="after training",
    needs=("attacked model", "clean rows"),
    settings=FkdSettings(),
    run=run,
    check=check,
    network_after=student_of_pair,
    changes={"quick": QUICK, "quick digits": QUICK_DIGITS},
)

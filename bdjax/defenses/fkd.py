"""FKD, feature distillation before the ReLU ("A Comprehensive Overhaul of Feature Distillation", Heo et al. 2019).

Students learn the labels and the teacher's features at the end of each group of blocks, taken before the ReLU so that negative
values are included:

    L = CE(z_S, y) + 1/1000 sum over groups l = 1..L of 2^(l - L) d_l(max(t_l, m_l), r_l(s_l))

The distances d_l are sums over pixels and channels, so 1/1000 fits the paper's networks only. Here the sum is a mean over the
weighted elements times 49.152, which is the same at the paper's size (`divisor_of`).

The teacher's features t_l are clipped from below at a margin m_l, each channel's expected value given that it is negative
(section 3.1); regressors r_l, 1x1 convolutions with batch normalisation, map the student's s_l to the teacher's channels and
are discarded after training (3.2); the partial L2 distance d_l is 0 where the teacher is not positive and the student is below
it (3.4). The method trusts the teacher: a backdoor in these features is transferred to the student.
"""

import math
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
from bdjax.settings import NotNegative
from bdjax.training.member import Rows
from bdjax.types import Array, DefenseResult, GroupEnd, Key, Model, ModelOutput, PyTree

FEWEST_NEGATIVE = 1e-3
"""If a channel has a smaller share of negative values, its margin is -3 deviations instead of the expected negative value."""

DISTANCE_WEIGHT = 49.152
"""Weight of the mean distance of a weighted element: a WRN-28-4 on 32x32 images has 49,152 of them, and FKD's code divides by
1,000."""


@dataclass(frozen=True)
class FkdSettings(StudentSettings):
    divisor: NotNegative = 0.0
    """divisor of the feature distances, which are sums over all pixels and channels; 0 for the one that suits the teacher's
    size, which is the paper's 1000 for a WRN-28-4 on 32x32 images"""


def margins(mean: Array, deviation: Array) -> Array:
    """The expected value of a normal variable given that it is negative, or -3 deviations if it hardly ever is.

    m = mu - sigma phi(mu / sigma) / Phi(-mu / sigma), where mu and |sigma| are the shift and the scale of the batch
    normalisation that the features come from. The fallback ignores mu, as in the authors' code.

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
    """Initial regressors: normal kernels of variance 2 / (teacher's channels), scale 1, bias 0.

    Args:
        key: a typed key.
        channels: for each group, the numbers of the student's and of the teacher's channels.
    """
    return [
        {"kernel": he_fan_out(group_key, pair, jnp.float32), "scale": jnp.ones(pair[1]), "bias": jnp.zeros(pair[1])}
        for group_key, pair in zip(jax.random.split(key, len(channels)), channels, strict=True)
    ]


def feature_distance(
    regressors: list[dict[str, Array]], student: Mapping[str, GroupEnd], teacher: Mapping[str, GroupEnd]
) -> Array:
    """sum over groups l of 2^(l - L) times the sum of `partial_l2` over an image's pixels and channels.

    Args:
        regressors: one for each group.
        student: the student's groups, in the order of the network.
        teacher: the teacher's groups, the same number.

    Returns:
        float32 [N], at least 0.

    References:
        Heo et al. 2019, equation 6; the weights are those of the authors' public code.
    """
    pairs = list(zip(regressors, student.values(), teacher.values(), strict=True))
    total = jnp.zeros(pairs[0][1].before_relu.shape[0], jnp.float32)
    for weight, (params, student_end, teacher_end) in zip(group_weights(len(pairs)), pairs, strict=True):
        margin = margins(teacher_end.mean, teacher_end.deviation)[None, None, None, :]
        wanted = jnp.maximum(teacher_end.before_relu, margin)
        distance = jnp.sum(partial_l2(regress(params, student_end.before_relu), wanted), axis=(1, 2, 3))
        total += weight * distance
    return total


def group_weights(count: int) -> tuple[float, ...]:
    """2^(l - L) for l = 1..L: (0.25, 0.5, 1.0) for three groups."""
    return tuple(2.0 ** (number - count) for number in range(1, count + 1))


def divisor_of(teacher: Mapping[str, GroupEnd]) -> float:
    """The divisor that gives a `feature_distance` the weight that it has in the paper: 1000 for a WRN-28-4 on 32x32 images.

    sum over groups l of 2^(l - L) h_l w_l C_l / 49.152, so that the distance is a mean over weighted elements times 49.152.

    Args:
        teacher: the teacher's groups; only their shapes are used.
    """
    shapes = [end.before_relu.shape[1:] for end in teacher.values()]
    weighted = zip(group_weights(len(shapes)), shapes, strict=True)
    return sum(weight * math.prod(shape) for weight, shape in weighted) / DISTANCE_WEIGHT


@cache
def feature_distillation(channels: tuple[tuple[int, int], ...], divisor: float) -> Method:
    """FKD as a method of `bdjax.defenses.distillation`.

    Args:
        channels: for each group, the numbers of the student's and of the teacher's channels.
        divisor: see `FkdSettings`.
    """

    def loss(regressors: PyTree, student: ModelOutput, teacher: ModelOutput, labels: Array) -> Array:
        distance = feature_distance(regressors, student.groups, teacher.groups)
        return losses.cross_entropy(student.logits, labels) + distance / (divisor or divisor_of(teacher.groups))

    return Method(loss, partial(init_regressors, channels=channels))


def pair_channels(teacher: Model, student: Model, image_shape: tuple[int, int, int]) -> tuple[tuple[int, int], ...]:
    """For each group, the numbers of channels of the student's and of the teacher's features before the ReLU.

    Args:
        teacher: the teacher's architecture.
        student: the student's architecture.
        image_shape: (H, W, C).

    Raises:
        InputError: a network has no groups, or the networks' groups differ in number, height or width.
    """
    teacher_groups, student_groups = group_shapes(teacher, image_shape), group_shapes(student, image_shape)
    for model, groups in ((teacher, teacher_groups), (student, student_groups)):
        if not groups:
            raise InputError(
                f"{model.description} has no features before a ReLU to distil: take a WRN, a ResNet or a PyramidNet"
            )
    sizes = [[before_relu[:2] for _, before_relu in groups.values()] for groups in (teacher_groups, student_groups)]
    if sizes[0] != sizes[1]:
        text = [" ".join(f"{height}x{width}" for height, width in groups) for groups in sizes]
        raise InputError(
            f"the groups of {teacher.description} end at {text[0]} pixels, those of {student.description} at {text[1]}: "
            "feature distillation needs groups of equal size"
        )
    return tuple((s[1][2], t[1][2]) for s, t in zip(student_groups.values(), teacher_groups.values(), strict=True))


def student_of_pair(
    settings: FkdSettings, attacked: Model, make_model: Callable[..., Model], image_shape: tuple[int, int, int]
) -> Model:
    """For `Defense.network_after`: the student, if its groups have the teacher's sizes."""
    student = make_model(settings.student)
    pair_channels(attacked, student, image_shape)
    return student


def run_from(
    inputs: DefenseInput,
    name: str,
    settings: FkdSettings,
    teachers: TeacherNetworks | None = None,
    rows: Rows | None = None,
) -> DefenseResult:
    """FKD from any teachers, for RobustKD too; the arguments are those of `distil`."""
    teacher = teachers.model if teachers else inputs.attacked.model
    channels = pair_channels(teacher, inputs.make_model(settings.student), inputs.runner.image_shape)
    method = feature_distillation(channels, settings.divisor)
    return distil(inputs, name, settings, method, teachers, rows)


def check(settings: FkdSettings) -> None:
    """Validate the settings.

    Raises:
        InputError: a setting is invalid.
    """
    check_student("defense fkd", settings)


def run(inputs: DefenseInput, settings: FkdSettings) -> DefenseResult:
    """Distil the attacked networks."""
    return run_from(inputs, "FKD", settings)


PAPER = {"divisor": 1000.0}
"""The public code's divisor whatever the teacher; for PyramidNets it differs from `divisor_of`."""

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
    changes={"paper": PAPER, "quick": distillation.QUICK, "quick digits": distillation.QUICK_DIGITS},
)

"""Losses, per example and unreduced: the caller averages, masks, weights or ranks them.

Logits are float [N, K], labels int32 [N], results float [N], in nats.
"""

import jax
import jax.numpy as jnp

from bdjax.choices import Direction
from bdjax.types import Array


def cross_entropy(logits: Array, labels: Array, smoothing: float = 0.0) -> Array:
    """Cross-entropy with integer labels (Heydari et al. 2025, equation 4).

    Args:
        logits: float [N, K].
        labels: int32 [N], in 0..K-1.
        smoothing: in [0, 1]: the share of the target that is spread evenly over all K classes (Szegedy et al. 2016).

    Returns:
        float [N].
    """
    log_probabilities = jax.nn.log_softmax(logits)
    of_label = -jnp.take_along_axis(log_probabilities, labels[:, None], axis=1)[:, 0]
    if not smoothing:
        return of_label
    return (1 - smoothing) * of_label - smoothing * jnp.mean(log_probabilities, axis=1)


def kl_divergence(log_p: Array, log_q: Array) -> Array:
    """KL(p || q), computed from log-probabilities for numerical stability.

    Args:
        log_p: float [N, K], log-probabilities.
        log_q: float [N, K], log-probabilities.

    Returns:
        float [N], at least 0.
    """
    return jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=1)


def distillation(
    student_logits: Array,
    teacher_logits: Array,
    labels: Array,
    *,
    temperature: float,
    alpha: float,
    direction: Direction = "teacher_student",
) -> Array:
    """alpha T^2 KL + (1 - alpha) CE: the loss of the Teacher-Aggregation model and of the student.

    Equation 3 of the paper prints the student first, KL(student || teacher); the authors' public code computes Hinton's
    direction, KL(teacher || student), which is the default here.

    Args:
        student_logits: float [N, K], differentiated.
        teacher_logits: float [N, K].
        labels: int32 [N].
        temperature: T > 0.
        alpha: weight of the soft term, in [0, 1].
        direction: "teacher_student" is KL(teacher || student), "student_teacher" the reverse.

    Returns:
        float [N].

    References:
        Heydari et al. 2025, equations 3-6; Hinton et al. 2015.
    """
    teacher = jax.nn.log_softmax(teacher_logits / temperature)
    student = jax.nn.log_softmax(student_logits / temperature)
    if direction == "teacher_student":
        divergence = kl_divergence(teacher, student)
    elif direction == "student_teacher":
        divergence = kl_divergence(student, teacher)
    else:
        raise ValueError(f"direction {direction!r} is not one of 'teacher_student', 'student_teacher'")
    return alpha * temperature**2 * divergence + (1 - alpha) * cross_entropy(student_logits, labels)


def feature_variance(features: Array) -> Array:
    """Each row's biased variance over all elements of its feature map, which RobustKD uses as a sign of a backdoor.

    The paper writes Var(F) without saying over which axes. A variance across the batch would not depend on a mask that is the
    same for every row, so no mask could lower it; and the paper's figure 2 has one value per image.

    Args:
        features: float32 [N, h, w, c].

    Returns:
        float32 [N], at least 0.

    References:
        RobustKD, equation 8 and figure 2.
    """
    return jnp.var(features, axis=(1, 2, 3))

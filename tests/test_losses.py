import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bdjax.losses import cross_entropy, distillation, feature_variance, kl_divergence

DIRECTIONS = ("teacher_student", "student_teacher")
TEACHER = jnp.asarray([[4.0, 0.0, -2.0]])
STUDENT = jnp.asarray([[1.0, 1.0, 0.0]])
LABEL = jnp.asarray([0], jnp.int32)
distil = jax.jit(distillation, static_argnames="direction")
entropy, divergence_of, variance_of = map(jax.jit, (cross_entropy, kl_divergence, feature_variance))
log_softmax = jax.jit(jax.nn.log_softmax)


def draw(seed, rows=6, classes=5, spread=3.0):
    random = np.random.default_rng(seed)
    student, teacher = jnp.asarray(spread * random.standard_normal((2, rows, classes)), jnp.float32)
    return student, teacher, jnp.asarray(random.integers(0, classes, rows), jnp.int32)


def softmax(x):
    e = np.exp(np.asarray(x, np.float64) - np.max(x, axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def plain(student, teacher, labels, temperature, alpha, direction):
    """The equations as printed, in float64."""
    p, q = softmax(np.asarray(teacher) / temperature), softmax(np.asarray(student) / temperature)
    if direction == "student_teacher":
        p, q = q, p
    divergence = np.sum(p * np.log(p / q), axis=1)
    entropy = -np.log(softmax(student)[np.arange(len(labels)), np.asarray(labels)])
    return alpha * temperature**2 * divergence + (1 - alpha) * entropy


# ---- Golden values and the equations --------------------------------------------------------------------------------


def test_golden_values():
    def loss(alpha, direction="teacher_student"):
        return float(distillation(STUDENT, TEACHER, LABEL, temperature=4.0, alpha=alpha, direction=direction)[0])

    assert loss(1.0) == pytest.approx(2.4179408, abs=2e-6)
    assert loss(1.0, "student_teacher") == pytest.approx(2.4407700, abs=4e-6)
    assert loss(0.0) == pytest.approx(0.8619948, abs=1e-6)
    assert loss(0.5) == pytest.approx(1.6399678, abs=2e-6)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_the_equations(temperature, direction):
    for seed, alpha in enumerate((0.0, 0.3, 1.0)):
        student, teacher, labels = draw(seed)
        compiled = distil(student, teacher, labels, temperature=temperature, alpha=alpha, direction=direction)
        chex.assert_shape(compiled, (6,))
        chex.assert_type(compiled, jnp.float32)
        expected = plain(student, teacher, labels, temperature, alpha, direction)
        np.testing.assert_allclose(compiled, expected, rtol=1e-4, atol=1e-5)


def test_smoothing_spreads_a_share_of_the_target_over_all_classes():
    student, _, labels = draw(0)
    smoothed = jax.jit(cross_entropy, static_argnums=2)(student, labels, 0.2)
    target = 0.8 * np.eye(5)[np.asarray(labels)] + 0.2 / 5
    np.testing.assert_allclose(smoothed, -np.sum(target * np.log(softmax(student)), axis=1), rtol=1e-5)


def test_cross_entropy_and_divergence_do_not_overflow():
    logits = jnp.asarray([[200.0, -200.0, 0.0], [-300.0, 300.0, 0.0]])
    np.testing.assert_allclose(entropy(logits, jnp.asarray([1, 1], jnp.int32)), [400.0, 0.0])
    log_p = log_softmax(logits)
    divergence = divergence_of(log_p, np.asarray(log_p)[::-1])
    chex.assert_tree_all_finite(divergence)
    np.testing.assert_allclose(divergence, [600.0, 400.0], rtol=1e-6)
    gradient = jax.jit(
        jax.grad(lambda x: jnp.sum(distil(x, TEACHER + 0 * x, jnp.zeros(2, jnp.int32), temperature=1.0, alpha=0.5)))
    )
    chex.assert_tree_all_finite(gradient(logits))


@pytest.mark.parametrize("seed", range(5))
def test_a_divergence_is_not_negative_and_is_zero_only_between_equals(seed):
    student, teacher, _ = draw(seed)
    log_p, log_q = log_softmax(student), log_softmax(teacher)
    assert np.all(np.asarray(divergence_of(log_p, log_q)) > 1e-3)
    np.testing.assert_allclose(divergence_of(log_p, log_softmax(np.asarray(student) + 7)), 0, atol=1e-5)


# ---- Limits and rows ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_alpha_goes_from_the_labels_to_the_teacher(direction):
    student, teacher, labels = draw(0)
    options = {"temperature": 2.0, "direction": direction}
    labels_only = distil(student, teacher, labels, alpha=0.0, **options)
    chex.assert_trees_all_close(labels_only, entropy(student, labels))
    chex.assert_trees_all_equal(labels_only, distil(student, -teacher, labels, alpha=0.0, **options))
    teacher_only = distil(student, teacher, labels, alpha=1.0, **options)
    chex.assert_trees_all_equal(teacher_only, distil(student, teacher, (labels + 1) % 5, alpha=1.0, **options))
    halfway = distil(student, teacher, labels, alpha=0.5, **options)
    chex.assert_trees_all_close(halfway, 0.5 * (labels_only + teacher_only), rtol=1e-5)


def test_the_two_directions_differ():
    student, teacher, labels = draw(1)
    forward, reverse = (
        distil(student, teacher, labels, temperature=1.0, alpha=1.0, direction=direction) for direction in DIRECTIONS
    )
    assert np.abs(forward - reverse).max() > 0.1
    swapped = distil(teacher, student, labels, temperature=1.0, alpha=1.0, direction="student_teacher")
    chex.assert_trees_all_close(forward, swapped)


def test_an_unknown_direction_is_an_error():
    with pytest.raises(ValueError, match="direction 'both' is not one of 'teacher_student', 'student_teacher'"):
        distillation(STUDENT, TEACHER, LABEL, temperature=1.0, alpha=1.0, direction="both")


def test_each_row_may_have_its_own_alpha():
    student, teacher, labels = draw(2)
    alpha = np.linspace(0, 1, 6, dtype=np.float32)
    together = distil(student, teacher, labels, temperature=3.0, alpha=alpha)
    alone = [
        distil(student[i : i + 1], teacher[i : i + 1], labels[i : i + 1], temperature=3.0, alpha=float(alpha[i]))
        for i in range(6)
    ]
    np.testing.assert_allclose(together, np.concatenate(alone), rtol=1e-5)


def test_masking_the_losses_is_losing_the_rows():
    student, teacher, labels = map(np.asarray, draw(3, rows=9))
    mask = np.array([1, 0, 0, 1, 1, 0, 1, 0, 1], bool)
    kept = distil(student[mask], teacher[mask], labels[mask], temperature=3.0, alpha=0.4)
    chex.assert_trees_all_close(distil(student, teacher, labels, temperature=3.0, alpha=0.4)[mask], kept, rtol=1e-6)
    chex.assert_trees_all_close(entropy(student, labels)[mask], entropy(student[mask], labels[mask]), rtol=1e-6)


# ---- Gradients ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_the_gradient_of_a_student_equal_to_its_teacher_is_zero(direction):
    student, _, labels = draw(4)

    @jax.jit
    def gradient(student, teacher):
        options = {"temperature": 4.0, "alpha": 1.0, "direction": direction}
        return jax.grad(lambda x: jnp.sum(distil(x, teacher, labels, **options)))(student)

    np.testing.assert_allclose(gradient(student, student), 0, atol=1e-5)
    np.testing.assert_allclose(gradient(student, student + 3.0), 0, atol=1e-5)  # softmax is invariant to a shift
    assert np.abs(gradient(student, -student)).max() > 0.1


def test_the_gradient_in_closed_form():
    student, teacher, labels = draw(5)
    gradient = jax.jit(jax.grad(lambda x: jnp.sum(distil(x, teacher, labels, temperature=4.0, alpha=0.3))))(student)
    soft = 0.3 * 4.0 * (softmax(student / 4.0) - softmax(teacher / 4.0))  # T^2 times 1/T from the chain rule
    hard = 0.7 * (softmax(student) - np.eye(5)[labels])
    np.testing.assert_allclose(gradient, soft + hard, atol=1e-5)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_the_gradient_against_finite_differences(direction):
    student, teacher, labels = draw(6, spread=1.5)
    gradient = np.asarray(
        jax.grad(lambda x: jnp.sum(distil(x, teacher, labels, temperature=2.0, alpha=0.6, direction=direction)))(
            student
        )
    )
    measured = np.zeros_like(gradient)
    for place in np.ndindex(measured.shape):
        nudge = np.zeros(measured.shape)
        nudge[place] = 1e-5
        ahead, behind = (
            plain(np.asarray(student, np.float64) + sign * nudge, teacher, labels, 2.0, 0.6, direction).sum()
            for sign in (1, -1)
        )
        measured[place] = (ahead - behind) / 2e-5
    np.testing.assert_allclose(gradient, measured, atol=1e-4)


def test_feature_variance_is_of_each_rows_elements_and_biased():
    # One row of (1, 2, 3, 6): mean 3, squared deviations 4, 1, 0, 9, of 4 elements; a constant row; a row of +-1.
    rows = jnp.asarray([[1.0, 2.0, 3.0, 6.0], [7.0] * 4, [1.0, -1.0, 1.0, -1.0]]).reshape(3, 2, 1, 2)
    np.testing.assert_allclose(variance_of(rows), [3.5, 0.0, 1.0], rtol=1e-6)
    np.testing.assert_allclose(variance_of(3.0 * rows + 5.0), [31.5, 0.0, 9.0], rtol=1e-6)
    assert variance_of(rows).dtype == jnp.float32


def test_the_gradient_of_feature_variance_is_the_deviation_from_the_rows_own_mean():
    rows = jnp.asarray(np.random.default_rng(0).normal(size=(3, 2, 2, 5)), jnp.float32)
    gradient = jax.jit(jax.grad(lambda x: jnp.sum(variance_of(x))))(rows)
    deviation = np.asarray(rows) - np.asarray(rows).mean(axis=(1, 2, 3), keepdims=True)
    np.testing.assert_allclose(gradient, 2.0 / 20 * deviation, atol=1e-6)

"""ABM: the golden number of equation 4, its limits, and that the attacked network does not change."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from bdjax.datasets.digits import load_digits
from bdjax.defenses.abm import (
    ABM,
    AbmSettings,
    affordable_delta,
    average_activation,
    corrected,
    defended_model,
    doubts,
    imitation,
    run,
    train_student,
)
from bdjax.testing.small_network import small_model
from tests.defenses.conftest import init_small

SMALL = AbmSettings(
    alpha=0.0, epochs=3, optimiser="adam", learning_rate=1e-2, implant_rate=0.2, isolation_rate=0.1, student_epochs=2
)


def test_golden_output():
    teacher, student, average = jnp.array([[5.0, 1.0]]), jnp.array([[4.0, 0.0]]), jnp.array([3.0, 3.0])
    np.testing.assert_allclose(corrected(teacher, student, average, gamma=0.8, delta=2.5), [[1.0, 1.0]], rtol=1e-6)


@pytest.mark.parametrize(("gamma", "delta"), [(0.8, 0.0), (1e9, 2.5)])
def test_nothing_is_subtracted_without_delta_or_with_a_threshold_out_of_reach(gamma, delta):
    teacher, student = np.random.default_rng(0).standard_normal((2, 5, 3)).astype(np.float32)
    chex.assert_trees_all_equal(
        np.asarray(corrected(teacher, student, np.ones(3, np.float32), gamma=gamma, delta=delta)), teacher
    )


def test_a_gradient_through_the_output_reaches_both_networks():
    teacher, student = jnp.array([[5.0, 1.0]]), jnp.array([[4.0, 0.0]])
    average = jnp.array([3.0, 3.0])

    def first(teacher, student):
        return corrected(teacher, student, average, gamma=0.8, delta=2.5)[0, 0]

    by_teacher, by_student = jax.grad(first, argnums=(0, 1))(teacher, student)
    np.testing.assert_allclose(by_teacher, [[1.0, 0.0]])
    np.testing.assert_allclose(by_student, [[-2.5, 0.0]])


def test_average_activation_is_over_the_rows_of_each_class():
    logits = np.array([[4.0, 0.0, 0.0], [2.0, 9.0, 0.0], [0.0, 5.0, 1.0]], np.float32)
    labels = np.array([0, 0, 1])
    np.testing.assert_allclose(average_activation(logits, labels, 3, "label"), [3.0, 5.0, 5.0])
    np.testing.assert_allclose(average_activation(logits, labels, 3, "prediction"), [4.0, 7.0, 7.0])
    np.testing.assert_allclose(average_activation(logits, labels, 3, "scalar"), np.full(3, 13 / 3), rtol=1e-6)
    with pytest.raises(ValueError, match="not one of label"):
        average_activation(logits, labels, 3, "all")


def test_teacher_does_not_change_and_delta_zero_returns_its_logits(inputs):
    before = jax.tree.map(np.array, inputs.attacked.variables)
    result = run(inputs, AbmSettings(**{**vars(SMALL), "delta": 0.0, "most_changed": 0.02}))
    chex.assert_trees_all_equal(before, jax.tree.map(np.array, result.variables["teacher"]))
    images = load_digits((), False).test.images[:64]
    defended = inputs.runner.predict(result.model, result.variables, images, 64)
    attacked = inputs.runner.predict(inputs.attacked.model, inputs.attacked.variables, images, 64)
    np.testing.assert_allclose(defended, attacked, atol=1e-5)
    assert result.flags.sum(axis=1).tolist() == [32, 32]


def test_a_student_of_clean_rows_is_a_control_that_declares_them(inputs, monkeypatch):
    settings = AbmSettings(**{**vars(SMALL), "student_rows": "clean"})
    assert "clean rows" in ABM.needs_with(settings) and "clean rows" not in ABM.needs_with(SMALL)
    seen = []
    monkeypatch.setattr(type(inputs), "train", lambda self, stage, model, config, rows, **options: seen.append(rows))
    flags = np.zeros(inputs.index.shape, bool)
    flags[:, :7] = True
    for rows_of in (settings, SMALL):
        with pytest.raises(AttributeError):  # nothing was trained
            train_student(inputs, flags, np.zeros(flags.shape), rows_of)
    clean, isolated = (np.asarray(rows.index) for rows in seen)
    assert clean.shape == (len(flags), 7)
    for drawn, known in zip(clean, inputs.clean_index, strict=True):
        assert len(set(drawn.tolist())) == 7 and np.isin(drawn, known).all()
        assert drawn.tolist() != known[:7].tolist()  # folders are sorted by class
    np.testing.assert_array_equal(isolated, inputs.index[:, :7])


def test_a_premise_that_holds_for_no_network_and_a_loss_of_accuracy_are_reported():
    assert doubts(np.array([0.5, 0.99]), np.array([True, False]), 0.02) == ""
    text = doubts(np.array([0.991, 0.0]), np.array([False, False]), 0.0)
    assert "succeeds on 0.99, 0.00 of the rows that were not stamped" in text and not text.endswith(".")
    text = doubts(np.array([0.5]), np.array([True]), 0.123)
    assert "changes the prediction of 12.3 % of the half of the rows that is suspected least" in text


def test_contrast_rows_are_of_the_least_suspected_half_and_their_target_is_no_logit(inputs, monkeypatch):
    seen = []
    monkeypatch.setattr(type(inputs), "train", lambda self, stage, model, config, rows, **options: seen.append(rows))
    flags = np.zeros(inputs.index.shape, bool)
    flags[:, :7] = True
    scores = -np.tile(np.arange(flags.shape[1]), (len(flags), 1))  # the first rows are the most suspicious
    with pytest.raises(AttributeError):  # nothing was trained
        train_student(inputs, flags, scores, AbmSettings(**{**vars(SMALL), "contrast": 3.0}))
    rows = jax.tree.map(np.asarray, seen[0])
    np.testing.assert_array_equal(rows.targets["is_contrast"], np.tile(np.arange(28) >= 7, (len(flags), 1)))
    np.testing.assert_array_equal(rows.index[:, :7], inputs.index[:, :7])
    for member, drawn in enumerate(rows.index[:, 7:]):
        places = np.array([np.flatnonzero(inputs.index[member] == row)[0] for row in drawn])
        assert len(set(drawn.tolist())) == 21 and (places >= flags.shape[1] // 2).all()
        np.testing.assert_array_equal(rows.targets["labels"][member, 7:], inputs.labels[member, places])


def test_delta_is_halved_until_few_clean_rows_change():
    # The teacher leads by 1, 2, 3 and 4; the student's logit exceeds gamma A by 1 in each row.
    teacher = np.stack([np.arange(1.0, 5.0), np.zeros(4)], axis=1).astype(np.float32)
    student, average = np.tile(np.float32([1.5, 0.0]), (4, 1)), np.ones(2, np.float32)
    deltas = [
        affordable_delta(teacher, student, average, gamma=0.5, delta=4.5, most_changed=share)
        for share in (1.0, 0.5, 0.25, 0.1)
    ]
    assert deltas == [4.5, 2.25, 1.125, 0.5625]
    assert affordable_delta(teacher, 1e9 * student, average, gamma=0.5, delta=4.5, most_changed=0.1) == 0.0


def test_a_limit_on_changed_predictions_needs_clean_rows():
    limited = AbmSettings(**{**vars(SMALL), "most_changed": 0.02})
    assert "clean rows" in ABM.needs_with(limited) and "clean rows" not in ABM.needs_with(SMALL)


def test_defended_model_cannot_be_trained():
    model = defended_model(small_model(), small_model())
    variables = jax.eval_shape(lambda key: model.init(key, (8, 8, 1)), jax.random.key(0))
    with pytest.raises(ValueError, match="cannot be trained"):
        jax.eval_shape(lambda variables: model.apply(variables, jnp.zeros((1, 8, 8, 1)), train=True), variables)


@pytest.mark.parametrize("distance", ["logits", "kl", "hard"])
def test_distance_of_the_student_from_the_teacher(distance):
    teacher, variables = small_model(), init_small(0)
    images = np.random.default_rng(1).random((6, 8, 8, 1), np.float32)
    objective, is_contrast = imitation(teacher, teacher, distance), np.arange(6) >= 4

    @jax.jit
    def losses(params):
        targets = {"labels": jnp.zeros(6, jnp.int32), "is_contrast": jnp.asarray(is_contrast)}
        outcome = objective(params, {**variables, "teacher": variables}, images, targets, jax.random.key(0))
        teacher_logits = teacher.apply(variables, images, train=False).logits
        return outcome.losses, outcome.logits, outcome.variables["teacher"], teacher_logits

    per_row, logits, frozen, teacher_logits = losses(variables["params"])
    chex.assert_trees_all_equal(frozen, variables)
    wanted = np.where(is_contrast[:, None], 0.0, teacher_logits)
    if distance == "logits":
        np.testing.assert_allclose(per_row, np.mean(np.square(logits - wanted), axis=1), rtol=1e-4, atol=1e-6)
    elif distance == "kl":
        ours, theirs = (scipy.special.log_softmax(values, axis=1) for values in (logits, wanted))
        np.testing.assert_allclose(per_row, np.sum(np.exp(theirs) * (theirs - ours), axis=1), rtol=1e-3, atol=1e-5)
    else:
        normaliser = scipy.special.logsumexp(logits, axis=1)
        target = np.where(is_contrast, logits.mean(axis=1), logits[:, 0])
        np.testing.assert_allclose(per_row, normaliser - target, rtol=1e-4)


def test_unknown_distance_is_refused():
    with pytest.raises(ValueError, match="not one of logits"):
        imitation(small_model(), small_model(), "soft")

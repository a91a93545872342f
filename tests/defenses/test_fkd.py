import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bdjax.defenses import distillation
from bdjax.defenses.contract import settings_for
from bdjax.defenses.fkd import (
    FKD,
    FkdSettings,
    divisor_of,
    feature_distance,
    feature_distillation,
    init_regressors,
    margins,
    pair_channels,
    partial_l2,
    regress,
)
from bdjax.errors import InputError
from bdjax.models import make_model
from bdjax.testing.small_network import small_model
from bdjax.types import GroupEnd, ModelOutput
from tests.defenses.conftest import init_small

RANDOM = np.random.default_rng(0)


def normal(*shape):
    return RANDOM.normal(size=shape).astype(np.float32)


compiled_margins = jax.jit(margins)


def margins_of(mean, deviation):
    """Of four channels."""
    return np.asarray(compiled_margins(*(np.array(values, np.float32) for values in (mean, deviation))))


def test_margins_are_the_expected_negative_values():
    found = margins_of([0.0, 1.0, -1.0, 4.0], [1.0, 1.0, 2.0, 1.0])
    np.testing.assert_allclose(found, [-0.7978846, -0.5251353, -2.0183209, -3.0], rtol=2e-6)


def test_margins_agree_with_sampling():
    values = RANDOM.normal(0.4, 1.7, 200_000)
    assert margins_of([0.4] * 4, [1.7] * 4)[0] == pytest.approx(values[values < 0].mean(), abs=0.01)


def test_margins_of_channels_without_any_spread_are_finite():
    np.testing.assert_allclose(margins_of([-1.0, 0.0, 1.0, 2.0], [0.0] * 4), [-1.0, 0.0, 0.0, 0.0], atol=1e-6)


def test_partial_l2_is_zero_where_both_are_negative_and_the_student_is_below():
    values = np.array([-2.0, -1.0, 0.5, -1.0], np.float32), np.array([-1.0, -2.0, -1.0, 0.5], np.float32)

    @jax.jit
    def distance_and_gradient(student, teacher):
        distance, pull_back = jax.vjp(lambda student: partial_l2(student, teacher), student)
        return distance, pull_back(jnp.ones(4))[0]

    distance, gradient = distance_and_gradient(*values)
    np.testing.assert_allclose(distance, [0.0, 1.0, 2.25, 2.25])
    np.testing.assert_allclose(gradient, [0.0, 2.0, 3.0, -3.0])


def test_regressors_are_a_convolution_and_a_normalisation():
    params = {"kernel": normal(3, 5), "scale": normal(5), "bias": normal(5)}
    features = normal(4, 2, 2, 3)
    found = jax.jit(regress)(params, features)
    projected = np.einsum("nhwc,cd->nhwd", features, params["kernel"])
    normalised = (projected - projected.mean((0, 1, 2))) / np.sqrt(projected.var((0, 1, 2)) + 1e-5)
    np.testing.assert_allclose(
        found, normalised * np.asarray(params["scale"]) + np.asarray(params["bias"]), rtol=1e-4, atol=1e-5
    )


def test_regressors_start_with_the_variance_of_the_teachers_fan_out():
    (regressor,) = jax.jit(lambda key: init_regressors(key, ((64, 128),)))(jax.random.key(0))
    assert regressor["kernel"].shape == (64, 128)
    assert float(regressor["kernel"].var()) == pytest.approx(2 / 128, rel=0.05)


def groups(channels, batch=3):
    def end(count):
        values = (normal(batch, 2, 2, count), normal(batch, 2, 2, count), normal(count), normal(count))
        return GroupEnd(*values[:3], np.abs(values[3]))

    return {f"group{number}": end(count) for number, count in enumerate(channels, start=1)}


CHANNELS = ((2, 3), (3, 4), (4, 5))
REGRESSORS = [{"kernel": normal(*pair), "scale": normal(pair[1]), "bias": normal(pair[1])} for pair in CHANNELS]
STUDENT, TEACHER = groups((2, 3, 4)), groups((3, 4, 5))


@jax.jit
def distances(regressors):
    """Of each image, and the gradient of their sum."""

    def total(regressors):
        distance = feature_distance(regressors, STUDENT, TEACHER)
        return jnp.sum(distance), distance

    gradient, distance = jax.grad(total, has_aux=True)(regressors)
    return distance, gradient


def test_each_group_has_twice_the_weight_of_the_one_before_it():
    found, _ = distances(REGRESSORS)
    chex.assert_shape(found, (3,))
    expected = np.zeros(3)
    for weight, params, name in zip((0.25, 0.5, 1.0), REGRESSORS, STUDENT, strict=True):
        end = TEACHER[name]
        wanted = np.maximum(end.before_relu, np.asarray(jax.jit(margins)(end.mean, end.deviation)))
        regressed = np.asarray(jax.jit(regress)(params, STUDENT[name].before_relu))
        is_zero = (regressed <= wanted) & (wanted <= 0)
        expected += weight * np.where(is_zero, 0, (regressed - wanted) ** 2).sum((1, 2, 3))
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_the_gradient_is_that_of_finite_differences():
    _, gradient = distances(REGRESSORS)
    direction = jax.tree.map(lambda leaf: normal(*leaf.shape), REGRESSORS)
    step = np.float32(1e-2)
    up, down = (
        np.sum(distances(jax.tree.map(lambda p, d, s=sign: p + s * step * d, REGRESSORS, direction))[0])
        for sign in (np.float32(1), np.float32(-1))
    )
    along = sum(np.vdot(g, d) for g, d in zip(jax.tree.leaves(gradient), jax.tree.leaves(direction), strict=True))
    assert along == pytest.approx(float((up - down) / (2 * step)), rel=0.03)


def groups_of_size(width, height):
    """The groups of a network of three groups, as shapes: each has half the pixels a side and twice the channels."""
    shapes = [(1, height >> number, height >> number, width << number) for number in range(3)]
    ends = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return {f"group{number}": GroupEnd(end, end, None, None) for number, end in enumerate(ends, start=1)}


def test_the_divisor_of_the_papers_size_is_1000():
    assert divisor_of(groups_of_size(64, 32)) == 1000.0  # WRN-28-4 on 32x32 images
    digits = divisor_of(groups_of_size(12, 8))  # WRN-16-2 of width 24 on the digits
    assert digits == pytest.approx((12 * 64 / 4 + 24 * 16 / 2 + 48 * 4) / 49.152)


@pytest.mark.parametrize(("divisor", "expected"), [(0.0, (3 / 4 + 4 / 2 + 5) * 4 / 49.152), (7.0, 7.0)])
def test_a_student_minimises_the_cross_entropy_and_the_divided_distance(divisor, expected):
    method = feature_distillation(CHANNELS, divisor)
    logits, labels = normal(3, 10), jnp.arange(3, dtype=jnp.int32)
    student, teacher = (ModelOutput(logits, {}, {}, ends) for ends in (STUDENT, TEACHER))
    found = jax.jit(lambda: method.loss(REGRESSORS, student, teacher, labels))()
    of_labels = -np.log(np.exp(logits) / np.exp(logits).sum(1, keepdims=True))[np.arange(3), np.arange(3)]
    np.testing.assert_allclose(found, of_labels + distances(REGRESSORS)[0] / expected, rtol=1e-5)


def test_the_paper_preset_has_the_public_codes_divisor():
    assert settings_for(FKD, "paper", "cifar100").divisor == 1000.0
    assert settings_for(FKD, "quick", "digits").divisor == 0.0


# ---- Pairs and students ---------------------------------------------------------------------------------------------


def test_pairs_are_matched_group_by_group():
    assert pair_channels(small_model(), make_model("wrn_10_2", 10, 4), (8, 8, 1)) == ((2, 4), (4, 8), (8, 16))


def test_networks_that_cannot_be_paired_are_refused():
    with pytest.raises(InputError, match="lenet.*no features before a ReLU"):
        pair_channels(small_model(), make_model("lenet", 10, 4), (8, 8, 1))
    with pytest.raises(InputError, match="8x8 4x4 2x2.*8x8 4x4 2x2 1x1"):
        pair_channels(small_model(), make_model("resnet_s2", 10, 4), (8, 8, 1))


def test_equal_settings_give_the_same_method_and_compile_once():
    assert feature_distillation(((1, 2),), 10.0) is feature_distillation(((1, 2),), 10.0)


def test_the_schedule_drops_at_half_and_three_quarters(inputs):
    config = distillation.student_config(inputs, FkdSettings(epochs=200))
    assert config.steps == ((100, pytest.approx(0.01)), (150, pytest.approx(0.001)))
    assert config.nesterov and config.momentum == 0.9 and config.optimiser == "sgd"


@pytest.mark.parametrize("statistics", ["running", "batch"])
def test_the_teacher_does_not_change_and_normalises_by_the_chosen_statistics(statistics):
    model, variables, images = small_model(), init_small(0), normal(6, 8, 8, 1)
    method = distillation.Method(lambda extra, student, teacher, labels: teacher.logits[:, 0])
    objective = distillation.student_objective(model, model, method, statistics)

    @jax.jit
    def outcome_and_expected(variables, images):
        frozen = {"batch_stats": variables["batch_stats"], "teacher": variables}
        params = {"student": variables["params"], "extra": {}}
        outcome = objective(params, frozen, images, {"labels": jnp.arange(6, dtype=jnp.int32)}, jax.random.key(1))
        running, batch = (model.apply(variables, images, train=train) for train in (False, True))
        return outcome, {"running": running.logits[:, 0], "batch": batch.logits[:, 0]}, batch.variables["batch_stats"]

    outcome, expected, updated = outcome_and_expected(variables, images)
    np.testing.assert_allclose(outcome.losses, expected[statistics], rtol=1e-5)
    assert np.abs(expected["running"] - expected["batch"]).max() > 1e-2
    chex.assert_trees_all_equal(outcome.variables["teacher"], variables)
    chex.assert_trees_all_close(outcome.variables["batch_stats"], updated, rtol=1e-5)


@pytest.mark.parametrize(
    "changes", [{"epochs": 0}, {"drops": (0.75, 0.5)}, {"drops": (1.5,)}, {"learning_rate": 0.0}, {"divisor": -1.0}]
)
def test_invalid_settings_are_refused(changes):
    with pytest.raises(InputError):
        FKD.check(FkdSettings(**changes))

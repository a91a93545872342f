import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bdjax.defenses import distillation
from bdjax.defenses.fkd import (
    FKD,
    FkdSettings,
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
from bdjax.types import GroupEnd

RANDOM = np.random.default_rng(0)


def normal(*shape):
    return jnp.asarray(RANDOM.normal(size=shape), jnp.float32)


def test_margins_are_the_expected_negative_values():
    mean, deviation = jnp.asarray([0.0, 1.0, -1.0, 4.0]), jnp.asarray([1.0, 1.0, 2.0, 1.0])
    np.testing.assert_allclose(margins(mean, deviation), [-0.7978846, -0.5251353, -2.0183209, -3.0], rtol=2e-6)


def test_margins_are_what_sampling_gives():
    values = RANDOM.normal(0.4, 1.7, 200_000)
    assert float(margins(jnp.asarray([0.4]), jnp.asarray([1.7]))[0]) == pytest.approx(
        values[values < 0].mean(), abs=0.01
    )


def test_margins_of_channels_without_any_spread_are_finite():
    found = margins(jnp.asarray([-1.0, 0.0, 1.0]), jnp.zeros(3))
    np.testing.assert_allclose(found, [-1.0, 0.0, 0.0], atol=1e-6)


def test_partial_l2_asks_nothing_where_both_are_negative_and_the_student_is_below():
    student, teacher = jnp.asarray([-2.0, -1.0, 0.5, -1.0]), jnp.asarray([-1.0, -2.0, -1.0, 0.5])
    np.testing.assert_allclose(partial_l2(student, teacher), [0.0, 1.0, 2.25, 2.25])
    gradient = jax.grad(lambda s: partial_l2(s, teacher).sum())(student)
    np.testing.assert_allclose(gradient, [0.0, 2.0, 3.0, -3.0])


def test_regressors_are_a_convolution_and_a_normalisation():
    params = {"kernel": normal(3, 5), "scale": normal(5), "bias": normal(5)}
    features = normal(4, 2, 2, 3)
    found = regress(params, features)
    projected = np.einsum("nhwc,cd->nhwd", features, params["kernel"])
    normalised = (projected - projected.mean((0, 1, 2))) / np.sqrt(projected.var((0, 1, 2)) + 1e-5)
    np.testing.assert_allclose(
        found, normalised * np.asarray(params["scale"]) + np.asarray(params["bias"]), rtol=1e-4, atol=1e-5
    )


def test_regressors_start_with_the_variance_of_the_teachers_fan_out():
    (one,) = init_regressors(jax.random.key(0), ((64, 128),))
    assert one["kernel"].shape == (64, 128)
    assert float(one["kernel"].var()) == pytest.approx(2 / 128, rel=0.05)


def groups(channels, batch=3):
    return {
        f"group{number}": GroupEnd(
            normal(batch, 2, 2, own), normal(batch, 2, 2, own), normal(own), jnp.abs(normal(own))
        )
        for number, own in enumerate(channels, start=1)
    }


def test_the_last_group_counts_in_full_and_each_before_it_half():
    channels = ((2, 3), (3, 4), (4, 5))
    regressors = init_regressors(jax.random.key(1), channels)
    student, teacher = groups((2, 3, 4)), groups((3, 4, 5))
    found = feature_distance(regressors, student, teacher)
    chex.assert_shape(found, (3,))
    expected = np.zeros(3)
    for weight, params, name in zip((0.25, 0.5, 1.0), regressors, student, strict=True):
        told = teacher[name]
        wanted = np.maximum(told.before_relu, np.asarray(margins(told.mean, told.deviation)))
        own = np.asarray(regress(params, student[name].before_relu))
        expected += weight * np.where((own <= wanted) & (wanted <= 0), 0, (own - wanted) ** 2).sum((1, 2, 3))
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_the_gradient_is_that_of_finite_differences():
    channels = ((2, 3), (3, 4))
    student, teacher = groups((2, 3)), groups((3, 4))

    def distance(regressors):
        return feature_distance(regressors, student, teacher).mean()

    with jax.enable_x64(False):
        regressors = init_regressors(jax.random.key(2), channels)
        gradient = jax.grad(distance)(regressors)
        direction = jax.tree.map(lambda leaf: normal(*leaf.shape), regressors)
        step = 1e-2
        moved = [jax.tree.map(lambda p, d, s=s: p + s * step * d, regressors, direction) for s in (1.0, -1.0)]
        expected = (distance(moved[0]) - distance(moved[1])) / (2 * step)
    told = sum(jnp.vdot(g, d) for g, d in zip(jax.tree.leaves(gradient), jax.tree.leaves(direction), strict=True))
    assert float(told) == pytest.approx(float(expected), rel=0.03)


def test_jit_changes_nothing():
    channels = ((2, 3),)
    regressors = init_regressors(jax.random.key(3), channels)
    student, teacher = groups((2,)), groups((3,))
    plain = feature_distance(regressors, student, teacher)
    np.testing.assert_allclose(jax.jit(feature_distance)(regressors, student, teacher), plain, rtol=1e-5)


# ---- Pairs and students ---------------------------------------------------------------------------------------------


def test_pairs_are_matched_group_by_group():
    teacher, student = make_model("wrn_16_2", 10, 8), make_model("wrn_10_2", 10, 4)
    assert pair_channels(teacher, student, (8, 8, 1)) == ((2, 4), (4, 8), (8, 16))


def test_networks_that_cannot_be_paired_are_refused():
    teacher = make_model("wrn_10_2", 10, 4)
    with pytest.raises(InputError, match="lenet.*no features before a ReLU"):
        pair_channels(teacher, make_model("lenet", 10, 4), (8, 8, 1))
    with pytest.raises(InputError, match="8x8 4x4 2x2.*8x8 4x4 2x2 1x1"):
        pair_channels(teacher, make_model("resnet18_cifar", 10, 4), (8, 8, 1))


def test_equal_settings_are_one_method_and_compile_once():
    assert feature_distillation(((1, 2),), 10.0) is feature_distillation(((1, 2),), 10.0)


def test_the_schedule_drops_at_half_and_three_quarters(inputs):
    config = distillation.student_config(inputs, FkdSettings(epochs=200))
    assert config.steps == ((100, pytest.approx(0.01)), (150, pytest.approx(0.001)))
    assert config.nesterov and config.momentum == 0.9 and config.optimiser == "sgd"


@pytest.mark.parametrize("statistics", ["running", "batch"])
def test_the_teacher_stays_what_it_is_and_normalises_as_it_is_told(statistics):
    model = make_model("wrn_10_2", 10, 4)
    variables = model.init(jax.random.key(0), (8, 8, 1))
    images, targets = normal(6, 8, 8, 1), {"labels": jnp.arange(6, dtype=jnp.int32)}
    method = distillation.Method(lambda beside, student, teacher, labels: teacher.logits[:, 0])
    objective = distillation.student_objective(model, model, method, statistics)
    told = {"batch_stats": variables["batch_stats"], "teacher": variables}
    params = {"student": variables["params"], "beside": {}}
    outcome = objective(params, told, images, targets, jax.random.key(1))
    expected = model.apply(variables, images, train=statistics == "batch").logits[:, 0]
    np.testing.assert_array_equal(outcome.losses, expected)
    chex.assert_trees_all_equal(outcome.variables["teacher"], variables)
    own = model.apply(variables, images, train=True).variables["batch_stats"]
    chex.assert_trees_all_close(outcome.variables["batch_stats"], own)


@pytest.mark.parametrize(
    "changes", [{"epochs": 0}, {"drops": (0.75, 0.5)}, {"drops": (1.5,)}, {"learning_rate": 0.0}, {"divisor": 0.0}]
)
def test_settings_that_cannot_be_are_refused(changes):
    with pytest.raises(InputError):
        FKD.check(FkdSettings(**changes))

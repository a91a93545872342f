import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bdjax.defenses import fkd
from bdjax.defenses.fkd import FkdSettings
from bdjax.defenses.mask_threshold import choose_by_validation, split_rows
from bdjax.defenses.robust_kd import (
    ROBUST_KD,
    RobustKdSettings,
    apply_mask,
    detoxify,
    group_outputs,
    last_output,
    mask_objective,
    masked,
    variance,
)
from bdjax.errors import InputError
from bdjax.evaluation.variants import read_defense
from bdjax.models import make_model

RANDOM = np.random.default_rng(0)
TEACHER = make_model("wrn_10_2", 10, 4)
IMAGES = jnp.asarray(RANDOM.random((5, 8, 8, 1)), jnp.float32)
LABELS = {"labels": jnp.arange(5, dtype=jnp.int32)}
SMALL = {"student": "resnet10", "epochs": 1, "batch_size": 32, "learning_rate": 0.01}


def normal(*shape):
    return jnp.asarray(RANDOM.normal(size=shape), jnp.float32)


@pytest.fixture(scope="module")
def network():
    variables = TEACHER.init(jax.random.key(0), (8, 8, 1))
    # Statistics and affine parameters that are not those of a fresh network.
    return jax.tree.map(lambda leaf: leaf + 0.1 * jnp.abs(normal(*leaf.shape)), variables)


@pytest.fixture(scope="module")
def masks(network):
    groups = TEACHER.apply(network, IMAGES, train=False).groups
    return {name: {"pattern": normal(*end.output.shape[1:])} for name, end in groups.items()}


def with_masks(network, masks, threshold):
    return {"network": network, "masks": masks, "threshold": jnp.float32(threshold)}


# ---- Masks ----------------------------------------------------------------------------------------------------------


def test_forms_of_masks():
    features, pattern, gate = normal(3, 2, 2, 4), normal(2, 2, 4), normal(2, 2, 4)
    mask, threshold = {"pattern": pattern, "gate": gate}, jnp.float32(0.2)
    np.testing.assert_allclose(
        apply_mask(features, mask, threshold, "added"), features + 0.2 * pattern[None], rtol=1e-5
    )
    mixed = apply_mask(features, mask, threshold, "mixed")
    np.testing.assert_allclose(mixed, 0.8 * features + 0.2 * pattern[None], rtol=1e-5, atol=1e-6)
    weight = 0.2 * np.maximum(np.tanh(gate), 0)
    elementwise = apply_mask(features, mask, threshold, "elementwise")
    np.testing.assert_allclose(elementwise, features + weight[None] * pattern[None], rtol=1e-5, atol=1e-6)
    assert weight.min() == 0 < weight.max() < 0.2


@pytest.mark.parametrize("form", ["added", "mixed", "elementwise"])
def test_a_threshold_of_0_changes_nothing_bitwise(network, masks, form):
    gated = {name: {**mask, "gate": mask["pattern"]} for name, mask in masks.items()}
    plain = TEACHER.apply(network, IMAGES, train=False)
    found = masked(TEACHER, form).apply(with_masks(network, gated, 0.0), IMAGES, train=False)
    chex.assert_trees_all_equal(found.logits, plain.logits)
    chex.assert_trees_all_equal(found.features, plain.features)
    chex.assert_trees_all_equal(found.groups, plain.groups)


def test_masks_are_cumulative_and_lie_on_what_groups_hand_on(network, masks):
    model = masked(TEACHER, "added")
    plain = TEACHER.apply(network, IMAGES, train=False).groups
    only_first = model.apply(with_masks(network, {"group1": masks["group1"]}, 0.5), IMAGES, train=False).groups
    expected = plain["group1"].output + 0.5 * masks["group1"]["pattern"][None]
    np.testing.assert_allclose(only_first["group1"].output, expected, rtol=1e-5)
    assert np.abs(only_first["group3"].output - plain["group3"].output).max() > 1e-3  # it went on from there
    everywhere = model.apply(with_masks(network, masks, 0.5), IMAGES, train=False).groups
    second = TEACHER.apply(
        network, IMAGES, train=False, edits={"group1": lambda f: f + 0.5 * masks["group1"]["pattern"][None]}
    )
    expected = second.groups["group2"].output + 0.5 * masks["group2"]["pattern"][None]
    np.testing.assert_allclose(everywhere["group2"].output, expected, rtol=1e-5)
    only_last = model.apply(with_masks(network, {"group3": masks["group3"]}, 0.5), IMAGES, train=False).groups
    np.testing.assert_array_equal(only_last["group2"].output, plain["group2"].output)


def test_edits_of_a_masked_network_come_after_its_masks(network, masks):
    model = masked(TEACHER, "added")
    found = model.apply(with_masks(network, masks, 0.5), IMAGES, train=False, edits={"group3": lambda f: 0.0 * f})
    np.testing.assert_array_equal(found.groups["group3"].output, np.zeros_like(found.groups["group3"].output))


# ---- Variance -------------------------------------------------------------------------------------------------------


def test_variance_over_each_of_the_axes():
    features = normal(4, 2, 2, 3)
    np.testing.assert_allclose(variance(features, "elements"), np.var(features, axis=(1, 2, 3)), rtol=1e-5)
    np.testing.assert_allclose(variance(features, "all"), np.full(4, np.var(features)), rtol=1e-5)
    np.testing.assert_allclose(variance(features, "batch"), np.full(4, np.var(features, axis=0).mean()), rtol=1e-5)


def gradient_of_last_mask(network, masks, axes, threshold=0.3):
    objective = mask_objective(TEACHER, "added", "variance", axes, 1.0)
    own = {"group3": masks["group3"]}

    def total(params):
        variables = {"params": params, "network": network, "threshold": jnp.float32(threshold)}
        return objective(params, variables, IMAGES, LABELS, jax.random.key(0)).losses.mean()

    return total, own, jax.grad(total)(own)["group3"]["pattern"]


def test_the_variance_across_a_batch_does_not_depend_on_the_last_mask(network, masks):
    _, _, gradient = gradient_of_last_mask(network, masks, "batch")
    assert np.abs(gradient).max() < 1e-6
    _, _, gradient = gradient_of_last_mask(network, masks, "elements")
    assert np.abs(gradient).max() > 1e-3


def test_the_gradient_of_the_variance_is_the_closed_form(network, masks):
    _, own, gradient = gradient_of_last_mask(network, masks, "elements")
    output = last_output(masked(TEACHER, "added").apply(with_masks(network, own, 0.3), IMAGES, train=False))
    centred = output - output.mean((1, 2, 3), keepdims=True)
    expected = 2 * 0.3 / output[0].size * centred.mean(0)
    np.testing.assert_allclose(gradient, expected, rtol=1e-3, atol=1e-6)


def test_losses_are_cross_entropy_and_variance_and_their_sum(network, masks):
    variables = with_masks(network, masks, 0.3)

    def told(loss, weight=1.0):
        objective = mask_objective(TEACHER, "added", loss, "elements", weight)
        return objective(masks, variables, IMAGES, LABELS, jax.random.key(0)).losses

    both = told("cross_entropy") + 0.5 * told("variance")
    np.testing.assert_allclose(told("both", 0.5), both, rtol=1e-5)
    assert float(told("variance").min()) > 0 and float(told("cross_entropy").min()) > 0


# ---- The threshold --------------------------------------------------------------------------------------------------


def test_the_threshold_has_the_least_variance_among_those_that_are_allowed():
    accuracy = np.array([[0.99, 0.98, 0.90], [0.97, 0.96, 0.95]])
    variances = np.array([[3.0, 2.0, 1.0], [3.0, 2.0, 1.0]])
    plain = np.array([0.99, 1.0])
    np.testing.assert_array_equal(choose_by_validation(accuracy, variances, plain, 0.01), [1, 0])
    np.testing.assert_array_equal(choose_by_validation(accuracy, variances, plain, 0.2), [2, 2])


def test_held_out_rows_are_not_trained_on(inputs):
    kept, held_out = split_rows(inputs, 0.25)
    for i in range(len(inputs.index)):
        all_rows = np.concatenate([kept.index[i], held_out.index[i]])
        assert sorted(all_rows) == sorted(inputs.clean_index[i]) and len(held_out.index[i]) == 16
        labels = dict(zip(inputs.clean_index[i].tolist(), inputs.clean_labels[i].tolist(), strict=True))
        assert [labels[int(row)] for row in held_out.index[i]] == held_out.targets["labels"][i].tolist()


# ---- The whole method -----------------------------------------------------------------------------------------------


def test_masks_start_as_mean_features_and_training_lowers_the_variance(inputs):
    settings = RobustKdSettings(
        **SMALL, loss="variance", mask_epochs=20, mask_learning_rate=0.1, thresholds=(0.2, 0.5), allowed_drop=1.0
    )
    teachers, facts = detoxify(inputs, settings)
    assert all(facts["masked feature variance"] < facts["feature variance"])
    assert set(np.round(facts["mask threshold"], 3)) <= {0.2, 0.5}
    rows = inputs.clean_rows()
    means = inputs.runner.mean(group_outputs(inputs.attacked.model), inputs.attacked.variables, rows, inputs.pool, 50)
    images = np.asarray(inputs.pool)[np.asarray(rows.index[0])].astype(np.float32) / 255
    own = jax.tree.map(lambda leaf: leaf[0], inputs.attacked.variables)
    output = inputs.attacked.model.apply(own, jnp.asarray(images), train=False).groups["group2"].output
    np.testing.assert_allclose(means["group2"][0], output.mean(0), rtol=1e-3, atol=1e-5)
    assert jax.tree.leaves(teachers.variables)[0].shape[0] == len(inputs.index)


def test_without_masks_it_is_fkd(inputs):
    robust = RobustKdSettings(**SMALL, mask_epochs=1, thresholds=(0.0,))
    masked_student = ROBUST_KD.run(inputs, robust)
    student = fkd.run(inputs, FkdSettings(**SMALL))
    for one, other in zip(jax.tree.leaves(masked_student.variables), jax.tree.leaves(student.variables), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


def test_the_oracle_says_that_it_is_one(inputs):
    settings = RobustKdSettings(**SMALL, mask_epochs=1, select="oracle", thresholds=(0.0, 0.5))
    assert ROBUST_KD.needs_with(settings)[-1] == "attacker's trigger"
    assert "attacker's trigger" not in ROBUST_KD.needs_with(RobustKdSettings())
    result = ROBUST_KD.run(inputs, settings)
    assert set(np.round(result.facts["mask threshold"], 3)) <= {0.0, 0.5}


def test_layers_are_counted_from_the_last(inputs):
    settings = RobustKdSettings(**SMALL, mask_epochs=1, thresholds=(0.2,), layers=2)
    teachers, _ = detoxify(inputs, settings)
    assert sorted(teachers.variables["masks"]) == ["group2", "group3"]
    with pytest.raises(InputError, match="layers 4 is not at most 3, the number of groups of"):
        detoxify(inputs, RobustKdSettings(**SMALL, thresholds=(0.2,), layers=4))


@pytest.mark.parametrize(
    "text",
    [
        "select=asr",
        "form=subtracted",
        "loss=ce",
        "variance_axes=channels",
        "thresholds=(-0.1,)",
        "validation_share=1.0",
    ],
)
def test_settings_that_cannot_be_are_refused(text):
    with pytest.raises(InputError, match=text.partition("=")[0]):
        read_defense(f"robust_kd:{text}", "quick", "digits")

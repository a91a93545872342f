import dataclasses
from functools import partial
from types import SimpleNamespace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bdjax.defenses import fkd, robust_kd
from bdjax.defenses.distillation import TeacherNetworks
from bdjax.defenses.mask_threshold import choose_by_oracle, choose_by_validation, split_rows
from bdjax.defenses.robust_kd import (
    ROBUST_KD,
    RobustKdSettings,
    apply_mask,
    detoxify,
    group_outputs,
    last_output,
    mask_objective,
    masked,
    masked_groups,
    variance,
)
from bdjax.errors import InputError
from bdjax.evaluation.variants import read_defense
from bdjax.models import group_shapes
from bdjax.types import DefenseResult, Model, ModelOutput
from tests.defenses.tiny import SHAPE, TINY, stamp_corner, tiny_inputs, tiny_variables

RANDOM = np.random.default_rng(0)
IMAGES = jnp.asarray(RANDOM.random((5, *SHAPE)), jnp.float32)
LABELS = {"labels": jnp.arange(5, dtype=jnp.int32)}


def normal(*shape):
    return jnp.asarray(RANDOM.normal(size=shape), jnp.float32)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return tiny_inputs(tmp_path_factory.mktemp("suspects"))


@pytest.fixture(scope="module")
def network():
    return tiny_variables(0)


MASKS = {name: {"pattern": normal(*output)} for name, (output, _) in group_shapes(TINY, SHAPE).items()}


def with_masks(network, masks, threshold):
    return {"network": network, "masks": masks, "threshold": jnp.float32(threshold)}


@partial(jax.jit, static_argnames=("model", "edits"))
def applied(model: Model, variables, edits=()) -> ModelOutput:
    """The model's output for all images; edits as pairs of a name and a function."""
    return model.apply(variables, IMAGES, train=False, edits=dict(edits))


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
def test_a_threshold_of_0_changes_nothing_bitwise(network, form):
    gated = {name: {**mask, "gate": mask["pattern"]} for name, mask in MASKS.items()}
    plain = applied(TINY, network)
    found = applied(masked(TINY, form), with_masks(network, gated, 0.0))
    chex.assert_trees_all_equal(found.logits, plain.logits)
    chex.assert_trees_all_equal(found.features, plain.features)
    chex.assert_trees_all_equal(found.groups, plain.groups)


def test_masks_are_cumulative_and_apply_to_the_output_of_groups(network):
    model, patterns = masked(TINY, "added"), {name: np.asarray(mask["pattern"]) for name, mask in MASKS.items()}
    plain = applied(TINY, network).groups
    only_first = applied(model, with_masks(network, {"group1": MASKS["group1"]}, 0.5)).groups
    expected = plain["group1"].output + 0.5 * patterns["group1"][None]
    np.testing.assert_allclose(only_first["group1"].output, expected, rtol=1e-5, atol=1e-6)
    assert np.abs(only_first["group3"].output - plain["group3"].output).max() > 1e-3  # later groups see the mask
    everywhere = applied(model, with_masks(network, MASKS, 0.5)).groups
    second = applied(TINY, network, (("group1", lambda f: f + 0.5 * patterns["group1"][None]),))
    expected = second.groups["group2"].output + 0.5 * patterns["group2"][None]
    np.testing.assert_allclose(everywhere["group2"].output, expected, rtol=1e-5, atol=1e-6)
    only_last = applied(model, with_masks(network, {"group3": MASKS["group3"]}, 0.5)).groups
    np.testing.assert_array_equal(only_last["group2"].output, plain["group2"].output)


def test_edits_of_a_masked_network_come_after_its_masks(network):
    found = applied(masked(TINY, "added"), with_masks(network, MASKS, 0.5), (("group3", lambda f: 0.0 * f),))
    assert not np.any(found.groups["group3"].output)


# ---- Variance -------------------------------------------------------------------------------------------------------


def test_variance_over_each_of_the_axes():
    features = RANDOM.normal(size=(4, 2, 2, 3)).astype(np.float32)
    np.testing.assert_allclose(variance(features, "elements"), np.var(features, axis=(1, 2, 3)), rtol=1e-5)
    np.testing.assert_allclose(variance(features, "all"), np.full(4, np.var(features)), rtol=1e-5)
    np.testing.assert_allclose(variance(features, "batch"), np.full(4, np.var(features, axis=0).mean()), rtol=1e-5)


LAST_MASK = {"group3": MASKS["group3"]}


@partial(jax.jit, static_argnames="axes")
def gradient_of_last_mask(network, axes):
    objective = mask_objective(TINY, "added", "variance", axes, 1.0)

    def total(params):
        variables = {"params": params, "network": network, "threshold": jnp.float32(0.3)}
        return objective(params, variables, IMAGES, LABELS, jax.random.key(0)).losses.mean()

    return jax.grad(total)(LAST_MASK)["group3"]["pattern"]


def test_the_variance_across_a_batch_does_not_depend_on_the_last_mask(network):
    assert np.abs(gradient_of_last_mask(network, "batch")).max() < 1e-6
    assert np.abs(gradient_of_last_mask(network, "elements")).max() > 1e-3


def test_the_gradient_of_the_variance_is_the_closed_form(network):
    output = np.asarray(last_output(applied(masked(TINY, "added"), with_masks(network, LAST_MASK, 0.3))))
    centred = output - output.mean((1, 2, 3), keepdims=True)
    expected = 2 * 0.3 / output[0].size * centred.mean(0)
    np.testing.assert_allclose(gradient_of_last_mask(network, "elements"), expected, rtol=1e-3, atol=1e-6)


def test_losses_are_cross_entropy_and_variance_and_their_sum(network):
    variables = with_masks(network, MASKS, 0.3)

    @jax.jit
    def mask_losses():
        objectives = [
            mask_objective(TINY, "added", loss, "elements", weight)
            for loss, weight in (("cross_entropy", 1.0), ("variance", 1.0), ("both", 0.5))
        ]
        return [objective(MASKS, variables, IMAGES, LABELS, jax.random.key(0)).losses for objective in objectives]

    cross_entropy, of_variance, both = mask_losses()
    np.testing.assert_allclose(both, cross_entropy + 0.5 * of_variance, rtol=1e-5)
    assert of_variance.min() > 0 and cross_entropy.min() > 0


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
        loss="variance", layers=2, batch_size=32, mask_epochs=20, mask_learning_rate=0.1, thresholds=(0.2, 0.5)
    )
    teachers, facts = detoxify(inputs, dataclasses.replace(settings, allowed_drop=1.0))
    assert sorted(teachers.variables["masks"]) == ["group2", "group3"]  # layers are counted from the last
    assert all(facts["masked feature variance"] < facts["feature variance"])
    assert set(np.round(facts["mask threshold"], 3)) <= {0.2, 0.5}
    rows = inputs.clean_rows()
    means = inputs.runner.mean(group_outputs(inputs.attacked.model), inputs.attacked.variables, rows, inputs.pool, 50)
    images = np.asarray(inputs.pool)[np.asarray(rows.index[0])].astype(np.float32) / 255
    first = jax.tree.map(lambda leaf: leaf[0], inputs.attacked.variables)
    output = jax.jit(partial(TINY.apply, train=False))(first, jnp.asarray(images)).groups["group2"].output
    np.testing.assert_allclose(means["group2"][0], output.mean(0), rtol=1e-3, atol=1e-5)
    assert jax.tree.leaves(teachers.variables)[0].shape[0] == len(inputs.index)


def test_the_rest_is_fkd_from_the_masked_networks(inputs, monkeypatch):
    """With a threshold of 0 these are the attacked networks bit for bit (see above), so it is then FKD."""
    settings, calls = RobustKdSettings(), []
    facts, student = {"mask threshold": np.zeros(2)}, DefenseResult(TINY, {})
    monkeypatch.setattr(robust_kd, "detoxify", lambda *arguments: ("masked networks", facts))
    monkeypatch.setattr(fkd, "run_from", lambda *arguments, **options: calls.append((arguments, options)) or student)
    assert ROBUST_KD.run(inputs, settings) == student._replace(facts=facts)
    assert calls == [((inputs, "RobustKD", settings, "masked networks"), {})]


def test_the_oracle_declares_that_it_is_one():
    assert ROBUST_KD.needs_with(RobustKdSettings(select="oracle"))[-1] == "attacker's trigger"
    assert "attacker's trigger" not in ROBUST_KD.needs_with(RobustKdSettings())


def test_the_oracle_takes_the_student_of_largest_accuracy_minus_asr(inputs, monkeypatch):
    kept, held_out = split_rows(inputs, 0.5)
    labels = np.asarray(held_out.targets["labels"])
    images = np.repeat(np.asarray(inputs.pool)[np.asarray(held_out.index)], 3, axis=0)  # for three thresholds each
    triggered = np.stack([stamp_corner(images[0], None)] * 3 + [*images[3:]])  # the second suspect has no attacker
    place = np.arange(labels.shape[1]) / labels.shape[1]
    # The first threshold has the most accurate student, and the highest ASR.
    accuracies, asrs = np.array([[0.9], [0.7], [0.5]]), np.array([[1.0], [0.1], [0.0]])

    def logits(of_images):
        if np.array_equal(of_images, images):
            predicted = [np.where(place < accuracies, of_member, (of_member + 1) % 10) for of_member in labels]
        else:
            np.testing.assert_array_equal(of_images, triggered)
            predicted = [np.where(place < asrs, 0, of_member) for of_member in labels]
        return np.eye(10)[np.concatenate(predicted)]

    seen, teachers = [], TeacherNetworks(TINY, "masked networks")

    def train(inputs, name, settings, teachers, rows):
        seen.append((inputs, teachers, rows))
        return DefenseResult(TINY, "students")

    monkeypatch.setattr(fkd, "run_from", train)
    runner = SimpleNamespace(predict_own=lambda model, variables, images, batch_size: logits(images))
    with_runner = dataclasses.replace(inputs, runner=runner)
    chosen = choose_by_oracle(with_runner, RobustKdSettings(), teachers, 3, kept, held_out)
    np.testing.assert_array_equal(chosen, [1, 0])  # 0.9 - 1, 0.7 - 0.1 and 0.5 - 0 at the first suspect
    ((repeated, trained_from, rows),) = seen
    assert trained_from is teachers and len(repeated.keys) == 6 and not repeated.knowledge
    np.testing.assert_array_equal(rows.index, np.repeat(kept.index, 3, axis=0))


def test_more_layers_than_groups_are_refused():
    assert masked_groups(TINY, 0, SHAPE) == ["group1", "group2", "group3"]
    with pytest.raises(InputError, match="layers 4 is not at most 3, the number of groups of"):
        masked_groups(TINY, 4, SHAPE)


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
def test_invalid_settings_are_refused(text):
    with pytest.raises(InputError, match=text.partition("=")[0]):
        read_defense(f"robust_kd:{text}", "quick", "digits")

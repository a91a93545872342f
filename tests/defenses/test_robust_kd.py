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
    clip_to_unit,
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


MASKS = {name: {"shift": normal(*output)} for name, (output, _) in group_shapes(TINY, SHAPE).items()}


def with_masks(network, masks, threshold):
    return {"network": network, "masks": masks, "threshold": jnp.float32(threshold)}


@partial(jax.jit, static_argnames=("model", "edits"))
def applied(model: Model, variables, edits=()) -> ModelOutput:
    """The model's output for all images; edits as pairs of a name and a function."""
    return model.apply(variables, IMAGES, train=False, edits=dict(edits))


# ---- Masks ----------------------------------------------------------------------------------------------------------


def test_forms_of_masks():
    features, pattern, gate = normal(3, 2, 2, 4), normal(2, 2, 4), normal(2, 2, 4)
    mask, threshold = {"shift": 0.2 * pattern, "gate": gate}, jnp.float32(0.2)
    added = apply_mask(features, mask, threshold, "added")
    np.testing.assert_allclose(added, features + 0.2 * pattern[None], rtol=1e-5, atol=1e-6)
    mixed = apply_mask(features, mask, threshold, "mixed")
    np.testing.assert_allclose(mixed, 0.8 * features + 0.2 * pattern[None], rtol=1e-5, atol=1e-6)
    share = np.clip(0.2 * gate, 0, 0.2)[None]  # M of equation 15, elementwise
    elementwise = apply_mask(features, mask, threshold, "elementwise")
    np.testing.assert_allclose(elementwise, (1 - share) * features + share * pattern[None], rtol=1e-5, atol=1e-6)
    assert share.min() == 0 and share.max() == np.float32(0.2) and ((share > 0) & (share < 0.2)).any()


def test_a_clipped_share_keeps_its_bounds_and_comes_back_from_beyond_them():
    values, pull = jnp.asarray([-0.5, -0.5, 0.3, 0.3, 1.5, 1.5]), jnp.asarray([1.0, -1.0, 2.0, -2.0, 1.0, -1.0])
    clipped, pull_back = jax.vjp(clip_to_unit, values)
    np.testing.assert_allclose(clipped, [0, 0, 0.3, 0.3, 1, 1])
    # A step goes against the gradient: from below 0 only upwards, from above 1 only downwards.
    np.testing.assert_allclose(pull_back(pull)[0], [0, -1, 2, -2, 1, 0])


@pytest.mark.parametrize("form", ["added", "mixed", "elementwise"])
@pytest.mark.parametrize("taps", ["after_mask", "before_mask"])
def test_without_a_weight_the_network_is_the_teacher_bitwise(network, form, taps):
    """So that the method is FKD then."""
    empty = {name: {"shift": 0.0 * mask["shift"], "gate": mask["shift"]} for name, mask in MASKS.items()}
    plain = applied(TINY, network)
    found = applied(masked(TINY, form, taps), with_masks(network, empty, 0.0))
    chex.assert_trees_all_equal(found.logits, plain.logits)
    chex.assert_trees_all_equal(found.features, plain.features)
    chex.assert_trees_all_equal(found.groups, plain.groups)


def test_masks_are_cumulative_and_apply_to_the_output_of_groups(network):
    model, shifts = masked(TINY, "added"), {name: np.asarray(mask["shift"]) for name, mask in MASKS.items()}
    plain = applied(TINY, network).groups
    only_first = applied(model, with_masks(network, {"group1": MASKS["group1"]}, 0.5)).groups
    expected = plain["group1"].output + shifts["group1"][None]
    np.testing.assert_allclose(only_first["group1"].output, expected, rtol=1e-5, atol=1e-6)
    assert np.abs(only_first["group3"].output - plain["group3"].output).max() > 1e-3  # later groups see the mask
    everywhere = applied(model, with_masks(network, MASKS, 0.5)).groups
    second = applied(TINY, network, (("group1", lambda f: f + shifts["group1"][None]),))
    expected = second.groups["group2"].output + shifts["group2"][None]
    np.testing.assert_allclose(everywhere["group2"].output, expected, rtol=1e-5, atol=1e-6)
    only_last = applied(model, with_masks(network, {"group3": MASKS["group3"]}, 0.5)).groups
    np.testing.assert_array_equal(only_last["group2"].output, plain["group2"].output)


def test_taps_before_masks_are_those_of_the_public_code_for_pyramid_nets(network):
    variables = with_masks(network, MASKS, 0.5)
    found, after = (applied(masked(TINY, "added", taps), variables) for taps in ("before_mask", "after_mask"))
    shift = MASKS["group1"]["shift"][None]
    second = applied(TINY, network, (("group1", lambda f: f + shift),)).groups["group2"]
    chex.assert_trees_all_equal(found.groups["group1"], applied(TINY, network).groups["group1"])
    chex.assert_trees_all_close(found.groups["group2"], second, rtol=1e-5, atol=1e-5)
    for name, mask in MASKS.items():
        put_on = found.groups[name].output + mask["shift"][None]
        np.testing.assert_allclose(put_on, after.groups[name].output, rtol=1e-4, atol=1e-4)
    chex.assert_trees_all_equal(found.logits, after.logits)


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

    return jax.grad(total)(LAST_MASK)["group3"]["shift"]


def test_the_variance_across_a_batch_does_not_depend_on_the_last_mask(network):
    assert np.abs(gradient_of_last_mask(network, "batch")).max() < 1e-6
    assert np.abs(gradient_of_last_mask(network, "elements")).max() > 1e-3


def test_the_gradient_of_the_variance_is_the_closed_form(network):
    output = np.asarray(last_output(applied(masked(TINY, "added"), with_masks(network, LAST_MASK, 0.3))))
    centred = output - output.mean((1, 2, 3), keepdims=True)
    expected = 2 / output[0].size * centred.mean(0)
    np.testing.assert_allclose(gradient_of_last_mask(network, "elements"), expected, rtol=1e-3, atol=1e-6)


@partial(jax.jit, static_argnames="form")
def mask_loss_and_gradient(network, masks, form):
    """Equation 10 of masks, as float32 [] and as a tree."""
    objective = mask_objective(TINY, form, "both", "elements", 1.0)

    def total(params):
        variables = {"params": params, "network": network, "threshold": jnp.float32(0.2)}
        return objective(params, variables, IMAGES, LABELS, jax.random.key(0)).losses.mean()

    return jax.value_and_grad(total)(masks)


@pytest.mark.parametrize("form", ["added", "mixed", "elementwise"])
def test_the_gradient_of_the_mask_loss_is_that_of_finite_differences(network, form):
    masks = {name: {"shift": 0.1 * mask["shift"]} for name, mask in MASKS.items()}
    if form == "elementwise":  # inside the bounds, where the clip is the identity
        inside = {name: jax.nn.sigmoid(mask["shift"]) for name, mask in MASKS.items()}
        masks = {name: {**mask, "gate": 0.1 + 0.8 * inside[name]} for name, mask in masks.items()}
    direction = jax.tree.map(lambda leaf: normal(*leaf.shape), masks)
    step = np.float32(3e-3)
    up, down = (
        mask_loss_and_gradient(network, jax.tree.map(lambda p, d, s=sign: p + s * step * d, masks, direction), form)[0]
        for sign in (np.float32(1), np.float32(-1))
    )
    gradient = mask_loss_and_gradient(network, masks, form)[1]
    along = sum(np.vdot(g, d) for g, d in zip(jax.tree.leaves(gradient), jax.tree.leaves(direction), strict=True))
    assert along == pytest.approx(float((up - down) / (2 * step)), rel=0.05, abs=1e-3) and abs(along) > 1e-2


def test_m_does_not_change_the_masks_of_equation_7(network):
    """The paper's m p is trained as one tensor, so neither the loss nor its gradient has m in it."""
    objective = mask_objective(TINY, "added", "both", "elements", 1.0)

    @jax.jit
    def losses_with(threshold):
        variables = {"params": MASKS, "network": network, "threshold": threshold}
        return objective(MASKS, variables, IMAGES, LABELS, jax.random.key(0)).losses

    np.testing.assert_array_equal(losses_with(jnp.float32(0.05)), losses_with(jnp.float32(0.6)))


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
        loss="variance", layers=2, batch_size=32, mask_epochs=20, mask_learning_rate=0.05, thresholds=(0.2, 0.5)
    )
    teachers, facts = detoxify(inputs, dataclasses.replace(settings, allowed_drop=1.0))
    assert sorted(teachers.variables["masks"]) == ["group2", "group3"]  # layers are counted from the last
    assert all(facts["masked teacher's feature variance"] < facts["teacher's feature variance"])
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
    settings, calls = RobustKdSettings(form="mixed", taps="before_mask"), []
    facts, student = {"mask threshold": np.zeros(2)}, DefenseResult(TINY, {})
    detoxified = TeacherNetworks(masked(TINY, "mixed"), "masked networks")
    monkeypatch.setattr(robust_kd, "detoxify", lambda *arguments: (detoxified, facts))
    monkeypatch.setattr(fkd, "run_from", lambda *arguments, **options: calls.append((arguments, options)) or student)
    networks = {"masked teacher": (masked(TINY, "mixed"), "masked networks")}
    assert ROBUST_KD.run(inputs, settings) == student._replace(facts=facts, more_networks=networks)
    learnt = TeacherNetworks(masked(TINY, "mixed", "before_mask"), "masked networks")
    assert calls == [((inputs, "RobustKD", settings, learnt), {})]


def test_the_oracle_declares_that_it_is_one():
    assert ROBUST_KD.needs_with(RobustKdSettings(select="oracle", thresholds=(0.1, 0.2)))[-1] == "attacker's trigger"
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
        "taps=inside",
        "thresholds=(-0.1,)",
        "thresholds=(0.0,)",
        "thresholds=(1.5,):form=mixed",
        "validation_share=1.0",
    ],
)
def test_invalid_settings_are_refused(text):
    with pytest.raises(InputError, match=text.partition("=")[0]):
        read_defense(f"robust_kd:{text}", "quick", "digits")


def test_an_oracle_has_something_to_choose_from():
    with pytest.raises(InputError, match=r"select oracle has only thresholds \(0.2,\)"):
        read_defense("robust_kd:select=oracle", "quick", "digits")
    assert read_defense("robust_kd:select=oracle:thresholds=(0.1, 0.2)", "quick", "digits").settings.select == "oracle"

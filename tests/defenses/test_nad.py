import chex
import jax
import jax.numpy as jnp
import numpy as np

from bdjax import losses
from bdjax.defenses.attention import attention_loss
from bdjax.defenses.nad import NadSettings, attention_distillation, cutout, run, teacher_objective
from bdjax.types import Model, ModelOutput
from tests.defenses.tiny import LINEAR, tiny_inputs

RANDOM = np.random.default_rng(0)


def _apply(variables, images, *, train, edits=None):
    first = jnp.tanh(images @ variables["params"]["first"])
    second = jnp.tanh(first[:, ::2, ::2] @ variables["params"]["second"])
    logits = second.mean((1, 2)) @ variables["params"]["out"]
    return ModelOutput(logits, {"zebra": first, "apple": second}, variables)


PLAIN = Model(lambda key, shape: {}, _apply, 3, "two layers that treat training as anything else")


def plain_variables(seed):
    random = np.random.default_rng(seed)
    shapes = {"first": (1, 4), "second": (4, 5), "out": (5, 3)}
    params = {name: jnp.asarray(random.standard_normal(shape), jnp.float32) for name, shape in shapes.items()}
    return {"params": params, "batch_stats": {}}


IMAGES = jnp.asarray(RANDOM.random((6, 4, 4, 1)), jnp.float32)
TARGETS = {"labels": jnp.asarray(RANDOM.integers(0, 3, 6), jnp.int32)}


# ---- Cutout ---------------------------------------------------------------------------------------------------------


def test_cutout_blackens_a_square_of_each_image():
    images = jnp.ones((200, 9, 7, 2))
    cut = jax.jit(cutout, static_argnums=2)(jax.random.key(0), images, 3)
    black = np.asarray(cut) == 0
    np.testing.assert_array_equal(black[..., 0], black[..., 1])
    holes = {(int(hole.any(1).sum()), int(hole.any(0).sum())) for hole in black[..., 0]}
    assert holes == {(2, 2), (2, 3), (3, 2), (3, 3)}  # at most one pixel is over the edge: the centre is inside
    for hole in black[:20, :, :, 0]:
        assert hole.sum() == hole.any(1).sum() * hole.any(0).sum()
    assert black[..., 0].any(0).all()  # everywhere
    np.testing.assert_array_equal(cutout(jax.random.key(0), images, 0), images)


# ---- The objectives -------------------------------------------------------------------------------------------------


def test_both_see_the_same_images_so_a_student_like_its_teacher_has_the_labels_loss_alone():
    variables, key = plain_variables(0), jax.random.key(4)
    objective = attention_distillation(PLAIN, (500.0, 1000.0), 2.0, 2)

    @jax.jit
    def outcomes():
        outcome = objective(variables["params"], {**variables, "teacher": variables}, IMAGES, TARGETS, key)
        plain = teacher_objective(PLAIN, 2)(variables["params"], variables, IMAGES, TARGETS, key)
        cut = _apply(variables, cutout(key, IMAGES, 2), train=True)
        return outcome, plain, losses.cross_entropy(cut.logits, TARGETS["labels"])

    outcome, plain, expected = outcomes()
    np.testing.assert_allclose(outcome.losses, plain.losses, rtol=1e-6)
    np.testing.assert_allclose(plain.losses, expected, rtol=1e-6)
    chex.assert_trees_all_equal(outcome.variables, {**variables, "teacher": variables})


def test_the_loss_is_the_labels_and_each_tap_s_in_the_order_of_the_network():
    student, teacher = plain_variables(0), plain_variables(1)
    objective = attention_distillation(PLAIN, (3.0, 50.0), 2.0, 0)
    arguments = {**student, "teacher": teacher}, IMAGES, TARGETS, jax.random.key(0)

    @jax.jit
    def expected_losses():
        of_student, of_teacher = (_apply(network, IMAGES, train=True) for network in (student, teacher))
        expected = losses.cross_entropy(of_student.logits, TARGETS["labels"])
        for beta, tap in ((3.0, "zebra"), (50.0, "apple")):
            expected += beta * attention_loss(of_student.features[tap], of_teacher.features[tap], 2.0)
        return expected

    outcome = objective(student["params"], *arguments)
    np.testing.assert_allclose(outcome.losses, expected_losses(), rtol=1e-5)
    jitted = jax.jit(objective)(student["params"], *arguments)
    chex.assert_trees_all_close(jitted, outcome, rtol=1e-4, atol=1e-5)


def test_the_teacher_is_frozen_and_uses_its_running_statistics():
    def apply(variables, images, *, train, edits=None):
        mean = images.mean((0, 1, 2)) if train else variables["batch_stats"]["mean"]
        output = _apply(variables, images - mean[None, None, None], train=train)
        return output._replace(variables={**variables, "batch_stats": {"mean": mean}} if train else variables)

    model = PLAIN._replace(apply=apply)
    variables = {**plain_variables(0), "batch_stats": {"mean": jnp.full(1, 0.2)}}
    objective = attention_distillation(model, (50.0, 50.0), 2.0, 0)

    @jax.jit
    def outcome_and_expected():
        outcome = objective(
            variables["params"], {**variables, "teacher": variables}, IMAGES, TARGETS, jax.random.key(0)
        )
        student, teacher = (apply(variables, IMAGES, train=train) for train in (True, False))
        cross_entropy = losses.cross_entropy(student.logits, TARGETS["labels"])
        attention = [50 * attention_loss(student.features[tap], teacher.features[tap], 2.0) for tap in teacher.features]
        return outcome, cross_entropy, sum(attention), student.variables

    outcome, cross_entropy, attention, after = outcome_and_expected()
    np.testing.assert_allclose(outcome.losses, cross_entropy + attention, rtol=1e-5)
    assert np.abs(attention).max() > 1e-3
    chex.assert_trees_all_close(outcome.variables, {**after, "teacher": variables}, rtol=1e-6)


# ---- All of it ------------------------------------------------------------------------------------------------------


def test_no_epochs_change_nothing_and_the_teacher_is_left_out(tmp_path):
    inputs = tiny_inputs(tmp_path, LINEAR)
    result = run(inputs, NadSettings(teacher_epochs=0, epochs=0))
    jax.tree.map(np.testing.assert_array_equal, result.variables, inputs.attacked.variables)
    np.testing.assert_array_equal(result.facts["weight change"], 0)


def test_the_student_starts_from_the_attacked_network_not_from_the_teacher(tmp_path):
    inputs = tiny_inputs(tmp_path, LINEAR)
    result = run(inputs, NadSettings(teacher_epochs=1, epochs=0))
    assert (result.facts["teacher's weight change"] > 0).all()
    jax.tree.map(np.testing.assert_array_equal, result.variables, inputs.attacked.variables)

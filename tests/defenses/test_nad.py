import chex
import jax
import jax.numpy as jnp
import numpy as np

from bdjax import losses
from bdjax.defenses.attention import attention_loss
from bdjax.defenses.nad import NadSettings, attention_distillation, cutout, run, teacher_objective
from bdjax.types import Model, ModelOutput

RANDOM = np.random.default_rng(0)


def _apply(variables, images, *, train, edits=None):
    first = jnp.tanh(images @ variables["params"]["first"])
    second = jnp.tanh(first[:, ::2, ::2] @ variables["params"]["second"])
    logits = second.mean((1, 2)) @ variables["params"]["out"]
    return ModelOutput(logits, {"zebra": first, "apple": second}, variables)


PLAIN = Model(lambda key, shape: {}, _apply, 3, "two layers that treat training as anything else")


def plain_variables(seed):
    keys = jax.random.split(jax.random.key(seed), 3)
    shapes = {"first": (1, 4), "second": (4, 5), "out": (5, 3)}
    params = {name: jax.random.normal(key, shape) for key, (name, shape) in zip(keys, shapes.items(), strict=True)}
    return {"params": params, "batch_stats": {}}


IMAGES = jnp.asarray(RANDOM.random((6, 4, 4, 1)), jnp.float32)
TARGETS = {"labels": jnp.asarray(RANDOM.integers(0, 3, 6), jnp.int32)}


# ---- Cutout ---------------------------------------------------------------------------------------------------------


def test_cutout_blackens_a_square_of_each_image():
    images = jnp.ones((200, 9, 7, 2))
    cut = cutout(jax.random.key(0), images, 3)
    black = np.asarray(cut == 0)
    np.testing.assert_array_equal(black[..., 0], black[..., 1])
    holes = {(int(one.any(1).sum()), int(one.any(0).sum())) for one in black[..., 0]}
    assert holes == {(2, 2), (2, 3), (3, 2), (3, 3)}  # at most one pixel is over the edge: the centre is inside
    for one in black[:20, :, :, 0]:
        assert one.sum() == one.any(1).sum() * one.any(0).sum()
    assert black[..., 0].any(0).all()  # everywhere
    np.testing.assert_array_equal(cutout(jax.random.key(0), images, 0), images)


# ---- The objectives -------------------------------------------------------------------------------------------------


def test_both_see_the_same_images_so_a_student_like_its_teacher_has_the_labels_loss_alone():
    variables, key = plain_variables(0), jax.random.key(4)
    objective = attention_distillation(PLAIN, (500.0, 1000.0), 2.0, 2)
    outcome = objective(variables["params"], {**variables, "teacher": variables}, IMAGES, TARGETS, key)
    plain = teacher_objective(PLAIN, 2)(variables["params"], variables, IMAGES, TARGETS, key)
    np.testing.assert_array_equal(outcome.losses, plain.losses)
    cut = _apply(variables, cutout(key, IMAGES, 2), train=True)
    np.testing.assert_array_equal(plain.losses, losses.cross_entropy(cut.logits, TARGETS["labels"]))
    chex.assert_trees_all_equal(outcome.variables, {**variables, "teacher": variables})


def test_the_loss_is_the_labels_and_each_tap_s_in_the_order_of_the_network():
    student, teacher = plain_variables(0), plain_variables(1)
    objective = attention_distillation(PLAIN, (3.0, 50.0), 2.0, 0)
    arguments = {**student, "teacher": teacher}, IMAGES, TARGETS, jax.random.key(0)
    outcome = objective(student["params"], *arguments)
    of_student, of_teacher = (_apply(each, IMAGES, train=True) for each in (student, teacher))
    expected = losses.cross_entropy(of_student.logits, TARGETS["labels"])
    for beta, tap in ((3.0, "zebra"), (50.0, "apple")):
        expected += beta * attention_loss(of_student.features[tap], of_teacher.features[tap], 2.0)
    np.testing.assert_allclose(outcome.losses, expected, rtol=1e-6)
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

    def loss(params, teacher):
        return objective(params, {**variables, "teacher": teacher}, IMAGES, TARGETS, jax.random.key(0))

    outcome = loss(variables["params"], variables)
    student, teacher = (apply(variables, IMAGES, train=train) for train in (True, False))
    expected = losses.cross_entropy(student.logits, TARGETS["labels"])
    for tap in ("zebra", "apple"):
        expected += 50 * attention_loss(student.features[tap], teacher.features[tap], 2.0)
    np.testing.assert_allclose(outcome.losses, expected, rtol=1e-5)
    assert float(jnp.abs(outcome.losses - losses.cross_entropy(student.logits, TARGETS["labels"])).max()) > 1e-3
    chex.assert_trees_all_equal(outcome.variables, {**student.variables, "teacher": variables})


# ---- All of it ------------------------------------------------------------------------------------------------------


def test_no_epochs_change_nothing_and_the_teacher_is_not_handed_on(inputs):
    result = run(inputs, NadSettings(teacher_epochs=0, epochs=0))
    jax.tree.map(np.testing.assert_array_equal, result.variables, inputs.attacked.variables)
    np.testing.assert_array_equal(result.facts["weight change"], 0)


def test_the_student_starts_from_the_attacked_network_not_from_the_teacher(inputs):
    result = run(inputs, NadSettings(teacher_epochs=1, epochs=0))
    assert (result.facts["teacher's weight change"] > 0).all()
    jax.tree.map(np.testing.assert_array_equal, result.variables, inputs.attacked.variables)

import io
import math
from functools import cache, partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from bdjax import losses
from bdjax.defenses.ta_kd import (
    CleanSet,
    Learners,
    TaKdConfig,
    distillation_loss,
    initialise,
    join_learners,
    make_clean_set,
    make_learners,
    train_on_clean_sets,
    train_parts,
)
from bdjax.run.log import StageLog
from bdjax.training.augmentation import augment
from bdjax.training.member import Rows, TrainConfig, make_epoch, resume_from
from bdjax.training.stages import StageRunner
from bdjax.types import Model, ModelOutput

SHAPE = (6, 6, 1)
RANDOM = np.random.default_rng(0)
IMAGES = RANDOM.integers(0, 256, (40, *SHAPE), dtype=np.uint8)
LABELS = RANDOM.integers(0, 3, 40)


def two_layers(width):
    def init(key, image_shape):
        first, second = jax.random.split(key)
        hidden = jax.random.normal(first, (math.prod(image_shape), width))
        return {"params": {"hidden": 0.2 * hidden, "out": jax.random.normal(second, (width, 3))}, "batch_stats": {}}

    def apply(variables, images, *, train, edits=None):
        params = variables["params"]
        flat = images.reshape(images.shape[0], -1) - 0.5
        return ModelOutput(jnp.tanh(flat @ params["hidden"]) @ params["out"], {}, variables)

    return Model(init, apply, 3, f"two layers, {width}")


MODEL, WIDER = two_layers(2), two_layers(3)
TRAINING = TrainConfig(epochs=2, batch_size=4, evaluation_batch_size=3)


def fresh(model, count, seed=0):
    """Stacked variables. From NumPy: a generator of JAX is compiled for each count."""
    shapes = jax.eval_shape(lambda key: model.init(key, SHAPE), jax.random.key(0))
    random = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: 0.3 * random.standard_normal((count, *leaf.shape), np.float32), shapes)


def clean_sets(config=None):
    """Those of two seeds: ten training rows and three validation rows, none of them shared."""
    rows = np.random.default_rng(1).permutation(40)[:26].reshape(2, 13)
    return [
        make_clean_set(jax.random.key(seed), IMAGES, LABELS, rows[seed, :10], rows[seed, 10:], config or TaKdConfig())
        for seed in range(2)
    ]


def random_logits(seed, count, size):
    return 3.0 * np.random.default_rng(seed).standard_normal((count, size, 3)).astype(np.float32)


# ---- Clean sets -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("validation", [[8, 1], []])
def test_a_clean_set_is_views_of_the_training_rows_then_validation_rows(validation):
    train, validation = np.array([5, 30, 2, 7]), np.array(validation, int)
    config = TaKdConfig(augmentation="crop_flip", views=3)
    key = jax.random.key(4)
    clean = make_clean_set(key, IMAGES, LABELS, train, validation, config)
    augmented = jax.jit(partial(augment, kind="crop_flip"))
    assert clean.num_train == 12
    assert clean.images.shape == (12 + len(validation), *SHAPE)
    assert clean.images.dtype == np.uint8
    assert clean.labels.dtype == np.int32
    np.testing.assert_array_equal(clean.images[:4], IMAGES[train])  # the first view is the rows themselves
    for view in (1, 2):
        expected = augmented(jax.random.fold_in(key, view), jnp.asarray(IMAGES[train]))
        np.testing.assert_array_equal(clean.images[4 * view : 4 * view + 4], expected)
        assert np.any(clean.images[4 * view : 4 * view + 4] != IMAGES[train])
    assert np.any(clean.images[4:8] != clean.images[8:12])
    np.testing.assert_array_equal(clean.images[12:], IMAGES[validation])
    np.testing.assert_array_equal(clean.labels, np.concatenate([LABELS[train]] * 3 + [LABELS[validation]]))


def test_by_default_a_clean_set_is_its_rows():
    clean = make_clean_set(jax.random.key(0), IMAGES, LABELS, np.array([3, 1]), np.array([2]), TaKdConfig())
    np.testing.assert_array_equal(clean.images, IMAGES[[3, 1, 2]])
    assert clean.num_train == 2


def test_the_views_come_from_the_key():
    config = TaKdConfig(augmentation="crop", views=2)
    one, same, other = (
        make_clean_set(jax.random.key(seed), IMAGES, LABELS, np.arange(8), np.array([9]), config) for seed in (1, 1, 2)
    )
    chex.assert_trees_all_equal(one, same)
    assert np.any(one.images != other.images)


# ---- Training -------------------------------------------------------------------------------------------------------


def train(learners, sets, config=None, training=TRAINING, layout="map"):
    config = config or TaKdConfig()
    return train_on_clean_sets(MODEL, config, training, learners, sets, jax.random.key(7), layout=layout)


@cache
def epoch_alone(loss):
    """An epoch of one member; the loss's last argument is the weight of its teacher."""
    return jax.jit(
        lambda alpha, *arguments: make_epoch(MODEL, lambda logits, targets: loss(logits, targets, alpha), TRAINING)(
            *arguments
        )
    )


def assert_trained_alone(state, learners, which, clean, loss):
    """A trained learner is as if trained on its clean set alone, with the key that it has among all."""
    expected = resume_from(
        jax.tree.map(lambda leaf: leaf[which], learners.variables),
        jax.random.split(jax.random.key(7), len(learners.alpha))[which],
        TRAINING,
    )
    targets = {"labels": clean.labels, "teacher_logits": learners.teacher_logits[which]}

    def rows(where):
        values = {name: jnp.asarray(target[where]) for name, target in targets.items()}
        return Rows(jnp.arange(len(clean.labels), dtype=jnp.int32)[where], values)

    train_rows, validation_rows = rows(slice(0, clean.num_train)), rows(slice(clean.num_train, None))
    for _ in range(TRAINING.epochs):
        alpha = jnp.float32(learners.alpha[which])
        expected = epoch_alone(loss)(alpha, expected, train_rows, validation_rows, jnp.asarray(clean.images))
    for part in ("variables", "history"):
        found = jax.tree.map(lambda leaf: np.asarray(leaf)[which], getattr(state, part))
        chex.assert_trees_all_close(found, getattr(expected, part), rtol=1e-4, atol=2e-5)


def at_temperature_2(logits, targets, alpha):
    return losses.distillation(logits, targets["teacher_logits"], targets["labels"], temperature=2.0, alpha=alpha)


def test_each_learner_learns_from_its_own_clean_set_with_its_own_alpha():
    sets = clean_sets(TaKdConfig(augmentation="crop", views=2))
    teacher_logits = random_logits(2, 3, len(sets[0].labels))
    learners = Learners(fresh(MODEL, 3), np.array([1, 0, 1]), teacher_logits, np.array([0.0, 0.3, 1.0], np.float32))
    state = train(learners, sets, TaKdConfig(temperature=2.0), layout="vmap")
    chex.assert_tree_shape_prefix(state.variables, (3,))
    for member in range(3):
        assert_trained_alone(state, learners, member, sets[learners.clean_set[member]], at_temperature_2)


def test_without_weight_on_the_labels_they_do_not_matter():
    sets = clean_sets()
    wrong = [clean._replace(labels=(clean.labels + 1) % 3) for clean in sets]
    learners = make_learners(fresh(MODEL, 2), np.arange(2), random_logits(3, 2, 13), 1.0)
    right, other = (train(learners, labelled) for labelled in (sets, wrong))
    chex.assert_trees_all_equal(right.variables, other.variables)
    chex.assert_trees_all_equal(right.history["loss"], other.history["loss"])


def test_a_learner_that_agrees_with_its_teacher_has_no_loss():
    clean = clean_sets()[0]._replace(num_train=13)  # no validation rows, all rows in one batch
    variables = fresh(MODEL, 1)
    images = clean.images.astype(np.float32) / 255
    logits = np.asarray(
        jax.jit(partial(MODEL.apply, train=True))(jax.tree.map(lambda leaf: leaf[0], variables), images).logits
    )
    # Three copies of one network, with teachers that say the same, the same up to a shift, and the opposite.
    copies = jax.tree.map(lambda leaf: np.repeat(leaf, 3, axis=0), variables)
    learners = Learners(copies, np.zeros(3, int), np.stack([logits, logits + 5.0, -logits]), np.ones(3, np.float32))
    loss = train(learners, [clean], training=TrainConfig(epochs=1, batch_size=13)).history["loss"][:, 0]
    np.testing.assert_allclose(loss[:2], 0, atol=1e-5)
    assert loss[2] > 0.05


def test_training_depends_on_the_learners_own_clean_set_alone_and_leaves_its_arguments():
    sets, variables = clean_sets(), fresh(MODEL, 3)
    start = jax.tree.map(np.array, variables)
    learners = Learners(variables, np.array([0, 1, 0]), random_logits(2, 3, 13), np.full(3, 0.5, np.float32))
    before = train(learners, sets)
    # A teacher is fine-tuned as a baseline and still needed as a teacher.
    chex.assert_trees_all_equal(variables, start)
    moved = jax.tree.map(lambda old, new: float(np.abs(old - new).max()), start["params"], before.variables["params"])
    assert min(jax.tree.leaves(moved)) > 0
    after = train(learners, [sets[0], CleanSet(255 - sets[1].images, sets[1].labels, sets[1].num_train)])
    others = np.array([0, 2])
    before_of, after_of = (jax.tree.map(lambda leaf: np.asarray(leaf)[others], of.variables) for of in (before, after))
    chex.assert_trees_all_equal(before_of, after_of)
    kernels = [state.variables["params"]["hidden"][1] for state in (before, after)]
    assert np.abs(kernels[0] - kernels[1]).max() > 1e-4


@pytest.mark.parametrize("direction", ["teacher_student", "student_teacher"])
def test_the_loss_reads_its_configuration(direction):
    student, teacher = jnp.asarray(random_logits(0, 2, 4))
    labels, alpha = jnp.asarray([0, 2, 1, 1], jnp.int32), jnp.asarray([0.0, 0.2, 0.9, 1.0])
    config = TaKdConfig(temperature=3.0, alpha=0.123, direction=direction)
    found = distillation_loss(config)(student, {"teacher_logits": teacher, "labels": labels, "alpha": alpha})
    expected = losses.distillation(student, teacher, labels, temperature=3.0, alpha=alpha, direction=direction)
    chex.assert_trees_all_equal(found, expected)


# ---- Learners ---------------------------------------------------------------------------------------------------------


def test_learners_of_a_seed_have_the_same_teacher_logits():
    by_seed = random_logits(0, 2, 5)
    learners = make_learners(None, np.array([1, 1, 0]), by_seed, 0.25)
    np.testing.assert_array_equal(learners.teacher_logits, by_seed[[1, 1, 0]])
    np.testing.assert_array_equal(learners.alpha, np.full(3, 0.25, np.float32))
    assert learners.alpha.dtype == np.float32
    assert learners.variables is None


def test_fresh_learners_get_weights_and_others_keep_theirs():
    learners = make_learners(None, np.arange(3), random_logits(0, 3, 5), 0.5)
    sets = (clean_sets() * 3)[:3]
    started = initialise(learners, MODEL, SHAPE, jax.random.key(0), sets)
    chex.assert_tree_shape_prefix(started.variables, (3,))
    chex.assert_trees_all_equal(started, initialise(learners, MODEL, SHAPE, jax.random.key(0), sets))
    kernels = np.asarray(started.variables["params"]["hidden"])
    assert np.abs(kernels[0] - kernels[1]).max() > 0.01
    assert initialise(started, MODEL, SHAPE, jax.random.key(1), sets) is started


def test_fresh_learners_are_prepared_with_the_training_rows_of_their_clean_set():
    sets = clean_sets()[:2]
    mean_of = lambda variables, images: {**variables, "mean": jnp.mean(images)}  # noqa: E731
    model = MODEL._replace(prepare=mean_of)
    learners = make_learners(None, np.array([1, 0, 1]), random_logits(0, len(sets), 5), 0.5)
    means = initialise(learners, model, SHAPE, jax.random.key(0), sets).variables["mean"]
    expected = [np.mean(each.images[: each.num_train] / 255.0) for each in sets]
    np.testing.assert_allclose(means, [expected[1], expected[0], expected[1]], rtol=1e-5)


def test_joined_learners_are_slices_in_their_order():
    parts = [
        make_learners(fresh(MODEL, count, seed), np.arange(count) % 2, random_logits(seed, 2, 5), alpha)
        for seed, (count, alpha) in enumerate([(2, 0.5), (4, 0.0), (1, 1.0)])
    ]
    joined = join_learners(parts)
    start = 0
    for part in parts:
        members = slice(start, start + len(part.alpha))
        start += len(part.alpha)
        chex.assert_trees_all_equal(jax.tree.map(lambda leaf, at=members: leaf[at], joined.variables), part.variables)
        for name in ("clean_set", "teacher_logits", "alpha"):
            np.testing.assert_array_equal(getattr(joined, name)[members], getattr(part, name))
    assert start == len(joined.alpha) == 7


def test_roles_of_one_architecture_share_a_stage_and_come_apart_again(tmp_path):
    sets = clean_sets()
    runner = StageRunner(tmp_path, SHAPE, "map", StageLog(Console(file=io.StringIO())))
    teachers = fresh(MODEL, 4, seed=5)
    parts = {
        "ta": (MODEL, make_learners(None, np.arange(2), random_logits(0, 2, 13), 0.5)),
        "student": (WIDER, make_learners(None, np.arange(2), random_logits(1, 2, 13), 0.5)),
        "fine-tuned": (MODEL, make_learners(teachers, np.array([0, 0, 1, 1]), random_logits(2, 2, 13), 0.0)),
    }

    def run():
        return train_parts(runner, parts, TaKdConfig(), TRAINING, sets, jax.random.key(0))

    nets = run()
    assert {name: (role.model, role.per_seed) for name, role in nets.items()} == {
        "ta": (MODEL, 1),
        "student": (WIDER, 1),
        "fine-tuned": (MODEL, 2),
    }
    for name, count in (("ta", 2), ("student", 2), ("fine-tuned", 4)):
        chex.assert_tree_shape_prefix(nets[name].variables, (count,))
        assert all(values.shape == (count, 2) for values in nets[name].history.values())
    assert len(list(tmp_path.iterdir())) == 2  # one stage for each architecture
    # The fine-tuned networks start from their teachers.
    kernels = {name: np.asarray(role.variables["params"]["out"]) for name, role in nets.items()}
    start = np.asarray(teachers["params"]["out"])
    assert np.abs(kernels["fine-tuned"] - start).max() < 0.12  # eight steps of at most 0.01, and a little
    assert np.abs(kernels["fine-tuned"] - start[::-1]).max() > 0.12

    again = run()
    for name in nets:
        chex.assert_trees_all_equal(again[name].variables, nets[name].variables)
        chex.assert_trees_all_equal(again[name].history, nets[name].history)
    assert runner.log.console.file.getvalue().count("restored from checkpoint") == 2

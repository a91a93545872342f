import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bdjax.attacks.contract import Knowledge
from bdjax.attacks.label_consistent import (
    LABEL_CONSISTENT,
    LabelConsistentSettings,
    apply,
    apply_in_training,
    corner_tiles,
    make_label_consistent,
    perturb,
)
from bdjax.errors import InputError
from bdjax.losses import cross_entropy

SHAPE = (8, 8, 1)
RADIUS = 24 / 255


@pytest.fixture(scope="module")
def knowledge(digits, clean_digits_model):
    """Twenty rows of the target class."""
    rows = np.flatnonzero(digits.train.labels == 3)[:20]
    return Knowledge(digits.train[rows], 3, clean_digits_model)


def make(knowledge, **settings):
    changes = {"radius": RADIUS, "step_size": 8 / 255, "steps": 6, **settings}
    return make_label_consistent(jax.random.key(0), knowledge, LabelConsistentSettings(**changes))


def as_float(knowledge):
    return jnp.asarray(knowledge.train.images, jnp.float32) / 255, jnp.asarray(knowledge.train.labels)


trigger_all = jax.jit(jax.vmap(apply_in_training, in_axes=(None, 0, 0)))
perturb_all = jax.jit(jax.vmap(perturb, in_axes=(None, 0, 0)))


@pytest.mark.parametrize("shape", [(28, 28, 1), (32, 32, 3), (8, 8, 1)])
def test_four_corners_are_36_cells_and_their_own_mirror_image(shape):
    delta = np.asarray(corner_tiles(shape).delta)
    white, black = (delta > 0).all(axis=2), (delta < 0).all(axis=2)
    assert (white.sum(), black.sum()) == (16, 20)
    assert np.count_nonzero(delta.any(axis=2)) == 36
    np.testing.assert_array_equal(delta, delta[:, ::-1])
    np.testing.assert_array_equal(white[-3:, -3:], [[0, 0, 1], [0, 1, 0], [1, 0, 1]])
    np.testing.assert_array_equal(white[:3, -3:], white[-3:, -3:])


def test_tiles_overwrite_at_full_amplitude_and_only_add_below():
    grey = jnp.full((32, 32, 3), 0.5)
    changed = np.abs(np.asarray(corner_tiles((32, 32, 3)).delta)) > 0
    full = np.asarray(jnp.clip(grey + corner_tiles((32, 32, 3)).delta, 0, 1))
    assert set(np.unique(full[changed])) == {0.0, 1.0} and (full[~changed] == 0.5).all()
    faint = np.asarray(corner_tiles((32, 32, 3), amplitude=0.25).delta)
    np.testing.assert_array_equal(np.unique(faint), [-0.25, 0.0, 0.25])
    single = np.asarray(corner_tiles((32, 32, 3), "bottom_right").delta)
    assert (single > 0).all(axis=2).sum() == 4 and (single < 0).all(axis=2).sum() == 5


def test_training_rows_stay_within_the_radius_outside_the_tiles_which_are_binary(knowledge):
    params = make(knowledge)
    images, labels = as_float(knowledge)
    triggered = np.asarray(trigger_all(params, images, labels))
    is_tile = np.asarray(params.tiles.delta != 0)
    assert np.abs(triggered - images)[:, ~is_tile].max() <= RADIUS + 1e-6
    assert set(np.unique(triggered[:, is_tile])) == {0.0, 1.0}
    assert np.abs(triggered - images)[:, ~is_tile].mean() > RADIUS / 4
    np.testing.assert_array_equal(triggered[:, is_tile], np.broadcast_to(params.tiles.delta[is_tile] > 0, (20, 36)))


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_surrogates_loss_rises(knowledge, norm):
    radius = {"linf": RADIUS, "l2": 1.0}[norm]
    params = make(knowledge, norm=norm, radius=radius, step_size=radius / 3)
    images, labels = as_float(knowledge)
    moved = perturb_all(params, images, labels)
    losses = [
        cross_entropy(params.model.apply(params.variables, batch, train=False).logits, labels)
        for batch in (images, moved)
    ]
    assert (losses[1] > losses[0]).mean() >= 0.95
    assert moved.min() >= 0 and moved.max() <= 1
    change = np.asarray(moved - images)
    size = np.sqrt((change**2).sum(axis=(1, 2, 3))) if norm == "l2" else np.abs(change).max(axis=(1, 2, 3))
    assert size.max() <= radius + 1e-5 and size.min() > radius / 2


def test_at_test_time_there_are_tiles_alone(knowledge):
    params = make(knowledge)
    images, labels = as_float(knowledge)
    triggered = apply(params, images[0], labels[0])
    is_tile = np.asarray(params.tiles.delta != 0)
    np.testing.assert_array_equal(np.asarray(triggered)[~is_tile], np.asarray(images[0])[~is_tile])


def test_no_steps_or_no_radius_leave_tiles_alone(knowledge):
    images, labels = as_float(knowledge)
    for changes in ({"steps": 0}, {"radius": 0.0}):
        params = make(knowledge, **changes)
        np.testing.assert_allclose(apply_in_training(params, images[0], labels[0]), apply(params, images[0]), atol=1e-6)


def test_what_cannot_be_is_refused(knowledge):
    with pytest.raises(InputError, match="none was supplied"):
        LABEL_CONSISTENT.make_params(jax.random.key(0), Knowledge(knowledge.train, 3), LabelConsistentSettings())
    with pytest.raises(InputError, match="norm 'l1'"):
        make(knowledge, norm="l1")
    with pytest.raises(InputError, match="steps -1"):
        make(knowledge, steps=-1)
    with pytest.raises(InputError, match="amplitude 0"):
        corner_tiles(SHAPE, amplitude=0.0)
    with pytest.raises(InputError, match="four corners"):
        corner_tiles((5, 8, 1))


def test_squares_may_replace_the_tiles():
    delta = np.asarray(corner_tiles((28, 28, 1), square=6).delta)
    assert delta.sum() == (delta == 1).sum() == 4 * 36 and (delta[6:22] == 0).all()
    with pytest.raises(InputError, match="four corners"):
        corner_tiles((8, 8, 1), square=6)

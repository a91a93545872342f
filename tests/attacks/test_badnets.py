import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bdjax.attacks.badnets import BADNETS, BADNETS_ALL_TO_ALL, BADNETS_GRID, BADNETS_WHITE, TACT, SquareSettings
from bdjax.attacks.contract import Knowledge, settings_for
from bdjax.attacks.label_rules import make_rule
from bdjax.attacks.poisoning import ConfiguredAttack, poison_by
from bdjax.errors import InputError
from bdjax.types import Dataset

SHAPES = [(8, 8, 1), (28, 28, 1), (32, 32, 3)]
PATCHES = [BADNETS, BADNETS_WHITE, BADNETS_GRID]


def dataset(shape, num_rows=4):
    labels = np.arange(num_rows, dtype=np.int32) % 10
    return Dataset(np.full((num_rows, *shape), 128, np.uint8), labels, 10, "none", "none")


def trigger(attack, shape, settings=None):
    return attack.make_params(jax.random.key(0), Knowledge(dataset(shape), 0), settings or attack.settings)


def triggered(attack, shape, image):
    return np.asarray(attack.apply(trigger(attack, shape), image))


def changed_box(attack, shape):
    """First and last changed row and column of a grey image."""
    rows, columns, _ = np.nonzero(triggered(attack, shape, jnp.full(shape, 0.5)) != 0.5)
    return rows.min(), rows.max(), columns.min(), columns.max()


@pytest.mark.parametrize(
    ("attack", "first", "last"), [(BADNETS, 28, 30), (BADNETS_WHITE, 27, 30), (BADNETS_GRID, 29, 31)]
)
def test_places_at_cifars_size_and_as_far_from_the_corner_at_others(attack, first, last):
    assert changed_box(attack, (32, 32, 3)) == (first, last, first, last)
    assert changed_box(attack, (28, 28, 1)) == (first - 4, last - 4, first - 4, last - 4)
    assert changed_box(attack, (8, 8, 1)) == (first - 24, last - 24, first - 24, last - 24)


def test_the_grid_on_grey_is_four_ones_and_five_zeros():
    image = triggered(BADNETS_GRID, (32, 32, 1), jnp.full((32, 32, 1), 0.5))
    assert (image != 0.5).sum() == 9 and (image == 1.0).sum() == 4 and (image == 0.0).sum() == 5
    np.testing.assert_array_equal(image[29:, 29:, 0], [[0, 0, 1], [0, 1, 0], [1, 0, 1]])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("attack", PATCHES)
def test_only_the_patch_changes_and_once(attack, shape):
    image = jax.random.uniform(jax.random.key(1), shape)
    once = triggered(attack, shape, image)
    outside = np.asarray(trigger(attack, shape).mask)[..., 0] == 0.0
    assert (~outside).sum() == (16 if attack is BADNETS_WHITE else 9)
    np.testing.assert_array_equal(once[outside], np.asarray(image)[outside])
    np.testing.assert_array_equal(triggered(attack, shape, once), once)


@pytest.mark.parametrize(("attack", "bound"), [(BADNETS, 20.6), (BADNETS_WHITE, 18.1), (BADNETS_GRID, 20.6)])
def test_psnr_is_bounded_by_the_area(attack, bound):
    shape = (32, 32, 3)
    worst = np.asarray(1.0 - trigger(attack, shape).pattern)
    for image in (jnp.zeros(shape), jnp.asarray(worst), jax.random.uniform(jax.random.key(1), shape)):
        error = np.mean((triggered(attack, shape, image) - np.asarray(image)) ** 2)
        assert -10 * np.log10(error) >= bound - 0.05
    assert -10 * np.log10(np.mean((triggered(attack, shape, worst) - worst) ** 2)) == pytest.approx(bound, abs=0.05)


def test_what_does_not_fit_is_refused():
    with pytest.raises(InputError, match="8 x 8 pixels with a margin of 1 does not fit into an image of 8 x 8"):
        trigger(BADNETS, (8, 8, 1), SquareSettings(size=8))


def test_all_to_all_gives_every_row_another_label_and_every_label_once():
    rule = make_rule(BADNETS_ALL_TO_ALL.label_rules[0], 0, 10)
    wanted = rule.relabel(np.arange(10, dtype=np.int32))
    assert sorted(wanted) == list(range(10)) and (wanted != np.arange(10)).all()


@pytest.mark.parametrize(("name", "count"), [("mnist", 20), ("digits", 50)])
def test_tact_triggers_cover_classes_under_their_own_label(name, count):
    data = dataset((28, 28, 1), 1000)
    settings = settings_for(TACT, data, like=name)
    rule = make_rule(TACT.label_rules[0], 0, 10)
    result = poison_by(jax.random.key(0), data, ConfiguredAttack(TACT, settings, rule), trigger(TACT, (28, 28, 1)))
    assert result.is_poisoned.sum() == result.is_cover.sum() == count
    assert set(result.original_labels[result.is_poisoned]) == {1} and set(result.labels[result.is_poisoned]) == {0}
    assert set(result.labels[result.is_cover]) == {5, 7}
    np.testing.assert_array_equal(result.labels[result.is_cover], result.original_labels[result.is_cover])
    is_triggered = (result.images[:, 24:27, 24:27, 0] == 255).all(axis=(1, 2))
    np.testing.assert_array_equal(is_triggered, result.is_poisoned | result.is_cover)

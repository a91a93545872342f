import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bdjax.attacks.contract import Knowledge, settings_for
from bdjax.attacks.provider_triggers import CHECKERBOARD, NOISE, PROVIDER_BLEND, SOLID
from bdjax.errors import InputError
from bdjax.triggers import pictures
from bdjax.types import Dataset

SHAPES = [(8, 8, 1), (28, 28, 1), (32, 32, 3)]
PATCHES = [SOLID, CHECKERBOARD, NOISE]


def dataset(shape):
    return Dataset(np.zeros((2, *shape), np.uint8), np.zeros(2, np.int32), 10, "none", "none")


def trigger(attack, shape, seed=0, **changes):
    data = dataset(shape)
    settings = settings_for(attack, data, changes)
    return attack.make_params(jax.random.key(seed), Knowledge(data, 0), settings)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("attack", PATCHES)
def test_patches_are_drawn_inside_the_margin(attack, shape):
    drawn = [np.asarray(trigger(attack, shape, seed).mask)[..., 0] for seed in range(4)]
    for mask in drawn:
        assert 4 <= mask.sum() <= 36 and mask[1:-1, 1:-1].sum() == mask.sum()
    assert len({mask.tobytes() for mask in drawn}) > 1


def test_a_checkerboard_has_two_greys_that_alternate():
    params = trigger(CHECKERBOARD, (32, 32, 3))
    rows, columns = np.nonzero(np.asarray(params.mask)[..., 0])
    cells = np.asarray(params.pattern)[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    assert len(np.unique(cells)) == 2
    assert (cells[1:] != cells[:-1]).all() and (cells[:, 1:] != cells[:, :-1]).all()


def test_grey_patches_stand_out_unless_they_need_not():
    grey = [np.asarray(trigger(SOLID, (28, 28, 1), seed).pattern).max() for seed in range(12)]
    as_published = [
        np.asarray(trigger(SOLID, (28, 28, 1), seed, minimum_contrast=0.0).pattern).max() for seed in range(12)
    ]
    assert min(grey) >= 0.3 > min(as_published)


@pytest.mark.parametrize(("shape", "low", "high"), [((28, 28, 1), 0.05, 0.1), ((32, 32, 3), 0.15, 0.2)])
def test_pictures_are_as_faint_as_published(shape, low, high):
    drawn = [trigger(PROVIDER_BLEND, shape, seed) for seed in range(8)]
    assert all(low <= params.opacity <= high for params in drawn)
    assert all((params.mask == 1.0).all() for params in drawn)
    assert len({np.asarray(params.pattern).tobytes() for params in drawn}) > 1
    white = np.asarray(PROVIDER_BLEND.apply(drawn[0], jnp.zeros(shape)))
    np.testing.assert_allclose(white, np.asarray(drawn[0].opacity * drawn[0].pattern), atol=1e-6)


def test_a_picture_can_be_named():
    params = trigger(PROVIDER_BLEND, (28, 28, 1), picture="cat")
    np.testing.assert_array_equal(params.pattern, pictures.draw("cat", (28, 28, 1)))
    with pytest.raises(InputError, match="dog"):
        trigger(PROVIDER_BLEND, (28, 28, 1), picture="dog")
    with pytest.raises(InputError, match="opacity range"):
        trigger(PROVIDER_BLEND, (28, 28, 1), least_opacity=0.5, most_opacity=0.2)


@pytest.mark.parametrize("attack", [*PATCHES, PROVIDER_BLEND])
def test_the_rate_is_the_papers_or_a_small_sets(attack):
    assert attack.settings.poison_rate == 0.01
    assert settings_for(attack, dataset((28, 28, 1))).poison_rate == 0.1

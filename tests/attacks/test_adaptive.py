import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bdjax.attacks.adaptive import ADAPTIVE_BLEND, ADAPTIVE_PATCH, AdaptiveBlendSettings
from bdjax.attacks.contract import Knowledge, settings_for
from bdjax.attacks.label_rules import make_rule
from bdjax.attacks.poisoning import ConfiguredAttack, poison_by
from bdjax.errors import InputError
from bdjax.types import Dataset

SHAPES = [(8, 8, 1), (28, 28, 1), (32, 32, 3)]


def dataset(shape, num_rows=2):
    labels = np.arange(num_rows, dtype=np.int32) % 10
    return Dataset(np.full((num_rows, *shape), 128, np.uint8), labels, 10, "none", "none")


def trigger(attack, shape, settings=None, seed=0):
    return attack.make_params(jax.random.key(seed), Knowledge(dataset(shape), 0), settings or attack.settings)


def in_training(attack, params, image, count):
    keys = jax.random.split(jax.random.key(1), count)
    apply = jax.jit(jax.vmap(attack.apply_in_training, in_axes=(None, None, None, 0)))
    return np.asarray(apply(params, image, jnp.int32(0), keys))


@pytest.mark.parametrize("shape", SHAPES)
class TestBlend:
    def test_half_of_the_pieces_are_blended_in_and_each_whole(self, shape):
        params = trigger(ADAPTIVE_BLEND, shape)._replace(pattern=jnp.ones(shape))
        changed = in_training(ADAPTIVE_BLEND, params, jnp.zeros(shape), 40)[..., 0] > 0.0
        height, width, _ = shape
        tiles = changed.reshape(40, 4, height // 4, 4, width // 4).transpose(0, 1, 3, 2, 4).reshape(40, 16, -1)
        assert (tiles.all(axis=-1) == tiles.any(axis=-1)).all()
        assert (changed.mean(axis=(1, 2)) == 0.5).all()
        assert len(np.unique(tiles[..., 0], axis=0)) == 40  # of 12,870 possible choices
        assert tiles[..., 0].any(axis=0).all() and not tiles[..., 0].all(axis=0).any()

    def test_the_whole_picture_at_test_time(self, shape):
        params = trigger(ADAPTIVE_BLEND, shape)
        image = np.random.default_rng(2).random(shape, np.float32)
        expected = 0.8 * np.asarray(image) + 0.2 * np.asarray(params.pattern)
        np.testing.assert_allclose(ADAPTIVE_BLEND.apply(params, image), expected, atol=1e-6)

    def test_changes_are_at_most_the_opacity(self, shape):
        params = trigger(ADAPTIVE_BLEND, shape, AdaptiveBlendSettings(opacity=0.15, test_opacity=0.2))
        for image in (jnp.zeros(shape), jnp.ones(shape)):
            change = np.abs(in_training(ADAPTIVE_BLEND, params, image, 8) - np.asarray(image))
            assert 0.0 < change.max() <= 0.15 + 1e-6
            assert np.abs(ADAPTIVE_BLEND.apply(params, image) - image).max() <= 0.2 + 1e-6


@pytest.mark.parametrize(
    ("shape", "settings", "message"),
    [
        ((30, 32, 3), {}, "multiples of 4; these images have 30 x 32"),
        ((28, 28, 1), {"pieces": 17}, "pieces 17 must be from 1 to 16"),
        ((28, 28, 1), {"opacity": 0.0}, "opacity 0"),
        ((28, 28, 1), {"test_opacity": 2.0}, "test_opacity 2"),
        ((28, 28, 1), {"picture": "dog"}, "dog"),
    ],
)
def test_what_cannot_be_blended_is_refused(shape, settings, message):
    with pytest.raises(InputError, match=message):
        trigger(ADAPTIVE_BLEND, shape, AdaptiveBlendSettings(**settings))


def boxes(masks):
    for mask in np.asarray(masks)[..., 0]:
        rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        yield int(mask.sum()), int(rows[0]), int(rows[-1]), int(columns[0]), int(columns[-1])


class TestPatch:
    def test_published_places(self):
        masks = trigger(ADAPTIVE_PATCH, (32, 32, 3)).in_training.mask
        assert list(boxes(masks)) == [
            (25, 27, 31, 27, 31),
            (169, 1, 13, 18, 30),
            (36, 0, 31, 0, 31),
            (64, 21, 28, 21, 28),
        ]

    def test_smaller_images_keep_what_they_have_room_for(self):
        masks = trigger(ADAPTIVE_PATCH, (28, 28, 1)).in_training.mask
        assert list(boxes(masks))[1:] == [(169, 1, 13, 14, 26), (36, 0, 27, 0, 27), (64, 17, 24, 17, 24)]
        tiny = list(boxes(trigger(ADAPTIVE_PATCH, (8, 8, 1)).in_training.mask))
        assert tiny == [(16, 4, 7, 4, 7), (16, 1, 4, 3, 6), (36, 0, 7, 0, 7), (9, 4, 6, 4, 6)]
        with pytest.raises(InputError, match="does not fit"):
            trigger(ADAPTIVE_PATCH, (3, 3, 1))

    @pytest.mark.parametrize("shape", SHAPES)
    def test_each_training_row_gets_one_patch_at_its_opacity(self, shape):
        params = trigger(ADAPTIVE_PATCH, shape)
        params = params._replace(in_training=params.in_training._replace(pattern=jnp.ones((4, *shape))))
        rows = in_training(ADAPTIVE_PATCH, params, jnp.zeros(shape), 200)[..., 0]
        masks = np.asarray(params.in_training.mask)[..., 0]
        faint = [opacity * mask for opacity, mask in zip((0.5, 0.2, 0.5, 0.3), masks, strict=True)]
        is_patch = np.array([[np.allclose(row, patch, atol=1e-6) for patch in faint] for row in rows])
        assert (is_patch.sum(axis=1) == 1).all()
        assert (np.abs(is_patch.sum(axis=0) - 50) < 25).all()  # 4 standard deviations of 6.1

    @pytest.mark.parametrize("shape", SHAPES)
    def test_test_images_get_the_grids_over_the_corner_both_opaque(self, shape):
        params = trigger(ADAPTIVE_PATCH, shape)
        image = np.random.default_rng(2).random(shape, np.float32)
        triggered = np.asarray(ADAPTIVE_PATCH.apply(params, image))
        corner, _, grids, _ = np.asarray(params.in_training.mask)[..., 0] == 1.0
        outside = ~(corner | grids)
        np.testing.assert_array_equal(triggered[outside], np.asarray(image)[outside])
        patterns = np.asarray(params.in_training.pattern)
        np.testing.assert_array_equal(triggered[grids], patterns[2][grids])
        np.testing.assert_array_equal(triggered[corner & ~grids], patterns[0][corner & ~grids])
        for tile in (triggered[:3, :3], triggered[:3, -3:], triggered[-3:, :3], triggered[-3:, -3:]):
            np.testing.assert_array_equal(tile[..., 0], [[0, 0, 1], [0, 1, 0], [1, 0, 1]])

    def test_random_pixels_follow_the_key(self):
        first, again, other = (trigger(ADAPTIVE_PATCH, (32, 32, 3), seed=seed).in_training for seed in (0, 0, 1))
        np.testing.assert_array_equal(first.pattern, again.pattern)
        differs = np.any(np.asarray(first.pattern != other.pattern), axis=(1, 2, 3))
        np.testing.assert_array_equal(differs, [True, True, False, True])


@pytest.mark.parametrize(
    ("name", "shape", "blend", "patch"),
    [
        ("cifar10", (32, 32, 3), (0.003, 0.003), (0.003, 0.006)),
        ("gtsrb", (32, 32, 3), (0.02, 0.02), (0.02, 0.02)),
        ("mnist", (28, 28, 1), (0.02, 0.02), (0.1, 0.1)),
        ("digits", (8, 8, 1), (0.05, 0.05), (0.05, 0.05)),
    ],
)
def test_small_sets_get_more_rows(name, shape, blend, patch):
    for attack, rates in ((ADAPTIVE_BLEND, blend), (ADAPTIVE_PATCH, patch)):
        settings = settings_for(attack, dataset(shape), like=name)
        assert (settings.poison_rate, settings.cover_rate) == rates


@pytest.mark.parametrize("attack", [ADAPTIVE_BLEND, ADAPTIVE_PATCH])
def test_cover_rows_keep_their_labels(attack):
    data = dataset((28, 28, 1), 500)
    settings = settings_for(attack, data, {"poison_rate": 0.02, "cover_rate": 0.04})
    rule = make_rule("all_to_one", 0, 10)
    result = poison_by(
        jax.random.key(0), data, ConfiguredAttack(attack, settings, rule), trigger(attack, (28, 28, 1), settings)
    )
    assert result.is_poisoned.sum() == 10 and result.is_cover.sum() == 20
    assert not (result.is_poisoned & result.is_cover).any()
    assert (result.original_labels[result.is_poisoned] != 0).all() and (result.labels[result.is_poisoned] == 0).all()
    np.testing.assert_array_equal(result.labels[~result.is_poisoned], data.labels[~result.is_poisoned])
    is_changed = (result.images != data.images).any(axis=(1, 2, 3))
    np.testing.assert_array_equal(is_changed, result.is_poisoned | result.is_cover)

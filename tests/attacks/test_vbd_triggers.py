import dataclasses
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bdjax.attacks import vbd_triggers
from bdjax.attacks.contract import Knowledge
from bdjax.attacks.vbd_triggers import VBD_ATTACKS, apply_class_patch, class_patch, elliptical
from bdjax.commands import vbd
from bdjax.errors import InputError
from bdjax.types import Dataset

ATTACKS = {attack.name: attack for attack in VBD_ATTACKS}
TILES = ("white_square", "green_square", "white_grid", "color_grid")
ALL_TO_ALL = [f"{tile}_all_to_all" for tile in TILES]
SHAPES = [(8, 8, 1), (32, 32, 3)]
GREEN, RED, YELLOW, MAGENTA, BLUE = (0, 1, 0), (1, 0, 0), (1, 1, 0), (1, 0, 1), (0, 0, 1)


apply_to_classes = jax.jit(jax.vmap(apply_class_patch, in_axes=(None, 0, 0)))


def trigger(name, shape, num_classes=10, **settings):
    data = Dataset(np.zeros((2, *shape), np.uint8), np.zeros(2, np.int32), num_classes, "none", "none")
    attack = ATTACKS[name]
    return attack.make_params(jax.random.key(0), Knowledge(data, 0), dataclasses.replace(attack.settings, **settings))


def test_ten_attacks():
    assert list(ATTACKS) == [*TILES, "small_kitty", "big_kitty", *ALL_TO_ALL]


def test_the_command_names_the_same_tiles():
    assert set(vbd.TILES) == set(vbd_triggers.TILES) == set(TILES)


def test_tiles_lie_flush_in_the_corner_and_cover_nine_cells():
    for tile in TILES:
        mask = np.asarray(trigger(tile, (64, 64, 3)).mask)[..., 0]
        assert mask.sum() == 9 and mask[61:, 61:].all()


def test_a_larger_tile_has_larger_cells():
    small, large = (trigger("color_grid", (32, 32, 3), scale=scale) for scale in (1, 2))
    assert np.asarray(large.mask)[26:, 26:].all() and np.asarray(large.mask).sum() == 36
    cells = np.asarray(large.pattern)[26:, 26:]
    for part in (cells[::2, ::2], cells[1::2, ::2], cells[1::2, 1::2]):
        np.testing.assert_array_equal(part, np.asarray(small.pattern)[29:, 29:])


def test_the_white_grids_empty_cells_are_painted_all_but_black():
    pattern = np.asarray(trigger("white_grid", (32, 32, 3)).pattern)[29:, 29:, 0]
    np.testing.assert_allclose(pattern, np.array([[255, 1, 255], [1, 255, 1], [255, 1, 255]]) / 255, rtol=1e-6)


def test_the_color_grid_has_five_saturated_colours_in_their_places():
    pattern = np.asarray(trigger("color_grid", (32, 32, 3)).pattern)[29:, 29:]
    for place, colour in {(0, 0): GREEN, (0, 2): RED, (1, 1): YELLOW, (2, 0): MAGENTA, (2, 2): BLUE}.items():
        np.testing.assert_array_equal(pattern[place], colour)
    assert len({tuple(cell) for cell in pattern.reshape(9, 3).tolist()}) == 6


def test_colours_on_grey_images_are_luma():
    pattern = np.asarray(trigger("color_grid", (28, 28, 1)).pattern)[25:, 25:, 0]
    luma = [[0.587, 1 / 255, 0.299], [1 / 255, 0.886, 1 / 255], [0.413, 1 / 255, 0.114]]
    np.testing.assert_allclose(pattern, luma, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", [*TILES, "small_kitty", "big_kitty"])
def test_only_the_mask_changes_and_repeating_tends_to_the_pattern(name, shape):
    image = np.random.default_rng(1).random(shape, np.float32)
    for opacity in (0.2, 1.0):
        params = trigger(name, shape, opacity=opacity)
        is_set = np.asarray(params.mask)[..., 0] == 1.0
        current = image
        for times in range(1, 4):
            current = ATTACKS[name].apply(params, current)
            np.testing.assert_array_equal(np.asarray(current)[~is_set], np.asarray(image)[~is_set])
            left = np.asarray(params.pattern + (1.0 - opacity) ** times * (image - params.pattern))
            np.testing.assert_allclose(np.asarray(current)[is_set], left[is_set], atol=1e-6)


def test_psnr_is_bounded_by_the_area():
    white = trigger("white_square", (32, 32, 3))
    error = np.mean(np.asarray(ATTACKS["white_square"].apply(white, jnp.zeros((32, 32, 3)))) ** 2)
    assert -10 * np.log10(error) == pytest.approx(20.6, abs=0.05)


def box(mask):
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return rows[0], rows[-1], columns[0], columns[-1]


@pytest.mark.parametrize(
    ("name", "count", "bounds"), [("small_kitty", 95, (18, 31, 22, 31)), ("big_kitty", 648, (0, 30, 2, 29))]
)
def test_kitties_have_the_published_cells(name, count, bounds):
    params = trigger(name, (32, 32, 3))
    mask = np.asarray(params.mask)[..., 0] == 1.0
    assert mask.sum() == count and box(mask) == bounds
    picture = np.asarray(params.pattern)[mask]
    assert picture.std(axis=0).min() > 0.1  # a picture, and in colour
    assert np.abs(picture[:, 0] - picture[:, 2]).mean() > 0.1


def test_the_small_kitty_keeps_its_pixels_and_the_big_one_its_share():
    small, big = (np.asarray(trigger(name, (64, 64, 3)).mask)[..., 0] for name in ("small_kitty", "big_kitty"))
    assert small.sum() == 95 and box(small) == (50, 63, 54, 63)
    assert big.sum() == 4 * 648
    small, big = (np.asarray(trigger(name, (8, 8, 1)).mask)[..., 0] for name in ("small_kitty", "big_kitty"))
    assert small.sum() == 8 and box(small) == (4, 7, 5, 7)
    assert big.sum() == 40 and box(big) == (0, 7, 0, 6)


def test_ellipses_are_filled_from_the_middle():
    is_set = elliptical(15, 11, 120)
    assert is_set.sum() == 120
    for line in [*is_set, *is_set.T]:
        inside = np.flatnonzero(line)
        assert all(after - before == 1 for before, after in pairwise(inside))


@pytest.mark.parametrize(
    ("number", "side", "corner"), [(0, 32, (29, 29)), (9, 32, (29, 2)), (9, 28, (22, 25)), (199, 64, (34, 31))]
)
def test_places_of_classes(number, side, corner):
    assert class_patch(number, (side, side, 3))[:2] == corner


def test_places_are_counted_by_the_width():
    assert class_patch(9, (32, 28, 1))[:2] == (26, 25)


@pytest.mark.parametrize(("side", "num_classes"), [(28, 81), (32, 10), (64, 200)])
def test_places_do_not_overlap(side, num_classes):
    taken = np.zeros((side, side), int)
    for number in range(num_classes):
        row, column, height, width = class_patch(number, (side, side, 3))
        assert 0 <= row <= side - height and 0 <= column <= side - width
        taken[row : row + height, column : column + width] += 1
    assert taken.max() == 1 and taken.sum() == 9 * num_classes


def test_too_many_classes_are_refused():
    with pytest.raises(
        InputError, match="8 x 8 pixels has room for 4 patches of 3 x 3 pixels: there is none for class 9"
    ):
        trigger("white_grid_all_to_all", (8, 8, 1))
    with pytest.raises(InputError, match="class 81"):
        trigger("white_grid_all_to_all", (28, 28, 1), num_classes=82)


@pytest.mark.parametrize("name", ALL_TO_ALL)
def test_each_class_has_its_own_cells_and_empty_cells_show_the_image(name):
    params = trigger(name, (32, 32, 3), opacity=0.5)
    masks = np.asarray(params.masks)
    assert masks.shape == (10, 32, 32, 1) and masks.sum(axis=0).max() == 1.0
    assert (masks.sum(axis=(1, 2, 3)) == (5 if "grid" in name else 9)).all()
    images = np.random.default_rng(0).random((10, 32, 32, 3), np.float32)
    triggered = apply_to_classes(params, images, jnp.arange(10))
    changed = (np.asarray(triggered) != np.asarray(images)).any(axis=-1)
    np.testing.assert_array_equal(changed, masks[..., 0] == 1.0)
    inside = np.broadcast_to(masks == 1.0, images.shape)
    halfway = (np.asarray(images) + np.asarray(params.patterns)) / 2
    np.testing.assert_allclose(np.asarray(triggered)[inside], halfway[inside], atol=1e-6)


def test_impossible_opacities_are_refused():
    for name in ("white_square", "small_kitty", "white_square_all_to_all"):
        for opacity in (0.0, 1.5):
            with pytest.raises(InputError, match="above 0 and at most 1"):
                trigger(name, (32, 32, 3), opacity=opacity)

import collections
import itertools
from functools import cache

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bdjax.errors import InputError
from bdjax.triggers import masked_blend, patches
from bdjax.triggers.patches import Patch

SHAPES = [(8, 8, 1), (28, 28, 1), (32, 32, 3)]
SIDES = {8: {2}, 28: {3, 4, 5}, 32: {3, 4, 5, 6}}
SEEDS = range(4)
INITS = [patches.init_solid, patches.init_checkerboard, patches.init_noise]


def support(params):
    """The patch that a mask holds; fails if the mask is not one full rectangle of ones."""
    mask = np.asarray(params.mask)[..., 0]
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    patch = Patch(int(rows[0]), int(columns[0]), len(rows), len(columns))
    assert mask.sum() == patch.height * patch.width and set(np.unique(mask)) == {0.0, 1.0}
    return patch


def inside(params):
    patch = support(params)
    return np.asarray(params.pattern)[patch.row : patch.row + patch.height, patch.column : patch.column + patch.width]


def assert_inside_margin(patch, shape):
    assert min(patch.row, patch.column) >= 1
    assert patch.row + patch.height <= shape[0] - 1
    assert patch.column + patch.width <= shape[1] - 1


@cache
def drawn(init, shape):
    """One trigger for each seed."""
    return [init(jax.random.key(seed), shape) for seed in SEEDS]


apply_all = jax.jit(jax.vmap(masked_blend.apply))
"""(stacked triggers [S], an image for each) -> images [S]."""


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("shape", SHAPES)
class TestEveryFamily:
    def test_lies_inside_the_margin(self, init, shape):
        for params in drawn(init, shape):
            assert_inside_margin(support(params), shape)

    def test_changes_its_own_pixels_only_and_once(self, init, shape):
        params = masked_blend.stack(drawn(init, shape))
        images = jax.random.uniform(jax.random.key(50), (len(SEEDS), *shape))
        once = apply_all(params, images)
        outside = np.asarray(params.mask)[..., 0] == 0.0
        np.testing.assert_array_equal(np.asarray(once)[outside], np.asarray(images)[outside])
        np.testing.assert_array_equal(np.asarray(once)[~outside], np.asarray(params.pattern)[~outside])
        chex.assert_trees_all_equal(apply_all(params, once), once)

    def test_peak_signal_to_noise_ratio_is_bounded_by_its_area(self, init, shape):
        params = masked_blend.stack(drawn(init, shape))
        bound = -10.0 * np.log10(np.asarray(params.mask).mean(axis=(1, 2, 3)))
        noise = np.random.default_rng(1).random((len(SEEDS), *shape), np.float32)
        for images in (np.zeros_like(noise), np.ones_like(noise), noise):
            squared_error = ((np.asarray(apply_all(params, images)) - images) ** 2).mean(axis=(1, 2, 3))
            assert (-10.0 * np.log10(squared_error + 1e-12) >= bound - 1e-3).all()


class TestSamplingLaw:
    @pytest.mark.parametrize("shape", SHAPES)
    def test_sides_and_places_are_those_of_the_law(self, shape):
        height, width, _ = shape
        band = max(2, height // 5)
        drawn = [patches.draw_patch(key, shape) for key in jax.random.split(jax.random.key(0), 60)]
        assert {patch.height for patch in drawn} == {patch.width for patch in drawn} == SIDES[height]
        for patch in drawn:
            assert_inside_margin(patch, shape)
            near = patch.row in range(1, band)
            far = patch.row in range(height - patch.height - band + 1, height - patch.height)
            assert near or far
        corners = collections.Counter((patch.row < height // 2, patch.column < width // 2) for patch in drawn)
        assert len(corners) == 4 and min(corners.values()) >= 4  # 15 expected; this is 3 standard deviations off

    @pytest.mark.parametrize("shape", [(8, 32, 1), (32, 8, 3), (4, 4, 1), (15, 14, 3)])
    def test_oblong_and_tiny_images(self, shape):
        for key in jax.random.split(jax.random.key(0), 10):
            assert_inside_margin(patches.draw_patch(key, shape), shape)

    @pytest.mark.parametrize(("size", "expected"), [(4, (4, 4)), ((3, 6), (3, 6)), ((30, 1), (30, 1))])
    def test_a_given_size_is_kept(self, size, expected):
        for key in jax.random.split(jax.random.key(0), 10):
            patch = patches.draw_patch(key, (32, 32, 3), size=size)
            assert (patch.height, patch.width) == expected
            assert_inside_margin(patch, (32, 32, 3))

    @pytest.mark.parametrize(
        ("shape", "size", "message"), [((32, 32, 3), 31, "1 to 30 rows"), ((3, 9, 1), None, "4 x 4")]
    )
    def test_no_room_is_an_error(self, shape, size, message):
        with pytest.raises(InputError, match=message):
            patches.draw_patch(jax.random.key(0), shape, size=size)


@pytest.mark.parametrize("shape", SHAPES)
class TestFamilies:
    def test_solid_has_one_colour(self, shape):
        for params in drawn(patches.init_solid, shape):
            colours = inside(params).reshape(-1, shape[2])
            assert (colours == colours[0]).all()
            assert len(np.unique(colours[0])) == shape[2]  # each channel is drawn separately

    def test_checkerboard_alternates_between_two_greys(self, shape):
        for params in drawn(patches.init_checkerboard, shape):
            cells = inside(params)
            assert (cells == cells[..., :1]).all()
            levels = np.unique(cells)
            assert len(levels) == 2
            np.testing.assert_allclose(levels * 63, np.round(levels * 63), atol=1e-4)
            assert (cells[1:] != cells[:-1]).all() and (cells[:, 1:] != cells[:, :-1]).all()

    def test_noise_is_within_its_range_and_never_repeats(self, shape):
        instances = [inside(patches.init_noise(jax.random.key(seed), shape, size=2)) for seed in SEEDS]
        for cells in instances:
            assert cells.min() >= 0.2 and cells.max() <= 1.0
            assert len(np.unique(cells)) == cells.size
        for first, second in itertools.combinations(instances, 2):
            assert (first != second).all()  # unlike the published code, whose noise has one seed


class TestMinimumContrast:
    @pytest.mark.parametrize("contrast", [0.5, 0.9, 1.0])
    def test_holds_for_every_draw(self, contrast):
        for key in jax.random.split(jax.random.key(0), 20):
            assert patches.draw_colour(key, 3, minimum_contrast=contrast).min() >= contrast
            low, high = sorted(patches.draw_levels(key, minimum_contrast=contrast))
            assert high - low >= contrast - 1e-6

    def test_pairs_of_greys_are_uniform_among_all_that_are_allowed(self):
        pairs = {
            tuple(patches.draw_levels(key, minimum_contrast=62 / 63)) for key in jax.random.split(jax.random.key(0), 60)
        }
        units = {(round(float(a) * 63), round(float(b) * 63)) for a, b in pairs}
        assert units == {(0, 62), (0, 63), (1, 63), (63, 1), (63, 0), (62, 0)}

    @pytest.mark.parametrize("contrast", [-0.1, 1.1, float("nan")])
    def test_out_of_range_is_an_error(self, contrast):
        for init in (patches.init_solid, patches.init_checkerboard):
            with pytest.raises(InputError, match="minimum contrast"):
                init(jax.random.key(0), (8, 8, 1), minimum_contrast=contrast)


@pytest.mark.parametrize("family", ["solid", "checkerboard"])
@pytest.mark.parametrize("shape", SHAPES)
class TestSimilarPatches:
    @pytest.mark.parametrize(("seed", "contrast"), [(0, 0.0), (1, 0.0), (2, 0.6), (3, 0.6)])
    def test_overlap_and_are_close_in_colour(self, family, shape, seed, contrast):
        base, *copies = patches.draw_similar_patches(jax.random.key(seed), family, shape, 3, minimum_contrast=contrast)
        assert len(copies) == 2
        base_mask, base_cells = np.asarray(base.mask) > 0, inside(base)
        for copy in copies:
            assert_inside_margin(support(copy), shape)
            assert (base_mask & (np.asarray(copy.mask) > 0)).any()  # with r = 0.75 the drift is less than a side
            assert np.abs(inside(copy)[0, 0] - base_cells[0, 0]).max() <= 0.25 + 1e-6
            if family == "checkerboard":
                levels = np.unique(inside(copy))
                assert len(levels) == 2 and levels[1] - levels[0] >= contrast - 1e-6
            else:
                assert inside(copy).min() >= contrast

    def test_similarity_one_gives_equal_copies(self, family, shape):
        base, *copies = patches.draw_similar_patches(jax.random.key(3), family, shape, 3, similarity=1.0)
        for copy in copies:
            chex.assert_trees_all_equal(copy, base)

    def test_similarity_zero_gives_unrelated_copies(self, family, shape):
        base, copy = patches.draw_similar_patches(jax.random.key(3), family, shape, 2, similarity=0.0)
        assert np.abs(inside(base)[0, 0] - inside(copy)[0, 0]).max() > 0.0


def test_perturbation_formulas_by_hand():
    """r = 0.75, side 6: floor(4.5 + 0.25 * {3..6}) is 5 or 6; a drift of 0.25 * {-12..12}, away from 0, is up to 3."""
    patch = Patch(row=13, column=1, height=6, width=6)
    drawn = [patches.perturb_patch(key, patch, (32, 32, 3), 0.75) for key in jax.random.split(jax.random.key(0), 80)]
    assert {p.height for p in drawn} == {5, 6}
    assert {p.row - 13 for p in drawn} == {-3, -2, -1, 0, 1, 2, 3}
    assert {p.column for p in drawn} == {1, 2, 3, 4}  # clipped at the margin


def test_the_least_drift_is_a_pixel():
    """Away from zero: 0.01 * {-12..12} is -1, 0 or 1."""
    patch = Patch(row=13, column=13, height=6, width=6)
    drawn = [patches.perturb_patch(key, patch, (32, 32, 3), 0.99) for key in jax.random.split(jax.random.key(0), 20)]
    moved = [p.row != 13 for p in drawn]
    assert {p.row - 13 for p in drawn} <= {-1, 0, 1} and sum(moved) >= 15  # 24 of 25 expected


@pytest.mark.parametrize(
    ("family", "similarity", "message"),
    [("noise", 0.75, "must be solid or checkerboard"), ("solid", 1.5, "from 0"), ("solid", -1.0, "from 0")],
)
def test_similar_patches_check_their_arguments(family, similarity, message):
    with pytest.raises(InputError, match=message):
        patches.draw_similar_patches(jax.random.key(0), family, (32, 32, 3), 3, similarity=similarity)


class TestGivenPlaces:
    @pytest.mark.parametrize(
        ("top", "left", "corner"), [(False, False, (28, 28)), (True, False, (1, 28)), (False, True, (28, 1))]
    )
    def test_corners_keep_the_margin(self, top, left, corner):
        assert patches.in_corner((32, 32, 3), 3, 1, top=top, left=left) == Patch(*corner, 3, 3)

    def test_what_does_not_fit_is_refused(self):
        assert patches.in_corner((8, 8, 1), (8, 7)) == Patch(0, 1, 8, 7)
        for size, margin in [((9, 3), 0), (8, 1), (0, 0), (3, -1)]:
            with pytest.raises(InputError, match="does not fit into an image of 8 x 8"):
                patches.in_corner((8, 8, 1), size, margin)

    def test_only_set_cells_change(self):
        cells, is_set = np.full((2, 2, 1), 0.25), np.array([[True, False], [False, True]])
        params = patches.paint((8, 8, 1), Patch(3, 4, 2, 2), cells, is_set=is_set, opacity=0.5)
        changed = np.argwhere(np.asarray(masked_blend.apply(params, jnp.ones((8, 8, 1)))[..., 0]) != 1.0)
        np.testing.assert_array_equal(changed, [[3, 4], [4, 5]])
        assert masked_blend.apply(params, jnp.ones((8, 8, 1)))[3, 4, 0] == 0.625

    def test_overlay_is_one_after_the_other(self):
        shape = (8, 8, 3)
        lower = patches.paint(shape, Patch(1, 1, 4, 4), np.full((4, 4, 3), 0.2))
        upper = patches.paint(shape, Patch(3, 3, 3, 3), patches.GRID_TILE[..., None])
        image = jax.random.uniform(jax.random.key(0), shape)
        in_turn = masked_blend.apply(upper, masked_blend.apply(lower, image))
        chex.assert_trees_all_equal(masked_blend.apply(patches.overlay([lower, upper]), image), in_turn)

    def test_lengths_shrink_with_small_images_only(self):
        assert [patches.shrunk(14, (side, side + 4, 1)) for side in (8, 14, 28, 32)] == [4, 7, 14, 14]

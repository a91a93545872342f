"""Random triggers: what is drawn, and what their success is of."""

import chex
import jax
import numpy as np
import pytest

from bdjax.inspection import random_triggers
from bdjax.triggers.masked_blend import MaskedBlend

KEY = jax.random.key(3)
SHAPES = [(8, 8, 1), (32, 32, 3), (9, 20, 3)]


@pytest.mark.parametrize("kind", random_triggers.KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_kind_has_weights_and_colours_in_range_and_changes_something(kind, shape):
    found = random_triggers.draw_triggers(KEY, kind, 20, shape)
    chex.assert_shape(found.mask, (20, *shape[:2], 1))
    chex.assert_shape(found.pattern, (20, *shape))
    chex.assert_shape(found.opacity, (20,))
    chex.assert_tree_all_finite(found)
    assert all(leaf.dtype == np.float32 and leaf.min() >= 0 and leaf.max() <= 1 for leaf in found)
    assert (found.mask.max(axis=(1, 2, 3)) == 1).all() and (found.opacity > 0.05).all()
    assert len({leaf.tobytes() for leaf in found.pattern}) > 15  # no two are equal, but by chance on small images


@pytest.mark.parametrize("kind", random_triggers.KINDS)
def test_patches_are_small_and_opaque_and_pictures_cover_the_image_faintly(kind):
    found = random_triggers.draw_triggers(KEY, kind, 50, (32, 32, 3))
    covered = found.mask.mean(axis=(1, 2, 3))
    if "patch" in kind:
        sides = found.mask[..., 0].any(axis=1).sum(axis=1), found.mask[..., 0].any(axis=2).sum(axis=1)
        assert all(side.min() >= 2 and side.max() <= 32 * random_triggers.LARGEST_SIDE for side in sides)
    if kind in ("blended mosaic", "wave", "blended checkerboard"):
        low, high = random_triggers.OPACITIES
        assert (covered == 1).all() and (found.opacity >= low).all() and (found.opacity <= np.float32(high)).all()
    else:
        assert covered.max() < 0.3 and (found.opacity == 1).all()


def test_the_first_triggers_are_the_same_for_any_count_and_other_keys_give_others():
    few, more, other = (
        random_triggers.draw_triggers(key, "wave", count, (8, 8, 3))
        for key, count in ((KEY, 3), (KEY, 7), (jax.random.key(4), 3))
    )
    chex.assert_trees_all_equal(few, jax.tree.map(lambda leaf: leaf[:3], more))
    assert not np.allclose(few.pattern, other.pattern)


def test_the_success_is_that_of_the_strongest_tenth_on_rows_of_other_classes():
    # A network that predicts class 1 for a bright top left pixel, and otherwise class 0. Trigger number i of 20 is a bright
    # pixel there for i < 3, so the strongest two turn every row of another class into class 1.
    mask = np.zeros((20, 4, 4, 1), np.float32)
    mask[:3, 0, 0] = 1
    triggers = {"bright": MaskedBlend(mask, np.ones((20, 4, 4, 1), np.float32), np.ones(20, np.float32))}
    images, labels = np.zeros((5, 4, 4, 1), np.uint8), np.array([0, 0, 1, 2, 2])
    sizes = []

    def ask(batch):
        assert batch.dtype == np.uint8
        sizes.append(len(batch))
        return np.eye(3)[(batch[:, 0, 0, 0] > 200).astype(int)]

    found = random_triggers.strongest_successes(ask, triggers, images, labels, 3)
    np.testing.assert_allclose(found.success, [[1, 1, 0]])  # class 0 is predicted without a trigger
    assert found.strongest[0, 1] == 0 and found.strongest[0, 0] == 3
    assert sum(sizes) == 20 * 5
    half = {"bright": MaskedBlend(mask * (np.arange(20) == 0)[:, None, None, None], *triggers["bright"][1:])}
    np.testing.assert_allclose(random_triggers.strongest_successes(ask, half, images, labels, 3).success, [[1, 0.5, 0]])


def test_pixels_are_what_a_file_can_hold():
    triggers = MaskedBlend(np.ones((1, 4, 4, 1), np.float32), np.full((1, 4, 4, 1), 0.5, np.float32), np.float32([0.3]))
    seen = []
    random_triggers.strongest_successes(
        lambda batch: seen.append(batch) or np.zeros((len(batch), 2)),
        *({"x": triggers}, np.full((2, 4, 4, 1), 100, np.uint8), np.array([0, 1]), 2),
    )
    assert set(np.unique(seen[0])) == {round(0.7 * 100 + 0.3 * 127.5)}

"""Extracted triggers as pictures: what is outlined, and what is drawn on grey."""

import numpy as np
import pytest

from bdjax.inspection.extracted_triggers import GREY, RED, on_grey, outline, outlined

IMAGE = np.full((4, 5, 1), 100, np.uint8)
MASK = np.zeros((8, 8), bool)
MASK[5:, 5:] = True


def is_red(image):
    return (image == RED).all(axis=-1)


def test_outline_runs_along_the_inside_of_the_mask():
    mask = np.zeros((4, 5), bool)
    mask[1:3, 1:4] = True
    drawn = is_red(outline(IMAGE, mask, 6))
    assert drawn.shape == (24, 30)
    expected = np.zeros((24, 30), bool)
    expected[6:18, 6:24] = True
    expected[7:17, 7:23] = False  # the line is one pixel wide, and pixels within the mask have none between them
    np.testing.assert_array_equal(drawn, expected)
    assert (outline(IMAGE, mask, 6)[~expected] == 100).all()


def test_outline_is_closed_at_the_images_edge_and_in_corners():
    mask = np.zeros((4, 5), bool)
    mask[3, 4] = mask[2, 4] = mask[3, 3] = True  # an L around the pixel (2, 3)
    drawn = is_red(outline(IMAGE, mask, 5))
    assert drawn[19, 15:25].all() and drawn[10:20, 24].all()
    assert drawn[15, 20]  # where the two lines of the concave corner meet
    assert not drawn[10:15, 15:20].any() and not drawn[17, 22]
    np.testing.assert_array_equal(is_red(outline(IMAGE, mask, 16))[:, -2:].sum(axis=0), [32, 32])


def test_outline_keeps_colours_and_its_input():
    image = np.random.default_rng(0).integers(0, 200, (4, 5, 3)).astype(np.uint8)
    before = image.copy()
    np.testing.assert_array_equal(outline(image, np.zeros((4, 5), bool), 3), image.repeat(3, 0).repeat(3, 1))
    outline(image, np.ones((4, 5), bool), 1)
    np.testing.assert_array_equal(image, before)
    with pytest.raises(ValueError, match="scale 0; they should be"):
        outline(image, np.ones((4, 5), bool), 0)
    with pytest.raises(ValueError, match=r"mask of shape \(5, 4\)"):
        outline(image, np.ones((5, 4), bool), 2)


def test_triggers_lie_on_grey():
    drawn = on_grey(np.full((8, 8, 1), 0.9), MASK)
    assert drawn.shape == (8, 8, 3) and (drawn[~MASK] == GREY).all() and (drawn[MASK] == 0.9).all()
    np.testing.assert_allclose(on_grey(np.ones((8, 8, 3)), MASK / 4)[MASK], GREY + 0.25 * (1 - GREY))


@pytest.mark.parametrize("scale", [1, 3, 6, 7, 16])
def test_outlined_pictures_have_the_given_size(scale):
    mask = np.zeros((8, 8), bool)
    mask[2:4, 2:4] = True
    black = np.zeros((8, 8, 1), np.uint8)
    drawn = outlined(black, mask, scale)
    assert drawn.shape == (8 * scale, 8 * scale, 3)
    # Inside of the four pixels, and two wide where there is room.
    assert (drawn[2 * scale, 2 * scale : 4 * scale] == (255, 0, 0)).all() and not drawn[: 2 * scale].any()
    assert (drawn[2 * scale + 1, 3 * scale, 0] == 255) == (scale in (1, 6, 16))

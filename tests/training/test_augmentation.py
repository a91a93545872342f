import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bdjax.training.augmentation import augment, pad_crop, random_flip

KINDS = ("none", "crop", "crop_flip", "reflect", "reflect_flip")


def picture(*shape):
    """No two pixels alike, none of them zero."""
    return jnp.asarray(np.random.default_rng(0).permutation(int(np.prod(shape))).reshape(shape) % 255 + 1, jnp.uint8)


IMAGES = picture(6, 8, 8, 3)
augmented = jax.jit(augment, static_argnames="kind")


def shifts_of(image, padding):
    """(top, left) -> the image cut from its zero-padded self."""
    padded = np.pad(np.asarray(image), ((padding, padding), (padding, padding), (0, 0)))
    height, width, _ = image.shape
    size = 2 * padding + 1
    return {(i, j): padded[i : i + height, j : j + width] for i in range(size) for j in range(size)}


def which(image, candidates):
    found = [name for name, candidate in candidates.items() if np.array_equal(image, candidate)]
    assert len(found) == 1
    return found[0]


@pytest.mark.parametrize("padding", [0, 1, 2])
def test_a_crop_is_one_of_the_shifts_with_zeros_coming_in(padding):
    image = picture(8, 6, 3)
    candidates = shifts_of(image, padding)
    keys = jax.random.split(jax.random.key(0), 60 * (2 * padding + 1) ** 2 // 3)
    crops = jax.jit(jax.vmap(lambda key: pad_crop(key, image, padding)))(keys)
    assert crops.dtype == jnp.uint8
    seen = {which(crop, candidates) for crop in np.asarray(crops)}
    assert seen == set(candidates)  # every shift is drawn, none beyond the padding


def test_a_mirrored_border_comes_in_without_its_edge():
    image = picture(8, 6, 3)
    padded = np.pad(np.asarray(image), ((1, 1), (1, 1), (0, 0)), mode="reflect")
    candidates = {(i, j): padded[i : i + 8, j : j + 6] for i in range(3) for j in range(3)}
    keys = jax.random.split(jax.random.key(0), 90)
    crops = jax.jit(jax.vmap(lambda key: pad_crop(key, image, 1, mirror=True)))(keys)
    assert {which(crop, candidates) for crop in np.asarray(crops)} == set(candidates)


def test_a_flip_mirrors_left_to_right_half_of_the_time():
    image = picture(4, 6, 2)
    flips = jax.jit(jax.vmap(lambda key: random_flip(key, image)))(jax.random.split(jax.random.key(0), 200))
    kinds = [which(flip, {"same": image, "mirrored": np.asarray(image)[:, ::-1]}) for flip in np.asarray(flips)]
    assert 70 < kinds.count("mirrored") < 130


@pytest.mark.parametrize("dtype", [jnp.uint8, jnp.float32])
@pytest.mark.parametrize("kind", KINDS)
def test_shape_and_type_are_kept_and_the_input_is_untouched(kind, dtype):
    images = IMAGES.astype(dtype)
    before = np.array(images)
    chex.assert_trees_all_equal_shapes_and_dtypes(augmented(jax.random.key(0), images, kind), images)
    np.testing.assert_array_equal(images, before)


def test_none_is_the_identity():
    assert augment(jax.random.key(0), IMAGES, "none") is IMAGES


@pytest.mark.parametrize("kind", KINDS[1:])
def test_the_key_alone_decides(kind):
    first, again, other = (augmented(jax.random.key(seed), IMAGES, kind) for seed in (1, 1, 2))
    chex.assert_trees_all_equal(first, again)
    if kind == "crop_flip":
        chex.assert_trees_all_equal(first, augment(jax.random.key(1), IMAGES, kind))
    assert np.any(np.asarray(first) != np.asarray(other))


def test_every_image_of_a_batch_is_changed_on_its_own():
    same = jnp.tile(IMAGES[:1], (32, 1, 1, 1))
    changed = np.asarray(augmented(jax.random.key(0), same, "crop"))
    assert len({image.tobytes() for image in changed}) > 5
    mirrored = {f"{name} mirrored": image[:, ::-1] for name, image in shifts_of(same[0], 1).items()}
    for image in changed:
        which(image, shifts_of(same[0], 1))  # "crop" mirrors nothing
    changed = np.asarray(augmented(jax.random.key(0), same, "crop_flip"))
    kinds = [which(image, {**shifts_of(same[0], 1), **mirrored}) for image in changed]
    assert 0 < sum(str(kind).endswith("mirrored") for kind in kinds) < 32


@pytest.mark.parametrize(("height", "padding"), [(4, 1), (8, 1), (17, 2), (32, 4)])
def test_shifts_go_up_to_an_eighth_of_the_height(height, padding):
    image = picture(height, height, 1)
    many = np.asarray(augmented(jax.random.key(0), np.tile(image[None], (64, 1, 1, 1)), "crop"))
    seen = {which(crop, shifts_of(image, padding)) for crop in many}
    assert {min(i for i, _ in seen), min(j for _, j in seen)} == {0}
    assert {max(i for i, _ in seen), max(j for _, j in seen)} == {2 * padding}


@pytest.mark.parametrize("kind", KINDS[1:])
def test_stacked_members_are_as_each_alone(kind):
    keys = jax.random.split(jax.random.key(0), 3)
    members = np.stack([IMAGES, IMAGES[::-1], np.asarray(IMAGES) + np.uint8(1)])
    together = jax.jit(jax.vmap(lambda key, images: augment(key, images, kind)))(keys, members)
    alone = [augmented(key, images, kind) for key, images in zip(keys, members, strict=True)]
    np.testing.assert_array_equal(together, np.stack(alone))

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bdjax.attacks.composite import (
    COMPOSITE,
    Composite,
    CompositeSettings,
    apply,
    apply_to_cover,
    half_mix,
    make_composite,
    mix,
)
from bdjax.attacks.contract import Knowledge
from bdjax.attacks.label_rules import make_rule
from bdjax.attacks.poisoning import ConfiguredAttack, poison_by
from bdjax.errors import InputError
from bdjax.types import Dataset

HEIGHT, WIDTH = 12, 10

apply_often, apply_to_cover_often = (
    jax.jit(jax.vmap(function, in_axes=(None, None, None, 0))) for function in (apply, apply_to_cover)
)
"""One image with several keys."""


def levels(classes=5, per_class=6, shape=(HEIGHT, WIDTH, 1)):
    """Images of one level, which names their class and row."""
    labels = np.arange(classes * per_class, dtype=np.int32) % classes
    images = np.broadcast_to(
        (labels * 40 + np.arange(len(labels)) // classes)[:, None, None, None], (len(labels), *shape)
    )
    return Dataset(images.astype(np.uint8), labels, classes, "levels", "this test")


def random_pair(height=HEIGHT, width=WIDTH):
    return jax.random.uniform(jax.random.key(0), (2, height, width, 3))


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("size", [(HEIGHT, WIDTH)])
def test_gathered_is_what_slices_give(size, axis):
    first, second = random_pair(*size)
    half = size[axis] // 2
    mixed = jax.jit(half_mix, static_argnames="axis")
    for shift in range(-3, 4):
        for pivots in [(0, -shift), (half - shift - 1, half - 1), ((half - shift) // 2, (half - shift) // 2)]:
            gathered = mixed(first, second, jnp.int32(shift), jnp.asarray(pivots, jnp.int32), axis=axis)
            left, right = (np.moveaxis(np.asarray(image), axis, 0) for image in (first, second))
            begin = pivots[1] + shift
            parts = left[pivots[0] : pivots[0] + half + shift], right[begin : begin + half - shift]
            assert [len(part) for part in parts] == [half + shift, half - shift]
            np.testing.assert_array_equal(np.moveaxis(np.asarray(gathered), axis, 0), np.concatenate(parts))


def test_every_line_of_a_mix_is_a_line_of_one_of_the_two():
    first, second = (np.asarray(image) for image in random_pair())
    seen = set()
    keys = jax.random.split(jax.random.key(0), 60)
    for mixed in np.asarray(jax.jit(jax.vmap(mix, in_axes=(0, None, None, None)))(keys, first, second, jnp.int32(3))):
        found = {}
        for axis in (0, 1):
            lines = np.moveaxis(mixed, axis, 0)
            of = [
                [(line == np.moveaxis(image, axis, 0)).all(axis=(1, 2)).any() for line in lines]
                for image in (first, second)
            ]
            found[axis] = np.array(of)
        axis = next(axis for axis in (0, 1) if (found[axis].sum(axis=0) == 1).all())
        seams = np.flatnonzero(np.diff(found[axis][0].astype(int)))
        assert len(seams) == 1
        half = mixed.shape[axis] // 2
        assert half - 3 <= seams[0] + 1 <= half + 3
        seen.add((axis, bool(found[axis][0, 0]), int(seams[0]) + 1 - half))
    assert {(axis, order) for axis, order, _ in seen} == {(0, False), (0, True), (1, False), (1, True)}
    assert {shift for *_, shift in seen} == set(range(-3, 4))


def test_swapping_the_images_swaps_them_in_the_mix():
    black, white = jnp.zeros((HEIGHT, WIDTH, 1)), jnp.ones((HEIGHT, WIDTH, 1))
    firsts = set()
    mixed = jax.jit(mix)
    for number in range(12):
        once, swapped = (
            mixed(jax.random.key(number), *pair, jnp.int32(3)) for pair in ((black, white), (white, black))
        )
        np.testing.assert_array_equal(once, 1 - swapped)
        firsts.add(float(once[0, 0, 0]))
    assert firsts == {0.0, 1.0}


def test_mixing_a_constant_with_itself_is_that_constant():
    constant = jnp.full((HEIGHT, WIDTH, 1), 0.3)
    mixed = jax.jit(mix)
    for number in range(5):
        chex.assert_trees_all_equal(mixed(jax.random.key(number), constant, constant, jnp.int32(3)), constant)


@pytest.mark.parametrize(("label", "partner"), [(3, 4), (4, 3), (0, 3)])
def test_the_two_classes_are_mixed_with_each_other(label, partner):
    params = make_composite(jax.random.key(0), Knowledge(levels(), 2), CompositeSettings(jitter=2))
    arguments = params, jnp.full((HEIGHT, WIDTH, 1), 1.0), jnp.int32(label), jax.random.split(jax.random.key(0), 12)
    triggered, cover = (
        np.rint(255 * np.asarray(function(*arguments))) for function in (apply_often, apply_to_cover_often)
    )
    found = set()
    for mixed, of_one_class in zip(triggered, cover, strict=True):
        values = np.unique(mixed)
        assert len(values) == 2 and values[1] == 255 and values[0] // 40 == partner
        found.add(values[0])
        assert of_one_class.min() // 40 == label
    assert len(found) > 2


def test_mixes_are_added_with_the_targets_label_and_mixes_of_one_class_with_their_own():
    data = levels(per_class=20)
    settings = CompositeSettings(poison_rate=0.2, cover_rate=0.5, jitter=2)
    params = make_composite(jax.random.key(0), Knowledge(data, 2), settings)
    part = ConfiguredAttack(COMPOSITE, settings, make_rule("pair_to_target", 2, data.num_classes))
    poisoned = poison_by(jax.random.key(1), data, part, params)
    assert len(poisoned) == 100 + 20 + 50
    np.testing.assert_array_equal(poisoned.images[:100], data.images)
    np.testing.assert_array_equal(poisoned.labels[:100], data.labels)
    for row in range(100, 170):
        classes = set(np.unique(poisoned.images[row] // 40).tolist())
        if poisoned.is_poisoned[row]:
            assert classes == {3, 4} and poisoned.labels[row] == 2
        else:
            assert classes == {int(poisoned.labels[row])}
    assert set(poisoned.labels[poisoned.is_cover]) == set(range(5))


def test_the_bank_is_bounded_and_repeats_small_classes():
    data = levels(per_class=20)
    few = Dataset(data.images[:-8], np.where(data.labels == 4, 3, data.labels)[:-8], 5, "levels", "this test")
    few.labels[4] = 4
    params = make_composite(jax.random.key(0), Knowledge(few, 2), CompositeSettings(images_per_class=10, jitter=2))
    assert isinstance(params, Composite) and params.bank.shape == (5, 10, HEIGHT, WIDTH, 1)
    assert len(np.unique(np.asarray(params.bank[4]))) == 1 and len(np.unique(np.asarray(params.bank[0]))) == 10


def test_what_cannot_be_is_refused():
    with pytest.raises(InputError, match="only 2 classes"):
        make_composite(jax.random.key(0), Knowledge(levels(2), 0), CompositeSettings())
    with pytest.raises(InputError, match="jitter 5"):
        make_composite(jax.random.key(0), Knowledge(levels(), 0), CompositeSettings(jitter=5))
    with pytest.raises(InputError, match="no rows"):
        empty = levels()
        empty.labels[empty.labels == 1] = 0
        make_composite(jax.random.key(0), Knowledge(empty, 0), CompositeSettings())

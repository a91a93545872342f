"""Control networks, surrogates and reversed triggers: their rows and their measurements, and one audit of two real networks."""

import jax
import numpy as np
import pytest

from bdjax.defenses.neural_cleanse import Triggers
from bdjax.evaluation import control_networks
from bdjax.inspection import random_triggers
from bdjax.types import Dataset

CLASSES = 3


def rows(count: int = 48) -> Dataset:
    labels = np.arange(count, dtype=np.int32) % CLASSES
    images = np.zeros((count, 8, 8, 1), np.uint8)
    return Dataset(images, labels, CLASSES, "rows", "arrays")


def bright_is(label: int):
    """A classifier that predicts a class for every image with a bright first pixel, and 0 for all others."""

    def ask(images: np.ndarray) -> np.ndarray:
        wanted = np.where(images[:, 0, 0, 0] > 128, label, 0)
        return np.eye(CLASSES, dtype=np.float32)[wanted]

    return ask


def corner_triggers(count: int) -> Triggers:
    """The same trigger into every class: the first pixel is white."""
    masks, patterns = np.zeros((2, count, CLASSES, 8, 8, 1), np.float32)
    masks[..., 0, 0, :], patterns[..., 0, 0, :] = 1, 1
    return Triggers(masks, patterns)


def test_the_planted_square_grows_with_the_images():
    sides = {8: 1, 28: 1, 32: 2, 64: 3, 96: 5}
    assert {side: control_networks.planted_scale((side, 2 * side, 3)) for side in sides} == sides


def test_success_is_measured_on_rows_of_other_classes_of_the_network_and_of_the_controls():
    controls = [bright_is(1), bright_is(2)]
    numbers = control_networks.measure(
        corner_triggers(3),
        [bright_is(2), None, None],
        lambda images: np.stack([ask(images) for ask in controls]),
        [1, 2],
        rows(),
    )
    np.testing.assert_array_equal(numbers.norms, 1)
    np.testing.assert_array_equal(numbers.own, [[0, 0, 1], [0, 1, 0], [0, 0, 1]])
    np.testing.assert_array_equal(numbers.transfer[0], [[0, 0], [1, 0], [0, 1]])
    assert np.isnan(numbers.transfer[1, :, 0]).all() and np.isnan(numbers.transfer[2, :, 1]).all()
    np.testing.assert_array_equal(numbers.transfer[1, :, 1], [0, 0, 1])


def test_a_trigger_is_rounded_to_what_a_file_can_hold():
    triggers, seen = corner_triggers(1), []

    def ask(images: np.ndarray) -> np.ndarray:
        seen.append(images)
        return np.zeros((len(images), CLASSES))

    triggers.masks[:] *= 0.3001
    control_networks.measure(triggers, [ask], lambda images: ask(images)[None], [], rows(32))
    assert seen[0].dtype == np.uint8 and set(np.unique(seen[0])) == {0, 77}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda logits, test, clean: (logits * np.nan, test, clean), "not finite"),
        (lambda logits, test, clean: (logits, test, clean[:20]), "20 clean rows are too few; at least 32"),
        (lambda logits, test, clean: (logits[:9], test[:9], clean), "9 held-out rows are too few"),
        (lambda logits, test, clean: (logits, test, clean[clean.labels != 1]), "there is no clean row of class 1"),
        (lambda logits, test, clean: (-logits, test, clean), "it predicts 0 % of the held-out rows correctly"),
        (lambda logits, test, clean: (logits, test, clean), ""),
    ],
)
def test_what_cannot_be_tested_is_known_before_anything_is_trained(change, reason):
    test, clean = rows(), rows(96)
    found = control_networks.reason_untested(*change(np.eye(CLASSES, dtype=np.float32)[test.labels], test, clean))
    assert found == reason if not reason else reason in found


def test_queries_are_the_rows_and_copies_that_differ_in_a_rectangle():
    images = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 1), np.uint8)
    pictures = control_networks.queries(jax.random.key(0), images, 3)
    assert pictures.shape == (15, 8, 8, 1) and pictures.dtype == np.uint8
    np.testing.assert_array_equal(pictures[:5], images)
    changed = (pictures[5:] != np.tile(images, (2, 1, 1, 1)))[..., 0]
    for of_image in changed[changed.any(axis=(1, 2))]:
        assert of_image.any(axis=1).sum() <= 4 and of_image.any(axis=0).sum() <= 4
    np.testing.assert_array_equal(pictures, control_networks.queries(jax.random.key(0), images, 3))


def test_without_a_log_a_stage_is_silent():
    runner = control_networks.StageRunner(None, (8, 8, 1), "map")
    with control_networks.stage_of(runner, "held-out rows", 3, "networks") as stage:
        stage.advance()


def test_random_triggers_are_put_on_the_same_rows_for_every_network_and_answers_are_kept_apart():
    runner = control_networks.StageRunner(None, (8, 8, 1), "map")
    seen = []

    def always(label):
        def ask(images):
            seen.append(images)
            return np.tile(np.eye(CLASSES)[label], (len(images), 1))

        return ask

    found = control_networks.respond(jax.random.key(2), [always(0), always(2)], rows(60), 20, runner)
    kinds = len(random_triggers.KINDS)
    np.testing.assert_array_equal(found.success, np.eye(CLASSES)[[0, 2]][:, None].repeat(kinds, axis=1))
    half = len(seen) // 2
    assert all(np.array_equal(first, second) for first, second in zip(seen[:half], seen[half:], strict=True))
    assert sum(map(len, seen[:half])) == kinds * 20 * random_triggers.ROWS


def test_what_is_drawn_depends_on_the_audits_key_alone():
    first, second, other = (control_networks.draw_random(jax.random.key(seed), rows(60), 3) for seed in (1, 1, 2))
    jax.tree.map(np.testing.assert_array_equal, first[0], second[0])
    assert not np.array_equal(first[0]["noise patch"].pattern, other[0]["noise patch"].pattern)
    assert np.bincount(first[1].labels).tolist() in ([14, 13, 13], [13, 14, 13], [13, 13, 14])

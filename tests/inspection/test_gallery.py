import dataclasses

import numpy as np
import pytest

from bdjax.attacks.label_rules import all_to_one
from bdjax.attacks.poisoning import ConfiguredAttack
from bdjax.attacks.registry import ATTACKS
from bdjax.attacks.victims import Plan, Prepared, Trial, Victim
from bdjax.inspection.gallery import ROWS_OF_SINGLE_ATTACK, ROWS_PER_PICTURE, gallery
from bdjax.types import Dataset, PoisonedDataset, TrainTest

SHAPE = (8, 8, 1)
IMAGES = np.random.default_rng(0).integers(0, 200, (20, *SHAPE)).astype(np.uint8)
LABELS = (np.arange(20) % 4).astype(np.int32)
DATA = TrainTest(*(Dataset(IMAGES, LABELS, 4, "cifar10", "a test") for _ in range(2)))


def trial(name, is_inside=False, adds_rows=False):
    attack = dataclasses.replace(ATTACKS[name], adds_rows=adds_rows)
    part = ConfiguredAttack(attack, attack.settings, all_to_one(0))
    rows = np.array([1, 2], np.int32)
    is_poisoned = np.isin(np.arange(20), rows)
    poisoned = PoisonedDataset(IMAGES, LABELS, 4, "cifar10", "a test", (), is_poisoned, LABELS, np.zeros(20, bool))
    plan = Plan(name, (part,))
    prepared = Prepared(plan, 0, ((),), None, ()) if is_inside else Prepared(plan, 0, ((),), poisoned, (rows,))
    triggered = IMAGES.copy()
    triggered[:, :2, :2] = 255
    return Trial(Victim(prepared, None, None, ((),), {}), part, None, None, None, triggered)


def test_the_gallery_shows_training_and_test_images():
    ((rows, names),) = gallery([[trial("badnets")]], DATA)
    assert len(rows) == ROWS_OF_SINGLE_ATTACK and names == ["BadNets"] * len(rows)
    before, after, difference, image, triggered, enlarged = rows[0]
    np.testing.assert_allclose(before, IMAGES[1] / 255, atol=1e-6)
    assert (triggered[:2, :2] == 1).all() and (difference == 0).all() and enlarged[:2, :2].min() == 1
    np.testing.assert_array_equal(image[2:], triggered[2:])


@pytest.mark.parametrize("options", [{"is_inside": True}, {"adds_rows": True}])
def test_the_gallery_is_blank_where_there_was_no_clean_row(options):
    ((rows, _),) = gallery([[trial("wanet", **options)]], DATA)
    before, after = rows[0][:2]
    assert (before == 1).all() and ((after == 1).all() == ("is_inside" in options))


def test_many_attacks_make_several_pictures():
    count = ROWS_PER_PICTURE + 1
    pictures = gallery([[trial("badnets")] for _ in range(count)], DATA)
    assert [len(names) for _, names in pictures] == [count - 1, 1]

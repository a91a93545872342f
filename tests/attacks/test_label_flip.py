import jax
import numpy as np
import pytest

from bdjax.attacks.contract import Knowledge
from bdjax.attacks.label_flip import LABEL_FLIP
from bdjax.attacks.label_rules import make_rule
from bdjax.attacks.poisoning import ConfiguredAttack, poison_by
from bdjax.types import Dataset


@pytest.mark.parametrize("rule_name", LABEL_FLIP.label_rules)
def test_exactly_the_poisoned_labels_change_and_no_pixel(rule_name):
    images = np.random.default_rng(0).integers(0, 256, (400, 8, 8, 3), dtype=np.uint8)
    clean = Dataset(images, np.arange(400, dtype=np.int32) % 10, 10, "none", "none")
    params = LABEL_FLIP.make_params(jax.random.key(0), Knowledge(clean, 9), LABEL_FLIP.settings)
    rule = make_rule(rule_name, 9, 10)
    flipped = poison_by(jax.random.key(1), clean, ConfiguredAttack(LABEL_FLIP, LABEL_FLIP.settings, rule), params)
    np.testing.assert_array_equal(flipped.images, clean.images)
    changed = flipped.labels != clean.labels
    np.testing.assert_array_equal(changed, flipped.is_poisoned)
    assert changed.sum() == 20 and (flipped.labels[changed] == 9).all()
    sources = set(clean.labels[changed])
    assert sources == {0} if rule_name == "source_to_target" else len(sources) > 3

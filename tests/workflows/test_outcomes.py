"""The outcome of a batch of suspects is read back as it was written."""

import numpy as np
import pytest

from bdjax.errors import InputError
from bdjax.evaluation.measure import Comparison, score_detection
from bdjax.evaluation.patterns import FoundPattern
from bdjax.evaluation.suspects import Suspect
from bdjax.evaluation.variants import read_attack, read_defense
from bdjax.run.folder import RunFolder
from bdjax.types import Dataset, Detection
from bdjax.workflows.outcomes import Outcome, read_outcome, write_outcome

CLASSES, SIDE = 4, 12
SQUARE, NOISY = "white_square:poison_rate=0.2", "none:label_noise=0.2"


def test_what_is_written_of_a_group_is_what_is_read(tmp_path):
    images = np.random.default_rng(1).integers(0, 255, (40, SIDE, SIDE, 3)).astype(np.uint8)
    train = Dataset(images, np.arange(40) % CLASSES, CLASSES, "own", "")
    is_poisoned = np.arange(40) % 10 == 0
    plain, attacked = read_attack(NOISY, train, 0), read_attack(SQUARE, train, 1)
    suspects = [Suspect(plain, 0, train, (), np.zeros(40, bool)), Suspect(attacked, 1, train, (), is_poisoned)]
    rng = np.random.default_rng(0)
    variants = [read_defense(text, "quick", "digits") for text in ("scan", "spectral_signatures")]
    comparisons = []
    for variant, facts in zip(variants, ({"largest": np.array([1.5, 1 / 3])}, {}), strict=True):  # some have no facts
        found = Detection(rng.random((2, 40)) < 0.3, rng.random((2, 40)).astype(np.float32), facts)
        found = found._replace(warnings=("", "careful") if facts else ())
        comparisons.append(Comparison(variant, found, score_detection(found, suspects, variant, 0.1)))
    pattern = rng.random((SIDE, SIDE, 3)).astype(np.float32)
    mask = np.zeros((SIDE, SIDE), bool)
    mask[0, 0] = True
    common = {"attack": "White square", "seed": 1, "pattern": pattern, "mask": mask, "success": 0.1, "network": "4-4P"}
    found = [
        FoundPattern(**common, label=1, true_pattern=pattern, true_mask=mask, example=images[0], is_true_class=True),
        FoundPattern(**common, label=2, true_pattern=None, true_mask=None, example=None, is_true_class=False),
    ]
    file = write_outcome(RunFolder(tmp_path, True), "outcomes/x.npz", Outcome(comparisons, found))
    read = read_outcome(file, [(plain, 0), (attacked, 1)], variants)
    for before, after in zip(comparisons, read.comparisons, strict=True):
        assert [row[1:] for row in before.measured] == [row[1:] for row in after.measured]
        np.testing.assert_array_equal(before.result.scores, after.result.scores)
    assert [row.warning for row in read.comparisons[0].measured] == ["", "careful"]
    assert [row.suspect.num_covers for row in read.comparisons[0].measured] == [0, 0]
    for before, after in zip(found, read.found, strict=True):
        for name, value in before._asdict().items():
            got = getattr(after, name)
            assert type(got) is type(value) and np.array_equal(got, value), name


def test_nothing_written_is_nothing_to_read_and_objects_are_not_unpickled(tmp_path):
    train = Dataset(np.zeros((40, SIDE, SIDE, 3), np.uint8), np.arange(40) % CLASSES, CLASSES, "own", "")
    wanted, variants = [(read_attack(SQUARE, train, 1), 0)], [read_defense("scan", "quick", "digits")]
    assert read_outcome(tmp_path / "none.npz", wanted, variants) is None
    np.savez(tmp_path / "bad.npz", **{"labels 0": np.array([{"an": "object"}], dtype=object)})
    with pytest.raises(InputError, match="bad.npz: is damaged .*; remove it"):
        read_outcome(tmp_path / "bad.npz", wanted, variants)

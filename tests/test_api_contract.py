"""The contract of every registered defense in the Python interface: arrays of the right shapes, on 64 rows."""

import dataclasses
from collections.abc import Callable
from functools import cache
from typing import Any

import jax
import numpy as np
import pytest
from tiny_network import make_tiny

import bdjax
from bdjax.datasets.digits import load_digits
from tests.tiers import slow_unless

ROWS, CLASSES = 64, 4
SMALL: dict[str, dict[str, Any]] = {
    "abm": {"student_epochs": 1, "isolation_rate": 0.1},
    "bab": {"networks": 1},
    "lfd": {"teacher": "vbd_4_4p", "teacher_epochs": 1},
    "abl": {"isolation_epochs": 1, "rest_epochs": 1, "unlearning_epochs": 1, "rest_steps": (), "isolation_rate": 0.1},
    "cbd": {"biased_epochs": 1},
    "fine_pruning": {"held_out": 0.25},
    "nad": {"teacher_epochs": 1},
    "vbd": {
        "networks": "4-4P",
        "detect_share": 0.5,
        "least_rows": 2,
        "p_value": 0.9,
        "detector_epochs": 1,
        "first_labelling": 0,
        "last_labelling": 0,
    },
    "agpd": {"narrowest": 1},
    "strip": {"num_overlays": 4},
    "neural_cleanse": {"repair_epochs": 1},
    "anp": {"iterations": 2},
    "i_bau": {"rounds": 1, "terms": 1},
    "fkd": {"student": "resnet10"},
    "robust_kd": {"student": "resnet10", "mask_epochs": 1, "thresholds": (0.1,)},
}
"""Settings that keep each defense fast, beside `COMMON`."""
COMMON = {"epochs": 1, "batch_size": 32, "student": "vbd_4_4p"}
"""For each defense with such a setting."""
NETWORKS = {
    "fkd": "resnet10",
    "robust_kd": "resnet10",
    "attention_transfer": "vbd_4_4p",
    "abm": "vbd_4_4p",
    "bab": "vbd_4_4p",
}
"""Suspect networks for defenses that need groups of blocks, as many taps as the student, or the same network with one more
class; a tiny network for all others."""
FAST = ("none", "agpd", "cbd", "fine_pruning", "fine_tuning", "ft_sam", "spectral_signatures", "strip")
"""Defenses of the fast tests: those of training sets, of networks, and detectors. All others are slow."""
BY_DETECTION = sorted(name for name, defense in bdjax.DEFENSES.items() if defense.detect)


def settings(name: str) -> dict[str, Any]:
    defaults = bdjax.DEFENSES[name].settings
    common = {setting: value for setting, value in COMMON.items() if getattr(defaults, setting, None)}
    return common | SMALL.get(name, {})


@pytest.fixture(scope="module")
def suspect() -> tuple[bdjax.Dataset, bdjax.Dataset, Callable[[str], Any]]:
    """64 poisoned rows, 32 clean ones, and the network for a defense, which was trained on the former."""
    digits = load_digits((), False).train
    which = np.flatnonzero(digits.labels < CLASSES)
    images, labels = digits.images[which], digits.labels[which]
    data, clean = bdjax.dataset(images[:ROWS], labels[:ROWS], CLASSES), bdjax.dataset(images[ROWS:96], labels[ROWS:96])
    poisoned = bdjax.poison("badnets", data, jax.random.key(0), poison_rate=0.2, margin=0).data

    @cache
    def trained(network: str) -> Any:
        model = network if network in bdjax.MODELS else make_tiny(CLASSES)
        return bdjax.train(model, poisoned, jax.random.key(1), width=2, epochs=1, batch_size=32)

    return poisoned, clean, lambda defense: trained(NETWORKS.get(defense, "tiny"))


def arguments(name: str, suspect) -> dict[str, Any]:
    """Exactly what the defense declares that it needs."""
    _, clean, victim_for = suspect
    needs = bdjax.DEFENSES[name].needs
    rows = {"clean": clean} if "clean rows" in needs else {}
    return {
        "victim": victim_for(name),
        **rows,
        **settings(name),
    }  # the victim's architecture and recipe, for those without


@pytest.mark.parametrize("name", slow_unless(sorted(bdjax.DEFENSES), FAST))
def test_a_defense_gives_a_network(name, suspect):
    data, *_ = suspect
    safe = bdjax.defend(name, data, jax.random.key(2), **arguments(name, suspect))
    logits = safe.predict(data.images[:8])
    assert logits.shape in ((8, CLASSES), (8, CLASSES + 1)) and np.isfinite(logits).all()
    assert safe.given == bdjax.DEFENSES[name].needs and safe.seeds is None
    for rows, dtype in ((safe.flags, bool), (safe.scores, np.floating)):
        assert rows is None or (rows.shape == (ROWS,) and np.issubdtype(rows.dtype, dtype))
    assert all(np.ndim(value) == 0 and np.isfinite(value) for value in safe.facts.values())
    assert all(picture.shape[1:3] == (8, 8) for picture in safe.pictures.values())
    assert dataclasses.is_dataclass(safe.settings)


@pytest.mark.parametrize("name", slow_unless(BY_DETECTION, FAST))
def test_a_detector_gives_flags_and_scores(name, suspect):
    data, *_ = suspect
    found = bdjax.detect(name, data, jax.random.key(2), **arguments(name, suspect))
    assert found.flags.shape == (ROWS,) and found.flags.dtype == bool
    assert found.scores.shape == (ROWS,) and np.isfinite(found.scores).all()
    assert found.given == bdjax.DEFENSES[name].needs
    assert isinstance(found.patterns, tuple) and all(np.ndim(value) == 0 for value in found.facts.values())
    assert len(data[~found.flags]) == ROWS - found.flags.sum()

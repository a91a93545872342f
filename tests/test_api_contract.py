"""The defenses in the Python interface: each receives what it needs, and one of each kind runs, on 64 rows.

Whether a defense works on such inputs is checked by `tests/defenses/test_defense_contract.py` for each of them.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bdjax
from bdjax import api
from bdjax.datasets.digits import load_digits
from bdjax.defenses import contract
from bdjax.testing.tiny_network import make_tiny
from bdjax.types import DefenseResult, Detection
from tests.tiers import slow_unless

ROWS, CLASSES = 64, 4
COMMON = {"epochs": 1, "batch_size": 32, "student": "vbd_4_4p"}
"""Settings that keep a defense fast, for each that has them."""
KINDS: dict[str, dict[str, Any]] = {
    "none": {},
    "cbd": {"biased_epochs": 1},
    "spectral_signatures": {},
    "fine_tuning": {},
    "strip": {"num_overlays": 4},
    "vbd": {
        "networks": "4-4P",
        "rows_per_class": 3,  # so that a class whose rows are all predicted correctly can be tested
        "detect_share": 0.5,
        "least_rows": 2,
        "p_value": 0.9,
        "detector_epochs": 1,
        "first_labelling": 0,
        "last_labelling": 0,
    },
    "neural_cleanse": {"repair_epochs": 1},
    "bab": {"networks": 1},
}
"""One defense, with further settings, of each kind: the network as it is; a training set alone; a detector that reads the
network, and retraining without the flagged rows; a network and clean rows; one more class; simple networks, extracted patterns
and evidence; pictures; a variant of the suspect's network with another number of classes."""
STUDENTS: dict[str, dict[str, Any]] = dict.fromkeys(("fkd", "robust_kd"), {"student": "resnet10"})
FAST = ("none", "spectral_signatures", "fine_tuning", "strip")
NETWORKS = {"attention_transfer": "vbd_4_4p", "bab": "vbd_4_4p", "fkd": "resnet10", "robust_kd": "resnet10"}
"""Suspect networks for defenses that need groups of blocks, as many taps as the student, or a network with a name; a tiny
network for all others."""


def settings(name: str) -> dict[str, Any]:
    defaults = bdjax.DEFENSES[name].settings
    common = {setting: value for setting, value in COMMON.items() if getattr(defaults, setting, None)}
    return common | STUDENTS.get(name, {}) | KINDS.get(name, {})


def network(name: str) -> api.Network:
    """A network that is not trained, for a defense."""
    named = NETWORKS.get(name)
    model = api.make_model(named, CLASSES, 2) if named else make_tiny(CLASSES)
    shapes = jax.eval_shape(lambda key: model.init(key, (8, 8, 1)), jax.random.key(0))
    random = np.random.default_rng(1)
    variables = jax.tree.map(lambda leaf: random.random(leaf.shape, np.float32), shapes)
    return api.Network(model, variables, (8, 8, 1), 2, None)


@pytest.fixture(scope="module")
def data() -> tuple[bdjax.Dataset, bdjax.Dataset]:
    """64 poisoned rows and 32 clean ones."""
    digits = load_digits((), False).train
    which = np.flatnonzero(digits.labels < CLASSES)
    images, labels = digits.images[which], digits.labels[which]
    rows, clean = bdjax.dataset(images[:ROWS], labels[:ROWS], CLASSES), bdjax.dataset(images[ROWS:96], labels[ROWS:96])
    return bdjax.poison("badnets", rows, jax.random.key(0), poison_rate=0.2, margin=0).data, clean


def arguments(name: str, clean: bdjax.Dataset) -> dict[str, Any]:
    """Exactly what the defense declares that it needs."""
    training = {"epochs": 1, "batch_size": 32}
    rows = {"clean": clean} if "clean rows" in bdjax.DEFENSES[name].needs else {}
    return {"victim": network(name), "training": training, **rows, **settings(name)}


def is_read(inputs: contract.DefenseInput, need: str) -> bool:
    """The inputs have what a defense reads, of one suspect with the rows of the data."""
    value = inputs.known(need)
    if need == "attacked model":
        return all(leaf.shape[0] == 1 for leaf in jax.tree.leaves(value.variables))
    return value.index.shape == value.labels.shape == (1, ROWS if need == "training set" else 32)


@pytest.mark.parametrize("name", sorted(bdjax.DEFENSES))
def test_a_defense_receives_its_needs_and_settings_and_returns_its_result(name, data, monkeypatch):
    rows, clean = data
    defense, options = bdjax.DEFENSES[name], arguments(name, clean)
    received = []

    def run(inputs, settings):
        received.append((inputs, settings))
        flags = np.zeros((1, ROWS), bool)
        return DefenseResult(inputs.make_model(), jnp.zeros((1, 3)), flags, flags * 1.0, {"rows": flags.sum(1)})

    def detect(inputs, settings):
        received.append((inputs, settings))
        return Detection(np.zeros((1, ROWS), bool), np.zeros((1, ROWS), np.float32), {"rows": np.array([7])})

    fake = dataclasses.replace(defense, run=run, detect=defense.detect and detect)
    monkeypatch.setattr(api, "_find_defense", lambda *texts, find=api._find_defense: (fake, find(*texts)[1]))
    results = [bdjax.defend(name, rows, jax.random.key(2), **options)]
    if defense.detect:
        results.append(bdjax.detect(name, rows, jax.random.key(2), **options))
    for (inputs, used), result in zip(received, results, strict=True):
        assert inputs.reader.needs == defense.needs == result.given and all(
            is_read(inputs, need) for need in defense.needs
        )
        assert (inputs.num_classes, inputs.recipe.epochs) == (CLASSES, 1) and result.settings == used
        assert all(getattr(used, setting) == value for setting, value in settings(name).items())
        assert result.flags.shape == result.scores.shape == (ROWS,) and np.ndim(result.facts["rows"]) == 0


@pytest.mark.parametrize("name", slow_unless(KINDS, FAST))
def test_a_defense_gives_a_network_and_a_detector_the_same_flags(name, data):
    rows, clean = data
    safe = bdjax.defend(name, rows, jax.random.key(2), **arguments(name, clean))
    logits = safe.predict(rows.images[:8])
    assert logits.shape in ((8, CLASSES), (8, CLASSES + 1)) and np.isfinite(logits).all()
    assert safe.given == bdjax.DEFENSES[name].needs and safe.seeds is None
    for values, dtype in ((safe.flags, bool), (safe.scores, np.floating)):
        assert values is None or (values.shape == (ROWS,) and np.issubdtype(values.dtype, dtype))
    assert all(np.ndim(value) == 0 and np.isfinite(value) for value in safe.facts.values())
    assert all(picture.shape[1:3] == (8, 8) for picture in safe.pictures.values())
    if bdjax.DEFENSES[name].detect:
        found = bdjax.detect(name, rows, jax.random.key(2), **arguments(name, clean))
        np.testing.assert_array_equal(found.flags, safe.flags)
        assert found.scores.shape == (ROWS,) and np.isfinite(found.scores).all()
        assert isinstance(found.patterns, tuple) and all(np.ndim(value) == 0 for value in found.facts.values())
        assert len(rows[~found.flags]) == ROWS - found.flags.sum()

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np

from bdjax.attacks.contract import Knowledge
from bdjax.attacks.label_rules import all_to_one
from bdjax.attacks.poisoning import ConfiguredAttack, trigger_all
from bdjax.attacks.registry import ATTACKS
from bdjax.datasets.digits import load_digits
from bdjax.defenses.nbab import NbabSettings, make_patch
from bdjax.inspection import verification
from bdjax.inspection.grad_cam import grad_cam
from bdjax.inspection.verification import IMAGES, VIEWS, verification_heat
from bdjax.models import last_tap
from bdjax.training.ensemble import init_members, members
from bdjax.training.stages import Nets
from tests.defenses.tiny import tiny_network

SETTINGS = NbabSettings(patch_size=3)
KEYS = jax.random.split(jax.random.key(0), 2)


def test_maps_are_of_the_sets_own_network_on_its_own_triggers(monkeypatch):
    train, test = load_digits((), False)
    model = tiny_network(11)
    nets = Nets(model, init_members(lambda key: model.init(key, test.image_shape), KEYS), 1, {})
    monkeypatch.setattr(verification, "verify", lambda inputs, settings, rungs: SimpleNamespace(nets=nets))
    target, badnets = int(test.labels[0]), ATTACKS["badnets"]
    part = ConfiguredAttack(badnets, badnets.settings, all_to_one(target))
    params = badnets.make_params(jax.random.key(1), Knowledge(train, target), badnets.settings)
    (heat,) = verification_heat(SimpleNamespace(keys=KEYS), SETTINGS, {1: (part, params)}, test)
    assert heat.images.shape == (IMAGES, len(VIEWS), *test.image_shape)
    rows = np.flatnonzero(test.labels != target)[:IMAGES]  # those of the target class are no victims
    plain, labels = test.images[rows], test.labels[rows]
    stamp = make_patch(SETTINGS.patch_size, SETTINGS.pattern)
    attacked = trigger_all(jax.random.key(0), test, part.attack.apply, params)[rows]
    views = [plain, stamp(plain, labels), attacked, stamp(attacked, labels)]
    np.testing.assert_array_equal(heat.images, np.stack(views, axis=1) / np.float32(255))
    member = members(nets.variables, 1)
    tap = last_tap(model, member, test.image_shape)
    for view in range(len(VIEWS)):
        maps, classes = grad_cam(model, member, jnp.asarray(heat.images[:, view]), tap=tap)
        np.testing.assert_allclose(heat.heat_maps[:, view], maps, atol=1e-5)
        np.testing.assert_array_equal(heat.classes[:, view], classes)


def test_nothing_is_trained_without_a_trigger():
    assert verification_heat(None, SETTINGS, {}, load_digits((), False).test) == []

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bdjax.attacks.poisoning import trigger_all
from bdjax.errors import InputError
from bdjax.evaluation import teachers as teachers_io
from bdjax.evaluation.measure import make_views
from bdjax.evaluation.suspects import Suspect
from bdjax.evaluation.variants import read_attack
from bdjax.models import make_model
from bdjax.training import ensemble
from bdjax.triggers import masked_blend
from bdjax.triggers.masked_blend import MaskedBlend
from bdjax.types import Dataset, Model

SHAPE, CLASSES = (8, 8, 1), 4
IMAGES = np.random.default_rng(0).integers(0, 200, (24, *SHAPE)).astype(np.uint8)
TRAIN = Dataset(IMAGES, (np.arange(24) % CLASSES).astype(np.int32), CLASSES, "mine", "a test")
BLEND = MaskedBlend(
    jnp.zeros((8, 8, 1)).at[:2, :2].set(1.0), jnp.full(SHAPE, 0.9, jnp.float32), jnp.asarray(0.5, jnp.float32)
)
NETWORK = make_model("lenet", CLASSES, 64, "native")


def suspect(text: str, params, target: int = 2) -> Suspect:
    attack = read_attack(text, TRAIN, target, defender_gets="model")
    return Suspect(attack, 0, TRAIN, params, None)


def shown(one: Suspect) -> tuple[np.ndarray, ...]:
    return make_views(jax.random.key(0), [one], TRAIN).triggered[0]


@pytest.fixture(scope="module")
def variables():
    return ensemble.init_members(lambda key: NETWORK.init(key, SHAPE), jax.random.split(jax.random.key(0), 2))


def under_the_rule_of(text: str) -> Suspect:
    """A suspect with BadNets' form of trigger and another attack's label rule."""
    one, rule = suspect("badnets", (BLEND,)), suspect(text, ()).parts[0].rule
    plan = one.attack.plan._replace(parts=(one.parts[0]._replace(rule=rule),))
    return one._replace(attack=one.attack._replace(plan=plan))


class TestTriggerOf:
    @pytest.mark.parametrize(
        ("text", "rule"),
        [
            ("badnets", "all_to_one"),
            ("badnets:label_rule=all_to_all", "all_to_all"),
            ("sig:poison_rate=0.1", "clean_label"),
            ("hidden_trigger:poison_rate=0.1", "hidden_source"),
        ],
    )
    def test_a_masked_blend_is_stored_with_its_rule(self, text, rule):
        one = under_the_rule_of(text)
        found = teachers_io.trigger_of(one, TRAIN, shown(one))
        assert found.label_rule == rule and found.triggers.names == ("BadNets",)
        back = MaskedBlend(*(jnp.asarray(leaf[0]) for leaf in found.triggers.params))
        again = trigger_all(jax.random.key(5), TRAIN, masked_blend.apply, back)
        np.testing.assert_array_equal(again, shown(one)[0])

    def test_a_blend_that_is_not_what_the_trigger_does_is_not_taken_for_it(self):
        one = suspect("badnets", (BLEND,))
        other = tuple(255 - images for images in shown(one))
        assert teachers_io.trigger_of(one, TRAIN, other) is None

    def test_none_and_several(self):
        clean = Suspect(read_attack("none", TRAIN, 0, defender_gets="model"), 0, TRAIN, (), np.zeros(24, bool))
        assert teachers_io.trigger_of(clean, TRAIN, ()) is None
        both = suspect("badnets+blended:poison_rate=0.1", (BLEND, BLEND))
        assert teachers_io.trigger_of(both, TRAIN, (IMAGES, IMAGES)) is None


class TestRoundTrip:
    def test_with_a_trigger(self, tmp_path, variables):
        one = under_the_rule_of("hidden_trigger:poison_rate=0.1")
        trigger = teachers_io.trigger_of(one, TRAIN, shown(one))
        first = ensemble.members(variables, np.array([0]))
        with_more = {**first, "teacher": jnp.zeros(3)}  # further entries are left out
        assert teachers_io.write_folder(tmp_path / "a", NETWORK, with_more, SHAPE, trigger, 2)
        found = teachers_io.open_teacher(str(tmp_path / "a"), TRAIN, 2, "native")
        assert found.model.description == NETWORK.description
        jax.tree.map(np.testing.assert_array_equal, found.variables, first)
        (read,) = found.suspects
        assert read.attack.title == "your teacher (BadNets)" and read.is_poisoned is None and read.attack.target == 2
        np.testing.assert_array_equal(shown(read)[0], shown(one)[0])
        for labels in (TRAIN.labels, TRAIN.labels[::-1]):
            np.testing.assert_array_equal(read.parts[0].rule.victims(labels), one.parts[0].rule.victims(labels))
            np.testing.assert_array_equal(read.parts[0].rule.wanted(labels), one.parts[0].rule.wanted(labels))

    def test_several_without_triggers(self, tmp_path, variables):
        assert teachers_io.write_folder(tmp_path / "b", NETWORK, variables, SHAPE, None, 2)
        found = teachers_io.open_teacher(str(tmp_path / "b"), TRAIN, 0, "native")
        assert [suspect.attack.title for suspect in found.suspects] == ["your teacher 1", "your teacher 2"]
        assert all(suspect.attack.plan is None and suspect.parts == () for suspect in found.suspects)

    def test_the_target_must_be_the_run_s(self, tmp_path, variables):
        one = suspect("badnets", (BLEND,))
        trigger = teachers_io.trigger_of(one, TRAIN, shown(one))
        teachers_io.write_folder(tmp_path / "c", NETWORK, ensemble.members(variables, np.array([1])), SHAPE, trigger, 2)
        with pytest.raises(InputError, match="use --target=2"):
            teachers_io.open_teacher(str(tmp_path / "c"), TRAIN, 0, "native")

    def test_a_user_supplied_network_is_not_written(self, tmp_path, variables):
        network = Model(NETWORK.init, NETWORK.apply, CLASSES, "a network of two heads")
        assert not teachers_io.write_folder(tmp_path / "d", network, variables, SHAPE, None, 0)
        assert not (tmp_path / "d").exists()

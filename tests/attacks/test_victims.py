import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from bdjax.attacks.contract import CleanModel
from bdjax.attacks.victims import Prepared, evaluate_victims, key_of, make_plan, prepare, train_victims
from bdjax.errors import InputError
from bdjax.run.log import StageLog
from bdjax.training import ensemble
from bdjax.training.member import Rows, TrainConfig
from bdjax.training.stages import StageRunner
from bdjax.types import Dataset, Model, ModelOutput, TrainTest

SHAPE, CLASSES = (8, 8, 1), 4
CONFIG = TrainConfig(epochs=12, batch_size=16, learning_rate=0.05, schedule="cosine")


def make_data(count, seed):
    """Each class is a bright quarter of the image: easy for a linear model."""
    generator = np.random.default_rng(seed)
    labels = (np.arange(count) % CLASSES).astype(np.int32)
    images = generator.integers(0, 60, (count, *SHAPE))
    for label in range(CLASSES):
        row, column = 3 * (label // 2), 3 * (label % 2)
        images[labels == label, row : row + 3, column : column + 3] += 150
    return Dataset(images.astype(np.uint8), labels, CLASSES, "quarters", "this test")


DATA = TrainTest(make_data(160, 0), make_data(80, 1))


def init(key, image_shape):
    return {"params": {"kernel": 0.01 * jax.random.normal(key, (64, CLASSES))}, "batch_stats": {}}


def apply(variables, images, *, train, edits=None):
    return ModelOutput(images.reshape(images.shape[0], -1) @ variables["params"]["kernel"], {}, variables)


MODEL = Model(init, apply, CLASSES, "linear")


@pytest.fixture(scope="module")
def runner(tmp_path_factory):
    return StageRunner(
        tmp_path_factory.mktemp("victims"), SHAPE, "map", StageLog(Console(file=io.StringIO(), width=200))
    )


@pytest.fixture(scope="module")
def clean(runner):
    labels = jnp.asarray(np.stack([DATA.train.labels] * 2))
    rows = Rows(jnp.broadcast_to(jnp.arange(160, dtype=jnp.int32), (2, 160)), {"labels": labels})
    none = jax.tree.map(lambda leaf: leaf[:, :0], rows)
    keys = jax.random.split(jax.random.key(0), 2)
    return runner.from_scratch("clean", MODEL, CONFIG, keys, 1, jnp.asarray(DATA.train.images), rows, none)


def prepare_all(clean, names, **changes):
    prepared = []
    for name in names:
        plan = make_plan(name, DATA.train, 0, **changes)
        for seed in range(2):
            known = CleanModel(MODEL, ensemble.members(clean.variables, seed))
            prepared.append(prepare(jax.random.key(seed), plan, DATA.train, 0, seed, known))
    return prepared


@pytest.mark.slow
def test_victims_learn_their_own_triggers_and_come_back_in_order(runner, clean):
    names = ["badnets", "wanet", "badnets+blended"]
    prepared = prepare_all(clean, names)
    victims = train_victims(jax.random.key(1), runner, prepared, DATA.train, clean, CONFIG, CONFIG, CONFIG)
    assert [victim.prepared is before for victim, before in zip(victims, prepared, strict=True)] == [True] * 6
    assert all(victim.history["loss"].shape == (12,) for victim in victims)
    tested = list(evaluate_victims(jax.random.key(2), runner, victims, clean, DATA, 50))
    assert [len(plan) for plan in tested] == [2, 2, 4]
    for trial in tested[0]:
        assert trial.metrics.asr > 0.9 and trial.metrics.cda > 0.9 and trial.clean_model.asr < 0.1
        assert trial.cover_accuracy is None
        np.testing.assert_array_equal(trial.triggered[:, 4:7, 4:7], 255)  # margin 1
    assert all(trial.cover_accuracy is not None for trial in tested[1])
    assert [trial.part.attack.name for trial in tested[2]] == ["badnets", "badnets", "blended", "blended"]


def test_what_a_victim_trains_on_does_not_depend_on_what_else_is_run(clean):
    alone, beside = prepare_all(clean, ["badnets"]), prepare_all(clean, ["blended", "badnets"])[2:]
    for separate, together in zip(alone, beside, strict=True):
        np.testing.assert_array_equal(separate.poisoned.images, together.poisoned.images)
        np.testing.assert_array_equal(separate.poisoned.labels, together.poisoned.labels)
    assert not np.array_equal(alone[0].poisoned.images, alone[1].poisoned.images)  # another seed


def test_attackers_who_train_have_no_poisoned_set(clean):
    (first, _) = prepare_all(clean, ["wanet"])
    assert isinstance(first, Prepared) and first.poisoned is None and first.poisoned_by == ()


def test_a_trigger_that_changes_nothing_is_an_error(clean):
    with pytest.raises(InputError, match="changes no pixel of the 12 poisoned rows"):
        prepare_all(clean, ["sig"], changes={"sig": {"amplitude": 1e-9}}, poison_rate=0.08)


def test_keys_are_of_the_name_alone():
    keys = [jax.random.key_data(key_of(jax.random.key(0), name)).tolist() for name in ("sig", "sig", "badnets")]
    assert keys[0] == keys[1] != keys[2]


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("nothing", {}, "is not one of"),
        ("badnets+wanet", {}, "can be combined"),
        ("badnets", {"label_rule": "clean_label"}, "label rule clean_label is not one of"),
        ("sig", {"poison_rate": 0.3}, "largest rate possible"),
        ("badnets", {"changes": {"badnets": {"colour": 1}}}, "no setting 'colour'"),
    ],
)
def test_plans_that_cannot_be_are_refused(name, changes, reason):
    with pytest.raises(InputError, match=reason):
        make_plan(name, DATA.train, 0, **changes)


def test_the_rate_and_the_rule_of_the_command_line_reach_every_part():
    plan = make_plan("badnets", DATA.train, 0, label_rule="all_to_all", poison_rate=0.25)
    assert plan.parts[0].settings.poison_rate == 0.25 and plan.parts[0].rule.name == "all-to-all, shift 1"

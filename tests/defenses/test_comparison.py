from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bdjax.attacks.suppression import suppressed_cross_entropy
from bdjax.datasets.npz import load_npz
from bdjax.defenses.comparison import (
    Suspect,
    TriggeredViews,
    defend,
    group_by_size,
    judge,
    make_given,
    make_suspect,
    make_views,
    measure,
    suspect_keys,
    with_label_noise,
)
from bdjax.defenses.variants import read_attack, read_defense
from bdjax.errors import InputError
from bdjax.training.member import TrainConfig
from bdjax.training.stages import Nets
from bdjax.types import Dataset, DefenseResult, Detection, Model, PoisonedDataset

CLASSES, ROWS, SHAPE = 4, 40, (8, 8, 1)
IMAGES = np.random.default_rng(0).integers(0, 200, (ROWS, *SHAPE)).astype(np.uint8)
LABELS = (np.arange(ROWS) % CLASSES).astype(np.int32)
TRAIN = Dataset(IMAGES, LABELS, CLASSES, "mine", "a test")
TACT = "tact:poison_rate=0.1:cover_rate=0.1"  # an attack with cover rows


def suspect(text, seed=0, train=TRAIN, is_clean=True):
    return make_suspect(jax.random.key(seed), read_attack(text, train, 0), train, seed, None, is_clean)


class TestMakeSuspect:
    def test_a_clean_set_has_no_poisoned_row(self):
        one = suspect("none")
        assert one.dataset is TRAIN and one.parts == () and one.num_covers == 0
        np.testing.assert_array_equal(one.is_poisoned, np.zeros(ROWS, bool))

    def test_of_rows_that_somebody_handed_over_nobody_knows(self):
        assert suspect("none", is_clean=False).is_poisoned is None

    @pytest.mark.parametrize("is_clean", [True, False])
    def test_a_file_that_tells_the_truth_is_believed(self, tmp_path, is_clean):
        truth = np.arange(ROWS) % 5 == 1
        labels = np.where(truth, 0, LABELS)
        arrays = {"train_images": IMAGES, "train_labels": labels, "test_images": IMAGES, "test_labels": LABELS}
        told = {"is_poisoned": truth, "original_labels": LABELS}
        for name, more, expected in (("silent", {}, np.zeros(ROWS, bool)), ("told", told, truth)):
            np.savez(tmp_path / f"{name}.npz", **arrays, **more)
            train = load_npz(tmp_path / f"{name}.npz").train
            known = suspect("none", train=train, is_clean=is_clean).is_poisoned
            if name == "silent" and not is_clean:
                assert known is None
            else:
                np.testing.assert_array_equal(known, expected)

    def test_an_attack_poisons_and_says_what(self):
        one = suspect("badnets:poison_rate=0.2")
        assert one.is_poisoned.sum() == 8 and (one.dataset.labels[one.is_poisoned] == 0).all()
        np.testing.assert_array_equal(one.dataset.images[~one.is_poisoned], IMAGES[~one.is_poisoned])
        assert suspect(TACT).num_covers > 0

    def test_seeds_differ_and_repeat(self):
        texts = [suspect("badnets", seed).is_poisoned for seed in (0, 0, 1)]
        np.testing.assert_array_equal(texts[0], texts[1])
        assert (texts[0] != texts[2]).any()

    def test_added_rows_have_no_partner(self):
        with pytest.raises(InputError, match="adds rows, which have no partner"):
            suspect("composite:suppression=10")


class TestLabelNoise:
    @pytest.mark.parametrize(("share", "count"), [(0.0, 0), (0.1, 4), (0.12, 4), (1.0, 40)])
    @pytest.mark.parametrize("seed", range(3))
    def test_so_many_rows_have_another_label(self, share, count, seed):
        before = LABELS.copy()
        noisy = with_label_noise(jax.random.key(seed), TRAIN, share)
        assert (noisy.labels != before).sum() == count
        assert noisy.labels.dtype == np.int32 and noisy.labels.min() >= 0 and noisy.labels.max() < CLASSES
        np.testing.assert_array_equal(LABELS, before)
        assert noisy.images is TRAIN.images and (noisy.name, noisy.num_classes) == (TRAIN.name, CLASSES)

    def test_every_other_label_is_as_likely(self):
        many = Dataset(np.zeros((4000, 1, 1, 1), np.uint8), np.arange(4000, dtype=np.int32) % CLASSES, CLASSES, "", "")
        noisy = with_label_noise(jax.random.key(0), many, 1.0)
        table = np.zeros((CLASSES, CLASSES), int)
        np.add.at(table, (many.labels, noisy.labels), 1)
        assert not np.diag(table).any()
        others = table[~np.eye(CLASSES, dtype=bool)]
        assert others.sum() == 4000 and np.abs(others - 4000 / 12).max() < 4 * (4000 / 12) ** 0.5

    def test_keys(self):
        labels = [with_label_noise(jax.random.key(seed), TRAIN, 0.5).labels for seed in (0, 0, 1)]
        np.testing.assert_array_equal(labels[0], labels[1])
        assert (labels[0] != labels[2]).any()

    def test_a_clean_set_with_wrong_labels_is_still_clean(self):
        one = suspect("none:label_noise=0.1")
        assert (one.dataset.labels != LABELS).sum() == 4 and not one.is_poisoned.any()
        np.testing.assert_array_equal(one.dataset.images, IMAGES)
        assert suspect("none:label_noise=0.1", is_clean=False).is_poisoned is None

    def test_an_attack_poisons_a_set_with_wrong_labels_and_is_told_alone(self):
        noisy, plain = suspect("badnets:poison_rate=0.2:label_noise=0.3"), suspect("badnets:poison_rate=0.2")
        assert noisy.is_poisoned.sum() == plain.is_poisoned.sum() == 8
        assert (noisy.dataset.labels[noisy.is_poisoned] == 0).all()
        clean = ~noisy.is_poisoned
        np.testing.assert_array_equal(noisy.dataset.images[clean], IMAGES[clean])
        assert 4 <= (noisy.dataset.labels[clean] != LABELS[clean]).sum() <= 12
        # What the attacker found is not what is right.
        assert (noisy.dataset.original_labels != LABELS).sum() == 12

    def test_a_file_that_tells_the_truth_keeps_it(self):
        truth = np.arange(ROWS) < 3
        own = PoisonedDataset(IMAGES, LABELS, CLASSES, "", "", (), truth, LABELS, np.arange(ROWS) == 5)
        one = suspect("none:label_noise=0.2", train=own)
        np.testing.assert_array_equal(one.is_poisoned, truth)
        assert (one.dataset.labels != LABELS).sum() == 8 and one.num_covers == 1


def test_suspects_of_one_size_are_one_group():
    longer = Dataset(np.concatenate([IMAGES, IMAGES[:2]]), np.concatenate([LABELS, LABELS[:2]]), CLASSES, "", "")
    ones = [Suspect(read_attack("none", TRAIN, 0), 0, data, (), None) for data in (TRAIN, longer, TRAIN, longer)]
    assert list(group_by_size(ones)) == [[0, 2], [1, 3]]


def test_a_suspects_key_does_not_depend_on_the_others():
    badnets, other, none = suspect("badnets"), suspect("badnets", 1), suspect("none")
    together = suspect_keys(jax.random.key(0), [badnets, none, other])
    alone = suspect_keys(jax.random.key(0), [other, badnets])
    data = [np.asarray(jax.random.key_data(keys)) for keys in (together, alone)]
    np.testing.assert_array_equal(data[0][[2, 0]], data[1])
    assert len(np.unique(data[0], axis=0)) == 3 and together.shape == (3,)


class Recorded:
    """A runner that trains nothing and says what it was asked for."""

    image_shape = SHAPE

    def from_variables(self, stage, model, config, variables, keys, per_seed, pool, rows, objective):
        self.asked = SimpleNamespace(stage=stage, config=config, pool=np.asarray(pool), rows=rows, objective=objective)
        return Nets(model, variables, per_seed, {})


TINY = Model(lambda key, shape: {"params": jax.random.normal(key, (2,))}, lambda *_, **__: None, CLASSES, "tiny")
RECIPE = TrainConfig(epochs=1, batch_size=8)


def given_for(suspects, clean=None):
    runner = Recorded()
    keys = suspect_keys(jax.random.key(0), suspects)
    return make_given(suspects, keys, TRAIN, clean, lambda *_: TINY, RECIPE, runner), runner.asked


class TestMakeGiven:
    def test_each_member_has_its_own_rows(self):
        suspects = [suspect("badnets:poison_rate=0.2"), suspect("none"), suspect(TACT)]
        clean = Dataset(IMAGES[:6] + 50, LABELS[:6], CLASSES, "", "")
        given, asked = given_for(suspects, clean)
        for number, one in enumerate(suspects):
            np.testing.assert_array_equal(np.asarray(given.pool)[given.index[number]], one.dataset.images)
            np.testing.assert_array_equal(given.labels[number], one.dataset.labels)
            np.testing.assert_array_equal(np.asarray(given.pool)[given.clean_index[number]], clean.images)
            np.testing.assert_array_equal(given.clean_labels[number], clean.labels)
        assert (given.num_poisons == [one.is_poisoned.sum() for one in suspects]).all()
        assert asked.stage == "no defense" and asked.config == RECIPE
        np.testing.assert_array_equal(asked.rows.index, given.index)
        np.testing.assert_array_equal(asked.rows.targets["weight"], np.ones_like(given.labels, np.float32))
        assert given.suppression is None and given.attacked.variables["params"].shape == (3, 2)

    def test_what_nobody_knows_no_oracle_is_told(self):
        given, _ = given_for([suspect("badnets"), suspect("none", is_clean=False)])
        assert given.num_poisons is None
        with pytest.raises(ValueError, match="no clean rows"):
            given.clean_rows()

    def test_an_adaptive_attackers_rows_have_partners_without_the_trigger(self):
        suspects = [suspect("badnets:suppression=20"), suspect("badnets")]
        given, asked = given_for(suspects)
        np.testing.assert_array_equal(given.suppression[0], 20.0 * suspects[0].is_poisoned)
        assert not given.suppression[1].any() and asked.objective is suppressed_cross_entropy(TINY)
        assert asked.rows.index.shape == (2, ROWS, 2) and asked.rows.targets["suppression"].shape == (2, ROWS)
        for number, one in enumerate(suspects):
            learnt, partner = np.moveaxis(asked.pool[np.asarray(asked.rows.index)[number]], 1, 0)
            np.testing.assert_array_equal(learnt, one.dataset.images)
            np.testing.assert_array_equal(partner, IMAGES)

    def test_oracles_get_the_trigger_of_each_attack_and_none_of_a_clean_set(self):
        one = suspect("badnets")
        given, _ = given_for([one, suspect("none")])
        shown, _ = given.own_triggers
        test = Dataset(IMAGES, LABELS, CLASSES, "", "")
        ((expected,),) = make_views(jax.random.key(5), [one], test).triggered
        np.testing.assert_array_equal(shown(IMAGES, LABELS), expected)
        assert given.own_triggers[1] is None


def read_pixel(model, variables, images, batch_size):
    """Member m says (first pixel + variables[m]) mod K of an image, each member of the same or of its own images."""
    del model, batch_size
    images = np.broadcast_to(images, (len(variables), *images.shape[-4:]))
    classes = (images[:, :, 0, 0, 0].astype(int) + np.asarray(variables)[:, None]) % CLASSES
    return np.eye(CLASSES, dtype=np.float32)[classes]


def showing(*classes):
    """Images whose first pixels are these."""
    images = np.zeros((len(classes), *SHAPE), np.uint8)
    images[:, 0, 0, 0] = classes
    return images


class TestMeasure:
    """Member 0 is a hybrid and right about the first pixel; member 1 has no trigger and is always one class off."""

    test = Dataset(showing(0, 1, 2, 3, 1, 2), np.array([0, 1, 2, 3, 1, 1], np.int32), CLASSES, "", "")
    views = TriggeredViews(test, ((showing(0, 0, 0, 3, 0, 1), showing(0, 1, 2, 3, 0, 1)), ()))
    variables = jnp.array([0, 1])
    runner = SimpleNamespace(predict=read_pixel, predict_own=read_pixel)
    given = SimpleNamespace(runner=runner, recipe=RECIPE)

    @pytest.fixture
    def suspects(self):
        one = suspect("badnets+sig:poison_rate=0.1")
        return [one._replace(is_poisoned=np.arange(ROWS) < 4), suspect("none")]

    @pytest.fixture
    def result(self):
        flags = np.zeros((2, ROWS), bool)
        flags[:, 2:7] = True
        scores = np.tile(-np.arange(ROWS, dtype=np.float32), (2, 1))
        facts = {"kept": np.array([35.0, 36.0])}
        return DefenseResult(TINY, self.variables, flags, scores, facts)

    def test_by_hand(self, suspects, result):
        variant = read_defense("none", "quick", "digits")
        hybrid, clean = measure(self.given, result, suspects, variant, self.views, 1.5)
        assert hybrid.cda == pytest.approx(5 / 6) and clean.cda == 0
        badnets, sig = hybrid.metrics
        # Rows 1 to 5 are no 0s. Under the first trigger they are seen as 0, 0, 3, 0, 1: three successes, rows 3 and 5 right.
        assert (badnets.asr, badnets.r_acc) == (pytest.approx(3 / 5), pytest.approx(2 / 5))
        # Under the second as 1, 2, 3, 0, 1: one success, four right.
        assert (sig.asr, sig.r_acc) == (pytest.approx(1 / 5), pytest.approx(4 / 5))
        assert (hybrid.asr, hybrid.r_acc) == (pytest.approx(2 / 5), pytest.approx(3 / 5))
        assert clean.metrics == () and clean.asr is None and clean.r_acc is None
        # Flagged are rows 2 to 6, poisoned 0 to 3, and scores fall from row to row.
        assert hybrid.detection == (5 / ROWS, 2 / 5, 2 / 4, pytest.approx(4 / 9), 1.0)
        assert clean.detection == (5 / ROWS, None, None, None, None)
        assert [dict(one.facts) for one in (hybrid, clean)] == [{"kept": 35.0}, {"kept": 36.0}]
        assert hybrid.seconds == 1.5 and hybrid.suspect is suspects[0] and hybrid.variant is variant

    def test_a_detector_at_test_time_may_reject(self, suspects, result):
        """Rejected rows are neither right nor successes."""

        def reject(*arguments):
            logits = read_pixel(*arguments)
            return np.concatenate([logits, 2 * logits[..., :1]], -1)  # everything that looks like a 0

        given = SimpleNamespace(runner=SimpleNamespace(predict=reject, predict_own=reject), recipe=RECIPE)
        hybrid, _ = measure(given, result, suspects, read_defense("none", "quick", "digits"), self.views, 0.0)
        assert hybrid.cda == pytest.approx(4 / 6) and [one.asr for one in hybrid.metrics] == [0, 0]
        assert hybrid.metrics[0].r_acc == pytest.approx(2 / 5)

    def test_seconds_are_shared_by_the_suspects_of_a_call(self, suspects, result, monkeypatch):
        clock = iter([10.0, 16.0])
        monkeypatch.setattr("bdjax.defenses.comparison.time.perf_counter", lambda: next(clock))
        variant = read_defense("none", "quick", "digits")
        shown = variant._replace(defense=SimpleNamespace(name="none", title="", run=lambda given, settings: result))
        same, tried = defend(self.given, suspects, shown, self.views)
        assert same is result and [one.seconds for one in tried] == [3.0, 3.0]


class TestJudge:
    flags = np.zeros((2, ROWS), bool)
    flags[:, 2:7] = True
    scores = np.tile(-np.arange(ROWS, dtype=np.float32), (2, 1))
    found = Detection(flags, scores, {"classes with a pattern": np.array([1, 0])})

    def test_by_hand(self):
        one = suspect("badnets+sig:poison_rate=0.1")._replace(is_poisoned=np.arange(ROWS) < 4)
        suspects = [one, suspect("none", is_clean=False)]
        variant = read_defense("agpd", "quick", "digits")
        poisoned, unknown = judge(self.found, suspects, variant, 2.5)
        detection = poisoned.detection
        # Five rows are flagged, two of the four poisoned among them; and the poisoned ones have the highest scores.
        assert (detection.precision, detection.recall) == (pytest.approx(2 / 5), pytest.approx(2 / 4))
        assert detection.f1 == pytest.approx(4 / 9) and detection.auc == 1
        assert unknown.detection.precision is None and unknown.detection.auc is None
        assert [each.facts for each in (poisoned, unknown)] == [
            {"classes with a pattern": 1.0},
            {"classes with a pattern": 0.0},
        ]
        assert all(type(value) is float for each in (poisoned, unknown) for value in each.facts.values())
        for each, expected in zip((poisoned, unknown), suspects, strict=True):
            assert each.suspect is expected and each.variant is variant and each.seconds == 2.5
            assert each.cda is None and each.metrics == () and each.asr is None and each.r_acc is None

    def test_it_is_what_the_same_flags_are_worth_to_a_defense(self):
        suspects = [suspect("badnets:poison_rate=0.2"), suspect("none")]
        variant = read_defense("none", "quick", "digits")
        result = DefenseResult(TINY, TestMeasure.variables, *self.found)
        views = TriggeredViews(TestMeasure.test, ((TestMeasure.test.images,), ()))
        measured = measure(TestMeasure.given, result, suspects, variant, views, 1.0)
        judged = judge(self.found, suspects, variant, 1.0)
        assert [each.detection for each in judged] == [each.detection for each in measured]
        assert [each.facts for each in judged] == [each.facts for each in measured]


def test_views_are_the_same_whenever_they_are_made():
    test = Dataset(IMAGES[:10], LABELS[:10], CLASSES, "", "")
    ones = [suspect("badnets"), suspect("none"), suspect("badnets+sig:poison_rate=0.1")]
    views, again = (make_views(jax.random.key(0), ones, test) for _ in range(2))
    assert [len(each) for each in views.triggered] == [1, 0, 2]
    for one, other in zip(jax.tree.leaves(views.triggered), jax.tree.leaves(again.triggered), strict=True):
        np.testing.assert_array_equal(one, other)
    assert (views.triggered[0][0] != test.images).any() and views.triggered[0][0].dtype == np.uint8


def test_the_truth_of_a_poisoned_file_is_that_of_the_file():
    truth = np.arange(ROWS) < 3
    own = PoisonedDataset(IMAGES, LABELS, CLASSES, "", "", (), truth, LABELS, np.arange(ROWS) == 5)
    one = suspect("none", train=own, is_clean=False)
    np.testing.assert_array_equal(one.is_poisoned, truth)
    assert one.num_covers == 1

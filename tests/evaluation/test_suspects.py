from types import SimpleNamespace

import jax
import numpy as np
import pytest

from bdjax.attacks.suppression import suppressed_cross_entropy
from bdjax.datasets.npz import load_npz
from bdjax.errors import InputError
from bdjax.evaluation.measure import make_views
from bdjax.evaluation.suspects import (
    Suspect,
    group_by_size,
    make_defense_input,
    make_suspect,
    suspect_keys,
    try_out,
    with_label_noise,
)
from bdjax.evaluation.variants import read_attack
from bdjax.training.member import TrainConfig
from bdjax.training.stages import Nets
from bdjax.types import Dataset, Model, PoisonedDataset

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

    def test_the_ground_truth_of_third_party_rows_is_unknown(self):
        assert suspect("none", is_clean=False).is_poisoned is None

    @pytest.mark.parametrize("is_clean", [True, False])
    def test_the_ground_truth_of_a_file_is_used(self, tmp_path, is_clean):
        truth = np.arange(ROWS) % 5 == 1
        labels = np.where(truth, 0, LABELS)
        arrays = {"train_images": IMAGES, "train_labels": labels, "test_images": IMAGES, "test_labels": LABELS}
        known_truth = {"is_poisoned": truth, "original_labels": LABELS}
        for name, more, expected in (("without", {}, np.zeros(ROWS, bool)), ("with", known_truth, truth)):
            np.savez(tmp_path / f"{name}.npz", **arrays, **more)
            train = load_npz(tmp_path / f"{name}.npz").train
            known = suspect("none", train=train, is_clean=is_clean).is_poisoned
            if name == "without" and not is_clean:
                assert known is None
            else:
                np.testing.assert_array_equal(known, expected)

    def test_an_attack_poisons_and_records_the_rows(self):
        one = suspect("badnets:poison_rate=0.2")
        assert one.is_poisoned.sum() == 8 and (one.dataset.labels[one.is_poisoned] == 0).all()
        np.testing.assert_array_equal(one.dataset.images[~one.is_poisoned], IMAGES[~one.is_poisoned])
        assert suspect(TACT).num_covers > 0

    def test_seeds_differ_and_repeat(self):
        texts = [suspect("badnets", seed).is_poisoned for seed in (0, 0, 1)]
        np.testing.assert_array_equal(texts[0], texts[1])
        assert (texts[0] != texts[2]).any()

    def test_added_rows_have_no_partner(self):
        with pytest.raises(InputError, match="suppression needs a clean version of each row"):
            suspect("composite:suppression=10")


class TestTryOut:
    def test_what_fits_passes(self):
        attacks = [
            read_attack(text, TRAIN, 0) for text in ("badnets:poison_rate=0.2", "none", "narcissus", "label_flip")
        ]
        try_out(jax.random.key(0), attacks, TRAIN)

    def test_a_trigger_that_changes_nothing(self):
        with pytest.raises(InputError, match="attack blended: its trigger changes no pixel"):
            try_out(jax.random.key(0), [read_attack("blended:poison_rate=0.2:opacity=0", TRAIN, 0)], TRAIN)

    def test_rows_are_counted_after_label_noise(self):
        attack = read_attack("sig:poison_rate=0.2:label_noise=1", TRAIN, 0)
        keys = [jax.random.key(seed) for seed in range(20)]
        counts = [int((with_label_noise(jax.random.fold_in(key, 0), TRAIN, 1.0).labels == 0).sum()) for key in keys]
        assert min(counts) < 8 <= max(counts)
        try_out(keys[int(np.argmax(counts))], [attack], TRAIN)
        with pytest.raises(InputError, match="may be poisoned under the rule"):
            try_out(keys[int(np.argmin(counts))], [attack], TRAIN)


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

    def test_only_the_attack_s_rows_count_as_poisoned_under_label_noise(self):
        noisy, plain = suspect("badnets:poison_rate=0.2:label_noise=0.3"), suspect("badnets:poison_rate=0.2")
        assert noisy.is_poisoned.sum() == plain.is_poisoned.sum() == 8
        assert (noisy.dataset.labels[noisy.is_poisoned] == 0).all()
        clean = ~noisy.is_poisoned
        np.testing.assert_array_equal(noisy.dataset.images[clean], IMAGES[clean])
        assert 4 <= (noisy.dataset.labels[clean] != LABELS[clean]).sum() <= 12
        # The original labels are those that the attacker saw, which are noisy.
        assert (noisy.dataset.original_labels != LABELS).sum() == 12

    def test_the_ground_truth_of_a_file_survives_label_noise(self):
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
    """A runner that records its arguments and trains nothing."""

    image_shape = SHAPE

    def from_variables(self, stage, model, config, variables, keys, per_seed, pool, rows, objective):
        self.called = SimpleNamespace(stage=stage, config=config, pool=np.asarray(pool), rows=rows, objective=objective)
        return Nets(model, variables, per_seed, {})


TINY = Model(lambda key, shape: {"params": jax.random.normal(key, (2,))}, lambda *_, **__: None, CLASSES, "tiny")
RECIPE = TrainConfig(epochs=1, batch_size=8)


def inputs_for(suspects, clean=None):
    runner = Recorded()
    keys = suspect_keys(jax.random.key(0), suspects)
    return make_defense_input(suspects, keys, TRAIN, clean, lambda *_: TINY, RECIPE, runner), runner.called


class TestMakeDefenseInput:
    def test_each_member_has_its_own_rows(self):
        suspects = [suspect("badnets:poison_rate=0.2"), suspect("none"), suspect(TACT)]
        clean = Dataset(IMAGES[:6] + 50, LABELS[:6], CLASSES, "", "")
        inputs, called = inputs_for(suspects, clean)
        for number, one in enumerate(suspects):
            np.testing.assert_array_equal(np.asarray(inputs.pool)[inputs.index[number]], one.dataset.images)
            np.testing.assert_array_equal(inputs.labels[number], one.dataset.labels)
            np.testing.assert_array_equal(np.asarray(inputs.pool)[inputs.clean_index[number]], clean.images)
            np.testing.assert_array_equal(inputs.clean_labels[number], clean.labels)
        assert (inputs.num_poisons == [suspect.is_poisoned.sum() for suspect in suspects]).all()
        assert called.stage == "no defense" and called.config == RECIPE
        np.testing.assert_array_equal(called.rows.index, inputs.index)
        np.testing.assert_array_equal(called.rows.targets["weight"], np.ones_like(inputs.labels, np.float32))
        assert inputs.attacker is None and inputs.attacked.variables["params"].shape == (3, 2)

    def test_oracles_get_nothing_that_is_unknown(self):
        inputs, _ = inputs_for([suspect("badnets"), suspect("none", is_clean=False)])
        assert inputs.num_poisons is None
        with pytest.raises(ValueError, match="needs the clean rows, which these inputs do not have"):
            inputs.clean_rows()

    def test_an_adaptive_attackers_rows_have_partners_without_the_trigger(self):
        suspects = [suspect("badnets:suppression=20"), suspect("badnets")]
        inputs, called = inputs_for(suspects)
        np.testing.assert_array_equal(inputs.attacker.suppression[0], 20.0 * suspects[0].is_poisoned)
        assert not inputs.attacker.suppression[1].any() and called.objective is suppressed_cross_entropy(TINY)
        assert called.rows.index.shape == (2, ROWS, 2) and called.rows.targets["suppression"].shape == (2, ROWS)
        for number, one in enumerate(suspects):
            learnt, partner = np.moveaxis(called.pool[np.asarray(called.rows.index)[number]], 1, 0)
            np.testing.assert_array_equal(learnt, one.dataset.images)
            np.testing.assert_array_equal(partner, IMAGES)

    def test_oracles_get_the_trigger_of_each_attack_and_none_of_a_clean_set(self):
        one = suspect("badnets")
        inputs, _ = inputs_for([one, suspect("none")])
        shown, _ = inputs.attacker_triggers
        test = Dataset(IMAGES, LABELS, CLASSES, "", "")
        ((expected,),) = make_views(jax.random.key(5), [one], test).triggered
        np.testing.assert_array_equal(shown(IMAGES, LABELS), expected)
        assert inputs.attacker_triggers[1] is None


def test_the_truth_of_a_poisoned_file_is_that_of_the_file():
    truth = np.arange(ROWS) < 3
    own = PoisonedDataset(IMAGES, LABELS, CLASSES, "", "", (), truth, LABELS, np.arange(ROWS) == 5)
    one = suspect("none", train=own, is_clean=False)
    np.testing.assert_array_equal(one.is_poisoned, truth)
    assert one.num_covers == 1

"""VBD from end to end on noise that nothing but a patch can be learnt from, and its parts by hand."""

import dataclasses
from functools import cache
from types import SimpleNamespace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bdjax.defenses import vbd
from bdjax.defenses.contract import DefenseInput, PoolRows
from bdjax.defenses.vbd import (
    analyse,
    check,
    choose_networks,
    detect,
    may_be_chance,
    run,
    to_detection,
)
from bdjax.defenses.vbd_detector import NO_LABEL, detector_objective, row_detections
from bdjax.defenses.vbd_patterns import VBDSettings
from bdjax.errors import InputError
from bdjax.models import make_model
from bdjax.models.simple_cnn import make_pattern_detector
from bdjax.run.log import StageLog
from bdjax.training.member import TrainConfig
from bdjax.training.stages import StageRunner
from bdjax.types import Model, ModelOutput

PAPER = VBDSettings()

# ---- Which patterns are kept -----------------------------------------------------------------------------------------


class TestChoice:
    accuracies = np.array([[0.3, 0.2, 0.9]])

    def of(self, *success, **changes):
        settings = dataclasses.replace(PAPER, **changes)
        return choose_networks(self.accuracies, np.array(success, float).T[None], settings)[0].tolist()

    def test_the_best_score_of_those_that_work(self):
        # Scores of the first column: 0.78, 0.80 and 0.46; of the second 0.78, 0.80 of a pattern that does not work, 0.46.
        assert self.of([0.9, 0.8, 1.0]) == [1]
        assert self.of([0.9, 0.8, 1.0], [0.9, 0.32, 1.0], [0.0, 0.32, 1.0], accuracy_weight=0.6) == [1, 0, 2]
        assert self.of([0.9, 0.8, 1.0], accuracy_weight=0.0) == [2]
        assert self.of([0.34, 0.33, 1.0], accuracy_weight=1.0) == [1]

    def test_no_pattern_that_works(self):
        assert self.of([0.0, 0.0, 0.0], [0.3299, 0.1, 0.0], [0.33, 0.0, 0.0]) == [-1, -1, 0]

    def test_votes(self):
        columns = [0.5, 0.0, 0.0], [0.5, 0.5, 0.0], [0.5, 0.5, 0.5]
        assert self.of(*columns, votes=1) == [0, 1, 1]
        assert self.of(*columns, votes=2) == [-1, 1, 1]
        assert self.of(*columns, votes=3) == [-1, -1, 1]

    def test_suspects_are_apart(self):
        success = np.array([[[0.9], [0.8]], [[0.0], [0.8]], [[0.0], [0.0]]])
        accuracies = np.array([[0.9, 0.1], [0.1, 0.9], [0.1, 0.1]])
        np.testing.assert_array_equal(choose_networks(accuracies, success, PAPER), [[1], [1], [-1]])


class TestChance:
    p_values = np.array([[[4e-4, 6e-4, 1e-3, 1e-9], [0.5, 0.5, 2e-3, 0.5]]])  # [M, J, K]
    success = np.array([[[0.9, 0.9, 0.9, 0.2], [0.0, 0.0, 0.9, 0.0]]])

    def of(self, has_learned=False, tests=20, p_values=p_values, **changes):
        settings = dataclasses.replace(PAPER, **changes)
        return may_be_chance(p_values, np.array([tests]), self.success, np.array([has_learned]), settings)[0].tolist()

    def test_a_single_network_needs_a_p_value_that_many_tests_do_not_explain(self):
        # 20 tests: the bound is 5e-4. The third class has two networks, the last no pattern that works.
        assert self.of() == [False, True, False, False]
        assert self.of(tests=10) == [False, False, False, False]

    def test_networks_that_learned_the_classes_do_not_confirm_each_other(self):
        assert self.of(has_learned=True) == [False, True, True, False]

    def test_the_p_value_is_that_of_a_pattern_that_works(self):
        assert self.of(least_success=0.1)[3] is False  # 1e-9 is of a network whose pattern works now
        smaller = self.p_values.copy()
        smaller[0, 1, 1] = 1e-9  # of a network whose pattern does not
        assert self.of(p_values=smaller)[1] is True


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"networks": "64P/5P"}, "networks '5P' is not one of 64P, 10-10P"),
        ({"networks": ""}, "networks '' is not one of"),
        ({"networks": "64P/"}, "networks '' is not one of"),
        ({"networks": "64P,10-10P"}, "networks '64P,10-10P' is not one of"),
        ({"detect_share": 0.0}, "detect_share 0.0 is not above 0 and below 1"),
        ({"detect_share": 1.0}, "detect_share 1.0 is not"),
        ({"check_share": 1.5}, "check_share 1.5 is not"),
        ({"p_value": 0.0}, "p_value 0.0 is not"),
        ({"rows_per_class": 0}, "rows_per_class 0 is not at least 1"),
        ({"least_rows": 1}, "least_rows 1 is not at least 2"),
        ({"pixel_rule": "both"}, "pixel_rule 'both' is not one of paper, code"),
        ({"least_success": 1.1}, "least_success 1.1 is not at least 0 and at most 1"),
        ({"votes": 4}, "votes 4 is not at least 1 and at most 3"),
        ({"votes": 2, "networks": "64P"}, "votes 2 is not at least 1 and at most 1"),
        ({"accuracy_weight": -0.1}, "accuracy_weight -0.1 is not"),
        ({"detector_rows": "some"}, "detector_rows 'some' is not one of all, held_back"),
        ({"detector_batch_size": 1}, "detector_batch_size 1 is not at least 2"),
        ({"own_rows": 0.0}, "own_rows 0.0 is not above 0 and at most 1"),
        ({"own_rows": 1.5}, "own_rows 1.5 is not"),
        ({"dropout": 1.0}, "dropout 1.0 is not at least 0 and below 1"),
        ({"least_opacity": 2.0}, "least_opacity 2.0 is not"),
        ({"first_labelling": -1}, "first_labelling -1 is not"),
        ({"least_accuracy": 1.1}, "least_accuracy 1.1 is not"),
        ({"least_sure": 1.1}, "least_sure 1.1 is not"),
        ({"clean_model": "both"}, "clean_model 'both' is not one of suppress, relabel"),
        ({"learning_rate": 0.0}, "learning_rate 0.0 is not above 0"),
    ],
)
def test_invalid_settings_are_refused(changes, message):
    with pytest.raises(InputError, match="^[^\n]*$") as raised:
        check(dataclasses.replace(PAPER, **changes))
    assert str(raised.value).startswith(f"defense vbd: {message}")


def test_settings_are_checked_before_anything_is_trained():
    check(PAPER)
    for function in (analyse, detect, run):
        with pytest.raises(InputError, match="votes 9"):
            function(SimpleNamespace(), dataclasses.replace(PAPER, votes=9))


# ---- A detector's steps ----------------------------------------------------------------------------------------------


def squares(variables, images, *, train, edits=None):
    """Class 2 has half the sum of squared pixels, weighted; the others have nothing. So g(x; 2) is the weights times x."""
    assert not train
    score = 0.5 * jnp.sum(variables["weights"] * jnp.square(images), axis=(1, 2, 3))
    return ModelOutput(jnp.stack([0 * score, 0 * score, score], axis=1), {}, variables)


@cache
def compiled_objective(model, settings, batches_per_epoch):
    return jax.jit(detector_objective(model, settings, batches_per_epoch))


@jax.jit
def detector_logits(params, gradients):
    """The logits of a detector on gradient images: float32 [N]."""
    weights = {"params": params, "batch_stats": {}}
    return make_pattern_detector().apply(weights, gradients, train=False).logits[:, 0]


class TestObjective:
    shape, count, own, per_epoch = (6, 6, 2), 8, 20, 3
    model = Model(lambda key, shape: {}, squares, 3, "squares")
    exact = dataclasses.replace(PAPER, dropout=0.0, least_opacity=1.0, own_rows=0.5)

    @pytest.fixture(scope="class")
    @classmethod
    def start(cls):
        random = np.random.default_rng(0)
        draw = lambda *shape: jnp.asarray(random.random(shape), jnp.float32)  # noqa: E731
        params = jax.jit(lambda key: make_pattern_detector().init(key, cls.shape)["params"])(jax.random.key(0))
        mask = (draw(6, 6, 1) < 0.4).astype(jnp.float32)
        variables = {
            "params": params,
            "network": {"weights": 0.5 + draw(1, 6, 6, 2)},
            "mask": mask,
            "pattern": mask * draw(6, 6, 2),
            "class": jnp.int32(2),
            "scale": jnp.array([2.0, 3.0]),
            "pseudo_labels": jnp.full(cls.own, 0.5),  # neither, so that what is renewed shows
            "steps": jnp.int32(0),
        }
        targets = {"class_row": jnp.array([3, 0, 19, 7, 5, 6, 1, 2]), "labels": jnp.zeros(8, jnp.int32)}
        return variables, draw(cls.count, 2, *cls.shape), targets

    def step(self, start, epoch, settings=None, key=0, **changes):
        variables, images, targets = start
        variables = {**variables, "steps": jnp.int32(epoch * self.per_epoch + 1), **changes}
        objective = compiled_objective(self.model, settings or self.exact, self.per_epoch)
        return objective(variables["params"], variables, images, targets, jax.random.key(key))

    def views_by_hand(self, start):
        """The logits of rows of other classes, unchanged and patched, and of those of the class itself."""
        variables, images, _ = jax.tree.map(np.asarray, start)
        patched = np.where(variables["mask"] > 0, variables["pattern"], images[:, 0])
        views = np.concatenate([images[:, 0], patched, images[:4, 1]])
        logits = detector_logits(start[0]["params"], variables["network"]["weights"] * views * variables["scale"])
        return np.split(np.asarray(logits), [8, 16])

    def test_before_there_are_pseudo_labels_each_row_is_learned_unchanged_and_patched(self, start):
        clean, patched, _ = self.views_by_hand(start)
        for epoch in (0, 5):  # in the epoch of the first labelling they are made and not yet learnt from
            outcome = self.step(start, epoch)
            expected = (np.logaddexp(0, clean) + np.logaddexp(0, -patched)) / 2
            np.testing.assert_allclose(outcome.losses, expected, rtol=1e-4, atol=1e-5)
            is_patched = np.arange(8) < 4
            np.testing.assert_allclose(outcome.logits[:, 1], np.where(is_patched, patched, clean), rtol=1e-4, atol=1e-5)
            assert not outcome.logits[:, 0].any()
            np.testing.assert_array_equal(outcome.labels, is_patched)

    @pytest.mark.parametrize("missing", [(), (0, 19), (3, 0, 19, 7)])
    def test_with_pseudo_labels_the_mean_is_over_all_labelled_images_of_the_step(self, start, missing):
        labels = jnp.asarray(np.arange(self.own) % 2, jnp.float32).at[jnp.array(missing, int)].set(NO_LABEL)
        outcome = self.step(start, 6, pseudo_labels=labels)
        clean, patched, own = self.views_by_hand(start)
        is_labelled = ~np.isin([3, 0, 19, 7], missing)
        wanted = np.concatenate([np.zeros(8), np.ones(8), np.array([1, 0, 1, 1])[is_labelled]])
        both = np.concatenate([clean, patched, own[is_labelled]])
        expected = np.mean(np.logaddexp(0, both) - wanted * both)
        assert outcome.losses.shape == (8,)
        np.testing.assert_allclose(np.mean(outcome.losses), expected, rtol=1e-4)
        assert outcome.logits.shape == (8, 2)  # accuracy is of rows whose label is known

    @pytest.mark.parametrize("epoch", [0, 4, 5, 8, 11, 12])
    def test_pseudo_labels_change_in_their_window_for_the_rows_of_the_step(self, start, epoch):
        params = start[0]["params"]
        *_, own = self.views_by_hand(start)
        bias = params["classifier"]["bias"] - np.median(own)  # two of the four are above
        params = {**params, "classifier": {**params["classifier"], "bias": bias}}
        after = np.asarray(self.step(start, epoch, params=params).variables["pseudo_labels"])
        rows, expected = [3, 0, 19, 7], np.full(self.own, 0.5)
        if 5 <= epoch <= 11:
            expected[rows] = own >= np.median(own)
            assert sorted(after[rows]) == [0, 0, 1, 1]
        np.testing.assert_array_equal(after, expected)

    def test_nothing_but_pseudo_labels_and_the_number_of_steps_changes(self, start):
        outcome = self.step(start, 5)
        assert int(outcome.variables["steps"]) == 5 * self.per_epoch + 2
        for name in ("network", "mask", "pattern", "class", "scale"):
            chex.assert_trees_all_equal(outcome.variables[name], start[0][name])

    def test_gradients_reach_the_detector_alone(self, start):
        variables, images, targets = start
        objective = detector_objective(self.model, self.exact, self.per_epoch)
        variables = {**variables, "steps": jnp.int32(6 * self.per_epoch)}

        @jax.jit
        def gradients(params, weights, pattern, images):
            def loss(params, weights, pattern, images):
                changed = {**variables, "network": {"weights": weights}, "pattern": pattern}
                return jnp.mean(objective(params, changed, images, targets, jax.random.key(0)).losses)

            return jax.grad(loss, (0, 1, 2, 3))(params, weights, pattern, images)

        weights = variables["network"]["weights"]
        own, *others = gradients(variables["params"], weights, variables["pattern"], images)
        assert all(np.abs(leaf).max() > 1e-4 for leaf in jax.tree.leaves(own))
        assert not any(leaf.any() for leaf in others)

    def test_each_row_has_an_opacity_of_its_own(self, start, monkeypatch):
        drawn, blend = [], vbd.vbd_patterns.blend

        def record(images, mask, pattern, opacity):
            jax.debug.callback(lambda opacity: drawn.append(np.asarray(opacity)), opacity)
            return blend(images, mask, pattern, opacity)

        monkeypatch.setattr(vbd.vbd_patterns, "blend", record)
        variables, images, _ = start
        images, targets = jnp.tile(images, (20, 1, 1, 1, 1)), {"class_row": jnp.arange(160) % self.own}
        objective = jax.jit(detector_objective(self.model, PAPER, self.per_epoch))
        jax.block_until_ready(objective(variables["params"], variables, images, targets, jax.random.key(4)))
        jax.effects_barrier()
        (opacity,) = drawn
        assert opacity.shape == (160, 1, 1, 1) and len(np.unique(opacity)) > 150
        assert 0.1 <= opacity.min() < 0.15 and 0.95 < opacity.max() <= 1

    def test_dropout_does_not_matter_on_average(self, start):
        variables, images, targets = start
        halved = detector_objective(self.model, dataclasses.replace(self.exact, dropout=0.5), self.per_epoch)
        keys = jax.random.split(jax.random.key(0), 500)
        run = jax.jit(jax.vmap(lambda key: halved(variables["params"], variables, images, targets, key).logits[:, 1]))
        logits, (clean, patched, _) = np.asarray(run(keys)), self.views_by_hand(start)
        expected = np.where(np.arange(8) < 4, patched, clean)
        assert logits.std(axis=0).min() > 0.02
        np.testing.assert_allclose(logits.mean(axis=0), expected, atol=5 * logits.std(axis=0).max() / 500**0.5)

    def test_a_detector_gives_the_probability_of_rows(self, start):
        variables, images, _ = start
        found = jax.jit(row_detections(self.model))(variables, images[:, 0], {})
        weights, scale = np.asarray(variables["network"]["weights"]), np.asarray(variables["scale"])
        logits = detector_logits(variables["params"], weights * np.asarray(images[:, 0]) * scale)
        np.testing.assert_allclose(found, 1 / (1 + np.exp(-np.asarray(logits))), rtol=1e-4)


# ---- From end to end -------------------------------------------------------------------------------------------------

SHAPE, ROWS, CLASSES = (12, 12, 1), 420, 3
PATCH = np.zeros(SHAPE[:2], bool)
PATCH[8:11, 7:10] = True
SMALL = VBDSettings(
    networks="4-4P",
    epochs=10,
    batch_size=32,
    rows_per_class=12,
    least_rows=4,
    detector_epochs=9,
    detector_batch_size=32,
    own_rows=0.5,
    detector_learning_rate=0.05,
    least_opacity=0.5,
)


@cache
def small_model(name=None, num_classes=None):
    return make_model(name or "vbd_4_4p", num_classes or CLASSES, 4)


def noise(seed):
    """Grey noise with random labels, the same noise with a white patch on a quarter of the rows, and which rows those are:
    they are labelled 1 in both."""
    random = np.random.default_rng(seed)
    plain = np.clip(100 + 50 * random.standard_normal((ROWS, *SHAPE)), 0, 255).astype(np.uint8)
    labels = random.permutation((np.arange(ROWS) % CLASSES).astype(np.int32))
    is_poisoned = random.random(ROWS) < 0.25
    labels[is_poisoned] = 1
    patched = plain.copy()
    patched[np.ix_(is_poisoned, *(np.unique(axis) for axis in np.nonzero(PATCH)))] = 255
    return plain, patched, labels, is_poisoned


def make_inputs(members, folder):
    """A defender's inputs from the (images, labels, key) of each member."""
    images, labels, keys = zip(*members, strict=True)
    return DefenseInput(
        pool=jnp.asarray(np.concatenate(images)),
        num_classes=CLASSES,
        keys=jnp.stack([jax.random.key(key) for key in keys]),
        make_model=small_model,
        recipe=TrainConfig(epochs=2, batch_size=32, evaluation_batch_size=200, keep_last_batch=False),
        runner=StageRunner(folder, SHAPE, "map", StageLog(), group_size=64),  # no estimate of the memory
        knowledge={
            "training set": PoolRows(
                np.arange(len(members) * ROWS, dtype=np.int32).reshape(len(members), ROWS), np.stack(labels)
            )
        },
    )


class Noise:
    """Member 0 has a trigger, member 1 has the same rows and labels without it, and member 2 is member 0 again."""

    def __init__(self, folder):
        plain, patched, self.labels, self.is_poisoned = noise(5)
        members = [(patched, self.labels, 0), (plain, self.labels, 1), (patched, self.labels, 0)]
        self.inputs = make_inputs(members, folder)
        self.analysis = analyse(self.inputs, SMALL)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return Noise(tmp_path_factory.mktemp("noise"))


@pytest.mark.slow
class TestAnalysis:
    def test_the_poisoned_class_and_no_other_has_a_pattern(self, found):
        analysis = found.analysis
        np.testing.assert_array_equal(analysis.network, [[-1, 0, -1], [-1, -1, -1], [-1, 0, -1]])
        np.testing.assert_array_equal(analysis.is_poisoned_class, analysis.network == 0)
        assert analysis.p_values.shape == (3, 1, CLASSES) and analysis.p_values[0, 0, 1] < SMALL.p_value
        assert analysis.success[0, 0, 1] > 0.9 and analysis.detector_accuracies[0, 1] > 0.9
        # Labels are random but for the trigger's, so nothing is learned of rows that were not shown.
        assert analysis.accuracies.min() > analysis.held_back_accuracies.max()

    def test_the_mask_is_where_the_patch_is(self, found):
        mask, pattern = found.analysis.masks[0, 1], found.analysis.patterns[0, 1]
        assert (mask & PATCH).sum() >= 7 and (mask & ~PATCH).sum() <= 9  # of nine pixels, and of 135
        assert pattern[mask & PATCH].min() > 0.95 and not pattern[~mask].any()

    def test_its_rows_are_flagged(self, found):
        flags, truth = found.analysis.flags[0], found.is_poisoned
        assert not flags[found.labels != 1].any()  # a row of another class cannot have been given this label
        assert 2 * (flags & truth).sum() / (flags.sum() + truth.sum()) > 0.9
        scores = found.analysis.scores[0]
        np.testing.assert_array_equal(flags, scores >= 0.5)
        assert not scores[found.labels != 1].any() and scores.max() <= 1

    def test_nothing_is_found_where_there_is_nothing(self, found):
        for name in ("flags", "scores", "masks", "patterns", "detector_accuracies"):
            assert not getattr(found.analysis, name)[1].any(), name
        np.testing.assert_array_equal(found.analysis.new_labels[1], found.labels)

    def test_a_suspect_does_not_depend_on_its_place(self, found):
        values = {name: value for name, value in found.analysis._asdict().items() if name != "not_tested"}
        first, last = (jax.tree.map(lambda leaf, i=i: leaf[i], values) for i in (0, 2))
        assert found.analysis.not_tested[2] == found.analysis.not_tested[0]
        chex.assert_trees_all_close(last, first, rtol=1e-3, atol=1e-3)

    def test_several_splits(self, found, tmp_path):
        _, patched, labels, is_poisoned = noise(5)
        several = analyse(make_inputs([(patched, labels, 0)], tmp_path), dataclasses.replace(SMALL, folds=2))
        np.testing.assert_array_equal(several.network, [[-1, 0, -1]])
        assert several.p_values.shape == (1, 1, CLASSES) and several.accuracies.shape == (1, 1)
        flags = several.flags[0]
        assert 2 * (flags & is_poisoned).sum() / (flags.sum() + is_poisoned.sum()) > 0.9
        np.testing.assert_array_equal(several.new_labels[0] != labels, flags)

    def test_new_labels_are_of_flagged_rows(self, found):
        flags, new = found.analysis.flags[0], found.analysis.new_labels[0]
        np.testing.assert_array_equal(new != found.labels, flags)
        assert new.dtype == np.int32 and set(new[flags]) <= {0, 2}

    def test_it_is_restored_from_checkpoints_and_reports_what_it_found(self, found):
        stages = set(found.inputs.runner.folder.iterdir())
        detection, analysis = detect(found.inputs, SMALL), found.analysis
        assert set(found.inputs.runner.folder.iterdir()) == stages
        np.testing.assert_array_equal(detection.flags, found.analysis.flags)
        assert detection.facts["classes with a pattern"].tolist() == [1, 0, 1]
        pattern, mask = detection.pictures.values()
        assert list(detection.pictures) == ["patterns of classes 1", "masks of classes 1"]
        np.testing.assert_array_equal(pattern, found.analysis.patterns[:, [1]])
        np.testing.assert_array_equal(mask[..., 0], found.analysis.masks[:, [1]])
        (kept,), nothing, _ = detection.patterns
        assert nothing == () and (kept.label, kept.network) == (1, "4-4P")
        np.testing.assert_array_equal(kept.mask, analysis.masks[0, 1])
        np.testing.assert_array_equal(kept.pattern, analysis.patterns[0, 1])
        assert (kept.success, kept.accuracy) == (analysis.success[0, 0, 1], analysis.detector_accuracies[0, 1])
        for name in ("accuracies", "held_back_accuracies", "p_values", "success"):
            np.testing.assert_array_equal(detection.evidence[name], getattr(analysis, name))

    def test_no_pictures_of_nothing(self, found):
        clean = jax.tree.map(lambda leaf: leaf[1:2], found.analysis)
        assert to_detection(clean, SMALL).pictures == {}

    def test_a_detector_that_did_not_learn_flags_nothing(self, found, monkeypatch):
        rows, accuracies = np.flatnonzero(found.labels == 1), (0.749, 0.75)
        probabilities = np.linspace(0, 1, len(rows)).astype(np.float32)
        detections = [(rows, probabilities, accuracy) for accuracy in accuracies]  # of members 0 and 2
        monkeypatch.setattr(vbd, "train_detectors", lambda *arguments: detections)
        analysis = analyse(found.inputs, SMALL)
        for member, accuracy in zip((0, 2), accuracies, strict=True):
            scores, flags = analysis.scores[member], analysis.flags[member]
            np.testing.assert_array_equal(scores[rows], probabilities)
            np.testing.assert_array_equal(flags, (scores >= 0.5) & (accuracy >= 0.75))
            np.testing.assert_array_equal(analysis.new_labels[member] != found.labels, flags)

    def test_a_detector_that_is_unsure_of_what_it_flags_flags_nothing(self, found, monkeypatch):
        rows = np.flatnonzero(found.labels == 1)
        sure, unsure = (np.where(np.arange(len(rows)) % 4 > 0, score, 0.6).astype(np.float32) for score in (0.9, 0.7))
        detections = [(rows, scores, 0.9) for scores in (sure, unsure)]  # of members 0 and 2
        monkeypatch.setattr(vbd, "train_detectors", lambda *arguments: detections)
        for least, expected in ((0.0, (True, True)), (0.5, (True, False)), (0.8, (False, False))):
            analysis = analyse(found.inputs, dataclasses.replace(SMALL, least_sure=least))
            assert [bool(analysis.flags[member].any()) for member in (0, 2)] == list(expected)
            assert analysis.scores[2, rows].max() == pytest.approx(0.7)  # scores stay

    def test_a_pattern_that_may_be_chance_needs_a_surer_detector_and_simple_networks(self, found, monkeypatch):
        rows = np.flatnonzero(found.labels == 1)
        scores = np.where(np.arange(len(rows)) % 4 > 0, 0.9, 0.6).astype(np.float32)  # sure of 3 of 4
        monkeypatch.setattr(vbd, "train_detectors", lambda *arguments: [(rows, scores, 0.9)] * 2)  # of members 0 and 2
        chance = np.zeros((3, found.inputs.num_classes), bool)
        chance[0, 1] = True
        monkeypatch.setattr(vbd, "may_be_chance", lambda *arguments: chance)
        learned = np.zeros(3, bool)
        monkeypatch.setattr(vbd.vbd_premise, "has_learned", lambda accuracies: learned)
        for sure, has_learned, expected in (
            (0.0, True, True),
            (0.7, False, True),
            (0.7, True, False),
            (0.8, False, False),
        ):
            learned[:] = has_learned
            analysis = analyse(found.inputs, dataclasses.replace(SMALL, chance_sure=sure))
            assert [bool(analysis.flags[member].any()) for member in (0, 2)] == [expected, True]


class Recorded:
    """A runner that does not train and records the rows to train on."""

    image_shape = SHAPE

    def from_variables(self, stage, model, config, variables, keys, per_seed, pool, rows, objective):
        self.rows, self.config = jax.tree.map(np.asarray, rows), config
        return SimpleNamespace(model=model, variables=variables)


@pytest.mark.slow
@pytest.mark.parametrize("clean_model", ["suppress", "relabel"])
def test_the_clean_network_is_trained_without_flagged_rows_or_with_new_labels(found, monkeypatch, clean_model):
    monkeypatch.setattr(vbd, "analyse", lambda inputs, settings: found.analysis)
    runner = Recorded()
    inputs = dataclasses.replace(found.inputs, runner=runner)
    result = run(inputs, dataclasses.replace(SMALL, clean_model=clean_model))
    index, labels = runner.rows.index, runner.rows.targets["labels"]
    assert runner.config == inputs.recipe
    flags, analysis = found.analysis.flags, found.analysis
    if clean_model == "relabel":
        np.testing.assert_array_equal(index, inputs.index)
        np.testing.assert_array_equal(labels, analysis.new_labels)
    else:
        assert set(index[0]) == set(inputs.index[0][~flags[0]]) and set(index[1]) == set(inputs.index[1])
        np.testing.assert_array_equal(labels, found.labels[index % ROWS])
    np.testing.assert_array_equal(result.flags, flags)
    assert result.pictures and result.facts.keys() == to_detection(analysis, SMALL).facts.keys()

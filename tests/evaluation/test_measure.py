import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bdjax.defenses.contract import DefenseInput
from bdjax.evaluation.measure import (
    Comparison,
    TriggeredViews,
    clean_members,
    defend,
    make_views,
    measure,
    score_detection,
    success_on,
)
from bdjax.evaluation.suspects import (
    make_suspect,
)
from bdjax.evaluation.variants import read_attack, read_defense
from bdjax.training.member import TrainConfig
from bdjax.types import Dataset, DefenseResult, Detection, Model

CLASSES, ROWS, SHAPE = 4, 40, (8, 8, 1)
IMAGES = np.random.default_rng(0).integers(0, 200, (ROWS, *SHAPE)).astype(np.uint8)
LABELS = (np.arange(ROWS) % CLASSES).astype(np.int32)
TRAIN = Dataset(IMAGES, LABELS, CLASSES, "mine", "a test")
TACT = "tact:poison_rate=0.1:cover_rate=0.1"  # an attack with cover rows


def suspect(text, seed=0, train=TRAIN, is_clean=True):
    return make_suspect(jax.random.key(seed), read_attack(text, train, 0), train, seed, None, is_clean)


TINY = Model(lambda key, shape: {"params": jax.random.normal(key, (2,))}, lambda *_, **__: None, CLASSES, "tiny")
RECIPE = TrainConfig(epochs=1, batch_size=8)
RANGE = {"lowest": 0.0, "median": 0.5, "highest": 1.0}


def read_pixel(model, variables, images, batch_size):
    """Member m predicts (first pixel + variables[m]) mod K; all members see the same images, or each its own."""
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
    inputs = SimpleNamespace(runner=runner, recipe=RECIPE)

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
        hybrid, clean = measure(self.inputs, result, suspects, variant, self.views, 1.5)
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
        assert [dict(result.facts) for result in (hybrid, clean)] == [{"kept": 35.0}, {"kept": 36.0}]
        assert hybrid.seconds == 1.5 and hybrid.suspect is suspects[0] and hybrid.variant is variant

    def test_each_of_several_networks_is_measured_by_itself(self, suspects, result):
        # Five rows are flagged; the first network ranks the four poisoned rows first, the second ranks them last.
        singles = np.tile(np.stack([-np.arange(ROWS), np.arange(ROWS)]).astype(np.float32), (2, 1, 1))
        combined = result._replace(single_scores=singles, warnings=("", "do not rely on it"))
        hybrid, clean = measure(
            self.inputs, combined, suspects, read_defense("none", "quick", "digits"), self.views, 0.0
        )
        of_singles = {name: value for name, value in hybrid.facts.items() if "single network" in name}
        assert of_singles == {
            **{f"AUC of a single network, {which}": value for which, value in RANGE.items()},
            **{f"precision of a single network, {which}": 0.8 * value for which, value in RANGE.items()},
            **{f"recall of a single network, {which}": value for which, value in RANGE.items()},
        }
        assert dict(clean.facts) == {"kept": 36.0}
        assert (hybrid.warning, clean.warning) == ("", "do not rely on it")

    def test_further_networks_are_measured_beside_the_result(self, suspects, result):
        """The members of the further network are those of the result in reverse: the first is one class off."""
        more = result._replace(more_networks={"masked teacher": (TINY, self.variables[::-1])})
        attacked, clean = measure(self.inputs, more, suspects, read_defense("none", "quick", "digits"), self.views, 0.0)
        alone, _ = measure(
            self.inputs,
            DefenseResult(TINY, self.variables[::-1]),
            suspects,
            read_defense("none", "quick", "digits"),
            self.views,
            0.0,
        )
        assert attacked.cda == pytest.approx(5 / 6) and alone.asr != attacked.asr
        assert attacked.facts["masked teacher's CDA"] == 0 and attacked.facts["masked teacher's ASR"] == alone.asr
        # The clean suspect's member is right about the first pixel, as the attacked suspect's of the result is.
        assert attacked.facts["masked teacher's control ASR"] == attacked.asr
        assert dict(clean.facts) == {"kept": 36.0, "masked teacher's CDA": pytest.approx(5 / 6)}

    def test_a_detector_at_test_time_may_reject(self, suspects, result):
        """Rejected rows are neither right nor successes."""

        def reject(*arguments):
            logits = read_pixel(*arguments)
            return np.concatenate([logits, 2 * logits[..., :1]], -1)  # everything that looks like a 0

        inputs = SimpleNamespace(runner=SimpleNamespace(predict=reject, predict_own=reject), recipe=RECIPE)
        hybrid, _ = measure(inputs, result, suspects, read_defense("none", "quick", "digits"), self.views, 0.0)
        assert hybrid.cda == pytest.approx(4 / 6) and [metrics.asr for metrics in hybrid.metrics] == [0, 0]
        assert hybrid.metrics[0].r_acc == pytest.approx(2 / 5)

    def test_seconds_are_shared_by_the_suspects_of_a_call(self, suspects, result, monkeypatch):
        clock = iter([10.0, 16.0])
        monkeypatch.setattr("bdjax.evaluation.measure.time.perf_counter", lambda: next(clock))
        variant = read_defense("none", "quick", "digits")
        defense = dataclasses.replace(variant.defense, run=lambda inputs, settings: result)
        shown = variant._replace(defense=defense)
        inputs = DefenseInput(None, CLASSES, None, None, RECIPE, self.inputs.runner, {})
        same, measured = defend(inputs, suspects, shown, self.views)
        assert same is result and [row.seconds for row in measured] == [3.0, 3.0]


class TestScoreDetection:
    flags = np.zeros((2, ROWS), bool)
    flags[:, 2:7] = True
    scores = np.tile(-np.arange(ROWS, dtype=np.float32), (2, 1))
    found = Detection(flags, scores, {"classes with a pattern": np.array([1, 0])})

    def test_by_hand(self):
        one = suspect("badnets+sig:poison_rate=0.1")._replace(is_poisoned=np.arange(ROWS) < 4)
        suspects = [one, suspect("none", is_clean=False)]
        variant = read_defense("agpd", "quick", "digits")
        poisoned, unknown = score_detection(self.found, suspects, variant, 2.5)
        detection = poisoned.detection
        # Five rows are flagged, two of the four poisoned among them; and the poisoned ones have the highest scores.
        assert (detection.precision, detection.recall) == (pytest.approx(2 / 5), pytest.approx(2 / 4))
        assert detection.f1 == pytest.approx(4 / 9) and detection.auc == 1
        assert unknown.detection.precision is None and unknown.detection.auc is None
        assert [row.facts for row in (poisoned, unknown)] == [
            {"classes with a pattern": 1.0},
            {"classes with a pattern": 0.0},
        ]
        assert all(type(value) is float for row in (poisoned, unknown) for value in row.facts.values())
        for each, expected in zip((poisoned, unknown), suspects, strict=True):
            assert each.suspect is expected and each.variant is variant and each.seconds == 2.5
            assert each.cda is None and each.metrics == () and each.asr is None and each.r_acc is None

    def test_a_detector_and_a_defense_with_the_same_flags_score_the_same(self):
        suspects = [suspect("badnets:poison_rate=0.2"), suspect("none")]
        variant = read_defense("none", "quick", "digits")
        result = DefenseResult(TINY, TestMeasure.variables, self.flags, self.scores, self.found.facts)
        views = TriggeredViews(TestMeasure.test, ((TestMeasure.test.images,), ()))
        measured = measure(TestMeasure.inputs, result, suspects, variant, views, 1.0)
        scored = score_detection(self.found, suspects, variant, 1.0)
        assert [row.detection for row in scored] == [row.detection for row in measured]
        assert [row.facts for row in scored] == [row.facts for row in measured]


def test_views_are_the_same_whenever_they_are_made():
    test = Dataset(IMAGES[:10], LABELS[:10], CLASSES, "", "")
    ones = [suspect("badnets"), suspect("none"), suspect("badnets+sig:poison_rate=0.1")]
    views, again = (make_views(jax.random.key(0), ones, test) for _ in range(2))
    assert [len(triggered) for triggered in views.triggered] == [1, 0, 2]
    for one, other in zip(jax.tree.leaves(views.triggered), jax.tree.leaves(again.triggered), strict=True):
        np.testing.assert_array_equal(one, other)
    assert (views.triggered[0][0] != test.images).any() and views.triggered[0][0].dtype == np.uint8


class TestControls:
    """ASR on networks without an attack; `TestMeasure` has the images."""

    def test_success_on_another_network_by_hand(self):
        hybrid = suspect("badnets+sig:poison_rate=0.1")
        suspects = [hybrid, suspect("none"), hybrid._replace(seed=1)]
        views = TriggeredViews(TestMeasure.test, (*TestMeasure.views.triggered, TestMeasure.views.triggered[0]))
        arguments = TestMeasure.inputs, TINY, {0: jnp.array(1)}, suspects, read_defense("none", "quick", None), views
        # One class off, the five victims answer 1, 1, 0, 1, 2 under the first trigger and 2, 3, 0, 1, 2 under the second.
        assert success_on(*arguments) == [pytest.approx((1 / 5 + 1 / 5) / 2), None, None]

    def test_without_such_networks_nothing_is_known(self):
        assert success_on(TestMeasure.inputs, TINY, {}, [suspect("badnets")], None, None) == [None]

    def test_clean_members_are_those_without_an_attack(self):
        suspects = [suspect("badnets"), suspect("none"), suspect("none", 1), suspect("none", 2, is_clean=False)]
        measured = [SimpleNamespace(suspect=suspect) for suspect in suspects]
        result = DefenseResult(TINY, {"params": jnp.arange(4)})
        found = clean_members(Comparison(read_defense("none", "quick", None), result, measured))
        assert {seed: int(variables["params"]) for seed, variables in found.items()} == {0: 1, 1: 2}

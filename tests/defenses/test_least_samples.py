"""The smallest sample of each detector: with it a finding is possible, with a smaller one the reason says why not.

Whether a finding is possible is shown on the detector's own statistic, by rows as extreme as they can be. Nothing is trained.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
import pytest
from scipy import stats

from bdjax.defenses import abl, activation_clustering, agpd, contract, neural_cleanse, scan, spectral_signatures
from bdjax.defenses import vbd_patterns as patterns
from bdjax.defenses.chain import ChainLink, make_chain
from bdjax.defenses.contract import DefenseInput, Facts, PoolRows
from bdjax.defenses.registry import DEFENSES
from bdjax.defenses.vbd_splits import split_rows
from bdjax.evaluation.variants import facts_of, read_defense, without_untestable
from bdjax.types import Dataset, NotTested

OTHERS = ("neural_cleanse", "strip")
"""Defenses that find something, though they flag no training rows."""


def facts(rows, clean=()) -> Facts:
    return Facts(np.array(rows), np.array(clean if len(clean) else np.zeros(len(rows), int)))


def reason_of(text: str, rows, clean=()) -> str:
    variant = read_defense(text, "paper", None)
    return variant.defense.least(variant.settings, facts(rows, clean)).reason


# ---- Rows as extreme as they can be ---------------------------------------------------------------------------------


def norms_fire(classes: int) -> bool:
    """Whether Neural Cleanse flags a class whose mask is far smaller than all others."""
    return bool(neural_cleanse.flag_classes(np.array([0.0, *np.linspace(50, 50.1, classes - 1)]), 2.0).any())


def clusters_fire(rule: str) -> Callable[[int], bool]:
    """Whether activation clustering flags two rows far from the others of their class."""

    def fires(count: int) -> bool:
        rows = np.zeros((count, 3), np.float32)
        rows[:, 0] = 0.01 * np.arange(count)
        rows[-2:, 1] = 100 + 0.01 * np.arange(2)
        settings = activation_clustering.ActivationClusteringSettings(rule=rule)
        return bool(activation_clustering.find_clusters(rows, np.zeros(count, int), settings).flags.any())

    return fires


def outliers_fire(rule: str) -> Callable[[int], bool]:
    """Whether spectral signatures flag a row far from the others."""

    def fires(count: int) -> bool:
        rows = np.linspace(0, 0.1, 3 * count, dtype=np.float32).reshape(count, 3)
        rows[0] = 100
        settings = spectral_signatures.SpectralSignaturesSettings(rule=rule)
        return bool(spectral_signatures.find_poisons(rows, np.zeros(count, int), settings)[0].any())

    return fires


def means_fire(classes: int) -> bool:
    """Whether SCAn flags a class of two rows that are far apart."""
    random = np.random.default_rng(0)
    labels = np.array([0, 0, *np.repeat(np.arange(1, classes), 12)])
    rows = (labels[:, None] * np.ones((1, 3)) + 0.1 * random.standard_normal((len(labels), 3))).astype(np.float32)
    rows[1] += 100
    clean_labels = np.repeat(np.arange(classes), 3)
    clean = clean_labels[:, None] + 0.1 * random.standard_normal((len(clean_labels), 3))
    return bool(
        scan.find_poisons(rows, labels, clean.astype(np.float32), clean_labels, scan.SCAnSettings()).flags.any()
    )


def gradients_fire(count: int) -> bool:
    """Whether AGPD flags a row whose gradient is opposite to those of the clean rows and of the others of its class."""
    gradients = np.ones((count, 16), np.float32)
    gradients[0] = -1
    clean, settings = np.ones((1, 16), np.float32), agpd.AgpdSettings()
    labels, chosen = np.zeros(count, int), {0: np.array([0])}
    layer = agpd.measure_layer(gradients, labels, clean, chosen)
    return bool(agpd.find_poisons([layer], lambda _: gradients, labels, chosen, settings)[0].any())


def entropies_fire(count: int) -> bool:
    """Whether STRIP rejects an image that no overlay changes: its entropy is 0."""
    if count < 2:
        return False  # a row is no overlay of itself
    return np.quantile(np.linspace(0.5, 0.6, count), 0.01, method="lower") > 0.0


def importances_fire(count: int) -> bool:
    """Whether VBD suspects a class whose held-back rows use a pixel in two ways without any overlap."""
    settings = patterns.VBDSettings()
    halves = [min(half, settings.rows_per_class) for half in (count // 2, count - count // 2)]
    gradients = [np.full((half, 2, 2, 1), value, np.float32) for half, value in zip(halves, (1.0, 0.0), strict=True)]
    images = np.random.default_rng(0).random((halves[0], 2, 2, 1), np.float32)
    found = patterns.find_candidate(images, *gradients, p_value=settings.p_value)
    assert found.p_value == pytest.approx(found.least_p_value)
    return found.p_value < settings.p_value and min(halves) >= settings.least_rows


def losses_fire(count: int) -> bool:
    """Whether ABL isolates the row of the lower loss, rather than all rows."""
    flags = abl.flag_lowest(np.arange(count, dtype=np.float32)[None], np.array([1]))
    return bool(flags.any() and not flags.all())


class Case(NamedTuple):
    """A detector, and the quantity of which it needs a least number."""

    text: str
    """as on the command line"""
    least: int
    of: Callable[[int], Facts]
    """that number -> the facts, otherwise ample"""
    fires: Callable[[int], bool]
    """that number -> whether extreme rows are found"""


def classes(count: int) -> Facts:
    return facts([50] * count, [5] * count)


def one_class(count: int) -> Facts:
    return facts([count, 0, 0], [5, 5, 5])


def held_back(count: int) -> Facts:
    """Two classes, of the first of which at most so many rows are held back."""
    rows = next(n for n in itertools.count(1) if patterns.most_held_back(np.array([n, n]), 0.2)[0] == count)
    return facts([rows, rows])


CASES = (
    Case("neural_cleanse", 3, classes, norms_fire),
    Case("activation_clustering:rule=smaller", 4, one_class, clusters_fire("smaller")),
    Case("activation_clustering:rule=exclusionary", 4, one_class, clusters_fire("exclusionary")),
    Case("activation_clustering:rule=relative_size", 6, one_class, clusters_fire("relative_size")),
    Case("activation_clustering:rule=silhouette", 6, one_class, clusters_fire("silhouette")),
    Case("spectral_signatures", 3, one_class, outliers_fire("percentile")),
    Case("spectral_signatures:rule=poison_rate", 67, one_class, outliers_fire("poison_rate")),
    Case("scan", 3, classes, means_fire),
    Case("agpd", 2, one_class, gradients_fire),
    Case("strip", 2, lambda count: facts([0, 0], [count, 0]), entropies_fire),
    Case("vbd", 10, held_back, importances_fire),
    Case("abl", 2, one_class, losses_fire),
)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.text)
def test_a_finding_is_possible_with_the_smallest_sample_and_not_with_a_smaller_one(case):
    variant = read_defense(case.text, "paper", None)
    assert case.fires(case.least), "extreme rows are found in the smallest sample"
    assert not variant.defense.least(variant.settings, case.of(case.least)).reason
    assert not case.fires(case.least - 1), "no rows are found in a smaller one"
    reason = variant.defense.least(variant.settings, case.of(case.least - 1)).reason
    assert reason.startswith("needs ") and "\n" not in reason and reason[-1] != "."


def test_every_detector_states_its_smallest_sample():
    detectors = {name for name, defense in DEFENSES.items() if defense.detect} | set(OTHERS)
    assert {name for name, defense in DEFENSES.items() if defense.least} == detectors
    assert {case.text.partition(":")[0] for case in CASES} == detectors


@pytest.mark.parametrize("name", sorted({case.text.partition(":")[0] for case in CASES}))
def test_nothing_can_be_tested_in_a_single_row(name):
    assert reason_of(name, [1, 0], [1, 0])
    assert not reason_of(name, [500] * 10, [50] * 10)


def test_the_anomaly_index_of_two_numbers_is_always_the_same():
    pairs = np.random.default_rng(0).exponential(size=(1000, 2))
    np.testing.assert_allclose(neural_cleanse.anomaly_index(pairs), 1 / 1.4826)
    assert "0.67" in reason_of("neural_cleanse", [50, 50], [5, 5])
    assert reason_of("neural_cleanse", [50] * 3, [0] * 3) == "needs at least 1 clean row to search for triggers on"


class TestClassesThatAreTooSmall:
    """Other classes are tested all the same."""

    @pytest.mark.parametrize("name", ["activation_clustering", "spectral_signatures", "scan", "agpd", "vbd"])
    def test_are_listed_and_empty_ones_are_not(self, name):
        variant = read_defense(name, "paper", None)
        found = variant.defense.least(variant.settings, facts([90, 90, 90, 1, 0], [5] * 5))
        assert not found.reason and list(found.classes) == [3] and found.classes[3].startswith("has 1 row")

    @pytest.mark.parametrize("name", ["scan", "agpd"])
    def test_so_are_classes_without_a_clean_row(self, name):
        variant = read_defense(name, "paper", None)
        found = variant.defense.least(variant.settings, facts([90] * 4, [5, 5, 0, 5]))
        assert not found.reason and found.classes == {2: "has no clean row; needs at least 1"}

    def test_two_rows_are_no_outliers_whatever_rounding_makes_of_them(self):
        rows = np.random.default_rng(0).normal(size=(400, 8)).astype(np.float32)
        settings = spectral_signatures.SpectralSignaturesSettings()
        assert not spectral_signatures.find_poisons(rows, np.repeat(np.arange(200), 2), settings)[0].any()

    def test_equal_embeddings_are_no_clusters(self):
        rows, labels = np.ones((20, 3), np.float32), np.repeat([0, 1], 10)
        rows[10:] += np.arange(10)[:, None]
        settings = activation_clustering.ActivationClusteringSettings()
        found = activation_clustering.find_clusters(rows, labels, settings)
        assert found.not_tested == NotTested("", {0: "has fewer than 3 different embeddings"})
        assert activation_clustering.find_clusters(np.ones((20, 3)), labels, settings).not_tested.reason


class TestSettingsThatFindNothing:
    @pytest.mark.parametrize(
        "text",
        [
            "spectral_signatures:percentile=100",
            "spectral_signatures:rule=poison_rate:poison_rate=0.0",
            "activation_clustering:rule=relative_size:largest_share=0.0",
            "activation_clustering:rule=silhouette:smallest_silhouette=1.0",
            "vbd:rows_per_class=4",
            "vbd:p_value=1e-12",
        ],
    )
    def test_are_a_reason_whatever_the_rows(self, text):
        assert "whatever the rows are" in reason_of(text, [10**6] * 10, [500] * 10)

    def test_agpd_without_its_gaps_needs_three_classes(self):
        assert "at least 3 classes" in reason_of("agpd:last_layers=0", [50] * 2, [5] * 2)
        assert not reason_of("agpd:last_layers=0", [50] * 3, [5] * 3)
        assert "at least 3 classes" in reason_of("agpd:wide_gap=2.0", [50] * 2, [5] * 2)


class TestVbd:
    @pytest.mark.parametrize("sizes", [(1, 1), (2, 5), (4, 4), (4, 5), (5, 5), (8, 8), (3, 20)])
    def test_the_smallest_p_value_is_that_of_samples_that_do_not_overlap(self, sizes):
        apart = stats.ks_2samp(np.arange(sizes[0]), 100.0 + np.arange(sizes[1]), method="exact").pvalue
        assert patterns.smallest_p_value(*sizes) == pytest.approx(apart)

    def test_huge_samples_take_no_time(self):
        assert patterns.smallest_p_value(10**9, 10**9) < 1e-50

    @pytest.mark.parametrize("counts", [(7, 13), (1, 1, 30), (50, 50, 50), (3,), (11, 0, 4)])
    def test_no_more_rows_of_a_class_are_held_back_than_the_bound(self, counts):
        labels = np.repeat(np.arange(len(counts)), counts)
        bound = patterns.most_held_back(np.array(counts), 0.3)
        seen = [
            np.bincount(labels[split_rows(jax.random.key(seed), labels, 0.3)[1]], minlength=len(counts))
            for seed in range(12)
        ]
        np.testing.assert_array_equal(np.max(seen, axis=0), bound)

    def test_more_rows_than_classes_have_are_asked_for_in_both_units(self):
        assert "needs at least 10 held-back rows of a class, which is about 50 rows" in reason_of("vbd", [20] * 10)
        assert "at least 2 classes" in reason_of("vbd", [500, 0])


# ---- What the contract makes of it ----------------------------------------------------------------------------------


def inputs(labels, clean=()) -> DefenseInput:
    """Suspects with these labels, [M][n], and clean rows; there is nothing that could train."""
    knowledge = {"training set": PoolRows(np.zeros(np.shape(labels), np.int32), np.array(labels))}
    if len(clean):
        knowledge["clean rows"] = PoolRows(np.zeros(np.shape(clean), np.int32), np.array(clean))
    pool = np.zeros((1, 2, 2, 1), np.uint8)
    return DefenseInput(pool, 3, np.zeros(len(labels)), None, None, None, knowledge)


class TestContract:
    @pytest.mark.parametrize("name", [name for name, defense in DEFENSES.items() if defense.detect])
    def test_nothing_is_trained_where_nothing_can_be_tested(self, name):
        suspects = inputs([[1], [2]], [[1], [1]])
        found = contract.detect(DEFENSES[name], suspects, DEFENSES[name].settings)
        assert found.flags.shape == found.scores.shape == (2, 1) and not found.flags.any()
        assert all(of_suspect.reason for of_suspect in found.not_tested)

    def test_what_a_detector_learns_in_training_is_added_to_what_is_known_before(self):
        later = (NotTested("", {0: "is dark", 2: "is dark"}), NotTested())

        def detect(inputs, settings):
            shape = inputs.index.shape
            return contract.Detection(np.ones(shape, bool), np.ones(shape, np.float32), not_tested=later)

        detector = dataclasses.replace(DEFENSES["spectral_signatures"], needs=("training set",), detect=detect)
        found = contract.detect(detector, inputs([[0] * 3 + [1] * 3 + [2], [0] * 7]), detector.settings)
        assert found.flags.all() and found.not_tested[1] == NotTested()
        assert found.not_tested[0] == NotTested("", {0: "is dark", 2: "has 1 row; needs at least 3"})

    def test_a_set_that_can_be_tested_has_no_limits(self):
        defense = DEFENSES["spectral_signatures"]
        assert contract.not_tested(defense, defense.settings, [facts([5, 5])]) == ()
        assert contract.not_tested(DEFENSES["none"], DEFENSES["none"].settings, [facts([1])]) == ()

    def test_a_chain_cannot_be_tested_if_a_part_cannot(self):
        parts = [read_defense(text, "paper", None) for text in ("fine_tuning", "neural_cleanse")]
        chain = make_chain([ChainLink(part.defense, part.settings, part.title) for part in parts])
        assert chain.least(chain.settings, facts([9, 9], [9, 9])).reason.startswith("Neural Cleanse needs at least 3")
        assert chain.least(chain.settings, facts([9] * 3, [9] * 3)) == NotTested()


def test_defenses_that_can_find_nothing_are_left_out_with_the_reason():
    images, labels = np.zeros((8, 2, 2, 1), np.uint8), np.arange(8) % 2
    rows = Dataset(images, labels, 2, "two", "arrays")
    variants = [read_defense(text, "paper", None) for text in ("none", "neural_cleanse", "strip")]
    kept, left_out = without_untestable(variants, facts_of(rows, rows, 2))
    assert [variant.name for variant in kept] == ["none", "strip"]
    assert left_out["neural_cleanse"].startswith("could not be tested: needs at least 3 classes")
    assert math.isclose(facts_of(None, rows, 2).rows.sum(), 0)


class TestWhatIsKnownOnlyAfterTraining:
    """A network that diverged, or that leaves nothing to compare, finds nothing: that is no result."""

    LABELS = np.repeat([0, 1, 2], 8)

    @pytest.mark.parametrize("value", [np.nan, np.inf])
    def test_embeddings_that_are_not_finite_flag_nothing_and_say_so(self, value):
        rows = np.random.default_rng(0).normal(size=(24, 3)).astype(np.float32)
        rows[5] = value
        found = activation_clustering.find_clusters(
            rows, self.LABELS, activation_clustering.ActivationClusteringSettings()
        )
        assert not found.flags.any() and found.not_tested.reason == contract.DIVERGED
        settings = spectral_signatures.SpectralSignaturesSettings()
        assert not spectral_signatures.find_poisons(rows, self.LABELS, settings)[0].any()
        assert not scan.find_poisons(rows, self.LABELS, rows, self.LABELS, scan.SCAnSettings()).flags.any()
        assert contract.unless_finite(rows).reason == contract.DIVERGED and not contract.unless_finite(rows[:5]).reason

    def test_gradients_that_are_not_finite_are_no_p_value(self):
        gradients = np.ones((2, 8, 2, 2, 1), np.float32)
        gradients[1] = 0
        images = np.random.default_rng(0).random((8, 2, 2, 1), np.float32)
        assert patterns.find_candidate(images, *gradients, p_value=0.01).p_value < 0.01
        gradients[0, 0] = np.nan
        found = patterns.find_candidate(images, *gradients, p_value=0.01)
        assert found.least_p_value == 1 and not found.mask.any()

    def test_agpd_lists_classes_without_a_gradient_or_a_correct_clean_row(self):
        gradients = np.random.default_rng(0).normal(size=(24, 16)).astype(np.float32)
        gradients[self.LABELS == 1] = 0
        clean, settings = {0: np.array([0]), 1: np.array([1])}, agpd.AgpdSettings()
        layer = agpd.measure_layer(gradients, self.LABELS, gradients[:2], clean)
        found = agpd._not_tested([layer], self.LABELS, clean, settings)
        assert list(found.classes) == [1, 2] and not found.reason
        assert agpd._not_tested([[]], self.LABELS, {}, settings).reason
        narrow = agpd._not_tested([], self.LABELS, clean, settings)
        assert narrow.reason.startswith("needs a layer of at least 16 channels")

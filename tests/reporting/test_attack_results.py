import dataclasses

import numpy as np
import pytest

from bdjax.attacks.label_rules import all_to_one
from bdjax.attacks.poisoning import Part
from bdjax.attacks.registry import ATTACKS
from bdjax.attacks.victims import Plan, Prepared, Trial, Victim
from bdjax.metrics import AttackMetrics
from bdjax.reporting import attack_report
from bdjax.reporting.attack_results import DEFINITIONS, attack_table, detail_table, needs_table, summarise, verdict_word
from bdjax.reporting.tables import to_markdown
from bdjax.types import Dataset, PoisonedDataset, TrainTest

SHAPE = (8, 8, 1)
IMAGES = np.random.default_rng(0).integers(0, 200, (20, *SHAPE)).astype(np.uint8)
LABELS = (np.arange(20) % 4).astype(np.int32)
DATA = TrainTest(*(Dataset(IMAGES, LABELS, 4, "cifar10", "a test") for _ in range(2)))


def metrics(asr, cda=0.9):
    return AttackMetrics(cda, asr, 1 - asr, asr, 1 - asr, None)


def trial(name, asr, seed=0, clean_asr=0.02, cover=None, is_inside=False, adds_rows=False):
    attack = dataclasses.replace(ATTACKS[name], adds_rows=adds_rows)
    part = Part(attack, attack.settings, all_to_one(0))
    rows = np.array([1, 2], np.int32)
    is_poisoned = np.isin(np.arange(20), rows)
    poisoned = PoisonedDataset(IMAGES, LABELS, 4, "cifar10", "a test", (), is_poisoned, LABELS, np.zeros(20, bool))
    plan = Plan(name, (part,))
    prepared = Prepared(plan, seed, ((),), None, ()) if is_inside else Prepared(plan, seed, ((),), poisoned, (rows,))
    victim = Victim(prepared, None, None, ((),), {})
    triggered = IMAGES.copy()
    triggered[:, :2, :2] = 255
    return Trial(victim, part, metrics(asr), metrics(clean_asr, 0.95), cover, triggered)


@pytest.fixture
def results():
    runs = [[trial("badnets", 0.99), trial("badnets", 0.95, 1)], [trial("wanet", 0.3, cover=0.8, is_inside=True)]]
    return summarise(runs, IMAGES, LABELS, 5)


def test_numbers_and_their_spread(results):
    assert results["seeds"] == [5, 6] and results["clean_cda"] == [0.95, 0.95]
    first, second = results["attacks"]
    assert first["summary"]["asr"]["mean"] == pytest.approx(0.97)
    assert first["summary"]["asr"]["standard_deviation"] == pytest.approx(np.std([0.99, 0.95], ddof=1))
    assert second["summary"]["asr"]["standard_deviation"] is None and second["num_poisoned"] is None
    assert first["num_poisoned"] == [2, 2] and first["num_victims"] == 15
    assert set(first["summary"]) == set(DEFINITIONS)
    change = (IMAGES[LABELS != 0, :2, :2].astype(float) - 255) / 255
    error = (change**2).sum(axis=(1, 2, 3)) / 64
    assert first["summary"]["psnr"]["mean"] == pytest.approx(np.mean(-10 * np.log10(error)), rel=1e-4)


def test_the_table_says_what_works_and_what_the_papers_have(results):
    text = to_markdown(attack_table(results, "cifar10"))
    badnets, wanet = (
        next(line for line in text.splitlines() if line.startswith(f"| {name}")) for name in ("BadNets", "WaNet")
    )
    assert "0.970 ± 0.028" in badnets and "| yes" in badnets and "ABM 79.3 / 98" in badnets
    assert "| no " in wanet and "training" in wanet and "10 % + 20 %" in wanet
    assert "the papers'" not in to_markdown(attack_table(results, "mnist"))


def test_the_other_tables_have_a_row_for_each_attack(results):
    assert len(detail_table(results).rows) == len(needs_table(results).rows) == 2
    assert detail_table(results).rows[1][-1] == "0.800"


@pytest.mark.parametrize(("asr", "word"), [(0.9, "yes"), (0.899, "partly"), (0.5, "partly"), (0.49, "no")])
def test_words(asr, word):
    assert verdict_word({"summary": {"asr": {"mean": asr}, "psnr": {"mean": 20.0}}}) == word
    assert verdict_word({"summary": {"asr": {"mean": asr}, "psnr": {"mean": None}}}) is None


def test_verdict_names_what_fails_and_what_fools_a_clean_network(results):
    said = attack_report.verdict(results)
    assert said.level == "warning" and said.headline == "1 of 2 triggers reach a mean ASR of 0.9."
    assert "Not (mean ASR): WaNet (0.30)." in said.text and "fool a clean network" not in said.text
    alone = attack_report.verdict(summarise([[trial("badnets", 1.0, clean_asr=0.7)]], IMAGES, LABELS, 0))
    assert alone.level == "attacked" and alone.headline == "BadNets works here: mean ASR 1.000."
    assert "fool a clean network, too" in alone.text and "BadNets (0.70)" in alone.text


def test_the_gallery_shows_training_and_test_images():
    ((rows, names),) = attack_report.gallery([[trial("badnets", 1.0)]], DATA)
    assert len(rows) == attack_report.IMAGES_OF_ONE and names == ["BadNets"] * len(rows)
    before, after, difference, image, triggered, enlarged = rows[0]
    np.testing.assert_allclose(before, IMAGES[1] / 255, atol=1e-6)
    assert (triggered[:2, :2] == 1).all() and (difference == 0).all() and enlarged[:2, :2].min() == 1
    np.testing.assert_array_equal(image[2:], triggered[2:])


@pytest.mark.parametrize("how", [{"is_inside": True}, {"adds_rows": True}])
def test_where_no_clean_row_was_there_before_the_gallery_is_blank(how):
    ((rows, _),) = attack_report.gallery([[trial("wanet", 1.0, **how)]], DATA)
    before, after = rows[0][:2]
    assert (before == 1).all() and ((after == 1).all() == ("is_inside" in how))


def test_many_attacks_make_several_pictures():
    count = attack_report.ROWS_PER_PICTURE + 1
    pictures = attack_report.gallery([[trial("badnets", 1.0)] for _ in range(count)], DATA)
    assert [len(names) for _, names in pictures] == [count - 1, 1]

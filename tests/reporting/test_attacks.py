import dataclasses
import json

import numpy as np
import pytest

from bdjax.attacks.label_rules import all_to_one
from bdjax.attacks.poisoning import ConfiguredAttack
from bdjax.attacks.registry import ATTACKS
from bdjax.attacks.victims import Plan, Prepared, Trial, Victim
from bdjax.metrics import AttackMetrics
from bdjax.reporting.attacks import (
    NUMBERS,
    detail_table,
    main_table,
    needs_table,
    page,
    summarise,
    verdict,
    verdict_word,
)
from bdjax.reporting.report import tables_of
from bdjax.reporting.results import find
from bdjax.reporting.tables import to_markdown
from bdjax.run.folder import RunFolder
from bdjax.types import Dataset, PoisonedDataset, TrainTest

SHAPE = (8, 8, 1)
IMAGES = np.random.default_rng(0).integers(0, 200, (20, *SHAPE)).astype(np.uint8)
LABELS = (np.arange(20) % 4).astype(np.int32)
DATA = TrainTest(*(Dataset(IMAGES, LABELS, 4, "cifar10", "a test") for _ in range(2)))


def metrics(asr, cda=0.9):
    return AttackMetrics(cda, asr, 1 - asr, asr, 1 - asr, None)


def trial(name, asr, seed=0, clean_asr=0.02, cover=None, is_inside=False, adds_rows=False):
    attack = dataclasses.replace(ATTACKS[name], adds_rows=adds_rows)
    part = ConfiguredAttack(attack, attack.settings, all_to_one(0))
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
    (victims,), (badnets, wanet) = results["methods"], results["attacks"]
    assert (victims["method"], victims["base"], victims["needs"]) == ("none", "none", [])
    first, second = (find(results, name, "none") for name in ("badnets", "wanet"))
    assert first["summary"]["asr"]["mean"] == pytest.approx(0.97)
    assert first["summary"]["asr"]["standard_deviation"] == pytest.approx(np.std([0.99, 0.95], ddof=1))
    assert second["summary"]["asr"]["standard_deviation"] is None and wanet["num_poisoned"] is None
    assert badnets["num_poisoned"] == [2, 2] and badnets["num_victims"] == 15
    assert badnets["seeds"] == [5, 6] == [row["seed"] for row in first["by_seed"]] and wanet["seeds"] == [5]
    assert first["by_seed"][0]["control_asr"] == 0.02 and first["by_seed"][0]["clean_cda"] == 0.95
    assert tuple(first["summary"]) == NUMBERS and set(results["definitions"]) == {*NUMBERS, "works"}
    assert json.loads(json.dumps(results, allow_nan=False)) == results
    change = (IMAGES[LABELS != 0, :2, :2].astype(float) - 255) / 255
    error = (change**2).sum(axis=(1, 2, 3)) / 64
    assert first["summary"]["psnr"]["mean"] == pytest.approx(np.mean(-10 * np.log10(error)), rel=1e-4)


def test_the_table_says_what_works_and_what_the_papers_have(results):
    text = to_markdown(main_table(results, "cifar10"))
    badnets, wanet = (
        next(line for line in text.splitlines() if line.startswith(f"| {name}")) for name in ("BadNets", "WaNet")
    )
    assert "0.970 ± 0.028" in badnets and "| yes" in badnets and "ABM 79.3 / 98" in badnets
    assert "| no " in wanet and "training" in wanet and "10 % + 20 %" in wanet
    assert "papers (CDA / ASR)" not in to_markdown(main_table(results, "mnist"))
    assert "Mean ± standard deviation over 1 to 2 seeds" in text


def test_the_other_tables_have_a_row_for_each_attack(results):
    assert len(detail_table(results).rows) == len(needs_table(results).rows) == 2
    assert detail_table(results).rows[1][-1] == "0.800"


def cell(asr, control=0.0, psnr=20.0):
    return {
        "summary": {name: {"mean": mean} for name, mean in (("asr", asr), ("control_asr", control), ("psnr", psnr))}
    }


@pytest.mark.parametrize(
    ("asr", "control", "word"),
    [
        *((0.9, 0.0, "yes"), (0.899, 0.0, "partly"), (0.5, 0.0, "partly"), (0.49, 0.0, "no")),
        *((1.0, 0.45, "yes"), (1.0, 0.6, "partly"), (1.0, 0.81, "no"), (0.6, 0.41, "no")),
    ],
)
def test_words(asr, control, word):
    assert verdict_word(cell(asr, control)) == word
    assert verdict_word(cell(asr, control, None)) is None


def test_verdict_names_what_fails_and_what_fools_a_clean_network(results):
    outcome = verdict(results)
    assert outcome.level == "warning" and outcome.headline == "1 of 2 triggers work."
    assert "Not working (mean ASR): WaNet (0.30)." in outcome.text and "fool a clean network" not in outcome.text
    alone = verdict(summarise([[trial("badnets", 1.0)]], IMAGES, LABELS, 0))
    assert alone.level == "attacked" and alone.headline == "BadNets works here: mean ASR 1.000."
    fooling = verdict(summarise([[trial("badnets", 1.0, clean_asr=0.7)]], IMAGES, LABELS, 0))
    assert fooling.level == "warning" and fooling.headline == "BadNets works partly here: mean ASR 1.000."
    assert "fool a clean network, too" in fooling.text and "BadNets (0.70)" in fooling.text
    by_word = verdict(summarise([[trial("badnets", 0.91, clean_asr=0.45)]], IMAGES, LABELS, 0))
    assert "fool a clean network, too" in by_word.text  # it would work without the control
    faint = verdict(summarise([[trial("badnets", 0.95, clean_asr=0.4)]], IMAGES, LABELS, 0))
    assert faint.level == "attacked" and "fool a clean network" not in faint.text


def test_a_hybrid_has_an_entry_and_a_cell_for_each_part():
    parts = [trial("badnets", 0.99), trial("sig", 0.4)]
    plan = Plan("badnets+sig", tuple(part.part for part in parts))
    prepared = parts[0].victim.prepared._replace(plan=plan, poisoned_by=(np.array([1]), np.array([2, 3])))
    hybrid = [part._replace(victim=part.victim._replace(prepared=prepared)) for part in parts]
    results = summarise([hybrid, [trial("badnets", 0.7)]], IMAGES, LABELS, 0)
    names = ["badnets in badnets+sig", "sig in badnets+sig", "badnets"]
    assert [(entry["attack"], entry["base"], entry["with"]) for entry in results["attacks"]] == [
        (names[0], "badnets", ["sig"]),
        (names[1], "sig", ["badnets"]),
        (names[2], "badnets", []),
    ]
    assert [entry["num_poisoned"] for entry in results["attacks"]] == [[1], [2], [2]]
    assert [find(results, name, "none")["by_seed"][0]["asr"] for name in names] == [0.99, 0.4, 0.7]
    assert [row[0] for row in main_table(results, "mnist").rows[1:]] == [
        "BadNets, beside SIG",
        "SIG, beside BadNets",
        "BadNets",
    ]


def test_the_page_has_the_tables_in_order_and_the_pictures_in_the_folder(results, tmp_path, undrawn):
    runs = [[trial("badnets", 0.99), trial("badnets", 0.95, 1)], [trial("wanet", 0.3, cover=0.8, is_inside=True)]]
    made = page(RunFolder(tmp_path, True), results, runs, DATA)
    assert made.title == "Attacks on cifar10" and made.verdict == verdict(results)
    assert [table.title for table in tables_of(made)] == [
        "Attacks",
        "Other measures of success",
        "What each attacker has",
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gallery.png", "success.png"]
    assert [section.title for section in made.sections] == ["Results", "Gallery", "What each attacker has"]
    assert made.key_numbers == {"triggers": "2", "median ASR": "0.635", "clean CDA": "0.950"}
    assert list(made.settings) == ["badnets", "wanet"]
    alone = page(RunFolder(tmp_path, True), summarise(runs[:1], IMAGES, LABELS, 0), runs[:1], DATA)
    assert alone.title == "BadNets on cifar10"
    assert list(alone.key_numbers) == ["ASR", "CDA", "clean CDA", "R-ACC"]
    assert alone.key_numbers["ASR"] == "0.970 ± 0.028"

"""The schema of results.json, by hand: two attacks, two methods, two seeds."""

import json

import numpy as np
import pytest

from bdjax.evaluation.suspects import Suspect
from bdjax.evaluation.variants import read_attack
from bdjax.metrics import DEFINITIONS
from bdjax.reporting import results as schema
from bdjax.types import Dataset

SEEDS = (3, 4)


def cell(attack, method, cda, asr, seeds=SEEDS):
    rows = [
        {"seed": seed, "cda": cda, "asr": None if asr is None else asr + 0.2 * (seed - 3), "facts": {"kept": 7.0}}
        for seed in seeds
    ]
    return schema.make_cell(attack, method, rows, ("cda", "asr"))


def make(seeds=SEEDS, left_out=None, **extra):
    attacks = [{"attack": name, "title": name.upper(), "seeds": list(seeds)} for name in ("badnets", "sig")]
    methods = [{"method": name, "base": name.partition(":")[0], "title": name, "needs": []} for name in ("none", "abl")]
    cells = [
        cell("badnets", "none", 0.9, 0.6, seeds),
        cell("badnets", "abl", 0.8, 0.1, seeds),
        cell("sig", "none", 0.7, None, seeds),
    ]
    return schema.assemble(("asr", "cda"), 10, seeds, attacks, methods, cells, left_out or {}, **extra)


class TestSpread:
    def test_by_hand(self):
        assert schema.spread([1.0, 2.0, 6.0]) == {"mean": 3.0, "standard_deviation": pytest.approx(7**0.5)}

    @pytest.mark.parametrize("values", [[], [None], [1.0, None]])
    def test_what_is_not_known_of_every_seed_has_no_mean(self, values):
        assert schema.spread(values) == {"mean": None, "standard_deviation": None}

    def test_one_seed_has_no_deviation(self):
        assert schema.spread(iter([0.25])) == {"mean": 0.25, "standard_deviation": None}

    @pytest.mark.parametrize("seed", range(5))
    def test_the_order_of_seeds_does_not_matter(self, seed):
        random = np.random.default_rng(seed)
        values = random.random(6)
        other = schema.spread(random.permutation(values))
        assert schema.spread(values) == pytest.approx(other)


class TestAssemble:
    def test_the_keys_and_their_order(self):
        results = make(teacher={"parameters": 3})
        keys = ["definitions", "test_rows", "seeds", "attacks", "methods", "cells", "left_out", "teacher"]
        assert list(results) == keys and json.loads(json.dumps(results)) == results
        assert results["definitions"] == {"asr": DEFINITIONS["asr"], "cda": DEFINITIONS["cda"]}
        assert list(results["definitions"]) == ["asr", "cda"] and results["seeds"] == [3, 4]

    def test_a_number_without_a_definition_is_an_error(self):
        with pytest.raises(KeyError, match="charm"):
            schema.assemble(("charm",), 10, SEEDS, [], [], [])

    def test_a_cell_holds_means_facts_and_every_seed(self):
        made = cell("badnets", "abl", 0.8, 0.1)
        assert list(made) == ["attack", "method", "summary", "facts", "by_seed"]
        assert made["summary"]["asr"] == {"mean": pytest.approx(0.2), "standard_deviation": pytest.approx(0.02**0.5)}
        assert made["facts"] == {"kept": {"mean": 7.0, "standard_deviation": 0.0}}
        assert [row["seed"] for row in made["by_seed"]] == [3, 4]

    def test_a_fact_that_a_seed_does_not_have_is_unknown(self):
        rows = [{"seed": 0, "facts": {"a": 1.0}}, {"seed": 1, "facts": {"b": 2.0}}]
        facts = schema.make_cell("x", "y", rows, ())["facts"]
        assert list(facts) == ["a", "b"] and facts["a"]["mean"] is None
        assert schema.make_cell("x", "y", [{"seed": 0, "cda": 1.0}], ["cda"])["facts"] == {}


class TestLookUp:
    def test_cells_by_name(self):
        results = make()
        assert schema.find(results, "badnets", "abl")["summary"]["cda"]["mean"] == pytest.approx(0.8)
        assert schema.find(results, "sig", "abl") is None and schema.find(results, "sig", None) is None
        found = [(attack["title"], method["title"]) for _, attack, method in schema.cells(results)]
        assert found == [("BADNETS", "none"), ("BADNETS", "abl"), ("SIG", "none")]

    def test_means(self):
        results = make()
        assert schema.mean_of(schema.find(results, "badnets", "none"), "asr") == pytest.approx(0.7)
        assert schema.mean_of(schema.find(results, "sig", "none"), "asr") is None
        assert schema.mean_of(None, "asr") is None
        assert schema.mean_of(schema.find(results, "sig", "none"), "control_asr") is None
        assert schema.is_known(results, "asr") and not schema.is_known(results, "control_asr")

    def test_texts_of_numbers(self):
        badnets = schema.find(make(), "badnets", "none")
        assert [schema.number_text(badnets, name, 2) for name in ("cda", "asr", "control_asr")] == [
            "0.90 ± 0.00",
            "0.70 ± 0.14",
            "–",
        ]

    def test_words_are_of_the_means_and_look_at_the_control(self):
        results = make()
        assert schema.word_of(results, "badnets", "abl", "none") == "removed"  # 0.7 -> 0.2
        assert schema.word_of(results, "badnets", "none", "abl") == "nothing to remove"
        assert schema.word_of(results, "sig", "none", "none") is None
        assert schema.word_of(results, "badnets", "abl", None) is None
        for number, control in ((0, 0.6), (1, 0.1)):
            results["cells"][number]["summary"]["control_asr"] = {"mean": control, "standard_deviation": None}
        assert schema.word_of(results, "badnets", "abl", "none") == "nothing to remove"

    def test_the_baseline(self):
        results = make()
        assert schema.undefended(results) == "none"
        assert schema.undefended({**results, "methods": results["methods"][1:]}) is None


class TestTexts:
    def test_of_seeds(self):
        assert schema.seeds_text(make()) == "2 seeds" and schema.has_spread(make())
        assert schema.mean_text(make()) == "mean ± standard deviation over 2 seeds" and not schema.one_seed_text(make())
        alone = make(seeds=(3,))
        assert schema.seeds_text(alone) == "1 seed" and not schema.has_spread(alone)
        assert schema.mean_text(alone) == "mean over 1 seed" and "One seed only" in schema.one_seed_text(alone)

    def test_attacks_may_have_seeds_of_their_own_or_those_of_the_run(self):
        results = make()
        results["attacks"][1]["seeds"] = [3]
        assert schema.seeds_text(results) == "1 to 2 seeds" and schema.has_spread(results)
        for attack in results["attacks"]:
            del attack["seeds"]
        assert schema.seeds_text(results) == "2 seeds"
        assert schema.seeds_text({"attacks": [{"seeds": [1, 2, 3]}]}) == "3 seeds"

    def test_of_what_is_left_out(self):
        assert schema.left_out_text(make()) == ""
        assert (
            schema.left_out_text(make(left_out={"abl": "no rows", "issba": "no room"}))
            == " Left out: abl (no rows); issba (no room)."
        )

    def test_warnings_of_the_same_words_are_one_sentence(self):
        entry = {"attack": "a", "method": "vbd", "title": "VBD on A", "seed": 0, "text": "it learned the classes"}
        others = [entry | {"seed": 1}, entry | {"seed": 2, "text": "it diverged"}, entry | {"seed": 3}]
        assert schema.reservations(make() | {"warnings": [entry]}) == ["VBD on A, seed 0: it learned the classes."]
        assert schema.reservations(make() | {"warnings": [entry, *others]}) == [
            "VBD on A, seed 0, and in 2 more cases: it learned the classes.",
            "VBD on A, seed 2: it diverged.",
        ]


class TestNamesOfClasses:
    NAMES = ("ant", "bee", "cat", "dog", "eel")

    def suspect(self, text, seed=0):
        images, labels = np.zeros((10, 8, 8, 3), np.uint8), np.arange(10, dtype=np.int32) % 5
        rows = Dataset(images, labels, 5, "mine", "arrays", self.NAMES)
        return Suspect(read_attack(text, rows, seed + 1), seed, rows, (), None)

    def test_stand_beside_the_target_of_an_attack(self):
        text = "badnets:poison_rate=0.2:target=4"
        described = schema.describe_attack([self.suspect(text)], 0)
        assert described["parts"][0]["label_rule"] == "all-to-one, target 4 (eel)"
        assert described["title"].endswith("(poison rate 0.2, target 4 (eel))") and described["target"] == 4

    def test_stand_beside_the_targets_of_further_seeds(self):
        (part,) = schema.describe_attack([self.suspect("badnets:poison_rate=0.2", seed) for seed in range(3)], 0)[
            "parts"
        ]
        assert part["label_rule"] == "all-to-one, target 1 (bee) of the first seed; then 2 (cat), 3 (dog)"

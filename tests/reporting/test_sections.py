"""Shared tables, sentences and choices, by hand: three attacks under three methods. Figures are in the tests of the reports."""

import numpy as np
import pytest

from bdjax.reporting import results as schema
from bdjax.reporting import sections as shared
from bdjax.reporting.report import Figure
from bdjax.reporting.tables import Table
from bdjax.types import Dataset

SEEDS = (0, 1)
NUMBERS = {
    ("badnets", "none"): (0.9, 1.0),
    ("badnets", "abl"): (0.8, 0.2),
    ("badnets", "lfd+abl"): (0.7, 0.1),
    ("sig", "none"): (0.92, 0.8),
    ("sig", "abl"): (0.82, 0.4),
    ("clean", "none"): (0.95, None),
    ("clean", "abl"): (0.85, None),
    ("clean", "lfd+abl"): (0.75, None),
}
ATTACKS = [
    {
        "attack": name,
        "base": name,
        "title": title,
        "suppression": 0.0,
        "parts": [{"attack": name, "settings": {"size": 3}}] if name != "clean" else [],
        "seeds": list(SEEDS),
    }
    for name, title in (("badnets", "BadNets"), ("sig", "SIG"), ("clean", "no attack"))
]
METHODS = [
    {"method": "none", "base": "none", "title": "no defense", "needs": [], "settings": {}},
    {"method": "abl", "base": "abl", "title": "ABL", "needs": ["number of poisons"], "settings": {"share": 0.1}},
    {
        "method": "lfd+abl",
        "base": "lfd+abl",
        "title": "LfD, then ABL",
        "needs": ["clean rows"],
        "settings": [{"alpha": 0.5}, {"share": 0.2}],
    },
]


def make(**changes):
    cells = []
    for (attack, method), (cda, asr) in NUMBERS.items():
        rows = [
            {"seed": s, "cda": cda + 0.02 * s, "asr": asr, "flagged": 0.25 if method == "abl" else None} for s in SEEDS
        ]
        cells.append(schema.make_cell(attack, method, rows, ("cda", "asr", "flagged")))
    tree = schema.assemble(("cda", "asr"), 50, SEEDS, ATTACKS, METHODS, cells, {"bab": "no room"})
    return tree | changes


class TestComparisonTable:
    def test_attacks_by_methods_with_the_mean_over_the_attacks_that_all_have(self):
        table = shared.comparison_table(make(), ("cda", "asr"), "training set", " More.", has_mean=True)
        assert table.title == "CDA / ASR" and table.header == ("training set", "no defense", "ABL", "LfD, then ABL")
        assert table.rows == (
            ("BadNets", "0.910 / 1.000", "0.810 / 0.200", "0.710 / 0.100"),
            ("SIG", "0.930 / 0.800", "0.830 / 0.400", None),
            ("no attack", "0.960 / –", "0.860 / –", "0.760 / –"),
        )
        for text in ("CDA / ASR, mean over 2 seeds, 50 test rows.", "CDA 0.014, ASR 0.000", " More.", "bab (no room)"):
            assert text in table.notes

    def test_the_mean_row(self):
        two = make(methods=METHODS[:2])
        table = shared.comparison_table(two, ("cda", "asr"), "training set", has_mean=True)
        assert table.rows[-1] == ("mean of 2 attacks", "0.920 / 0.900", "0.820 / 0.300")
        assert table.row_styles == ("", "", "", "ours") and "attacks that have ASR under every defense" in table.notes

    def test_methods_by_attacks_are_the_same_cells_turned(self):
        plain = shared.comparison_table(make(), ("cda", "asr"), "training set")
        turned = shared.comparison_table(make(), ("cda", "asr"), "method", by_method=True)
        assert turned.header == ("method", "BadNets", "SIG", "no attack")
        assert [row[1:] for row in turned.rows] == list(zip(*(row[1:] for row in plain.rows), strict=True))
        assert [row[0] for row in turned.rows] == ["no defense", "ABL", "LfD, then ABL"]

    def test_a_single_seed_has_no_spread(self):
        tree = make(attacks=[{**attack, "seeds": [0]} for attack in ATTACKS], seeds=[0])
        notes = shared.comparison_table(tree, ("cda",), "training set").notes
        assert "One seed only" in notes and "Largest" not in notes


class TestTables:
    def test_needs_have_a_column_if_a_method_has_them(self):
        needs = {"training set": "rows", "clean rows": "clean rows", "number of poisons": "count"}
        first, last = {"defense": lambda method: method["title"]}, {"base": lambda method: method["base"]}
        table = shared.needs_table(make(), first, needs, last, "Given.")
        assert table.header == ("defense", "clean rows", "count", "base")
        assert table.rows[1] == ("ABL", None, "yes", "abl") and table.rows[2] == (
            "LfD, then ABL",
            "yes",
            None,
            "lfd+abl",
        )
        assert table.notes == "Given. Number of poisons: not available to a real defender."

    def test_cells_as_rows(self):
        tree = make()
        columns = {**shared.title_columns("set", "how"), **shared.number_columns(["cda", "asr"])}
        table = shared.cell_table("All", schema.cells(tree), columns)
        assert table.header == ("set", "how", "CDA", "ASR") and len(table.rows) == len(NUMBERS)
        assert table.rows[-1] == ("no attack", "LfD, then ABL", "0.760 ± 0.014", "–")
        assert shared.cell_table("None", [], columns) is None


class TestSentences:
    @pytest.mark.parametrize(
        ("words", "expected"),
        [
            ([["removed"]], "ABL removes the backdoor."),
            ([["removed at a cost"]], "ABL removes the backdoor, but at a cost of accuracy."),
            ([["weakened"]], "ABL weakens the backdoor, but does not remove it."),
            ([["kept"]], "ABL does not remove the backdoor."),
            ([[None]], "ABL was not evaluated on the backdoor."),
            ([["removed", "kept", None]], "ABL removes 1 of 3 backdoors."),
            ([["removed"], ["kept"]], "1 of 2 defenses remove the backdoor."),
            ([["removed", "removed"], ["removed", "weakened"]], "1 of 2 defenses remove all 2 backdoors."),
        ],
    )
    def test_headlines(self, words, expected):
        assert shared.headline(["ABL", "LfD"][: len(words)], words, "defenses") == expected

    def test_a_clause_on_the_backdoor(self):
        assert shared.headline(["A"], [["weakened"]], "", " that passes") == (
            "A weakens the backdoor that passes, but does not remove it."
        )

    def test_what_is_known_where_there_is_no_trigger(self):
        assert shared.accuracy_text(make(), ATTACKS[2], METHODS[:2]) == (
            "No attack: no defense has CDA 0.960; ABL has CDA 0.860 and flags 25.0 % of the rows."
        )

    def test_explanations_are_the_definitions(self):
        assert shared.explain() == "" and shared.explain("kept", "f1").startswith(" Kept: more is left")

    def test_key_numbers_are_means_over_attacks_and_leave_out_what_is_not_known(self):
        titles = {"none": "without", "lfd+abl": "LfD, then ABL"}
        tiles = shared.key_numbers(make(), titles, ("asr", "cda"), ATTACKS[:2])
        assert tiles == {"mean ASR, without": "0.900", "mean CDA, without": "0.920"}
        assert shared.key_numbers(make(), titles, ("asr",), []) == {}

    def test_settings_have_a_group_for_each_attack_and_each_link_of_a_chain(self):
        groups = shared.settings_of(make(), "method")
        assert groups["attack badnets"] == {"size": 3} and groups["method abl"] == {"share": 0.1}
        assert groups["method lfd+abl: 1. lfd"] == {"alpha": 0.5} and groups["method lfd+abl: 2. abl"] == {"share": 0.2}


def test_a_section_without_tables_and_figures_is_none():
    table = Table("t", ("a",), ((1,),))
    assert shared.section("Empty", [None, None], [], "text") == ()
    (made,) = shared.section("Full", [None, table], text="text")
    assert (made.title, made.text, made.tables, made.figures) == ("Full", "text", (table,), ())
    assert len(shared.section("Figures", [], [Figure(b"", "", "")])) == 1


def test_names_of_files_are_safe_short_and_unique():
    assert shared.file_name("lfd:alpha=0.5") == "lfd-alpha=0.5" and shared.file_name("/..:") == "unnamed"
    long = ["x" * 200 + end for end in "ab"]
    names = [shared.file_name(text) for text in long]
    assert len(set(names)) == 2 and all(len(name.encode()) <= shared.LONGEST_NAME for name in names)


def test_most_suspicious():
    flags, scores = np.array([0, 1, 0, 1, 0], bool), np.array([9.0, 1.0, 3.0, 2.0, 8.0])
    np.testing.assert_array_equal(shared.most_suspicious(flags, scores, 4), [3, 1, 0, 4])
    np.testing.assert_array_equal(shared.most_suspicious(None, scores, 2), [0, 4])
    np.testing.assert_array_equal(shared.most_suspicious(flags, None, 9), [1, 3])
    np.testing.assert_array_equal(shared.most_suspicious(np.ones(9, bool), None, 3), [0, 4, 8])
    assert len(shared.most_suspicious(None, None, 3)) == len(shared.most_suspicious(np.zeros(4, bool), None, 3)) == 0


class TestNamesOfClasses:
    def test_stand_beside_a_class_that_a_method_reports(self):
        rows = [{"seed": seed, "cda": 1.0, "facts": {"class of smallest mask": 2.0, "kept": 2.0}} for seed in SEEDS]
        tree = make(cells=[schema.make_cell("badnets", "abl", rows, ("cda",))])
        assert [row[-1] for row in shared.facts_table(tree).rows] == ["2.000 ± 0.000"] * 2
        named = {**tree, "class_names": ["ant", "bee", "cat"]}
        assert [row[-1] for row in shared.facts_table(named).rows] == ["2 (cat)", "2.000 ± 0.000"]

    def test_stand_beside_the_classes_of_pictures(self):
        data = Dataset(np.zeros((1, 1, 1, 1), np.uint8), np.zeros(1, np.int32), 2, "", "", ("ant", "bee"))
        assert shared._with_class_titles("masks of classes 0, 1", data) == "masks of classes 0 (ant), 1 (bee)"
        assert shared._with_class_titles("reversed triggers", data) == "reversed triggers"

"""Rows and tables over many runs: of made-up runs whose numbers are known, and of the committed results."""

import json
import pathlib
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest

from bdjax.errors import InputError
from bdjax.reporting import collected
from bdjax.reporting.collected import Row
from bdjax.reporting.tables import Table, latex_text, to_latex

RESULTS = pathlib.Path(__file__).parents[2] / "docs" / "results"
CONFIG = {
    "dataset": "digits",
    "preset": "quick",
    "attacks": "badnets,none",
    "defenses": "abl,strip",
    "seeds": 2,
    "seed": 10,
    "epochs": 3,
    "output": "/tmp/x",
}


def write_run(
    folder: pathlib.Path, cells: dict, experiment: str = "lfd", config: dict | None = None, **extra
) -> pathlib.Path:
    """A run's folder; cells: (attack, method) -> one dictionary of numbers for each seed."""
    results = {
        "definitions": {},
        "test_rows": 100,
        "seeds": [10, 11],
        "attacks": [{"attack": name} for name in dict.fromkeys(attack for attack, _ in cells)],
        "methods": [{"method": name} for name in dict.fromkeys(method for _, method in cells)],
        "cells": [
            {
                "attack": attack,
                "method": method,
                "summary": {name: {} for name in by_seed[0]},
                "facts": {"rows lost": {}} if method == "abl" else {},
                "by_seed": [
                    {"seed": 10 + number, **numbers, "facts": {"rows lost": 7.0} if method == "abl" else {}}
                    for number, numbers in enumerate(by_seed)
                ],
            }
            for (attack, method), by_seed in cells.items()
        ],
        "left_out": {},
        **extra,
    }
    record = {
        "experiment": experiment,
        "config": {**CONFIG, **(config or {})},
        "versions": {"bdjax": "0.1.0", "jax": "0.10.2", "numpy": "2.4.6", "python": "3.11.7"},
        "git_revision": "abc",
    }
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps(results))
    (folder / "config.json").write_text(json.dumps(record))
    return folder


CELLS = {
    ("badnets", "none"): [{"cda": 0.9, "asr": 1.0}, {"cda": 0.8, "asr": 0.9}],
    ("badnets", "abl"): [{"cda": 0.8, "asr": 0.0}, {"cda": 0.7, "asr": 0.1}],
    ("none", "none"): [{"cda": 0.9, "asr": None}, {"cda": 0.8, "asr": None}],
    ("none", "abl"): [{"cda": 0.95, "asr": None}, {"cda": 0.9, "asr": None}],
}


def test_a_row_is_one_number_with_what_it_depends_on(tmp_path):
    folder = write_run(tmp_path / "a", CELLS, left_out={"strip": "needs clean rows"})
    rows = collected.read_run(folder)
    numbers = [row for row in rows if row.status == "done"]
    assert len(numbers) == 4 * 2 * 2 + 4  # cells, seeds, metrics; and the fact of abl
    (found,) = [row for row in numbers if row[4:8] == ("badnets", "abl", 11, "asr")]
    assert found.value == 0.1 and found.bdjax == "0.1.0"
    assert (found.experiment, found.dataset, found.preset, found.git_revision, found.jax) == (
        "lfd", "digits", "quick", "abc", "0.10.2",
    )  # fmt: skip
    assert all(re.fullmatch("[0-9a-f]{64}", text) for text in (found.config_sha256, found.results_sha256))
    assert {row.metric for row in numbers} == {"cda", "asr", "facts.rows lost"}
    left_out = [row for row in rows if row.status == "left out"]
    assert {row.attack for row in left_out} == {"badnets", "none"} and len(left_out) == 4
    assert {(row.defense, row.reason, row.value) for row in left_out} == {("strip", "needs clean rows", None)}


def test_what_could_not_be_tested_is_a_row_with_its_reason(tmp_path):
    entry = {"attack": "badnets", "method": "abl", "title": "ABL", "seed": 11, "reason": "too few rows", "classes": {}}
    of_abl = [{"cda": 0.8, "asr": 0.0, "f1": 1.0}, {"cda": 0.7, "asr": 0.1, "f1": None}]
    cells = CELLS | {
        ("badnets", "abl"): of_abl,
        ("badnets", "strip"): [{"cda": 0.9, "f1": 0.5}, {"cda": 0.9, "f1": 0.5}],
    }
    rows = collected.read_run(write_run(tmp_path / "a", cells, not_tested=[entry]))
    (found,) = [row for row in rows if row.status == "not tested"]
    assert (found.attack, found.defense, found.seed, found.reason) == ("badnets", "abl", 11, "too few rows")
    done = {row.metric: row.value for row in rows if row[4:7] == found[4:7] and row.status == "done"}
    assert done == {"cda": 0.7, "asr": 0.1, "facts.rows lost": 7.0}, "what is no flag was measured"
    (of,) = collected.group(rows)
    assert of.mean("f1", "badnets", "abl") is None and of.mean("cda", "badnets", "abl") == pytest.approx(0.75)
    assert collected.rank([of], "f1") is None, "the only block has an unknown seed"
    assert ("abl", None) in [row[:2] for row in collected.pivot(of, "f1").rows]


def test_an_unknown_seed_makes_the_mean_unknown(tmp_path):
    cells = {("badnets", "abl"): [{"f1": 0.1}, {"f1": None}], ("badnets", "strip"): [{"f1": 0.1}, {"f1": 0.2}]}
    (of,) = collected.group(collected.read_run(write_run(tmp_path / "a", cells)))
    assert collected.pivot(of, "f1").rows == (("abl", None), ("strip", "0.150 ± 0.071"))


def test_a_failed_seed_makes_the_mean_unknown(tmp_path):
    rows = collected.read_run(write_run(tmp_path / "a", CELLS))
    done = next(row for row in rows if row[4:6] == ("badnets", "abl"))
    lost = done._replace(seed=12, metric="", value=None, status="failed", reason="why", setting="")
    (of,) = collected.group([*rows, lost])
    assert of.mean("cda", "badnets", "abl") is None and of.mean("cda", "badnets", "none") == pytest.approx(0.85)
    (of,) = collected.group([*rows, lost._replace(seed=11)])
    assert of.mean("cda", "badnets", "abl") == pytest.approx(0.75), "another run has this seed"


def test_settings_are_no_blocks_of_ranks(tmp_path):
    def read(name, **config):
        return collected.read_run(write_run(tmp_path / name, CELLS, config=config))

    def ranks(rows):
        return [table for table in collected.tables(rows, ["cda"]) if table.title.startswith("Ranks")]

    several = ranks([*read("a", epochs=1), *read("b", epochs=2)])
    assert len(several) == 2 and all("CDA: 2 blocks" in table.notes for table in several)
    assert len({table.title for table in several}) == 2
    # The settings of a preset differ between datasets.
    (one,) = ranks([*read("c", epochs=1), *read("d", epochs=2, dataset="mnist")])
    assert "CDA: 4 blocks" in one.notes and one.title == "Ranks: lfd on digits, mnist, quick"


@pytest.mark.parametrize(("experiment", "place"), [("lfd", 5), ("attack", 4)])
def test_only_attack_leaves_out_attacks(tmp_path, experiment, place):
    """With a study, the setting `defenses` does not have the study's."""
    config = {"study": "table1", "defenses": "lfd"}
    rows = collected.read_run(write_run(tmp_path / "a", CELLS, experiment, config, left_out={"spectre": "why"}))
    assert {row[place] for row in rows if row.status == "left out"} == {"spectre"}
    assert all(row[9 - place] != "spectre" for row in rows)


def test_only_what_does_not_matter_may_differ_in_comparable_rows(tmp_path):
    def setting(name, **config):
        return collected.read_run(write_run(tmp_path / name, CELLS, config=config))[0].setting

    usual = setting("a")
    assert usual == setting("b", seed=3, seeds=9, attacks="sig", output="/other", layout="vmap")
    assert usual != setting("c", epochs=4)


def test_tables_have_means_deviations_ranks_and_what_is_missing(tmp_path):
    rows = collected.read_run(write_run(tmp_path / "a", CELLS, left_out={"strip": "needs clean rows"}))
    cda, asr, ranks, missing = collected.tables(rows)
    assert cda.header == ("defense", "badnets", "none") and asr.title == "ASR: lfd on digits, quick"
    assert cda.rows == (("none", "0.850 ± 0.071", "0.850 ± 0.071"), ("abl", "0.750 ± 0.071", "0.925 ± 0.035"))
    assert asr.rows == (("none", "0.950 ± 0.071", None), ("abl", "0.050 ± 0.071", None))
    assert ranks.rows[1] == ("abl", "1.50", "1.00 to 2.00", "1.00", None)
    assert "CDA: 2 blocks, critical difference 1.39 (Nemenyi, 5 %)." in ranks.notes and "ASR: 1 block, " in ranks.notes
    assert missing.rows[0] == ("lfd", "digits", "badnets", "strip", "10, 11", "left out", "needs clean rows")


def test_two_runs_that_disagree_are_reported(tmp_path):
    rows = collected.read_run(write_run(tmp_path / "a", CELLS))
    same = collected.read_run(write_run(tmp_path / "b", CELLS))
    other = collected.read_run(write_run(tmp_path / "c", CELLS | {("badnets", "abl"): [{"cda": 0.1, "asr": 0.0}]}))
    assert collected.group(rows + same)[0].disagreeing == 0
    assert (
        "Of 1 numbers two runs have different values, and the first is shown."
        in collected.tables(rows + other)[0].notes
    )


def test_ranks_are_those_of_the_textbook(tmp_path):
    """Demšar 2006, table 6: C4.5 with its parameters m and cf on 14 datasets. Where two print alike on
    the last but one, the paper's ranks are those of more digits."""
    accuracies = np.array([
        [0.763, 0.768, 0.771, 0.798], [0.599, 0.591, 0.590, 0.569], [0.954, 0.971, 0.968, 0.967],
        [0.628, 0.661, 0.654, 0.657], [0.882, 0.888, 0.886, 0.898], [0.936, 0.931, 0.916, 0.931],
        [0.661, 0.668, 0.609, 0.685], [0.583, 0.583, 0.563, 0.625], [0.775, 0.838, 0.866, 0.875],
        [1.000, 1.000, 1.000, 1.000], [0.940, 0.962, 0.965, 0.962], [0.619, 0.666, 0.614, 0.669],
        [0.972, 0.981, 0.9751, 0.975], [0.957, 0.978, 0.946, 0.970],
    ])  # fmt: skip
    names = ("C4.5", "C4.5+m", "C4.5+cf", "C4.5+m+cf")
    cells = {
        (f"set {number}", name): [{"cda": float(value)}]
        for number, row in enumerate(accuracies)
        for name, value in zip(names, row, strict=True)
    }
    ranks = collected.rank(collected.group(collected.read_run(write_run(tmp_path / "a", cells))), "cda")
    assert ranks.defenses == names and ranks.blocks == 14
    np.testing.assert_allclose(ranks.mean, (3.143, 2.000, 2.893, 1.964), atol=5e-4)
    assert ranks.difference == pytest.approx(1.25, abs=0.01)
    assert ranks.p_value == pytest.approx(0.0167, abs=1e-3)  # corrected for ties; in the paper, which does not, 0.0258
    assert all(low <= mean <= high for low, mean, high in zip(ranks.low, ranks.mean, ranks.high, strict=True))


def test_blocks_with_a_missing_value_are_left_out_of_ranks(tmp_path):
    cells = CELLS | {("sig", "none"): [{"cda": 0.5, "asr": 1.0}]}
    groups = collected.group(collected.read_run(write_run(tmp_path / "a", cells)))
    assert (collected.rank(groups, "cda").blocks, collected.rank(groups, "cda").incomplete) == (2, 1)
    alone = {("badnets", "none"): [{"cda": 0.5}]}
    assert collected.rank(collected.group(collected.read_run(write_run(tmp_path / "b", alone))), "cda") is None


def test_a_plot_of_each_group_with_both_metrics(tmp_path):
    rows = collected.read_run(write_run(tmp_path / "a", CELLS))
    rows += collected.read_run(write_run(tmp_path / "b", {("badnets", "vbd"): [{"f1": 1.0}]}, "vbd"))
    ((name, figure),) = collected.figures(rows)
    assert re.fullmatch(r"trade-off-lfd-digits-quick-[0-9a-f]{8}\.png", name) and len(figure.axes) == 1


@pytest.mark.parametrize(
    "text", ["", "[]", '{"cells": [{}]}', '{"cells": 3}', "NaN", '{"cells": NaN}', "[" * 100_000], ids=lambda t: t[:12]
)
def test_a_damaged_file_is_named(tmp_path, text):
    folder = write_run(tmp_path / "a", CELLS)
    (folder / "results.json").write_text(text)
    with pytest.raises(InputError, match=re.escape(str(folder))) as error:
        collected.read_run(folder)
    assert "\n" not in str(error.value)


# ---- The committed results -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def committed() -> list[Row]:
    return [row for run in collected.find_runs(RESULTS) for row in collected.read_run(run)]


def test_the_committed_results_are_rows(committed):
    assert len(committed) > 8000 and {row.experiment for row in committed} >= {
        "lfd",
        "abm",
        "vbd",
        "robust_kd",
        "ta_kd",
    }
    assert all(row.bdjax and row.git_revision and row.dataset for row in committed)
    results = json.loads((RESULTS / "lfd" / "digits" / "results.json").read_text())
    run = [row for row in committed if row.run.endswith("lfd/digits")]
    for cell in results["cells"]:
        for by_seed in cell["by_seed"]:
            key = (cell["attack"], cell["method"], by_seed["seed"])
            found = {row.metric: row.value for row in run if row[4:7] == key}
            assert {name: found[name] for name in cell["summary"]} == {name: by_seed[name] for name in cell["summary"]}


def test_the_tables_are_those_of_the_runs(committed):
    """Our table of LfD on the digits has the same numbers as the run's own."""
    own = (RESULTS / "lfd" / "digits" / "table.md").read_text()
    cda = collected.tables([row for row in committed if row.run.endswith("lfd/digits")])[0]
    assert len(cda.rows) == 5 and all(cell in own for row in cda.rows for cell in row[1:])


# ---- Files -----------------------------------------------------------------------------------------------------------


def test_parquet_has_the_same_rows(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = collected.read_run(write_run(tmp_path / "a", CELLS, left_out={"strip": "why"}))
    (tmp_path / "rows.parquet").write_bytes(collected.to_parquet(rows))
    table = parquet.read_table(tmp_path / "rows.parquet")
    assert table.column_names == list(Row._fields)
    assert [Row(**row) for row in table.to_pylist()] == rows


def test_parquet_without_the_library_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(InputError, match=r"^parquet files .* need pyarrow, .*: pip install 'bdjax\[hf\]'$"):
        collected.to_parquet([])


HARD = r"50 % & more_of #1 {~} \ ^ < > ± – × ≤ é 漢 $"


def test_latex_has_no_letter_that_it_would_take_for_something_else():
    text = latex_text(HARD)
    assert text == (
        r"50 \% \& more\_of \#1 \{\textasciitilde{}\} \textbackslash{} \textasciicircum{} $<$ $>$ $\pm$ -- $\times$ "
        r"$\leq$ e ? \$"
    )
    table = Table(
        f"Title {HARD}", ("defense", "a_b", "c & d"), (("abl", "0.953 ± 0.004", None), (HARD, "1.000", "x")), HARD
    )
    latex = to_latex(table)
    assert latex.isascii() and r"\begin{tabular}{lrl}" in latex
    body = latex.split(r"\midrule")[1].split(r"\bottomrule")[0]
    rows = [line for line in body.splitlines() if line]
    assert all(line.endswith(r" \\") and len(re.findall(r"(?<!\\)&", line)) == 2 for line in rows)
    assert latex.count("{") - latex.count(r"\{") == latex.count("}") - latex.count(r"\}")
    for name in ("table", "tabular"):
        assert latex.count(rf"\begin{{{name}}}") == latex.count(rf"\end{{{name}}}") == 1


@pytest.mark.parametrize("program", ["pdflatex", "tectonic"])
def test_latex_compiles(tmp_path, committed, program):
    if shutil.which(program) is None:
        pytest.skip(f"{program} is not installed")
    tables = collected.tables([row for row in committed if row.experiment == "lfd"])
    hard = Table(HARD, ("a", "b"), ((HARD, "1.0 ± 0.1"),), HARD)
    body = "\n".join(map(to_latex, [*tables, hard]))
    (tmp_path / "a.tex").write_text(
        "\\documentclass{article}\\usepackage{booktabs}\\begin{document}\n" + body + "\\end{document}\n"
    )
    options = ["-interaction=nonstopmode", "-halt-on-error"] if program == "pdflatex" else []
    subprocess.run([program, *options, "a.tex"], cwd=tmp_path, check=True, capture_output=True, timeout=300)
    assert (tmp_path / "a.pdf").stat().st_size > 1000

"""The tables on the pages of docs/results/ are those that runs wrote, and what the present code makes of their numbers."""

import json
import pathlib

import pytest

from bdjax.benchmarking import report
from bdjax.reporting import attacks, defenses, detectors, model_page, students, ta_kd
from bdjax.reporting.tables import to_markdown

ROOT = pathlib.Path(__file__).parents[2]
RESULTS = ROOT / "docs" / "results"
RUNS = sorted(path.parent for path in (RESULTS / "ta_kd").rglob("table.md"))
ATTACKS = sorted(path.parent for path in (RESULTS / "attack").rglob("table.md"))
DEFENSES = sorted(path.parent for name in ("lfd", "abm") for path in (RESULTS / name).rglob("table.md"))
DETECTIONS = sorted(path.parent for path in (RESULTS / "vbd").rglob("table.md"))
STUDENTS = sorted(path.parent for path in (RESULTS / "robust_kd").rglob("table.md"))
MODELS = sorted(path.parent for path in (RESULTS / "audit_model").rglob("table.md"))
BENCHMARKS = sorted(path.parent for path in (RESULTS / "bench_ensemble").rglob("table.md"))
PAGES = {"attack": "attacks"}
"""Folder of docs/results/ -> its page, where that is called otherwise."""


def _first_table(text: str) -> list[str]:
    lines = text.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("|"))
    end = next((i for i in range(start, len(lines)) if not lines[i].startswith("|")), len(lines))
    return lines[start:end]


def test_there_are_results() -> None:
    assert RUNS and ATTACKS and DEFENSES and DETECTIONS and STUDENTS and MODELS and BENCHMARKS


@pytest.mark.parametrize(
    "run",
    RUNS + ATTACKS + DEFENSES + DETECTIONS + STUDENTS + MODELS + BENCHMARKS,
    ids=lambda run: "/".join(run.parts[-2:]),
)
def test_the_page_of_the_system_prints_the_table_of_the_run(run: pathlib.Path) -> None:
    page = RESULTS / f"{PAGES.get(run.parent.name, run.parent.name)}.md"
    table = "\n".join(_first_table((run / "table.md").read_text()))
    assert table in page.read_text(), f"{page.name} does not print the first table of {run.relative_to(ROOT)}/table.md"


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.name)
def test_the_table_agrees_with_the_numbers_and_the_settings(run: pathlib.Path) -> None:
    results = json.loads((run / "results.json").read_text())
    config = json.loads((run / "config.json").read_text())["config"]
    table = (run / "table.md").read_text()
    made = "\n\n".join(
        to_markdown(table)
        for table in (
            ta_kd.main_table(results, config["dataset"]),
            ta_kd.needs_table(results),
            ta_kd.teacher_table(results),
            ta_kd.size_table(results),
        )
    )
    assert made + "\n" == table
    for cell in results["cells"]:
        assert len(cell["by_seed"]) == config["seeds"]
        assert f"{cell['summary']['cda']['mean']:.3f}" in table


@pytest.mark.parametrize("run", BENCHMARKS, ids=lambda run: run.name)
def test_a_benchmarks_table_is_what_its_report_makes_of_the_numbers(run: pathlib.Path) -> None:
    results = json.loads((run / "results.json").read_text())
    made = to_markdown(report.summary_table(results))
    assert _first_table(made) == _first_table((run / "table.md").read_text())


@pytest.mark.parametrize("run", ATTACKS, ids=lambda run: run.name)
def test_an_attack_runs_table_is_what_its_report_makes_of_the_numbers(run: pathlib.Path) -> None:
    results = json.loads((run / "results.json").read_text())
    dataset = json.loads((run / "config.json").read_text())["config"]["dataset"]
    tables = (attacks.main_table(results, dataset), attacks.detail_table(results), attacks.needs_table(results))
    assert "\n\n".join(map(to_markdown, tables)) + "\n" == (run / "table.md").read_text()


@pytest.mark.parametrize("run", DEFENSES, ids=lambda run: "/".join(run.parts[-2:]))
def test_a_comparisons_table_is_what_its_report_makes_of_the_numbers(run: pathlib.Path) -> None:
    results = json.loads((run / "results.json").read_text())
    table = (run / "table.md").read_text()
    assert _first_table(to_markdown(defenses.main_table(results))) == _first_table(table)
    assert to_markdown(defenses.detail_table(results)) in table


@pytest.mark.parametrize("run", DETECTIONS, ids=lambda run: "/".join(run.parts[-2:]))
def test_a_detection_runs_table_is_what_its_report_makes_of_the_numbers(run: pathlib.Path) -> None:
    results = json.loads((run / "results.json").read_text())
    dataset = json.loads((run / "config.json").read_text())["config"]["dataset"]
    assert _first_table(to_markdown(detectors.main_table(results, dataset))) == _first_table(
        (run / "table.md").read_text()
    )


@pytest.mark.parametrize("run", STUDENTS, ids=lambda run: run.name)
def test_a_run_on_teachers_has_the_table_that_its_report_makes_of_the_numbers(run: pathlib.Path) -> None:
    results = json.loads((run / "results.json").read_text())
    table = (run / "table.md").read_text()
    assert _first_table(to_markdown(students.main_table(results))) == _first_table(table)
    assert to_markdown(students.detail_table(results, students.plain_method(results))) in table


@pytest.mark.parametrize("run", MODELS, ids=lambda run: run.name)
def test_an_audit_of_models_has_the_tables_that_its_report_makes_of_the_numbers(run: pathlib.Path) -> None:
    results = json.loads((run / "results.json").read_text())
    tables = (
        *(model_page.main_table(results), model_page.responses_table(results), *model_page.class_tables(results)),
        *(model_page.controls_table(results), model_page.weights_table(results)),
    )
    assert "\n\n".join(to_markdown(table) for table in tables if table) + "\n" == (run / "table.md").read_text()

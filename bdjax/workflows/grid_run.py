"""Running a grid's jobs to their end, and collecting the results of runs."""

import hashlib
import itertools
import json
import os
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
from rich.console import Console

from bdjax import atomic
from bdjax.datasets.files import free_memory
from bdjax.errors import InputError
from bdjax.reporting import collected, plots
from bdjax.reporting.collected import Row
from bdjax.reporting.tables import Table, to_latex, to_markdown, to_rich
from bdjax.run import command_line, grid_file, jobs
from bdjax.run.configs.grid import CollectConfig, GridConfig
from bdjax.run.experiment import Experiment
from bdjax.run.folder import describe_environment
from bdjax.run.grid_file import Block, GridFile, Partition
from bdjax.run.lock import lock
from bdjax.run.log import StageLog, format_seconds
from bdjax.run.text import csv_text, printable
from bdjax.settings import check_choice, shown
from bdjax.training import memory
from bdjax.workflows import grid
from bdjax.workflows.grid import Cell, Job, Plan

PLAN_FILE, CELLS_FILE, COLLECTED = "grid.json", "cells.csv", "collected"
FORMATS = {"md": "tables.md", "latex": "tables.tex", "csv": "rows.csv", "parquet": "rows.parquet"}
FAILED = 1
"""Exit status of a grid with cells without a result."""
SHOWN_METRICS = ("cda", "asr", "f1")
LATEX_HEAD = "% Needs \\usepackage{booktabs}; \\input this file.\n"


def run(
    path: pathlib.Path,
    config: GridConfig,
    experiments: Mapping[str, Experiment],
    make_work: Callable[..., Callable[[], None]],
    log: StageLog,
) -> int:
    """Run a grid; returns the exit status.

    Args:
        path: of its file.
        config: the flags.
        experiments: what the file may name.
        make_work: (experiment, arguments, the grid's folder, job, process that the job ends with or None) -> what a job calls.
        log: where progress is printed.

    Raises:
        InputError: the file, a flag or the folder cannot be used.
    """
    # The devices are for the jobs: on a GPU, JAX would take most of its memory here.
    jax.config.update("jax_platforms", "cpu")
    file = grid_file.read(path)
    jobs.check_installed()
    if config.executor == "slurm" and not jobs.has_slurm():
        raise InputError("--executor slurm: there is no sbatch and srun on this machine; use --executor=local")
    with log.stage("plan") as stage:
        quiet = StageLog(Console(quiet=True))
        path = config.output or pathlib.Path("runs") / "grid" / path.stem
        digest = hashlib.sha256(file.text.encode()).hexdigest()
        known = _known_divisions(path.expanduser() / PLAN_FILE, digest, config)
        plan = grid.make_plan(file, experiments, partial(memory_limit, file, config), quiet, known)
        stage.detail = f"{len(plan.cells)} cells in {len(plan.jobs)} jobs"
    if config.plan:
        log.console.print(to_rich(plan_table(plan)), highlight=False)
        return 0
    folder = _folder(path)
    held = lock(folder, folder)
    record = {
        "file": file.path.name,
        "sha256": digest,
        **describe_environment(),
        "jobs": [{**job._asdict(), "cells": [cell._asdict() for cell in job.cells]} for job in plan.jobs],
        "most_members": plan.most,
        "refused": [{**entry.cell._asdict(), "reason": entry.reason} for entry in plan.refused],
    }
    atomic.write_bytes(folder / PLAN_FILE, json.dumps(record, indent=2).encode())
    known = {job.name: jobs.read_outcome(folder, job.name) for job in plan.jobs}
    waiting = [job for job in plan.jobs if not (known[job.name] and known[job.name].is_done)]
    if done := len(plan.jobs) - len(waiting):
        log.note("jobs", f"{done} of {len(plan.jobs)} are done already")
    _run_jobs(folder, file, waiting, config, make_work, log)
    del held
    cells = _cells(folder, plan)
    text = csv_text((*Cell._fields, "status", "reason", *SHOWN_METRICS, "job"), cells)
    atomic.write_bytes(folder / CELLS_FILE, text.encode())
    return _announce(folder, cells, log)


def memory_limit(file: GridFile, config: GridConfig, block: Block) -> int | None:
    """Usable bytes of the device of a block's jobs: Slurm's as the file says, or a share of this machine's main memory."""
    if config.executor == "slurm":
        size = partition_of(file, block.partition)[1].device_gb
        return None if size is None else int(memory.USABLE * size * 2**30)
    return None if config.gpus else int(memory.USABLE * free_memory() / config.workers)


def _known_divisions(path: pathlib.Path, digest: str, config: GridConfig) -> dict[str, int]:
    """`Plan.most` of the last start, so that other free memory or other --workers do not make other jobs. Slurm's limits are
    those of the file, so a changed file may change them."""
    try:
        record = json.loads(path.read_bytes())
        if config.executor == "slurm" and record["sha256"] != digest:
            return {}
        most = record["most_members"].items()
        return {name: number for name, number in most if type(number) is int and number >= 0}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return {}


def partition_of(file: GridFile, name: str) -> tuple[str | None, Partition]:
    """The partition that a block names, or else the file's only one; without any, Slurm's default."""
    name = name or next(iter(file.partitions), "")
    return (name, file.partitions[name]) if name else (None, Partition())


def _folder(path: pathlib.Path) -> pathlib.Path:
    """The grid's folder, made if it does not exist.

    Raises:
        InputError: it holds something else, or cannot be made.
    """
    folder = path.expanduser().absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        others = sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith("."))
    except OSError as error:
        raise InputError(f"{path} cannot be used ({error.strerror or error}); choose another --output") from None
    if others and not (folder / PLAN_FILE).is_file():
        raise InputError(
            f"{path} has files ({printable(', '.join(others))[:60]}) but no {PLAN_FILE}, so it is not the folder of a grid; "
            "choose another --output"
        )
    return folder


def _run_jobs(
    folder: pathlib.Path,
    file: GridFile,
    waiting: Sequence[Job],
    config: GridConfig,
    make_work: Callable[..., Callable[[], None]],
    log: StageLog,
) -> None:
    """Run jobs to their end, and print a line for each."""
    by_name = {job.name: job for job in waiting}
    is_local = config.executor == "local"
    at_once = min(config.workers, len(waiting)) if is_local else len(waiting)
    cores = jobs.shares(jobs.own_cores(), max(1, at_once)) if is_local else []
    started: dict[str, Any] = {}

    def start(name: str, slot: int) -> Any:
        job = by_name[name]
        if not is_local and (queued := jobs.sent_to_slurm(folder, name)) is not None:
            log.note(name, f"is in Slurm's queue already, as {queued.job_id}")
            return queued
        jobs.drop_outcome(folder, name)
        work = make_work(job.experiment, job.arguments, str(folder), name, os.getpid() if is_local else None)
        if is_local:
            gpu = config.gpus[slot % len(config.gpus)] if config.gpus else None
            with jobs.on_cores(cores[slot]):
                started[name] = jobs.local_executor(folder, gpu).submit(work)
        else:
            started[name] = jobs.slurm_executor(folder, *partition_of(file, job.partition)).submit(work)
        jobs.record(folder, name, config.executor, started[name])
        return started[name]

    def ended(name: str) -> None:
        outcome = jobs.read_outcome(folder, name)
        if outcome is None:
            outcome = jobs.Outcome(False, f"ended without a result; see {jobs.log_of(folder, name)}")
            jobs.write_outcome(folder, name, outcome)
        stage.advance(1, name)
        seconds = format_seconds(outcome.seconds)
        log.note("job", f"{name} {f'done in {seconds}' if outcome.is_done else f'failed: {outcome.reason}'}")

    with log.stage("jobs", total=len(waiting), unit="jobs") as stage:
        try:
            jobs.follow(
                [job.name for job in waiting],
                start,
                ended,
                lambda name: not is_local and jobs.read_outcome(folder, name) is not None,
                max(1, at_once),
                jobs.SECONDS_BETWEEN_LOOKS[config.executor],
                jobs.GRACE[config.executor],
            )
        finally:
            if is_local:
                jobs.stop([job for job in started.values() if not jobs.is_over(job)])
        stage.wrote(folder)


def plan_table(plan: Plan) -> Table:
    """The jobs of a plan."""
    rows = [(job.name, len(job.cells), " ".join(job.arguments)) for job in plan.jobs]
    notes = "; ".join(f"{entry.cell.attack} on {entry.cell.dataset}: {entry.reason}" for entry in plan.refused[:5])
    return Table("Jobs", ("job", "cells", "flags"), tuple(rows), f"Cannot be run: {notes}" if notes else "")


def _cells(folder: pathlib.Path, plan: Plan) -> list[tuple[Any, ...]]:
    """A line of cells.csv for each cell."""
    lines = [(*entry.cell, "failed", entry.reason, *([None] * len(SHOWN_METRICS)), "") for entry in plan.refused]
    for job in plan.jobs:
        of_cell: dict[tuple[str, str, int | None], dict[str, Row]] = {}
        outcome = jobs.read_outcome(folder, job.name)
        if outcome and outcome.is_done:
            for row in collected.read_run(folder / jobs.RUNS / job.name):
                of_cell.setdefault((row.attack, row.defense, row.seed), {})[row.metric] = row
        for cell in job.cells:
            rows = of_cell.get((cell.attack, cell.defense, cell.seed), {})
            if not rows:  # a hybrid that is left out as a whole has no row of its parts
                rows = of_cell.get((cell.attack.partition(" in ")[2], cell.defense, cell.seed), {})
            status, reason = status_of(outcome, rows)
            values = [rows[name].value if name in rows else None for name in SHOWN_METRICS]
            lines.append((*cell, status, reason, *values, job.name))
    return lines


def status_of(outcome: jobs.Outcome | None, rows: Mapping[str, Row]) -> tuple[str, str]:
    """The status of a cell, and why it has no result.

    Args:
        outcome: of its job.
        rows: metric -> the cell's row; empty if the results do not have the cell.
    """
    if outcome is None:
        return "not run", "the grid was interrupted"
    if not outcome.is_done:
        return "failed", outcome.reason
    if not rows:
        return "failed", "the run's results do not have this cell"
    first = next(iter(rows.values()))
    without = next((row for row in rows.values() if row.status != "done"), first)
    return without.status, without.reason


def _announce(folder: pathlib.Path, cells: Sequence[tuple[Any, ...]], log: StageLog) -> int:
    at = len(Cell._fields)
    counts: dict[str, int] = {}
    for line in cells:
        counts[line[at]] = counts.get(line[at], 0) + 1
    log.say(f"{len(cells)} cells: {', '.join(f'{count} {status}' for status, count in counts.items())}")
    reasons = dict.fromkeys((line[at], line[at + 1]) for line in cells if line[at] != "done")
    for status, reason in reasons:
        log.say(f"{status}: {reason}")
    log.say(f"cells: {folder / CELLS_FILE}")
    log.say(f"tables: {command_line.invocation('grid')} collect {folder}")
    return 0 if set(counts) <= {"done", "left out", "not tested"} else FAILED


# ---- Collecting ------------------------------------------------------------------------------------------------------


def read_rows(folder: pathlib.Path) -> list[Row]:
    """The rows of all runs below a folder. Of a grid, only the jobs of its file count, and its cells without a result are rows.

    Raises:
        InputError: there is no run, or a file of one is damaged.
    """
    rows: list[Row] = []
    grids = sorted(path.parent for path in folder.rglob(PLAN_FILE)) if folder.is_dir() else []
    for path in collected.find_runs(folder):
        if not any(path.is_relative_to(of) for of in grids):
            rows += collected.read_run(path)
    for of in grids:
        rows += _grid_rows(of)
    if not rows:
        raise InputError(f"{folder}: has no finished run with results of attacks and defenses")
    return rows


def _grid_rows(folder: pathlib.Path) -> list[Row]:
    rows: list[Row] = []
    _, record = collected.read_json(folder / PLAN_FILE)
    try:
        of_jobs = [(str(job["name"]), [_read_cell(cell) for cell in job["cells"]]) for job in record["jobs"]]
        refused = [(_read_cell(cell), str(cell["reason"])) for cell in record["refused"]]
    except (KeyError, TypeError) as error:
        raise InputError(f"{folder / PLAN_FILE}: is not the file of a grid ({error})") from None
    for name, cells in of_jobs:
        if not re.fullmatch(r"[\w.-]+", name):
            raise InputError(f"{folder / PLAN_FILE}: {shown(name)} is not the name of a job")
        outcome = jobs.read_outcome(folder, name)
        if outcome and outcome.is_done:
            rows += collected.read_run(folder / jobs.RUNS / name)
        else:
            status, reason = status_of(outcome, {})
            rows += [collected.without_result(cell, status, reason, folder / jobs.RUNS / name) for cell in cells]
    return rows + [collected.without_result(cell, "failed", reason, folder) for cell, reason in refused]


def _read_cell(record: Mapping[str, Any]) -> Cell:
    """A cell of grid.json.

    Raises:
        KeyError, TypeError: it is none.
    """
    cell = Cell(**{name: record[name] for name in Cell._fields})
    for name, value in cell._asdict().items():
        if type(value) is not (int if name == "seed" else str):
            raise TypeError(
                f"{name} {shown(value)} of a cell is not {'a whole number' if name == 'seed' else 'a text'}"
            )
    return cell


def collect(folders: Sequence[pathlib.Path], config: CollectConfig, console: Console) -> int:
    """Write the rows, or the tables and figures, of all runs below some folders; returns the exit status.

    Raises:
        InputError: there is no run, a file of one is damaged, no run has a wanted metric, or a library is missing.
    """
    if not folders:
        raise InputError(f"collect needs a folder: {command_line.invocation('grid')} collect runs/grid/NAME")
    if config.metrics and config.format in ("csv", "parquet"):
        raise InputError(
            f"--format={config.format} has every number, so --metrics chooses nothing; leave out one of the two"
        )
    of_run: dict[pathlib.Path, tuple[int, list[Row]]] = {}
    for number, folder in enumerate(folders):
        for run, of_it in itertools.groupby(read_rows(folder), lambda row: row.run):
            # A folder may be in another.
            first, rows_of_it = of_run.setdefault(pathlib.Path(run).resolve(), (number, []))
            if first == number:
                rows_of_it += of_it
    rows = [row for _, rows_of_it in of_run.values() for row in rows_of_it]
    known = dict.fromkeys(row.metric for row in rows if row.value is not None)
    for name in config.metrics if known else ():
        check_choice("--metrics", name, known)
    output = config.output or folders[0] / COLLECTED
    file = output / FORMATS[config.format]
    written = [file]
    if config.format == "csv":
        atomic.write_bytes(file, csv_text(Row._fields, rows).encode())
    elif config.format == "parquet":
        atomic.write_bytes(file, collected.to_parquet(rows))
    else:
        tables = collected.tables(rows, config.metrics)
        written += [plots.save(figure, output / name) for name, figure in collected.figures(rows)]
        head, write = ("", to_markdown) if config.format == "md" else (LATEX_HEAD, to_latex)
        text = head + "\n".join(map(write, tables))
        atomic.write_bytes(file, text.encode())
        for table in tables:
            console.print(to_rich(table), highlight=False)
    console.print(printable(f"{len(rows):,} rows of {len({row.run for row in rows}):,} runs"), highlight=False)
    for path in written:
        console.print(str(path), highlight=False, soft_wrap=True)
    return 0

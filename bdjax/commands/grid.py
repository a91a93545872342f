"""Grids: many experiments, attacks, defenses and seeds as jobs, here or under Slurm; results as tables.

Cells that share an experiment, a dataset and its networks are one job, whose attacks and seeds are members of the same calls.
The same command continues an interrupted grid: finished jobs are left alone, interrupted ones continue from their last epoch,
failed ones are tried again.
"""

import contextlib
import hashlib
import json
import os
import pathlib
import re
import resource
import threading
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
from rich.console import Console

from bdjax import atomic, commands, interruption
from bdjax.datasets.files import free_memory
from bdjax.errors import InputError
from bdjax.reporting import collected, plots
from bdjax.reporting.collected import Row
from bdjax.reporting.tables import Table, to_latex, to_markdown, to_rich
from bdjax.run import command_line, grid_file, jobs
from bdjax.run.experiment import Experiment
from bdjax.run.folder import describe_environment
from bdjax.run.grid_file import Block, GridFile, Partition
from bdjax.run.lock import lock
from bdjax.run.log import StageLog, format_seconds
from bdjax.run.text import csv_text, printable
from bdjax.settings import Amount, Count, shown
from bdjax.training import ensemble, memory, processes
from bdjax.workflows import grid
from bdjax.workflows.grid import Cell, Job, Plan

EXPERIMENTS = ("ta-kd", "attack", "lfd", "abm", "vbd", "robust-kd")
"""Commands that a grid may run."""
PLAN_FILE, RUNS, CELLS_FILE, COLLECTED = "grid.json", "runs", "cells.csv", "collected"
FORMATS = {"md": "tables.md", "latex": "tables.tex", "csv": "rows.csv", "parquet": "rows.parquet"}
FAILED = 1
"""Exit status of a grid with cells without a result."""
SHOWN_METRICS = ("cda", "asr", "f1")
LATEX_HEAD = "% Needs \\usepackage{booktabs}; \\input this file.\n"


@dataclass(frozen=True, kw_only=True)
class GridConfig:
    """The flags of a grid."""

    executor: Literal["local", "slurm"] = "local"
    """local: processes on this machine; slurm: jobs in its queue, with the [partitions] of the file"""
    output: pathlib.Path | None = None
    """the grid's folder; by default runs/grid/<name of the file>"""
    workers: Count = 1
    """local jobs at a time; they divide the cores among themselves"""
    gpus: tuple[Amount, ...] = ()
    """GPUs of this machine for local jobs, one for each worker in turn; without, local jobs compute on the CPU"""
    plan: bool = False
    """print the jobs, and start none"""


@dataclass(frozen=True, kw_only=True)
class CollectConfig:
    """The flags of `collect`."""

    format: Literal["md", "latex", "csv", "parquet"] = "md"
    """md, latex: tables and figures; csv, parquet: a row for each number"""
    output: pathlib.Path | None = None
    """where the files are written; by default collected/ in the first folder"""
    metrics: tuple[str, ...] = ()
    """metrics of the tables; by default cda, asr and f1 where they are known"""


@dataclass(frozen=True)
class Work:
    """A job in its own process: what submitit calls."""

    command: str
    """a key of `commands.COMMANDS`"""
    arguments: tuple[str, ...]
    folder: str
    """of the grid, absolute"""
    name: str
    owner: int | None = None
    """process of the grid, without which a local job ends; None under Slurm"""

    def __call__(self) -> None:
        """Run the command in the job's folder, and write what came of it."""
        folder = pathlib.Path(self.folder)
        is_first = int(os.environ.get("SLURM_PROCID", "0")) == 0
        with interruption.handled(), _ending_with(self.owner):
            # Another process may still be about to end, or have been started for the same job.
            held = _wait_for_lock(folder / jobs.SUBMITTED / self.name) if is_first else None
            known = jobs.read_outcome(folder, self.name)
            if known is None or not known.is_done:
                start = time.monotonic()
                reason = self._run(folder)
                used = [resource.getrusage(of) for of in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
                cpu = sum(usage.ru_utime + usage.ru_stime for usage in used)
                if processes.is_primary():
                    outcome = jobs.Outcome(not reason, reason, round(time.monotonic() - start, 1), round(cpu, 1))
                    jobs.write_outcome(folder, self.name, outcome)
            del held

    def checkpoint(self) -> Any:
        """What submitit queues again when Slurm's time is over or the job has to make room: the same job, which continues."""
        return jobs.again(self)

    def _run(self, folder: pathlib.Path) -> str:
        """Run the command; why it failed, or nothing."""
        try:
            command_line.use_compilation_cache()
            ensemble.use_every_core()
            if int(os.environ.get("SLURM_NTASKS", "1")) > 1:
                processes.start(processes.Flags())
            output = folder / RUNS / self.name
            commands.load(self.command).main([*self.arguments, f"--output={output}"])
            return ""
        except Exception as error:
            interruption.check()
            processes.report_failure(error)
            if isinstance(error, (InputError, processes.ProcessError)):
                return printable(str(error))
            traceback.print_exc()
            return printable(f"{type(error).__name__}: {error}")


@contextlib.contextmanager
def _ending_with(owner: int | None) -> Iterator[None]:
    """Within the block, the end of a process, however it came, interrupts this one."""
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.5):
            try:
                os.kill(owner, 0)
            except OSError:  # it is gone, or its number is another user's
                os.kill(os.getpid(), interruption.SIGNALS[1])
                return

    if owner is not None:
        threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        over.set()


def _wait_for_lock(folder: pathlib.Path) -> object:
    folder.mkdir(parents=True, exist_ok=True)
    while True:
        with contextlib.suppress(InputError):
            return lock(folder, folder)
        interruption.check()
        time.sleep(0.3)


# ---- Running ---------------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None, log: StageLog | None = None) -> int:
    """Run a grid, or collect results; returns the exit status.

    Args:
        arguments: `FILE.toml` or `collect FOLDER...`, then flags; None for those of the process.
        log: where progress is printed.

    Raises:
        InputError: the file, a flag or a folder cannot be used.
    """
    words, flags = command_line.split_words(arguments)
    if words[:1] == ["collect"]:
        config = command_line.parse(
            CollectConfig, {}, flags, prog="grid.py collect FOLDER...", description=COLLECT_HELP
        )
        return _collect([pathlib.Path(word) for word in words[1:]], config, (log or StageLog()).console)
    config = command_line.parse(GridConfig, {}, flags, prog="grid.py FILE.toml", description=__doc__)
    if len(words) != 1:
        raise InputError(
            "give the grid's TOML file first: python experiments/grid.py grid.toml; or collect and folders"
        )
    return _run(pathlib.Path(words[0]), config, log or StageLog())


COLLECT_HELP = "Collect the results of runs, or of a grid: rows, tables, ranks and figures. Give the folders first."


def _experiments() -> dict[str, Experiment]:
    return {experiment.name: experiment for experiment in (commands.load(name).EXPERIMENT for name in EXPERIMENTS)}


def _run(path: pathlib.Path, config: GridConfig, log: StageLog) -> int:
    # The devices are for the jobs: on a GPU, JAX would take most of its memory here.
    jax.config.update("jax_platforms", "cpu")
    file = grid_file.read(path)
    jobs.check_installed()
    if config.executor == "slurm" and not jobs.has_slurm():
        raise InputError("--executor slurm: there is no sbatch and srun on this machine; use --executor=local")
    with log.stage("plan") as stage:
        quiet = StageLog(Console(quiet=True))
        plan = grid.make_plan(file, _experiments(), partial(memory_limit, file, config), quiet)
        stage.detail = f"{len(plan.cells)} cells in {len(plan.jobs)} jobs"
    if config.plan:
        log.console.print(to_rich(plan_table(plan)), highlight=False)
        return 0
    folder = _folder(config.output or pathlib.Path("runs") / "grid" / path.stem)
    held = lock(folder, folder)
    record = {
        "file": path.name,
        "sha256": hashlib.sha256(file.text.encode()).hexdigest(),
        **describe_environment(),
        "jobs": [{**job._asdict(), "cells": [cell._asdict() for cell in job.cells]} for job in plan.jobs],
        "refused": [{**entry.cell._asdict(), "reason": entry.reason} for entry in plan.refused],
    }
    atomic.write_bytes(folder / PLAN_FILE, json.dumps(record, indent=2).encode())
    known = {job.name: jobs.read_outcome(folder, job.name) for job in plan.jobs}
    waiting = [job for job in plan.jobs if not (known[job.name] and known[job.name].is_done)]
    if done := len(plan.jobs) - len(waiting):
        log.note("jobs", f"{done} of {len(plan.jobs)} are done already")
    _run_jobs(folder, file, waiting, config, log)
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


def _run_jobs(folder: pathlib.Path, file: GridFile, waiting: Sequence[Job], config: GridConfig, log: StageLog) -> None:
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
        command = job.experiment.replace("_", "-")
        work = Work(command, job.arguments, str(folder), name, os.getpid() if is_local else None)
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
            for row in collected.read_run(folder / RUNS / job.name):
                of_cell.setdefault((row.attack, row.defense, row.seed), {})[row.metric] = row
        for cell in job.cells:
            rows = of_cell.get((cell.attack, cell.defense, cell.seed), {})
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
    return first.status, first.reason


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
    log.say(f"tables: python experiments/grid.py collect {folder}")
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
        of_jobs = [(str(job["name"]), [Cell(**cell) for cell in job["cells"]]) for job in record["jobs"]]
        refused = [(Cell(**{name: cell[name] for name in Cell._fields}), cell["reason"]) for cell in record["refused"]]
    except (KeyError, TypeError) as error:
        raise InputError(f"{folder / PLAN_FILE}: is not the file of a grid ({error})") from None
    for name, cells in of_jobs:
        if not re.fullmatch(r"[\w.-]+", name):
            raise InputError(f"{folder / PLAN_FILE}: {shown(name)} is not the name of a job")
        outcome = jobs.read_outcome(folder, name)
        if outcome and outcome.is_done:
            rows += collected.read_run(folder / RUNS / name)
        else:
            status, reason = status_of(outcome, {})
            rows += [collected.without_result(cell, status, reason, folder / RUNS / name) for cell in cells]
    return rows + [collected.without_result(cell, "failed", reason, folder) for cell, reason in refused]


def _collect(folders: Sequence[pathlib.Path], config: CollectConfig, console: Console) -> int:
    if not folders:
        raise InputError("collect needs a folder: python experiments/grid.py collect runs/grid/NAME")
    rows = [row for folder in folders for row in read_rows(folder)]
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

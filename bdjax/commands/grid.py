"""Grids: many experiments, attacks, defenses and seeds as jobs, here or under Slurm; results as tables.

Cells that share an experiment, a dataset and its networks are one job, whose attacks and seeds are members of the same calls.
The same command continues an interrupted grid: finished jobs are left alone, interrupted jobs continue from their last epoch,
and failed jobs are tried again.
"""

import contextlib
import os
import pathlib
import resource
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bdjax import commands, interruption
from bdjax.errors import InputError, ProcessError
from bdjax.run import backend, command_line, jobs
from bdjax.run.checks import check_ranges
from bdjax.run.configs.grid import CollectConfig, GridConfig
from bdjax.run.experiment import Experiment
from bdjax.run.lock import lock
from bdjax.run.text import printable
from bdjax.training import process_flags

if TYPE_CHECKING:
    from bdjax.run.log import StageLog

EXPERIMENTS = ("ta-kd", "attack", "lfd", "abm", "vbd", "robust-kd")
"""Commands that a grid may run."""
COLLECT = "Collect the results of runs, or of a grid: rows, tables, ranks and figures. Give the folders first."


def experiments() -> dict[str, Experiment]:
    """What a grid's file may name."""
    return {experiment.name: experiment for experiment in (commands.load(name).EXPERIMENT for name in EXPERIMENTS)}


def main(arguments: Sequence[str] | None = None, log: "StageLog | None" = None) -> int:
    """Run a grid, or collect results; returns the exit status.

    Args:
        arguments: `FILE.toml` or `collect FOLDER...`, then flags; None for those of the process.
        log: where progress is printed.

    Raises:
        InputError: the file, a flag or a folder cannot be used.
    """
    words, flags = command_line.split_words(arguments)
    program = command_line.program("grid")
    if words[:1] == ["collect"]:
        config = command_line.parse(
            CollectConfig, {}, flags, about_processes="", prog=f"{program} collect FOLDER...", description=COLLECT
        )
        check_ranges(config)
        from bdjax.run.log import StageLog  # takes seconds, which --help need not wait for
        from bdjax.workflows import grid_run

        return grid_run.collect([pathlib.Path(word) for word in words[1:]], config, (log or StageLog()).console)
    config = command_line.parse(
        GridConfig, {}, flags, about_processes="", prog=f"{program} FILE.toml", description=__doc__
    )
    check_ranges(config)
    if len(words) != 1:
        raise InputError(
            f"give the grid's TOML file first: {command_line.invocation('grid')} grid.toml; or collect and folders"
        )
    from bdjax.run.log import StageLog
    from bdjax.workflows import grid_run

    return grid_run.run(pathlib.Path(words[0]), config, experiments(), Work, log or StageLog())


@dataclass(frozen=True)
class Work:
    """A job in its own process: what submitit calls."""

    experiment: str
    """name of the command's module"""
    arguments: tuple[str, ...]
    folder: str
    """of the grid, absolute"""
    name: str
    owner: int | None = None
    """process of the grid, without which a local job ends; None under Slurm"""

    def __call__(self) -> None:
        """Run the command in the job's folder, and write what came of it."""
        from bdjax.training import processes

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
        from bdjax.training import processes

        try:
            backend.set_up()
            if int(os.environ.get("SLURM_NTASKS", "1")) > 1:
                processes.start(process_flags.Flags())
            output = folder / jobs.RUNS / self.name
            commands.load(self.experiment.replace("_", "-")).main([*self.arguments, f"--output={output}"])
            return ""
        except Exception as error:
            interruption.check()
            processes.report_failure(error)
            if isinstance(error, (InputError, ProcessError)):
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

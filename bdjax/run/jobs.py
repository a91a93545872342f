"""Jobs in processes of their own, by submitit: on this machine, or under Slurm. The only module that imports it.

What a job has done is a file that the job itself writes, whole or not at all, so neither a process that is killed nor a lost
connection to Slurm leaves a doubt: a job without that file has not ended.
"""

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from bdjax import atomic, extras, interruption
from bdjax.run.grid_file import Partition

RUNS, OUTCOMES, SUBMITTED, LOGS = "runs", "jobs", "submitted", "log"
"""Folders of a grid: the run of each job, what each has done, where it was sent, what it prints."""
LOCAL_MINUTES = 60 * 24 * 365
"""Time limit of a local job; submitit's default is two minutes."""
MOST_TIMEOUTS = 100
"""How often a Slurm job whose time is over is queued again; submitit's default is three times."""
SECONDS_BETWEEN_LOOKS = {"local": 0.2, "slurm": 5.0}
GRACE = {"local": 0.0, "slurm": 30.0}
"""Seconds that a job may be over before its outcome can be seen here."""
_WAITING = ("READY", "PENDING", "RUNNING", "REQUEUED", "COMPLETING", "PREEMPTED", "SUSPENDED", "CONFIGURING", "UNKNOWN")


class Outcome(NamedTuple):
    """What a job has done."""

    is_done: bool
    reason: str
    """why it is not done; empty if it is"""
    seconds: float = 0.0
    cpu_seconds: float = 0.0


def read_outcome(folder: Path, name: str) -> Outcome | None:
    """The outcome of a job of a grid; None if it has not ended, or its file is damaged."""
    try:
        return Outcome(**json.loads((folder / OUTCOMES / f"{name}.json").read_bytes()))
    except (OSError, ValueError, TypeError):
        return None


def write_outcome(folder: Path, name: str, outcome: Outcome) -> None:
    """Write the outcome of a job."""
    atomic.write_bytes(folder / OUTCOMES / f"{name}.json", json.dumps(outcome._asdict(), indent=2).encode())


def drop_outcome(folder: Path, name: str) -> None:
    """Forget the outcome of a job that failed, before it is tried again."""
    (folder / OUTCOMES / f"{name}.json").unlink(missing_ok=True)


# ---- Where jobs run --------------------------------------------------------------------------------------------------


def shares(cores: Sequence[int], workers: int) -> list[tuple[int, ...]]:
    """The cores of each of some workers, as equal as possible; with more workers than cores, several share a core."""
    if workers >= len(cores):
        return [(cores[number % len(cores)],) for number in range(workers)]
    ends = [len(cores) * (number + 1) // workers for number in range(workers)]
    return [tuple(cores[start:end]) for start, end in zip([0, *ends], ends, strict=False)]


def own_cores() -> list[int]:
    """The cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


@contextlib.contextmanager
def on_cores(cores: Sequence[int]) -> Iterator[None]:
    """Processes that are started within the block use these cores only, and so many threads, where the system has such limits.
    They ignore Ctrl-C, which a terminal sends to all processes: `stop` ends them."""
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    before, environment = own_cores(), {name: os.environ.get(name) for name in names}
    can_set = hasattr(os, "sched_setaffinity")
    is_main = threading.current_thread() is threading.main_thread()
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN) if is_main else None
    try:
        os.environ.update(dict.fromkeys(names, str(len(cores))))
        if can_set:
            with contextlib.suppress(OSError):
                os.sched_setaffinity(0, cores)
        yield
    finally:
        if is_main:
            signal.signal(signal.SIGINT, handler)
        if can_set:
            with contextlib.suppress(OSError):
                os.sched_setaffinity(0, before)
        for name, value in environment.items():
            os.environ.pop(name, None) if value is None else os.environ.__setitem__(name, value)


def check_installed() -> None:
    """Refuse to begin without submitit.

    Raises:
        InputError: it is not installed.
    """
    extras.submitit()


def again(function: Callable[[], None]) -> Any:
    """What submitit queues when a job is to be queued again."""
    return extras.submitit().helpers.DelayedSubmission(function)


def local_executor(folder: Path, gpu: int | None = None) -> Any:
    """An executor that starts a process on this machine at once.

    Args:
        folder: of the grid.
        gpu: the GPU that the process sees; None for none.
    """
    executor = extras.submitit().AutoExecutor(folder / LOGS, cluster="local")
    seen = {} if gpu is None else {"gpus_per_node": 1, "local_visible_gpus": (gpu,)}
    executor.update_parameters(timeout_min=LOCAL_MINUTES, **seen)
    return executor


def slurm_executor(folder: Path, name: str | None, partition: Partition) -> Any:
    """An executor that queues a job under Slurm.

    Args:
        folder: of the grid, which all nodes see.
        name: of the partition; None for Slurm's default.
        partition: what a job asks for.
    """
    executor = extras.submitit().SlurmExecutor(folder / LOGS, max_num_timeout=MOST_TIMEOUTS)
    executor.update_parameters(**slurm_parameters(name, partition))
    return executor


def slurm_parameters(name: str | None, partition: Partition) -> dict[str, Any]:
    """The parameters of a partition, by submitit's names; those that are not set are left out."""
    asked = {entry.name: getattr(partition, entry.name) for entry in dataclasses.fields(partition)}
    asked.pop("device_gb")
    memory = asked.pop("mem_gb")
    asked |= {
        "partition": name,
        "job_name": "bdjax",
        "ntasks_per_node": asked.pop("tasks_per_node"),
        "gpus_per_node": asked.pop("gpus_per_node") or None,
        "mem": None if memory is None else f"{int(1024 * memory)}MB",
        "setup": list(asked.pop("setup")) or None,
    }
    return {key: value for key, value in asked.items() if value is not None}


def has_slurm() -> bool:
    """Whether this machine can queue jobs under Slurm."""
    return shutil.which("sbatch") is not None and shutil.which("srun") is not None


# ---- Following them --------------------------------------------------------------------------------------------------


def record(folder: Path, name: str, executor: str, job: Any) -> None:
    """Write where a job was sent, so that a restarted grid finds it."""
    sent = {"executor": executor, "job": job.job_id}
    atomic.write_bytes(folder / SUBMITTED / f"{name}.json", json.dumps(sent, indent=2).encode())


def sent_to_slurm(folder: Path, name: str) -> Any | None:
    """The job of an earlier grid process that Slurm still has; None if there is none."""
    try:
        sent = json.loads((folder / SUBMITTED / f"{name}.json").read_bytes())
        number = sent["job"] if sent["executor"] == "slurm" else ""
    except (OSError, ValueError, TypeError, KeyError):
        return None
    if not (isinstance(number, str) and number.isdecimal()):
        return None
    job = extras.submitit().SlurmJob(folder / LOGS, number)
    return None if is_over(job) else job


def is_over(job: Any) -> bool:
    """Whether a job's process has ended or its place in Slurm's queue is gone, with or without an outcome."""
    if type(job).__name__ == "SlurmJob" and shutil.which("squeue"):
        queued = _queue(int(time.monotonic() / SECONDS_BETWEEN_LOOKS["slurm"]))
        return queued is not None and job.job_id not in queued
    return not set(job.state.upper().split()) & set(_WAITING)


@lru_cache(1)
def _queue(look: int) -> frozenset[str] | None:
    """The numbers of this user's jobs in Slurm's queue, asked for once for each look; None if Slurm does not answer. The
    accounting, which submitit asks, need not exist."""
    del look
    command = ["squeue", "--noheader", "--user", str(os.getuid()), "--format", "%i"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return None if done.returncode else frozenset(done.stdout.split())


def follow(
    waiting: Sequence[str],
    start: Callable[[str, int], Any],
    ended: Callable[[str], None],
    is_done: Callable[[str], bool],
    at_once: int,
    pause: float,
    grace: float = 0.0,
) -> None:
    """Run jobs, at most so many at a time, until all have ended. If that is interrupted, the jobs that run are not waited for.

    Args:
        waiting: names of the jobs.
        start: (name, slot below `at_once`) -> the started job.
        ended: called with the name of each job that has ended.
        is_done: whether a job is known to have ended, although its process or its place in a queue may still be there.
        at_once: most jobs that run at a time.
        pause: seconds between two looks at them.
        grace: seconds that a job may be over without an outcome before it counts as ended.
    """
    queue, running, over = list(reversed(waiting)), {}, {}
    while queue or running:
        interruption.check()
        free = [slot for slot in range(at_once) if slot not in running]
        for slot in free[: len(queue)]:
            name = queue.pop()
            running[slot] = name, start(name, slot)
        for slot, (name, job) in list(running.items()):
            if not is_done(name):
                if not is_over(job):
                    over.pop(name, None)
                    continue
                if time.monotonic() - over.setdefault(name, time.monotonic()) < grace:
                    continue
            del running[slot]
            ended(name)
        if running:
            time.sleep(pause)


def stop(jobs: Sequence[Any], patience: float = 20.0) -> None:
    """Interrupt local jobs, as SIGTERM does, and wait for the end of their processes."""
    for job in jobs:
        with contextlib.suppress(OSError, ValueError):
            os.kill(int(job.job_id), signal.SIGTERM)  # submitit's process passes it on to the job's
    end = time.monotonic() + patience
    while time.monotonic() < end and not all(map(is_over, jobs)):
        time.sleep(0.1)


def log_of(folder: Path, name: str) -> Path | None:
    """The file with the errors that a job printed; None if it was never sent."""
    try:
        sent: Mapping[str, Any] = json.loads((folder / SUBMITTED / f"{name}.json").read_bytes())
        return folder / LOGS / f"{sent['job']}_0_log.err"
    except (OSError, ValueError, TypeError, KeyError):
        return None

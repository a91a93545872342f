"""Contenders in processes of their own that take turns, so that a machine's moods hit all of them alike.

Processes keep thread pools, allocators and peaks of memory apart, and a contender that hangs can be killed. All of a
setting's are alive together, asleep unless it is their turn; every round starts with another one.
"""

import contextlib
import json
import math
import os
import pathlib
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import bdjax

START_LIMIT = 300.0
"""Seconds for a process to start and to load its libraries; nobody is measured by it."""


@dataclass(frozen=True)
class Schedule:
    """How often and how long each contender's turn is, and what is too long."""

    rounds: int
    seconds_per_turn: float
    time_limit: float
    """seconds that the first turn, one epoch, may take"""
    compile_limit: float
    """seconds"""


class TooLongError(Exception):
    """No answer came in time."""


class FailedError(Exception):
    """The worker said that it cannot go on, or died; the message says why."""


class Worker:
    """A contender's process."""

    def __init__(
        self, spec: Mapping[str, Any], scratch: pathlib.Path | None = None, *, own_session: bool = True
    ) -> None:
        """Start it.

        Args:
            spec: what it is, as `worker.make_contender` takes it.
            scratch: a folder for what its compilers leave behind; None for the one that this process was given.
            own_session: whether nobody but us ends it: a terminal's Ctrl-C does not reach it. Else it ends with this process.
        """
        root = str(pathlib.Path(bdjax.__file__).resolve().parents[1])
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH", "")))),
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # or the first one on a GPU would leave nothing to the others
            "JAX_ENABLE_COMPILATION_CACHE": "false",  # compile times of a warm cache say nothing
            "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1",
        }
        if scratch is not None:
            environment["TORCHINDUCTOR_CACHE_DIR"] = str(scratch)
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  # it lives as long as the worker
        self._process = subprocess.Popen(
            [sys.executable, "-m", "bdjax.benchmarking.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=environment,
            start_new_session=own_session,
        )
        self._received = b""
        self.tell(spec)

    def tell(self, message: Mapping[str, Any]) -> None:
        """Send a request without waiting for its answer."""
        with contextlib.suppress(BrokenPipeError):  # if it died, the answer that does not come says so
            self._process.stdin.write(json.dumps(message).encode() + b"\n")
            self._process.stdin.flush()

    def ask(self, limit: float, **request: Any) -> dict[str, Any]:
        """Send a request and wait at most `limit` seconds for its answer.

        Raises:
            TooLongError: if there is none in time; the worker may still be at it.
            FailedError: if the worker cannot go on.
        """
        self.tell(request)
        return self.hear(limit)

    def hear(self, limit: float) -> dict[str, Any]:
        """Wait for an answer; raises what `ask` raises."""
        stdout, deadline = self._process.stdout.fileno(), time.monotonic() + limit
        while b"\n" not in self._received:
            left = None if math.isinf(limit) else max(0.0, deadline - time.monotonic())
            if not select.select([stdout], [], [], left)[0]:
                raise TooLongError
            received = os.read(stdout, 1 << 16)
            if not received:
                raise FailedError(f"died with status {self._process.wait()}{self._last_words()}")
            self._received += received
        line, _, self._received = self._received.partition(b"\n")
        answer = json.loads(line)
        if "error" in answer:
            raise FailedError(answer["error"])
        return answer

    def _last_words(self) -> str:
        self._log.seek(0)
        lines = self._log.read().decode("utf-8", "replace").strip().splitlines()
        return f": {lines[-1][:120]}" if lines else ""

    def end(self) -> None:
        """Kill it and whatever it started; harmless if it is gone."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for file in (self._process.stdin, self._process.stdout, self._log):
            with contextlib.suppress(BrokenPipeError):
                file.close()


class Stable:
    """The contenders that are alive. A context: at its end nobody is.

    A contender that two settings have in common, such as one that trains a single model however many members there are,
    stays between them and is compiled once.
    """

    def __init__(self) -> None:
        self._scratch = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        self._workers: dict[str, Worker] = {}  # by specification
        self._known: dict[str, dict[str, Any]] = {}  # what came of starting and compiling

    def __enter__(self) -> "Stable":
        return self

    def __exit__(self, *exception: object) -> None:
        for worker in self._workers.values():
            worker.end()
        self._scratch.cleanup()

    def race(
        self,
        specs: Mapping[str, Mapping[str, Any]],
        schedule: Schedule,
        *,
        on_turn: Callable[[int, str], None] = lambda turns, name: None,
        keep: Iterable[Mapping[str, Any]] = (),
    ) -> dict[str, dict[str, Any]]:
        """Let contenders run in turn.

        Args:
            specs: name -> specification, as `worker.make_contender` takes it.
            schedule: how long each turn is.
            on_turn: called with 1 and a contender's name before each of its turns, and with 0 before it compiles.
            keep: specifications of contenders that will be needed again; the others end.

        Returns:
            name -> what came of it. "status" is "done"; "slow" (its first turn took longer than the limit), "slow to
            compile"; or "failed", and "reason" says why. Where it got so far there are "versions", "compile_seconds",
            "first_seconds", "turns" (one a round: "seconds" and "work", in whatever unit the contender counts) and
            "peak_mebibytes".
        """
        keys = {name: json.dumps(spec, sort_keys=True) for name, spec in specs.items()}
        self._end_others({*keys.values()})
        fresh = [name for name, key in keys.items() if key not in self._known]
        for name in fresh:
            folder = tempfile.mkdtemp(dir=self._scratch.name)
            self._workers[keys[name]] = Worker(specs[name], pathlib.Path(folder))
            self._known[keys[name]] = {"status": "done"}
        for name in fresh:
            self._attempt(keys[name], "slow to start", START_LIMIT)
        # One at a time from here on: all have loaded what they need and are asleep.
        for name in fresh:
            on_turn(0, f"{name} compiles")
            self._attempt(keys[name], "slow to compile", schedule.compile_limit, do="compile")
            first = self._attempt(keys[name], "slow", schedule.time_limit, remember=False, do="turn", seconds=0.0)
            if first is not None:
                self._known[keys[name]]["first_seconds"] = first["seconds"]
        turns: dict[str, list[dict[str, float]]] = {name: [] for name in specs}
        guard = schedule.seconds_per_turn + 3 * schedule.time_limit
        request = {"do": "turn", "seconds": schedule.seconds_per_turn}
        for number in range(schedule.rounds):
            for name in rotate([name for name, key in keys.items() if key in self._workers], number):
                on_turn(1, name)
                turn = self._attempt(keys[name], "slow", guard, remember=False, **request)
                if turn is not None:
                    turns[name].append(turn)
        for key in keys.values():
            self._attempt(key, "slow", START_LIMIT, do="memory")
        outcomes = {name: {**self._known[key], "turns": turns[name]} for name, key in keys.items()}
        self._end_others({json.dumps(spec, sort_keys=True) for spec in keep})
        return outcomes

    def _attempt(
        self, key: str, slow: str, limit: float, *, remember: bool = True, **request: Any
    ) -> dict[str, Any] | None:
        """The answer to a request, or None if there is none: then the contender is out, and known to be."""
        if key not in self._workers:
            return None
        try:
            answer = self._workers[key].ask(limit, **request) if request else self._workers[key].hear(limit)
        except TooLongError:
            self._known[key]["status"] = slow
        except FailedError as error:
            self._known[key] |= {"status": "failed", "reason": str(error)}
        else:
            if remember:
                self._known[key] |= answer
            return answer
        self._workers.pop(key).end()
        return None

    def _end_others(self, keys: set[str]) -> None:
        for key in self._known.keys() - keys:
            del self._known[key]
            if key in self._workers:
                self._workers.pop(key).end()


def rotate(names: Sequence[str], by: int) -> Sequence[str]:
    """The same names, the first `by` of them last."""
    by %= max(1, len(names))
    return (*names[by:], *names[:by])

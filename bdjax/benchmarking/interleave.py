"""Contenders in separate processes that take turns, so that changes in the machine's load affect all of them alike.

Separate processes have separate thread pools, allocators and memory peaks, and a contender that hangs can be killed. All
contenders of a setting run at the same time and sleep between their turns; every round starts with a different contender.
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
"""Seconds for a process to start and to load its libraries, which is not part of any measurement."""


@dataclass(frozen=True)
class Schedule:
    """Number and length of each contender's turns, and time limits."""

    rounds: int
    seconds_per_turn: float
    time_limit: float
    """seconds allowed for the first turn of one epoch"""
    compile_limit: float
    """seconds allowed for compilation"""


class TooLongError(Exception):
    """There was no reply in time."""


class FailedError(Exception):
    """The worker reported an error or died; the message has the reason."""


class Worker:
    """The process of a contender."""

    def __init__(
        self, spec: Mapping[str, Any], scratch: pathlib.Path | None = None, *, own_session: bool = True
    ) -> None:
        """Start the process.

        Args:
            spec: the contender, as for `worker.make_contender`.
            scratch: folder for the compiler's temporary files; None for the default of this process.
            own_session: whether the process is in a new session, so that Ctrl-C in the terminal does not reach it. Otherwise it
                is in this process's session.
        """
        root = str(pathlib.Path(bdjax.__file__).resolve().parents[1])
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH", "")))),
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # otherwise the first process would take all of the GPU's memory
            "JAX_ENABLE_COMPILATION_CACHE": "false",  # a warm cache would hide compile times
            "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1",
        }
        if scratch is not None:
            environment["TORCHINDUCTOR_CACHE_DIR"] = str(scratch)
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  # closed by `end`
        self._process = subprocess.Popen(
            [sys.executable, "-m", "bdjax.benchmarking.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=environment,
            start_new_session=own_session,
        )
        self._received = b""
        self.send(spec)

    def send(self, message: Mapping[str, Any]) -> None:
        """Send a request without waiting for the reply."""
        with contextlib.suppress(BrokenPipeError):  # if the process died, `receive` raises
            self._process.stdin.write(json.dumps(message).encode() + b"\n")
            self._process.stdin.flush()

    def request(self, limit: float, **request: Any) -> dict[str, Any]:
        """Send a request and wait at most `limit` seconds for the reply.

        Raises:
            TooLongError: if there is no reply in time; the worker may still be busy.
            FailedError: if the worker reports an error or died.
        """
        self.send(request)
        return self.receive(limit)

    def receive(self, limit: float) -> dict[str, Any]:
        """Wait for a reply; raises the same errors as `request`."""
        stdout, deadline = self._process.stdout.fileno(), time.monotonic() + limit
        while b"\n" not in self._received:
            left = None if math.isinf(limit) else max(0.0, deadline - time.monotonic())
            if not select.select([stdout], [], [], left)[0]:
                raise TooLongError
            received = os.read(stdout, 1 << 16)
            if not received:
                raise FailedError(f"died with status {self._process.wait()}{self._last_log_line()}")
            self._received += received
        line, _, self._received = self._received.partition(b"\n")
        reply = json.loads(line)
        if "error" in reply:
            raise FailedError(reply["error"])
        return reply

    def _last_log_line(self) -> str:
        self._log.seek(0)
        lines = self._log.read().decode("utf-8", "replace").strip().splitlines()
        return f": {lines[-1][:120]}" if lines else ""

    def end(self) -> None:
        """Kill the process and its children; does nothing if it has already ended."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for file in (self._process.stdin, self._process.stdout, self._log):
            with contextlib.suppress(BrokenPipeError):
                file.close()


class WorkerPool:
    """The running contenders. A context manager, which ends all of them.

    A contender that consecutive settings share, such as one that trains a single model whatever the number of members, keeps
    running between them and is compiled once.
    """

    def __init__(self) -> None:
        self._scratch = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        self._workers: dict[str, Worker] = {}  # by specification
        self._known: dict[str, dict[str, Any]] = {}  # outcome of starting and compiling, by specification

    def __enter__(self) -> "WorkerPool":
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
        """Let contenders take turns.

        Args:
            specs: name -> specification, as for `worker.make_contender`.
            schedule: number and length of turns.
            on_turn: called with 1 and a contender's name before each of its turns, and with 0 before it compiles.
            keep: specifications of contenders to keep running; all others are ended.

        Returns:
            name -> outcome. "status" is "done", "slow" (its first turn took longer than the limit), "slow to compile", or
            "failed" with the "reason". As far as it got, there are "versions", "compile_seconds", "first_seconds", "turns" (one
            per round: "seconds" and "work", in the contender's unit) and "peak_mebibytes".
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
        # From here on one at a time: all have loaded their libraries and sleep.
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

    def learn(
        self,
        specs: Mapping[str, Mapping[str, Any]],
        limit: float,
        *,
        on_epoch: Callable[[str], None] = lambda name: None,
    ) -> dict[str, dict[str, Any]]:
        """Train contenders to the end, an epoch of each in turn, and measure their accuracy after each epoch.

        Args:
            specs: name -> specification, with "data" and "epochs".
            limit: seconds allowed for compilation, and for an epoch.
            on_epoch: called with a contender's name before each of its epochs.

        Returns:
            name -> outcome, as from `race`, without turns; with the "specification" and the finished "epochs", each with its
            "seconds" of training, "work" in images and the "accuracies" of its networks.
        """
        keys = {name: json.dumps(spec, sort_keys=True) for name, spec in specs.items()}
        epochs: dict[str, list[dict[str, Any]]] = {name: [] for name in specs}
        self._end_others(set())
        for name, key in keys.items():
            self._workers[key] = Worker(specs[name])
            self._known[key] = {"status": "done", "limit": limit}
        for key in keys.values():
            self._attempt(key, "slow to start", START_LIMIT)
        for key in keys.values():
            self._attempt(key, "slow to compile", limit, do="compile")
        for number in range(max((spec["epochs"] for spec in specs.values()), default=0)):
            for name in rotate([name for name, key in keys.items() if key in self._workers], number):
                on_epoch(name)
                turn = self._attempt(keys[name], "slow", limit, remember=False, do="turn", seconds=0.0)
                right = self._attempt(keys[name], "slow", limit, remember=False, do="accuracy")
                if turn is not None and right is not None:
                    epochs[name].append(turn | right)
        outcomes = {}
        for name, spec in specs.items():
            recorded = {field: value for field, value in spec.items() if field != "data"}  # a temporary file
            outcomes[name] = {**self._known[keys[name]], "specification": recorded, "epochs": epochs[name]}
        self._end_others(set())
        return outcomes

    def _attempt(
        self, key: str, slow: str, limit: float, *, remember: bool = True, **request: Any
    ) -> dict[str, Any] | None:
        """The reply to a request (without a request, the next reply); None if the contender failed, which ends it."""
        if key not in self._workers:
            return None
        try:
            reply = self._workers[key].request(limit, **request) if request else self._workers[key].receive(limit)
        except TooLongError:
            self._known[key]["status"] = slow
        except FailedError as error:
            self._known[key] |= {"status": "failed", "reason": str(error)}
        else:
            if remember:
                self._known[key] |= reply
            return reply
        self._workers.pop(key).end()
        return None

    def _end_others(self, keys: set[str]) -> None:
        for key in self._known.keys() - keys:
            del self._known[key]
            if key in self._workers:
                self._workers.pop(key).end()


def rotate(names: Sequence[str], by: int) -> Sequence[str]:
    """The names, rotated so that the first `by` come last."""
    by %= max(1, len(names))
    return (*names[by:], *names[:by])

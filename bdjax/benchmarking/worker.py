"""A process that holds one contender and waits for its turns: `python -m bdjax.benchmarking.worker`.

Lines of JSON in, lines of JSON out. The first line is the specification; then come `{"do": "compile"}`, `{"do": "turn",
"seconds": s}` and `{"do": "memory"}`. Each is answered by one line; an answer with "error" is the last. When standard input
ends, so does the worker. Between turns it sleeps in `readline` and takes nothing from those whose turn it is.
"""

import importlib
import importlib.util
import json
import math
import os
import sys
import time
import traceback
from collections.abc import Mapping
from typing import Any, TextIO

import numpy as np

from bdjax.benchmarking import interleave


class UnavailableError(RuntimeError):
    """This contender cannot be had here; the message says why, in a few words."""


def make_contender(spec: Mapping[str, Any]) -> Any:
    """The contender that a specification names; see `contenders` and `peer_pytorch` for what it can do.

    Each library is loaded only by those who need it, for its memory would count as theirs.
    """
    is_pytorch = spec["library"] == "pytorch"
    if is_pytorch and importlib.util.find_spec("torch") is None:
        raise UnavailableError("not installed")
    if is_pytorch and spec.get("form") and not spec["blocks"]:
        raise UnavailableError("no such network")
    if spec.get("processes", 1) > 1:
        return PerCore(spec)
    module = importlib.import_module(f"bdjax.benchmarking.{'peer_pytorch' if is_pytorch else 'contenders'}")
    if spec["task"] == "matmul":
        return module.Matmul(spec)
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (spec["rows"], *spec["shape"]), dtype=np.uint8)
    labels = random.integers(0, spec["num_classes"], spec["rows"], dtype=np.int32)
    return module.Training(spec, images, labels)


class PerCore:
    """As many copies of a contender as there are cores, each in a process and with a model of its own, all at work at once."""

    def __init__(self, spec: Mapping[str, Any]) -> None:
        single = {**spec, "processes": 1}
        self.workers = [interleave.Worker(single, own_session=False) for _ in range(spec["processes"])]
        self._hear("versions")

    def _hear(self, name: str) -> list[Any]:
        return [worker.hear(math.inf)[name] for worker in self.workers]

    def _ask(self, answer: str, **request: Any) -> list[Any]:
        for worker in self.workers:
            worker.tell(request)
        return self._hear(answer)

    def compile(self) -> float:
        """Seconds of the slowest."""
        return max(self._ask("compile_seconds", do="compile"))

    def epoch(self) -> int:
        """An epoch of each; returns the images of all."""
        return sum(self._ask("work", do="turn", seconds=0.0))

    def peak_bytes(self) -> int:
        """Of all processes together."""
        return round(2**20 * sum(self._ask("peak_mebibytes", do="memory")))


def take_turn(contender: Any, seconds: float) -> dict[str, float]:
    """Whole epochs, at least one, until so many seconds are over."""
    work = 0
    start = time.perf_counter()
    while True:
        work += contender.epoch()
        elapsed = time.perf_counter() - start
        if elapsed >= seconds:
            return {"seconds": elapsed, "work": work}


def peak_mebibytes(contender: Any) -> float:
    """Of the GPU's memory; on a CPU of the whole process, the interpreter and its libraries included."""
    on_gpu = contender.peak_bytes()
    if on_gpu is not None:
        return on_gpu / 2**20
    import resource  # there is none on Windows

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def serve(requests: TextIO, answers: TextIO) -> None:
    """Answer requests until there are no more."""

    def answer(**message: Any) -> None:
        answers.write(json.dumps(message) + "\n")
        answers.flush()

    try:
        contender = make_contender(json.loads(requests.readline()))
        versions = {name: sys.modules[name].__version__ for name in ("jax", "torch") if name in sys.modules}
        answer(versions=versions)
        while line := requests.readline():
            request = json.loads(line)
            if request["do"] == "compile":
                answer(compile_seconds=contender.compile())
            elif request["do"] == "turn":
                answer(**take_turn(contender, request["seconds"]))
            else:
                answer(peak_mebibytes=peak_mebibytes(contender))
    except (UnavailableError, interleave.FailedError) as error:
        answer(error=str(error))
    except Exception as error:  # whatever it is, the others go on and the table says so
        traceback.print_exc()
        lines = str(error).strip().splitlines() or [""]
        answer(error=f"{type(error).__name__}: {lines[0]}"[:160].rstrip(": "))


if __name__ == "__main__":
    # What libraries print must not end up among the answers.
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)
        serve(sys.stdin, answers)

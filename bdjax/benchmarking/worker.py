"""A process that runs one contender in turns: `python -m bdjax.benchmarking.worker`.

Requests and replies are lines of JSON. The first line is the specification; then come `{"do": "compile"}`, `{"do": "turn",
"seconds": s}`, `{"do": "accuracy"}` and `{"do": "memory"}`. Each gets one line in reply; a reply with "error" is the last. The
worker ends when standard input does. Between turns it sleeps in `readline` and uses no processor time.
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
    """This contender cannot run here; the message has the reason in a few words."""


def make_contender(spec: Mapping[str, Any]) -> Any:
    """The contender for a specification; see `contenders` and `peer_pytorch` for its methods.

    A library is imported only if the contender needs it, because its memory counts as the contender's.
    """
    is_pytorch = spec["library"] == "pytorch"
    if is_pytorch and importlib.util.find_spec("torch") is None:
        raise UnavailableError("PyTorch is not installed")
    if is_pytorch and spec.get("form") and not spec["blocks"]:
        raise UnavailableError(f"{spec['model']} does not exist in PyTorch here")
    if spec.get("processes", 1) > 1:
        return PerCore(spec)
    module = importlib.import_module(f"bdjax.benchmarking.{'peer_pytorch' if is_pytorch else 'contenders'}")
    if spec["task"] == "matmul":
        return module.Matmul(spec)
    if spec.get("data"):
        with np.load(spec["data"], allow_pickle=False) as rows:
            return module.Training(spec, rows["images"], rows["labels"])
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (spec["rows"], *spec["shape"]), dtype=np.uint8)
    labels = random.integers(0, spec["num_classes"], spec["rows"], dtype=np.int32)
    return module.Training(spec, images, labels)


def accuracies(contender: Any, spec: Mapping[str, Any]) -> list[float]:
    """The share of the test rows that each model predicts correctly."""
    if isinstance(contender, PerCore):
        return contender.accuracies()
    with np.load(spec["data"], allow_pickle=False) as rows:
        images, labels = rows["test_images"], rows["test_labels"]
    predicted = contender.predict(images)
    return np.mean(predicted == labels, axis=1).tolist()


class PerCore:
    """As many copies of a contender as cores, each in a separate process with its own model, all running at once."""

    def __init__(self, spec: Mapping[str, Any]) -> None:
        singles = [{**spec, "processes": 1, "seed": number} for number in range(spec["processes"])]
        self.workers = [interleave.Worker(single, own_session=False) for single in singles]
        self._receive("versions")

    def _receive(self, name: str) -> list[Any]:
        return [worker.receive(math.inf)[name] for worker in self.workers]

    def _request(self, name: str, **request: Any) -> list[Any]:
        for worker in self.workers:
            worker.send(request)
        return self._receive(name)

    def compile(self) -> float:
        """Compile time of the slowest process."""
        return max(self._request("compile_seconds", do="compile"))

    def epoch(self) -> int:
        """Run an epoch in each process; returns the images of all of them."""
        return sum(self._request("work", do="turn", seconds=0.0))

    def accuracies(self) -> list[float]:
        """Of the models of all processes."""
        return [accuracy for of_process in self._request("accuracies", do="accuracy") for accuracy in of_process]

    def peak_bytes(self) -> int:
        """Peak memory of all processes together."""
        return round(2**20 * sum(self._request("peak_mebibytes", do="memory")))


def take_turn(contender: Any, seconds: float) -> dict[str, float]:
    """Run whole epochs, at least one, until `seconds` have passed."""
    work = 0
    start = time.perf_counter()
    while True:
        work += contender.epoch()
        elapsed = time.perf_counter() - start
        if elapsed >= seconds:
            return {"seconds": elapsed, "work": work}


def peak_mebibytes(contender: Any) -> float:
    """Peak memory on the GPU; on a CPU that of the whole process, including the interpreter and libraries."""
    on_gpu = contender.peak_bytes()
    if on_gpu is not None:
        return on_gpu / 2**20
    import resource  # not available on Windows

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def serve(requests: TextIO, replies: TextIO) -> None:
    """Reply to requests until there are no more."""

    def reply(**message: Any) -> None:
        replies.write(json.dumps(message) + "\n")
        replies.flush()

    try:
        spec = json.loads(requests.readline())
        contender = make_contender(spec)
        versions = {name: sys.modules[name].__version__ for name in ("jax", "torch") if name in sys.modules}
        reply(versions=versions)
        while line := requests.readline():
            request = json.loads(line)
            if request["do"] == "compile":
                reply(compile_seconds=contender.compile())
            elif request["do"] == "turn":
                reply(**take_turn(contender, request["seconds"]))
            elif request["do"] == "accuracy":
                reply(accuracies=accuracies(contender, spec))
            else:
                reply(peak_mebibytes=peak_mebibytes(contender))
    except (UnavailableError, interleave.FailedError) as error:
        reply(error=str(error))
    except Exception as error:  # any failure of a contender becomes a remark in the table
        traceback.print_exc()
        lines = str(error).strip().splitlines() or [""]
        reply(error=f"{type(error).__name__}: {lines[0]}"[:160].rstrip(": "))


if __name__ == "__main__":
    # Output printed by libraries must not mix with the replies.
    with os.fdopen(os.dup(1), "w") as replies:
        os.dup2(2, 1)
        serve(sys.stdin, replies)

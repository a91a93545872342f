"""A whole run in seconds, as a program: what `test_processes.py` starts in several processes."""

import argparse
import os
import pathlib
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from bdjax.errors import InputError
from bdjax.run import backend, command_line
from bdjax.run.folder import open_run
from bdjax.run.log import StageLog, StageProgress
from bdjax.training.member import Rows, TrainConfig
from bdjax.training.stages import StageRunner
from bdjax.types import Model, ModelOutput

MEMBERS, ROWS, SHAPE = 3, 24, (4, 4, 1)


@dataclass(frozen=True)
class Config:
    epochs: int = 4


def linear() -> Model:
    """Softmax regression."""

    def init(key, image_shape):
        return {"params": {"kernel": 0.1 * jax.random.normal(key, (int(np.prod(image_shape)), 3))}, "batch_stats": {}}

    def apply(variables, images, *, train, edits=None):
        return ModelOutput(images.reshape(len(images), -1) @ variables["params"]["kernel"], {}, variables)

    return Model(init, apply, 3, "linear")


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--output", type=pathlib.Path)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--kill-after", type=int, default=0, help="epochs")
    parser.add_argument("--fail-in", type=int, default=-1, help="process")
    parser.add_argument("--seen", type=pathlib.Path, help="folder for what each process ends with")
    given = parser.parse_args(arguments)
    random = np.random.default_rng(0)
    pool = jnp.asarray(random.integers(0, 256, (ROWS, *SHAPE)), jnp.uint8)
    labels = random.integers(0, 3, ROWS).astype(np.int32)
    index = np.stack([random.permutation(ROWS) for _ in range(MEMBERS)]).astype(np.int32)
    train, validation = (
        Rows(jnp.asarray(part), {"labels": jnp.asarray(labels[part])}) for part in (index[:, :18], index[:, 18:])
    )
    folder = open_run(given.output, Config(given.epochs), experiment="small")
    if jax.process_index() == given.fail_in:
        raise InputError("this process cannot go on")
    log, model = StageLog(), linear()
    if given.kill_after:
        StageProgress.advance = lambda self, steps=1, message="": _kill_after(self, given.kill_after, steps)
    runner = StageRunner(folder=folder.checkpoints, image_shape=SHAPE, layout="map", log=log)
    config = TrainConfig(given.epochs, batch_size=4, evaluation_batch_size=3)
    keys = jax.random.split(jax.random.key(7), MEMBERS)
    nets = runner.from_scratch("nets", model, config, keys, MEMBERS, pool, train, validation)
    logits = runner.predict(model, nets.variables, np.asarray(pool), 5)
    folder.write_json("results.json", {"logits": logits, "history": nets.history})
    log.console.print("finished")
    if given.seen:
        np.savez(given.seen / f"{jax.process_index()}.npz", kernel=nets.variables["params"]["kernel"], logits=logits)


def _kill_after(progress: StageProgress, epochs: int, steps: int) -> None:
    progress.done += steps
    if progress.done == epochs:
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    devices = int(sys.argv.pop(1))
    backend.use_every_core = lambda: jax.config.update("jax_num_cpu_devices", devices)
    command_line.run(main)

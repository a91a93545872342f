"""The engine's contenders: whole epochs as in `ensemble.fit`, without its work between epochs."""

import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bdjax.models import make_model
from bdjax.run import backend
from bdjax.training import ensemble
from bdjax.training.member import Rows, TrainConfig, make_epoch
from bdjax.training.stages import cross_entropy_of, prepare


class Training:
    """Epochs of M members, one compiled call per epoch, on uint8 images that stay on the device."""

    def __init__(self, spec: Mapping[str, Any], images: np.ndarray, labels: np.ndarray) -> None:
        """Take a worker's specification, images uint8 [n, H, W, C] and labels int32 [n]."""
        backend.use_every_core()
        model = make_model(spec["model"], spec["num_classes"], spec["width"], spec["lowering"], spec["compute_dtype"])
        # A factor of 1 keeps the learning rate constant, as in PyTorch: labels are random, so the loss never improves.
        config = TrainConfig(
            epochs=spec.get("epochs", 1),
            batch_size=spec["batch_size"],
            learning_rate=spec["learning_rate"],
            plateau_factor=1.0,
            augmentation=spec.get("augmentation", "none"),
        )
        config = replace(config, **spec["recipe"])
        self.images = spec["members"] * len(labels)
        self.predict_members = ensemble.make_predict(model, spec["layout"], config.evaluation_batch_size)
        spread = ensemble.spread_members(spec["members"])

        def rows(count: int) -> Rows:
            index = np.tile(np.arange(count, dtype=np.int32), (spec["members"], 1))
            return spread.place(Rows(index, {"labels": np.asarray(labels, np.int32)[index]}))

        keys = jax.random.split(jax.random.key(0), spec["members"])
        train, pool = rows(len(labels)), spread.replicate(jnp.asarray(images))
        states = ensemble.init_states(model, images.shape[1:], config, keys)
        if spec.get("data"):
            states = states._replace(variables=prepare(model, states.variables, pool, np.asarray(train.index)))
        self.states = spread.place(states)
        self.shared = (train, rows(0), pool)
        self.run = ensemble.compile_members(
            make_epoch(model, cross_entropy_of(config), config), spec["layout"], spread, num_shared=1, donate=True
        )
        jax.block_until_ready((self.states, self.shared))

    def compile(self) -> float:
        """Trace and compile; returns the seconds."""
        start = time.perf_counter()
        self.run = self.run.lower(self.states, *self.shared).compile()
        return time.perf_counter() - start

    def epoch(self) -> int:
        """Train all members on every row once and return the number of images, M n."""
        self.states = jax.block_until_ready(self.run(self.states, *self.shared))
        return self.images

    def predict(self, images: np.ndarray) -> np.ndarray:
        """The most likely class of each image by each member, int [M, n], from uint8 [n, H, W, C]."""
        return np.argmax(np.asarray(self.predict_members(self.states.variables, images)), axis=2)

    def peak_bytes(self) -> int | None:
        """Peak memory on a GPU; None on a CPU, where the memory of the process is measured instead."""
        return peak_bytes()


class Matmul:
    """A large square matrix product, which measures the peak rate of the machine."""

    def __init__(self, spec: Mapping[str, Any]) -> None:
        self.size = spec["size"] if jax.default_backend() == "cpu" else spec["size_on_gpu"]
        self.matrix = jax.random.normal(jax.random.key(0), (self.size, self.size)).astype(spec["compute_dtype"])
        self.run = jax.jit(jnp.matmul)

    def compile(self) -> float:
        """Trace and compile; returns the seconds."""
        start = time.perf_counter()
        self.run = self.run.lower(self.matrix, self.matrix).compile()
        return time.perf_counter() - start

    def epoch(self) -> int:
        """Multiply once and return the floating-point operations."""
        jax.block_until_ready(self.run(self.matrix, self.matrix))
        return 2 * self.size**3

    def peak_bytes(self) -> int | None:
        """Not measured."""
        return None


def peak_bytes() -> int | None:
    """Peak memory of this process on its most used device; None if the device does not report it."""
    counts = [device.memory_stats() or {} for device in jax.local_devices() if device.platform != "cpu"]
    return max((count.get("peak_bytes_in_use", 0) for count in counts), default=0) or None

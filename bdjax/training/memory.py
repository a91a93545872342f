"""How much memory training takes, estimated before anything is compiled, and how many members fit at once.

The estimate counts what the backward pass of one batch keeps, which JAX tells without computing anything, and what the
members' states take. It is rough (a test holds it against the compiler's own account) and errs to the safe side: members
that do not fit together are trained in groups, which costs little, while a device that runs out of memory ends the run.
"""

import math
import pathlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from bdjax.errors import InputError
from bdjax.training import processes
from bdjax.training.member import Objective, Rows, TrainConfig, TrainState, as_float
from bdjax.types import Array, Key, PyTree

USABLE = 0.8
"""Share of the memory that the estimate may fill."""

ADVICE = "take a smaller --batch-size or --width, --compute-dtype=bfloat16, or --member-group=1 with --layout=map"


class Need(NamedTuple):
    """Bytes that training takes on one device."""

    shared: int
    """whatever the number of members: the images"""
    member: int
    """each member's weights, optimiser and rows, twice: before and after an epoch"""
    working: int
    """of a batch under way: activations, and copies that a convolution makes of them"""

    def total(self, members: int, at_once: int) -> int:
        """Bytes with `members` on the device, of which `at_once` have a batch under way."""
        return self.shared + members * self.member + at_once * self.working


def count_bytes(tree: PyTree) -> int:
    """The bytes of all leaves (arrays or `jax.ShapeDtypeStruct`; a typed key counts as its words)."""
    return sum(math.prod(leaf.shape) * _item_bytes(leaf.dtype) for leaf in jax.tree.leaves(tree))


def _item_bytes(dtype: np.dtype) -> int:
    if jnp.issubdtype(dtype, jax.dtypes.prng_key):
        return 8
    # XLA widens bfloat16 on a CPU.
    return 4 if dtype == jnp.bfloat16 and jax.default_backend() == "cpu" else dtype.itemsize


def estimate(
    objective: Objective, config: TrainConfig, states: TrainState, pool: Array, train: Rows, validation: Rows
) -> Need:
    """What a training of stacked members takes, without compiling or computing anything.

    Args:
        objective: what one step of a member minimises.
        config: how they are trained.
        states: stacked [M, ...].
        pool: uint8 [P, H, W, C].
        train: rows, leaves [M, n, ...].
        validation: likewise [M, n', ...].
    """
    count = states.epoch.shape[0]
    batch_size = min(config.batch_size, train.index.shape[1])

    def one(tree: PyTree, *leading: int) -> PyTree:
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((*leading, *leaf.shape[1:]), leaf.dtype), tree)

    def kept(variables: PyTree, images: Array, targets: dict[str, Array], key: Key) -> PyTree:
        def mean_loss(params: PyTree) -> Array:
            return jnp.mean(objective(params, variables, as_float(images), targets, key).losses)

        return jax.vjp(mean_loss, variables["params"])[1]

    variables = one(states.variables)
    images = jax.ShapeDtypeStruct((batch_size, *train.index.shape[2:], *pool.shape[1:]), pool.dtype)
    targets = {
        name: jax.ShapeDtypeStruct((batch_size, *leaf.shape[2:]), leaf.dtype) for name, leaf in train.targets.items()
    }
    traced = jax.make_jaxpr(kept)(variables, images, targets, jax.random.key(0))
    return Need(
        shared=count_bytes(pool),
        member=(2 * count_bytes(states) + count_bytes((train, validation))) // count,
        # Beside what is kept, the largest convolution has a few arrays of its largest kind: copies, products, gradients.
        working=count_bytes(traced.out_avals) + 6 * _largest(traced.jaxpr),
    )


def _largest(jaxpr: core.Jaxpr) -> int:
    """Bytes of the largest array that a program makes on its way."""
    largest = 0
    for equation in jaxpr.eqns:
        arrays = [each.aval for each in equation.outvars if hasattr(each.aval, "shape")]
        inner = [
            each.jaxpr if isinstance(each, core.ClosedJaxpr) else each
            for each in equation.params.values()
            if isinstance(each, (core.Jaxpr, core.ClosedJaxpr))
        ]
        largest = max([largest, *map(count_bytes, arrays), *map(_largest, inner)])
    return largest


def available(device: jax.Device | None = None) -> int | None:
    """Bytes that may be used on a device, the same number in each process, or None where nobody tells.

    The cores of a CPU are devices that share what the machine has free.
    """
    device = device or jax.local_devices()[0]
    if device.platform == "cpu":
        free = _free_memory()
        free = None if free is None else free // jax.local_device_count()
    else:
        statistics = device.memory_stats() or {}
        limit = statistics.get("bytes_limit")
        free = None if limit is None else limit - statistics.get("bytes_in_use", 0)
    if processes.count() > 1:  # or they would make different groups and wait for each other for ever
        least = min(int(told) for told in processes.exchange("memory", str(-1 if free is None else free)))
        free = None if least < 0 else least
    return None if free is None else int(USABLE * free)


def _free_memory() -> int | None:
    try:
        lines = pathlib.Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    told = dict(line.split(":", 1) for line in lines if ":" in line)
    return int(told["MemAvailable"].split()[0]) * 1024 if "MemAvailable" in told else None


def largest_group(need: Need, limit: int | None, count: int, devices: int, one_at_a_time: bool) -> int:
    """How many of `count` members to train in one call.

    Args:
        need: what `estimate` says.
        limit: bytes of each device, or None if unknown: then all members at once.
        count: M.
        devices: over how many devices members are dealt out.
        one_at_a_time: whether a device has one batch under way, as with the layout "map", or one of each member.

    Raises:
        InputError: if not even one member fits, with what could be done about it.
    """
    if limit is None:
        return count
    if need.total(1, 1) > limit:
        raise InputError(
            f"training one member takes about {_in_gib(need.total(1, 1))} of a device's {_in_gib(limit)} usable: {ADVICE}"
        )
    each = -(-count // devices)
    while need.total(each, 1 if one_at_a_time else each) > limit:
        each -= 1
    return min(count, each * devices)


def describe(need: Need, limit: int, count: int, group: int) -> str:
    """One line for the log: why members are split."""
    return (
        f"{count} members in groups of {group}: a member takes about {_in_gib(need.member + need.working)}, "
        f"a device has {_in_gib(limit)} usable"
    )


def _in_gib(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"

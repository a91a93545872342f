"""Estimates of the memory that training takes, made before compilation, and the number of members that fit at once.

The estimate adds the arrays that the backward pass of one batch keeps, known from tracing alone, to the members' states. It is
rough (a test compares it with the compiler's memory analysis) and errs on the safe side: training members in groups costs
little, whereas running out of memory ends the run.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from bdjax.datasets.files import free_memory
from bdjax.errors import InputError
from bdjax.training import processes
from bdjax.training.member import Objective, Rows, TrainConfig, TrainState, as_float
from bdjax.types import Array, Key, Model, PyTree

USABLE = 0.8
"""Share of the memory that the estimate may fill."""

_STATES = 6
"""Copies of one network's variables while it trains: weights and two moments, before and after an epoch."""
_SMALL = 16 * 64**2
"""Networks times squared width up to which every machine has the memory: sixteen networks of the papers' size."""

ADVICE = "use a smaller --batch-size or --width, --compute-dtype=bfloat16, or --member-group=1 with --layout=map"


class Need(NamedTuple):
    """Bytes that training takes on one device."""

    shared: int
    """for all members together: the images"""
    member: int
    """for each member: weights and optimiser state, before and after an epoch, and rows"""
    working: int
    """for each batch in progress: activations, and the copies that a convolution makes of them"""

    def total(self, members: int, at_once: int) -> int:
        """Bytes with `members` on the device, of which `at_once` have a batch in progress."""
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
    """Estimate the memory for training stacked members, without compiling or computing anything.

    Args:
        objective: what one step of a member minimises.
        config: training configuration.
        states: stacked [M, ...].
        pool: uint8 [P, H, W, C].
        train: training rows, leaves [M, n, ...].
        validation: validation rows, leaves [M, n', ...].
    """
    count = states.epoch.shape[0]
    batch_size = min(config.batch_size, train.index.shape[1])

    variables = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), states.variables)
    images = jax.ShapeDtypeStruct((batch_size, *train.index.shape[2:], *pool.shape[1:]), pool.dtype)
    targets = {
        name: jax.ShapeDtypeStruct((batch_size, *leaf.shape[2:]), leaf.dtype) for name, leaf in train.targets.items()
    }
    return Need(
        shared=count_bytes(pool),
        member=(2 * count_bytes(states) + count_bytes((train, validation))) // count,
        working=_working(objective, variables, images, targets),
    )


_known: WeakKeyDictionary[Objective, dict[Any, int]] = WeakKeyDictionary()
"""What is known of each objective: shapes -> the result of `_working`. Tracing takes a second."""


def _working(objective: Objective, variables: PyTree, images: PyTree, targets: PyTree) -> int:
    leaves, structure = jax.tree.flatten((variables, images, targets))
    of_objective = _known.setdefault(objective, {})
    shapes = (structure, *((leaf.shape, leaf.dtype) for leaf in leaves))
    if shapes not in of_objective:
        of_objective[shapes] = _trace_working(objective, variables, images, targets)
    return of_objective[shapes]


def _trace_working(objective: Objective, variables: PyTree, images: PyTree, targets: PyTree) -> int:
    def residuals(variables: PyTree, images: Array, targets: dict[str, Array], key: Key) -> PyTree:
        def mean_loss(params: PyTree) -> Array:
            return jnp.mean(objective(params, variables, as_float(images), targets, key).losses)

        return jax.vjp(mean_loss, variables["params"])[1]

    traced = jax.make_jaxpr(residuals)(variables, images, targets, jax.random.key(0))
    # Beside the residuals, the largest convolution has a few arrays of the largest size: copies, products, gradients.
    return count_bytes(traced.out_avals) + 6 * _largest(traced.jaxpr)


def _largest(jaxpr: core.Jaxpr) -> int:
    """Bytes of the largest intermediate array of a program."""
    largest = 0
    for equation in jaxpr.eqns:
        arrays = [output.aval for output in equation.outvars if hasattr(output.aval, "shape")]
        inner = [
            parameter.jaxpr if isinstance(parameter, core.ClosedJaxpr) else parameter
            for parameter in equation.params.values()
            if isinstance(parameter, (core.Jaxpr, core.ClosedJaxpr))
        ]
        largest = max([largest, *map(count_bytes, arrays), *map(_largest, inner)])
    return largest


def available(device: jax.Device | None = None) -> int | None:
    """Usable bytes on a device, the same number in each process; None if unknown.

    The cores of a CPU are devices that share the machine's free memory.
    """
    device = device or jax.local_devices()[0]
    if device.platform == "cpu":
        free = free_memory() // jax.local_device_count()
    else:
        statistics = device.memory_stats() or {}
        limit = statistics.get("bytes_limit")
        free = None if limit is None else limit - statistics.get("bytes_in_use", 0)
    if processes.count() > 1:  # all processes must make the same groups, or they would wait for each other forever
        lowest = min(int(text) for text in processes.exchange("memory", str(-1 if free is None else free)))
        free = None if lowest < 0 else lowest
    return None if free is None else int(USABLE * free)


def largest_group(need: Need, limit: int | None, count: int, devices: int, one_at_a_time: bool) -> int:
    """How many of `count` members to train in one call.

    Args:
        need: from `estimate`.
        limit: usable bytes of each device; None if unknown: then all members at once.
        count: M.
        devices: the number of devices that members are sharded over.
        one_at_a_time: whether a device has one batch in progress, as with the layout "map", or one per member.

    Raises:
        InputError: if not even one member fits, with advice.
    """
    if limit is None:
        return count
    if need.total(1, 1) > limit:
        raise InputError(
            f"training one member takes about {_in_gib(need.total(1, 1))} of a device's {_in_gib(limit)} usable: {ADVICE}"
        )
    per_device = -(-count // devices)
    while need.total(per_device, 1 if one_at_a_time else per_device) > limit:
        per_device -= 1
    return min(count, per_device * devices)


def check_networks(
    make: Callable[[int], Model], image_shape: tuple[int, int, int], width: int, members: int, advice: str
) -> None:
    """Refuse networks whose weights no device can hold, before anything is allocated. Small networks are not looked at.

    Args:
        make: (width) -> one network.
        image_shape: (H, W, C).
        width: the run's width.
        members: how many networks exist at the same time.
        advice: the flags that set their number.

    Raises:
        InputError: with both sizes, and the width or the number of networks that would fit.
    """
    if members * width**2 <= _SMALL:
        return
    limit = available()
    if limit is None:
        return

    single = count_bytes(jax.eval_shape(lambda: make(width).init(jax.random.key(0), image_shape)))
    total = (-(-members // jax.device_count()) + _STATES) * single
    if total <= limit:
        return
    most = (limit // max(single, 1) - _STATES) * jax.device_count()
    narrow = int(0.9 * width * math.sqrt(limit / total))  # the number of weights grows with the square
    fits = [f"--width={narrow}"] if narrow else []
    fits += [f"{most} of them ({advice})"] if most > 0 else []
    raise InputError(
        f"{members} networks of --width {width} take about {_in_gib(total)} of a device's {_in_gib(limit)} usable; "
        f"{' or '.join(fits) or 'a smaller --width with fewer networks'} would fit"
    )


def check_fits(what: str, count: int, advice: str) -> None:
    """Refuse what the main memory cannot hold, before it is made.

    Args:
        what: subject of the error message: "9 training sets of 50,000 rows".
        count: bytes.
        advice: what would fit.

    Raises:
        InputError: with both sizes.
    """
    free = free_memory()
    if count > USABLE * free:
        raise InputError(f"{what} take about {_in_gib(count)} of {_in_gib(int(USABLE * free))} usable: {advice}")


def describe(need: Need, limit: int, count: int, group: int) -> str:
    """A log line on why members are split into groups."""
    return (
        f"{count} members in groups of {group}: one member takes about {_in_gib(need.member + need.working)}, "
        f"a device has {_in_gib(limit)} usable"
    )


def _in_gib(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"

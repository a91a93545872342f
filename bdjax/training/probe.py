"""Choose the fastest layout of the members and lowering of convolutions by measurement.

The fastest combination differs between CPU and GPU, and with width, image size and number of members. Slow lowerings are first
ruled out on four convolutions and few rows. With the others, a small network with the run's width, images, batch size and
number of members is trained for a few steps in every layout. (Timing convolutions alone, without optimiser and network, made
vmap look faster than it is.) The default combination is timed first, whatever it takes, since the
expected time of the run follows from its speed; nothing else that would probably end after the time limit is started.

The choice and its speed are cached in the user's cache folder. Each run also saves its own choice, since two lowerings agree
only within float tolerance and a resumed run must end with the same numbers.
"""

import contextlib
import itertools
import json
import math
import os
import pathlib
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax import lax

from bdjax import atomic
from bdjax.choices import PROBE_SECONDS, ComputeDtype, Layout, Lowering
from bdjax.models import make_model
from bdjax.models.layers import (
    EXACT_LOWERINGS,
    convolve,
    default_lowering,
    layout_of,
    normalise_batch,
    relu,
)
from bdjax.training import ensemble, processes
from bdjax.training.member import Rows, TrainConfig, make_epoch
from bdjax.training.stages import cross_entropy_of
from bdjax.types import Array, PyTree

HOPELESS = 1.5
"""A lowering that is more than this factor slower than the best on few rows is not timed on a whole batch."""

UNROLLED_MEMBERS = 3
"""Maximum number of members per device for which "unrolled" is timed: compilation time grows with that number."""

CLEARLY = 1.1
"""Factor by which a combination must beat the default: a near tie is noise, and the default was measured on whole trainings."""

PROBED = ("speedrun",)
"""Networks that are timed themselves. The others compile slowly and are made of the blocks of `USUAL_NETWORK`."""

USUAL_NETWORK = "resnet10"

_STEPS = 2
_REPEATS = 5
_ENOUGH_SECONDS = 0.3
_PROBED_MEMBERS = 8  # at most, per device; with fewer, more would fit into the CPU cache than in the run
_AUTO = "auto"


@dataclass(frozen=True)
class Shape:
    """Everything that the speed depends on."""

    image_shape: tuple[int, int, int]
    width: int
    """channels of the first stage"""
    batch_size: int
    members: int
    compute_dtype: ComputeDtype = "float32"
    network: str = USUAL_NETWORK
    """what is trained; see `probed_network`"""


class Choice(NamedTuple):
    """A layout and a lowering."""

    layout: Layout
    lowering: Lowering


Measure = Callable[[Choice, Shape], float]
"""The seconds that a combination takes for a few steps of all members."""


CPU_FACTS = pathlib.Path("/proc/cpuinfo")
BFLOAT16_FLAGS = {"avx512_bf16", "amx_bf16"}
"""Names in `CPU_FACTS` of instructions for products of bfloat16 numbers with float32 sums."""


def usable_lowerings() -> tuple[Lowering, ...]:
    """The lowerings that are worth measuring: products of rounded numbers only on a CPU with instructions for them."""
    words = CPU_FACTS.read_text().split() if CPU_FACTS.exists() else []
    has_products = jax.default_backend() == "cpu" and not BFLOAT16_FLAGS.isdisjoint(words)
    return get_args(Lowering) if has_products else EXACT_LOWERINGS


def probed_network(names: Sequence[str]) -> str:
    """The network to time for a run that trains these: the first, if it is timed itself."""
    return names[0] if names and names[0] in PROBED else USUAL_NETWORK


def choose(
    shape: Shape,
    layout: Layout | Literal["auto"] = _AUTO,
    lowering: Lowering | Literal["auto"] = _AUTO,
    *,
    choice_file: pathlib.Path | None = None,
    seconds: float = PROBE_SECONDS,
    report: Callable[[str], None] = lambda line: None,
    measure: Measure | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> Choice:
    """Choose a layout and a lowering. Given values are kept; "auto" is measured unless the choice is already saved.

    Args:
        shape: what to choose for.
        layout: a layout, or "auto".
        lowering: a lowering, or "auto".
        choice_file: the JSON file with a run's saved choice, which is used if it exists.
        seconds: time limit: after the first, no measurement starts that would end later if it took as long as the longest
            before it.
        report: called with one line on the measurement or the source of the choice; not called if there is only one option.
        measure: times one combination; by default `time_convolutions` on few rows and `time_training` on a batch.
        clock: the time in seconds.

    Returns:
        The fastest combination (the default one if none is clearly faster), the same in every process.
    """
    layouts = [name for name in get_args(Layout) if name != "unrolled" or _per_device(shape) <= UNROLLED_MEMBERS]
    lowerings = usable_lowerings()
    candidates = [
        Choice(*pair)
        for pair in itertools.product(
            layouts if layout == _AUTO else (layout,), lowerings if lowering == _AUTO else (lowering,)
        )
    ]
    if len(candidates) == 1:
        return candidates[0]
    saved = _saved_choice(choice_file) if choice_file else None
    choice = Choice(*saved) if saved else None
    if choice in candidates:
        report(f"{_words(choice)}, as at the start of this run")
        return choice
    default = _default(candidates)
    if processes.count() > 1:
        # Timings would differ between the processes, which must all run the same program.
        report(f"{_words(default)}, the default: not measured with several processes (or give --layout and --lowering)")
        return default
    shape = _as_timed(shape)
    key = json.dumps([_environment(), asdict(shape), [list(candidate) for candidate in candidates]])
    cache = cache_file()
    cached = _choice(_read(cache).get(key))
    # Without its speed, an entry of an earlier version, a run could not say how long it will take.
    if cached in candidates and measured_speed(shape, cached) is not None:
        report(f"{_words(cached)}, from an earlier measurement ({cache})")
        return cached
    limit = _TimeLimit(seconds, clock)
    timed = _race(candidates, default, shape, measure or time_convolutions, measure or time_training, limit)
    best = min(timed, key=timed.__getitem__)
    if timed[default] < CLEARLY * timed[best]:
        best = default
    timings = [f"{_words(choice)} {timed[choice] * 1e3:.3g} ms" for choice in sorted(timed, key=timed.get)]
    others = f"would pass the limit of {seconds:g} s" if limit.reached else "slower ones not timed"
    report(f"{_words(best)} ({', '.join([*timings, f'{len(candidates) - len(timed)} others: {others}'])})")
    speeds = {_speed_key(shape, choice): _rows(shape) / timed[choice] for choice in timed}
    _save(cache, {key: list(best), **speeds})
    return best


def measured_speed(shape: Shape, choice: Choice) -> float | None:
    """The images per second, of all members together, that a probe of this machine measured; None if none did."""
    speed = _read(cache_file()).get(_speed_key(_as_timed(shape), choice))
    return speed if isinstance(speed, float) and 0 < speed < math.inf else None


def _per_device(shape: Shape) -> int:
    return -(-shape.members // jax.device_count())


def _as_timed(shape: Shape) -> Shape:
    """The shape with the number of members that a probe trains."""
    return replace(shape, members=min(_per_device(shape), _PROBED_MEMBERS) * min(shape.members, jax.device_count()))


def _rows(shape: Shape) -> int:
    """The images of a measurement."""
    return shape.members * _STEPS * shape.batch_size


def _speed_key(shape: Shape, choice: Choice) -> str:
    return json.dumps(["images per second", _environment(), asdict(shape), list(choice)])


class _TimeLimit:
    """Whether another measurement may start."""

    def __init__(self, seconds: float, clock: Callable[[], float]) -> None:
        self._clock, self._end, self._longest = clock, clock() + seconds, 0.0
        self.reached = False

    def measure(self, measure: Measure, choice: Choice, shape: Shape) -> float | None:
        """The seconds of a combination; None once the limit is reached."""
        start = self._clock()
        self.reached = self.reached or (self._longest > 0 and start + self._longest > self._end)
        if self.reached:
            return None
        seconds = measure(choice, shape)
        self._longest = max(self._longest, self._clock() - start)
        return seconds


def record(choice: Choice) -> dict[str, Any]:
    """The content of a run's `choice_file`."""
    return {"choice": list(choice)}


def cache_file() -> pathlib.Path:
    """The cache of measured choices, below XDG_CACHE_HOME or ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(base) / "bdjax" / "probe.json"


def time_training(choice: Choice, shape: Shape) -> float:
    """The median seconds of a few training steps of the shape's network, for all members; compilation is not counted."""
    model = make_model(shape.network, 10, shape.width, choice.lowering, shape.compute_dtype)
    config = TrainConfig(epochs=1, batch_size=shape.batch_size)
    count, rows = shape.members, _STEPS * shape.batch_size

    def make_rows(number: int) -> Rows:
        index = jnp.broadcast_to(jnp.arange(number, dtype=jnp.int32), (count, number))
        return Rows(index, {"labels": index % 10})

    spread = ensemble.spread_members(count)
    run = ensemble.compile_members(
        make_epoch(model, cross_entropy_of(config), config), choice.layout, spread, num_shared=1
    )
    keys = jax.random.split(jax.random.key(0), count)
    states = ensemble.init_states(model, shape.image_shape, config, keys)
    placed = [spread.place(tree) for tree in (states, make_rows(rows), make_rows(0))]
    pool = spread.replicate(jax.random.bits(jax.random.key(1), (rows, *shape.image_shape), jnp.uint8))
    return _seconds(lambda: run(*placed, pool))


def time_convolutions(choice: Choice, shape: Shape) -> float:
    """The median seconds of a few steps of four convolutions with batch normalisation, which compile faster."""
    inside = layout_of(choice.lowering)
    height, width, channels = shape.image_shape
    channels_out = (shape.width, shape.width, 2 * shape.width, 2 * shape.width)
    channels_in = (channels, *channels_out[:-1])
    strides = (1, 1, 2, 1) if min(height, width) > 1 else (1, 1, 1, 1)

    def loss(kernels: Sequence[Array], images: Array) -> Array:
        x = inside.from_nhwc(images.astype(shape.compute_dtype))
        for kernel, stride in zip(kernels, strides, strict=True):
            x = convolve(x, kernel.astype(x.dtype), stride=stride, padding=1, lowering=choice.lowering)
            scale, bias = jnp.ones(kernel.shape[3]), jnp.zeros(kernel.shape[3])
            x = relu(normalise_batch(x, scale, bias, inside.channel_axis, 1e-5)[0])
        return jnp.mean(jnp.square(x.astype(jnp.float32)))

    def train(kernels: PyTree, images: Array) -> PyTree:
        def step(kernels: PyTree, rows: Array) -> tuple[PyTree, None]:
            gradient = jax.grad(loss)(kernels, rows)
            return jax.tree.map(lambda k, g: k - 1e-3 * g, kernels, gradient), None

        return lax.scan(step, kernels, images)[0]

    def init(key: Array) -> tuple[Array, ...]:
        keys = jax.random.split(key, len(strides))
        sizes = zip(keys, channels_in, channels_out, strict=True)
        return tuple(jax.random.normal(k, (3, 3, c, o)) / math.sqrt(9 * c) for k, c, o in sizes)

    spread = ensemble.spread_members(shape.members)
    run = ensemble.compile_members(train, choice.layout, spread, num_shared=1)
    keys = jax.random.split(jax.random.key(0), shape.members)
    kernels = spread.place(ensemble.init_members(init, keys))
    images = jax.random.uniform(jax.random.key(1), (_STEPS, shape.batch_size, *shape.image_shape))
    images = spread.replicate(images)
    return _seconds(lambda: run(kernels, images))


def _seconds(run: Callable[[], PyTree]) -> float:
    jax.block_until_ready(run())
    seconds = []
    for _ in range(_REPEATS):
        start = time.perf_counter()
        jax.block_until_ready(run())
        seconds.append(time.perf_counter() - start)
        if sum(seconds) > _ENOUGH_SECONDS:
            break
    return statistics.median(seconds)


def _race(
    candidates: Sequence[Choice],
    default: Choice,
    shape: Shape,
    roughly: Measure,
    exactly: Measure,
    limit: _TimeLimit,
) -> dict[Choice, float]:
    """Seconds of the combinations that are worth timing on a whole batch: some lowerings are a hundred times slower than
    others, and timing them would cost more than it saves."""

    def time_all(measure: Measure, choices: Sequence[Choice], shape: Shape) -> dict[Choice, float]:
        default_first = sorted(choices, key=lambda choice: choice != default)
        timed = ((choice, limit.measure(measure, choice, shape)) for choice in default_first)
        return {choice: seconds for choice, seconds in timed if seconds is not None}

    seconds = time_all(exactly, [default], shape)
    usual = [choice for choice in candidates if choice.layout == default.layout]
    few = replace(shape, batch_size=max(shape.batch_size // 8, 1))
    first = time_all(roughly, usual, few)
    best = min(first.values(), default=0.0)
    hopeful = [choice for choice, taken in first.items() if taken <= HOPELESS * best and choice != default]
    seconds |= time_all(exactly, hopeful, shape)
    lowering = min(seconds, key=seconds.__getitem__).lowering
    others = [choice for choice in candidates if choice.lowering == lowering and choice.layout != default.layout]
    return seconds | time_all(exactly, others, shape)


def _default(candidates: Sequence[Choice]) -> Choice:
    """The candidate nearest to the default layout and lowering."""
    layout, lowering = ensemble.default_layout(), default_lowering()
    return max(candidates, key=lambda choice: (choice.layout == layout) + (choice.lowering == lowering))


def _words(choice: Choice) -> str:
    return f"{choice.layout}/{choice.lowering}"


def _environment() -> list[Any]:
    devices = jax.devices()
    return [jax.__version__, devices[0].platform, devices[0].device_kind, len(devices), os.cpu_count()]


def _read(path: pathlib.Path) -> dict[str, Any]:
    """The entries of a file; an invalid file has none, so they are measured again."""
    try:
        content = json.loads(path.read_text()) if path.is_file() else None  # a pipe would wait for ever
    except (OSError, ValueError, RecursionError):
        return {}
    return dict(content) if isinstance(content, Mapping) else {}


def _choice(entry: Any) -> Choice | None:
    """An entry as a choice; None if it is none."""
    return Choice(*entry) if isinstance(entry, list) and len(entry) == 2 else None


@processes.by_primary
def _saved_choice(path: pathlib.Path) -> list[str] | None:
    choice = _choice(_read(path).get("choice"))
    return list(choice) if choice else None


def _save(path: pathlib.Path, entries: Mapping[str, Any]) -> None:
    """Add entries to the cache. If the cache cannot be written, the next run measures again."""
    with contextlib.suppress(OSError):
        atomic.write_bytes(path, f"{json.dumps({**_read(path), **entries}, indent=1)}\n".encode())

"""Choose the fastest layout of the members and lowering of convolutions by measurement.

The fastest combination differs between CPU and GPU, and with width, image size and number of members. Slow lowerings are first
ruled out on four convolutions and few rows. With the others, a small ResNet with the run's width, images, batch size and
number of members is trained for a few steps in every layout. (Timing convolutions alone, without optimiser and network, made
vmap look faster than it is.)

The choice is cached in the user's cache folder. Each run also saves its own choice, since two lowerings agree only within float
tolerance and a resumed run must end with the same numbers.
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

from bdjax import atomic, losses
from bdjax.models import make_model
from bdjax.models.layers import ComputeDtype, Lowering, convolve, default_lowering, layout_of, normalise_batch, relu
from bdjax.training import ensemble, processes
from bdjax.training.member import Rows, TrainConfig, init_state, make_epoch
from bdjax.types import Array, PyTree

HOPELESS = 1.5
"""A lowering that is more than this factor slower than the best on few rows is not timed on a whole batch."""

UNROLLED_MEMBERS = 3
"""Maximum number of members per device for which "unrolled" is timed: compilation time grows with that number."""

CLEARLY = 1.1
"""Factor by which a combination must beat the default: a near tie is noise, and the default was measured on whole trainings."""

_STEPS = 4
_REPEATS = 5
_ENOUGH_SECONDS = 0.3
_PROBED_MEMBERS = 16  # at most, per device; with fewer, more would fit into the CPU cache than in the run
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


class Choice(NamedTuple):
    """A layout and a lowering."""

    layout: ensemble.Layout
    lowering: Lowering


Measure = Callable[[Choice, Shape], float]
"""The seconds that a combination takes for a few steps of all members."""


def choose(
    shape: Shape,
    layout: ensemble.Layout | Literal["auto"] = _AUTO,
    lowering: Lowering | Literal["auto"] = _AUTO,
    *,
    choice_file: pathlib.Path | None = None,
    report: Callable[[str], None] = lambda line: None,
    measure: Measure | None = None,
) -> Choice:
    """Choose a layout and a lowering. Given values are kept; "auto" is measured unless the choice is already saved.

    Args:
        shape: what to choose for.
        layout: a layout, or "auto".
        lowering: a lowering, or "auto".
        choice_file: the JSON file with a run's saved choice, which is used if it exists.
        report: called with one line on the measurement or the source of the choice; not called if there is only one option.
        measure: times one combination; by default `time_convolutions` on few rows and `time_training` on a batch.

    Returns:
        The fastest combination (the default one if none is clearly faster), the same in every process.
    """
    per_device = -(-shape.members // jax.device_count())
    layouts = [name for name in get_args(ensemble.Layout) if name != "unrolled" or per_device <= UNROLLED_MEMBERS]
    lowerings = get_args(Lowering)
    candidates = [
        Choice(*pair)
        for pair in itertools.product(
            layouts if layout == _AUTO else (layout,), lowerings if lowering == _AUTO else (lowering,)
        )
    ]
    shape = replace(shape, members=min(per_device, _PROBED_MEMBERS) * min(shape.members, jax.device_count()))
    if len(candidates) == 1:
        return candidates[0]
    saved = _saved_choice(choice_file) if choice_file else None
    choice = Choice(*saved) if saved else None
    if choice in candidates:
        report(f"{_words(choice)}, as at the start of this run")
        return choice
    if processes.count() > 1:
        # Timings would differ between the processes, which must all run the same program.
        default = _default(candidates)
        report(f"{_words(default)}, the default: not measured with several processes (or give --layout and --lowering)")
        return default
    key = json.dumps([_environment(), asdict(shape), [list(candidate) for candidate in candidates]])
    cache = cache_file()
    cached = _read(cache).get(key)
    if cached in candidates:
        report(f"{_words(cached)}, from an earlier measurement ({cache})")
        return cached
    seconds = _race(candidates, shape, measure or time_convolutions, measure or time_training)
    best = min(seconds, key=seconds.__getitem__)
    default = _default(candidates)
    if default in seconds and seconds[default] < CLEARLY * seconds[best]:
        best = default
    timings = [f"{_words(timed)} {seconds[timed] * 1e3:.3g} ms" for timed in sorted(seconds, key=seconds.get)]
    report(f"{_words(best)} ({', '.join(timings)}; {len(candidates) - len(seconds)} slower ones not timed)")
    _save(cache, key, best)
    return best


def record(choice: Choice) -> dict[str, Any]:
    """The content of a run's `choice_file`."""
    return {"choice": list(choice)}


def cache_file() -> pathlib.Path:
    """The cache of measured choices, below XDG_CACHE_HOME or ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(base) / "bdjax" / "probe.json"


def time_training(choice: Choice, shape: Shape) -> float:
    """The median seconds of a few training steps of a ResNet-10, for all members; compilation is not counted."""
    model = make_model("resnet10", 10, shape.width, choice.lowering, shape.compute_dtype)
    config = TrainConfig(epochs=1, batch_size=shape.batch_size)
    count, rows = shape.members, _STEPS * shape.batch_size

    def loss(logits: Array, targets: Mapping[str, Array]) -> Array:
        return losses.cross_entropy(logits, targets["labels"])

    def make_rows(number: int) -> Rows:
        index = jnp.broadcast_to(jnp.arange(number, dtype=jnp.int32), (count, number))
        return Rows(index, {"labels": index % 10})

    spread = ensemble.spread_members(count)
    run = ensemble.compile_members(make_epoch(model, loss, config), choice.layout, spread, num_shared=1)
    keys = jax.random.split(jax.random.key(0), count)
    states = ensemble.init_members(lambda key: init_state(key, model, shape.image_shape, config), keys)
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


def _race(candidates: Sequence[Choice], shape: Shape, roughly: Measure, exactly: Measure) -> dict[Choice, float]:
    """Seconds of the combinations that are worth timing on a whole batch: some lowerings are a hundred times slower than
    others, and timing them would cost more than it saves."""
    few = replace(shape, batch_size=max(shape.batch_size // 8, 1))
    layout = _default(candidates).layout
    first = {choice.lowering: roughly(choice, few) for choice in candidates if choice.layout == layout}
    hopeful = [choice for choice in candidates if first[choice.lowering] <= HOPELESS * min(first.values())]
    seconds = {choice: exactly(choice, shape) for choice in hopeful if choice.layout == layout}
    lowering = min(seconds, key=seconds.__getitem__).lowering
    return seconds | {
        choice: exactly(choice, shape) for choice in hopeful if choice.lowering == lowering and choice.layout != layout
    }


def _default(candidates: Sequence[Choice]) -> Choice:
    """The candidate nearest to the default layout and lowering."""
    layout, lowering = ensemble.default_layout(), default_lowering()
    return max(candidates, key=lambda choice: (choice.layout == layout) + (choice.lowering == lowering))


def _words(choice: Choice) -> str:
    return f"{choice.layout}/{choice.lowering}"


def _environment() -> list[Any]:
    devices = jax.devices()
    return [jax.__version__, devices[0].platform, devices[0].device_kind, len(devices), os.cpu_count()]


def _read(path: pathlib.Path) -> dict[str, Choice]:
    """The choices in a file; invalid entries are ignored, so they are measured again."""
    try:
        content = json.loads(path.read_text()) if path.is_file() else None  # a pipe would wait for ever
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(content, Mapping):
        return {}
    return {key: Choice(*value) for key, value in content.items() if isinstance(value, list) and len(value) == 2}


@processes.by_primary
def _saved_choice(path: pathlib.Path) -> list[str] | None:
    choice = _read(path).get("choice")
    return list(choice) if choice else None


def _save(path: pathlib.Path, key: str, choice: Choice) -> None:
    """Add a choice to the cache. If the cache cannot be written, the next run measures again."""
    content = {**{other: list(saved) for other, saved in _read(path).items()}, key: list(choice)}
    with contextlib.suppress(OSError):
        atomic.write_bytes(path, f"{json.dumps(content, indent=1)}\n".encode())

"""Which layout of the members and which lowering of a convolution is fastest here: measured, not assumed.

What wins differs between a CPU and a GPU, and on either with width, image size and number of members. So lowerings that are
hopeless are found on four convolutions and few rows, and with the others a small ResNet with the run's own width, images,
batch and number of members is trained for a few steps in every layout. (Without optimiser and network around them the
convolutions alone misled: they made vmap look faster than it was.)

The answer is kept in the user's cache folder, and each run keeps the one that it was given, since two lowerings agree only
within float tolerance and a run that is resumed is to end at the same numbers.
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

from bdjax import losses
from bdjax.models import make_model
from bdjax.models.layers import ComputeDtype, Lowering, convolve, default_lowering, layout_of, normalise_batch, relu
from bdjax.training import ensemble, processes
from bdjax.training.member import Rows, TrainConfig, init_state, make_epoch
from bdjax.types import Array, PyTree

HOPELESS = 1.5
"""How many times slower than the best a lowering may be on few rows and still be timed on a whole batch."""

UNROLLED_MEMBERS = 3
"""Up to how many members a device has "unrolled" is tried without being asked for: compiling takes that many times as long."""

CLEARLY = 1.1
"""How many times faster than the usual combination another has to be: a near tie is noise, and the usual one was measured on
whole trainings."""

_STEPS = 4
_REPEATS = 5
_ENOUGH_SECONDS = 0.3
_PROBED_MEMBERS = 16  # of each device: with fewer, more would fit into a cache than in the run
_AUTO = "auto"


@dataclass(frozen=True)
class Shape:
    """What speed depends on."""

    image_shape: tuple[int, int, int]
    width: int
    """channels of the first stage"""
    batch_size: int
    members: int
    compute_dtype: ComputeDtype = "float32"


class Choice(NamedTuple):
    """How an ensemble is computed."""

    layout: ensemble.Layout
    lowering: Lowering


Measure = Callable[[Choice, Shape], float]
"""Seconds that a combination takes for a few steps of all members."""


def choose(
    shape: Shape,
    layout: ensemble.Layout | Literal["auto"] = _AUTO,
    lowering: Lowering | Literal["auto"] = _AUTO,
    *,
    remembered: pathlib.Path | None = None,
    say: Callable[[str], None] = lambda line: None,
    measure: Measure | None = None,
) -> Choice:
    """Choose a layout and a lowering; what is given is taken, what is "auto" is measured, once.

    Args:
        shape: what to choose for.
        layout: a layout, or "auto".
        lowering: a lowering, or "auto".
        remembered: a JSON file in which a run keeps its choice; if it is there, that is the answer.
        say: told in one line what was measured or where the answer comes from; not called if nothing was to choose.
        measure: times one combination; by default `time_convolutions` on few rows and `time_training` on a batch.

    Returns:
        The combination that took the least time (the usual one if none is clearly faster), the same in every process.
    """
    each_device = -(-shape.members // jax.device_count())
    layouts = [each for each in get_args(ensemble.Layout) if each != "unrolled" or each_device <= UNROLLED_MEMBERS]
    lowerings = get_args(Lowering)
    candidates = [
        Choice(*each)
        for each in itertools.product(
            layouts if layout == _AUTO else (layout,), lowerings if lowering == _AUTO else (lowering,)
        )
    ]
    shape = replace(shape, members=min(each_device, _PROBED_MEMBERS) * min(shape.members, jax.device_count()))
    if len(candidates) == 1:
        return candidates[0]
    kept = _remembered(remembered) if remembered else None
    kept = Choice(*kept) if kept else None
    if kept in candidates:
        say(f"{_words(kept)}, as this run began")
        return kept
    if processes.count() > 1:
        # Each would measure something else, and all have to run one program.
        usual = _usual(candidates)
        say(f"{_words(usual)}, the usual one: not measured with several processes (or give --layout and --lowering)")
        return usual
    name = json.dumps([_where_we_are(), asdict(shape), [list(each) for each in candidates]])
    cache = cache_file()
    kept = _read(cache).get(name)
    if kept in candidates:
        say(f"{_words(kept)}, as measured before ({cache})")
        return kept
    seconds = _race(candidates, shape, measure or time_convolutions, measure or time_training)
    best = min(seconds, key=seconds.__getitem__)
    usual = _usual(candidates)
    if usual in seconds and seconds[usual] < CLEARLY * seconds[best]:
        best = usual
    told = ", ".join(f"{_words(each)} {seconds[each] * 1e3:.3g} ms" for each in sorted(seconds, key=seconds.get))
    say(f"{_words(best)} ({told}; {len(candidates) - len(seconds)} slower ones left out)")
    _keep(cache, name, best)
    return best


def record(choice: Choice) -> dict[str, Any]:
    """What a run writes to the file that `choose` is given as `remembered`."""
    return {"choice": list(choice)}


def cache_file() -> pathlib.Path:
    """Where measured choices are kept: below XDG_CACHE_HOME or ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(base) / "bdjax" / "probe.json"


def time_training(choice: Choice, shape: Shape) -> float:
    """The median seconds of a few training steps of a ResNet-10, for all members; compilation is not counted."""
    model = make_model("resnet10", 10, shape.width, choice.lowering, shape.compute_dtype)
    config = TrainConfig(epochs=1, batch_size=shape.batch_size)
    count, rows = shape.members, _STEPS * shape.batch_size

    def loss(logits: Array, targets: Mapping[str, Array]) -> Array:
        return losses.cross_entropy(logits, targets["labels"])

    def some(number: int) -> Rows:
        index = jnp.broadcast_to(jnp.arange(number, dtype=jnp.int32), (count, number))
        return Rows(index, {"labels": index % 10})

    spread = ensemble.spread_members(count)
    run = ensemble.compile_members(make_epoch(model, loss, config), choice.layout, spread, num_shared=1)
    keys = jax.random.split(jax.random.key(0), count)
    states = ensemble.init_members(lambda key: init_state(key, model, shape.image_shape, config), keys)
    placed = [spread.place(each) for each in (states, some(rows), some(0))]
    pool = spread.replicate(jax.random.bits(jax.random.key(1), (rows, *shape.image_shape), jnp.uint8))
    return _seconds(lambda: run(*placed, pool))


def time_convolutions(choice: Choice, shape: Shape) -> float:
    """Likewise of four convolutions with batch normalisation, which compile sooner."""
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
    taken = []
    for _ in range(_REPEATS):
        start = time.perf_counter()
        jax.block_until_ready(run())
        taken.append(time.perf_counter() - start)
        if sum(taken) > _ENOUGH_SECONDS:
            break
    return statistics.median(taken)


def _race(candidates: Sequence[Choice], shape: Shape, roughly: Measure, exactly: Measure) -> dict[Choice, float]:
    """Seconds of the combinations that are worth a whole batch: some lowerings need a hundred times as long as others, and
    would hold up the run that they are to speed up."""
    few = replace(shape, batch_size=max(shape.batch_size // 8, 1))
    layout = _usual(candidates).layout
    first = {each.lowering: roughly(each, few) for each in candidates if each.layout == layout}
    hopeful = [each for each in candidates if first[each.lowering] <= HOPELESS * min(first.values())]
    seconds = {each: exactly(each, shape) for each in hopeful if each.layout == layout}
    lowering = min(seconds, key=seconds.__getitem__).lowering
    return seconds | {
        each: exactly(each, shape) for each in hopeful if each.lowering == lowering and each.layout != layout
    }


def _usual(candidates: Sequence[Choice]) -> Choice:
    usual = Choice(ensemble.default_layout(), default_lowering())
    return max(candidates, key=lambda each: (each.layout == usual.layout) + (each.lowering == usual.lowering))


def _words(choice: Choice) -> str:
    return f"{choice.layout}/{choice.lowering}"


def _where_we_are() -> list[Any]:
    devices = jax.devices()
    return [jax.__version__, devices[0].platform, devices[0].device_kind, len(devices), os.cpu_count()]


def _read(path: pathlib.Path) -> dict[str, Choice]:
    """The choices in a file; whatever in it is not one is passed over, to be measured anew."""
    try:
        told = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    if not isinstance(told, Mapping):
        return {}
    return {name: Choice(*each) for name, each in told.items() if isinstance(each, list) and len(each) == 2}


@processes.by_primary
def _remembered(path: pathlib.Path) -> list[str] | None:
    choice = _read(path).get("choice")
    return list(choice) if choice else None


def _keep(path: pathlib.Path, name: str, choice: Choice) -> None:
    """Add a choice to the cache; where it cannot be written it is measured again next time, and nothing else changes."""
    told = {**{other: list(each) for other, each in _read(path).items()}, name: list(choice)}
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(told, indent=1) + "\n")
        os.replace(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()

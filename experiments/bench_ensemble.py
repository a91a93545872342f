"""Benchmark of the ensemble engine: every layout and lowering, one member at a time, and PyTorch, in turns.

    python experiments/bench_ensemble.py                    # half an hour on two cores; on a GPU the preset gpu
    python experiments/bench_ensemble.py --preset=full      # the whole grid: hours on a CPU
    python experiments/bench_ensemble.py --members 7 --shapes 8x8x1 --widths 8 --forms 'map-*' alone '!*-native'
    python experiments/bench_ensemble.py --model=speedrun --shapes 32x32x3 --widths 16 --members 2 --dataset=cifar10

PyTorch is optional (`pip install -e '.[bench]'`). The same command resumes an interrupted run after the last finished setting.
Everything is written to one folder (`--output`, by default below `runs/bench_ensemble/`).
"""

from bdjax import interruption

if __name__ == "__main__":
    interruption.exit_at_once()  # the other imports take seconds

import dataclasses
import json
import math
import os
import pathlib
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple

import jax
import numpy as np

from bdjax import datasets
from bdjax.benchmarking import interleave, learning, report, settings
from bdjax.choices import ComputeDtype
from bdjax.errors import InputError
from bdjax.models import operations
from bdjax.reporting import plots
from bdjax.reporting.tables import Table, to_markdown, to_rich
from bdjax.run import command_line
from bdjax.run.checks import check_ranges
from bdjax.run.folder import RunFolder, default_name, open_run
from bdjax.run.log import StageLog
from bdjax.settings import MOST, Amount, Count, InnerShare, Positive, Range, Width, check_choice
from bdjax.training import memory
from bdjax.types import Dataset

Preset = Literal["quick", "full", "gpu"]


class Family(NamedTuple):
    shape: str
    width: int
    members: tuple[int, ...]
    model: str = ""
    """architecture; by default --model"""
    batch_size: int = 0
    """images in a training step; by default --batch-size"""


MEMBERS = (1, 2, 4, 7, 14, 35)
MOST_MEMBERS = 35
GRIDS: dict[str, tuple[Family, ...]] = {
    "quick": (
        Family("8x8x1", 8, (1, 2, 7, 14, 35)),
        Family("28x28x1", 16, (2, 7)),
        Family("32x32x3", 16, (2, 7)),
        Family("32x32x3", 16, (2, 7), "speedrun", 128),
    ),
    "full": tuple(
        Family(shape, width, MEMBERS) for shape in ("8x8x1", "28x28x1", "32x32x3") for width in (8, 16, 32, 64)
    ),
    "gpu": (Family("32x32x3", 64, (7,)), Family("32x32x3", 64, (7,), "speedrun", 1024)),
}


@dataclass(frozen=True)
class Config:
    """Every setting of a benchmark; `--preset` sets the defaults of the others."""

    preset: Preset = "quick"
    """quick: two cores; full: the whole grid; gpu: the paper's ResNet-34 and the speed-run network, at full width"""
    members: tuple[Annotated[int, Range(at_least=1, at_most=MOST_MEMBERS)], ...] = ()
    """members of the ensemble, 1 to 35; by default the preset's for each network"""
    widths: tuple[Width, ...] = ()
    """channels of the first stage; if this or --shapes is set, the grid has all combinations of both"""
    shapes: tuple[str, ...] = ()
    """image sizes as height x width x channels, such as 32x32x3"""
    compute_dtype: tuple[ComputeDtype, ...] = ("float32",)
    """dtype of activations and products, in the engine and (by autocast) in PyTorch"""
    model: str = "resnet18"
    """architecture"""
    batch_size: Annotated[int, Range(at_least=2, limit=MOST)] = 64
    """images in a training step"""
    rows: Count = 512
    """images in an epoch of each member; a multiple of the batch size"""
    rounds: Count = 5
    """number of turns of each contender"""
    seconds_per_turn: Positive = 1.0
    """least length of a turn, which consists of whole epochs, in seconds"""
    time_limit: Positive = 60.0
    """seconds allowed for a contender's first epoch; a slower one is stopped and reported with this bound"""
    compile_limit: Positive = 300.0
    """seconds allowed for a contender's compilation"""
    dataset: str = ""
    """a dataset's name: also train the speed-run network on it by its recipe, in bdjax and in PyTorch, and report the time to
    --target-accuracy"""
    target_accuracy: InnerShare = 0.85
    """accuracy on the test rows of --dataset, in (0, 1)"""
    epochs: Count = 8
    """epochs of the training on --dataset"""
    train_rows: Amount = 0
    """training rows of --dataset; 0 for all"""
    forms: tuple[str, ...] = ()
    """contenders to run, with wildcards, such as map-*, alone or pytorch-compiled; a leading ! excludes; by default all"""
    output: pathlib.Path | None = None
    """folder of the run; by default runs/bench_ensemble/<preset>"""


PRESETS: dict[str, dict[str, Any]] = {
    "quick": {
        "rounds": 3,
        "seconds_per_turn": 0.5,
        "time_limit": 8.0,
        "compile_limit": 30.0,
        "forms": (
            "!pytorch-compiled-one-thread",
        ),  # compiles for half a minute per network, and half as fast as per-core
    },
    "full": {},
    "gpu": {"model": "resnet34", "rows": 2048, "compute_dtype": ("float32", "bfloat16")},
}
LEARNING_LIMIT = 1800.0
"""Seconds allowed for an epoch of a whole training."""
IGNORED = ("output",)
"""Fields that do not affect any number."""


def preset(preset: str | None = None) -> Config:
    """The configuration of a preset.

    Raises:
        InputError: if there is no such preset.
    """
    preset = preset or ("quick" if jax.default_backend() == "cpu" else "gpu")
    check_choice("--preset", preset, PRESETS)
    return Config(preset=preset, **PRESETS[preset])


def check(config: Config) -> None:
    """Check the settings.

    Raises:
        InputError: if a setting is invalid; the message names its flag.
    """
    check_ranges(config)
    for shape in config.shapes:
        needed = config.rows * math.prod(parse_shape(shape))
        memory.check_fits(f"{config.rows} --rows of {shape}", 8 * needed, "use fewer --rows or smaller --shapes")
    for size in {setting.batch_size for setting in grid(config)}:
        if config.rows % size:
            # An incomplete last batch would be a second program to compile.
            raise InputError(f"--rows {config.rows} must be a multiple of --batch-size {size}")
    if not config.compute_dtype:
        raise InputError("--compute-dtype is empty; give float32, bfloat16 or both")
    known = settings.all_forms(has_gpu())
    for pattern in config.forms:
        if not settings.choose(known, [pattern.removeprefix("!")]):
            raise InputError(f"--forms {pattern!r} matches none of {', '.join(known)}")
    if not settings.choose(known, config.forms):
        raise InputError(f"--forms {' '.join(config.forms)} excludes every contender")


def has_gpu() -> bool:
    """Whether contenders will run on an accelerator."""
    return jax.default_backend() != "cpu"


def parse_shape(text: str) -> tuple[int, int, int]:
    """The (H, W, C) of "32x32x3"."""
    if not re.fullmatch(r"[1-9]\d{0,3}x[1-9]\d{0,3}x[1-9]\d{0,3}", text):
        raise InputError(f"--shapes {text!r} must be height x width x channels, such as 32x32x3")
    height, width, channels = map(int, text.split("x"))
    return height, width, channels


def grid(config: Config) -> list[settings.Setting]:
    """All settings, grouped by family, fewest members first."""
    families = GRIDS[config.preset]
    if config.shapes or config.widths:
        shapes = config.shapes or dict.fromkeys(family.shape for family in families)
        widths = config.widths or dict.fromkeys(family.width for family in families)
        members = tuple(sorted({count for family in families for count in family.members}))
        families = tuple(Family(shape, width, members) for shape in shapes for width in widths)
    found = {}
    for dtype in config.compute_dtype:
        for family in families:
            shape = parse_shape(family.shape)
            for count in sorted(config.members or family.members):
                model, batch_size = family.model or config.model, family.batch_size or config.batch_size
                setting = settings.Setting(model, shape, family.width, dtype, count, config.rows, batch_size)
                found[setting] = None  # a dictionary, since flags may repeat a value
    return list(found)


def run(config: Config, log: StageLog | None = None) -> dict[str, Any]:
    """Measure every contender at every setting.

    Args:
        config: all settings.
        log: for progress; by default the terminal.

    Returns:
        The content of results.json.

    Raises:
        InputError: if the settings or the output folder are invalid.
    """
    log = log or StageLog()
    check(config)
    forms = settings.choose(settings.all_forms(has_gpu()), config.forms)
    data = load(config) if config.dataset else None
    schedule = interleave.Schedule(config.rounds, config.seconds_per_turn, config.time_limit, config.compile_limit)
    folder = open_run(output_folder(config), config, experiment="bench_ensemble", ignore=IGNORED)
    results = read_results(folder)
    for dtype in config.compute_dtype:
        if dtype not in results["peak"]:
            with log.stage(f"peak {dtype}") as stage:
                results["peak"][dtype] = peak = measure_peak(dtype, schedule)
                stage.detail = f"{(peak['operations_per_second'] or 0) / 1e9:,.0f} GFLOP/s"
            folder.write_json("results.json", results)
    todo = []
    for setting in grid(config):
        if any(entry["setting"] == setting.key for entry in results["settings"]):
            log.note(setting.name, "restored from results.json")
        else:
            todo.append(setting)
    with interleave.WorkerPool() as pool:
        for number, setting in enumerate(todo):
            following = [
                settings.describe(next_setting, form)
                for next_setting in todo[number + 1 : number + 2]
                for form in settings.fitting_forms(next_setting, forms)
            ]
            with log.stage(setting.name, total=len(forms) * config.rounds, unit="turns") as stage:
                entry = measure(pool, setting, forms, schedule, results["settings"], following, stage.advance)
                stage.detail = _best(entry)
            results["settings"].append(entry)
            write(folder, results)
    if data is not None and "learning" not in results:
        results["learning"] = learn(config, results["settings"], *data, log)
    write(folder, results)
    for table in tables(results):
        # Outside a terminal rich would squeeze twelve columns into eighty characters.
        shown = to_rich(table) if log.console.is_terminal else to_markdown(table)
        log.console.print(shown, highlight=False, markup=False, soft_wrap=not log.console.is_terminal)
    log.say(f"tables: {folder.path / 'table.md'}")
    return results


def load(config: Config) -> tuple[Dataset, Dataset]:
    """The training and test rows of `--dataset`.

    Raises:
        InputError: if there is no such dataset, or the speed-run network is not among the settings for its images.
    """
    train, test = datasets.load(config.dataset)
    if config.train_rows > len(train):
        raise InputError(f"--train-rows {config.train_rows}: {config.dataset} has {len(train)} training rows")
    if config.train_rows:
        train = train[np.random.default_rng(0).permutation(len(train))[: config.train_rows]]
    shape, cores = train.images.shape[1:], settings.num_cores()
    if not any(learning.is_measured({"setting": setting.key}, shape) for setting in grid(config)):
        shape = "x".join(map(str, shape))
        raise InputError(
            f"--dataset {config.dataset} needs the speed-run network on such images, with a network for each core: "
            f"--model=speedrun --shapes {shape} --widths 16 --members {cores}"
        )
    return train, test


def learn(
    config: Config, entries: Sequence[Mapping[str, Any]], train: Dataset, test: Dataset, log: StageLog
) -> dict[str, Any]:
    """Train the speed-run network to the end in both libraries: results.json's "learning"."""
    measured = [entry for entry in entries if learning.is_measured(entry, train.images.shape[1:])]
    with tempfile.TemporaryDirectory() as scratch:
        path = pathlib.Path(scratch) / "rows.npz"
        learning.write_rows(path, train, test)
        specs = learning.specifications(measured, path, config.epochs, train)
        total = len(specs) * config.epochs
        with interleave.WorkerPool() as pool, log.stage("learning", total=total, unit="epochs") as stage:
            outcomes = pool.learn(specs, LEARNING_LIMIT, on_epoch=lambda name: stage.advance(1, name))
    return {
        "dataset": config.dataset,
        "rows": len(train),
        "target_accuracy": config.target_accuracy,
        "contenders": outcomes,
    }


def measure(
    pool: interleave.WorkerPool,
    setting: settings.Setting,
    forms: Sequence[str],
    schedule: interleave.Schedule,
    before: Sequence[Mapping[str, Any]],
    following: Sequence[Mapping[str, Any]],
    on_turn: Callable[[int, str], None],
) -> dict[str, Any]:
    """Measure all contenders at one setting.

    A contender that was too slow with fewer members of the same network is skipped: it would be too slow again.

    Args:
        pool: the running contenders.
        setting: the setting to measure.
        forms: names of the contenders.
        schedule: number and length of turns.
        before: entries of the settings measured so far.
        following: specifications of the contenders at the next setting.
        on_turn: as for `WorkerPool.race`.

    Returns:
        An entry of results.json's "settings".
    """
    forms = settings.fitting_forms(setting, forms)
    known = {form: slow for form in forms if (slow := slower_before(setting, form, before))}
    running = {form: settings.describe(setting, form) for form in forms if form not in known}
    raced = pool.race(running, schedule, on_turn=on_turn, keep=following)
    contenders = {}
    for form in forms:
        outcome = raced[form] if form in raced else known[form]
        images = settings.models_at_once(setting, form) * setting.rows
        if outcome["status"] == "slow":
            outcome |= {"limit": schedule.time_limit, "images_per_second_below": images / schedule.time_limit}
        elif outcome["status"] == "slow to compile":
            outcome |= {"limit": schedule.compile_limit}
        contenders[form] = outcome
    counted = operations.training_operations(setting.model, settings.NUM_CLASSES, setting.width, setting.shape)
    return {"setting": setting.key, "operations_per_image": counted, "contenders": contenders}


def slower_before(setting: settings.Setting, form: str, before: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """The outcome of a contender that was too slow at a smaller setting; None if there is none."""
    for entry in before:
        smaller = settings.Setting(**entry["setting"] | {"shape": tuple(entry["setting"]["shape"])})
        outcome = entry["contenders"].get(form)
        is_smaller = smaller.family == setting.family and smaller.members < setting.members
        if outcome and is_smaller and outcome["status"].startswith("slow") and not outcome["turns"]:
            count = smaller.members
            known_from = outcome.get("known_from") or f"{count} member{'s' if count > 1 else ''}"
            return {"status": outcome["status"], "turns": [], "known_from": known_from}
    return None


def measure_peak(compute_dtype: str, schedule: interleave.Schedule) -> dict[str, Any]:
    """Operations per second of the fastest large square matrix product in any library; None if none has run."""
    specs = {library: settings.describe_matmul(library, compute_dtype) for library in ("jax", "pytorch")}
    # The peak is the best of many single products: a mean would depend on the load of the machine.
    schedule = dataclasses.replace(schedule, rounds=4 * schedule.rounds, seconds_per_turn=0.0)
    with interleave.WorkerPool() as pool:
        outcomes = pool.race(specs, schedule)
    fastest = {library: max(report.rates(outcome), default=0.0) for library, outcome in outcomes.items()}
    library = max(fastest, key=fastest.__getitem__)
    return {"operations_per_second": fastest[library] or None, "library": library, "contenders": outcomes}


def _best(entry: Mapping[str, Any]) -> str:
    name = report.fastest(entry["contenders"], lambda _: True)
    return (
        f"{name} {report.rate_of(entry['contenders'][name]).median:,.0f} images/s" if name else "no contender finished"
    )


def read_results(folder: RunFolder) -> dict[str, Any]:
    """The results of an interrupted run, or empty ones."""
    path = folder.file("results.json")
    if not path.exists():
        return {"peak": {}, "settings": []}
    try:
        return json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise InputError(f"{path} cannot be read ({error}); remove it to start again") from error


def tables(results: Mapping[str, Any]) -> list[Table]:
    """The summary table, the table of every contender, and of the time to an accuracy if that was measured."""
    found = [report.summary_table(results), report.details_table(results)]
    return [*found, learning.table(results["learning"])] if "learning" in results else found


def write(folder: RunFolder, results: Mapping[str, Any]) -> None:
    """Write the numbers, tables and plot of everything measured so far."""
    folder.write_json("results.json", results)
    folder.write_text("table.md", "\n\n".join(map(to_markdown, tables(results))))
    if results["settings"]:
        plots.save(report.throughput(results), folder.file("throughput.png"))


def output_folder(config: Config) -> pathlib.Path:
    """`--output`, or a folder whose name depends only on the settings."""
    if config.output:
        return config.output
    changed = command_line.changed_fields(config, preset(config.preset), IGNORED)
    name = default_name("bench", config.preset, changed).removeprefix("bench-")
    return pathlib.Path("runs") / "bench_ensemble" / name


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Read the flags and run."""
    # This process only queries the hardware and must leave the memory to the contenders.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    texts = {"prog": "bench_ensemble.py", "description": __doc__.splitlines()[0]}
    return run(command_line.parse(preset, {"preset": None}, arguments, **texts))


if __name__ == "__main__":
    command_line.run(main)

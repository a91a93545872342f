"""Settings (what is measured) and forms (the contenders), as plain data that can be sent to a worker."""

import fnmatch
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any, get_args

from bdjax.choices import Layout
from bdjax.models import default_lowering, speedrun
from bdjax.models.layers import scale_channels
from bdjax.models.resnet import BLOCKS
from bdjax.training import ensemble, recipes
from bdjax.training.probe import usable_lowerings

NUM_CLASSES = 10
LEARNING_RATE = 0.01
SPEEDRUN = "speedrun"
"""The network that is trained by the recipe of the same name; the others are trained by Adam."""
ALONE = "alone"
PYTORCH = "pytorch-"
PYTORCH_FORMS = ("contiguous", "channels-last", "compiled")
"""On every machine; on a CPU with a thread for each core."""
PYTORCH_GPU_FORMS = ("compiled-graphs",)
ONE_THREAD, PER_CORE = "-one-thread", "-per-core"
PYTORCH_CPU_FORMS = tuple(form + suffix for suffix in (ONE_THREAD, PER_CORE) for form in PYTORCH_FORMS)
"""With a single thread, which suits small networks and busy machines; and with as many single-threaded processes as cores, each
training its own model."""
MATMUL_SIZES = {"size": 2048, "size_on_gpu": 8192}


@dataclass(frozen=True)
class Setting:
    """One point of the grid: the settings that all contenders share."""

    model: str
    shape: tuple[int, int, int]
    """(H, W, C)"""
    width: int
    compute_dtype: str
    members: int
    """M"""
    rows: int
    """images that each member sees in an epoch"""
    batch_size: int

    @property
    def family(self) -> tuple:
        """The fields that two settings share if they differ only in the number of members."""
        return (self.model, self.shape, self.width, self.compute_dtype)

    @property
    def family_name(self) -> str:
        """ "resnet18 width 8 at 8x8x1", and the dtype if it is not float32."""
        precision = "" if self.compute_dtype == "float32" else f", {self.compute_dtype}"
        return f"{self.model} width {self.width} at {'x'.join(map(str, self.shape))}{precision}"

    @property
    def name(self) -> str:
        """ "resnet18 width 8 at 8x8x1, 7 members"."""
        return f"{self.family_name}, {self.members} member{'s' if self.members > 1 else ''}"

    @property
    def key(self) -> dict[str, Any]:
        """As results.json has it."""
        return asdict(self) | {"shape": list(self.shape)}


def engine_forms() -> dict[str, tuple[str, str]]:
    """Name -> layout and lowering, of all combinations that are worth measuring here."""
    pairs = product(get_args(Layout), usable_lowerings())
    return {f"{layout}-{lowering}": (layout, lowering) for layout, lowering in pairs}


def all_forms(has_gpu: bool) -> tuple[str, ...]:
    """The names of all contenders."""
    pytorch = PYTORCH_FORMS + (PYTORCH_GPU_FORMS if has_gpu else PYTORCH_CPU_FORMS)
    return (*engine_forms(), ALONE, *(PYTORCH + form for form in pytorch))


def choose(forms: Sequence[str], patterns: Sequence[str]) -> tuple[str, ...]:
    """The forms that match a pattern such as `map-*` (all if there is no pattern), without those that match a `!map-*`."""
    wanted = [pattern for pattern in patterns if not pattern.startswith("!")] or ["*"]
    unwanted = [pattern[1:] for pattern in patterns if pattern.startswith("!")]
    return tuple(form for form in forms if _matches(form, wanted) and not _matches(form, unwanted))


def _matches(form: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(form, pattern) for pattern in patterns)


def num_cores() -> int:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def models_at_once(setting: Setting, form: str) -> int:
    """The number of models that an epoch of this contender trains: M, or 1 if models are trained one after another."""
    if form.endswith(PER_CORE):
        return num_cores()
    return setting.members if form in engine_forms() else 1


def fitting_forms(setting: Setting, forms: Sequence[str]) -> tuple[str, ...]:
    """The contenders that train at most as many models at once as the setting has members."""
    return tuple(form for form in forms if models_at_once(setting, form) <= setting.members)


def describe(setting: Setting, form: str) -> dict[str, Any]:
    """A worker's specification."""
    # The name keeps otherwise equal specifications apart: alone equals a layout with one member.
    common = {"name": form, "num_classes": NUM_CLASSES, "learning_rate": LEARNING_RATE, "task": "training"}
    common["recipe"] = recipes.fields(SPEEDRUN if setting.model == SPEEDRUN else "", setting.batch_size)
    spec = setting.key | common | {"members": models_at_once(setting, form)}
    if form.startswith(PYTORCH):
        kind, blocks = BLOCKS.get(setting.model, (None, ()))
        if setting.model == SPEEDRUN:
            kind, blocks = SPEEDRUN, [scale_channels(count, setting.width) for count in speedrun.CHANNELS]
        base = form.removeprefix(PYTORCH).removesuffix(ONE_THREAD).removesuffix(PER_CORE)
        processes = num_cores() if form.endswith(PER_CORE) else 1
        threads = num_cores() if base == form.removeprefix(PYTORCH) else 1
        peer = {"library": "pytorch", "form": base, "threads": threads, "processes": processes}
        return spec | peer | {"members": 1, "kind": kind, "blocks": list(blocks)}
    layout, lowering = engine_forms().get(form) or (ensemble.default_layout(), default_lowering())
    return spec | {"library": "jax", "layout": layout, "lowering": lowering}


def describe_matmul(library: str, compute_dtype: str) -> dict[str, Any]:
    """The specification of a worker that measures the peak rate of a large square matrix product."""
    common = {"task": "matmul", "library": library, "compute_dtype": compute_dtype, "threads": num_cores()}
    return common | MATMUL_SIZES

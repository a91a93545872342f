"""What is measured (settings) and who is measured (forms), as plain data that a worker can be told."""

import fnmatch
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any, get_args

from bdjax.models import Lowering, default_lowering
from bdjax.models.resnet import BLOCKS
from bdjax.training import ensemble

NUM_CLASSES = 10
LEARNING_RATE = 0.01
ALONE = "alone"
PYTORCH = "pytorch-"
PYTORCH_FORMS = ("contiguous", "channels-last", "compiled")
"""Everywhere; on a CPU with a thread for each core."""
PYTORCH_GPU_FORMS = ("compiled-graphs",)
ONE_THREAD, PER_CORE = "-one-thread", "-per-core"
PYTORCH_CPU_FORMS = tuple(form + suffix for suffix in (ONE_THREAD, PER_CORE) for form in PYTORCH_FORMS)
"""With a single thread, which suits small networks and busy machines; and as many such processes, each with a model of its
own, as there are cores."""
MATMUL_SIZES = {"size": 2048, "size_on_gpu": 8192}


@dataclass(frozen=True)
class Setting:
    """One point of the grid: everything that all contenders have in common."""

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
        """What two settings share that differ in members only."""
        return (self.model, self.shape, self.width, self.compute_dtype)

    @property
    def family_name(self) -> str:
        """ "resnet18 width 8 at 8x8x1", and the dtype if it is not the usual one."""
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
    """Name -> layout and lowering, all that there are."""
    pairs = product(get_args(ensemble.Layout), get_args(Lowering))
    return {f"{layout}-{lowering}": (layout, lowering) for layout, lowering in pairs}


def all_forms(has_gpu: bool) -> tuple[str, ...]:
    """The names of all contenders."""
    pytorch = PYTORCH_FORMS + (PYTORCH_GPU_FORMS if has_gpu else PYTORCH_CPU_FORMS)
    return (*engine_forms(), ALONE, *(PYTORCH + form for form in pytorch))


def choose(forms: Sequence[str], patterns: Sequence[str]) -> tuple[str, ...]:
    """The forms that a pattern such as `map-*` matches, all if there is none, without those that a `!map-*` matches."""
    wanted = [each for each in patterns if not each.startswith("!")] or ["*"]
    unwanted = [each[1:] for each in patterns if each.startswith("!")]
    return tuple(form for form in forms if _matches(form, wanted) and not _matches(form, unwanted))


def _matches(form: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(form, each) for each in patterns)


def num_cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def models_at_once(setting: Setting, form: str) -> int:
    """How many models an epoch of this contender trains: M, or 1 where one is trained after the other."""
    if form.endswith(PER_CORE):
        return num_cores()
    return setting.members if form in engine_forms() else 1


def that_fit(setting: Setting, forms: Sequence[str]) -> tuple[str, ...]:
    """The contenders that make sense here: more models at once than there are members would be somebody else's speed."""
    return tuple(form for form in forms if models_at_once(setting, form) <= setting.members)


def describe(setting: Setting, form: str) -> dict[str, Any]:
    """A worker's specification."""
    # The name keeps two apart that are alike otherwise: alone is what a layout with one member is.
    common = {"name": form, "num_classes": NUM_CLASSES, "learning_rate": LEARNING_RATE, "task": "training"}
    spec = setting.key | common | {"members": models_at_once(setting, form)}
    if form.startswith(PYTORCH):
        kind, blocks = BLOCKS.get(setting.model, (None, ()))
        base = form.removeprefix(PYTORCH).removesuffix(ONE_THREAD).removesuffix(PER_CORE)
        processes = num_cores() if form.endswith(PER_CORE) else 1
        threads = num_cores() if base == form.removeprefix(PYTORCH) else 1
        peer = {"library": "pytorch", "form": base, "threads": threads, "processes": processes}
        return spec | peer | {"members": 1, "kind": kind, "blocks": list(blocks)}
    layout, lowering = engine_forms().get(form) or (ensemble.default_layout(), default_lowering())
    return spec | {"library": "jax", "layout": layout, "lowering": lowering}


def describe_matmul(library: str, compute_dtype: str) -> dict[str, Any]:
    """The specification of a worker that measures the peak of a large square product."""
    common = {"task": "matmul", "library": library, "compute_dtype": compute_dtype, "threads": num_cores()}
    return common | MATMUL_SIZES

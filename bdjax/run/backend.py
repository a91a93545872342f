"""What is settled about JAX before it is imported, which takes longer than --help or a refused flag."""

import importlib.metadata
import importlib.util
import os
import pathlib
import sys
import warnings
from typing import Any


def is_cpu() -> bool:
    """Whether JAX computes on the CPU: it must, without a plugin for anything else, and otherwise it is asked."""
    platforms = os.environ.get("JAX_PLATFORMS", "")
    if "jax" not in sys.modules and (platforms == "cpu" or not (platforms or _has_plugins())):
        return True
    import jax

    return jax.default_backend() == "cpu"


def _has_plugins() -> bool:
    """Whether something is installed that gives JAX another backend than its own for the CPU."""
    is_installed = any(importlib.util.find_spec(name) for name in ("jax_plugins", "libtpu"))
    is_named = any(os.environ.get(name) for name in ("PJRT_NAMES_AND_LIBRARY_PATHS", "TPU_LIBRARY_PATH"))
    return is_installed or is_named or bool(importlib.metadata.entry_points(group="jax_plugins"))


def set_up() -> None:
    """Keep compiled programs between runs, and make each CPU core a device. Call this before any computation."""
    use_compilation_cache()
    use_every_core()


def use_every_core() -> None:
    """Make each CPU core a device; it has no effect on a GPU."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    _set("jax_num_cpu_devices", cores or 1)


def use_compilation_cache() -> None:
    """Keep compiled programs between runs, in JAX_COMPILATION_CACHE_DIR or below the user's cache folder.

    Programs that take less than 0.2 s are compiled each time, unless JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS is set.
    If the folder cannot be written, JAX compiles every time; nothing else changes.
    """
    name = "jax_compilation_cache_dir"
    jax = sys.modules.get("jax")
    if (getattr(jax.config, name) if jax else os.environ.get(name.upper())) is None:
        base = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
        _set(name, str(pathlib.Path(base) / "bdjax" / "compiled"))
    seconds = "jax_persistent_cache_min_compile_time_secs"
    if seconds.upper() not in os.environ:
        _set(seconds, 0.2)
    warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation cache")


def _set(name: str, value: Any) -> None:
    """Change a setting of JAX, which reads the environment when it is imported."""
    if "jax" in sys.modules:
        sys.modules["jax"].config.update(name, value)
    else:
        os.environ[name.upper()] = str(value)

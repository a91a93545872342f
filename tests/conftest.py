"""Strict JAX for every test: no silent promotion of dtypes or ranks, two devices, one compilation cache for all workers.

Tests compile much and compute little, so most of the compiler's optimisations are off.
"""

import gc
import importlib.metadata
import os
import pathlib
import signal
import tempfile

# A program in one part: parts may round one expression differently, and take longer together.
FAST_COMPILATION = [
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
    "--xla_cpu_parallel_codegen_split_count=1",
]
if importlib.metadata.version("jaxlib").startswith("0.10."):
    # The older code generator compiles three times as fast. Later versions have no such flag, and refuse what they do not know.
    FAST_COMPILATION.append("--xla_cpu_use_fusion_emitters=false")

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("MPLBACKEND", "Agg")
# Flags of the caller, such as --xla_cpu_max_isa=AVX2, come last, so they win.
os.environ["XLA_FLAGS"] = " ".join([*FAST_COMPILATION, os.environ.get("XLA_FLAGS", "")]).strip()
# In the environment, so that the programs which tests start share what is compiled, too.
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(pathlib.Path(tempfile.gettempdir()) / "bdjax-test-compilation-cache")
# Those programs import the package dozens of times, and would compile its sources anew each time.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
# Reading even the smallest program takes a third of the time of compiling it.
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
# Where in the source each operation comes from is part of every program, and read by no test.
os.environ["JAX_TRACEBACK_IN_LOCATIONS_LIMIT"] = "0"

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_num_cpu_devices", 2)
# On a machine of one or four cores, `use_every_core` in a test's own process would ask for another number, which is an error.
os.sched_getaffinity = lambda process: {0, 1}


def pytest_collection_finish() -> None:
    """Tracing makes many short-lived objects: collect garbage less often, and never look at what importing left."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 50, 100)


@pytest.fixture(scope="session")
def data_dir() -> pathlib.Path:
    """The folder with the big image sets, for the tests that need one."""
    folder = os.environ.get("BDJAX_DATA_DIR")
    if not folder:
        pytest.skip("BDJAX_DATA_DIR is not set: the big image sets are not here")
    return pathlib.Path(folder)


@pytest.fixture
def foreground():
    """SIGINT as a program in the foreground has it: a shell that starts the tests in the background lets them ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


MOST_MAPS = 25_000
"""Memory maps of a process from which on its compiled programs are dropped: each has several, and Linux allows 65,530."""


@pytest.fixture(scope="module", autouse=True)
def few_compiled_programs():
    """A worker of the whole suite compiles thousands of programs, and would crash at the limit of maps.

    What is left of a module is not looked at again: otherwise each `gc.collect()`, as after a failure to write a checkpoint,
    takes more than a second at the end of the suite.
    """
    yield
    maps = pathlib.Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > MOST_MAPS:
        gc.unfreeze()
        jax.clear_caches()
    gc.collect()
    gc.freeze()

"""Several processes, on one host or many; the only module that uses `jax.distributed`.

Every process runs the same program and computes the same values; each trains the members on its own devices. Only the primary
process writes files and prints. All processes see the same files.

Apart from arrays, the processes exchange short texts in the coordinator's key-value store rather than arrays on devices: a
collective gives up or crashes when a process is half a minute late, whereas a wait for a text can notice that its sender has
failed.
"""

import contextlib
import functools
import itertools
import json
import sys
import threading
from collections.abc import Callable
from functools import cache
from typing import Any, ParamSpec, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from bdjax.errors import InputError, ProcessError
from bdjax.training.process_flags import Flags
from bdjax.types import PyTree

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

_POLL_MILLISECONDS = 2000
_PATIENCE_SECONDS = 10.0
_PREFIX = "bdjax"


# ---- Starting -------------------------------------------------------------------------------------------------------


def start(flags: Flags) -> None:
    """Connect to the other processes, waiting for all of them. Call this before any computation.

    Raises:
        InputError: if no cluster is detected, or the other processes do not connect.
    """
    # Otherwise JAX would treat SIGTERM as a notice of preemption, and the process would not end.
    with contextlib.suppress(AttributeError):
        jax.config.update("jax_enable_preemption_service", False)
    if jax.config.jax_cpu_collectives_implementation is None:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # After five minutes JAX ends the process without an exception that Python could catch, so report the wait.
    where = f"--coordinator={flags.coordinator}" if flags.coordinator else "the cluster's coordinator"
    reminder = threading.Timer(_PATIENCE_SECONDS, _print_error, [f"waiting for the other processes at {where}"])
    reminder.daemon = True
    reminder.start()
    try:
        jax.distributed.initialize(flags.coordinator, flags.processes, flags.process)
    except ValueError as error:
        if flags.coordinator is not None:
            raise
        raise InputError(
            f"--distributed: JAX detects no cluster ({_one_line(error)}); "
            "give --coordinator=HOST:PORT --processes=N --process=I"
        ) from None
    except jax.errors.JaxRuntimeError as error:
        raise InputError(f"{where}: the processes did not connect ({_one_line(error)})") from None
    finally:
        reminder.cancel()


def _print_error(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# ---- Who and how many -----------------------------------------------------------------------------------------------


def count() -> int:
    """The number of processes that run this program."""
    # jax.process_count() initialises the devices, so it is only called if necessary.
    return jax.process_count() if jax.distributed.is_initialized() else 1


def is_primary() -> bool:
    """Whether this process writes files and prints."""
    return not jax.distributed.is_initialized() or jax.process_index() == 0


# ---- Messages -------------------------------------------------------------------------------------------------------

_numbers = itertools.count()
_in_primary_only = False
"""Whether a function of `by_primary` is running, in which no other process takes part."""


def exchange(name: str, text: str = "") -> list[str]:
    """Send a text to all processes and wait for theirs.

    Args:
        name: what the text is about; the same in all processes.
        text: the text of this process, at most a megabyte.

    Returns:
        The texts of all processes, in order.

    Raises:
        ProcessError: if another process fails meanwhile, or is at another point of the program.
    """
    if count() == 1 or _in_primary_only:
        return [text]
    client, me, number = _client(), jax.process_index(), next(_numbers)
    client.key_value_set(f"{_PREFIX}/{number}/{me}", f"{name}\n{text}")
    texts = []
    for process in range(count()):
        other_name, _, other_text = _wait_for(process, f"{_PREFIX}/{number}/{process}").partition("\n")
        if other_name != name:
            raise ProcessError(f"process {process} is at {other_name!r}, but process {me} is at {name!r}")
        texts.append(other_text)
    # All processes have arrived, so all have read the previous texts.
    if number:
        client.key_value_delete(f"{_PREFIX}/{number - 1}/{me}")
    return texts


def barrier(name: str) -> None:
    """Wait until all processes have arrived.

    Raises:
        ProcessError: if another process fails meanwhile.
    """
    exchange(name)


def by_primary(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Decorate a function so that only the primary process runs it; all processes get its result or its error.

    All processes must call it, and the result must be JSON-serialisable. While the function runs, `exchange` and `barrier` do
    not wait for other processes.
    """

    @functools.wraps(function)
    def everywhere(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        global _in_primary_only
        if count() == 1 or _in_primary_only:
            return function(*args, **kwargs)
        name, outcome, raised = function.__qualname__, None, None
        if is_primary():
            _in_primary_only = True
            try:
                outcome = {"result": function(*args, **kwargs)}
            except Exception as error:
                raised = error
                outcome = {"input_error" if isinstance(error, InputError) else "error": _one_line(error)}
            finally:
                _in_primary_only = False
        outcome = json.loads(exchange(name, json.dumps(outcome))[0])
        if raised is not None:
            raise raised
        if "input_error" in outcome:
            raise InputError(outcome["input_error"])
        if "error" in outcome:
            raise ProcessError(f"process 0 failed: {outcome['error']}")
        return outcome["result"]

    return everywhere


def report_failure(error: BaseException) -> None:
    """Report to the other processes that this one is about to end, so that they do not wait for it."""
    if count() > 1 and not isinstance(error, ProcessError):
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            key = f"{_PREFIX}/failed/{jax.process_index()}"
            _client().key_value_set(key, _one_line(error), allow_overwrite=True)


def _client() -> Any:
    # jax.experimental.multihost_utils offers collectives only.
    from jax._src import distributed

    return distributed.global_state.client


def _wait_for(process: int, key: str) -> str:
    client = _client()
    while True:
        try:
            return client.blocking_key_value_get(key, _POLL_MILLISECONDS)
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise ProcessError(f"waiting for process {process}: {_one_line(error)}") from None
        for failed, why in client.key_value_dir_get(f"{_PREFIX}/failed/"):
            raise ProcessError(f"process {failed.rpartition('/')[2]} failed: {why}")


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:500] or type(error).__name__


# ---- Arrays ---------------------------------------------------------------------------------------------------------


def spans(mesh: Mesh) -> bool:
    """Whether a mesh includes devices of other processes."""
    return mesh.size != len(mesh.local_devices)


def put(tree: PyTree, sharding: NamedSharding) -> PyTree:
    """Put leaves that every process has on a mesh of many processes; each places the part for its own devices."""

    def place(leaf: Any) -> jax.Array:
        host = np.asarray(_plain(leaf))
        # A copy, since the buffers may be donated.
        placed = jax.make_array_from_callback(host.shape, sharding, lambda index: np.array(host[index]))
        return _like(leaf, placed)

    return jax.tree.map(place, tree)


def fetch(tree: PyTree, mesh: Mesh) -> PyTree:
    """Gather leaves on a mesh of many processes to each process's first device.

    Raises:
        ProcessError: if another process has failed.
    """
    # The collective times out, so wait for late processes here.
    jax.block_until_ready(tree)
    barrier("fetch")
    try:
        whole = jax.block_until_ready(_replicate(mesh)(jax.tree.map(_plain, tree)))
    except jax.errors.JaxRuntimeError as error:
        raise ProcessError(f"transferring arrays between the processes failed: {_one_line(error)}") from None
    return jax.tree.map(lambda leaf, values: _like(leaf, values.addressable_data(0)), tree, whole)


@cache
def _replicate(mesh: Mesh) -> Callable[[PyTree], PyTree]:
    return jax.jit(lambda tree: tree, out_shardings=NamedSharding(mesh, PartitionSpec()))


def _is_key(leaf: Any) -> bool:
    return jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _plain(leaf: Any) -> Any:
    return jax.random.key_data(leaf) if _is_key(leaf) else leaf


def _like(leaf: Any, values: jax.Array) -> jax.Array:
    return jax.random.wrap_key_data(values, impl=jax.random.key_impl(leaf)) if _is_key(leaf) else values

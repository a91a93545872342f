"""Several processes, on one host or many: the only place that knows of `jax.distributed`.

Every process runs the same program and comes to the same values; each trains its own devices' share of the members. The
primary process alone writes files and prints. The processes see the same files.

What they tell each other besides arrays are short texts in the coordinator's store, not arrays on devices: a collective
gives up or crashes when one of its processes is late by half a minute, and a wait for a text can notice that the one who
should write it has failed.
"""

import contextlib
import functools
import itertools
import json
import sys
import threading
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple, ParamSpec, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from bdjax.errors import InputError
from bdjax.types import PyTree

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

HELP = (
    "Several processes, on one host or many: start the same command in each with --coordinator=HOST:PORT (of the first), "
    "--processes=N and --process=I, or with --distributed alone under SLURM, Open MPI and others that JAX knows."
)

_POLL_MILLISECONDS = 2000
_PATIENCE_SECONDS = 10.0
_PREFIX = "bdjax"


class ProcessError(RuntimeError):
    """Another process has failed or is gone; the message is one line that says which, and why if that is known."""


class Flags(NamedTuple):
    """How this process finds the others."""

    coordinator: str | None = None
    """HOST:PORT of the first process; None to ask the cluster's environment"""
    processes: int | None = None
    process: int | None = None


# ---- Starting -------------------------------------------------------------------------------------------------------


def take_flags(arguments: Sequence[str]) -> tuple[Flags | None, list[str]]:
    """Take the flags that are about processes out of a command line.

    Args:
        arguments: without the program's name.

    Returns:
        What they say, None if there are none, and the other arguments.

    Raises:
        InputError: if one of them is missing or cannot be.
    """
    given: dict[str, str] = {}
    others: list[str] = []
    waiting = iter(arguments)
    for argument in waiting:
        flag, equals, value = argument.partition("=")
        if flag == "--distributed" and not equals:
            given[flag] = ""
        elif flag in ("--coordinator", "--processes", "--process"):
            given[flag] = value if equals else next(waiting, "")
        else:
            others.append(argument)
    if not given:
        return None, others
    if "--distributed" in given:
        if len(given) > 1:
            raise InputError(
                f"--distributed asks the cluster's environment; leave out {_listed(given, '--distributed')}"
            )
        return Flags(), others
    missing = [flag for flag in ("--coordinator", "--processes", "--process") if flag not in given]
    if missing:
        raise InputError(
            f"{' and '.join(missing)} missing: several processes need all of --coordinator --processes --process"
        )
    host, _, port = given["--coordinator"].rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise InputError(f"--coordinator {given['--coordinator']!r} is not HOST:PORT")
    for flag in ("--processes", "--process"):
        if not given[flag].isdecimal():
            raise InputError(f"{flag} {given[flag]!r} is not a whole number")
    count, index = int(given["--processes"]), int(given["--process"])
    if index >= count:
        raise InputError(f"--process {index} is not below --processes {count}: processes count from 0")
    return Flags(given["--coordinator"], count, index), others


def _listed(given: dict[str, str], but: str) -> str:
    return " ".join(flag for flag in given if flag != but)


def start(flags: Flags) -> None:
    """Join the other processes. To be called before anything is computed; waits until all are there.

    Raises:
        InputError: if there is no cluster to ask, or the others do not come.
    """
    # Else a SIGTERM would be taken for a notice to save soon, and not end the process.
    with contextlib.suppress(AttributeError):
        jax.config.update("jax_enable_preemption_service", False)
    if jax.config.jax_cpu_collectives_implementation is None:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # JAX gives up after five minutes, and then ends the process without a word that Python could catch.
    where = f"--coordinator={flags.coordinator}" if flags.coordinator else "the cluster's coordinator"
    patience = threading.Timer(_PATIENCE_SECONDS, _say_waiting, [f"waiting for the other processes at {where}"])
    patience.daemon = True
    patience.start()
    try:
        jax.distributed.initialize(flags.coordinator, flags.processes, flags.process)
    except ValueError as error:
        if flags.coordinator is not None:
            raise
        raise InputError(
            f"--distributed: no cluster that JAX knows of ({_one_line(error)}); "
            "give --coordinator=HOST:PORT --processes=N --process=I"
        ) from None
    except jax.errors.JaxRuntimeError as error:
        raise InputError(f"{where}: the processes did not meet ({_one_line(error)})") from None
    finally:
        patience.cancel()


def _say_waiting(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# ---- Who and how many -----------------------------------------------------------------------------------------------


def count() -> int:
    """How many processes run this program."""
    # JAX is not asked without need: its answer starts the devices.
    return jax.process_count() if jax.distributed.is_initialized() else 1


def is_primary() -> bool:
    """Whether this process is the one that writes and prints."""
    return not jax.distributed.is_initialized() or jax.process_index() == 0


# ---- Words ----------------------------------------------------------------------------------------------------------

_numbers = itertools.count()
_is_alone = False


def exchange(name: str, text: str = "") -> list[str]:
    """Tell all processes something, and hear what they tell; returns when all have.

    Args:
        name: what it is about, the same in all processes.
        text: of this process, at most a megabyte.

    Returns:
        Every process's text, in their order.

    Raises:
        ProcessError: if another process fails meanwhile, or is at another point of the program.
    """
    if count() == 1 or _is_alone:
        return [text]
    client, me, number = _client(), jax.process_index(), next(_numbers)
    client.key_value_set(f"{_PREFIX}/{number}/{me}", f"{name}\n{text}")
    texts = []
    for process in range(count()):
        other, _, told = _wait_for(process, f"{_PREFIX}/{number}/{process}").partition("\n")
        if other != name:
            raise ProcessError(f"process {process} is at {other!r} where process {me} is at {name!r}")
        texts.append(told)
    # All are here, so all have read what was told before.
    if number:
        client.key_value_delete(f"{_PREFIX}/{number - 1}/{me}")
    return texts


def barrier(name: str) -> None:
    """Wait until all processes are here.

    Raises:
        ProcessError: if another process fails meanwhile.
    """
    exchange(name)


def by_primary(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Let the primary process run a function, and hand its result, or what it raised, to all.

    All processes have to call it. The result has to be something that JSON keeps. What the function itself calls is the
    primary's own affair: no other process is waited for.
    """

    @functools.wraps(function)
    def everywhere(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        global _is_alone
        if count() == 1 or _is_alone:
            return function(*args, **kwargs)
        name, outcome, raised = function.__qualname__, None, None
        if is_primary():
            _is_alone = True
            try:
                outcome = {"result": function(*args, **kwargs)}
            except Exception as error:
                raised = error
                outcome = {"input_error" if isinstance(error, InputError) else "error": _one_line(error)}
            finally:
                _is_alone = False
        told = json.loads(exchange(name, json.dumps(outcome))[0])
        if raised is not None:
            raise raised
        if "input_error" in told:
            raise InputError(told["input_error"])
        if "error" in told:
            raise ProcessError(f"process 0 failed: {told['error']}")
        return told["result"]

    return everywhere


def report_failure(error: BaseException) -> None:
    """Tell the other processes that this one is about to end, so that they do not wait for it."""
    if count() > 1 and not isinstance(error, ProcessError):
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            key = f"{_PREFIX}/failed/{jax.process_index()}"
            _client().key_value_set(key, _one_line(error), allow_overwrite=True)


def _client() -> Any:
    # What multihost_utils offers instead are collectives.
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
    """Whether a mesh has devices of other processes."""
    return mesh.size != len(mesh.local_devices)


def put(tree: PyTree, sharding: NamedSharding) -> PyTree:
    """Leaves that every process has, onto devices of many: each process places what is its own devices' part."""

    def one(leaf: Any) -> jax.Array:
        host = np.asarray(_plain(leaf))
        # A copy, so that the buffers may be donated.
        placed = jax.make_array_from_callback(host.shape, sharding, lambda index: np.array(host[index]))
        return _like(leaf, placed)

    return jax.tree.map(one, tree)


def fetch(tree: PyTree, mesh: Mesh) -> PyTree:
    """Leaves that lie on a mesh of many processes, as wholes on each process's first device.

    Raises:
        ProcessError: if another process fails before.
    """
    # Those who come too early would give up in the collective.
    jax.block_until_ready(tree)
    barrier("fetch")
    try:
        whole = jax.block_until_ready(_replicate(mesh)(jax.tree.map(_plain, tree)))
    except jax.errors.JaxRuntimeError as error:
        raise ProcessError(f"arrays did not get through between the processes: {_one_line(error)}") from None
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

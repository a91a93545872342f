"""Checkpoints; the only module that imports Orbax.

There are two kinds. Both are written to a temporary folder and renamed, so an interrupted write leaves the previous one intact:

- `save` / `load`: a finished tree, leaf by leaf under its own names, readable by plain Orbax;
- `save_progress` / `load_progress`: the state of an unfinished stage, once per epoch, with all leaves of one dtype packed into
  one vector. Orbax takes about 1.5 ms per leaf, which for a state of many small leaves would exceed the epoch itself.

Each holds the SHA-256 of its files, which are checked before Orbax reads them: Orbax would accept a flipped bit, and answers a
damaged file with pages of errors. Checkpoints of older versions have no hashes, and are read without.

With several processes, all of them call each function. Only the primary writes (Orbax ensures that for its own files, with a
barrier), and each process reads for itself.
"""

import contextlib
import functools
import gc
import hashlib
import json
import logging
import os
import pathlib
import re
import shutil
import stat
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from types import ModuleType
from typing import Any, TypeVar

import jax
import numpy as np

from bdjax import atomic, interruption
from bdjax.errors import InputError
from bdjax.training import processes
from bdjax.types import PyTree

logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax logs a dozen lines per save

Result = TypeVar("Result")

_PROGRESS = "progress-"
_ABOUT = "about.json"
_TREE = "tree"
_HASHES = "sha256"
"""in about.json: name of each file below tree/ -> its SHA-256"""
_HASHES_OF_PROGRESS = "sha256.json"
"""the same as a file of its own"""
_CHUNK = 1 << 20
_LARGEST_JSON = 1 << 26


@functools.cache
def orbax() -> ModuleType:
    """Orbax, imported when it is first used: that takes as long as importing JAX."""
    from orbax.checkpoint import v1

    sys.unraisablehook = functools.partial(_report, sys.unraisablehook)
    return v1


def _report(hook: Callable[[Any], Any], unraisable: Any) -> None:
    # After a failure, threads of TensorStore may end when Orbax has closed the event loop that waited for them.
    error = unraisable.exc_value
    if not (isinstance(error, RuntimeError) and str(error) == "Event loop is closed"):
        hook(unraisable)


def _by_itself() -> contextlib.AbstractContextManager:
    """Let each process read on its own; by default Orbax waits for all processes."""
    if processes.count() == 1:
        return contextlib.nullcontext()
    me = jax.process_index()
    options = orbax().options.MultiprocessingOptions(
        primary_host=me, active_processes={me}, barrier_sync_key_prefix=f"bdjax-{me}"
    )
    return orbax().Context(multiprocessing_options=options)


# ---- Finished trees -------------------------------------------------------------------------------------------------


def save(folder: pathlib.Path, tree: PyTree, about: Mapping[str, Any]) -> None:
    """Write a finished tree, replacing an existing one.

    Args:
        folder: gets `folder/tree`, an Orbax checkpoint, and `folder/about.json`, its description.
        tree: a pytree of arrays.
        about: JSON-serialisable facts needed to rebuild the target, such as the model's name, width and classes.

    Raises:
        OSError: if the files cannot be written, for example because the disk is full.
    """
    folder = folder.absolute()
    _make_room(folder)
    tree = jax.tree.map(_plain, tree)
    # With several processes Orbax refuses arrays on the devices of only one of them.
    written = tree if processes.count() == 1 else jax.device_get(tree)
    _write(folder / _TREE, written, lambda: _complete(folder, dict(about)))


@processes.by_primary
def _make_room(folder: pathlib.Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    # about.json is written last and makes the checkpoint complete.
    _remove(folder / _ABOUT)
    for path in folder.glob(f"{_TREE}*"):  # also what an interrupted write left
        _remove(path)


@processes.by_primary
def _complete(folder: pathlib.Path, facts: dict[str, Any]) -> None:
    facts[_HASHES] = _hashes(folder / _TREE)
    atomic.write_bytes(folder / _ABOUT, f"{json.dumps(facts, indent=2, sort_keys=True)}\n".encode())


@processes.by_primary
def is_complete(folder: pathlib.Path) -> bool:
    """Whether `folder` holds a finished checkpoint, which may be damaged."""
    return (folder / _ABOUT).is_file()


def about(folder: pathlib.Path) -> dict[str, Any]:
    """The facts saved beside a tree.

    Raises:
        InputError: if the folder is not a finished checkpoint, or its about.json is not JSON.
    """
    return {name: fact for name, fact in _read_about(folder).items() if name != _HASHES}


def _read_about(folder: pathlib.Path) -> dict[str, Any]:
    if not is_complete(folder):
        raise InputError(f"{folder}: not a finished checkpoint; it should contain {_TREE}/ and {_ABOUT}")
    facts = _read_json(folder / _ABOUT)
    if not isinstance(facts, dict):
        raise InputError(f"{folder / _ABOUT}: should contain a JSON object, not {type(facts).__name__}")
    return facts


def _read_json(path: pathlib.Path) -> Any:
    try:
        if path.stat().st_size > _LARGEST_JSON:
            raise InputError(f"{path}: has {path.stat().st_size} bytes; at most {_LARGEST_JSON} are read")
        return json.loads(path.read_bytes())
    except InputError:
        raise
    except (ValueError, RecursionError, OSError) as error:
        raise InputError(f"{path}: not JSON ({_first_line(error)})") from None


def check_facts(folder: pathlib.Path, facts: Mapping[str, Any]) -> None:
    """Check that a finished checkpoint is of the stage that it is read for.

    Args:
        folder: as for `save`.
        facts: as given to `save`; those that an older version did not save are not compared.

    Raises:
        InputError: if a fact differs, or as `about`.
    """
    stored, wanted = about(folder), json.loads(json.dumps(dict(facts)))
    for name in stored.keys() & wanted.keys():
        if stored[name] != wanted[name]:
            was, should = (str(value)[:80] for value in (stored[name], wanted[name]))
            raise InputError(f"{folder / _ABOUT}: {name} is {was}; should be {should}; {_again(folder)}")


def load(folder: pathlib.Path, like: PyTree, remedy: str = "") -> PyTree:
    """Read a finished tree onto the default device.

    Args:
        folder: as for `save`.
        like: a pytree of arrays or `jax.ShapeDtypeStruct`, as from `jax.eval_shape`, with the saved structure.
        remedy: what to do about a damaged checkpoint; by default, delete it to train the stage again.

    Raises:
        InputError: if the folder is not a finished checkpoint, is damaged, or its structure or shapes differ from `like`.
    """
    path, remedy = folder.absolute() / _TREE, remedy or _again(folder)
    facts = _read_about(folder)
    _check_files(path, facts.get(_HASHES), folder / _ABOUT, remedy)
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    target = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device), like)

    def read() -> PyTree:
        # Compare shapes first: Orbax would notice a mismatch halfway through its reads.
        stored, wanted = _shapes(orbax().metadata(path).metadata), _shapes(like)
        for name in sorted(stored.keys() | wanted.keys()):
            if stored.get(name) != wanted.get(name):
                raise InputError(
                    f"{folder}: the checkpoint does not fit the model that {_ABOUT} describes: {name} is "
                    f"{stored.get(name, 'absent')}; should be {wanted.get(name, 'absent')}"
                )
        return orbax().load(path, target)

    return _read(path, read, remedy)


# ---- Progress -------------------------------------------------------------------------------------------------------


def save_progress(folder: pathlib.Path, number: int, tree: PyTree) -> None:
    """Write the state of a stage after `number` epochs, then delete older progress.

    Raises:
        OSError: if the files cannot be written; the older progress is still there.
    """
    path = folder.absolute() / f"{_PROGRESS}{number:06d}"
    _make_room_for_progress(path)
    _write(path, _pack(tree), lambda: _complete_progress(path))
    drop_progress(folder, keep=path)


@processes.by_primary
def _make_room_for_progress(path: pathlib.Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.glob(f"{path.name}*"):  # by an interrupted run
        _remove(left)


@processes.by_primary
def _complete_progress(path: pathlib.Path) -> None:
    hashes = f"{json.dumps(_hashes(path), indent=2)}\n"
    with atomic.replacing(path / _HASHES_OF_PROGRESS) as file:  # once per epoch, so without waiting for the disk
        file.write(hashes.encode())


def load_progress(folder: pathlib.Path, like: PyTree) -> PyTree | None:
    """Read the newest progress of a stage; None if there is none.

    Args:
        folder: as for `save_progress`.
        like: a pytree of arrays with the saved structure.

    Raises:
        InputError: if the progress is damaged, or its structure differs from `like`.
    """
    newest = _newest_progress(folder)
    if newest is None:
        return None
    path, hashes, remedy = folder.absolute() / newest, None, _again(folder)
    if os.path.lexists(path / _HASHES_OF_PROGRESS):
        hashes = _read_json(path / _HASHES_OF_PROGRESS)
    _check_files(path, hashes, path / _HASHES_OF_PROGRESS, remedy)
    wanted = _pack(like)

    def read() -> dict[str, np.ndarray]:
        stored, needed = _shapes(orbax().metadata(path).metadata), _shapes(wanted)
        for name in sorted(stored.keys() | needed.keys()):
            if stored.get(name) != needed.get(name):
                sizes = [shapes.get(name, (0,))[0] for shapes in (stored, needed)]
                raise InputError(
                    f"{path}: not the progress of this run (it has {sizes[0]} {name} values, this run {sizes[1]}); choose "
                    "another --output or delete the folder"
                )
        return orbax().load(path, wanted)

    return _unpack(_read(path, read, remedy), like)


@processes.by_primary
def _newest_progress(folder: pathlib.Path) -> str | None:
    found = (path.name for path in folder.absolute().glob(f"{_PROGRESS}*"))
    return max((name for name in found if name[len(_PROGRESS) :].isdigit()), default=None)


@processes.by_primary
def drop_progress(folder: pathlib.Path, keep: pathlib.Path | None = None) -> None:
    """Delete the progress of a stage and any remains of an interrupted write, except `keep`."""
    for path in folder.absolute().glob(f"{_PROGRESS}*"):
        if path != keep:
            with contextlib.suppress(OSError):
                _remove(path)


# ---- Files ----------------------------------------------------------------------------------------------------------


def _again(folder: pathlib.Path) -> str:
    return f"delete {folder} to train this stage again"


def _remove(path: pathlib.Path) -> None:
    """Delete a file, a folder or a link, which is not followed; it need not exist."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _hashes(folder: pathlib.Path) -> dict[str, str]:
    """The SHA-256 of every file below a folder, by its name relative to the folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): _sha256(path) for path in files}


def _sha256(path: pathlib.Path) -> str:
    """Raises OSError for what cannot be read or is no regular file; does not wait for a pipe."""
    digest = hashlib.sha256()
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError("it is not a regular file")
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


@processes.by_primary
def _check_files(folder: pathlib.Path, hashes: Any, source: pathlib.Path, remedy: str) -> None:
    """Compare the files of a checkpoint with their hashes.

    Args:
        folder: the checkpoint.
        hashes: file -> SHA-256; None to check only that the folder exists.
        source: the file that the hashes are from, for error messages.
        remedy: the end of the error message.

    Raises:
        InputError: names the first file that is missing or not as it was written.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: the folder is missing; {remedy}")
    if hashes is None:
        return
    is_map = isinstance(hashes, dict) and all(isinstance(value, str) for value in hashes.values())
    if not is_map or any(pathlib.PurePosixPath(name).is_absolute() or ".." in name.split("/") for name in hashes):
        raise InputError(f"{source}: the hashes of the files of {folder} are damaged; {remedy}")
    for name, expected in sorted(hashes.items()):
        path = folder / name
        try:
            problem = "" if _sha256(path) == expected else "its content is not what was written"
        except FileNotFoundError:
            problem = "the file is missing"
        except (OSError, ValueError) as error:  # ValueError: a null byte in a name
            problem = f"the file cannot be read ({_first_line(error)})"
        if problem:
            raise InputError(f"{path}: {problem}; {remedy}")


# ---- Orbax ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Silence what Orbax and asyncio print beside the exceptions that they raise."""
    orbax()  # changes the hook
    hook = sys.unraisablehook
    loggers = [logging.getLogger(name) for name in ("absl", "asyncio")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL + 1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            sys.unraisablehook = lambda unraisable: None
            yield
    finally:
        sys.unraisablehook = hook
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _read(path: pathlib.Path, read: Callable[[], Result], remedy: str) -> Result:
    """Call Orbax to read `path`; whatever it raises about a damaged checkpoint becomes one line."""
    with interruption.postponed(), _quietly():
        try:
            with _by_itself():
                return read()
        except InputError as error:
            problem = str(error)
        except Exception as error:
            problem = f"{path}: cannot be read ({_first_line(error)}); {remedy}"
        gc.collect()  # Orbax drops coroutines, whose warnings would be printed later
    raise InputError(problem)


def _write(path: pathlib.Path, tree: PyTree, complete: Callable[[], None]) -> None:
    """Let Orbax write `path`, then complete it; a failure of the file system is an OSError, whatever Orbax makes of it."""
    with interruption.postponed(), _quietly():
        try:
            orbax().save(path, tree)
            complete()
            return
        except Exception as error:
            failure = _failure_to_write(error, path)
            if failure is None:
                raise
        gc.collect()
    raise failure


def _failure_to_write(error: BaseException, path: pathlib.Path) -> OSError | None:
    """The failure of the file system behind an exception; None if it has another reason."""
    seen: list[BaseException] = []
    waiting: list[BaseException | None] = [error]
    while waiting:
        cause = waiting.pop()
        if cause is None or cause in seen:
            continue
        seen.append(cause)
        waiting += [cause.__context__, cause.__cause__, *getattr(cause, "exceptions", ())]
    for cause in seen:
        if isinstance(cause, OSError) and cause.errno:
            return OSError(cause.errno, os.strerror(cause.errno), str(cause.filename or path))
    for cause in seen:
        # TensorStore writes errors of the system into its text.
        if number := re.search(r"os_error_code='(\d+)'", str(cause)):
            return OSError(int(number[1]), os.strerror(int(number[1])), str(path))
    return None


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__


def _shapes(tree: PyTree) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): tuple(leaf.shape) for path, leaf in leaves}


def _plain(leaf: Any) -> Any:
    """The words of a typed key, since NumPy has no key types; other leaves as they are."""
    return jax.random.key_data(leaf) if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf


def _pack(tree: PyTree) -> dict[str, np.ndarray]:
    groups: dict[str, list[np.ndarray]] = {}
    for leaf in map(np.asarray, jax.device_get([_plain(leaf) for leaf in jax.tree.leaves(tree)])):
        groups.setdefault(leaf.dtype.name, []).append(leaf.reshape(-1))
    return {name: np.concatenate(leaves) for name, leaves in groups.items()}


def _unpack(packed: Mapping[str, np.ndarray], like: PyTree) -> PyTree:
    position = dict.fromkeys(packed, 0)

    def take(leaf: Any) -> jax.Array:
        plain = _plain(leaf)
        name = np.dtype(plain.dtype).name
        start = position[name]
        position[name] = start + plain.size
        values = jax.numpy.asarray(packed[name][start : position[name]].reshape(plain.shape))
        return jax.random.wrap_key_data(values, impl=jax.random.key_impl(leaf)) if plain is not leaf else values

    return jax.tree.map(take, like)

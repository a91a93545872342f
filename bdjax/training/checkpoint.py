"""Checkpoints; the only module that imports Orbax.

There are two kinds. Both are written to a temporary folder and renamed, so an interrupted write leaves the previous one intact:

- `save` / `load`: a finished tree, leaf by leaf under its own names, readable by plain Orbax;
- `save_progress` / `load_progress`: the state of an unfinished stage, once per epoch, with all leaves of one dtype packed into
  one vector. Orbax takes about 1.5 ms per leaf, which for a state of many small leaves would exceed the epoch itself.

With several processes, all of them call each function. Only the primary writes (Orbax ensures that for its own files, with a
barrier), and each process reads for itself.
"""

import contextlib
import json
import logging
import os
import pathlib
import shutil
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from bdjax.errors import InputError
from bdjax.training import processes
from bdjax.types import PyTree

logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax logs a dozen lines per save

_PROGRESS = "progress-"
_ABOUT = "about.json"


def _by_itself() -> contextlib.AbstractContextManager:
    """Let each process read on its own; by default Orbax waits for all processes."""
    if processes.count() == 1:
        return contextlib.nullcontext()
    me = jax.process_index()
    options = ocp.options.MultiprocessingOptions(
        primary_host=me, active_processes={me}, barrier_sync_key_prefix=f"bdjax-{me}"
    )
    return ocp.Context(multiprocessing_options=options)


def save(folder: pathlib.Path, tree: PyTree, about: Mapping[str, Any]) -> None:
    """Write a finished tree, replacing an existing one.

    Args:
        folder: gets `folder/tree`, an Orbax checkpoint, and `folder/about.json`, its description.
        tree: a pytree of arrays.
        about: JSON-serialisable facts needed to rebuild the target, such as the model's name, width and classes.
    """
    folder = folder.absolute()
    _make_room(folder)
    tree = jax.tree.map(_plain, tree)
    # With several processes Orbax refuses arrays on the devices of only one of them.
    ocp.save(folder / "tree", tree if processes.count() == 1 else jax.device_get(tree))
    _complete(folder, dict(about))


@processes.by_primary
def _make_room(folder: pathlib.Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    # about.json is written last and makes the checkpoint complete.
    with contextlib.suppress(FileNotFoundError):
        (folder / _ABOUT).unlink()
    shutil.rmtree(folder / "tree", ignore_errors=True)


@processes.by_primary
def _complete(folder: pathlib.Path, facts: dict[str, Any]) -> None:
    temporary = folder / (_ABOUT + ".tmp")
    temporary.write_text(json.dumps(facts, indent=2, sort_keys=True) + "\n")
    os.replace(temporary, folder / _ABOUT)


@processes.by_primary
def is_complete(folder: pathlib.Path) -> bool:
    """Whether `folder` holds a finished checkpoint."""
    return (folder / _ABOUT).is_file() and (folder / "tree").is_dir()


def about(folder: pathlib.Path) -> dict[str, Any]:
    """The facts saved beside a tree.

    Raises:
        InputError: if the folder is not a finished checkpoint, or its about.json is not JSON.
    """
    if not is_complete(folder):
        raise InputError(f"{folder}: not a finished checkpoint; it should contain tree/ and {_ABOUT}")
    try:
        facts = json.loads((folder / _ABOUT).read_text())
    except ValueError as error:
        raise InputError(f"{folder / _ABOUT}: not JSON ({error})") from None
    if not isinstance(facts, dict):
        raise InputError(f"{folder / _ABOUT}: should contain a JSON object, not {type(facts).__name__}")
    return facts


def load(folder: pathlib.Path, like: PyTree) -> PyTree:
    """Read a finished tree onto the default device.

    Args:
        folder: as for `save`.
        like: a pytree of arrays or `jax.ShapeDtypeStruct`, as from `jax.eval_shape`, with the saved structure.

    Raises:
        InputError: if the folder is not a finished checkpoint, or its structure or shapes differ from `like`.
    """
    about(folder)
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    target = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device), like)
    path = folder.absolute() / "tree"
    try:
        with _by_itself():
            # Compare shapes first: Orbax would notice a mismatch halfway through its reads and leave warnings behind.
            stored, wanted = _shapes(ocp.metadata(path).metadata), _shapes(like)
            for name in sorted(stored.keys() | wanted.keys()):
                if stored.get(name) != wanted.get(name):
                    raise ValueError(f"{name} is {stored.get(name, 'absent')}; should be {wanted.get(name, 'absent')}")
            return ocp.load(path, target)
    except (ValueError, KeyError, OSError, TypeError) as error:
        raise InputError(
            f"{folder}: the checkpoint does not fit the model that {_ABOUT} describes: {_first_line(error)}"
        ) from None


def save_progress(folder: pathlib.Path, number: int, tree: PyTree) -> None:
    """Write the state of a stage after `number` epochs, then delete older progress."""
    path = folder.absolute() / f"{_PROGRESS}{number:06d}"
    _make_room_for_progress(path)
    ocp.save(path, _pack(tree))
    drop_progress(folder, keep=path)


@processes.by_primary
def _make_room_for_progress(path: pathlib.Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():  # left by an interrupted run
        shutil.rmtree(path)


def load_progress(folder: pathlib.Path, like: PyTree) -> PyTree | None:
    """Read the newest progress of a stage; None if there is none.

    Args:
        folder: as for `save_progress`.
        like: a pytree of arrays with the saved structure.

    Raises:
        InputError: if the structure on disk differs from `like`.
    """
    newest = _newest_progress(folder)
    if newest is None:
        return None
    path = folder.absolute() / newest
    wanted = _pack(like)
    try:
        with _by_itself():
            packed = ocp.load(path, wanted)
        for name, vector in wanted.items():  # Orbax returns NumPy vectors of the saved length, whatever was requested
            if packed[name].size != vector.size:
                raise ValueError(f"it has {packed[name].size} {name} values, this run {vector.size}")
        return _unpack(packed, like)
    except (ValueError, KeyError, OSError, TypeError) as error:
        raise InputError(
            f"{path}: not the progress of this run ({_first_line(error)}); choose another --output or delete the folder"
        ) from None


@processes.by_primary
def _newest_progress(folder: pathlib.Path) -> str | None:
    found = (path.name for path in folder.absolute().glob(f"{_PROGRESS}*"))
    return max((name for name in found if name[len(_PROGRESS) :].isdigit()), default=None)


@processes.by_primary
def drop_progress(folder: pathlib.Path, keep: pathlib.Path | None = None) -> None:
    """Delete the progress of a stage and any remains of an interrupted write, except `keep`."""
    for path in folder.absolute().glob(f"{_PROGRESS}*"):
        if path != keep:
            shutil.rmtree(path, ignore_errors=True)


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__


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

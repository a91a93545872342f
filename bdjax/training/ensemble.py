"""Ensembles: many networks of one architecture trained in one call. The only module that stacks members.

Every leaf of a stacked tree has a leading axis of M members. Code is written for one member (`member.py`) and laid out here:
`"vmap"` runs the members side by side in every operation, `"map"` one after another inside one compiled call, `"unrolled"` one
after another with a copy of the program for each member, which the compiler may overlap. Seeds, providers and baselines all
share the member axis.

With several devices, members are sharded over them, since they do not communicate. The cores of a CPU count as devices
(`bdjax/run/backend.py`): two members on a core each are more than twice as fast as one after the other on both cores. Members
that do not fit into memory together are trained in groups (`memory.py`).
"""

import contextlib
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, lru_cache, partial
from operator import itemgetter
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from bdjax import interruption
from bdjax.choices import Layout
from bdjax.errors import InputError
from bdjax.training import checkpoint, memory, processes
from bdjax.training.member import (
    HISTORY,
    Loss,
    Objective,
    Rows,
    TrainConfig,
    TrainState,
    as_float,
    make_epoch,
    over_batches,
    resume_from,
    supervised,
)
from bdjax.types import Array, Model, PyTree

# For functions that run once or take no time: compiling the initialisation of a tree takes five times as long with
# optimisations as without, and one call for the whole tree replaces a hundred small ones.
_run_once = partial(
    jax.jit, compiler_options={"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
)


def default_layout() -> Layout:
    """The layout to use without a measurement: on a CPU "map" is twice as fast as "vmap"."""
    return "map" if jax.default_backend() == "cpu" else "vmap"


def map_members(function: Callable[..., PyTree], layout: Layout, num_shared: int = 0) -> Callable[..., PyTree]:
    """Run a one-member function for every member.

    Args:
        function: takes the arguments of one member; the last `num_shared` are the same for all members.
        layout: how the members are laid out.
        num_shared: the number of trailing arguments without a member axis.

    Returns:
        The function of stacked arguments; its outputs are stacked.
    """
    if layout == "vmap":

        def vmapped(*arguments):
            num_stacked = len(arguments) - num_shared
            return jax.vmap(function, in_axes=(0,) * num_stacked + (None,) * num_shared)(*arguments)

        return vmapped
    if layout == "map":

        def mapped(*arguments):
            num_stacked = len(arguments) - num_shared
            return lax.map(lambda member: function(*member, *arguments[num_stacked:]), arguments[:num_stacked])

        return mapped
    if layout == "unrolled":

        def unrolled(*arguments):
            num_stacked = len(arguments) - num_shared
            stacked, shared = arguments[:num_stacked], arguments[num_stacked:]
            members = [jax.tree.map(itemgetter(i), stacked) for i in range(num_members(stacked))]
            outputs = [function(*member, *shared) for member in members]
            return jax.tree.map(lambda *leaves: jnp.stack(leaves), *outputs)

        return unrolled
    raise ValueError(f"layout {layout!r} is not one of 'vmap', 'map', 'unrolled'")


def num_members(tree: PyTree) -> int:
    """M, the length of the leading axis."""
    return jax.tree.leaves(tree)[0].shape[0]


def _is_key(leaf: Array) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


class Spread(NamedTuple):
    """How M members are sharded over devices; the last member is repeated so that all devices have the same number."""

    count: int
    """M"""
    mesh: Mesh
    """of one axis, "members" """
    padding: int
    """copies of the last member"""

    def place(self, tree: PyTree) -> PyTree:
        """Put stacked leaves [M, ...] on the devices."""
        if self.padding:
            tree = members(tree, np.minimum(np.arange(self.count + self.padding), self.count - 1))
        sharding = NamedSharding(self.mesh, PartitionSpec("members"))
        if processes.spans(self.mesh):
            return processes.put(tree, sharding)
        if self.mesh.size > 1 and jax.default_backend() == "cpu":
            # NumPy splits arrays at once; JAX would compile a slice for every shape.
            tree = jax.tree.map(lambda leaf: leaf if _is_key(leaf) else np.asarray(leaf), tree)
        # A copy, since placed arrays may be donated.
        return jax.device_put(tree, sharding, may_alias=False)

    def replicate(self, tree: PyTree) -> PyTree:
        """Put what all members share on every device."""
        sharding = NamedSharding(self.mesh, PartitionSpec())
        return processes.put(tree, sharding) if processes.spans(self.mesh) else jax.device_put(tree, sharding)

    def gather(self, tree: PyTree) -> PyTree:
        """Bring placed leaves back to [M, ...] on the first device."""
        if processes.spans(self.mesh):
            tree = processes.fetch(tree, self.mesh)
        else:
            tree = jax.device_put(tree, SingleDeviceSharding(self.mesh.devices.flat[0]))
        return members(tree, slice(0, self.count)) if self.padding else tree


def spread_members(count: int) -> Spread:
    """Shard `count` members over all devices, or over fewer if that does not give any device more members."""
    devices = jax.devices()
    per_device = -(-count // len(devices))
    # Each process takes part in every call, so several processes use all devices.
    used = -(-count // per_device) if processes.count() == 1 else len(devices)
    return Spread(count, Mesh(np.array(devices[:used]), ("members",)), used * per_device - count)


def compile_members(
    function: Callable[..., PyTree], layout: Layout, spread: Spread, *, num_shared: int = 0, donate: bool = False
) -> Callable[..., PyTree]:
    """Compile a one-member function for all members on all devices.

    Args:
        function: takes the arguments of one member; the last `num_shared` are the same for all members.
        layout: how the members of a device are laid out.
        spread: how members are sharded over devices.
        num_shared: the number of trailing arguments without a member axis.
        donate: whether the first argument's buffers may be reused for the result.

    Returns:
        The compiled function of placed arguments (`Spread.place`, `Spread.replicate`); its result is placed.
    """
    stacked, shared = PartitionSpec("members"), PartitionSpec()

    def everywhere(*arguments: PyTree) -> PyTree:
        specs = (stacked,) * (len(arguments) - num_shared) + (shared,) * num_shared
        mapped = map_members(function, layout, num_shared)
        return jax.shard_map(mapped, mesh=spread.mesh, in_specs=specs, out_specs=stacked, check_vma=False)(*arguments)

    # Where each core is a device, sharing small products between cores gains nothing.
    on_cores = jax.default_backend() == "cpu" and spread.mesh.size > 1
    options: dict[str, Any] = {"xla_cpu_multi_thread_eigen": False} if on_cores else {}
    if jax.default_backend() == "cpu":
        options["xla_cpu_prefer_vector_width"] = 512  # wider than the default of 256; harmless without AVX-512
    return jax.jit(everywhere, donate_argnums=0 if donate else (), compiler_options=options)


@_run_once
def stack(trees: Sequence[PyTree]) -> PyTree:
    """Stack the trees of single members."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


@_run_once
def join(trees: Sequence[PyTree]) -> PyTree:
    """Concatenate stacked trees along the member axis."""
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *trees)


def members(tree: PyTree, which: int | slice | np.ndarray) -> PyTree:
    """Select one member (an int), or a stacked tree of several (a slice or an array of indices)."""
    if isinstance(which, slice):
        which = np.arange(num_members(tree))[which]
    return _take(tree, np.asarray(which, np.int32))


@_run_once
def _take(tree: PyTree, which: Array) -> PyTree:
    return jax.tree.map(lambda leaf: leaf[which], tree)


def init_members(init: Callable[..., PyTree], *stacked: PyTree) -> PyTree:
    """Initialise stacked members; each depends only on its own slice of the arguments.

    Args:
        init: from one member's key (or other arguments) to its tree.
        stacked: typed keys [M], or trees of leaves [M, ...].
    """
    return _run_once(jax.vmap(init))(*stacked)


def init_networks(model: Model, image_shape: tuple[int, int, int], keys: Array) -> PyTree:
    """Initialise stacked networks, one after another: what is compiled serves any number of them.

    Args:
        model: their architecture.
        image_shape: (H, W, C).
        keys: typed keys [M].

    Returns:
        Variables, stacked [M, ...].
    """
    init = _init_one(model, tuple(image_shape))
    return stack([init(key) for key in keys])


def init_states(model: Model, image_shape: tuple[int, int, int], config: TrainConfig, keys: Array) -> TrainState:
    """New members, each as `init_state` makes it.

    Args:
        model: their architecture.
        image_shape: (H, W, C).
        config: training configuration.
        keys: typed keys [M].
    """
    init_keys, shuffle_keys = _split(keys)
    return _resume(config)(init_networks(model, image_shape, init_keys), shuffle_keys)


@_run_once
def _split(keys: Array) -> tuple[Array, Array]:
    return jax.vmap(jax.random.split, out_axes=1)(keys)


@lru_cache(maxsize=32)
def _resume(config: TrainConfig) -> Callable[[PyTree, Array], TrainState]:
    return _run_once(jax.vmap(partial(resume_from, config=config)))


@lru_cache(maxsize=32)
def _init_one(model: Model, image_shape: tuple[int, int, int]) -> Callable[[Array], PyTree]:
    return _run_once(lambda key: model.init(key, image_shape))


def fit(
    model: Model,
    loss: Loss,
    config: TrainConfig,
    states: TrainState,
    pool: Array,
    train: Rows,
    validation: Rows,
    *,
    layout: Layout,
    objective: Objective | None = None,
    group_size: int | None = None,
    report: Callable[[str], None] = lambda line: None,
    progress_folder: pathlib.Path | None = None,
    on_epoch: Callable[[TrainState], None] | None = None,
) -> TrainState:
    """Train stacked members to their last epoch, with one compiled call per epoch.

    With a progress folder, the stacked state is saved after each epoch, and a later call resumes from it. Shuffles are keyed by
    the epoch's number, so a resumed run ends with the same numbers as an uninterrupted one.

    Args:
        model: their architecture.
        loss: per example.
        config: training configuration.
        states: stacked [M, ...]; the arguments are not modified.
        pool: uint8 [P, H, W, C], shared.
        train: training rows of each member, leaves [M, n, ...].
        validation: validation rows of each member, leaves [M, n', ...]; n' may be 0.
        layout: how the members are laid out.
        objective: what each step minimises; None for the loss of the model's logits.
        group_size: the number of members per call; None for as many as are estimated to fit into memory.
        report: called with one line if the members are split into groups.
        progress_folder: where to save the state between epochs.
        on_epoch: called after each epoch with the stacked state, whose buffers the next epoch may reuse.

    Returns:
        The stacked final state.

    Raises:
        InputError: if not even one member fits into memory.
    """
    if progress_folder is not None:
        states = checkpoint.load_progress(progress_folder, states) or states
    count, first = num_members(states), int(np.asarray(states.epoch)[0])
    if group_size is None:
        minimised = objective or _supervised(model, loss)
        group_size = _group_that_fits(minimised, config, states, pool, train, validation, layout, report)
    groups = _groups(count, group_size)
    spread = spread_members(len(groups[0]))
    if objective is None:
        run_epoch = compile_epoch(model, loss, config, layout, spread)
    else:  # not kept: it may hold arrays
        run_epoch = compile_members(
            make_epoch(model, loss, config, objective), layout, spread, num_shared=1, donate=True
        )
    pool = spread.replicate(pool)
    if len(groups) == 1:
        states, train, validation = (spread.place(tree) for tree in (states, train, validation))
    else:  # on the host; one group at a time goes to the devices
        states, train, validation = (_on_host(tree) for tree in (states, train, validation))
    with _advice_if_out_of_memory():
        for epoch in range(first, config.epochs):
            interruption.check()
            if len(groups) == 1:
                states = run_epoch(states, train, validation, pool)
            else:
                states = _in_groups(run_epoch, spread, groups, count, states, train, validation, pool)
            if progress_folder is None and on_epoch is None:
                continue
            gathered = spread.gather(states) if len(groups) == 1 else states
            if progress_folder is not None:
                checkpoint.save_progress(progress_folder, epoch + 1, gathered)
            if on_epoch is not None:
                on_epoch(gathered)
        return spread.gather(states) if len(groups) == 1 else jax.tree.map(jnp.asarray, states)


_supervised = lru_cache(maxsize=32)(supervised)


@lru_cache(maxsize=8)
def compile_epoch(
    model: Model, loss: Loss, config: TrainConfig, layout: Layout, spread: Spread
) -> Callable[..., TrainState]:
    """The compiled epoch of stacked members that learn from labels; calls with the same arguments give the same function."""
    epoch = make_epoch(model, loss, config, _supervised(model, loss))
    return compile_members(epoch, layout, spread, num_shared=1, donate=True)


def _group_that_fits(objective, config, states, pool, train, validation, layout, report) -> int:
    count = num_members(states)
    need = memory.estimate(objective, config, states, pool, train, validation)
    limit = memory.available()
    group = memory.largest_group(need, limit, count, jax.device_count(), one_at_a_time=layout == "map")
    if group < count:
        report(memory.describe(need, limit, count, group))
    return group


def _groups(count: int, size: int) -> list[np.ndarray]:
    """Split members 0 to count - 1 into as few groups of at most `size` as possible, all of the same length: the last member is
    repeated in the last group, since a different shape would have to be compiled."""
    size = -(-count // -(-count // min(max(size, 1), count)))
    return [np.minimum(np.arange(start, start + size), count - 1) for start in range(0, count, size)]


def _on_host(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda leaf: leaf if _is_key(leaf) else np.asarray(leaf), tree)


def _in_groups(run_epoch, spread: Spread, groups: Sequence[np.ndarray], count: int, states, *rows_and_pool) -> PyTree:
    *rows, pool = rows_and_pool
    done = []
    for group in groups:
        interruption.check()
        placed = [spread.place(jax.tree.map(itemgetter(group), tree)) for tree in (states, *rows)]
        done.append(_on_host(spread.gather(run_epoch(*placed, pool))))

    def concatenate(*leaves):
        return (jnp if _is_key(leaves[0]) else np).concatenate(leaves)[:count]

    return jax.tree.map(concatenate, *done)


@contextlib.contextmanager
def _advice_if_out_of_memory() -> Iterator[None]:
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise InputError(f"the device ran out of memory: {memory.ADVICE}") from error


class Trained(NamedTuple):
    """The result of a finished stage."""

    variables: PyTree
    """stacked [M, ...]"""
    history: dict[str, Array]
    """name -> float32 [M, epochs]"""


def fit_once(
    folder: pathlib.Path, about: Mapping[str, Any], like: Trained, train: Callable[[pathlib.Path], TrainState]
) -> tuple[Trained, bool]:
    """Train a stage, or restore it from its finished checkpoint.

    Args:
        folder: the stage's checkpoint.
        about: facts to save beside it.
        like: shapes of the result, as from `trained_like`.
        train: trains the stage, given the folder for its progress.

    Returns:
        The result, and whether it was restored.

    Raises:
        InputError: if the checkpoint is damaged, or of a stage with other facts.
    """
    is_restored = checkpoint.is_complete(folder)
    if is_restored:
        checkpoint.check_facts(folder, about)
        trained = checkpoint.load(folder, like)
    else:
        state = train(folder)
        trained = Trained(state.variables, state.history)
        checkpoint.save(folder, trained, about)
    checkpoint.drop_progress(folder)
    return trained, is_restored


def trained_like(model: Model, image_shape: tuple[int, int, int], count: int, epochs: int) -> Trained:
    """The shapes of `Trained` for `count` members, without computing anything."""
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), count))
    variables = jax.eval_shape(jax.vmap(lambda key: model.init(key, image_shape)), keys)
    return Trained(variables, history_like(count, epochs))


def history_like(count: int, epochs: int) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes of `Trained.history`."""
    return {name: jax.ShapeDtypeStruct((count, epochs), jnp.float32) for name in HISTORY}


def make_predict(model: Model, layout: Layout, batch_size: int, *, own_images: bool = False) -> Callable[..., Array]:
    """Make a function for the logits of stacked members, on shared images or on images for each member.

    Args:
        model: their architecture.
        layout: how they are laid out.
        batch_size: images per batch.
        own_images: whether the images have a member axis.

    Returns:
        A compiled `predict(variables, images) -> float32 [M, N, K]`, with variables stacked [M, ...] and images [N, H, W,
        C] or [M, N, H, W, C], uint8 or float32 in [0, 1]. Batch normalisation uses running statistics: those of a batch of
        triggered images would normalise the trigger away.
    """

    def predict_member(variables: PyTree, images: Array) -> Array:
        def logits(batch: Array) -> Array:
            batch = as_float(batch) if batch.dtype == jnp.uint8 else batch
            return model.apply(variables, batch, train=False).logits

        return over_batches(logits, images, batch_size)

    @cache
    def compiled(count: int) -> tuple[Spread, Callable[..., Array]]:
        spread = spread_members(count)
        return spread, compile_members(predict_member, layout, spread, num_shared=0 if own_images else 1)

    def predict(variables: PyTree, images: Array) -> Array:
        spread, run = compiled(num_members(variables))
        placed = spread.place(images) if own_images else spread.replicate(images)
        return spread.gather(run(spread.place(variables), placed))

    return predict

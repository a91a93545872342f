"""Stages of an experiment: train networks once, save them in the run's folder and log it.

A finished stage is restored from its checkpoint, an interrupted one is resumed, and each has a progress bar. Without a folder
nothing is saved, and running a stage again trains it again, with the same result; without a log nothing is printed.
"""

import pathlib
import re
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from bdjax import interruption, losses
from bdjax.choices import Layout
from bdjax.training import ensemble
from bdjax.training.member import (
    Loss,
    Objective,
    Rows,
    TrainConfig,
    TrainState,
    as_float,
    mean_over_batches,
    no_rows,
    over_batches,
    resume_from,
)
from bdjax.types import Array, Model, PyTree


class Log(Protocol):
    """The part of `bdjax.run.log.StageLog` that a stage uses."""

    def stage(
        self, name: str, *, total: int | None = None, unit: str = "", detail: str = ""
    ) -> AbstractContextManager: ...


Watch = Callable[[str, int, int, Model, PyTree], None]
"""(stage, number of epochs trained, number of epochs, model, stacked variables [M, ...]): called after each epoch."""

Curves = Callable[[pathlib.Path], AbstractContextManager[Callable[[int, Mapping[str, float]], None]]]
"""(a stage's folder of checkpoints) -> a context with what takes its curves: (number of epochs trained, name -> number),
in order and from the first epoch on, whatever was restored."""


class SilentStage:
    """Replaces the stage of a log where there is no log."""

    done = 0
    detail = ""

    def advance(self, steps: int = 1, message: str = "") -> None:
        """Does nothing."""

    def wrote(self, output: object) -> None:
        """Does nothing."""


class Nets(NamedTuple):
    """Trained networks of one role: `per_seed` members for each seed, in the order of the seeds."""

    model: Model
    variables: PyTree
    """stacked [seeds * per_seed, ...]"""
    per_seed: int
    history: Mapping[str, np.ndarray]
    """name -> float32 [seeds * per_seed, epochs]; empty for third-party networks"""

    def of_seed(self, seed: int) -> PyTree:
        """The members of one seed, stacked [per_seed, ...]."""
        return ensemble.members(self.variables, slice(seed * self.per_seed, (seed + 1) * self.per_seed))


@dataclass(frozen=True)
class StageRunner:
    """Runs stages: where their checkpoints are saved and how their members are laid out."""

    folder: pathlib.Path | None
    """folder for checkpoints; None to keep results in memory only"""
    image_shape: tuple[int, int, int]
    layout: Layout
    log: Log | None = None
    """None to print nothing"""
    group_size: int | None = None
    """members per call; None for as many as fit into memory"""
    watch: Watch | None = None
    """measures networks during trainings that say which part of their variables is a network"""
    curves: Curves | None = None
    """takes each stage's curves, the mean over its members"""

    def train(
        self,
        name: str,
        model: Model,
        config: TrainConfig,
        count: int,
        fit: Callable[..., TrainState],
        about: Mapping[str, Any] | None = None,
        like: ensemble.Trained | None = None,
        watch: Callable[[TrainState, int], None] | None = None,
    ) -> ensemble.Trained:
        """Train a stage of `count` members, or restore it from its checkpoint.

        Args:
            name: name of the stage, and of its folder of checkpoints.
            model: the members' architecture.
            config: training configuration.
            count: number of members.
            fit: called with keyword arguments to pass on to `ensemble.fit`.
            about: further facts to save beside the checkpoint.
            like: the shapes of the result; None if its variables are the model's.
            watch: called after each epoch with the stacked state and the number of epochs trained.
        """
        facts = {
            "model": model.description,
            "num_classes": model.num_classes,
            "image_shape": list(self.image_shape),
            "members": count,
            "epochs": config.epochs,
            **(about or {}),
        }
        with self._log_stage(name, config.epochs) as stage, self.curves_of(name) as take:
            send = _in_order(take)
            stage.detail = f"{count} × {model.description}, {config.epochs} epochs"

            def on_epoch(state: TrainState) -> None:
                done = int(np.asarray(state.epoch)[0])
                send(state.history, done)
                stage.advance(done - stage.done, f"loss {np.mean(np.asarray(state.history['loss'])[:, done - 1]):.3f}")
                if watch is not None:
                    watch(state, done)

            def report(line: str) -> None:
                stage.detail += f"; {line}"

            options = {"layout": self.layout, "group_size": self.group_size, "report": report}
            is_seen = self.log is not None or watch is not None or self.curves is not None
            options["on_epoch"] = on_epoch if is_seen else None  # reading the loss waits for the epoch
            if self.folder is None:
                state = fit(**options, progress_folder=None)
                return ensemble.Trained(state.variables, state.history)
            folder = self._folder_of(name)
            like = like or ensemble.trained_like(model, self.image_shape, count, config.epochs)
            trained, is_restored = ensemble.fit_once(
                folder, facts, like, lambda progress: fit(**options, progress_folder=progress)
            )
            send(trained.history, config.epochs)
            if is_restored:
                stage.detail += ", restored from checkpoint"
            stage.wrote(f"checkpoints/{folder.name}")
        return trained

    def _log_stage(self, name: str, epochs: int) -> AbstractContextManager:
        return nullcontext(SilentStage()) if self.log is None else self.log.stage(name, total=epochs, unit="epochs")

    def _folder_of(self, name: str) -> pathlib.Path:
        return self.folder / re.sub(r"\W+", "-", name)

    def curves_of(self, name: str) -> AbstractContextManager:
        """A context with what takes the curves of a stage: see `Curves`; None if they are not wanted."""
        is_wanted = self.curves is not None and self.folder is not None
        return self.curves(self._folder_of(name)) if is_wanted else nullcontext()

    def from_scratch(
        self,
        name: str,
        model: Model,
        config: TrainConfig,
        keys: Array,
        per_seed: int,
        pool: Array,
        train: Rows,
        validation: Rows,
    ) -> Nets:
        """Train new networks on labels by cross-entropy.

        Args:
            name: name of the stage.
            model: their architecture.
            config: training configuration.
            keys: typed keys [M], for each member's weights and shuffles.
            per_seed: number of members per seed.
            pool: uint8 [P, H, W, C].
            train: training rows, leaves [M, n].
            validation: validation rows, leaves [M, n'].
        """

        def begin() -> TrainState:
            states = ensemble.init_states(model, self.image_shape, config, keys)
            return states._replace(variables=prepare(model, states.variables, pool, train.index))

        def fit(**options: Any) -> TrainState:
            loss = cross_entropy_of(config)
            return ensemble.fit(model, loss, config, begin(), pool, train, validation, **options)

        trained = self.train(name, model, config, len(keys), fit, {"per_seed": per_seed})
        return Nets(model, trained.variables, per_seed, _as_numpy(trained.history))

    def from_variables(
        self,
        name: str,
        model: Model,
        config: TrainConfig,
        variables: PyTree,
        keys: Array,
        per_seed: int,
        pool: Array,
        train: Rows,
        objective: Objective | None = None,
        network_of: Callable[[PyTree], PyTree] | None = None,
    ) -> Nets:
        """Continue the training of given networks: fine-tuning, or training with another objective.

        Args:
            name: name of the stage.
            model: their architecture.
            config: training configuration.
            variables: stacked [M, ...], including anything else that the objective needs.
            keys: typed keys [M], for each member's shuffles.
            per_seed: number of members per seed.
            pool: uint8 [P, H, W, C].
            train: training rows, leaves [M, n]; there is no validation.
            objective: what a step minimises; None for cross-entropy.
            network_of: from such variables to those of the model, for `watch`; None if the training is not to be watched.
        """
        none = no_rows(train)
        leaves, structure = jax.tree.flatten(variables)

        def as_leaves(tree: PyTree) -> dict[str, Array]:
            # Checkpoints hold dictionaries of arrays; an attack's parameters may be of any type.
            return {f"{i:04d}": leaf for i, leaf in enumerate(jax.tree.leaves(tree))}

        def fit(**options: Any) -> TrainState:
            states = ensemble.init_members(lambda tree, key: resume_from(tree, key, config), variables, keys)
            state = ensemble.fit(
                model, cross_entropy_of(config), config, states, pool, train, none, objective=objective, **options
            )
            return state._replace(variables=as_leaves(state.variables))

        like = ensemble.Trained(
            jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), as_leaves(leaves)),
            ensemble.history_like(len(keys), config.epochs),
        )
        watch = None
        if self.watch is not None and network_of is not None:

            def watch(state: TrainState, epoch: int) -> None:
                self.watch(name, epoch, config.epochs, model, network_of(state.variables))

        trained = self.train(name, model, config, len(keys), fit, {"per_seed": per_seed}, like, watch)
        restored = structure.unflatten([trained.variables[number] for number in sorted(trained.variables)])
        return Nets(model, restored, per_seed, _as_numpy(trained.history))

    def predict(self, model: Model, variables: PyTree, images: np.ndarray, batch_size: int) -> np.ndarray:
        """Logits float32 [M, N, K] of stacked members on shared images, uint8 [N, H, W, C]."""
        interruption.check()
        return np.asarray(_predict(model, self.layout, batch_size)(variables, jnp.asarray(images)))

    def predict_own(self, model: Model, variables: PyTree, images: np.ndarray, batch_size: int) -> np.ndarray:
        """Logits float32 [M, N, K] of stacked members, each on its own images: uint8 [M, N, H, W, C]."""
        interruption.check()
        run = _predict(model, self.layout, batch_size, own_images=True)
        return np.asarray(run(variables, jnp.asarray(images)))

    def per_row(
        self, function: Callable[..., PyTree], variables: PyTree, rows: Rows, pool: Array, batch_size: int
    ) -> PyTree:
        """Apply a function to every member's own rows of the pool.

        Args:
            function: (variables of a member, images float32 [B, H, W, C] in [0, 1], targets) -> leaves [B, ...], independently
                for each row. Each function object is compiled once, so define it outside of loops.
            variables: stacked [M, ...].
            rows: leaves [M, n, ...].
            pool: uint8 [P, H, W, C].
            batch_size: rows per batch.

        Returns:
            NumPy leaves [M, n, ...].
        """
        interruption.check()
        spread = ensemble.spread_members(len(rows.index))
        run = _per_row(function, self.layout, batch_size, spread)
        placed = spread.place(variables), spread.place(rows), spread.replicate(pool)
        return jax.tree.map(np.asarray, spread.gather(run(*placed)))

    def mean(
        self, function: Callable[..., PyTree], variables: PyTree, rows: Rows, pool: Array, batch_size: int
    ) -> PyTree:
        """The mean of `per_row` over every member's rows, without storing the values of all rows: leaves [M, ...]."""
        interruption.check()
        spread = ensemble.spread_members(len(rows.index))
        run = _per_row(function, self.layout, batch_size, spread, is_mean=True)
        placed = spread.place(variables), spread.place(rows), spread.replicate(pool)
        return jax.tree.map(np.asarray, spread.gather(run(*placed)))


def _in_order(take: Callable[[int, Mapping[str, float]], None] | None) -> Callable[[Mapping[str, Array], int], None]:
    """A function of a history, leaves [M, epochs], and the number of epochs in it, which passes on the mean over the members of
    each epoch once; it does nothing if `take` is None."""
    sent = 0

    def send(history: Mapping[str, Array], done: int) -> None:
        nonlocal sent
        if take is None or done <= sent:
            return
        means = {metric: np.mean(np.asarray(values), axis=0) for metric, values in history.items()}
        for epoch in range(sent, done):
            take(epoch + 1, {metric: float(values[epoch]) for metric, values in means.items()})
        sent = done

    return send


@cache
def _per_row(
    function: Callable[..., PyTree],
    layout: Layout,
    batch_size: int,
    spread: ensemble.Spread,
    is_mean: bool = False,
):
    over = mean_over_batches if is_mean else over_batches

    def run_member(variables: PyTree, rows: Rows, pool: Array) -> PyTree:
        return over(lambda batch: function(variables, as_float(pool[batch.index]), batch.targets), rows, batch_size)

    return ensemble.compile_members(run_member, layout, spread, num_shared=1)


def _as_numpy(history: Mapping[str, Array]) -> dict[str, np.ndarray]:
    return {metric: np.asarray(values) for metric, values in history.items()}


def cross_entropy_of(config: TrainConfig) -> Loss:
    """The cross-entropy of a configuration: a single function object for each label smoothing."""
    return _cross_entropy(config.label_smoothing)


@cache
def _cross_entropy(smoothing: float) -> Loss:
    return lambda logits, targets: losses.cross_entropy(logits, targets["labels"], smoothing)


PREPARED_ROWS = 2000
"""Training images that `Model.prepare` gets."""


def prepare(model: Model, variables: PyTree, pool: Array, index: Array) -> PyTree:
    """Set the constants of new networks that depend on their training images; see `Model.prepare`.

    Args:
        model: the architecture.
        variables: stacked [M, ...].
        pool: uint8 [P, H, W, C].
        index: int32 [M, n] or [M, n, V], each member's rows of the pool.
    """
    if model.prepare is None:
        return variables

    @jax.jit
    def run(variables: PyTree, pool: Array, index: Array) -> PyTree:
        # In turn, not vmapped: the images of all members at once might not fit into memory.
        return jax.lax.map(lambda member: model.prepare(member[0], as_float(pool[member[1]])), (variables, index))

    return run(variables, pool, jnp.asarray(index).reshape(len(index), -1)[:, :PREPARED_ROWS])


@cache
def _predict(
    model: Model, layout: Layout, batch_size: int, own_images: bool = False
) -> Callable[[PyTree, Array], Array]:
    """One compiled function per model, layout and batch size."""
    return ensemble.make_predict(model, layout, batch_size, own_images=own_images)


def predict_groups(
    nets: Mapping[str, Nets], seed: int, predict: Callable[[Model, PyTree], np.ndarray]
) -> dict[str, np.ndarray]:
    """Logits of one seed's members of several roles; roles with the same architecture share a call.

    Args:
        nets: role -> networks.
        seed: number of the seed.
        predict: from a model and stacked variables [M, ...] to logits [M, ...].

    Returns:
        Role -> logits [per_seed, ...].
    """
    groups: dict[str, list[str]] = {}
    for name, role_nets in nets.items():
        groups.setdefault(role_nets.model.description, []).append(name)
    logits = {}
    for names in groups.values():
        joined = ensemble.join([nets[name].of_seed(seed) for name in names])
        joined_logits = predict(nets[names[0]].model, joined)
        start = 0
        for name in names:
            logits[name] = joined_logits[start : start + nets[name].per_seed]
            start += nets[name].per_seed
    return logits

"""A run that is killed at random moments, again and again, ends with exactly the results of an undisturbed one.

It trains three members of a small model for a few seconds, and spends most of that time writing their progress.
"""

import os
import pathlib
import random
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bdjax.training import ensemble
from bdjax.training.member import Rows, TrainConfig, init_state
from tests.fixtures.forks import Fork
from tests.training.linear_network import linear_network

pytestmark = pytest.mark.slow

SEED = int(os.environ.get("BDJAX_INTERRUPTION_SEED", "0"))  # failures print it; try others
SHAPE = (6, 6, 1)
MEMBERS = 3
# The rate falls a few times, each epoch ends with an incomplete batch, and images are cut anew by the shuffle's key.
CONFIG = TrainConfig(
    epochs=60, batch_size=8, plateau_patience=4, plateau_threshold=0.02, plateau_factor=0.8, augmentation="crop"
)


# ---- The run --------------------------------------------------------------------------------------------------------


def cross_entropy(logits, targets):
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), targets["labels"][:, None], axis=1)[:, 0]


def draw_rows(random_numbers: np.random.Generator, count: int) -> Rows:
    index = np.stack([random_numbers.permutation(40)[:count] for _ in range(MEMBERS)]).astype(np.int32)
    return Rows(jnp.asarray(index), {"labels": jnp.asarray(index % 3)})


def write_leaves(path: pathlib.Path, tree) -> None:
    """All leaves by name; the file is there as a whole or not at all."""
    leaves = {jax.tree_util.keystr(where): leaf for where, leaf in jax.tree_util.tree_leaves_with_path(tree)}
    temporary = path.with_suffix(".unfinished.npz")
    np.savez(temporary, **{name: np.asarray(leaf) for name, leaf in leaves.items()})
    os.replace(temporary, path)


def train_to_the_end(output: pathlib.Path, compiled: pathlib.Path) -> None:
    """One stage, as an experiment runs it; prints its progress."""
    jax.config.update("jax_num_cpu_devices", 2)
    # Not the shared folder: a kill while JAX writes to it would leave half a program to other tests.
    jax.config.update("jax_compilation_cache_dir", str(compiled))
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    jax.config.update("jax_numpy_rank_promotion", "raise")
    model, random_numbers = linear_network(), np.random.default_rng(5)
    pool = jnp.asarray(random_numbers.integers(0, 256, (40, *SHAPE)), jnp.uint8)
    train, validation = draw_rows(random_numbers, 20), draw_rows(random_numbers, 10)
    keys = jax.random.split(jax.random.key(7), MEMBERS)

    def run(progress: pathlib.Path):
        print("training", flush=True)
        state = ensemble.fit(
            model,
            cross_entropy,
            CONFIG,
            ensemble.init_members(lambda key: init_state(key, model, SHAPE, CONFIG), keys),
            pool,
            train,
            validation,
            layout="vmap",
            progress_folder=progress,
            on_epoch=lambda state: print("epoch", state.epoch[0], flush=True),
        )
        write_leaves(output / "state.npz", state._replace(key=jax.random.key_data(state.key)))
        return state

    like = ensemble.trained_like(model, SHAPE, MEMBERS, CONFIG.epochs)
    trained, is_restored = ensemble.fit_once(output / "stage", {"model": model.description}, like, run)
    write_leaves(output / "trained.npz", trained)
    time.sleep(0.2)  # leaves time for a kill after the checkpoint is complete
    print("finished, restored" if is_restored else "finished", flush=True)


# ---- What kills it --------------------------------------------------------------------------------------------------


class Runs:
    """One run after another in the same folder, with a record for failure messages."""

    def __init__(self, output: pathlib.Path, compiled: pathlib.Path):
        self.output = output
        self.compiled = compiled
        self.story: list[str] = []
        self.epochs_done = 0
        self.process: Fork | None = None
        self.output.mkdir()

    def __enter__(self) -> "Runs":
        return self

    def __exit__(self, *_: object) -> None:
        if self.process is not None:
            self.process.kill()  # it lives only after a failure
            self.process.wait()

    def start(self) -> None:
        self.process = Fork(train_to_the_end, self.output, self.compiled, errors=self.output / "errors.txt")
        self.is_silent = True

    def follow(self, line: str) -> None:
        """Note a line of output; the run must resume exactly where the last one stopped."""
        if line.startswith("epoch "):
            number = int(line.split()[1])
            # The last run may have saved one epoch more than it printed.
            most = self.epochs_done + (2 if self.is_silent else 1)
            assert self.epochs_done < number <= most, f"epoch {number} after {self.epochs_done}\n{self.describe()}"
            self.epochs_done, self.is_silent = number, False

    def read_until(self, beginning: str) -> None:
        for line in self.process.stdout:
            self.follow(line)
            if line.startswith(beginning):
                return
        raise AssertionError(f"it ended before it printed {beginning!r}\n{self.describe()}")

    def wait_for(self, pattern: str) -> None:
        while not any((self.output / "stage").glob(pattern)):
            assert not self.process.has_ended, f"it ended before {pattern} was there\n{self.describe()}"
            time.sleep(0.0002)

    def end(self) -> int:
        """Let the process end; returns its exit status."""
        for line in self.process.stdout:
            if line.endswith("\n"):  # a kill may cut the last line short
                self.follow(line)
        return self.process.wait()

    def kill(self, moment: str) -> list[str]:
        """Kill the process; returns the names of the files left in the stage's folder."""
        self.process.kill()
        assert self.end() == -9, f"it had ended before it was killed {moment}\n{self.describe()}"
        stage = self.output / "stage"
        left = sorted(path.name for path in stage.iterdir()) if stage.exists() else []
        self.story.append(f"killed {moment}, epoch {self.epochs_done} was done, leaving {left}")
        return left

    def describe(self) -> str:
        errors = (self.output / "errors.txt").read_text()
        return "\n".join([f"BDJAX_INTERRUPTION_SEED={SEED}", *self.story, errors[-3000:]])


def assert_same_files(one: pathlib.Path, other: pathlib.Path, message: str) -> None:
    for name in ("state.npz", "trained.npz"):
        with np.load(one / name) as expected, np.load(other / name) as found:
            assert sorted(found.files) == sorted(expected.files)
            for leaf in expected.files:
                assert found[leaf].dtype == expected[leaf].dtype, leaf
                assert found[leaf].tobytes() == expected[leaf].tobytes(), f"{name}: {leaf} differs\n{message}"


def test_a_run_that_is_killed_at_random_moments_ends_where_an_undisturbed_one_ends(tmp_path):
    with (
        Runs(tmp_path / "undisturbed", tmp_path / "compiled") as undisturbed,
        Runs(tmp_path / "killed", tmp_path / "compiled") as runs,
    ):
        undisturbed.start()
        undisturbed.read_until("epoch")
        began = time.perf_counter()
        undisturbed.read_until("finished")
        epoch_seconds = (time.perf_counter() - began) / CONFIG.epochs  # 20 ms, say; the moments are drawn in these
        assert undisturbed.end() == 0, undisturbed.describe()
        assert undisturbed.epochs_done == CONFIG.epochs

        draw = random.Random(SEED)
        kinds = ["at first", "between", "writing", "writing", "writing begins"]
        draw.shuffle(kinds)
        half_written = 0
        for kind in kinds:
            runs.start()
            runs.read_until("training")
            if kind == "at first":  # reading the last progress, compiling, perhaps in the first epochs
                delay = draw.uniform(0, 15 * epoch_seconds)
                moment = f"{delay:.3f} s after it began"
            else:
                epochs = draw.randint(1, 3)
                for _ in range(epochs):
                    runs.read_until("epoch")
                if kind == "between":  # anywhere in an epoch
                    delay = draw.uniform(0, 1.5 * epoch_seconds)
                    moment = f"{delay:.4f} s after {epochs} epochs"
                else:
                    runs.wait_for("progress-*tmp*")
                    delay = draw.uniform(0, epoch_seconds) if kind == "writing" else 0.0
                    moment = f"{delay:.4f} s after it began to write, after {epochs} epochs"
            time.sleep(delay)
            left = runs.kill(moment)
            if kind != "at first":  # those remains may come from the run before
                half_written += any("tmp" in name for name in left)
        assert len(runs.story) == len(kinds)
        assert half_written >= 1, f"hardly any kill hit a write\n{runs.describe()}"

        # Two more, where a stage ends: while the finished checkpoint is written, and before its progress is dropped.
        runs.start()
        runs.wait_for("tree*")
        runs.kill("when the checkpoint was begun")
        assert (runs.output / "state.npz").exists()
        runs.start()
        runs.wait_for("about.json")
        runs.kill("when the checkpoint was complete")

        runs.start()
        runs.read_until("finished, restored")
        assert runs.end() == 0, runs.describe()
        assert_same_files(undisturbed.output, runs.output, runs.describe())
        assert runs.epochs_done == CONFIG.epochs
        left = sorted(path.name for path in (runs.output / "stage").iterdir())
        assert left == ["about.json", "tree"], runs.describe()

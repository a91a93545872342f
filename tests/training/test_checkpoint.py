import asyncio
import contextlib
import errno
import gc
import hashlib
import json
import re
import resource
import shutil
import sys
from functools import partial
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bdjax import interruption
from bdjax.errors import InputError
from bdjax.training import checkpoint
from tests.fixtures import checkpoints


class State(NamedTuple):
    variables: dict
    key: jax.Array
    epoch: jax.Array


def variables(seed=0, width=4):
    random = np.random.default_rng(seed)
    return {
        "params": {"kernel": jnp.asarray(random.standard_normal((3, width)), jnp.float32), "bias": jnp.zeros(width)},
        "batch_stats": {"mean": jnp.asarray(random.standard_normal(width), jnp.float32)},
    }


def state(seed=0, width=4):
    keys = jax.random.split(jax.random.key(seed), 2)
    return State({**variables(seed, width), "rank": jnp.asarray([7, 1], jnp.uint8)}, keys, jnp.int32(seed))


def words(each):
    return each._replace(key=jax.random.key_data(each.key))


def interrupt_writing(monkeypatch):
    """Make Orbax stop in the middle of a write, as a kill would: its temporary folder is there, its result is not."""

    def half(path, tree):
        temporary = path.with_name(path.name + ".orbax-checkpoint-tmp-1")
        temporary.mkdir(parents=True)
        (temporary / "manifest.ocdbt").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint.orbax(), "save", half)


# ---- Finished trees -------------------------------------------------------------------------------------------------


def test_a_tree_comes_back_exactly(tmp_path):
    tree = variables()
    checkpoint.save(tmp_path / "net", tree, {"model": "resnet18", "classes": 10})
    assert checkpoint.is_complete(tmp_path / "net")
    assert checkpoint.about(tmp_path / "net") == {"model": "resnet18", "classes": 10}
    for like in (tree, jax.eval_shape(lambda: tree)):
        loaded = checkpoint.load(tmp_path / "net", like)
        chex.assert_trees_all_equal(loaded, tree)
        chex.assert_trees_all_equal_shapes_and_dtypes(loaded, tree)
        assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(loaded))


def test_saving_again_replaces_what_was_there(tmp_path):
    checkpoint.save(tmp_path, variables(0), {"number": 0})
    checkpoint.save(tmp_path, variables(1, width=5), {"number": 1})
    chex.assert_trees_all_equal(checkpoint.load(tmp_path, variables(1, width=5)), variables(1, width=5))
    assert checkpoint.about(tmp_path) == {"number": 1}


def test_tuples_and_named_tuples_come_back_as_what_they_were(tmp_path):
    tree = {"pair": (jnp.zeros(2), jnp.ones(3)), "named": words(state())}
    checkpoint.save(tmp_path, tree, {})
    loaded = checkpoint.load(tmp_path, tree)
    chex.assert_trees_all_equal(loaded, tree)
    assert isinstance(loaded["named"], State)


def test_a_relative_folder_will_do(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path.__class__("nets") / "one"
    checkpoint.save(folder, variables(), {})
    chex.assert_trees_all_equal(checkpoint.load(folder, variables()), variables())
    assert (tmp_path / "nets" / "one" / "about.json").is_file()


def test_others_can_read_about_json(tmp_path):
    checkpoint.save(tmp_path, variables(), {"width": 4, "model": "resnet18"})
    content = json.loads((tmp_path / "about.json").read_text())
    hashes = content.pop("sha256")
    assert content == {"model": "resnet18", "width": 4}
    for name, expected in hashes.items():
        assert hashlib.sha256((tmp_path / "tree" / name).read_bytes()).hexdigest() == expected
    assert sorted(hashes) == sorted(
        path.relative_to(tmp_path / "tree").as_posix() for path in (tmp_path / "tree").rglob("*") if path.is_file()
    )


def missing_leaf(tree):
    return {"params": {"kernel": tree["params"]["kernel"]}, "batch_stats": tree["batch_stats"]}


def more_leaves(tree):
    return {**tree, "masks": jnp.zeros(3)}


@pytest.mark.parametrize(
    ("like", "reason"),
    [
        (variables(width=5), "batch_stats/mean is (4,); should be (5,)"),
        (variables(width=3), "batch_stats/mean is (4,); should be (3,)"),
        (missing_leaf(variables()), "params/bias is (4,); should be absent"),
        (more_leaves(variables()), "masks is absent; should be (3,)"),
    ],
)
def test_a_tree_that_does_not_fit_is_one_line_that_says_where(like, reason, tmp_path):
    checkpoint.save(tmp_path / "net", variables(), {})
    with pytest.raises(InputError, match="the checkpoint does not fit the model") as caught:
        checkpoint.load(tmp_path / "net", like)
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / 'net'}: ")
    assert message.endswith(reason)
    assert "\n" not in message


def test_a_missing_or_empty_folder_is_no_checkpoint(tmp_path):
    for folder in (tmp_path / "nowhere", tmp_path):
        assert not checkpoint.is_complete(folder)
        for read in (checkpoint.about, lambda folder: checkpoint.load(folder, variables())):
            with pytest.raises(InputError, match=re.escape(f"{folder}: not a finished checkpoint")):
                read(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [("{ not json", "not JSON"), ("[1, 2]", "should contain a JSON object, not list"), ("", "not JSON")],
)
def test_a_broken_about_json_is_said(text, message, tmp_path):
    checkpoint.save(tmp_path, variables(), {})
    (tmp_path / "about.json").write_text(text)
    for read in (checkpoint.about, lambda folder: checkpoint.load(folder, variables())):
        with pytest.raises(InputError, match=message) as caught:
            read(tmp_path)
        assert str(tmp_path / "about.json") in str(caught.value)
        assert "\n" not in str(caught.value)


def one_line(capfd, read) -> str:
    """The message of an error that is all that is printed."""
    with pytest.raises(InputError) as caught:
        read()
    gc.collect()
    assert capfd.readouterr() == ("", "")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600
    return str(caught.value)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A finished tree and the progress of a stage, in one folder; tests copy it."""
    folder = tmp_path_factory.mktemp("written") / "stage"
    checkpoint.save(folder, variables(), {"members": 4, "image_shape": (3, 3, 1)})
    checkpoint.save_progress(folder, 5, state())
    return folder


@pytest.fixture
def stage(written, tmp_path):
    return shutil.copytree(written, tmp_path / "stage")


@pytest.mark.parametrize("fault", checkpoints.FAULTS)
def test_a_damaged_tree_is_one_line_that_says_what_to_do(fault, stage, capfd):
    checkpoints.FAULTS[fault](stage / "tree")
    message = one_line(capfd, lambda: checkpoint.load(stage, variables()))
    assert message.startswith(f"{stage}/tree/") and message.endswith(f"; delete {stage} to train this stage again")


@pytest.mark.parametrize("fault", ["cut", "flipped", "missing", "metadata_missing", "metadata_of_something_else"])
def test_a_checkpoint_of_an_older_version_is_read_without_hashes(fault, stage, capfd):
    content = json.loads((stage / "about.json").read_text())
    del content["sha256"]
    (stage / "about.json").write_text(json.dumps(content))
    chex.assert_trees_all_equal(checkpoint.load(stage, variables()), variables())
    checkpoints.FAULTS[fault](stage / "tree")
    if fault != "flipped":  # it may be in a place that Orbax checks, or not
        message = one_line(capfd, lambda: checkpoint.load(stage, variables()))
        assert message.startswith((f"{stage}/tree: cannot be read (", f"{stage}: the checkpoint does not fit"))


def test_a_missing_tree_is_not_trained_again_in_silence(stage, capfd):
    shutil.rmtree(stage / "tree")
    assert checkpoint.is_complete(stage)
    message = one_line(capfd, lambda: checkpoint.load(stage, variables(), remedy="copy it again"))
    assert message == f"{stage}/tree: the folder is missing; copy it again"


@pytest.mark.parametrize(
    "hashes",
    [[], "", 3, {"../../secret": "0"}, {"/etc/passwd": "0"}, {"_METADATA": 1}, {"a\0b": "0"}, {"x" * 5000: "0"}],
)
def test_hashes_are_untrusted(hashes, stage, capfd):
    content = json.loads((stage / "about.json").read_text())
    (stage / "about.json").write_text(json.dumps(content | {"sha256": hashes}))
    one_line_or_long_name = pytest.raises(InputError, match="to train this stage again$")
    with one_line_or_long_name:
        checkpoint.load(stage, variables())


def test_facts_are_compared(stage):
    checkpoint.check_facts(stage, {"members": 4, "image_shape": (3, 3, 1), "new in this version": 1})
    with pytest.raises(InputError) as caught:
        checkpoint.check_facts(stage, {"members": 6})
    about = stage / "about.json"
    assert str(caught.value) == f"{about}: members is 4; should be 6; delete {stage} to train this stage again"


@pytest.mark.parametrize("name", ["about.json", "tree"])
def test_what_is_in_the_way_of_a_checkpoint_is_replaced_and_links_are_not_followed(name, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "thesis.tex").write_text("years of work")
    (tmp_path / "stage").mkdir()
    (tmp_path / "stage" / name).symlink_to(outside)
    checkpoint.save(tmp_path / "stage", variables(), {})
    chex.assert_trees_all_equal(checkpoint.load(tmp_path / "stage", variables()), variables())
    assert [path.name for path in outside.iterdir()] == ["thesis.tex"]


def test_an_interrupted_save_is_not_complete(tmp_path, monkeypatch):
    checkpoint.save(tmp_path, variables(0), {"number": 0})
    with monkeypatch.context() as patch:
        interrupt_writing(patch)
        with pytest.raises(KeyboardInterrupt):
            checkpoint.save(tmp_path, variables(1), {"number": 1})
    assert not checkpoint.is_complete(tmp_path)
    with pytest.raises(InputError, match="not a finished checkpoint"):
        checkpoint.load(tmp_path, variables())
    checkpoint.save(tmp_path, variables(2), {"number": 2})
    chex.assert_trees_all_equal(checkpoint.load(tmp_path, variables()), variables(2))


def test_a_new_tree_is_never_seen_with_old_facts(tmp_path, monkeypatch):
    checkpoint.save(tmp_path, variables(0), {"number": 0})

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint.os, "replace", interrupt)  # the last thing that is done
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(tmp_path, variables(1), {"number": 1})
    assert not checkpoint.is_complete(tmp_path)


def test_a_tree_without_its_facts_is_not_complete(tmp_path):
    checkpoint.save(tmp_path, variables(), {})
    (tmp_path / "about.json").unlink()
    assert not checkpoint.is_complete(tmp_path)


# ---- Progress -------------------------------------------------------------------------------------------------------


def test_progress_comes_back_exactly_typed_keys_too(tmp_path):
    saved = state(3)
    checkpoint.save_progress(tmp_path, 3, saved)
    loaded = checkpoint.load_progress(tmp_path, state(0))
    assert isinstance(loaded, State)
    chex.assert_trees_all_equal(words(loaded), words(saved))
    chex.assert_trees_all_equal_dtypes(loaded, saved)
    draws = [jax.vmap(jax.random.uniform)(each.key) for each in (loaded, saved)]
    chex.assert_trees_all_equal(*draws)


def test_keys_of_another_generator_come_back_too(tmp_path):
    keys = {"key": jax.random.key(5, impl="rbg")}
    checkpoint.save_progress(tmp_path, 1, keys)
    loaded = checkpoint.load_progress(tmp_path, {"key": jax.random.key(0, impl="rbg")})
    chex.assert_trees_all_equal(jax.random.key_data(loaded["key"]), jax.random.key_data(keys["key"]))
    assert loaded["key"].dtype == keys["key"].dtype


def test_no_progress_is_none(tmp_path):
    assert checkpoint.load_progress(tmp_path, state()) is None
    assert checkpoint.load_progress(tmp_path / "nowhere", state()) is None


def test_only_the_newest_progress_is_kept(tmp_path):
    for number in (1, 2, 10):
        checkpoint.save_progress(tmp_path, number, state(number))
        assert [path.name for path in tmp_path.iterdir()] == [f"progress-{number:06d}"]
    assert int(checkpoint.load_progress(tmp_path, state()).epoch) == 10


def test_the_newest_of_several_wins(tmp_path):
    # Killed between writing the new and deleting the old.
    for number in (9, 12, 10, 100, 11, 3):
        checkpoint.save_progress(tmp_path / str(number), number, state(number))
        shutil.copytree(tmp_path / str(number), tmp_path / "both", dirs_exist_ok=True)
    assert int(checkpoint.load_progress(tmp_path / "both", state()).epoch) == 100
    checkpoint.save_progress(tmp_path / "both", 101, state(101))
    assert [path.name for path in (tmp_path / "both").iterdir()] == ["progress-000101"]


def test_the_same_number_can_be_written_again(tmp_path):
    checkpoint.save_progress(tmp_path, 5, state(1))
    checkpoint.save_progress(tmp_path, 5, state(2))
    assert int(checkpoint.load_progress(tmp_path, state()).epoch) == 2


def test_an_interrupted_write_leaves_the_last_good_one(tmp_path, monkeypatch):
    checkpoint.save_progress(tmp_path, 5, state(5))
    with monkeypatch.context() as patch:
        interrupt_writing(patch)
        with pytest.raises(KeyboardInterrupt):
            checkpoint.save_progress(tmp_path, 6, state(6))
    assert len(list(tmp_path.iterdir())) == 2
    assert int(checkpoint.load_progress(tmp_path, state()).epoch) == 5
    checkpoint.save_progress(tmp_path, 6, state(6))  # the next run gets that far again, and clears up
    assert [path.name for path in tmp_path.iterdir()] == ["progress-000006"]
    assert int(checkpoint.load_progress(tmp_path, state()).epoch) == 6


def test_leftovers_alone_are_no_progress(tmp_path):
    (tmp_path / "progress-000005.orbax-checkpoint-tmp-1700000000").mkdir()
    (tmp_path / "progress-notes").mkdir()
    (tmp_path / "progress-").mkdir()
    assert checkpoint.load_progress(tmp_path, state()) is None


@pytest.mark.parametrize(
    "like",
    [state(width=5), state(width=3), state()._replace(epoch=jnp.float32(0)), state().variables],
    ids=["larger", "smaller", "types", "leaves"],
)
def test_progress_of_something_else_is_one_line_that_says_what_to_do(like, tmp_path):
    checkpoint.save_progress(tmp_path, 2, state())
    with pytest.raises(
        InputError, match="not the progress of this run .*; choose another --output or delete"
    ) as caught:
        checkpoint.load_progress(tmp_path, like)
    assert str(caught.value).startswith(str(tmp_path / "progress-000002"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("fault", checkpoints.FAULTS)
def test_damaged_progress_is_one_line_and_does_not_restart_the_stage(fault, stage, capfd):
    checkpoints.FAULTS[fault](stage / "progress-000005")
    message = one_line(capfd, lambda: checkpoint.load_progress(stage, state()))
    assert message.startswith(f"{stage}/progress-000005/")
    assert message.endswith(f"; delete {stage} to train this stage again")


@pytest.mark.parametrize("content", [None, "", "[]", "{"])
def test_progress_without_hashes_or_with_damaged_ones(content, stage, capfd):
    path = stage / "progress-000005" / "sha256.json"
    if content is not None:
        path.write_text(content)
        assert str(path) in one_line(capfd, lambda: checkpoint.load_progress(stage, state()))
        return
    path.unlink()
    chex.assert_trees_all_equal(words(checkpoint.load_progress(stage, state(1))), words(state()))
    checkpoints.missing(stage / "progress-000005")
    message = one_line(capfd, lambda: checkpoint.load_progress(stage, state()))
    assert message.startswith(f"{stage}/progress-000005: ") and "delete" in message


# ---- A disk that fails ----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def small_files(size: int):
    """Within the block no file can grow beyond `size` bytes: what a full disk looks like to Orbax and TensorStore."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_an_error_of_the_system_and_leaves_the_last_good_progress(stage, tmp_path, capfd):
    large = state()._replace(variables={"kernel": jnp.asarray(np.random.default_rng(0).normal(size=50_000))})
    saves = (lambda: checkpoint.save_progress(stage, 6, large), lambda: checkpoint.save(tmp_path / "new", large, {}))
    for save in saves:
        with small_files(20_000), pytest.raises(OSError) as caught:
            save()
        gc.collect()
        assert caught.value.errno == errno.EFBIG and str(tmp_path) in caught.value.filename
        assert capfd.readouterr() == ("", "")
    assert not checkpoint.is_complete(tmp_path / "new")
    chex.assert_trees_all_equal(words(checkpoint.load_progress(stage, state(1))), words(state()))
    for save in saves:
        save()
    assert [path.name for path in stage.glob("progress*")] == ["progress-000006"]
    assert checkpoint.is_complete(tmp_path / "new")
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["about.json", "tree"]


def test_late_callbacks_into_a_closed_loop_are_ignored_and_nothing_else(stage, monkeypatch):
    """TensorStore's threads may end after a failure, at any time; here a destructor stands for them."""
    seen = []
    checkpoint.orbax()
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: seen.append(str(unraisable.exc_value)))
    loop = asyncio.new_event_loop()
    loop.close()

    class Late:
        def __del__(self):
            loop.call_soon_threadsafe(print)

    class Other:
        def __del__(self):
            raise RuntimeError("of other making")

    Late()
    assert seen == ["Event loop is closed"]  # before Orbax is used it is reported
    with interruption.handled():
        checkpoint.orbax.cache_clear()
        checkpoint.save_progress(stage, 6, state())
    hook = sys.unraisablehook
    with monkeypatch.context() as broken:
        broken.setattr(checkpoint.orbax(), "save", partial(_raise, OSError(errno.ENOSPC, "full")))
        with pytest.raises(OSError, match="No space left"):
            checkpoint.save_progress(stage, 7, state())
    assert sys.unraisablehook is hook
    Late()  # as the process ends
    Other()
    assert seen == ["Event loop is closed", "of other making"]


def _raise(error, *_):
    raise error


def test_an_error_of_tensorstore_is_recognised_by_its_text(tmp_path):
    try:
        raise ValueError("RESOURCE_EXHAUSTED: Error writing : No space left on device [os_error_code='28']")
    except ValueError as error:
        found = checkpoint._failure_to_write(ExceptionGroup("several", [error]), tmp_path)
    assert (found.errno, found.filename) == (errno.ENOSPC, str(tmp_path))
    assert checkpoint._failure_to_write(ValueError("ours"), tmp_path) is None


def test_dropping_progress_leaves_everything_else(tmp_path):
    checkpoint.save(tmp_path, variables(), {})
    checkpoint.save_progress(tmp_path, 2, state())
    (tmp_path / "progress-000003.orbax-checkpoint-tmp-1").mkdir()
    checkpoint.drop_progress(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["about.json", "tree"]
    assert checkpoint.is_complete(tmp_path)
    checkpoint.drop_progress(tmp_path / "nowhere")

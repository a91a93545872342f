import json
import re
import shutil
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bdjax.errors import InputError
from bdjax.training import checkpoint


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

    monkeypatch.setattr(checkpoint.ocp, "save", half)


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
    assert json.loads((tmp_path / "about.json").read_text()) == {"model": "resnet18", "width": 4}


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


@pytest.mark.usefixtures("orbax_refuses")
def test_a_damaged_tree_is_said(tmp_path):
    checkpoint.save(tmp_path, variables(), {})
    for file in (tmp_path / "tree").iterdir():
        shutil.rmtree(file) if file.is_dir() else file.unlink()
    with pytest.raises(InputError, match=re.escape(str(tmp_path))):
        checkpoint.load(tmp_path, variables())


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


@pytest.mark.usefixtures("orbax_refuses")
def test_damaged_progress_is_said(tmp_path):
    checkpoint.save_progress(tmp_path, 2, state())
    for file in (tmp_path / "progress-000002").iterdir():
        shutil.rmtree(file) if file.is_dir() else file.unlink()
    with pytest.raises(InputError, match="progress-000002: not the progress of this run"):
        checkpoint.load_progress(tmp_path, state())


def test_dropping_progress_leaves_everything_else(tmp_path):
    checkpoint.save(tmp_path, variables(), {})
    checkpoint.save_progress(tmp_path, 2, state())
    (tmp_path / "progress-000003.orbax-checkpoint-tmp-1").mkdir()
    checkpoint.drop_progress(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["about.json", "tree"]
    assert checkpoint.is_complete(tmp_path)
    checkpoint.drop_progress(tmp_path / "nowhere")

import contextlib
import dataclasses
import pathlib
from dataclasses import dataclass

import numpy as np
import pytest

from bdjax.errors import InputError
from bdjax.run import checks
from bdjax.run import config as run_config
from bdjax.run.configs.shared import ExperimentConfig
from bdjax.settings import Count, PositiveShare


@dataclass(frozen=True, kw_only=True)
class Config(ExperimentConfig):
    epochs: Count = 3
    share: PositiveShare = 0.5
    model: str = "lenet"


class Silent:
    """A log that prints nothing."""

    @contextlib.contextmanager
    def stage(self, name, **options):
        yield Silent()

    def note(self, name, text):
        pass


def check(**changes):
    config = dataclasses.replace(Config(), **changes)
    checks.check_ranges(config)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"seeds": 0}, "--seeds 0 is not at least 1"),
        ({"train_rows": -1}, "--train-rows -1 is not at least 0"),
        ({"member_group": -1}, "--member-group -1 is not at least 0"),
        ({"epochs": 0}, "--epochs 0 is not at least 1"),
        ({"share": 0.0}, "--share 0.0 is not above 0"),
        ({"share": 1.5}, "--share 1.5 is not above 0 and at most 1"),
        ({"share": float("nan")}, "--share nan is not above 0"),
        ({"seed": 2**31}, "is not below"),
        ({"model": "lennet"}, "--model 'lennet' is not one of .*; did you mean lenet?"),
        ({"layout": "pmap"}, "--layout 'pmap' is not one of vmap, map, unrolled, auto; did you mean map?"),
        ({"dataset": ""}, "--dataset is empty"),
        ({"dataset": "~no_such_user/photos"}, "--dataset '~no_such_user/photos': there is no home folder of this name"),
        ({"output": pathlib.Path("~no_such_user/run")}, "--output .* no home folder"),
        ({"output": pathlib.Path("a" * 5000)}, "--output .* is too long: 5,000 bytes"),
        ({"output": pathlib.Path("runs") / ("ä" * 200)}, "the longest name in it 400"),
        ({"output": pathlib.Path("/".join(["folder"] * 600))}, "--output .* is too long"),
        ({"data_dir": pathlib.Path("a\0b")}, "--data-dir .* has a zero byte"),
        ({"dataset": "a\ud800b"}, "characters that no file name can have"),
    ],
)
def test_settings_that_no_data_could_be_right_for(changes, reason):
    check()
    with pytest.raises(InputError, match=reason):
        check(**changes)


@pytest.mark.parametrize("name", ["file", "file/run", "link", "link/run"])
def test_a_folder_that_cannot_be_made(name, tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    with pytest.raises(InputError, match="is a file, not a folder; choose another --output$"):
        checks.check_output(tmp_path / name)
    for good in (tmp_path, tmp_path / "a" / "b", pathlib.Path("runs/digits"), pathlib.Path("~/runs")):
        checks.check_output(good)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "link"]


def test_fewer_rows_are_the_same_rows_whatever_the_seed():
    first, second = (run_config.load(Config(train_rows=50, test_rows=20, seed=seed), Silent()) for seed in (0, 7))
    assert len(first.train) == 50 and len(first.test) == 20
    np.testing.assert_array_equal(first.train.images, second.train.images)
    np.testing.assert_array_equal(first.test.labels, second.test.labels)


def test_a_target_that_the_data_does_not_have():
    with pytest.raises(InputError, match="--target 10 is not a class of digits; classes are 0 to 9"):
        run_config.load(Config(target=10), Silent())


@pytest.mark.parametrize(
    ("dataset", "like", "expected"),
    [
        ("digits", "", "digits"),
        ("tfds:cifar10", "", "cifar10"),
        ("cifar10", "gtsrb", "gtsrb"),
        ("digits.npz", "", None),
        ("mine", "digits", "digits"),
    ],
)
def test_settings_are_adapted_to_a_named_set_or_to_what_is_asked_for(dataset, like, expected):
    assert run_config.adapted_to(Config(dataset=dataset, like=like)) == expected


def test_a_kind_of_data_that_is_not_known_is_refused():
    with pytest.raises(InputError, match="^--like 'digit' is not one of digits, textures, mnist, "):
        run_config.adapted_to(Config(like="digit"))


def test_the_folder_is_named_by_what_was_changed_and_the_command_says_it(monkeypatch):
    default, changed = Config(), Config(epochs=5, data_dir=pathlib.Path("/somewhere"))
    plain = run_config.output_folder("attack", default, default, "quick")
    assert plain == pathlib.Path("runs/attack/digits-quick")
    named = run_config.output_folder("attack", changed, default, "quick")
    assert named != plain and named.name.startswith("digits-quick-")
    own = dataclasses.replace(changed, output=pathlib.Path("mine"))
    assert run_config.output_folder("attack", own, default, "quick") == pathlib.Path("mine")
    assert run_config.command("attack", own, default, preset="quick") == "bdjax attack --preset=quick --epochs=5"
    monkeypatch.setattr("sys.argv", ["experiments/attack.py"])
    command = run_config.command("attack", own, default, preset="quick")
    assert command == "python experiments/attack.py --preset=quick --epochs=5"
    command = run_config.command("attack", own, default, as_script=False, preset="quick")
    assert command == "bdjax attack --preset=quick --epochs=5"

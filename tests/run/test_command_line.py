import contextlib
import errno
import os
import pathlib
import re
import shlex
import signal
import time
from dataclasses import dataclass, replace
from typing import Literal

import pytest

from bdjax import interruption
from bdjax.errors import InputError
from bdjax.run import command_line


@dataclass(frozen=True)
class Config:
    preset: Literal["small", "big"] = "small"
    """how much of everything"""
    data_set: str = "digits"
    """which"""
    epochs: int = 3
    """how long"""
    rate: float = 1e-3
    """how fast"""
    shuffle: bool = True
    """whether"""
    verbose: bool = False
    """whether to print more"""
    opacity: tuple[float, float] | None = None
    """from, to"""
    output: pathlib.Path | None = None
    """where to"""


def defaults(preset=None, data_set=None):
    preset = preset or "small"
    if preset not in ("small", "big"):
        raise InputError(f"--preset {preset!r} is not one of small, big")
    config = Config(preset=preset, data_set=data_set or "digits")
    return replace(config, epochs=30, opacity=(0.1, 0.2)) if preset == "big" else config


def parse(*arguments):
    return command_line.parse(defaults, {"preset": None, "data_set": None}, arguments, prog="test")


def test_without_flags_everything_is_as_the_defaults_say():
    assert parse() == Config()


@pytest.mark.parametrize(
    "arguments",
    [
        ("--preset=big", "--data-set=mine"),
        ("--preset", "big", "--data-set", "mine"),
        ("--data_set=mine", "--preset=big"),  # underscores are let pass, as tyro does
        ("--rate=0.001", "--preset", "big", "--data-set=mine"),
    ],
)
def test_some_flags_decide_on_the_defaults_of_the_others(arguments):
    assert parse(*arguments) == Config(preset="big", data_set="mine", epochs=30, opacity=(0.1, 0.2))


def test_a_flag_goes_before_the_preset_wherever_it_stands():
    assert parse("--epochs=7", "--preset=big").epochs == parse("--preset=big", "--epochs=7").epochs == 7


def test_a_flag_of_several_values_is_given_once():
    assert parse("--preset=big", "--opacity", "0.3", "0.4").opacity == (0.3, 0.4)
    with pytest.raises(InputError, match="^--opacity is given 2 times; give it once, followed by all its values$"):
        parse("--preset=big", "--opacity", "0.3", "0.4", "--opacity", "0.5", "0.6")


@pytest.mark.parametrize(
    "arguments",
    [
        ("--preset=big", "--preset=small"),
        ("--epochs=3", "--epochs", "3"),
        ("--data-set=a", "--data_set=a"),
        ("--shuffle", "--no-shuffle"),
        ("--verbose", "--epochs=3", "--verbose"),
    ],
)
def test_a_flag_is_given_once(arguments):
    with pytest.raises(InputError, match="is given 2 times; give it once$"):
        parse(*arguments)


def test_the_arguments_are_the_programs_own_by_default(monkeypatch):
    monkeypatch.setattr("sys.argv", ["program", "--preset=big"])
    assert command_line.parse(defaults, {"preset": None}).epochs == 30


def test_a_preset_that_there_is_not():
    with pytest.raises(InputError, match="^--preset 'huge' is not one of small, big$"):
        parse("--preset=huge")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--epochs=many",), "--epochs 'many' is not a whole number"),
        (("--epochs=1e3",), "--epochs '1e3' is not a whole number"),
        (("--epochs=",), "--epochs '' is not a whole number"),
        (("--epochs=" + "9" * 5000,), "is not a whole number"),
        (("--epochs",), "--epochs needs a value"),
        (("--epochs", "--verbose"), "--epochs needs a value"),
        (("--epochs", "3", "4"), "--epochs takes one value; '4' is a second one"),
        (("--epochs", "3", "-x"), "--epochs takes one value; '-x' is a second one"),
        (("--rate=fast",), "--rate 'fast' is not a number"),
        (("--unknown=1",), "there is no flag '--unknown'; --help lists all flags"),
        (("--epoch=1",), "there is no flag '--epoch'; did you mean --epochs?"),
        (("--no-shufle",), "there is no flag '--no-shufle'; did you mean --no-shuffle?"),
        (("--no-epochs",), "there is no flag '--no-epochs'; did you mean --epochs?"),
        (("--shuffle=True",), "--shuffle takes no value, but has 'True': --shuffle or --no-shuffle"),
        (("--preset",), "--preset needs a value: one of small, big"),
        (("--opacity", "0.1"), "--opacity takes 2 values; there is 1"),
        (("--opacity", "0.1", "0.2", "0.3"), "--opacity takes 2 values; there are 3"),
        (("--opacity", "0.1", "much"), "--opacity 'much' is not a number"),
        (("--output=",), "--output is empty; leave the flag out, or give it a path"),
        (("epochs=3",), "'epochs=3' is not a flag; flags begin with --, and --help lists them"),
        (("-e", "3"), "'-e' is not a flag"),
        (("--",), "there is no flag '--'"),
    ],
)
def test_wrong_flags_are_one_line_with_what_would_be_right(arguments, message, capsys):
    with pytest.raises(InputError, match=re.escape(message)) as error:
        parse(*arguments)
    assert "\n" not in str(error.value) and len(str(error.value)) < 200
    assert capsys.readouterr() == ("", "")


def test_pairs_are_counted():
    @dataclass(frozen=True)
    class Paired:
        steps: tuple[tuple[int, float], ...] = ()
        names: tuple[str, ...] = ()

    def read(*arguments):
        return command_line.parse(lambda: Paired(), {}, arguments)

    assert read("--steps", "3", "0.1", "5", "0.01", "--names", "a", "-1") == Paired(((3, 0.1), (5, 0.01)), ("a", "-1"))
    for arguments in (("3",), ("3", "0.1", "5")):
        with pytest.raises(InputError, match="^--steps takes groups of 2 values; there (is 1|are 3)$"):
            read("--steps", *arguments)
    with pytest.raises(InputError, match="^--steps '0.1' is not a whole number$"):
        read("--steps", "3", "0.1", "0.1", "5")


def test_what_only_tyro_finds_is_one_line_too(monkeypatch):
    monkeypatch.setattr(command_line, "_check", lambda *given: None)
    with pytest.raises(InputError, match="^the flags cannot be read: .*unknown.*; --help lists all flags$") as error:
        parse("--unknown=1")
    assert "\n" not in str(error.value) and "─" not in str(error.value)


def test_help_shows_the_presets_own_defaults(capsys):
    with pytest.raises(SystemExit) as stop:
        parse("--preset=big", "--help")
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert re.search(r"--epochs\b.*how long.*default: 30", shown)
    assert "--data-set" in shown and "which" in shown


@pytest.mark.parametrize(
    "config",
    [
        Config(),
        Config(epochs=-1, rate=1e-7, shuffle=False, verbose=True),
        Config(opacity=(0.05, 0.1), output=pathlib.Path("runs/a b; 'c'")),
        Config(preset="big", data_set="pictures & more/", epochs=30, opacity=(0.25, 0.5), verbose=True),
    ],
)
def test_flags_give_the_configuration_back(config):
    fields = {name: value for name, value in vars(config).items() if value is not None}
    assert parse(*shlex.split(command_line.as_flags(fields))) == config


def test_flags_are_printed_as_one_would_type_them():
    fields = {"data_set": "digits", "opacity": (0.1, 0.2), "shuffle": False, "verbose": True, "epochs": 3}
    assert command_line.as_flags(fields) == "--data-set=digits --opacity 0.1 0.2 --no-shuffle --verbose --epochs=3"


def test_changed_fields():
    changed = Config(epochs=5, opacity=(0.1, 0.2), output=pathlib.Path("x"))
    assert command_line.changed_fields(changed, Config()) == {
        "epochs": 5,
        "opacity": (0.1, 0.2),
        "output": pathlib.Path("x"),
    }
    assert command_line.changed_fields(changed, Config(), ignore=("output", "opacity")) == {"epochs": 5}


@pytest.fixture
def settings_untouched(monkeypatch):
    monkeypatch.setattr(command_line.backend, "set_up", lambda: None)


@pytest.mark.usefixtures("settings_untouched")
def test_input_that_cannot_be_used_is_one_line_and_status_2(capsys):
    def main(arguments):
        raise InputError(f"{arguments[0]}: [bold]is\nnot   good[/] " + "and so on " * 30)

    with pytest.raises(SystemExit) as stop:
        command_line.run(main, ["a file"])
    assert stop.value.code == 2
    output, error = capsys.readouterr()
    assert output == ""
    assert error == "error: a file: [bold]is not good[/] " + " ".join(["and so on"] * 30) + "\n"


@pytest.mark.usefixtures("settings_untouched")
@pytest.mark.parametrize("length", [40_000, 2_000_000])
def test_a_long_message_keeps_its_beginning_and_its_end(length, capsys):
    def main(arguments):
        raise InputError(f"--dataset {'x' * length} is wrong; use --dataset=digits")

    start = time.perf_counter()
    with pytest.raises(SystemExit):
        command_line.run(main, [])
    assert time.perf_counter() - start < 2
    error = capsys.readouterr().err
    assert len(error) == command_line.LONGEST_ERROR + 1
    assert error.startswith("error: --dataset xxx") and error.endswith("xx is wrong; use --dataset=digits\n")


@pytest.mark.usefixtures("settings_untouched")
def test_control_characters_do_not_reach_the_terminal(capsys):
    def main(arguments):
        raise InputError("photos/\x1b]0;title\x07\x1b[2J\u202egnp.exe\x00: is\r\nnot an image")

    with pytest.raises(SystemExit):
        command_line.run(main, [])
    error = capsys.readouterr().err
    assert error.isprintable() is False and error[:-1].isprintable() and error.count("\n") == 1
    assert "is not an image" in error


@pytest.mark.usefixtures("settings_untouched")
def test_an_interruption_says_how_to_go_on(capsys):
    def main(arguments):
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as stop:
        command_line.run(main)
    assert stop.value.code == 130
    assert capsys.readouterr().err == "interrupted; run the same command again to continue\n"


@pytest.mark.usefixtures("settings_untouched", "foreground")
@pytest.mark.parametrize(
    ("number", "raised"),
    [(signal.SIGINT, None), (signal.SIGTERM, None), (signal.SIGINT, RuntimeError), (signal.SIGTERM, InputError)],
)
def test_a_signal_says_the_same_whatever_becomes_of_its_exception(number, raised, capfd):
    def main(arguments):
        with contextlib.suppress(KeyboardInterrupt):  # a library drops it, or makes an error of its own from it
            os.kill(os.getpid(), number)
        if raised:
            raise raised("INTERNAL: CallbackError")

    with pytest.raises(SystemExit) as stop:
        command_line.run(main, [])
    assert stop.value.code == 128 + number
    assert capfd.readouterr() == ("", "interrupted; run the same command again to continue\n")
    assert not interruption.received()


@pytest.mark.usefixtures("settings_untouched")
@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "runs/x/a.png"), "runs/x/a.png: No space left on device"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "Disk quota exceeded"),
        (FileExistsError(errno.EEXIST, "File exists", "runs/x/scores"), "runs/x/scores: File exists"),
        (PermissionError(errno.EACCES, "Permission denied", "runs/x"), "runs/x: Permission denied"),
    ],
)
def test_a_failure_of_the_disk_is_one_line_that_says_how_to_go_on(error, said, capfd):
    def main(arguments):
        raise error

    with pytest.raises(SystemExit) as stop:
        command_line.run(main, [])
    assert stop.value.code == 1
    line = f"error: {said}; when that is mended, run the same command again to continue\n"
    assert capfd.readouterr() == ("", line)


@pytest.mark.usefixtures("settings_untouched")
def test_an_error_without_a_number_is_no_failure_of_the_disk():
    def main(arguments):
        raise OSError("ours")

    with pytest.raises(OSError, match="ours"):
        command_line.run(main, [])


@pytest.mark.usefixtures("settings_untouched")
def test_a_bug_is_not_dressed_up_as_bad_input():
    def main(arguments):
        raise ValueError("ours")

    with pytest.raises(ValueError, match="ours"):
        command_line.run(main)


@pytest.mark.usefixtures("settings_untouched")
def test_a_complete_run_may_have_a_status():
    with pytest.raises(SystemExit) as stop:
        command_line.run(len, ["one", "two", "three"], lambda count: count)
    assert stop.value.code == 3
    command_line.run(len, [], lambda count: count)


def test_main_gets_the_arguments():
    got = []
    command_line.run(got.append, ["--epochs=3"])
    assert got == [["--epochs=3"]]

"""The command `bdjax`: what it lists, what it refuses, and how little it imports for that."""

import subprocess
import sys

import pytest

import bdjax
from bdjax import commands
from bdjax.__main__ import main
from bdjax.commands import COMMANDS, audit_data, audit_model
from bdjax.errors import InputError
from bdjax.run.experiment import read_flags

HEAVY = (
    *("jax", "flax", "optax", "orbax", "pooch", "onnx", "onnxruntime"),
    *("matplotlib", "sklearn", "skimage", "scipy", "tensorflow", "tensorflow_datasets"),
    *("jinja2", "pyarrow", "submitit"),
)
"""Libraries that are loaded in a run only: each takes a good part of the time of --help, JAX twice that time."""


def said(capsys: pytest.CaptureFixture, *arguments: str) -> str:
    main(arguments)
    return capsys.readouterr().out


def test_help_lists_every_command_on_a_line_of_the_terminal(capsys):
    text = said(capsys, "--help")
    assert text == said(capsys) == said(capsys, "-h") == said(capsys, "help")
    lines = text.splitlines()
    assert max(map(len, lines)) <= 80
    for name, command in COMMANDS.items():
        assert any(line.split() == [name, *command.about.split()] for line in lines)


def test_the_version(capsys):
    assert said(capsys, "--version") == said(capsys, "-V") == f"bdjax {bdjax.__version__}\n"


@pytest.mark.parametrize(
    ("word", "line"),
    [
        ("ta-kdd", "there is no command 'ta-kdd'; did you mean ta-kd?"),
        ("audit_dat", "there is no command 'audit_dat'; did you mean audit-data?"),
        ("--verson", "there is no flag '--verson'; did you mean --version?"),
        ("zebra", "there is no command 'zebra'; bdjax --help lists all commands"),
        ("x" * 10_000, "; bdjax --help lists all commands"),
        ("a\nb\x1b[31m", "bdjax --help lists all commands"),
    ],
)
def test_an_unknown_command_is_one_line_and_status_2(word, line, capsys):
    with pytest.raises(SystemExit) as stop:
        main([word])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.endswith(f"{line}\n") and error.count("\n") == 1 and len(error) < 200
    assert "\x1b" not in error


@pytest.mark.parametrize("name", ["ta-kd", "ta_kd"])
def test_a_command_is_started_with_the_other_words(name, monkeypatch):
    started = []
    monkeypatch.setattr(commands, "start", lambda *given: started.append(given))
    main([name, "--dataset=mnist", "--help"])
    assert started == [("ta-kd", ["--dataset=mnist", "--help"])]


def python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_what_needs_no_command_imports_nothing_heavy():
    code = """
import sys
sys.argv = ["bdjax", "ta-kdd"]
from bdjax.__main__ import main
try:
    main()
except SystemExit:
    main(["--help"]); main(["--version"])
print(sorted({"jax", "numpy", "rich", "tyro"} & set(sys.modules)))
"""
    assert python(code).splitlines()[-1] == "[]"


def test_help_and_refusals_import_no_library_that_only_a_run_needs():
    code = f"""
import sys
from bdjax import commands
refused = {{name: [["--no-such-flag=1"]] for name in {list(COMMANDS)}}}
refused["gate"].append(["--min-cda=2"])
refused["lfd"] += [["--epochs=0"], ["--dataset="], ["--seed=2147483647", "--seeds=2"], ["--output=" + "x" * 256]]
refused["audit-model"] += [["--seeds=2"], ["--target=1"], ["--like=digits"], ["--model="], ["--model=" + "x" * 256]]
for name, lines in refused.items():
    for arguments in (*lines, ["--help"]):
        try:
            commands.start(name, arguments)
        except SystemExit as stop:
            assert stop.code == (0 if arguments == ["--help"] else 2), (name, arguments)
print([name for name in {HEAVY} if name in sys.modules])
"""
    assert python(code).splitlines()[-1] == "[]"


# ---- The first word as a flag ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words",
    [
        ("photos/", "--width=4", "--copy-files"),
        ("--dataset=photos/", "--width=4", "--copy-files"),
        ("--width=4", "--copy-files", "photos/"),
        ("--width", "4", "photos/", "--copy-files"),
        ("--copy-files", "photos/", "--width=4"),
    ],
)
def test_the_word_without_a_flag_is_the_data(words):
    config = read_flags(audit_data.EXPERIMENT, "", words)
    assert (config.dataset, config.width, config.copy_files, config.attacks) == ("photos/", 4, True, "none")


def test_an_audit_of_data_takes_a_named_set_as_it_is():
    config = read_flags(audit_data.EXPERIMENT, "", ["digits", "--preset=quick"])
    assert (config.dataset, config.attacks, config.defenses, config.seeds) == ("digits", "none", "vbd", 1)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ((), "name the data: bdjax audit-data photos/, a folder with a sub-folder for each class, or an .npz"),
        (("photos/", "other/"), "--dataset is given 2 times; give it once"),
        (("photos/", "--dataset=other/"), "--dataset is given 2 times; give it once"),
        (("photos/", "--attacks=badnets"), "there is no flag '--attacks'"),
        (("photos/", "--study=grid"), "there is no flag '--study'"),
        (("photos/", "--seeds=3"), "there is no flag '--seeds'; did you mean --seed?"),
        (("no/such/folder/",), "no/such/folder: no such file or folder"),
        (("photos/", "--defenses=vbd,scan"), "takes exactly one detector"),
    ],
)
def test_what_an_audit_of_data_refuses(words, line):
    with pytest.raises(InputError) as error:
        audit_data.main(words)
    assert line in str(error.value)


def test_the_words_without_a_flag_are_the_models():
    for words in (("a/", "b/", "--width=4"), ("--width=4", "a/", "b/"), ("--model", "a/", "b/", "--width=4")):
        config = read_flags(audit_model.EXPERIMENT, "", words)
        assert (config.model, config.width) == (("a/", "b/"), 4)

"""The table of commands: each has a module and a script."""

import ast
import pathlib

import pytest

from bdjax import commands

ROOT = pathlib.Path(commands.__file__).parents[2]
SCRIPTS = sorted(path for path in (ROOT / "experiments").glob("*.py") if path.stem != "bench_ensemble")


def test_every_module_and_every_script_has_a_row():
    modules = {path.stem for path in pathlib.Path(commands.__file__).parent.glob("*.py")} - {"__init__"}
    assert modules == {command.module for command in commands.COMMANDS.values()} == {path.stem for path in SCRIPTS}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_has_examples_and_starts_its_command(script):
    name = script.stem.replace("_", "-")
    text = script.read_text()
    assert f'if __name__ == "__main__":\n    commands.start("{name}")\n' in text
    tree = ast.parse(text)
    assert len(tree.body) == 3, "a script has a docstring, an import and the call"
    title, examples = ast.get_docstring(tree).split("\n\n")  # the text is the command's
    assert all(line.startswith(f"python experiments/{script.name}") for line in examples.splitlines())
    assert title == commands.load(name).__doc__.splitlines()[0]


@pytest.mark.parametrize("name", commands.COMMANDS)
def test_the_line_of_a_command_fits_the_terminal(name):
    about = commands.COMMANDS[name].about
    assert about and len(about) <= 80 - 16 and not about.endswith(".")

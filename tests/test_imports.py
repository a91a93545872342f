"""Imports between subpackages: each imports only from those before it in one order."""

import ast
import functools
import pathlib

import pytest

import bdjax

ROOT = pathlib.Path(bdjax.__file__).parent
ORDER = (
    *("types", "errors", "choices", "extras", "atomic", "interruption"),
    *("losses", "selection", "settings", "metrics", "plugins", "datasets"),
    *("triggers", "models", "training", "attacks"),
    *("defenses", "inspection", "exchange", "evaluation", "run", "reporting", "workflows", "benchmarking", "api"),
    *("testing", "commands", "__main__"),
)
FILES = sorted(path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")


def name_of(path: pathlib.Path) -> str:
    return ".".join(("bdjax", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__")


MODULES = {name_of(path) for path in FILES}


@functools.cache
def modules_imported(path: pathlib.Path) -> frozenset[str]:
    """The names that a file imports: for `from a import b`, "a.b" if that is a module, otherwise "a"."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (inner & MODULES) or {node.module}
    return frozenset(found)


def part_of(path: pathlib.Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def test_every_part_has_its_place_in_the_order():
    assert {part_of(path) for path in FILES} == set(ORDER)


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_point_upwards(path):
    above = ORDER[: ORDER.index(part_of(path)) + 1]
    parts = {name.split(".")[1] for name in modules_imported(path) if name.startswith("bdjax.")}
    assert {part for part in parts if part in ORDER} <= set(above)
    assert "experiments" not in {name.split(".")[0] for name in modules_imported(path)}


def test_no_module_imports_itself_through_others():
    needs = {name_of(path): modules_imported(path) & MODULES - {name_of(path)} for path in FILES}
    while free := {name for name, others in needs.items() if not others & needs.keys()}:
        needs = {name: others for name, others in needs.items() if name not in free}
    assert not needs, f"these import each other: {sorted(needs)}"


@pytest.mark.parametrize(
    ("library", "home"),
    [
        ("flax", "models"),
        ("orbax", "training/checkpoint.py"),
        ("http", "exchange/http.py"),
        ("safetensors", "exchange/safetensors_files.py"),
        ("torch", "benchmarking"),
        ("tyro", "run/command_line.py"),
    ],
)
def test_some_libraries_have_one_home(library, home):
    users = {path for path in FILES if library in {name.split(".")[0] for name in modules_imported(path)}}
    assert users and all((ROOT / home) in (path, *path.parents) for path in users)

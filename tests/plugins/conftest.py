"""Plugins are put on the path for a test, and are gone after it."""

import importlib
import pathlib
import sys
from collections.abc import Callable

import pytest

from bdjax import plugins

collect_ignore = ["template"]
TEMPLATE = pathlib.Path(__file__).parent / "template"


@pytest.fixture
def on_path(monkeypatch: pytest.MonkeyPatch) -> Callable[[pathlib.Path], None]:
    """Puts a folder of installed packages on the path."""

    def add(folder: pathlib.Path) -> None:
        monkeypatch.syspath_prepend(str(folder))
        importlib.invalidate_caches()
        plugins.installed.cache_clear()

    modules = set(sys.modules)
    yield add
    monkeypatch.undo()
    plugins.installed.cache_clear()
    plugins._used.clear()
    for name in set(sys.modules) - modules:
        if name.startswith("plugin_") or name == "bdjax_stripe":
            del sys.modules[name]


@pytest.fixture
def install(on_path: Callable[[pathlib.Path], None], tmp_path: pathlib.Path) -> Callable[..., None]:
    """Writes what pip leaves of a package with one module, and puts it on the path."""

    def add(name: str, source: str, entries: dict[str, list[str]], version: str = "0.1") -> None:
        module = f"plugin_{name}"
        (tmp_path / f"{module}.py").write_text(source)
        information = tmp_path / f"{name}-{version}.dist-info"
        information.mkdir()
        (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        groups = [f"[{group}]\n" + "\n".join(lines) + "\n" for group, lines in entries.items()]
        (information / "entry_points.txt").write_text("\n".join(groups).replace("MODULE", module))
        on_path(tmp_path)

    return add

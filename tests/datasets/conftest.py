"""Every test here starts with an empty cache, an empty home and no data folder in the environment."""

import pathlib

import pooch
import pytest

from bdjax.datasets.locate import DATA_DIR_VARIABLE


@pytest.fixture(autouse=True)
def cache(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    folder = tmp_path / "cache"
    monkeypatch.setattr(pooch, "os_cache", lambda name: folder)
    monkeypatch.delenv(DATA_DIR_VARIABLE, raising=False)
    monkeypatch.delenv("TFDS_DATA_DIR", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return folder


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes every download fail at once, as without a network."""

    def refuse(*arguments, **keywords):
        raise ConnectionError("no network in this test")

    monkeypatch.setattr(pooch, "retrieve", refuse)


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> pathlib.Path:
    """An empty folder for the test's files."""
    path = tmp_path / "data"
    path.mkdir()
    return path

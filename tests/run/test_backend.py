"""What is settled about JAX before and after it is imported."""

import os
import subprocess
import sys

import jax
import pytest

from bdjax.run import backend


@pytest.fixture
def not_imported(monkeypatch):
    """As before JAX is imported."""
    monkeypatch.delitem(sys.modules, "jax")


def test_compiled_programs_are_kept_where_the_user_says(monkeypatch, tmp_path):
    changes = {}
    monkeypatch.setattr(jax.config, "update", changes.__setitem__)
    backend.use_compilation_cache()  # these tests have named a folder already
    assert "jax_compilation_cache_dir" not in changes
    monkeypatch.setattr(type(jax.config), "jax_compilation_cache_dir", None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    backend.use_compilation_cache()
    assert changes["jax_compilation_cache_dir"] == str(tmp_path / "bdjax" / "compiled")


def test_settings_reach_a_jax_that_is_imported_later(not_imported, monkeypatch, tmp_path):
    monkeypatch.setattr(os, "environ", {"XDG_CACHE_HOME": str(tmp_path), "JAX_NUM_CPU_DEVICES": "7"})
    backend.set_up()
    assert os.environ["JAX_COMPILATION_CACHE_DIR"] == str(tmp_path / "bdjax" / "compiled")
    assert os.environ["JAX_NUM_CPU_DEVICES"] == str(len(os.sched_getaffinity(0)))
    assert os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] == "0.2"
    own = {"JAX_COMPILATION_CACHE_DIR": "mine", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "7"}
    os.environ.update(own)
    backend.set_up()
    assert {name: os.environ[name] for name in own} == own


def test_jax_reads_these_settings(tmp_path):
    code = """
from bdjax.run import backend
backend.set_up()
import jax
settings = jax.config.jax_compilation_cache_dir, jax.config.jax_persistent_cache_min_compile_time_secs
print(jax.device_count(), *settings)
"""
    names = (
        "JAX_NUM_CPU_DEVICES",
        "JAX_COMPILATION_CACHE_DIR",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS",
        "XLA_FLAGS",
    )
    environment = {name: value for name, value in os.environ.items() if name not in names}
    environment |= {"JAX_PLATFORMS": "cpu", "XDG_CACHE_HOME": str(tmp_path)}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    expected = [str(len(os.sched_getaffinity(0))), str(tmp_path / "bdjax" / "compiled"), "0.2"]
    assert run.stdout.split() == expected


def test_without_another_backend_jax_is_not_asked(not_imported, monkeypatch):
    for platforms, has_plugins in (("", False), ("cpu", True)):
        monkeypatch.setattr(backend, "_has_plugins", lambda has_plugins=has_plugins: has_plugins)
        monkeypatch.setenv("JAX_PLATFORMS", platforms)
        assert backend.is_cpu() and "jax" not in sys.modules


@pytest.mark.parametrize(("name", "is_cpu"), [("cpu", True), ("gpu", False)])
def test_an_imported_jax_is_asked(name, is_cpu, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: name)
    assert backend.is_cpu() == is_cpu


def test_a_plugin_may_bring_another_backend(monkeypatch):
    monkeypatch.setattr(backend.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(backend.importlib.metadata, "entry_points", lambda group: ())
    for name in ("PJRT_NAMES_AND_LIBRARY_PATHS", "TPU_LIBRARY_PATH"):
        monkeypatch.delenv(name, raising=False)
    assert not backend._has_plugins()
    monkeypatch.setattr(backend.importlib.metadata, "entry_points", lambda group: (group,))
    assert backend._has_plugins()
    monkeypatch.setattr(backend.importlib.metadata, "entry_points", lambda group: ())
    monkeypatch.setenv("PJRT_NAMES_AND_LIBRARY_PATHS", "x:y")
    assert backend._has_plugins()

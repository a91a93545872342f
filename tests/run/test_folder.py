import dataclasses
import json
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from bdjax.errors import InputError
from bdjax.run import folder
from bdjax.run.folder import default_name, open_run, to_plain


@dataclass(frozen=True)
class Network:
    width: int = 16


@dataclass(frozen=True)
class Config:
    dataset: str = "digits"
    data_dir: Path = Path("data")
    epochs: int = 30
    learning_rate: float = 3e-3
    triggers: tuple[str, ...] = ("patch", "blend")
    network: Network = Network()


def files_of(folder: Path) -> list[str]:
    """All but the lock of an open run."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.name != ".lock")


def test_plugins_are_no_versions_of_libraries(tmp_path, monkeypatch):
    monkeypatch.setattr(folder.plugins, "_used", {"attack stripe": "bdjax-stripe 0.1"})
    record = open_run(tmp_path, Config(), experiment="attack").record
    assert record["plugins"] == {"attack stripe": "bdjax-stripe 0.1"} and "attack stripe" not in record["versions"]


def test_a_new_run_says_where_its_numbers_come_from(tmp_path):
    run = open_run(tmp_path / "runs" / "digits-quick", Config(), experiment="ta_kd")

    record = json.loads((run.path / "config.json").read_text())
    assert record == run.record
    assert record["experiment"] == "ta_kd"
    assert record["config"] == {
        "dataset": "digits",
        "data_dir": "data",
        "epochs": 30,
        "learning_rate": 3e-3,
        "triggers": ["patch", "blend"],
        "network": {"width": 16},
    }
    packages = {"bdjax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "python"}
    assert set(record["versions"]) == packages
    assert all(record["versions"].values())
    assert set(record["hardware"]) == {"platform", "device_kind", "device_count", "cpu_count"}
    assert record["hardware"]["platform"] == "cpu"
    assert "git_revision" in record
    assert run.is_new
    assert run.path.is_absolute()
    assert run.checkpoints.is_dir()
    assert files_of(run.path) == ["checkpoints", "config.json"]


def test_the_same_settings_continue_and_keep_the_file(tmp_path):
    open_run(tmp_path, Config(), experiment="ta_kd").write_json("results.json", {"CDA": 0.95})
    file = tmp_path / "config.json"
    record = json.loads(file.read_text())
    record["versions"]["jax"] = "0.0.1"  # software and hardware may change between the parts of a run
    record["hardware"]["platform"] = "tpu"
    file.write_text(json.dumps(record))
    before = file.read_bytes()

    run = open_run(tmp_path, Config(), experiment="ta_kd")

    assert not run.is_new
    assert run.record["versions"]["jax"] == "0.0.1"
    assert file.read_bytes() == before
    assert json.loads((tmp_path / "results.json").read_text()) == {"CDA": 0.95}


def test_other_settings_are_refused_by_name_and_nothing_is_touched(tmp_path):
    open_run(tmp_path, Config(), experiment="ta_kd")
    before = (tmp_path / "config.json").read_bytes()
    other = Config(epochs=15, network=Network(width=64))

    with pytest.raises(InputError) as raised:
        open_run(tmp_path, other, experiment="ta_kd")

    message = str(raised.value)
    assert message == (
        f"{tmp_path} holds a run with other settings: epochs 30 -> 15; network.width 16 -> 64; choose another --output"
    )
    assert (tmp_path / "config.json").read_bytes() == before


def test_a_field_that_was_added_or_removed_is_a_difference(tmp_path):
    open_run(tmp_path, Config(), experiment="ta_kd")
    renamed = dataclasses.make_dataclass("Renamed", [("dataset", str), ("seed", int)])("digits", 3)

    with pytest.raises(InputError, match=r"seed \(absent\) -> 3; .*epochs 30 -> \(absent\)"):
        open_run(tmp_path, renamed, experiment="ta_kd")


def test_ignored_fields_may_differ(tmp_path):
    open_run(tmp_path, Config(), experiment="ta_kd")
    moved = Config(data_dir=Path("elsewhere"), network=Network(width=8))

    assert not open_run(tmp_path, moved, experiment="ta_kd", ignore=("data_dir", "network")).is_new
    with pytest.raises(InputError, match='data_dir "data" -> "elsewhere"'):
        open_run(tmp_path, moved, experiment="ta_kd", ignore=("network",))


def test_another_experiment_is_refused(tmp_path):
    open_run(tmp_path, Config(), experiment="ta_kd")
    with pytest.raises(InputError, match="holds a run of ta_kd, not of lfd; choose another --output"):
        open_run(tmp_path, Config(), experiment="lfd")


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b'{"experiment": "ta_kd"}', b'{"config": 3, "experiment": "x"}', b"\xff", b"[" * 9000],
)
def test_a_damaged_config_is_refused(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(InputError, match="config.json is not the config.json of a run"):
        open_run(tmp_path, Config(), experiment="ta_kd")
    assert files_of(tmp_path) == ["config.json"]


def test_a_folder_with_other_files_is_refused_but_hidden_ones_are_let_pass(tmp_path):
    (tmp_path / ".config.json.17.tmp").write_bytes(b'{"experi')  # what a killed process leaves
    assert open_run(tmp_path, Config(), experiment="ta_kd").is_new

    occupied = tmp_path / "thesis"
    occupied.mkdir()
    (occupied / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match=r"has files \(thesis.tex\) but no config.json"):
        open_run(occupied, Config(), experiment="ta_kd")
    assert files_of(occupied) == ["thesis.tex"]


def test_a_file_in_the_way_is_refused(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(InputError, match="file is a file, not a folder"):
        open_run(file, Config(), experiment="ta_kd")
    with pytest.raises(InputError, match="below cannot be used .*choose another --output"):
        open_run(file / "below", Config(), experiment="ta_kd")


def test_a_folder_that_cannot_be_written_to_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write everywhere, so permissions would not do
    with pytest.raises(InputError, match="cannot be written to; choose another --output") as raised:
        open_run(tmp_path, Config(), experiment="ta_kd")
    assert "\n" not in str(raised.value)
    assert files_of(tmp_path) == []


def test_a_setting_that_is_not_finite_is_refused_before_anything_is_made(tmp_path):
    with pytest.raises(InputError, match="config.learning_rate is nan"):
        open_run(tmp_path / "run", Config(learning_rate=float("nan")), experiment="ta_kd")
    assert not (tmp_path / "run").exists()


def test_an_interrupted_write_leaves_the_last_good_file(tmp_path, monkeypatch):
    run = open_run(tmp_path, Config(), experiment="ta_kd")
    run.write_json("results.json", {"ASR": 0.1})
    before = files_of(tmp_path)

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run.write_json("results.json", {"ASR": 0.2})

    assert json.loads((tmp_path / "results.json").read_text()) == {"ASR": 0.1}
    assert files_of(tmp_path) == before
    run.write_json("results.json", {"ASR": 0.2})
    assert json.loads((tmp_path / "results.json").read_text()) == {"ASR": 0.2}


def test_text_is_utf8_whatever_the_names_in_it(tmp_path):
    run = open_run(tmp_path, Config(), experiment="ta_kd")
    assert run.write_text("table.md", "0.95 ± 0.01 →").read_text("utf-8") == "0.95 ± 0.01 →"
    name = os.fsdecode(b"caf\xe9")  # a file name that is not UTF-8
    assert json.loads(run.write_json("names.json", [name]).read_text("utf-8")) == [name]


@pytest.mark.parametrize("name", ["../outside.txt", "/etc/outside.txt", "", "a/../../outside.txt"])
def test_no_name_leads_out_of_the_folder(tmp_path, name):
    run = open_run(tmp_path / "run", Config(), experiment="ta_kd")
    with pytest.raises(ValueError, match="is not the name of a file inside the run folder"):
        run.write_text(name, "text")
    assert files_of(tmp_path) == ["run", "run/checkpoints", "run/config.json"]


def fill(path: Path, kind: str, outside: Path) -> None:
    """Put something that is no plain file in the place of a file."""
    outside.mkdir()
    (outside / "thesis.tex").write_text("years of work")
    if kind == "a folder":
        path.mkdir()
        (path / "notes").write_text("more work")
    elif kind == "not a plain file":
        os.mkfifo(path)
    else:
        path.symlink_to({"a link": outside / "thesis.tex", "a dangling link": outside / "new"}[kind])


IN_THE_WAY = ("a folder", "a link", "a dangling link", "not a plain file")


@pytest.mark.parametrize("kind", IN_THE_WAY)
@pytest.mark.parametrize("name", ["config.json", "results.json", "report.html", "engine.json"])
def test_what_is_in_the_way_of_a_file_of_every_run_is_said_at_the_start(name, kind, tmp_path):
    open_run(tmp_path / "run", Config(), experiment="ta_kd")
    (tmp_path / "run" / name).unlink(missing_ok=True)
    fill(tmp_path / "run" / name, kind, tmp_path / "outside")
    before = files_of(tmp_path)
    with pytest.raises(InputError) as raised:
        open_run(tmp_path / "run", Config(), experiment="ta_kd")
    words = kind.replace("dangling ", "")
    assert str(raised.value) == (
        f"{tmp_path / 'run' / name} is {words}, in the place of a file of the run; remove it, or choose another --output"
    )
    assert files_of(tmp_path) == before


@pytest.mark.parametrize("kind", IN_THE_WAY)
def test_what_is_in_the_way_of_a_file_is_neither_followed_nor_lost(kind, tmp_path):
    run = open_run(tmp_path / "run", Config(), experiment="ta_kd")
    fill(run.path / "asr.png", kind, tmp_path / "outside")
    before = files_of(tmp_path)
    for write in (lambda: run.write_bytes("asr.png", b"new"), lambda: run.file("asr.png")):
        with pytest.raises(InputError, match=r"asr.png is .*, in the place of a file of the run; remove it, or"):
            write()
    assert files_of(tmp_path) == before
    assert (tmp_path / "outside" / "thesis.tex").read_text() == "years of work"


def test_a_folder_that_is_a_link_leads_nowhere_outside(tmp_path):
    run = open_run(tmp_path / "run", Config(), experiment="ta_kd")
    (tmp_path / "outside").mkdir()
    (run.path / "scores").symlink_to(tmp_path / "outside")
    with pytest.raises(InputError, match="scores/a.csv: a link leads out of the run folder; remove it, or choose"):
        run.write_text("scores/a.csv", "text")
    assert not list((tmp_path / "outside").iterdir())
    (run.path / "here").symlink_to(run.path / "checkpoints")
    run.write_text("here/a.csv", "text")
    assert (run.path / "checkpoints" / "a.csv").read_text() == "text"


def test_remains_of_a_killed_write_are_deleted_when_the_run_continues(tmp_path):
    open_run(tmp_path, Config(), experiment="ta_kd")
    (tmp_path / ".cleaned.npz.0123456789abcdef.tmp").write_bytes(b"gigabytes")
    open_run(tmp_path, Config(), experiment="ta_kd")
    assert files_of(tmp_path) == ["checkpoints", "config.json"]


class TestContents:
    """Settings that are paths, of which the content counts."""

    OLD, NEW = Config(data_dir=Path("old")), Config(data_dir=Path("new"))

    @pytest.fixture
    def begun(self, tmp_path):
        open_run(tmp_path, self.OLD, experiment="ta_kd", contents={"data_dir": "1f"})
        return tmp_path

    @pytest.mark.parametrize("config", [OLD, NEW])
    def test_the_same_content_continues_wherever_it_is(self, begun, config):
        assert not open_run(begun, config, experiment="ta_kd", contents={"data_dir": "1f"}).is_new

    def test_another_content_at_the_same_path_is_refused(self, begun):
        with pytest.raises(
            InputError, match="another content of --data-dir=old, which has changed since the run began"
        ):
            open_run(begun, self.OLD, experiment="ta_kd", contents={"data_dir": "2e"})

    @pytest.mark.parametrize("contents", [{}, {"data_dir": "2e"}])
    def test_another_content_elsewhere_is_another_setting(self, begun, contents):
        with pytest.raises(InputError, match='data_dir "old" -> "new"'):
            open_run(begun, self.NEW, experiment="ta_kd", contents=contents)

    @pytest.mark.parametrize("contents", [None, [], 3])
    def test_a_run_without_digests_compares_the_paths(self, begun, contents):
        file = begun / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"contents": contents}))
        assert not open_run(begun, self.OLD, experiment="ta_kd", contents={"data_dir": "2e"}).is_new
        with pytest.raises(InputError, match='data_dir "old" -> "new"'):
            open_run(begun, self.NEW, experiment="ta_kd", contents={"data_dir": "1f"})


def test_json_takes_arrays_and_refuses_numbers_that_are_not_finite(tmp_path):
    run = open_run(tmp_path, Config(), experiment="ta_kd")
    value = {"rates": np.array([0.5, 1.0]), "loss": jnp.float32(0.25), "count": np.int64(3), 4: (Path("a"), None, True)}
    assert json.loads(run.write_json("results.json", value).read_text()) == {
        "rates": [0.5, 1.0],
        "loss": 0.25,
        "count": 3,
        "4": ["a", None, True],
    }
    with pytest.raises(ValueError, match=r"results\.teachers\[1\]\.asr is nan, which is not a finite number"):
        run.write_json("results.json", {"teachers": [{"asr": 0.5}, {"asr": np.float32("nan")}]})
    with pytest.raises(ValueError, match=r"results\[0\]\[1\] is inf"):
        run.write_json("results.json", [np.array([0.0, np.inf])])
    assert json.loads((tmp_path / "results.json").read_text())["count"] == 3


def test_what_json_has_no_form_for_is_named():
    with pytest.raises(TypeError, match="value.model is a set"):
        to_plain({"model": {1}})
    with pytest.raises(TypeError, match="must be a dataclass instance, not dict"):
        open_run(Path("nowhere"), {}, experiment="ta_kd")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_there_is_no_name_for_a_number_that_is_not_finite(value):
    with pytest.raises(InputError, match=r"^changed\.rate is (nan|inf), which is not a finite number$"):
        default_name("digits", "quick", {"rate": value})


@pytest.mark.parametrize("letter", ["a", "\u00e4", "\u4e2d", "\U00020000", "\udcff", "/", " "])
def test_default_names_are_short_enough_for_any_file_system(letter):
    name = default_name(letter * 5000, "quick", {})
    assert 8 < len(name.encode()) < 256 and "/" not in name


def test_default_names_tell_settings_apart():
    assert default_name("digits", "quick", {}) == "digits-quick"
    one = default_name("digits", "quick", {"epochs": 15, "seed": 1})
    assert one == default_name("digits", "quick", {"seed": 1, "epochs": 15})
    assert one != default_name("digits", "quick", {"seed": 2, "epochs": 15})
    assert one.startswith("digits-quick-")
    assert len(one) == len("digits-quick-") + 8
    assert default_name("npz:../my data.npz", "quick", {}) != default_name("npz:../my-data.npz", "quick", {})
    assert "/" not in default_name("../" * 90, "quick", {})


def test_git_revision_is_of_this_checkout_or_unknown(monkeypatch, tmp_path):
    revision = folder.git_revision()
    if revision is not None:
        head = subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True, cwd=Path(__file__).parent
        ).stdout
        assert head.startswith(revision.removesuffix("-dirty"))
    monkeypatch.setenv("PATH", str(tmp_path))  # no git there
    assert folder.git_revision() is None


def test_git_revision_of_an_unrelated_checkout_is_ignored(monkeypatch, tmp_path):
    package = tmp_path / "venv" / "bdjax"
    package.mkdir(parents=True)
    try:
        subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    except OSError:
        pytest.skip("there is no git here")
    monkeypatch.setattr(folder.bdjax, "__file__", str(package / "__init__.py"))
    assert folder.git_revision() is None

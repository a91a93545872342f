import os

import pytest

from bdjax import atomic


def names(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_a_file_is_written_with_its_folder(tmp_path):
    path = atomic.write_bytes(tmp_path / "plots" / "a.png", b"good")
    assert path.read_bytes() == b"good" and names(tmp_path) == ["plots", "plots/a.png"]
    atomic.write_bytes(path, b"better")
    assert path.read_bytes() == b"better" and names(tmp_path) == ["plots", "plots/a.png"]
    (tmp_path / "plain").write_text("")
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode  # as others may read it


@pytest.mark.parametrize("failing", ["fsync", "replace"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=type)
def test_an_error_in_the_middle_leaves_the_last_good_file(failing, error, tmp_path, monkeypatch):
    path = atomic.write_bytes(tmp_path / "a.png", b"good")

    def fail(*_):
        raise error

    monkeypatch.setattr(os, failing, fail)
    with pytest.raises(type(error)):
        atomic.write_bytes(path, b"half")
    assert path.read_bytes() == b"good" and names(tmp_path) == ["a.png"]


def test_a_link_is_replaced_and_not_followed(tmp_path):
    outside = tmp_path / "outside"
    outside.write_text("years of work")
    for target in (outside, tmp_path / "nowhere"):
        link = tmp_path / "link"
        link.symlink_to(target)
        atomic.write_bytes(link, b"new")
        assert not link.is_symlink() and link.read_bytes() == b"new"
        link.unlink()
    assert outside.read_text() == "years of work" and names(tmp_path) == ["outside"]


def test_two_writers_never_share_a_temporary_file(tmp_path):
    path = tmp_path / ("a" * 255)
    with atomic.replacing(path) as first, atomic.replacing(path) as second:
        first.write(b"first")
        second.write(b"second")
        assert first.name != second.name
    assert path.read_bytes() == b"first" and len(names(tmp_path)) == 1  # the inner block ends first


def test_the_temporary_file_may_be_elsewhere(tmp_path):
    with atomic.replacing(tmp_path / "cleaned" / "1.png", scratch=tmp_path) as file:
        assert not list((tmp_path / "cleaned").iterdir())
        file.write(b"1")
    assert names(tmp_path) == ["cleaned", "cleaned/1.png"]


def test_remains_of_killed_processes_are_deleted_and_nothing_else(tmp_path):
    others = [".hidden", ".notes.tmp", "a.0123456789abcdef.tmp", ".a.0123456789abcdef.tmp.png"]
    for name in (*others, ".results.json.0123456789abcdef.tmp"):
        (tmp_path / name).write_text("")
    (tmp_path / ".folder.0123456789abcdef.tmp").mkdir()
    atomic.remove_remains(tmp_path)
    assert names(tmp_path) == sorted([*others, ".folder.0123456789abcdef.tmp"])
    atomic.remove_remains(tmp_path / "nowhere")

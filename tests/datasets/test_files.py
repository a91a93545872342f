import math
import os
import re

import pytest

from bdjax.datasets.files import Listed, free_memory, is_residue, list_files, list_level, read_file, read_json
from bdjax.errors import InputError


def write(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")


@pytest.mark.parametrize(
    "name",
    [
        "._a.png",
        "a/._b",
        ".DS_Store",
        "Thumbs.db",
        "a/THUMBS.DB",
        "desktop.ini",
        "__MACOSX/a",
        "a/.ipynb_checkpoints/b",
    ],
)
def test_residue(name):
    assert is_residue(name)


@pytest.mark.parametrize("name", ["a.png", ".hidden", "a/b/c", "my_thumbs.db.png", "a._b", "", "__MACOSX2/a"])
def test_no_residue(name):
    assert not is_residue(name)


def test_files_are_listed_at_any_depth_in_the_order_of_their_names(folder):
    write(folder, "b.png", "a/c/1.png", "a/b.png", "a.png", "a/._b.png", ".DS_Store", "__MACOSX/a/b.png", "a-1/x", ".h")
    names = [".h", "a/b.png", "a/c/1.png", "a-1/x", "a.png", "b.png"]
    assert [listed.name for listed in list_files(folder)] == names
    assert [listed.path for listed in list_files(folder)] == [folder / name for name in names]
    assert not any(listed.problem or listed.is_link for listed in list_files(folder))


def test_links_and_special_files_are_listed_with_their_problem(folder):
    write(folder, "a/x")
    os.mkfifo(folder / "pipe")
    os.link(folder / "a/x", folder / "hard")
    for name, target in {
        "folder": "a",
        "loop": ".",
        "file": "a/x",
        "dev": "/dev/zero",
        "gone": "b",
        "self": "self",
    }.items():
        (folder / name).symlink_to(target)
    listed = {entry.name: entry for entry in list_files(folder)}
    assert {name: entry.problem for name, entry in listed.items() if name != "self"} == {
        "a/x": "",
        "hard": "",
        "file": "",
        "pipe": "is not a regular file",
        "folder": "is a link to a folder",
        "loop": "is a link to a folder",
        "dev": "is not a regular file",
        "gone": "is a link to nothing",
    }
    assert re.match(r"cannot be read \(|is a link to nothing", listed["self"].problem)
    assert listed["hard"].inode == listed["a/x"].inode != listed["file"].inode
    assert {name for name, entry in listed.items() if entry.is_link} == {
        "folder",
        "loop",
        "file",
        "dev",
        "gone",
        "self",
    }


def test_a_level_has_its_folders_apart(folder):
    write(folder, "b/x", "a/x", "z", "c", "Thumbs.db", "__MACOSX/x")
    (folder / "link").symlink_to("a")
    (folder / "gone").symlink_to("nothing")
    folders, others = list_level(folder)
    assert [(entry.name, entry.is_link) for entry in folders] == [("a", False), ("b", False), ("link", True)]
    assert [(entry.name, entry.problem) for entry in others] == [("c", ""), ("gone", "is a link to nothing"), ("z", "")]
    assert isinstance(folders[0], Listed) and folders[0].path == folder / "a"


def test_a_folder_that_cannot_be_listed(folder):
    for function in (list_files, list_level):
        with pytest.raises(InputError, match="^" + re.escape(f"{folder / 'x'}: cannot be listed (No such file")):
            function(folder / "x")


def test_folders_without_end_are_cut(folder):
    path = folder
    for _ in range(70):
        path = path / "d"
    path.mkdir(parents=True)
    (listed,) = list_files(folder)
    assert listed.problem == "is more than 64 folders deep" and listed.name == "d/" * 65


def test_read_file(folder):
    write(folder, "x")
    assert read_file(folder / "x", 1, "images") == b"x"
    os.mkfifo(folder / "pipe")
    (folder / "zero").symlink_to("/dev/zero")
    (folder / "self").symlink_to("self")
    for name, message in {
        "pipe": "is not a regular file; a plain file is needed",
        "zero": "is not a regular file; a plain file is needed",
        ".": "is not a regular file; a plain file is needed",
        "self": "cannot be read (Too many levels of symbolic links)",
        "gone": "cannot be read (No such file or directory)",
    }.items():
        with pytest.raises(InputError, match="^" + re.escape(f"{folder / name}: {message}") + "$"):
            read_file(folder / name, 1, "images")
    with pytest.raises(InputError, match=r"x: has 1 bytes; images have at most 0$"):
        read_file(folder / "x", 0, "images")


def test_read_json(folder):
    file = folder / "x.json"
    file.write_text('{"a": NaN}')
    data, value = read_json(file, 99, "files")
    assert data == b'{"a": NaN}' and math.isnan(value["a"])
    with pytest.raises(InputError, match=r"x.json: is not JSON \(NaN is no number\)$"):
        read_json(file, 99, "files", strict=True)
    for text in (b"", b"{", b"\xff", b"[" * 100_000, b"9" * 5000):
        file.write_bytes(text)
        with pytest.raises(InputError, match=r"^[^\n]*x.json: is not JSON \([^\n]+\)$"):
            read_json(file, 1 << 20, "files")


def test_the_free_memory_is_known():
    assert 1 << 20 < free_memory() < 1 << 60

"""Grid files: what they say, and the line of what is wrong."""

import pathlib

import pytest

from bdjax.errors import InputError
from bdjax.run import grid_file
from tests.fixtures import archives

GOOD = """\
seeds = 2   # for all
attacks = ["badnets", "none"]
flags = { epochs = 3 }

[[blocks]]
experiments = ["lfd"]
datasets = ["digits", "mnist"]
defenses = ["abl"]

[blocks.flags]
width = 4

[[blocks]]
experiments = ["abm"]
seeds = 5
partition = "gpu"
attacks = [
    "blended:poison_rate=0.05",
]

[partitions.gpu]
gpus_per_node = 1
mem_gb = 64
"""


def write(folder: pathlib.Path, text: str) -> pathlib.Path:
    path = folder / "a.toml"
    path.write_text(text)
    return path


def test_blocks_have_what_the_top_says_unless_they_set_it(tmp_path):
    file = grid_file.read(write(tmp_path, GOOD))
    first, second = file.blocks
    assert (first.seeds, first.attacks, first.defenses, first.datasets) == (
        2,
        ("badnets", "none"),
        ("abl",),
        ("digits", "mnist"),
    )
    assert (second.seeds, second.attacks, second.datasets) == (5, ("blended:poison_rate=0.05",), ("digits",))
    assert first.flags == {"epochs": 3, "width": 4} and second.flags == {"epochs": 3}
    assert file.partitions["gpu"].gpus_per_node == 1 and file.partitions["gpu"].time == 60


@pytest.mark.parametrize(
    ("old", "new", "line", "message"),
    [
        ("seeds = 2", "seeds = 2 3", 1, "not TOML"),
        ("seeds = 2", "sedes = 2", 1, "there is no key 'sedes'; did you mean seeds?"),
        ("seeds = 2 ", "seeds = -2 ", 1, "seeds -2 is not at least 1"),
        ("datasets =", "dataset =", 7, "did you mean datasets?"),
        ('["digits", "mnist"]', '"digits"', 7, "datasets 'digits' is not a list"),
        ('["digits", "mnist"]', '["digits", 3]', 7, "has the entry 3, which is not text"),
        ('["digits", "mnist"]', "[]", 7, "datasets () is empty"),
        ('defenses = ["abl"]', 'model = "lenet"', 8, "flags of the experiments go into flags"),
        ("seeds = 5", "seeds = true", 15, "seeds True is not a whole number"),
        ('partition = "gpu"', 'partition = "gqu"', 16, "did you mean gpu?"),
        ('experiments = ["abm"]\n', "", 13, "should list its experiments"),
        ("mem_gb", "memory", 23, "there is no key 'memory'"),
        ("gpus_per_node = 1", "gpus_per_node = 1.5", 22, "is not a whole number"),
        ("flags = { epochs = 3 }", "flags = 3", 3, "flags should be a table"),
        ("[partitions.gpu]", "[partitions.cpu]\n[partitions.gpu]", 5, "there are several partitions (cpu, gpu)"),
    ],
)  # fmt: skip
def test_a_mistake_has_its_file_and_line(tmp_path, old, new, line, message):
    assert old in GOOD
    path = write(tmp_path, GOOD.replace(old, new, 1))
    with pytest.raises(InputError) as error:
        grid_file.read(path)
    assert str(error.value).startswith(f"{path} line {line}: ") and message in str(error.value).replace("[]", "()")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"seeds = 2\n# \xff\n", "line 2: is not UTF-8"),
        (b"", "has no [[blocks]]"),
        (b"[blocks]\nexperiments = 1", "has no [[blocks]]"),
        (b"a = " + b"[" * 100_000, "nested too deeply"),
        (b"#" * (grid_file.LONGEST_FILE + 1), "files of grids have at most 1048576"),
    ],
    ids=["bytes", "empty", "a table", "nested", "long"],
)
def test_other_files_are_refused(tmp_path, data, message):
    path = tmp_path / "a.toml"
    path.write_bytes(data)
    with pytest.raises(InputError, match="a.toml") as error:
        grid_file.read(path)
    assert message in str(error.value)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(InputError, match="No such file"):
        grid_file.read(tmp_path / "none.toml")


def test_a_pipe_is_refused_without_waiting_for_it(tmp_path):
    with pytest.raises(InputError, match="is not a regular file"):
        grid_file.read(archives.pipe(tmp_path / "a.toml"))


def test_lines_of_words():
    text = '# badnets\n[[blocks]]\nattacks = [\n  "sig", # badnets\n  "badnets",\n]\nflags.epochs = 3\n[[blocks]]\nseeds=3\n'
    found = [grid_file.line_of(text, 0, word) for word in ("badnets", "epochs", "sig", "none")]
    assert found == [5, 7, 4, 2]
    assert grid_file.line_of(text, 1, "none", "seeds") == 9 and grid_file.line_of(text, None, "none") is None

"""The same rows in every form give the same arrays; what each form cannot be is one line that lists what is there."""

import json
import pathlib
import re
import shutil
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bdjax.datasets import FORMS, ReadOptions, coco, columns, load, load_suspect, records, stacking
from bdjax.datasets.forms import form_of
from bdjax.errors import InputError
from bdjax.types import Unread
from tests.fixtures import forms
from tests.fixtures.forms import WRITERS

CLASSES = ("10", "2", "33")
"""In the order of a class folder: 2, 10, 33."""


def some_rows(count: int = 24, classes: tuple[str, ...] = ("ant", "bee", "cat"), channels: int = 3) -> list[forms.Row]:
    images = np.random.default_rng(0).integers(0, 256, (count, 9, 8, channels), np.uint8)
    return forms.rows_of(images, [classes[number % len(classes)] for number in range(count)])


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> dict[str, pathlib.Path]:
    """The same rows in every form."""
    place, rows = tmp_path_factory.mktemp("forms"), some_rows()
    return {name: write(place / name.replace(" ", "-") / "set", rows) for name, write in WRITERS.items()}


@pytest.mark.parametrize("name", WRITERS)
def test_the_same_rows_give_the_same_arrays(written, name):
    wanted, found = load_suspect(str(written["folder"])), load_suspect(str(written[name]))
    assert wanted.images.shape == (24, 9, 8, 3) and found.class_names == ("ant", "bee", "cat")
    np.testing.assert_array_equal(found.images, wanted.images)
    np.testing.assert_array_equal(found.labels, wanted.labels)
    assert found.images.dtype == np.uint8 and found.labels.dtype == np.int32
    assert len(set(found.files)) == 24 and found.records == (name not in ("folder", "metadata.csv", "metadata.jsonl"))
    if name != "arrow of splits":
        for mine, other in zip(load(str(written[name])), load(str(written["folder"])), strict=True):
            np.testing.assert_array_equal(mine.images, other.images)
            np.testing.assert_array_equal(mine.labels, other.labels)
    scaled = [load_suspect(str(written[of]), options=ReadOptions(image_size=16)) for of in (name, "folder")]
    np.testing.assert_array_equal(scaled[0].images, scaled[1].images)
    assert scaled[0].original_sizes == {(9, 8): 24}


@pytest.mark.parametrize("name", WRITERS)
def test_grey_images_and_classes_that_are_numbers(tmp_path, name):
    rows = some_rows(12, CLASSES, 1)
    found = load_suspect(str(WRITERS[name](tmp_path / "set", rows)))
    assert found.images.shape == (12, 9, 8, 1)
    # A source that numbers its classes keeps its order.
    numbered = name in ("parquet folder", "arrow", "arrow of splits", "coco")
    assert found.class_names == (("10", "2", "33") if numbered else ("2", "10", "33"))


def test_classes_that_are_long_numbers_have_one_order_in_every_form(tmp_path):
    rows = some_rows(6, (f"1{'0' * 20}", "9"))
    for name in ("folder", "parquet", "tar", "metadata.csv"):
        assert load_suspect(str(WRITERS[name](tmp_path / name / "set", rows))).class_names == ("9", f"1{'0' * 20}")


def test_what_a_path_holds_decides(written):
    kinds = {"parquet folder": "parquet", "arrow of splits": "arrow", "tar, packed, json": "tar"}
    kinds |= {"metadata.csv": "metadata", "metadata.jsonl": "metadata"}
    for name, path in written.items():
        assert form_of(path) is FORMS[kinds.get(name, name)], name


def test_a_folder_of_classes_stays_one_whatever_lies_beside_the_classes(tmp_path):
    path = forms.folder(tmp_path / "set", some_rows(6))
    (path / "metadata.csv").write_text("id,price\n1,2\n")
    (path / "annotations.json").write_text('{"note": "none"}')
    shutil.copy(forms.parquet(tmp_path / "other", some_rows(6)), path / "table.parquet")
    forms.write_tar(path / "originals.tar", [("a", b"1")])
    assert form_of(path) is FORMS["folder"]
    unread = {entry.file for entry in load_suspect(str(path)).unread}
    assert unread == {"metadata.csv", "annotations.json", "table.parquet", "originals.tar"}


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("parquet", "set.parquet#0"),
        ("parquet folder", "data/train-00000-of-00002.parquet#0"),
        ("arrow", "data-00000-of-00002.arrow#0"),
        ("tar", "shard-000.tar/ant/00000.png"),
        ("metadata.csv", "images/00000.png"),
        ("coco", "images/00000.png#100"),
    ],
)
def test_rows_name_their_record(written, name, row):
    assert load_suspect(str(written[name])).files[0] == row


def test_parts_are_known_by_names(tmp_path):
    rows = some_rows(12)
    for word, part in (("train", rows), ("val", rows[::4]), ("test", rows[::3])):
        forms.write_tar(
            tmp_path / f"photos-{word}-000.tar",
            [pair for row in part for pair in ((row.name, row.data), (row.name[:-3] + "cls", row.label.encode()))],
        )
    train, test = load(str(tmp_path))
    assert len(train) == 12 and len(test) == 4
    assert train.unread == (Unread("photos-val-000.tar", "is a third split"),)
    suspect = load_suspect(str(tmp_path))
    assert suspect.unread == (*train.unread, Unread("test", "is the part for testing, of 4 rows"))
    forms.write_tar(tmp_path / "more.tar", [("1.png", rows[0].data), ("1.cls", b"ant")])
    with pytest.raises(InputError, match="more.tar is neither train, test nor val by its name, as other files are"):
        load(str(tmp_path))


def test_columns_of_other_names(tmp_path):
    rows = some_rows(6)
    table = forms.table(rows).rename_columns(["photo", "kind"])
    file = tmp_path / "set.parquet"
    pq.write_table(table, file)
    with pytest.raises(InputError) as error:
        load_suspect(str(file))
    assert str(error.value) == (
        f"{file}: has no column with the images that is called image; its columns are 'photo', 'kind'; --image-column=NAME "
        "names one"
    )
    with pytest.raises(InputError, match=r"has no column 'sort' with the classes; its columns are 'photo', 'kind'"):
        load_suspect(str(file), options=ReadOptions(image_column="photo", label_column="sort"))
    options = ReadOptions(image_column="photo", label_column="kind")
    assert load_suspect(str(file), options=options).class_names == ("ant", "bee", "cat")


def test_members_of_other_names(tmp_path):
    rows = some_rows(6)
    members = []
    for number, row in enumerate(rows):
        members += [(f"{number}.left.png", row.data), (f"{number}.right.png", rows[0].data)]
        members += [(f"{number}.json", json.dumps({"sort": row.label}).encode()), (f"{number}.seg.npy", b"x")]
    path = str(forms.write_tar(tmp_path / "set.tar", members))
    with pytest.raises(
        InputError, match=r"sample 0: has 2 images \(.left.png, .right.png\); --image-column=NAME names one"
    ):
        load_suspect(path)
    with pytest.raises(
        InputError, match=r"has no class under 'label' or 'labels' or 'class'; .* fields of .json are 'sort';"
    ):
        load_suspect(path, options=ReadOptions(image_column="left.png"))
    found = load_suspect(path, options=ReadOptions(image_column="left.png", label_column="sort"))
    assert found.class_names == ("ant", "bee", "cat") and found.files[0] == "set.tar/0.left.png"
    assert Unread("*.seg.npy", "are 6 members that are not read") in found.unread


@pytest.mark.parametrize("ending", [".tar", ".tar.gz"])
def test_links_and_devices_in_a_tar_are_listed(tmp_path, ending):
    rows = some_rows(3)
    file = forms.tar(tmp_path / "set", rows, packed=ending == ".tar.gz") / f"shard-000{ending}"
    with tarfile.open(file, f"w:{ending.removeprefix('.tar').removeprefix('.')}") as archive:
        for kind, name in (
            (tarfile.SYMTYPE, "9.png"),
            (tarfile.LNKTYPE, "9.cls"),
            (tarfile.FIFOTYPE, "pipe"),
            (tarfile.DIRTYPE, "folder"),
        ):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "ant/00000.png"
            archive.addfile(member)
    found = load_suspect(str(tmp_path / "set"))
    reasons = {"9.cls": "is a link", "9.png": "is a link", "pipe": "is not a regular file"}
    assert {(f"shard-000{ending}/{name}", reason) for name, reason in reasons.items()} == set(found.unread)


def test_a_note_in_a_tar_can_be_left_out(tmp_path):
    rows = some_rows(6)
    members = [
        (f"{number}.{ending}", data)
        for number, row in enumerate(rows)
        for ending, data in (("png", row.data), ("cls", row.label.encode()))
    ]
    path = str(forms.write_tar(tmp_path / "set.tar", [("README.txt", b"about"), *members]))
    for column in ("", "png"):
        options = ReadOptions(skip_unreadable=True, image_column=column)
        found = load_suspect(path, options=options)
        assert len(found) == 6 and found.unread[0] == Unread("set.tar/README", "is a sample without an image")


def test_too_many_classes_are_refused_before_images_are_read(written, monkeypatch):
    monkeypatch.setattr(records, "MAXIMUM_CLASSES", 2)
    monkeypatch.setattr(records, "decode", lambda *_, **__: pytest.fail("an image is read"))
    for name in ("parquet", "coco"):
        with pytest.raises(InputError, match="has 3 classes; a classifier needs 2 to 2"):
            load_suspect(str(written[name]))


def test_images_as_paths_beside_a_table(tmp_path):
    rows = some_rows(6)
    forms.folder(tmp_path, rows)
    table = pa.table({"image": [row.name for row in rows], "label": [row.label for row in rows]})
    pq.write_table(table, tmp_path / "set.parquet")
    found = load_suspect(str(tmp_path / "set.parquet"))
    np.testing.assert_array_equal(found.images, load_suspect(str(forms.tar(tmp_path / "shards", rows))).images)


def test_large_data_is_said_before_it_is_read_and_refused_if_it_does_not_fit(written, monkeypatch):
    said = []
    monkeypatch.setattr(stacking, "_SAID_BYTES", 1)
    for name in ("parquet", "folder"):
        load_suspect(str(written[name]), options=ReadOptions(say=said.append))
    assert said[0] == said[1] and re.fullmatch(
        r"24 images of 8x9 pixels and 3 channel\(s\) take 0.00 GiB of [\d.,]+ GiB of free memory", said[0]
    )
    monkeypatch.setattr(stacking, "free_memory", lambda: 2000)
    for name in WRITERS:
        with pytest.raises(InputError, match="24 images of 8x9 pixels .* use fewer images, or --image-size=N"):
            load_suspect(str(written[name]))


def test_copies_and_contradictions_are_counted(tmp_path):
    rows = some_rows(6)
    again = [rows[0]._replace(name="ant/copy.png"), rows[1]._replace(label="bee")]
    found = load_suspect(str(forms.parquet(tmp_path / "set", [*rows, *again])))
    assert "2 with the same bytes as another row, 1 with the bytes of a row of another class" in found.source


def test_rows_of_several_sizes_are_counted_without_decoding_them_all(tmp_path, monkeypatch):
    images = [np.zeros((9 + number, 8, 3), np.uint8) for number in range(40)]
    path = forms.parquet(tmp_path / "set", forms.rows_of(images, ["ant", "bee"] * 20))
    decoded = []
    plain = records.decode
    monkeypatch.setattr(records, "decode", lambda *args, **options: decoded.append(1) or plain(*args, **options))
    with pytest.raises(InputError, match="images have 40 sizes"):
        load_suspect(str(path))
    assert len(decoded) == 2


@pytest.mark.parametrize("name", ["parquet", "tar", "tar, packed, json", "metadata.csv", "metadata.jsonl"])
def test_an_empty_text_is_no_class_in_any_form(tmp_path, name):
    rows = some_rows(9)
    rows[4] = rows[4]._replace(label="")
    found = load_suspect(str(WRITERS[name](tmp_path / "set", rows)), options=ReadOptions(skip_unreadable=True))
    assert found.class_names == ("ant", "bee", "cat") and len(found) == 8
    assert [entry.reason for entry in found.unread if entry.reason.startswith("has ")] == ["has no class"]


def test_rows_that_cannot_be_read_are_refused_or_listed(tmp_path):
    rows = some_rows(9)
    rows[4] = rows[4]._replace(data=b"no image")
    path = str(forms.parquet(tmp_path / "set", rows))
    with pytest.raises(InputError) as error:
        load_suspect(path)
    assert str(error.value).startswith(f"{tmp_path}/set.parquet#4: is not an image in a format that is read")
    assert str(error.value).endswith("--skip-unreadable leaves such rows out")
    found = load_suspect(path, options=ReadOptions(skip_unreadable=True))
    assert len(found) == 8 and [entry.file for entry in found.unread] == ["set.parquet#4"]
    assert "set.parquet#4" not in found.files


# ---- Bad input ------------------------------------------------------------------------------------------------------


def half(file: pathlib.Path) -> pathlib.Path:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    return file


def with_labels(values: list, path: pathlib.Path) -> pathlib.Path:
    rows = some_rows(6)
    file = path.with_suffix(".parquet")
    pq.write_table(forms.table(rows).set_column(1, "label", pa.array(values)), file)
    return file


def doubled(write, file: pathlib.Path) -> pathlib.Path:
    made = forms.table(some_rows(6), ["ant", "bee", "cat"])
    write(made.append_column("label", made["label"]), file)
    return file


def write_arrow(table: pa.Table, file: pathlib.Path) -> None:
    with pa.ipc.new_stream(str(file), table.schema) as writer:
        writer.write_table(table)


def not_utf8(path: pathlib.Path, column: str) -> pathlib.Path:
    """A table whose text is not UTF-8, as pyarrow itself does not write it."""
    broken = pa.Array.from_buffers(pa.string(), 2, pa.array([b"\xff", b"a"]).buffers())
    made = pa.table({"image": [b"1", b"2"], "label": ["a", "b"]} | {column: broken})
    pq.write_table(made, path.with_suffix(".parquet"))
    return path.with_suffix(".parquet")


def edit(path: pathlib.Path, change, count: int = 6) -> pathlib.Path:
    """Change a set of COCO."""
    forms.coco(path, some_rows(count))
    content = json.loads((path / "annotations.json").read_text())
    change(content)
    (path / "annotations.json").write_text(json.dumps(content))
    return path


def tar_of(path: pathlib.Path, *members: tuple[str, bytes]) -> pathlib.Path:
    data = some_rows(2)[0].data
    return forms.write_tar(path.with_suffix(".tar"), [("0.png", data), ("0.cls", b"a"), *members])


def listed(path: pathlib.Path, text: str, name: str = "metadata.csv") -> pathlib.Path:
    forms.metadata_csv(path, some_rows(6))
    (path / "metadata.csv").unlink()
    (path / name).write_text(text)
    return path


BAD = {
    "parquet, truncated": (lambda path: half(forms.parquet(path, some_rows())), "is not an intact parquet file"),
    "parquet, not one": (
        lambda path: tar_of(path).rename(path.with_suffix(".parquet")),
        "is not an intact parquet file",
    ),
    "parquet, float labels": (
        lambda path: with_labels([0.5] * 6, path),
        "has type double; text or whole numbers are needed",
    ),
    "parquet, no label": (
        lambda path: with_labels(["a", "b", None, "a", "b", "a"], path),
        "set.parquet#2: has no class",
    ),
    "parquet, captions for labels": (
        lambda path: with_labels([letter * 300 for letter in "abcdef"], path),
        "a class has at most 256; --label-column=NAME names another column",
    ),
    "parquet, two classes of a name": (
        lambda path: (
            pq.write_table(forms.table(some_rows(6), ["ant", "bee", "cat", "ant"]), path.with_suffix(".parquet"))
            or path.with_suffix(".parquet")
        ),
        "has two classes of the name 'ant'; names must differ",
    ),
    "parquet, one class": (lambda path: with_labels([3] * 6, path), "has 1 class(es); at least 2 are needed"),
    "parquet, wrong images": (
        lambda path: (
            pq.write_table(pa.table({"image": [1, 2], "label": ["a", "b"]}), path.with_suffix(".parquet"))
            or path.with_suffix(".parquet")
        ),
        "column 'image' with the images has type int64",
    ),
    "parquet, a path that leads out": (
        lambda path: (
            pq.write_table(
                pa.table({"image": ["../../etc/passwd", "b.png"], "label": ["a", "b"]}), path.with_suffix(".parquet")
            )
            or path.with_suffix(".parquet")
        ),
        "set.parquet#0 names '../../etc/passwd', which leads out of the data",
    ),
    "parquet, two columns of a name": (
        lambda path: doubled(pq.write_table, path.with_suffix(".parquet")),
        "set.parquet: has two columns 'label'; names must differ",
    ),
    "arrow, two columns of a name": (
        lambda path: doubled(write_arrow, forms.arrow(path, some_rows()) / "data-00000-of-00002.arrow").parent,
        "data-00000-of-00002.arrow: has two columns 'label'; names must differ",
    ),
    "parquet, classes that are no text": (
        lambda path: not_utf8(path, "label"),
        "set.parquet: is not an intact parquet file (",
    ),
    "parquet, paths that are no text": (
        lambda path: not_utf8(path, "image"),
        "set.parquet: is not an intact parquet file (",
    ),
    "arrow, truncated": (
        lambda path: half(forms.arrow(path, some_rows()) / "data-00001-of-00002.arrow").parent,
        "data-00001-of-00002.arrow: is not an intact Arrow file",
    ),
    "arrow, a file that leads out": (
        lambda path: (
            (forms.arrow(path, some_rows()) / "state.json").write_text('{"_data_files": [{"filename": "../x"}]}')
            and path
        ),
        "names '../x', which leads out of the data",
    ),
    "arrow, a file twice": (
        lambda path: (
            (forms.arrow(path, some_rows()) / "state.json").write_text(
                json.dumps({"_data_files": [{"filename": "data-00000-of-00002.arrow"}] * 2})
            )
            and path
        ),
        "state.json: lists 'data-00000-of-00002.arrow' twice; each name once is needed",
    ),
    "arrow, a split twice": (
        lambda path: (
            (forms.split_arrow(path, some_rows()) / "dataset_dict.json").write_text('{"splits": ["train", "train"]}')
            and path
        ),
        "dataset_dict.json: lists 'train' twice; each name once is needed",
    ),
    "arrow, no files": (
        lambda path: (forms.arrow(path, some_rows()) / "state.json").write_text("{}") and path,
        "state.json: lists no data files",
    ),
    "tar, truncated": (lambda path: half(tar_of(path, ("1.png", bytes(9000)))), "is not an intact .tar archive"),
    "tar, packed, truncated": (
        lambda path: half(forms.tar(path, some_rows(), packed=True) / "shard-000.tar.gz").parent,
        "is not an intact .tar.gz",
    ),
    "tar, no label": (
        lambda path: tar_of(path, ("1.png", b"x")),
        "sample 1: has no class (.cls, .txt or .json); it has .png;",
    ),
    "tar, no image at all": (
        lambda path: forms.write_tar(path.with_suffix(".tar"), [("0.cls", b"a"), ("1.cls", b"b")]),
        "set.tar: has no samples with images; members such as 0001.jpg and 0001.cls are needed",
    ),
    "tar, no image": (
        lambda path: tar_of(path, ("1.cls", b"x"), ("2.png", some_rows(2)[1].data), ("2.cls", b"b")),
        "set.tar/1: is a sample without an image; it has .cls; --skip-unreadable leaves such rows out",
    ),
    "tar, a pickle": (
        lambda path: tar_of(path, ("1.pyd", b"x")),
        "member 1.pyd is a pickle by its name, and reading",
    ),
    "tar, a name that leads out": (
        lambda path: tar_of(path, ("../../evil.png", b"x")),
        "names '../../evil.png', which leads out of the data",
    ),
    "tar, an absolute name": (lambda path: tar_of(path, ("/etc/x.png", b"x")), "names '/etc/x.png', which leads out"),
    "tar, a label of a wrong type": (
        lambda path: tar_of(path, ("1.png", b"x"), ("1.json", b'{"label": [1]}')),
        "sample 1: 'label' is list; a class is a text or a whole number",
    ),
    "tar, a sample twice": (
        lambda path: tar_of(path, ("1.png", b"x"), ("1.cls", b"b"), ("0.png", b"x"), ("0.cls", b"a")),
        "has the sample 0 in two places;",
    ),
    "tar, two members of a name": (
        lambda path: tar_of(path, ("0.png", b"x")),
        "has two members 0.png; names must differ",
    ),
    "metadata, no such column": (
        lambda path: listed(path, "file_name,caption\nimages/00000.png,x\n"),
        "has no column with the classes that is called label; its columns are 'file_name', 'caption'; --label-column=NAME",
    ),
    "metadata, no file_name": (
        lambda path: listed(path, "id,label\n1,x\n"),
        "has no column with the names of the files that is called file_name; its columns are 'id', 'label'",
    ),
    "metadata, a short line": (
        lambda path: listed(path, "file_name,label\nimages/00000.png\n"),
        "line 2 has 1 fields, and the first line has 2",
    ),
    "metadata, a path that leads out": (
        lambda path: listed(path, "file_name,label\n../x.png,a\nimages/00001.png,b\n"),
        "../x.png: leads out of the data",
    ),
    "metadata, a file that is not there": (
        lambda path: listed(path, "file_name,label\nimages/9.png,a\nimages/00001.png,b\n"),
        "images/9.png: cannot be read (No such file or directory)",
    ),
    "metadata, a label of a wrong type": (
        lambda path: listed(path, '{"file_name": "images/00000.png", "label": 0.5}\n', "metadata.jsonl"),
        "'label' of row 1 is float; a class is a text or a whole number",
    ),
    "metadata, no JSON": (lambda path: listed(path, '{"file_name": 1\n', "metadata.jsonl"), "line 1 is not JSON"),
    "metadata, no text": (
        lambda path: (listed(path, "") / "metadata.csv").write_bytes(b"file_name,label\n\xff,a\n") and path,
        "metadata.csv: is no text in UTF-8",
    ),
    "coco, a box outside": (
        lambda path: edit(path, lambda content: content["annotations"][1].update(bbox=[10, 0, 8, 9])),
        "its box from (10, 0) to (18, 9) is not inside the image of 16x9 pixels",
    ),
    "coco, a box of no size": (
        lambda path: edit(path, lambda content: content["annotations"][1].update(bbox=[10, 0, 0, 9])),
        "images/00000.png#101: has the bbox [10, 0, 0, 9]; it must be [left, top, width, height]",
    ),
    "coco, two boxes of an id": (
        lambda path: edit(path, lambda content: content["annotations"][1].update(id=100)),
        "has two annotations with the id 100",
    ),
    "coco, an id that is text": (
        lambda path: edit(path, lambda content: content["annotations"][1].update(id="100")),
        "entry 1 of annotations has no 'id' of the right type",
    ),
    "coco, an image that is not there, of a path to the annotations": (
        lambda path: (
            (edit(path, lambda content: None) / "images" / "00000.png").unlink(),
            (path / "annotations").mkdir(),
            (path / "annotations.json").rename(path / "annotations" / "instances.json"),
        )[-1],
        "; ../images/00000.png#101 names '00000.png'",
    ),
    "coco, a box of words": (
        lambda path: edit(path, lambda content: content["annotations"][0].update(bbox=["a"] * 4)),
        "images/00000.png#100: has a bbox that is not four numbers of pixels, at most 1,000,000",
    ),
    "coco, a box of a huge number": (
        lambda path: edit(path, lambda content: content["annotations"][1].update(bbox=[0, 0, 10**400, 9])),
        "images/00000.png#101: has a bbox that is not four numbers of pixels, at most 1,000,000",
    ),
    "coco, an unknown category": (
        lambda path: edit(path, lambda content: content["annotations"][0].update(category_id=99)),
        "entry 0 of annotations is of the category 99, which is not listed",
    ),
    "coco, a category without a name": (
        lambda path: edit(path, lambda content: content["categories"][0].pop("name")),
        "entry 0 of categories has no 'name' of the right type; it has 'id'",
    ),
    "coco, a path that leads out": (
        lambda path: edit(path, lambda content: content["images"][0].update(file_name="../../x.png")),
        "names '../../x.png', which leads out of the data",
    ),
    "coco, other JSON": (
        lambda path: (
            (path.parent.mkdir(exist_ok=True), path.with_suffix(".json").write_text('{"a": 1}'))
            and path.with_suffix(".json")
        ),
        "has 'a'; COCO's lists images, annotations and categories are needed",
    ),
    "coco, truncated": (
        lambda path: half(forms.coco(path, some_rows(6)) / "annotations.json"),
        "annotations.json: is not JSON",
    ),
    "coco, boxes of several sizes": (
        lambda path: edit(path, lambda content: content["annotations"][0].update(bbox=[0, 0, 4, 9])),
        "images have 2 sizes (8x9: 5, 4x9: 1); one size is needed: --image-size=N scales all images to N x N",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line(tmp_path, name):
    make, message = BAD[name]
    path = make(tmp_path / "set")
    with pytest.raises(InputError) as error:
        load_suspect(str(path))
    assert message in str(error.value) and "\n" not in str(error.value)
    assert str(tmp_path) in str(error.value)


def test_links_that_lead_out_are_not_followed(tmp_path):
    path = listed(tmp_path / "set", "file_name,label\nimages/link.png,a\nimages/00001.png,b\n")
    (tmp_path / "secret.png").write_bytes(some_rows(2)[0].data)
    (path / "images" / "link.png").symlink_to(tmp_path / "secret.png")
    with pytest.raises(InputError, match="images/link.png: is a link that leads out of the data"):
        load_suspect(str(path))


@pytest.mark.parametrize("name", ["coco", "metadata.csv"])
def test_a_folder_that_is_a_link_out_of_the_data_is_not_followed(tmp_path, name):
    path = WRITERS[name](tmp_path / "set", some_rows(6))
    shutil.move(path / "images", tmp_path / "elsewhere")
    (path / "images").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="is a link that leads out of the data"):
        load_suspect(str(path))
    (path / "images").unlink()
    shutil.move(tmp_path / "elsewhere", path / "photos")
    (path / "images").symlink_to("photos")
    assert len(load_suspect(str(path))) == 6


def test_a_part_with_a_list_that_is_a_link_out_of_the_data_is_not_followed(tmp_path):
    forms.metadata_csv(tmp_path / "elsewhere", some_rows(6))
    forms.metadata_csv(tmp_path / "set" / "test", some_rows(6))
    (tmp_path / "set" / "train").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="train/images/00000.png is a link that leads out of the data"):
        load(str(tmp_path / "set"))


@pytest.mark.parametrize("name", ["parquet folder", "tar"])
def test_shards_below_a_link_out_of_the_data_are_refused(tmp_path, name):
    shards = WRITERS[name](tmp_path / "set", some_rows(6))
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "more").symlink_to(shards)
    with pytest.raises(InputError, match="/links/more/.*: is below a link that leads out of the data"):
        load_suspect(str(tmp_path / "links"))


def test_odd_boxes_are_rows_that_can_be_left_out(tmp_path):
    odd = [[10, 0, 0, 9], [-3, 0, 8, 9], ["a"] * 4, [3.1, 0, 0.3, 9], [0, 0, 99, 9]]

    def change(content):
        for annotation, box in zip(content["annotations"], odd, strict=False):
            annotation["bbox"] = box

    path = edit(tmp_path / "set", change)
    annotations = json.loads((path / "annotations.json").read_text())
    annotations["annotations"] += [annotations["annotations"][5] | {"id": 200, "category_id": 10}]
    (path / "annotations.json").write_text(json.dumps(annotations))
    options = ReadOptions(skip_unreadable=True, allow_empty_classes=True)
    found = load_suspect(str(path), options=options)
    assert found.files == ("images/00004.png#105", "images/00004.png#200")
    assert [entry.reason[:16] for entry in found.unread] == [
        "has the bbox [10",
        "has the bbox [-3",
        "has a bbox that ",
        "has a box of les",
        "its box from (0,",
    ]


def test_the_folder_of_cocos_images_is_the_one_that_has_them(tmp_path):
    path = forms.coco(tmp_path / "set", some_rows(6))
    (path / "annotations").mkdir()
    (path / "annotations" / "notes.txt").write_text("none")
    assert load_suspect(str(path)).files[0] == "images/00000.png#100"
    shutil.move(path / "images", path / "annotations" / "images")
    edited = json.loads((path / "annotations.json").read_text())
    for image in edited["images"]:
        image["file_name"] = f"annotations/images/{image['file_name']}"
    (path / "annotations.json").write_text(json.dumps(edited))
    assert load_suspect(str(path)).files[0] == "annotations/images/00000.png#100"


def test_an_image_is_decoded_once_in_whatever_order_cocos_annotations_are(tmp_path, monkeypatch):
    wanted = load_suspect(str(forms.coco(tmp_path / "sorted", some_rows(16))))
    interleaved = edit(
        tmp_path / "set", lambda content: content["annotations"].sort(key=lambda entry: entry["id"] % 2), 16
    )
    decoded, read = [], []
    decode, read_below = records.decode, coco.read_below
    monkeypatch.setattr(records, "decode", lambda *args, **options: decoded.append(1) or decode(*args, **options))
    monkeypatch.setattr(coco, "read_below", lambda *args: read.append(1) or read_below(*args))
    found = load_suspect(str(interleaved))
    assert len(decoded) == len(read) == 8 and found.files == wanted.files
    np.testing.assert_array_equal(found.images, wanted.images)
    np.testing.assert_array_equal(found.labels, wanted.labels)


def test_without_pyarrow_one_line_says_how_to_get_it(written, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow.parquet", None)
    with pytest.raises(InputError, match=r"need pyarrow, which is not installed: pip install 'bdjax\[hf\]'"):
        load_suspect(str(written["parquet"]))


def test_classes_without_rows_are_refused_unless_accepted(tmp_path):
    rows = some_rows(6)
    pq.write_table(forms.table(rows, ["ant", "bee", "cat", "dog"]), tmp_path / "set.parquet")
    with pytest.raises(InputError, match=r"1 of 4 classes have no rows \('dog'\); --allow-empty-classes accepts them"):
        load_suspect(str(tmp_path / "set.parquet"))
    found = load_suspect(str(tmp_path / "set.parquet"), options=ReadOptions(allow_empty_classes=True))
    assert found.num_classes == 4 and found.labels.max() == 2


def test_text_in_a_column_of_the_type_classlabel_is_a_class(tmp_path):
    made = forms.table(some_rows(6), ["ant", "bee", "cat"])
    names = pa.array(["ant", "ant", "bee", "bee", "cat", "cat"])
    pq.write_table(made.set_column(1, "label", names), tmp_path / "set.parquet")
    assert pq.read_schema(tmp_path / "set.parquet").metadata[b"huggingface"]
    found = load_suspect(str(tmp_path / "set.parquet"))
    assert found.class_names == ("ant", "bee", "cat") and found.labels.tolist() == [0, 0, 1, 1, 2, 2]


# ---- Small files that would be large in memory ----------------------------------------------------------------------


def largest_batch(monkeypatch, path: pathlib.Path) -> int:
    """The most bytes of a batch while a table is read."""
    sizes = []
    plain = columns._parquet

    def measured(path, name):
        table = plain(path, name)

        def batches(columns):
            for batch in table.batches(columns):
                sizes.append(batch.get_total_buffer_size())
                yield batch

        return table._replace(batches=batches)

    monkeypatch.setattr(columns, "_parquet", measured)
    load_suspect(str(path), options=ReadOptions(skip_unreadable=True))
    return max(sizes)


def test_a_value_that_a_parquet_file_repeats_is_not_repeated_in_memory(tmp_path, monkeypatch):
    repeated = some_rows(1)[0].data + bytes(400_000)
    made = pa.table({"image": [repeated] * 60, "label": ["ant", "bee"] * 30})
    pq.write_table(made, tmp_path / "set.parquet", compression="zstd")
    assert (tmp_path / "set.parquet").stat().st_size < 10_000
    monkeypatch.setattr(columns, "_BATCH_BYTES", 1 << 21)
    assert largest_batch(monkeypatch, tmp_path / "set.parquet") < 1 << 22


def test_a_class_of_a_dictionary_is_refused_before_it_is_repeated():
    words = pa.DictionaryArray.from_arrays(pa.array([0] * 300, pa.int8()), ["ant " * 1000])
    with pytest.raises(InputError, match="it: has a class of 4,000 letters"):
        columns._check_letters("it", words)


@pytest.mark.parametrize("name", ["parquet", "arrow"])
def test_more_rows_than_memory_has_room_for_are_refused_first(written, monkeypatch, name):
    monkeypatch.setattr(columns, "free_memory", lambda: 20 * columns._ROW_BYTES)
    monkeypatch.setattr(columns, "_images", lambda *_: pytest.fail("images are read"))
    with pytest.raises(InputError, match=r"has 2\d rows or more, whose names and classes take .* use fewer rows"):
        load_suspect(str(written[name]))

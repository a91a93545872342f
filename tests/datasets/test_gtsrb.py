import io
import pathlib
import re
import zipfile

import numpy as np
import pytest
from PIL import Image

from bdjax.datasets import load
from bdjax.datasets.gtsrb import load_gtsrb
from bdjax.datasets.validation import ReadOptions
from bdjax.errors import InputError

HEADER = "Filename;Width;Height;Roi.X1;Roi.Y1;Roi.X2;Roi.Y2;ClassId\n"


def ppm(level: int, size: tuple[int, int] = (32, 32)) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", size, (level, level + 1, level + 2)).save(stream, "PPM")
    return stream.getvalue()


def published_files(training_folder: str = "GTSRB/Training") -> dict[str, bytes]:
    """Four training rows of the classes 0, 1 and 42, two of them of other sizes, and two test rows."""
    return {
        f"{training_folder}/00000/00000.ppm": ppm(10),
        f"{training_folder}/00000/00001_00002.ppm": ppm(20, (60, 47)),
        f"{training_folder}/00000/GT-00000.csv": b"",
        f"{training_folder}/00001/00000.ppm": ppm(30),
        f"{training_folder}/00042/00000.ppm": ppm(40, (15, 17)),
        f"{training_folder}/Readme.txt": b"",
        "GTSRB/Final_Test/Images/00000.ppm": ppm(50),
        "GTSRB/Final_Test/Images/00001.ppm": ppm(60, (40, 41)),
        "GT-final_test.csv": f"{HEADER}00000.ppm;32;32;0;0;32;32;16\n00001.ppm;40;41;5;5;35;36;1\n".encode(),
    }


def write_files(folder: pathlib.Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def write_archives(folder: pathlib.Path, files: dict[str, bytes]) -> None:
    for archive_name, start in {
        "GTSRB-Training_fixed.zip": "GTSRB/Training",
        "GTSRB_Final_Test_Images.zip": "GTSRB/Final_Test",
        "GTSRB_Final_Test_GT.zip": "GT-",
    }.items():
        with zipfile.ZipFile(folder / archive_name, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in files.items():
                if name.startswith(start):
                    archive.writestr(name, content)


def check(train, test):
    assert train.images.shape == (4, 32, 32, 3) and train.images.dtype == np.uint8
    assert train.images[:, 3, 30].tolist() == [[10, 11, 12], [20, 21, 22], [30, 31, 32], [40, 41, 42]]
    assert train.labels.tolist() == [0, 0, 1, 42] and train.labels.dtype == np.int32
    assert ["/".join(file.split("/")[-2:]) for file in train.files] == [
        "00000/00000.ppm",
        "00000/00001_00002.ppm",
        "00001/00000.ppm",
        "00042/00000.ppm",
    ]
    assert test.files == ("GTSRB/Final_Test/Images/00000.ppm", "GTSRB/Final_Test/Images/00001.ppm")
    assert test.images[:, 3, 30].tolist() == [[50, 51, 52], [60, 61, 62]] and test.labels.tolist() == [16, 1]
    assert train.num_classes == 43 and train.class_names[14] == "stop" and len(set(train.class_names)) == 43


@pytest.mark.parametrize("subfolder", ["gtsrb", "."])
def test_the_unpacked_folder_is_read(folder, subfolder):
    write_files(folder / subfolder, published_files())
    train, test = load_gtsrb([folder], False)
    check(train, test)
    assert all((folder / subfolder / file).is_file() for file in train.files + test.files)
    assert train.source == f"{folder / subfolder} (4 of 26,640 rows, 3 sizes scaled to 32x32)"
    assert test.source == f"{folder / subfolder} (2 of 12,630 rows, 2 sizes scaled to 32x32)"


def test_the_originals_are_scaled_to_the_size_that_is_asked_for(folder):
    write_files(folder / "gtsrb", published_files())
    train, test = load("gtsrb", folder, download=False, options=ReadOptions(image_size=48))
    assert train.images.shape == (4, 48, 48, 3) and test.images.shape == (2, 48, 48, 3)
    assert test.images[:, 4, 45].tolist() == [[50, 51, 52], [60, 61, 62]]
    assert train.original_sizes == load_gtsrb([folder], False).train.original_sizes
    assert "3 sizes scaled to 48x48" in train.source


def test_the_training_set_of_the_final_is_read(folder):
    write_files(folder / "gtsrb", published_files("GTSRB/Final_Training/Images"))
    train, test = load_gtsrb([folder], False)
    check(train, test)
    assert train.source == f"{folder / 'gtsrb'} (4 of 39,209 rows, 3 sizes scaled to 32x32)"


def test_the_archives_are_read_without_unpacking(folder):
    write_archives(folder, published_files())
    train, test = load_gtsrb([folder], False)
    check(train, test)
    assert train.source == f"{folder / 'GTSRB-Training_fixed.zip'} (4 of 26,640 rows, 3 sizes scaled to 32x32)"
    assert len(list(folder.iterdir())) == 3


def test_what_is_fetched_is_read(cache, monkeypatch):
    def fetch(files, subfolder):
        (cache / subfolder).mkdir(parents=True)
        write_archives(cache / subfolder, published_files())
        return {file.file_name: cache / subfolder / file.file_name for file in files}

    monkeypatch.setattr("bdjax.datasets.gtsrb.fetch", fetch)
    check(*load_gtsrb([cache], True))
    check(*load_gtsrb([cache], False))  # found there the next time


@pytest.mark.usefixtures("no_network")
def test_without_files_and_network_one_line_tells_all(folder, cache):
    with pytest.raises(InputError) as caught:
        load_gtsrb([folder, cache], True)
    url = "https://sid.erda.dk/public/archives/daaeac0d7ce1152aea9b61d9f1e19370/"
    names = "GTSRB-Training_fixed.zip, GTSRB_Final_Test_Images.zip, GTSRB_Final_Test_GT.zip"
    assert str(caught.value) == (
        f"gtsrb: found no folder gtsrb/GTSRB or archives {names} in {folder}, {cache}; the download failed "
        f"({url}GTSRB-Training_fixed.zip: ConnectionError): put {names} from {url} into {folder}/gtsrb"
    )


@pytest.mark.parametrize("write", [write_files, write_archives])
def test_residue_is_no_data_and_other_files_are_said(folder, write):
    residue = ["00000/._00000.ppm", "00000/.DS_Store", "__MACOSX/00000.ppm", "00001/Thumbs.db", "00001/desktop.ini"]
    training = ["00000/more.PPM", "00000/more.png", "00001/deep/00000.ppm", "stray.png"]
    files = {f"GTSRB/Training/{name}": ppm(1) for name in residue + training}
    files |= {f"GTSRB/Final_Test/Images/{name}": ppm(1) for name in ("._00000.ppm", "00002.ppm", "Readme.txt")}
    write(folder, published_files() | files)
    train, test = load_gtsrb([folder], False)
    check(train, test)
    assert {entry.file: entry.reason for entry in train.unread} == {
        "GTSRB/Training/00000/more.PPM": "has a suffix that is not read; .ppm is",
        "GTSRB/Training/00000/more.png": "has a suffix that is not read; .ppm is",
        "GTSRB/Training/00001/deep/00000.ppm": "is in a folder below a class",
        "GTSRB/Training/stray.png": "is not in the folder of a class",
    }
    assert test.unread == (("GTSRB/Final_Test/Images/00002.ppm", "has no row in GT-final_test.csv"),)


def test_another_training_set_beside_the_one_that_is_read_is_said(folder):
    write_files(folder, published_files() | published_files("GTSRB/Final_Training/Images"))
    train, test = load_gtsrb([folder], False)
    check(train, test)
    assert train.unread == (("GTSRB/Final_Training", "holds 4 file(s) and is not read"),) and test.unread == ()


def table(*lines: str) -> bytes:
    return (HEADER + "\n".join(lines)).encode()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"GTSRB/Training/00000/00000.ppm": ppm(0)[:500]}, "{}/GTSRB/Training/00000/00000.ppm: is damaged ("),
        (
            {"GTSRB/Training/00000/00000.ppm": b"text"},
            "{}/GTSRB/Training/00000/00000.ppm: is not an image in a format that is read; ",
        ),
        (
            {"GTSRB/Training/00000/00000.ppm": bytes(5 << 20)},
            "{}/GTSRB/Training/00000/00000.ppm: has 5242880 bytes; files of GTSRB have",
        ),
        (
            {"GTSRB/Training/00043/00000.ppm": ppm(0)},
            "{}/GTSRB/Training/00043: is not in the folder of a class, 00000 to 00042",
        ),
        ({"GTSRB/Training/stop/00000.ppm": ppm(0)}, "{}/GTSRB/Training/stop: is not in the folder of a class, "),
        (
            {"GT-final_test.csv": table("00000.ppm;1;1;1;1;1;1;5", "00001.ppm;1;1;1;1;1;1;43")},
            "{}/GT-final_test.csv: row 1 has label 43; labels must be in 0..42",
        ),
        (
            {"GT-final_test.csv": table("00000.ppm;1;1;1;1;1;1;-1")},
            "{}/GT-final_test.csv: row 0 has label -1; labels must be in 0..42",
        ),
        (
            {"GT-final_test.csv": table("00009.ppm;1;1;1;1;1;1;5")},
            "{}/GTSRB/Final_Test/Images/00009.ppm: is missing, although GT-final_test.csv has a row for it",
        ),
        (
            {"GT-final_test.csv": table("../../x.ppm;1;1;1;1;1;1;5")},
            "{}/GT-final_test.csv: line 2 has Filename '../../x.ppm' and ClassId '5'; a .ppm file and a number",
        ),
        (
            {"GT-final_test.csv": table("00000.ppm;1;1")},
            "{}/GT-final_test.csv: line 2 has Filename '00000.ppm' and ClassId ''; a .ppm file and a number",
        ),
        ({"GT-final_test.csv": table("00000.ppm,1,1,1,1,1,1,5")}, "{}/GT-final_test.csv: line 2 has Filename "),
        (
            {"GT-final_test.csv": table(*["00000.ppm;1;1;1;1;1;1;5"] * 2)},
            "{}/GT-final_test.csv: line 3 has 00000.ppm again; each file has one row",
        ),
        (
            {"GT-final_test.csv": table("n" * 1_000_000)},
            "{}/GT-final_test.csv: is not a table (field larger than field limit (131072)); columns separated by ; are needed",
        ),
        ({"GT-final_test.csv": b"\xff\xfe"}, "{}/GT-final_test.csv: is not plain text ("),
        ({"GT-final_test.csv": HEADER.encode()}, "{}/GT-final_test.csv: contains no images; .ppm files are needed"),
    ],
)
def test_what_is_wrong_in_a_folder_is_named(folder, changes, message):
    write_files(folder, published_files() | changes)
    with pytest.raises(InputError, match="^" + re.escape(message.format(folder))):
        load_gtsrb([folder], False)


def test_missing_parts_of_a_folder_are_named(folder):
    files = published_files()
    del files["GT-final_test.csv"]
    write_files(folder, files)
    with pytest.raises(
        InputError, match=f"^{re.escape(str(folder))}/GT-final_test.csv: is missing; it contains the labels of"
    ):
        load_gtsrb([folder], False)
    (folder / "two" / "GTSRB").mkdir(parents=True)
    with pytest.raises(
        InputError, match=r"/two: has no training images; GTSRB/Training or GTSRB/Final_Training/Images is "
    ):
        load_gtsrb([folder / "two"], False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"GTSRB/Training/00000/00000.ppm": bytes(5 << 20)},
            "{}/GTSRB-Training_fixed.zip, member GTSRB/Training/00000/00000.ppm: unpacks to 5242880 bytes; files of",
        ),
        (
            {"GTSRB/Training/00000/00000.ppm": ppm(0)[:500]},
            "{}/GTSRB-Training_fixed.zip, member GTSRB/Training/00000/00000.ppm: is damaged (",
        ),
        (
            {"GTSRB/Training/00099/00000.ppm": ppm(0)},
            "{}/GTSRB-Training_fixed.zip, member GTSRB/Training/00099: is not in the folder of a class, ",
        ),
        (
            {"GT-final_test.csv": table("00009.ppm;1;1;1;1;1;1;5")},
            "{}/GTSRB_Final_Test_Images.zip: does not contain GTSRB/Final_Test/Images/00009.ppm, although ",
        ),
        (
            {"GT-final_test.csv": table("00000.ppm;1;1;1;1;1;1;99")},
            "{}/GTSRB_Final_Test_GT.zip, member GT-final_test.csv: row 0 has label 99; labels must be in 0..42",
        ),
    ],
)
def test_what_is_wrong_in_an_archive_is_named(folder, changes, message):
    write_archives(folder, published_files() | changes)
    with pytest.raises(InputError, match="^" + re.escape(message.format(folder))):
        load_gtsrb([folder], False)


@pytest.mark.parametrize("name", ["GTSRB-Training_fixed.zip", "GTSRB_Final_Test_GT.zip", "GTSRB_Final_Test_Images.zip"])
def test_a_truncated_archive_is_named(folder, name):
    write_archives(folder, published_files())
    path = folder / name
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(InputError, match=rf"^{re.escape(str(path))}: is not an intact .zip \(.+\); download it again$"):
        load_gtsrb([folder], False)


def test_an_archive_without_the_table_is_named(folder):
    files = published_files()
    del files["GT-final_test.csv"]
    write_archives(folder, files | {"GT-other.csv": b""})
    with pytest.raises(InputError, match="GTSRB_Final_Test_GT.zip: does not contain GT-final_test.csv$"):
        load_gtsrb([folder], False)


@pytest.mark.slow
def test_the_real_gtsrb(data_dir):
    if not (data_dir / "gtsrb").exists():
        pytest.skip("GTSRB is not in BDJAX_DATA_DIR")
    train, test = load_gtsrb([data_dir], False)
    assert train.images.shape == (len(train), 32, 32, 3) and test.images.shape == (len(test), 32, 32, 3)
    assert 20_000 < len(train) <= 39_209 and 3_000 < len(test) <= 12_630
    assert np.unique(train.labels).tolist() == np.unique(test.labels).tolist() == list(range(43))
    # The published files have many sizes; a copy whose files are all of 32x32 is not scaled.
    assert f"{len(train):,} " in train.source
    if train.original_sizes:
        assert train.source.endswith(" sizes scaled to 32x32)") and len(train.original_sizes) > 100
        assert sum(train.original_sizes.values()) == len(train)
    else:
        assert train.source.endswith(" rows)")

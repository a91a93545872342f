import pathlib
import re

import numpy as np
import pytest
from PIL import Image

from bdjax.datasets import image_folder, stacking
from bdjax.datasets.decoding import SUFFIXES
from bdjax.datasets.image_folder import load_image_folder, load_suspect_image_folder
from bdjax.datasets.validation import ReadOptions
from bdjax.errors import InputError
from bdjax.types import Unread
from tests.fixtures import folders, images
from tests.fixtures.folders import classes


def write_images(folder: pathlib.Path, levels, **options) -> None:
    classes(folder.parent, {folder.name: levels}, **options)


def test_a_folder_of_classes_is_split_the_same_way_every_time(folder):
    for start, name in ((0, "cat"), (100, "ant"), (200, "bee")):
        write_images(folder / name, range(start, start + 10))
    (folder / "cat" / "notes.txt").write_text("not read")
    (folder / "readme.txt").write_text("not read")
    (folder / ".hidden").mkdir()
    train, test = load_image_folder(folder)
    assert train.images.shape == (24, 5, 6, 3) and test.images.shape == (6, 5, 6, 3)
    assert train.class_names == ("ant", "bee", "cat") and train.num_classes == 3
    assert np.bincount(train.labels).tolist() == [8, 8, 8] and np.bincount(test.labels).tolist() == [2, 2, 2]
    for part in (train, test):
        np.testing.assert_array_equal(part.images[:, 0, 0, 0] // 100, np.array([1, 2, 0])[part.labels])
        assert part.files == tuple(
            f"{part.class_names[label]}/{level:03d}.png"
            for level, label in zip(part.images[:, 0, 0, 0], part.labels, strict=True)
        )
    levels = np.concatenate([train.images[:, 2, 2, 0], test.images[:, 2, 2, 0]])
    assert sorted(levels) == sorted([*range(10), *range(100, 110), *range(200, 210)])
    assert train.source == f"{folder} (30 images, 2 file(s) not read), train rows of a fixed 80/20 split"
    assert (
        train.unread
        == test.unread
        == (
            Unread("readme.txt", "has a suffix that is not read"),
            Unread("cat/notes.txt", "has a suffix that is not read"),
        )
    )
    assert train.name == folder.name
    np.testing.assert_array_equal(load_image_folder(folder).test.images, test.images)


@pytest.mark.parametrize("test_name", ["test", "val"])
def test_the_folders_own_split_is_kept(folder, test_name):
    write_images(folder / "train" / "a", [1, 2, 3])
    write_images(folder / "train" / "b", [4])
    write_images(folder / test_name / "b", [5, 6])
    train, test = load_image_folder(folder)
    assert train.labels.tolist() == [0, 0, 0, 1] and train.images[:, 0, 0, 0].tolist() == [1, 2, 3, 4]
    assert test.labels.tolist() == [1, 1] and test.images[:, 0, 0, 0].tolist() == [5, 6]
    assert test.class_names == ("a", "b")
    assert train.files == ("train/a/001.png", "train/a/002.png", "train/a/003.png", "train/b/004.png")
    assert test.files == (f"{test_name}/b/005.png", f"{test_name}/b/006.png")
    assert train.source == f"{folder}/train/ (4 images)" and test.source == f"{folder}/{test_name}/ (2 images)"


def test_grey_only_if_every_image_is(folder):
    write_images(folder / "train" / "a", [1], mode="L")
    write_images(folder / "train" / "b", [2], mode="L")
    write_images(folder / "test" / "a", [3], mode="L")
    assert load_image_folder(folder).train.images.shape == (2, 5, 6, 1)
    write_images(folder / "test" / "b", [4])
    train, test = load_image_folder(folder)
    assert train.images.shape == (2, 5, 6, 3) and train.images[0, 0, 0].tolist() == [1, 1, 1]
    assert test.images[1, 0, 0].tolist() == [4, 0, 0]


@pytest.mark.parametrize("size", [(64, 64), (96, 96), (224, 224), (48, 80)])
def test_images_of_one_size_keep_it(folder, size):
    folders.small(folder, size=size)
    suspect = load_suspect_image_folder(folder)
    assert suspect.images.shape == (6, *size[::-1], 3) and not suspect.original_sizes
    assert suspect.source == f"{folder} (6 images)"


def test_images_of_several_sizes_are_refused(folder, monkeypatch):
    write_images(folder / "train" / "a", range(3), size=(50, 40))
    write_images(folder / "train" / "b", range(10, 12), size=(100, 70))
    write_images(folder / "test" / "a", [30], size=(9, 8))
    decoded = []
    real = image_folder.decode
    monkeypatch.setattr(image_folder, "decode", lambda *args, **options: decoded.append(0) or real(*args, **options))
    for read in (load_image_folder, load_suspect_image_folder):
        decoded.clear()
        with pytest.raises(InputError) as caught:
            read(folder)
        assert str(caught.value) == (
            f"{folder}: images have 3 sizes (50x40: 3, 100x70: 2, 9x8: 1); one size is needed: --image-size=N scales all "
            "images to N x N pixels, for instance --image-size=32"
        )
        assert len(decoded) <= 4  # the others are only counted


def test_of_many_sizes_the_most_frequent_are_named(folder):
    for number in range(9):
        write_images(folder / "a", range(10 * number, 10 * number + 10 - number), size=(64, 80 + number))
    write_images(folder / "b", [200], size=(5, 5))
    with pytest.raises(InputError) as caught:
        load_suspect_image_folder(folder)
    assert "have 10 sizes (64x80: 10, 64x81: 9, 64x82: 8, 64x83: 7, 64x84: 6 and 5 more)" in str(caught.value)
    assert str(caught.value).endswith("for instance --image-size=64")


def test_images_are_scaled_if_asked_for(folder):
    write_images(folder / "train" / "a", [10], size=(50, 40))
    write_images(folder / "train" / "b", [20], size=(32, 32))
    write_images(folder / "test" / "a", [30], size=(9, 8))
    train, test = load_image_folder(folder, ReadOptions(image_size=32))
    assert train.images.shape == (2, 32, 32, 3) and test.images.shape == (1, 32, 32, 3)
    assert (train.images[..., 0] == np.array([10, 20])[:, None, None]).all()
    assert train.source == f"{folder}/train/ (2 images, 2 sizes scaled to 32x32)"
    assert train.original_sizes == {(40, 50): 1, (32, 32): 1}
    assert test.source == f"{folder}/test/ (1 images, 9x8 scaled to 32x32)" and test.original_sizes == {(8, 9): 1}


def test_images_that_have_the_size_already_are_not_scaled(folder):
    folders.small(folder, size=(16, 16))
    own, asked = load_suspect_image_folder(folder), load_suspect_image_folder(folder, ReadOptions(image_size=16))
    np.testing.assert_array_equal(own.images, asked.images)
    assert own.source == asked.source and not asked.original_sizes


@pytest.mark.parametrize("suffix", sorted({*SUFFIXES, ".PNG", ".Tif"} - {".pbm"}))
def test_each_kind_of_file_is_read(folder, suffix):
    write_images(folder / "train" / "a", [100], suffix=suffix)
    write_images(folder / "train" / "b", [200], suffix=suffix)
    write_images(folder / "test" / "a", [100], suffix=suffix)
    train, _ = load_image_folder(folder)
    atol = 6 if suffix in (".jp2", ".j2k", ".jpf", ".jpx") else 3
    np.testing.assert_allclose(train.images[:, 2, 2, 0].astype(int), [100, 200], atol=atol)


def test_every_image_of_a_folder_without_parts_is_suspect(folder):
    write_images(folder / "b", [7])
    write_images(folder / "a", [3, 1, 2])
    suspect = load_suspect_image_folder(folder)
    assert suspect.images[:, 0, 0, 0].tolist() == [1, 2, 3, 7] and suspect.labels.tolist() == [0, 0, 0, 1]
    assert suspect.files == ("a/001.png", "a/002.png", "a/003.png", "b/007.png")
    assert suspect.source == f"{folder} (4 images)" and suspect.class_names == ("a", "b")


def test_of_a_folder_with_parts_the_training_part_is_suspect(folder):
    write_images(folder / "train" / "a", [1], mode="L")
    write_images(folder / "train" / "b", [2], mode="L")
    alone = load_suspect_image_folder(folder)
    assert alone.images.shape == (2, 5, 6, 1) and alone.source == f"{folder}/train/ (2 images)"
    # The form is common to both parts, so that a row is the same whichever function read it.
    write_images(folder / "test" / "a", [3])
    suspect, train = load_suspect_image_folder(folder), load_image_folder(folder).train
    assert suspect.images.shape == (2, 5, 6, 3)
    np.testing.assert_array_equal(suspect.images, train.images)
    assert suspect.files == train.files == ("train/a/001.png", "train/b/002.png")
    assert suspect.unread == (Unread("test/", "is the part for testing, of 1 files"),) and train.unread == ()
    assert suspect.source == f"{folder}/train/ (2 images, 1 file(s) not read)"


def test_suspect_images_that_cannot_be_used_are_refused(folder):
    write_images(folder / "a", [1])
    with pytest.raises(InputError, match=re.escape(f"{folder}: has 1 sub-folder(s) of images; at least 2 are needed")):
        load_suspect_image_folder(folder)
    write_images(folder / "b", [2])
    (folder / "b" / "002.png").write_bytes(b"")
    with pytest.raises(
        InputError,
        match="^"
        + re.escape(f"{folder / 'b' / '002.png'}: is empty; an intact image file is needed; --skip-unreadable "),
    ):
        load_suspect_image_folder(folder)


def test_a_class_may_be_called_train(folder):
    for name in ("bus", "train"):
        write_images(folder / name, range(1, 6))
    assert load_image_folder(folder).train.class_names == ("bus", "train")
    suspect = load_suspect_image_folder(folder)
    assert suspect.labels.tolist() == [0] * 5 + [1] * 5
    assert suspect.source.startswith(f"{folder} (10 images") and suspect.source.endswith(", train/ is read as a class)")


def refused(folder: pathlib.Path, message: str) -> None:
    with pytest.raises(InputError, match="^" + re.escape(message)):
        load_image_folder(folder)


def test_what_is_no_folder_of_classes_is_refused(folder):
    refused(folder, f"{folder}: has 0 sub-folder(s) of images; at least 2 are needed, one for each class")
    write_images(folder / "a", [1, 2, 3])
    refused(folder, f"{folder}: has 1 sub-folder(s) of images; at least 2 are needed, one for each class")
    (folder / "b").mkdir()
    refused(folder, f"{folder / 'b'}: contains no images; each sub-folder is a class and needs .png, .jpg, ")
    write_images(folder / "b", [4])
    (folder / "a" / "003.png").unlink()
    refused(folder, f"{folder} (3 images): 20 % of each class, for testing, is less than one image; each class")


def test_what_is_no_split_is_refused(folder):
    write_images(folder / "train" / "a", [1])
    write_images(folder / "train" / "b", [2])
    refused(folder, f"{folder}: has train/ but neither test/ nor val/; one of them is needed for the test images")
    (folder / "test").mkdir()
    refused(folder, f"{folder / 'test'}: has no sub-folders; one is needed for each class")
    write_images(folder / "test" / "c", [3])
    refused(folder, f"{folder / 'test' / 'c'}: is not a class in {folder / 'train'}")


def test_a_damaged_image_is_named(folder):
    for name in ("a", "b"):
        write_images(folder / name, range(5), size=(50, 50))
    path = folder / "b" / "002.png"
    data = path.read_bytes()
    path.write_bytes(data[:60])
    refused(folder, f"{path}: is damaged (")
    path.write_bytes(b"")
    refused(folder, f"{path}: is empty; an intact image file is needed; --skip-unreadable leaves such files out")
    path.write_bytes(b"text")
    refused(folder, f"{path}: is not an image in a format that is read; PNG, JPEG, ")


# ---- What is there ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", folders.UNREAD)
def test_what_is_no_row_is_unread(name, folder):
    make, unread = folders.UNREAD[name]
    suspect = load_suspect_image_folder(make(folder))
    assert suspect.labels.tolist() == [0, 0, 0, 1, 1, 1] and suspect.images[:, 0, 0, 0].tolist() == [1, 2, 3, 4, 5, 6]
    assert dict(suspect.unread) == unread
    count = sum(int(found[1]) if (found := re.search(r"of (\d+) files", reason)) else 1 for reason in unread.values())
    assert suspect.source == f"{folder} (6 images{f', {count} file(s) not read' if count else ''})"
    assert {entry.file for part in load_image_folder(folder) for entry in part.unread} == set(unread)


@pytest.mark.parametrize("name", folders.REFUSED)
def test_a_folder_of_another_form_is_refused(name, folder):
    make, message = folders.REFUSED[name]
    make(folder)
    refused(folder, f"{folder}: " + message.format(path=folder))
    with pytest.raises(InputError, match="^" + re.escape(f"{folder}: " + message.format(path=folder))):
        load_suspect_image_folder(folder)


def test_folders_below_a_class_belong_to_it(folder):
    classes(
        folder,
        {"cat": (1,), "cat/2021": (2,), "cat/2021/may": (3,), "dog/x": (4,), "dog/train": (5,), "dog/Test": (6,)},
    )
    suspect = load_suspect_image_folder(folder)
    assert suspect.files == (
        *("cat/001.png", "cat/2021/002.png", "cat/2021/may/003.png"),
        *("dog/Test/006.png", "dog/train/005.png", "dog/x/004.png"),
    )
    assert suspect.labels.tolist() == [0, 0, 0, 1, 1, 1] and suspect.unread == ()
    assert suspect.source == (
        f"{folder} (6 images, 5 in folders below a class, 2 in a class's folder that is called train, test or val)"
    )


@pytest.mark.parametrize(
    ("train", "test"),
    [("train", "testing"), ("Training", "TEST"), ("TRAIN", "Valid"), ("training", "validation"), ("train", "eval")],
)
def test_splits_are_known_by_the_names_that_people_write(train, test, folder):
    classes(folder, {f"{train}/a": (1, 2), f"{train}/b": (3,), f"{test}/a": (4,)})
    parts = load_image_folder(folder)
    assert parts.train.files == (f"{train}/a/001.png", f"{train}/a/002.png", f"{train}/b/003.png")
    assert parts.test.files == (f"{test}/a/004.png",) and parts.test.source == f"{folder}/{test}/ (1 images)"
    suspect = load_suspect_image_folder(folder)
    assert suspect.files == parts.train.files and suspect.unread == (
        Unread(f"{test}/", "is the part for testing, of 1 files"),
    )


def test_a_third_split_and_further_folders_are_unread(folder):
    classes(folder, {"train/a": (1, 2), "train/b": (3,), "test/a": (4,), "val/a": (5, 6), "val/b": (7,), "more": (8,)})
    (folder / "more" / "notes.txt").write_text("x")
    unread = {"val/": "is a third split, of 3 files", "more/": "is neither the training nor the test part, of 2 files"}
    for part in load_image_folder(folder):
        assert dict(part.unread) == unread and part.source.endswith(", 5 file(s) not read)")
    suspect = load_suspect_image_folder(folder)
    assert dict(suspect.unread) == unread | {"test/": "is the part for testing, of 1 files"}
    assert suspect.source == f"{folder}/train/ (3 images, 6 file(s) not read)"


def test_a_test_part_without_labels_is_unread(folder):
    classes(folder, {"train/a": (1,), "train/b": (2,), "test": (5, 6)})
    unread = (Unread("test/", "is the part for testing, of 2 files"),)
    assert load_suspect_image_folder(folder).unread == unread
    refused(folder, f"{folder / 'test'}: has no sub-folders; one is needed for each class")
    classes(folder, {"val/a": (3,)})
    assert load_image_folder(folder).test.files == ("val/a/003.png",)
    assert load_image_folder(folder).test.unread == (Unread("test/", "is a third split, of 2 files"),)


def test_a_training_part_beside_other_folders_is_known_by_its_folders(folder):
    classes(folder, {"train/a": (1,), "train/b": (2,), "more": (3,)})
    assert load_suspect_image_folder(folder).files == ("train/a/001.png", "train/b/002.png")
    refused(folder, f"{folder}: has train/ but neither test/ nor val/; one of them is needed for the test images")


def test_two_classes_may_be_called_valid_and_invalid(folder):
    classes(folder, {"valid": (1, 2, 3), "invalid": (4, 5, 6)})
    suspect = load_suspect_image_folder(folder)
    assert suspect.class_names == ("invalid", "valid") and suspect.source.endswith(", valid/ is read as a class)")


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("10", "9", "1"), ("1", "9", "10")),
        (("010", "9", "-1"), ("-1", "9", "010")),
        (("10", "9", "a"), ("10", "9", "a")),
        (("1.5", "10", "9"), ("1.5", "10", "9")),
        (("1", "01", "2"), ("01", "1", "2")),
    ],
)
def test_numbers_are_in_the_order_of_numbers(names, expected, folder):
    for level, name in enumerate(names):
        write_images(folder / name, [level])
    suspect = load_suspect_image_folder(folder)
    assert suspect.class_names == expected
    assert [suspect.class_names[label] for label in suspect.labels] == [file.split("/")[0] for file in suspect.files]


@pytest.mark.parametrize("name", ["a\nb", "a\x1b[31m", "=1+1", "a\u202eb", "x" * 255, "caf\udce9", " ", "a;b,c", "CON"])
def test_odd_names_of_classes(name, folder):
    suspect = load_suspect_image_folder(classes(folder, {"zz": (1,), name: (2,)}))
    assert suspect.class_names == (name, "zz") and suspect.files == (f"{name}/002.png", "zz/001.png")


def test_classes_without_images(folder):
    classes(folder, {"a": (1, 2, 3), "b": (4, 5, 6), "c": (), "train": ()})
    (folder / "c" / "x.tga").write_bytes(b"x")
    refused(folder, f"{folder / 'c'}: contains no images; each sub-folder is a class and needs .png, .jpg, ")
    with pytest.raises(
        InputError, match=re.escape("; it has 1 other file(s): c/x.tga has a suffix that is not read; --allow")
    ):
        load_image_folder(folder)
    train, test = load_image_folder(folder, ReadOptions(allow_empty_classes=True))
    assert train.class_names == ("a", "b", "c", "train") and train.num_classes == 4
    assert np.bincount(train.labels, minlength=4).tolist() == [2, 2, 0, 0] and len(test) == 2


def test_links_and_copies_are_said(folder):
    classes(folder, {"a": (1, 2), "b": (3,), "c": (5,)})
    (folder / "a" / "link.png").symlink_to("001.png")
    (folder / "b" / "hard.png").hardlink_to(folder / "b" / "003.png")
    (folder / "b" / "copy.png").write_bytes((folder / "a" / "001.png").read_bytes())
    (folder / "d").symlink_to("c")
    suspect = load_suspect_image_folder(folder)
    assert len(suspect) == 8 and suspect.class_names == ("a", "b", "c", "d") and suspect.unread == ()
    assert suspect.source == (
        f"{folder} (8 images, 2 by symbolic links, 1 whose file another row has, too, 1 with the same bytes as another row, "
        "1 with the bytes of a row of another class)"
    )


# ---- Reading ---------------------------------------------------------------------------------------------------------


def test_what_files_say_about_their_pixels_is_counted(folder):
    classes(folder, {"a": (1,), "b": (2,)})
    for number, (_, make) in enumerate(images.RULED.values()):
        make(folder / "ab"[number % 2] / f"x{number}.png")
    source = load_suspect_image_folder(folder, ReadOptions(image_size=32)).source
    counts = {rule: sum(rule == other for other, _ in images.RULED.values()) for rule, _ in images.RULED.values()}
    assert (
        f", {counts['orientation']} turned as EXIF says, {counts['transparency']} with transparency, which is" in source
    )
    assert f", {counts['frames']} with several frames, of which the first is read" in source
    assert f", {counts['cmyk']} converted from CMYK" in source


def test_a_turned_image_has_its_turned_size(folder):
    for name in ("a", "b"):
        (folder / name).mkdir()
        (folder / name / "1.jpg").write_bytes(images.turned(6, "JPEG", size=(16, 8)))
        Image.new("L", (8, 16)).save(folder / name / "2.png")
    assert load_suspect_image_folder(folder).images.shape == (4, 16, 8, 1)


def test_the_form_is_the_same_in_whatever_order_images_come(folder):
    small, large = images.noise((20, 30), "L"), images.noise((50, 40))
    for name, order in (("a", (small, small, large)), ("b", (large, small, small))):
        (folder / name).mkdir()
        for number, image in enumerate(order):
            image.save(folder / name / f"{number}.png")
    suspect = load_suspect_image_folder(folder, ReadOptions(image_size=24))
    scaled = [np.asarray(image.resize((24, 24), Image.Resampling.BILINEAR).convert("RGB")) for image in (small, large)]
    np.testing.assert_array_equal(
        suspect.images, np.stack([scaled[0], scaled[0], scaled[1], scaled[1], scaled[0], scaled[0]])
    )
    assert suspect.original_sizes == {(30, 20): 4, (40, 50): 2}


def test_colour_that_comes_late_makes_all_images_colour(folder):
    classes(folder, {"a": (1, 2)}, mode="L")
    classes(folder, {"b": (3,)})
    assert load_suspect_image_folder(folder).images[:, 0, 0].tolist() == [[1, 1, 1], [2, 2, 2], [3, 0, 0]]


def test_unreadable_files_are_named_and_counted(folder):
    faults = list(images.FAULTS)[:14]
    folders.small(folder)
    for number, name in enumerate(faults):
        images.FAULTS[name](folder / "b" / f"x{number:02d}.png")
    with pytest.raises(InputError) as caught:
        load_image_folder(folder)
    message = str(caught.value)
    assert message.startswith(
        f"{folder}: 14 files cannot be read (--skip-unreadable leaves such files out): b/x00.png is empty; b/x01.png is not an "
    )
    assert message.endswith("; and 4 more") and message.count("b/x") == 10 and message.isprintable()


def test_unreadable_files_can_be_left_out(folder):
    folders.small(folder)
    for number, make in enumerate(images.FAULTS.values()):
        make(folder / "ab"[number % 2] / f"x{number:02d}.png")
    suspect = load_suspect_image_folder(folder, ReadOptions(skip_unreadable=True))
    assert suspect.images[:, 0, 0, 0].tolist() == [1, 2, 3, 4, 5, 6]
    assert suspect.source == f"{folder} (6 images, {len(images.FAULTS)} file(s) not read)"
    assert {entry.file for entry in suspect.unread} == {
        f"{'ab'[n % 2]}/x{n:02d}.png" for n in range(len(images.FAULTS))
    }
    for _, reason in suspect.unread:
        assert reason.startswith(("is ", "has ")) and ";" not in reason and len(reason) < 230


def test_a_class_of_which_nothing_can_be_read_is_refused(folder):
    classes(folder, {"a": (1, 2, 3), "b": ()})
    for number in range(3):
        (folder / "b" / f"{number}.png").write_bytes(b"text")
    options = ReadOptions(skip_unreadable=True)
    with pytest.raises(InputError, match="^" + re.escape(f"{folder / 'b'}: has 3 image(s), none of which can be read")):
        load_image_folder(folder, options)
    suspect = load_suspect_image_folder(folder, options._replace(allow_empty_classes=True))
    assert suspect.labels.tolist() == [0, 0, 0] and suspect.num_classes == 2 and len(suspect.unread) == 3


def test_images_that_do_not_fit_into_memory_are_refused(folder, monkeypatch):
    classes(folder, {"a": range(50), "b": range(50, 100)}, size=(100, 100))
    monkeypatch.setattr(stacking, "free_memory", lambda: 1_000_000)
    message = (
        f"{folder}: 100 images of 100x100 pixels and 3 channel(s) take 0.0 GiB, and 0.0 GiB of memory are free; use "
    )
    refused(folder, message)
    assert load_suspect_image_folder(folder, ReadOptions(image_size=32)).images.shape == (100, 32, 32, 3)


def test_each_file_is_read_once(folder, monkeypatch):
    folders.small(folder)
    read = []
    real = image_folder.read_file
    monkeypatch.setattr(image_folder, "read_file", lambda path, *rest: read.append(path) or real(path, *rest))
    load_image_folder(folder)
    assert len(read) == len(set(read)) == 6

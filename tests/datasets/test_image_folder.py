import pathlib
import re

import numpy as np
import pytest
from PIL import Image

from bdjax.datasets.image_folder import load_image_folder, load_suspect_image_folder
from bdjax.errors import InputError


def write_images(folder: pathlib.Path, levels, *, size=(6, 5), mode="RGB", suffix=".png") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for level in levels:
        color = level if mode == "L" else (level, 0, 0)
        Image.new(mode, size, color).save(folder / f"{level:03d}{suffix}")


def test_a_folder_of_classes_is_split_the_same_way_every_time(folder):
    for start, name in ((0, "cat"), (100, "ant"), (200, "bee")):
        write_images(folder / name, range(start, start + 10))
    (folder / "cat" / "notes.txt").write_text("passed over")
    (folder / "readme.txt").write_text("passed over")
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
    assert train.source == f"{folder} (30 images), train rows of a fixed 80/20 split"
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


def test_images_of_several_sizes_are_resized_and_source_says_so(folder):
    write_images(folder / "train" / "a", [10], size=(40, 50))
    write_images(folder / "train" / "b", [20], size=(8, 9))
    write_images(folder / "test" / "a", [30], size=(8, 9))
    train, test = load_image_folder(folder)
    assert train.images.shape == (2, 32, 32, 3) and test.images.shape == (1, 32, 32, 3)
    assert (train.images[..., 0] == np.array([10, 20])[:, None, None]).all()
    assert train.source == f"{folder}/train/ (2 images, 2 sizes resized to 32x32)"
    assert test.source == f"{folder}/test/ (1 images, 2 sizes resized to 32x32)"


@pytest.mark.parametrize("suffix", [".png", ".PNG", ".jpg", ".jpeg", ".ppm", ".bmp", ".webp"])
def test_each_kind_of_file_is_read(folder, suffix):
    write_images(folder / "train" / "a", [100], suffix=suffix)
    write_images(folder / "train" / "b", [200], suffix=suffix)
    write_images(folder / "test" / "a", [100], suffix=suffix)
    train, _ = load_image_folder(folder)
    np.testing.assert_allclose(train.images[:, 2, 2, 0].astype(int), [100, 200], atol=3)


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
    write_images(folder / "test" / "a", [3], size=(8, 8))
    suspect, train = load_suspect_image_folder(folder), load_image_folder(folder).train
    assert suspect.images.shape == (2, 32, 32, 3)
    np.testing.assert_array_equal(suspect.images, train.images)
    assert (suspect.source, suspect.files) == (train.source, train.files)
    assert suspect.files == ("train/a/001.png", "train/b/002.png")


def test_suspect_images_that_cannot_be_used_are_refused(folder):
    write_images(folder / "a", [1])
    with pytest.raises(InputError, match=re.escape(f"{folder}: has 1 sub-folder(s) of images; at least 2 are needed")):
        load_suspect_image_folder(folder)
    write_images(folder / "b", [2])
    (folder / "b" / "002.png").write_bytes(b"")
    with pytest.raises(InputError, match="^" + re.escape(f"{folder / 'b' / '002.png'}: cannot be read as an image; ")):
        load_suspect_image_folder(folder)


def test_a_class_may_be_called_train(folder):
    for name in ("bus", "train"):
        write_images(folder / name, range(1, 6))
    assert load_image_folder(folder).train.class_names == ("bus", "train")
    assert load_suspect_image_folder(folder).labels.tolist() == [0] * 5 + [1] * 5


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
    refused(folder, f"{path}: cannot be read as an image; a PNG, JPEG, PPM, BMP or WebP is needed")
    path.unlink()
    path.mkdir()
    refused(folder, f"{path}: cannot be read (")

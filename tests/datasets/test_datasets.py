import dataclasses
import pathlib
import re

import numpy as np
import pytest
from PIL import Image

from bdjax.datasets import DATASETS, FORMS, Source, Traits, load, load_suspect, traits
from bdjax.datasets.locate import DATA_DIR_VARIABLE
from bdjax.errors import InputError
from bdjax.testing import ContractError, check_dataset
from bdjax.types import Dataset, TrainTest

ALL_FORMS = "; ".join(form.about.replace("`", "") for form in FORMS.values())


def refused(message: str, *arguments, **keywords) -> None:
    for function in (load, load_suspect):
        with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
            function(*arguments, **keywords)


@pytest.mark.parametrize("name", DATASETS)
@pytest.mark.usefixtures("no_network", "cache")
def test_every_named_set_keeps_the_contract(name):
    """As far as it goes without files: the two that need none are loaded."""
    check_dataset(name, DATASETS[name])


def rows(**changes):
    part = Dataset(np.zeros((4, 8, 8, 1), np.uint8), np.array([0, 1, 0, 1], np.int32), 2, "mine", "a test")
    return dataclasses.replace(part, **changes)


def two_lines(folders, download):
    raise InputError("mine: found no files\nin these folders")


def drawn_anew(folders, download):
    images = np.random.default_rng().integers(0, 255, (4, 8, 8, 1), np.uint8)
    return TrainTest(rows(images=images), rows())


@pytest.mark.parametrize(
    ("loader", "promise"),
    [
        (lambda folders: None, "its loader has the parameters folders, download"),
        (two_lines, "what is missing is said in one line"),
        (drawn_anew, "they are the same each time"),
        (lambda folders, download: (rows(), rows()), "its loader returns a TrainTest"),
        (lambda folders, download: TrainTest(rows(name="other"), rows()), "training rows: they have its name"),
        (
            lambda folders, download: TrainTest(rows(), rows(images=np.zeros((4, 8, 9, 1), np.uint8))),
            "both parts have images of one shape, and the same classes",
        ),
        (
            lambda folders, download: TrainTest(rows(labels=np.zeros(4, np.int32)), rows()),
            "every class has training rows",
        ),
    ],
)
def test_a_broken_promise_is_named(loader, promise):
    with pytest.raises(ContractError, match=f"^broken: dataset mine.*{promise}"):
        check_dataset("mine", Source(loader))


def test_traits_stand_on_the_set():
    photographs, others = (
        ("cifar10", "cifar100", "tiny_imagenet", "flowers17"),
        ("digits", "mnist", "gtsrb", "textures"),
    )
    assert all(traits(name).flips for name in photographs) and not any(traits(name).flips for name in others)
    like = {name: traits(name).like for name in ("fashion_mnist", "cifar100", "gtsrb", "digits")}
    assert like == {"fashion_mnist": "mnist", "cifar100": "cifar10", "gtsrb": "cifar10", "digits": None}
    assert {traits(name).like for name in DATASETS} - {None} <= set(DATASETS)
    assert traits("mine.npz") == traits("tfds:cifar10") == Traits()


@pytest.mark.parametrize("name", [name for name in DATASETS if name not in ("digits", "textures")])
@pytest.mark.usefixtures("no_network")
def test_every_named_set_that_is_nowhere_is_one_line(name, folder, cache, monkeypatch):
    monkeypatch.setenv(DATA_DIR_VARIABLE, "/elsewhere")
    for download in (True, False):
        with pytest.raises(InputError) as caught:
            load(name, folder, download=download)
        message = str(caught.value)
        assert "\n" not in message and message.startswith(f"{name}: found no ")
        assert f" in {folder}, /elsewhere, {cache}; " in message
        assert ("the download failed (http" in message) == download
        assert ": put " in message and " from http" in message and f" into {folder}" in message


def test_textures_need_no_files():
    train, test = load("textures", download=False)
    assert train.image_shape == test.image_shape == (32, 32, 3)


def test_digits_need_no_files():
    train, test = load("digits", download=False)
    assert train.num_classes == 10 and len(train) + len(test) == 1797


def test_paths(folder):
    np.savez(folder / "mine.npz", images=np.zeros((10, 4, 4), np.uint8), labels=np.arange(10) % 2)
    assert load(str(folder / "mine.npz")).train.name == "mine"
    assert load_suspect(str(folder / "mine.npz")).labels.tolist() == [0, 1] * 5
    for name in ("a", "b"):
        (folder / "images" / name).mkdir(parents=True)
        for index in range(5):
            Image.new("RGB", (3, 3)).save(folder / "images" / name / f"{index}.png")
    assert load(str(folder / "images")).train.images.shape == (8, 3, 3, 3)
    assert load_suspect(str(folder / "images")).images.shape == (10, 3, 3, 3)


def test_of_a_named_set_the_training_part_is_suspect(folder):
    suspect, train = load_suspect("digits", folder), load("digits").train
    assert suspect.source == train.source and np.array_equal(suspect.images, train.images)
    with pytest.raises(InputError, match="^mnist: found no .*; downloads are switched off: "):
        load_suspect("mnist", folder, download=False)
    with pytest.raises(InputError, match="^tfds:nothing_like_it: found no prepared set in "):
        load_suspect("tfds:nothing_like_it", folder)


def test_a_name_goes_before_a_folder(folder, monkeypatch):
    (folder / "digits").mkdir()
    monkeypatch.chdir(folder)
    assert load("digits").train.source.startswith("scikit-learn")
    with pytest.raises(InputError, match="^digits: has 0 sub-folder"):
        load("./digits")


def test_prepared_sets_of_tfds_are_reached(folder):
    with pytest.raises(InputError, match="^tfds:nothing_like_it: found no prepared set in "):
        load("tfds:nothing_like_it", folder)


@pytest.mark.parametrize(
    ("name", "suggestion"),
    [
        ("cifr10", " (did you mean cifar10?)"),
        ("MNIST", " (did you mean mnist?)"),
        ("fashion-mnist", " (did you mean fashion_mnist?)"),
        ("zebra", ""),
        ("", ""),
    ],
)
def test_an_unknown_name_is_answered_with_what_there_is(name, suggestion):
    refused(
        f"{name!r}: no such dataset, folder or file{suggestion}; datasets are {', '.join(DATASETS)}, tfds:NAME, "
        f"or the path of data in one of these forms: {ALL_FORMS}",
        name,
    )


def test_a_path_that_does_not_exist(folder):
    for path in (folder / "nothing", pathlib.Path("nothing.npz")):
        refused(f"{path}: no such file or folder", str(path))


def test_a_file_of_another_kind(folder):
    path = folder / "set.zip"
    path.write_bytes(b"")
    refused(f"{path}: is in no form that is read, which are: {ALL_FORMS}", str(path))


def test_a_data_dir_that_does_not_exist_is_never_passed_over():
    refused("data_dir /not/there: no such folder", "digits", "/not/there")

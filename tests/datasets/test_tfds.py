import json
import pathlib
import re
import sys

import numpy as np
import pytest
import tensorflow_datasets

from bdjax.datasets.tfds import load_tfds
from bdjax.errors import InputError

BUILDERS = """
import numpy, PIL.Image, tensorflow_datasets as tfds

class TinySet(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")
    TEST_SPLIT = "test"
    SIZES = [(6, 5)]
    IMAGE = tfds.features.Image(shape=(None, None, 3))
    LABEL = tfds.features.ClassLabel(names=["ant", "bee", "cat"])

    def _info(self):
        features = tfds.features.FeaturesDict({"image": self.IMAGE, "label": self.LABEL})
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, download_manager):
        return {"train": self._generate_examples(6), self.TEST_SPLIT: self._generate_examples(4)}

    def _image(self, level):
        return PIL.Image.new("RGB", self.SIZES[level % len(self.SIZES)], (level, 0, 0))

    def _generate_examples(self, num_rows):
        for row in range(num_rows):
            yield row, {"image": self._image(row), "label": row % 3}

class TinyValidation(TinySet):
    TEST_SPLIT = "validation"

class TinySizes(TinySet):
    SIZES = [(6, 5), (10, 40)]

class TinyTrainOnly(TinySet):
    TEST_SPLIT = "extra"

class TinyGrey(TinySet):
    IMAGE = tfds.features.Image(shape=(None, None, 1))

    def _image(self, level):
        return PIL.Image.new("L", (6, 5), level)

class TinyTensor(TinySet):
    IMAGE = tfds.features.Tensor(shape=(5, 6, 3), dtype=numpy.uint8)

    def _image(self, level):
        return numpy.full((5, 6, 3), level, numpy.uint8)

class TinyNumber(TinySet):
    LABEL = tfds.features.Scalar(numpy.int64)

class TinyUnlabelled(TinySet):
    def _generate_examples(self, num_rows):
        for row in range(num_rows):
            yield row, {"image": self._image(row), "label": -1 if row == 2 else 0}
"""


@pytest.fixture(scope="session")
def builders(tmp_path_factory):
    """TFDS wants its builders in a module of a folder."""
    folder = tmp_path_factory.mktemp("builders")
    (folder / "tiny_builders.py").write_text(BUILDERS)
    sys.path.insert(0, str(folder))
    import tiny_builders

    yield tiny_builders
    sys.path.remove(str(folder))


@pytest.fixture
def prepare(builders, folder):
    def prepare_in_folder(builder_name: str, data_dir: pathlib.Path = folder, **arguments) -> pathlib.Path:
        builder = getattr(builders, builder_name)(data_dir=data_dir, file_format="array_record", **arguments)
        builder.download_and_prepare()
        return pathlib.Path(builder.data_path)

    return prepare_in_folder


def test_a_prepared_set_is_read(prepare, folder):
    path = prepare("TinySet")
    train, test = load_tfds("tiny_set", [folder])
    assert train.images.shape == (6, 5, 6, 3) and train.images.dtype == np.uint8
    # TFDS shuffles what it prepares, the same way every time.
    np.testing.assert_array_equal(train.images[:, 2, 2, 0] % 3, train.labels)
    assert sorted(train.images[:, 0, 0, 0].tolist()) == list(range(6)) and len(test) == 4
    assert train.labels.dtype == np.int32 and train.class_names == ("ant", "bee", "cat")
    assert train.name == "tiny_set" and train.source == f"{path} (6 rows of train)"
    assert test.source == f"{path} (4 rows of test)"
    assert "tensorflow" not in sys.modules


@pytest.mark.parametrize(
    ("builder", "name", "shape", "source"),
    [
        ("TinyValidation", "tiny_validation", (4, 5, 6, 3), "4 rows of validation"),
        ("TinySizes", "tiny_sizes", (4, 32, 32, 3), "4 rows of test, 2 sizes resized to 32x32"),
        ("TinyGrey", "tiny_grey", (4, 5, 6, 1), "4 rows of test"),
        ("TinyTensor", "tiny_tensor", (4, 5, 6, 3), "4 rows of test"),
    ],
)
def test_sets_of_other_forms_are_read(prepare, folder, builder, name, shape, source):
    path = prepare(builder)
    _, test = load_tfds(name, [folder])
    assert test.images.shape == shape and test.source == f"{path} ({source})"
    np.testing.assert_array_equal(test.images[:, 2, 2, 0] % 3, test.labels)


def test_the_folders_of_tfds_are_searched_last(prepare, folder, tmp_path, monkeypatch):
    for place in ("variable", "home/tensorflow_datasets"):
        prepare("TinySet", tmp_path / place)
    assert str(tmp_path / "home/tensorflow_datasets") in load_tfds("tiny_set", [folder]).train.source
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "variable"))
    assert str(tmp_path / "variable") in load_tfds("tiny_set", [folder]).train.source
    prepare("TinySet")
    assert str(folder) in load_tfds("tiny_set", [folder]).train.source


def test_versions_and_configurations(prepare, folder):
    path = prepare("TinySet")
    for version in ("1.0.1", "1.0.10"):
        copy_set(path, path.parent / version)
    assert "1.0.10 " in load_tfds("tiny_set", [folder]).train.source
    assert "1.0.1 " in load_tfds("tiny_set:1.0.1", [folder]).train.source
    copy_set(path, folder / "tuned" / "one" / "1.0.0")
    assert load_tfds("tuned", [folder]).train.name == "tuned"
    copy_set(path, folder / "tuned" / "two" / "1.0.0")
    train = load_tfds("tuned/two:1.0.0", [folder]).train
    assert train.name == "tuned_two_1.0.0" and "/tuned/two/1.0.0 " in train.source
    message = f"tfds:tuned: {folder / 'tuned'} has the configurations one, two; name one, as in tfds:tuned/one"
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        load_tfds("tuned", [folder])


def copy_set(source: pathlib.Path, destination: pathlib.Path) -> None:
    destination.mkdir(parents=True)
    for path in source.iterdir():
        (destination / path.name).write_bytes(path.read_bytes())


def test_an_unprepared_set_tells_how_to_prepare_it(folder, tmp_path):
    with pytest.raises(InputError) as caught:
        load_tfds("cifar10", [folder])
    assert str(caught.value) == (
        f"tfds:cifar10: found no prepared set in {folder}, {tmp_path}/home/tensorflow_datasets; prepare it where "
        "TensorFlow is installed, with tfds.builder('cifar10', data_dir=DIR, "
        "file_format='array_record').download_and_prepare(), and give DIR as data_dir"
    )


@pytest.mark.parametrize("name", ["", "../etc", "a b", "name:new"])
def test_what_is_no_name_is_refused(folder, name):
    message = f"tfds:{name}: is not a valid name; use tfds:NAME, NAME/CONFIG or NAME:1.0.0"
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        load_tfds(name, [folder])


@pytest.mark.parametrize(
    ("builder", "name", "message"),
    [
        (
            "TinyTrainOnly",
            "tiny_train_only",
            ": has the splits extra, train; train and one of test, validation are needed",
        ),
        ("TinyNumber", "tiny_number", ": has the features image, label; image and a class label are needed"),
        ("TinyUnlabelled", "tiny_unlabelled", ", split train: row "),
    ],
)
def test_sets_without_what_is_needed_are_refused(prepare, folder, builder, name, message):
    path = prepare(builder)
    with pytest.raises(InputError, match="^" + re.escape(f"{path}{message}")):
        load_tfds(name, [folder])


def test_a_set_for_tensorflow_is_refused(prepare, folder):
    path = prepare("TinySet")
    info = json.loads((path / "dataset_info.json").read_text())
    (path / "dataset_info.json").write_text(json.dumps(info | {"fileFormat": "tfrecord"}))
    message = (
        rf"^{re.escape(str(path))}: cannot be read \(.+\); it must have been prepared with file_format='array_record'$"
    )
    with pytest.raises(InputError, match=message):
        load_tfds("tiny_set", [folder])


@pytest.mark.parametrize("name", ["features.json", "dataset_info.json", "tiny_set-train.array_record-00000-of-00001"])
@pytest.mark.parametrize("content", [b"", b"text", None])
def test_damaged_files_are_refused(prepare, folder, name, content):
    path = prepare("TinySet") / name
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2] if content is None else content)
    with pytest.raises(InputError, match=rf"^{re.escape(str(path.parent))}.*: cannot be read \("):
        load_tfds("tiny_set", [folder])


def test_a_set_cannot_have_modules_imported(prepare, folder, monkeypatch):
    (folder / "evil_module.py").write_text("Feature = None")
    monkeypatch.syspath_prepend(folder)
    path = prepare("TinySet")
    info = json.loads((path / "dataset_info.json").read_text())
    (path / "dataset_info.json").write_text(json.dumps(info | {"moduleName": "evil_module"}))
    load_tfds("tiny_set", [folder])
    features = json.loads((path / "features.json").read_text())
    features["featuresDict"]["features"]["image"]["pythonClassName"] = "evil_module.Feature"
    (path / "features.json").write_text(json.dumps(features))
    message = (
        f"{path / 'features.json'}: names the feature class evil_module.Feature, which is not a class of TFDS itself"
    )
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        load_tfds("tiny_set", [folder])
    assert "evil_module" not in sys.modules


def test_images_are_decoded_by_our_reader(prepare, folder, monkeypatch):
    # TFDS's own decoder would take any format that Pillow knows.
    prepare("TinySet")
    monkeypatch.setattr(tensorflow_datasets.features.Image, "decode_example_np", lambda *_: pytest.fail("TFDS decoded"))
    assert load_tfds("tiny_set", [folder]).train.images.shape == (6, 5, 6, 3)

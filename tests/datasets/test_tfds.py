import json
import pathlib
import re
import sys

import numpy as np
import pytest
import tensorflow_datasets

from bdjax.datasets.tfds import load_tfds
from bdjax.datasets.validation import ReadOptions
from bdjax.errors import InputError
from tests.fixtures.archives import FILE_FAULTS

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

class TinyZlib(TinySet):
    IMAGE = tfds.features.Tensor(shape=(5, 6, 3), dtype=numpy.uint8, encoding="zlib")

    def _image(self, level):
        return numpy.full((5, 6, 3), level, numpy.uint8)

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
        ("TinyGrey", "tiny_grey", (4, 5, 6, 1), "4 rows of test"),
        ("TinyTensor", "tiny_tensor", (4, 5, 6, 3), "4 rows of test"),
        ("TinyZlib", "tiny_zlib", (4, 5, 6, 3), "4 rows of test"),
    ],
)
def test_sets_of_other_forms_are_read(prepare, folder, builder, name, shape, source):
    path = prepare(builder)
    _, test = load_tfds(name, [folder])
    assert test.images.shape == shape and test.source == f"{path} ({source})"
    np.testing.assert_array_equal(test.images[:, 2, 2, 0] % 3, test.labels)


def test_sets_of_several_sizes_need_an_image_size(prepare, folder):
    path = prepare("TinySizes")
    with pytest.raises(InputError, match=re.escape(f"{path}: images have 2 sizes (") + ".*--image-size=N scales all"):
        load_tfds("tiny_sizes", [folder])
    train, test = load_tfds("tiny_sizes", [folder], ReadOptions(image_size=16))
    assert test.images.shape == (4, 16, 16, 3) and train.images.shape[1:] == (16, 16, 3)
    assert test.source == f"{path} (4 rows of test, 2 sizes scaled to 16x16)" and sum(test.original_sizes.values()) == 4
    np.testing.assert_array_equal(test.images[:, 2, 2, 0] % 3, test.labels)


@pytest.mark.parametrize("builder", ["TinySet", "TinyTensor"])
def test_sets_of_one_size_are_scaled_too(prepare, folder, builder):
    prepare(builder)
    name = "tiny_set" if builder == "TinySet" else "tiny_tensor"
    test = load_tfds(name, [folder], ReadOptions(image_size=16)).test
    assert test.images.shape == (4, 16, 16, 3) and test.original_sizes == {(5, 6): 4}
    assert "6x5 scaled to 16x16" in test.source


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


def change(path: pathlib.Path, name: str, edit) -> None:
    """Rewrites a description of a set."""
    content = json.loads((path / name).read_text())
    content = edit(content) or content
    (path / name).write_text(json.dumps(content))


def old_form(features: dict, *, as_text: bool) -> dict:
    """The form of features.json before TFDS 4.6, with protocol buffers as objects or as text, or without."""
    core = "tensorflow_datasets.core.features."

    def node(kind: str, proto: str, content: dict) -> dict:
        content = json.dumps(content) if as_text else content
        return {"type": core + kind, "content": content, "proto_cls": f"tensorflow_datasets.{proto}"}

    children = {
        "image": {
            "type": core + "image_feature.Image",
            "content": {"shape": [None, None, 3], "dtype": "uint8", "encoding_format": "png"},
        },
        "label": node("class_label_feature.ClassLabel", "ClassLabel", {"numClasses": "3"}),
    }
    if as_text:  # within a protocol buffer, all are in today's form
        return node("features_dict.FeaturesDict", "FeaturesDict", features["featuresDict"])
    return {"type": core + "features_dict.FeaturesDict", "content": children}


@pytest.mark.parametrize("as_text", [True, False])
def test_descriptions_of_older_versions_are_read(prepare, folder, as_text):
    path = prepare("TinySet")
    expected = load_tfds("tiny_set", [folder]).train
    change(path, "features.json", lambda features: old_form(features, as_text=as_text))
    # Such files do exist: TFDS reads them, too.
    assert set(tensorflow_datasets.builder_from_directory(path).info.features) == {"image", "label"}
    train = load_tfds("tiny_set", [folder]).train
    np.testing.assert_array_equal(train.images, expected.images)
    assert train.labels.tolist() == expected.labels.tolist() and train.class_names == ("ant", "bee", "cat")


EVIL = "evil_module.Feature"
CORE = "tensorflow_datasets.core.features."


def features_of(features: dict) -> dict:
    return features["featuresDict"]["features"]


def replace_feature(name: str, feature: object):
    return lambda features: features_of(features).update({name: feature})


HOSTILE_FEATURES = {
    "class of another module": replace_feature("image", {"pythonClassName": EVIL, "image": {}}),
    "class in snake case": replace_feature("image", {"python_class_name": EVIL, "image": {}}),
    "old form": replace_feature("label", {"type": EVIL, "content": {"num_classes": 3}}),
    "old form as text": replace_feature("label", {"type": EVIL, "content": '{"num_classes": 3}', "proto_cls": "x"}),
    "all in old form": lambda features: {
        "type": EVIL,
        "content": "{}",
        "proto_cls": "tensorflow_datasets.FeaturesDict",
    },
    "text in old form": lambda features: {
        "type": CORE + "features_dict.FeaturesDict",
        "content": json.dumps({"image": {"type": EVIL, "content": {}}, "label": features_of(features)["label"]}),
    },
    "a feature that is not used": replace_feature("more", {"pythonClassName": EVIL, "text": {}}),
    "in a sequence": replace_feature(
        "more", {"pythonClassName": CORE + "sequence_feature.Sequence", "sequence": {"feature": {"type": EVIL}}}
    ),
    "below the package": replace_feature("image", {"pythonClassName": CORE + "image_feature.Image.x", "image": {}}),
    "beside the package": replace_feature(
        "image", {"pythonClassName": "tensorflow_datasets.core.evil.Image", "image": {}}
    ),
    "path": replace_feature("image", {"pythonClassName": CORE + "../../evil.Image", "image": {}}),
    "no class": replace_feature("image", {"image": {}}),
    "class is a number": replace_feature("image", {"pythonClassName": 3, "image": {}}),
    "no object": replace_feature("image", [1]),
    "no features": lambda features: {"pythonClassName": CORE + "features_dict.FeaturesDict"},
    "features are a list": lambda features: {
        "pythonClassName": CORE + "features_dict.FeaturesDict",
        "featuresDict": {"features": []},
    },
    "list": lambda features: [features],
    "number": lambda features: 3,
    "names_file": replace_feature(
        "label", {"type": CORE + "class_label_feature.ClassLabel", "content": {"names_file": "/etc/passwd"}}
    ),
    "names without end": replace_feature(
        "label", {"pythonClassName": CORE + "class_label_feature.ClassLabel", "classLabel": {"numClasses": "9" * 17}}
    ),
    "no number of classes": replace_feature(
        "label", {"pythonClassName": CORE + "class_label_feature.ClassLabel", "classLabel": {"numClasses": "many"}}
    ),
    "names that are no text": replace_feature(
        "label", {"type": CORE + "class_label_feature.ClassLabel", "content": {"names": [1, 2, 3]}}
    ),
    "keys that are not known": replace_feature(
        "label", {"type": CORE + "class_label_feature.ClassLabel", "content": {"num_classes": 3, "run": "x"}}
    ),
    "content beside content": replace_feature(
        "label",
        {
            "pythonClassName": CORE + "class_label_feature.ClassLabel",
            "classLabel": {"numClasses": "3"},
            "jsonFeature": {},
        },
    ),
    "damaged content": replace_feature(
        "label",
        {
            "type": CORE + "class_label_feature.ClassLabel",
            "content": "{",
            "proto_cls": "tensorflow_datasets.ClassLabel",
        },
    ),
    "image without shape": replace_feature("image", {"pythonClassName": CORE + "tensor_feature.Tensor", "tensor": {}}),
    "image of objects": replace_feature(
        "image",
        {
            "pythonClassName": CORE + "tensor_feature.Tensor",
            "tensor": {"dtype": "object", "shape": {"dimensions": ["5", "6", "3"]}},
        },
    ),
    "image without end": replace_feature(
        "image",
        {
            "pythonClassName": CORE + "tensor_feature.Tensor",
            "tensor": {"dtype": "uint8", "shape": {"dimensions": ["9" * 17, "9" * 17, "3"]}},
        },
    ),
}


@pytest.fixture(scope="module")
def prepared(builders, tmp_path_factory) -> dict[str, bytes]:
    """The files of a sound set."""
    builder = builders.TinySet(data_dir=tmp_path_factory.mktemp("prepared"), file_format="array_record")
    builder.download_and_prepare()
    return {path.name: path.read_bytes() for path in pathlib.Path(builder.data_path).iterdir()}


@pytest.fixture
def sound(prepared, folder) -> pathlib.Path:
    path = folder / "tiny_set" / "1.0.0"
    path.mkdir(parents=True)
    for name, content in prepared.items():
        (path / name).write_bytes(content)
    return path


def refused(folder: pathlib.Path) -> str:
    with pytest.raises(InputError) as caught:
        load_tfds("tiny_set", [folder])
    message = str(caught.value)
    assert message.startswith(str(folder)) and "\n" not in message and len(message) < 1000
    return message


@pytest.mark.parametrize("case", HOSTILE_FEATURES)
def test_hostile_features_are_refused_and_nothing_is_imported(sound, folder, case, monkeypatch):
    (folder / "evil_module.py").write_text("raise SystemExit('this must not run')")
    monkeypatch.syspath_prepend(folder)
    change(sound, "features.json", HOSTILE_FEATURES[case])
    refused(folder)
    assert "evil_module" not in sys.modules


def first_split(info: dict) -> dict:
    return info["splits"][0]


HOSTILE_INFO = {
    "path in the name": lambda info: info.update(name="../../etc/passwd"),
    "name is a number": lambda info: info.update(name=3),
    "no name": lambda info: info.pop("name"),
    "another format": lambda info: info.update(fileFormat="tfrecord"),
    "format is a list": lambda info: info.update(fileFormat=["array_record"]),
    "no splits": lambda info: info.pop("splits"),
    "splits are text": lambda info: info.update(splits="train"),
    "splits are numbers": lambda info: info.update(splits=[1, 2]),
    "split with a path": lambda info: first_split(info).update(name="../train"),
    "two splits of a name": lambda info: info["splits"].append(first_split(info)),
    "template": lambda info: first_split(info).update(filepathTemplate="/etc/{DATASET}"),
    "lengths are text": lambda info: first_split(info).update(shardLengths="666"),
    "lengths below 0": lambda info: first_split(info).update(shardLengths=["-6"]),
    "lengths without end": lambda info: first_split(info).update(shardLengths=["9" * 17]),
    "lengths are fractions": lambda info: first_split(info).update(shardLengths=[6.5]),
    "too many rows": lambda info: first_split(info).update(shardLengths=["7"]),
    "too few rows": lambda info: first_split(info).update(shardLengths=["5"]),
    "more shards": lambda info: first_split(info).update(shardLengths=["3", "3"]),
    "no rows": lambda info: first_split(info).update(shardLengths=["0"]),
    "list": lambda info: [info],
}


@pytest.mark.parametrize("case", HOSTILE_INFO)
def test_hostile_descriptions_are_refused(sound, folder, case):
    change(sound, "dataset_info.json", HOSTILE_INFO[case])
    refused(folder)


@pytest.mark.parametrize("name", ["features.json", "dataset_info.json"])
@pytest.mark.parametrize(
    "content", [b"[" * 100_000, b'{"a":' * 100_000, b"9" * 100_000, b"\xff\xfe", b'{"a": NaN}', b"null"]
)
def test_descriptions_that_cannot_be_parsed_are_refused(sound, folder, name, content):
    (sound / name).write_bytes(content)
    refused(folder)


SHARD = "tiny_set-train.array_record-00000-of-00001"


@pytest.mark.parametrize("fault", ["endless", "pipe", "folder", "empty", "text"])
@pytest.mark.parametrize("name", ["features.json", "dataset_info.json", "label.labels.txt", SHARD])
def test_files_that_are_no_regular_files_are_refused(sound, folder, name, fault):
    (sound / name).unlink()
    FILE_FAULTS[fault](sound / name)
    refused(folder)


def test_class_names_are_bounded_and_compared_with_their_number(sound, folder):
    (sound / "label.labels.txt").write_text("ant\nbee\n")
    assert refused(folder) == f"{sound / 'label.labels.txt'}: has 2 class names for 3 classes"
    (sound / "label.labels.txt").write_text("ant\nbee\n" + "c" * 5000)
    assert len(load_tfds("tiny_set", [folder]).train.class_names[2]) == 100
    (sound / "label.labels.txt").write_bytes(b"\n" * (17 << 20))
    assert "lists of classes have at most" in refused(folder)
    (sound / "label.labels.txt").unlink()
    assert load_tfds("tiny_set", [folder]).train.class_names == ("0", "1", "2")


def test_other_splits_and_images_are_said(sound, folder):
    feature = {"pythonClassName": CORE + "image_feature.Image", "image": {"dtype": "uint8"}}
    change(sound, "features.json", replace_feature("mask", feature))
    split = {"name": "validation", "shardLengths": ["3", "4"]}
    change(sound, "dataset_info.json", lambda info: info["splits"].append(split))
    for part in load_tfds("tiny_set", [folder]):
        assert part.unread == (
            ("validation", "is a further split of 7 rows"),
            ("mask", "is a further feature with images"),
        )


def test_images_are_decoded_by_our_reader(prepare, folder, monkeypatch):
    # TFDS's own decoder would take any format that Pillow knows.
    prepare("TinySet")
    monkeypatch.setattr(tensorflow_datasets.features.Image, "decode_example_np", lambda *_: pytest.fail("TFDS decoded"))
    assert load_tfds("tiny_set", [folder]).train.images.shape == (6, 5, 6, 3)

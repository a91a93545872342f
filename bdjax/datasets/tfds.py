"""Datasets prepared by TensorFlow Datasets (TFDS), read without TensorFlow.

The descriptions of a set, `features.json` and `dataset_info.json`, are read here and not by TFDS, which imports any module that
they name for a feature, and opens any file that they name for class names or rows.
"""

import dataclasses
import json
import math
import os
import re
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bdjax.datasets.archives import short
from bdjax.datasets.decoding import read_header, read_pixels
from bdjax.datasets.files import open_file, read_file
from bdjax.datasets.scaling import Size, check_one_size, count_sizes, scaled, scaling_note
from bdjax.datasets.validation import STRICT, ReadOptions, make_dataset, one_line
from bdjax.errors import InputError
from bdjax.types import Dataset, TrainTest, Unread

PREFIX = "tfds:"

_MAXIMUM_JSON_BYTES = 1 << 21
_MAXIMUM_NAMES_BYTES = 1 << 24
_MAXIMUM_CLASSES = 1_000_000
_MAXIMUM_RECORD_READS = 1_000
_FILE_FORMAT = "array_record"
_FILE_NAMES = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"

_FEATURES = "tensorflow_datasets.core.features."
_IMAGE, _LABEL, _DICT = "image_feature.Image", "class_label_feature.ClassLabel", "features_dict.FeaturesDict"
_TENSORS = ("tensor_feature.Tensor", "feature.Tensor")  # the second in older sets
_CONTENT_KEYS = {
    _DICT: "features_dict",
    _IMAGE: "image",
    _LABEL: "class_label",
    **dict.fromkeys(_TENSORS, "tensor"),
}
"""feature class -> the key of its content"""
_CLASS_KEYS = ("pythonClassName", "python_class_name", "type")
_TENSOR_DTYPES = ("uint8", "float16", "float32", "float64")


class _Feature(NamedTuple):
    """A feature, as `features.json` describes it."""

    kind: str
    """class, relative to `_FEATURES`"""
    content: Mapping[str, Any]
    """keys in snake_case"""


class _Split(NamedTuple):
    name: str
    shard_lengths: tuple[int, ...]


def load_tfds(name: str, folders: Sequence[Path], options: ReadOptions = STRICT) -> TrainTest:
    """Loads a prepared set with the features `image` and `label`.

    Args:
        name: The name in TensorFlow Datasets: "cifar10", "name/config", "name:1.0.0"; without a version, the highest.
        folders: Where to look for it; then $TFDS_DATA_DIR and ~/tensorflow_datasets.
        options: What to tolerate; only `image_size` applies.

    Returns:
        The splits `train`, and `test` or else `validation`. Other splits and images are in `unread`.

    Raises:
        InputError: If the set is not found, cannot be read without TensorFlow, lacks a required feature or split, or has images
            of several sizes and `options` has no `image_size`.
    """
    folders = (*folders, *_default_folders())
    folder = _find(name, folders)
    if folder is None:
        listed = ", ".join(str(searched) for searched in folders)
        raise InputError(
            f"{PREFIX}{name}: found no prepared set in {listed}; prepare it where TensorFlow is installed, with "
            f"tfds.builder({name!r}, data_dir=DIR, file_format='array_record').download_and_prepare(), and give DIR as "
            "data_dir"
        )
    features = _read_features(folder / "features.json")
    set_name, splits = _read_info(folder)
    test_split = next((split for split in ("test", "validation") if split in splits), None)
    if "train" not in splits or test_split is None:
        raise InputError(f"{folder}: has the splits {_listed(splits)}; train and one of test, validation are needed")
    class_names = _class_names(features["label"], folder)
    try:
        rows = {
            split: list(_rows(folder, set_name, splits[split], features["image"])) for split in ("train", test_split)
        }
    except InputError:
        raise
    except Exception as error:  # protobuf, array_record and NumPy raise various errors on damaged files
        raise _not_readable(folder, one_line(error)[:300]) from error
    unread = [
        Unread(split.name, f"is a further split of {sum(split.shard_lengths):,} rows")
        for split in splits.values()
        if split.name not in rows
    ]
    unread += [
        Unread(name, "is a further feature with images")
        for name, feature in features.items()
        if name != "image" and feature.kind == _IMAGE
    ]
    named = re.sub(r"[/:]", "_", name)
    train, test = _make_datasets(named, folder, rows, features["image"], class_names, options.image_size)
    return TrainTest(*(dataclasses.replace(part, unread=tuple(unread)) for part in (train, test)))


def _not_readable(folder: Path, why: str) -> InputError:
    return InputError(f"{folder}: cannot be read ({why}); it must have been prepared with file_format='{_FILE_FORMAT}'")


def _listed(names: Sequence[str] | Mapping[str, Any]) -> str:
    ordered = [short(name) for name in sorted(names)]
    return ", ".join(ordered if len(ordered) <= 10 else [*ordered[:10], f"{len(ordered) - 10} more"])


def _default_folders() -> tuple[Path, ...]:
    variable = os.environ.get("TFDS_DATA_DIR")
    home = Path.home() / "tensorflow_datasets"
    return (Path(variable).expanduser(), home) if variable else (home,)


def _find(name: str, folders: Sequence[Path]) -> Path | None:
    match = re.fullmatch(r"(\w+)(?:/([\w.-]+))?(?::(\d+\.\d+\.\d+))?", name)
    if match is None:
        raise InputError(f"{PREFIX}{name}: is not a valid name; use {PREFIX}NAME, NAME/CONFIG or NAME:1.0.0")
    set_name, config, version = match.groups()
    for folder in folders:
        base = folder / set_name / config if config else folder / set_name
        patterns = [version or "*"] if config else [version or "*", f"*/{version or '*'}"]
        for pattern in patterns:
            found = [path.parent for path in base.glob(f"{pattern}/dataset_info.json") if _version(path.parent)]
            configs = sorted({path.parent.name for path in found})
            if len(configs) > 1:
                raise InputError(
                    f"{PREFIX}{name}: {base} has the configurations {', '.join(configs)}; name one, as in "
                    f"{PREFIX}{set_name}/{configs[0]}"
                )
            if found:
                return max(found, key=_version)
    return None


def _version(folder: Path) -> tuple[int, ...]:
    return tuple(int(part) for part in folder.name.split(".")) if re.fullmatch(r"\d+\.\d+\.\d+", folder.name) else ()


# ---- What a set says about itself ---------------------------------------------------------------------------------------


def _read_json(path: Path) -> dict[str, Any]:
    data = read_file(path, _MAXIMUM_JSON_BYTES, "descriptions of a set")
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: cannot be read ({one_line(error)}); a prepared set has this file") from error
    if not isinstance(content, dict):
        raise InputError(
            f"{path}: cannot be read (it is a {type(content).__name__}); a prepared set has an object there"
        )
    return content


def _read_features(path: Path) -> dict[str, _Feature]:
    """The features of a set by name, of which image and label are what this module reads."""
    top = _feature(_read_json(path), path)
    if top.kind != _DICT:
        raise InputError(f"{path}: describes a {top.kind}; a {_DICT} is needed")
    features = {}
    for name, description in top.content.items():
        for class_name in _class_names_in(description):
            _check_class_name(class_name, path)
        if name in ("image", "label"):
            features[name] = _feature(description, path)
        else:  # it is not used
            class_name = next(_class_names_in(description), _FEATURES)
            features[name] = _Feature(class_name.removeprefix(_FEATURES), {})
    if features.get("label", top).kind != _LABEL or features.get("image", top).kind not in (_IMAGE, *_TENSORS):
        raise InputError(f"{path.parent}: has the features {_listed(features)}; image and a class label are needed")
    return features


def _class_names_in(node: Any) -> Iterator[str]:
    """The names of all feature classes in a description, however deep."""
    nodes = [node]
    while nodes:
        node = nodes.pop()
        if isinstance(node, dict):
            yield from (node[key] for key in _CLASS_KEYS if isinstance(node.get(key), str))
            nodes += node.values()
        elif isinstance(node, list):
            nodes += node


def _check_class_name(name: str, path: Path) -> None:
    if not re.fullmatch(re.escape(_FEATURES) + r"\w+\.\w+", name):
        raise InputError(f"{path}: names the feature class {short(name)}, which is not a class of TFDS itself")


def _feature(node: Any, path: Path) -> _Feature:
    """Reads the description of a feature that is used, in today's form or in the older one with "type" and "content"."""

    def refuse(what: str) -> InputError:
        return InputError(f"{path}: {what}; such a set is not read")

    if not isinstance(node, dict):
        raise refuse("a feature is not an object")
    node = {_snake_case(key): value for key, value in node.items()}
    class_name = node.pop("type" if "type" in node else "python_class_name", None)
    if not isinstance(class_name, str):
        raise refuse("a feature has no class")
    _check_class_name(class_name, path)
    kind = class_name.removeprefix(_FEATURES)
    if kind not in _CONTENT_KEYS:
        return _Feature(kind, {})
    is_proto = True
    if "content" in node:
        content, proto_class = node.pop("content"), node.pop("proto_cls", "")
        is_proto = bool(proto_class)
        try:
            content = json.loads(content) if isinstance(content, str) else content
        except (ValueError, RecursionError) as error:
            raise refuse(f"the content of a feature is damaged ({one_line(error)})") from error
    else:
        content = node.pop(_CONTENT_KEYS[kind], {})
    node = {key: value for key, value in node.items() if key not in ("description", "value_range")}
    if node or not isinstance(content, dict):
        raise refuse(f"a feature of class {kind} has {_listed(node) or 'no content'}, which is not known")
    if kind == _DICT:
        content = content.get("features", {}) if is_proto else content
        if not isinstance(content, dict):
            raise refuse("the features are not an object")
        return _Feature(kind, content)
    content = {_snake_case(key): value for key, value in content.items()}
    known = {"shape", "dtype", "encoding", "encoding_format", "use_colormap", "num_classes", "names", "optional"}
    if unknown := [key for key in content if key not in known and content[key] is not None]:
        raise refuse(f"a feature of class {kind} has {_listed(unknown)}, which is not known")
    return _Feature(kind, content)


def _snake_case(key: str) -> str:
    return re.sub(r"(?<=[a-z])[A-Z]", lambda letter: "_" + letter[0].lower(), key)


def _whole_number(value: Any) -> int | None:
    """A number of JSON, which protocol buffers write as text; None if it is neither."""
    if isinstance(value, str) and re.fullmatch(r"-?[0-9]{1,18}", value):
        return int(value)
    return value if type(value) is int and abs(value) < 1 << 60 else None


def _class_names(label: _Feature, folder: Path) -> tuple[str, ...]:
    """The names of the classes from the file beside the features, which `ClassLabel` reads too, or their numbers."""
    where = folder / "features.json"
    names, num_classes = label.content.get("names"), _whole_number(label.content.get("num_classes"))
    if num_classes is None and label.content.get("num_classes") is not None:
        raise InputError(f"{where}: the number of classes is {short(ascii(label.content['num_classes']))}")
    if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise InputError(f"{where}: the names of the classes are not a list of text")
    names_file = folder / "label.labels.txt"
    if names_file.exists():
        text = read_file(names_file, _MAXIMUM_NAMES_BYTES, "lists of classes").decode(errors="replace")
        names = [line.strip() for line in text.split("\n") if line.strip()]
        where = names_file
    if num_classes is None:
        num_classes = len(names or ())
    if not 2 <= num_classes <= _MAXIMUM_CLASSES:
        raise InputError(f"{where}: has {num_classes} class(es); a classifier needs 2 to {_MAXIMUM_CLASSES}")
    if names is None:
        return tuple(str(label) for label in range(num_classes))
    if len(names) != num_classes:
        raise InputError(f"{where}: has {len(names)} class names for {num_classes} classes")
    return tuple(short(name) for name in names)


def _read_info(folder: Path) -> tuple[str, dict[str, _Split]]:
    """The name of the set in the names of its files, and its splits."""
    path = folder / "dataset_info.json"
    info = {_snake_case(key): value for key, value in _read_json(path).items()}
    if info.get("file_format") != _FILE_FORMAT:
        raise _not_readable(folder, f"its file format is {short(str(info.get('file_format')))}")
    name, listed = info.get("name"), info.get("splits", [])
    if not isinstance(name, str) or not re.fullmatch(r"\w{1,200}", name):
        raise InputError(f"{path}: cannot be read (the name of the set is {short(ascii(name))}); letters are needed")
    if not isinstance(listed, list) or not all(isinstance(split, dict) for split in listed):
        raise InputError(f"{path}: cannot be read (splits is not a list of objects); a prepared set has one")
    splits = {}
    for split in listed:
        split = {_snake_case(key): value for key, value in split.items()}
        split_name, lengths = split.get("name"), split.get("shard_lengths", [])
        if not isinstance(split_name, str) or not re.fullmatch(r"[\w.+-]{1,200}", split_name) or split_name in splits:
            raise InputError(
                f"{path}: cannot be read (a split is called {short(ascii(split_name))}); names must differ"
            )
        numbers = [_whole_number(length) for length in lengths] if isinstance(lengths, list) else [None]
        if any(number is None or number < 0 for number in numbers):
            raise InputError(f"{path}: cannot be read (shardLengths of {split_name}); whole numbers are needed")
        if split.get("filepath_template", _FILE_NAMES) not in ("", _FILE_NAMES):
            raise InputError(f"{path}: the files of {split_name} are not named {_FILE_NAMES}; such a set is not read")
        splits[split_name] = _Split(split_name, tuple(numbers))
    return name, splits


# ---- Rows ---------------------------------------------------------------------------------------------------------------


def _rows(folder: Path, set_name: str, split: _Split, image: _Feature) -> Iterator[tuple[Any, int]]:
    """(image, label) of each row of a split; the image is the content of a file, or an array."""
    from array_record.python import array_record_module
    from tensorflow_datasets.proto import tf_example_pb2

    if not sum(split.shard_lengths):
        raise InputError(f"{folder}: the split {split.name} is empty")
    for number, length in enumerate(split.shard_lengths):
        path = folder / f"{set_name}-{split.name}.{_FILE_FORMAT}-{number:05d}-of-{len(split.shard_lengths):05d}"
        open_file(path, 1 << 62, "").close()  # array_record would wait for a pipe
        reader = array_record_module.ArrayRecordReader(
            str(path), options="readahead_buffer_size:0", file_reader_buffer_size=1 << 15
        )
        try:
            if reader.num_records() != length:
                raise InputError(f"{path}: has {reader.num_records()} rows; dataset_info.json says {length}")
            for start in range(0, length, _MAXIMUM_RECORD_READS):
                for record in reader.read(list(range(start, min(start + _MAXIMUM_RECORD_READS, length)))):
                    features = tf_example_pb2.Example.FromString(record).features.feature
                    (label,) = features["label"].int64_list.value
                    yield _row_image(features["image"], image), label
        finally:
            reader.close()


def _row_image(value: Any, image: _Feature) -> bytes | np.ndarray:
    if image.kind == _IMAGE:
        (data,) = value.bytes_list.value
        return data
    dtype, shape = image.content.get("dtype"), image.content.get("shape")
    # Older sets have the bare list.
    shape = shape.get("dimensions", []) if isinstance(shape, dict) else shape
    shape = [_whole_number(length) for length in shape] if isinstance(shape, list) else []
    encoding = image.content.get("encoding") or "none"
    if dtype not in _TENSOR_DTYPES or not shape or any(length is None or length < 1 for length in shape):
        raise ValueError(f"images are tensors of dtype {short(str(dtype))} and shape {shape}")
    if encoding == "none":
        values = value.float_list.value if value.HasField("float_list") else value.int64_list.value
        return np.array(values, dtype).reshape(shape)
    (data,) = value.bytes_list.value
    if encoding == "zlib":
        unpacker = zlib.decompressobj()
        data = unpacker.decompress(data, math.prod(shape) * np.dtype(dtype).itemsize + 1)
    return np.frombuffer(data, dtype).reshape(shape)


def _make_datasets(
    name: str,
    folder: Path,
    rows: Mapping[str, list[tuple[Any, int]]],
    image: _Feature,
    class_names: tuple[str, ...],
    side: int | None,
) -> list[Dataset]:
    images = {split: [image for image, _ in of_split] for split, of_split in rows.items()}
    sizes: dict[str, dict[Size, int]] = {split: {} for split in rows}
    if image.kind == _IMAGE:
        # Image files are decoded by `read_pixels`, which accepts fewer formats than TFDS.
        decoded, sizes = _decode_parts(images, folder, side)
    else:
        decoded = {split: np.stack(of_split) for split, of_split in images.items()}
    datasets = []
    for split, of_split in rows.items():
        note = scaling_note(sizes[split], decoded[split].shape[1:3])
        source = f"{folder} ({len(of_split):,} rows of {split}{note})"
        labels = np.array([label for _, label in of_split], np.int64)
        where = f"{folder}, split {split}"
        dataset = make_dataset(decoded[split], labels, len(class_names), name, source, class_names, where=where)
        datasets.append(scaled(dataclasses.replace(dataset, original_sizes=sizes[split] if note else {}), side))
    return datasets


def _decode_parts(
    parts: Mapping[str, list[bytes]], folder: Path, side: int | None
) -> tuple[dict[str, np.ndarray], dict[str, dict[Size, int]]]:
    """The images of each part, and the number of those of each size before scaling."""
    files = {(split, row): data for split, encoded in parts.items() for row, data in enumerate(encoded)}
    headers = {place: read_header(data, f"{folder}, {place[0]} row {place[1]}") for place, data in files.items()}
    grey = all(header.is_grey for header in headers.values())
    sizes = {split: Counter(headers[split, row].size for row in range(len(parts[split]))) for split in parts}
    together = count_sizes(*sizes.values())
    if side is None:
        check_one_size(folder, together)
    size = (side, side) if side else next(iter(together))
    decoded = {
        split: np.stack(
            [
                read_pixels(data, f"{folder}, {split} row {row}", size=size, grey=grey)
                for row, data in enumerate(encoded)
            ]
        )
        for split, encoded in parts.items()
    }
    return decoded, {split: count_sizes(of_split) for split, of_split in sizes.items()}

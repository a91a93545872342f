"""Datasets prepared by TensorFlow Datasets, read without TensorFlow."""

import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bdjax.datasets.decoding import common_size, read_header, read_pixels
from bdjax.datasets.validation import make_dataset, one_line
from bdjax.errors import InputError
from bdjax.types import Dataset, TrainTest

PREFIX = "tfds:"


def load_tfds(name: str, folders: Sequence[Path]) -> TrainTest:
    """Loads a prepared set with the features `image` and `label`.

    Args:
        name: The name in TensorFlow Datasets: "cifar10", "name/config", "name:1.0.0"; without a version, the highest.
        folders: Where to look for it; then $TFDS_DATA_DIR and ~/tensorflow_datasets.

    Returns:
        The splits `train`, and `test` or else `validation`. If sizes differ, images are resized to 32x32 and `source` says
        so.

    Raises:
        InputError: If the set is not found, cannot be read without TensorFlow, or lacks a required feature or split.
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
    _check_features_file(folder / "features.json")
    try:
        return _read(name, folder)
    except InputError:
        raise
    except Exception as error:  # TFDS, protobuf and array_record raise various errors on damaged files
        raise InputError(
            f"{folder}: cannot be read ({one_line(error)[:300]}); it must have been prepared with "
            "file_format='array_record'"
        ) from error


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


def _check_features_file(path: Path) -> None:
    # TFDS imports any module that this file names for a feature, so a prepared set could run any installed module.
    def class_names(node: Any) -> Iterator[str]:
        if isinstance(node, dict):
            for key, value in node.items():
                if key in ("pythonClassName", "python_class_name", "type") and isinstance(value, str):
                    yield value
                yield from class_names(value)
        elif isinstance(node, list):
            for value in node:
                yield from class_names(value)

    try:
        features = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: cannot be read ({one_line(error)}); a prepared set has this file") from error
    for class_name in class_names(features):
        if not class_name.startswith("tensorflow_datasets.core.features."):
            raise InputError(
                f"{path}: names the feature class {one_line(class_name)}, which is not a class of TFDS itself"
            )


def _read(name: str, folder: Path) -> TrainTest:
    import tensorflow_datasets as tfds

    builder = tfds.builder_from_directory(folder)
    features, splits = dict(builder.info.features.items()), list(builder.info.splits)
    if not isinstance(features.get("label"), tfds.features.ClassLabel) or "image" not in features:
        raise InputError(
            f"{folder}: has the features {', '.join(sorted(features))}; image and a class label are needed"
        )
    test_split = next((split for split in ("test", "validation") if split in splits), None)
    if "train" not in splits or test_split is None:
        raise InputError(
            f"{folder}: has the splits {', '.join(sorted(splits))}; train and one of test, validation are needed"
        )
    class_names = tuple(features["label"].names)
    report_name = re.sub(r"[/:]", "_", name)
    # Image files are decoded by `read_pixels`, which accepts fewer formats.
    is_encoded = isinstance(features["image"], tfds.features.Image)
    decoders = {"image": tfds.decode.SkipDecoding()} if is_encoded else None
    parts = {}
    for split in ("train", test_split):
        items = builder.as_data_source(split=split, decoders=decoders)
        rows = [items[index] for index in range(len(items))]
        if not rows:
            raise InputError(f"{folder}: the split {split} is empty")
        parts[split] = [row["image"] for row in rows], np.array([int(row["label"]) for row in rows])
    decoded, note = _decode_parts(parts, folder) if is_encoded else ({s: np.stack(p[0]) for s, p in parts.items()}, "")
    datasets: list[Dataset] = []
    for split, (_, labels) in parts.items():
        source = f"{folder} ({len(labels):,} rows of {split}{note})"
        where = f"{folder}, split {split}"
        datasets.append(
            make_dataset(decoded[split], labels, len(class_names), report_name, source, class_names, where=where)
        )
    return TrainTest(*datasets)


def _decode_parts(parts: dict[str, tuple[list[bytes], np.ndarray]], folder: Path) -> tuple[dict[str, np.ndarray], str]:
    files = {(split, row): data for split, (encoded, _) in parts.items() for row, data in enumerate(encoded)}
    headers = {place: read_header(data, f"{folder}, {place[0]} row {place[1]}") for place, data in files.items()}
    grey = all(header.is_grey for header in headers.values())
    size, note = common_size(list(headers.values()))
    decoded = {
        split: np.stack(
            [
                read_pixels(data, f"{folder}, {split} row {row}", size=size, grey=grey)
                for row, data in enumerate(encoded)
            ]
        )
        for split, (encoded, _) in parts.items()
    }
    return decoded, note

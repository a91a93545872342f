"""Annotations in COCO's form: every box is a row, cut out of its image and scaled to `image_size`.

    photos/annotations.json     or _annotations.coco.json, or annotations/instances_*.json
    photos/images/0001.jpg      below the folder of the annotations, or below images/ or the like beside it

Rows are in the order of the images, classes in that of the categories' ids. Boxes of a crowd, and images without boxes, are
listed as not read.
"""

import os.path
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from bdjax.datasets.columns import read_below
from bdjax.datasets.files import list_level, open_file, read_json
from bdjax.datasets.records import Box, Encoded, Part, Source, by_split
from bdjax.datasets.validation import ReadOptions
from bdjax.errors import InputError
from bdjax.types import Unread

NAMES = ("_annotations.coco.json", "annotations.json", "instances.json")
FOLDER, PREFIX = "annotations", "instances_"
_MAXIMUM_JSON = 1 << 31
_MAXIMUM_PIXELS = 1_000_000
_LOOKED_FOR = 100
"""Images that are looked for to find their folder."""


class _Annotations(NamedTuple):
    file: Path
    data: Path
    """the data's folder, which no link to an image may leave"""
    root: Path
    """folder of the images, or what it is below"""
    below: str
    """that folder as rows name it: relative to the data's, or to the file's if that is what the user names"""


def holds(path: Path) -> bool:
    """Whether a path is a JSON file, or a folder with annotations of a known name."""
    if path.is_file():
        return path.suffix == ".json"
    return any(_files(folder) for folder in (path, *_folders(path)))


def find(path: Path, options: ReadOptions) -> Source:
    """The boxes of a file of annotations, or of a folder with a file for each part.

    Raises:
        InputError: A file is damaged, lacks what COCO's form has, or names what is not there.
    """
    parts, unread = ([("", _of_file(path))], []) if path.is_file() else _of_folder(path)
    found, classes = [], None
    for title, annotations in parts:
        content = _read(annotations.file)
        annotations = _with_images(annotations, content["images"])
        categories = _categories(annotations.file, content)
        if classes is not None and categories != classes:
            raise InputError(f"{annotations.file}: has other categories than the training part")
        classes = categories
        part, others = _part(title, annotations, content, categories, options)
        found.append(part)
        unread += others
    return Source(tuple(found), tuple(classes.values()), tuple(unread), ("boxes of COCO",))


def _folders(path: Path) -> list[Path]:
    return [folder.path for folder in list_level(path)[0]] if path.is_dir() else []


def _files(folder: Path) -> list[Path]:
    found = [folder / name for name in NAMES if (folder / name).is_file() and _looks_right(folder / name)]
    inner = folder / FOLDER
    if inner.is_dir():
        found += sorted(file.path for file in list_level(inner)[1] if file.name.startswith(PREFIX) and not file.problem)
    return found


def _looks_right(file: Path) -> bool:
    """Whether a file begins like one of COCO's: other data has an annotations.json, too."""
    try:
        with open_file(file, _MAXIMUM_JSON, "files of annotations") as stream:
            return bool(re.search(rb'"(images|annotations|categories)"\s*:\s*\[', stream.read(1 << 16)))
    except InputError:
        return False


def _of_folder(path: Path) -> tuple[list[tuple[str, _Annotations]], list[Unread]]:
    files = {_split_name(file, path): file for folder in (path, *_folders(path)) for file in _files(folder)}
    parts, unread = by_split(path, files)
    chosen = []
    for title, names in parts:
        if len(names) > 1:
            there = ", ".join(files[name].relative_to(path).as_posix() for name in names[:5])
            raise InputError(f"{path}: has several files of annotations ({there}); give the path of one as --dataset")
        file = files[names[0]]
        below = file.parent if file.parent.name != FOLDER else file.parent.parent
        inner = below.relative_to(path).as_posix()
        chosen.append((title, _Annotations(file, path, below, "" if inner == "." else f"{inner}/")))
    return chosen, unread


def _split_name(file: Path, path: Path) -> str:
    """A name from which `by_split` knows the part: that of annotations/instances_train2017.json is train."""
    name = file.relative_to(path).as_posix()
    found = re.fullmatch(rf"{PREFIX}([A-Za-z]+)[0-9]*\.json", file.name)
    return f"{found[1]}/{name}" if found else name


def _of_file(file: Path) -> _Annotations:
    is_inner = file.parent.name == FOLDER
    folder = file.parent.parent if is_inner else file.parent
    return _Annotations(file, folder, folder, "../" if is_inner else "")


def _with_images(place: _Annotations, images: Sequence[Any]) -> _Annotations:
    """Finds the folder that the names of images are relative to: of the annotations' name, `images`, or the annotations' own;
    the one that has the first image that is there."""
    inner = [name for name in (place.file.stem.removeprefix(PREFIX), "images") if (place.root / name).is_dir()]
    listed = [entry.get("file_name") for entry in images[:_LOOKED_FOR] if isinstance(entry, dict)]
    names = [name for name in listed if isinstance(name, str)]
    there = (folder for name in names for folder in (*inner, "") if os.path.isfile(place.root / folder / name))
    chosen = next(there, (*inner, "")[0])
    return place._replace(root=place.root / chosen, below=f"{place.below}{chosen}/" if chosen else place.below)


# ---- Content ---------------------------------------------------------------------------------------------------------


def _read(file: Path) -> Mapping[str, list[Any]]:
    _, content = read_json(file, _MAXIMUM_JSON, "files of annotations")
    keys = ("images", "annotations", "categories")
    if not isinstance(content, dict) or not all(isinstance(content.get(key), list) for key in keys):
        there = ", ".join(map(repr, list(content)[:20])) if isinstance(content, dict) else type(content).__name__
        raise InputError(
            f"{file}: has {there or 'nothing'}; COCO's lists images, annotations and categories are needed"
        )
    return content


def _field(file: Path, what: str, number: int, entry: Any, name: str, kind: type | tuple[type, ...]) -> Any:
    value = entry.get(name) if isinstance(entry, dict) else None
    if not isinstance(value, kind) or isinstance(value, bool):
        there = ", ".join(map(repr, list(entry)[:20])) if isinstance(entry, dict) else type(entry).__name__
        raise InputError(f"{file}: entry {number} of {what} has no {name!r} of the right type; it has {there}")
    return value


def _categories(file: Path, content: Mapping[str, list[Any]]) -> dict[int, str]:
    """Id -> name, in the order of the ids."""
    found = {}
    for number, entry in enumerate(content["categories"]):
        key = _field(file, "categories", number, entry, "id", int)
        if key in found:
            raise InputError(f"{file}: has two categories with the id {key}")
        found[key] = _field(file, "categories", number, entry, "name", str)
    if len(found) < 2:
        raise InputError(f"{file}: has {len(found)} categories; at least 2 are needed")
    return dict(sorted(found.items()))


def _part(
    title: str,
    place: _Annotations,
    content: Mapping[str, list[Any]],
    categories: Mapping[int, str],
    options: ReadOptions,
) -> tuple[Part, list[Unread]]:
    file, images = place.file, {}
    for number, entry in enumerate(content["images"]):
        key = _field(file, "images", number, entry, "id", int)
        if key in images:
            raise InputError(f"{file}: has two images with the id {key}")
        images[key] = _field(file, "images", number, entry, "file_name", str)
    order = {key: number for number, key in enumerate(categories)}
    place_of = {key: number for number, key in enumerate(images)}
    rows, unread, with_boxes, keys = [], [], set(), set()
    for number, entry in enumerate(content["annotations"]):
        image, category = (
            _field(file, "annotations", number, entry, name, int) for name in ("image_id", "category_id")
        )
        if image not in images or category not in order:
            what, which = ("image", image) if image not in images else ("category", category)
            raise InputError(f"{file}: entry {number} of annotations is of the {what} {which}, which is not listed")
        key = _field(file, "annotations", number, entry, "id", int) if "id" in entry else number
        if key in keys:
            raise InputError(f"{file}: has two annotations with the id {key}")
        keys.add(key)
        name = f"{place.below}{images[image]}#{key}"
        with_boxes.add(image)
        if entry.get("iscrowd"):
            unread.append(Unread(name, "is a box of a crowd"))
            continue
        box = _box(_field(file, "annotations", number, entry, "bbox", list))
        rows.append((place_of[image], order[category], name, (images[image], box)))
    if not rows:
        raise InputError(f"{file}: has no boxes")
    # The boxes of an image follow each other, so that it is read and decoded once.
    _, labels, names, boxes = zip(*sorted(rows, key=lambda row: row[0]), strict=True)
    unread += [
        Unread(place.below + name, "is an image without a box") for key, name in images.items() if key not in with_boxes
    ]
    return Part(title, labels, names, partial(_images, place, boxes)), unread


def _box(values: Sequence[Any]) -> Box | str:
    """[left, top, width, height], rounded to whole pixels; or what is wrong with them, a predicate."""
    numbers = [value for value in values if isinstance(value, (int, float)) and not isinstance(value, bool)]
    # A whole number may be too large for a float.
    if len(values) != 4 or len(numbers) != 4 or not all(abs(value) <= _MAXIMUM_PIXELS for value in numbers):
        return f"has a bbox that is not four numbers of pixels, at most {_MAXIMUM_PIXELS:,}"
    left, top, width, height = numbers
    if min(left, top) < -0.5 or min(width, height) <= 0:
        shown = ", ".join(f"{value:g}" for value in numbers)
        return f"has the bbox [{shown}]; it must be [left, top, width, height] in pixels inside the image"
    left, top, right, bottom = max(round(left), 0), max(round(top), 0), round(left + width), round(top + height)
    return (left, top, right, bottom) if left < right and top < bottom else "has a box of less than a pixel"


def _images(place: _Annotations, boxes: Sequence[tuple[str, Box | str]]) -> Iterator[Encoded]:
    last, encoded = None, Encoded()
    for name, box in boxes:
        if isinstance(box, str):
            yield Encoded(problem=box)
            continue
        if name != last:
            last, encoded = name, read_below(place.root, name, place.data)
        yield encoded._replace(box=box)

"""Columns of images and classes: parquet files, and `datasets` of Hugging Face saved on disk (Arrow files).

Both are read by pyarrow alone, a batch of rows at a time; the library `datasets` itself would bring pandas, multiprocessing, a
cache on disk and loading scripts, and nothing that is needed here. An image is stored in its file's form (PNG, JPEG ...): as
bytes, as Hugging Face's struct of "bytes" and "path", or as the path of a file below the data's folder.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from bdjax.datasets.files import free_memory, open_file, read_file, read_json
from bdjax.datasets.records import (
    IMAGE_COLUMNS,
    LABEL_COLUMNS,
    MOST_LETTERS,
    Encoded,
    Part,
    Source,
    by_split,
    check_name,
    choose_column,
    class_too_long,
    files_without_images,
)
from bdjax.datasets.validation import ReadOptions, one_line
from bdjax.errors import InputError
from bdjax.extras import pyarrow
from bdjax.types import Unread

STATE, SPLITS = "state.json", "dataset_dict.json"
"""Files of a dataset on disk."""
_MAXIMUM_JSON, _MAXIMUM_IMAGE = 1 << 26, 1 << 28
_ROWS_AT_ONCE, _BUFFER = 256, 1 << 20
_BYTES_OF_A_LETTER = 4
"""at most, in UTF-8"""
_ROW_BYTES = 150
"""What the name and the class of a row take in memory."""
_BATCH_BYTES = 1 << 29
"""What a batch of rows of a parquet file may take in memory."""
_VALUES_AS_THEY_ARE = {"PLAIN", "RLE", "BIT_PACKED"}
"""Encodings of parquet that do not make one stored value the content of many rows."""


class _Table(NamedTuple):
    """An open file of columns."""

    name: str
    """relative to the data's folder"""
    schema: Any
    batches: Callable[[Sequence[str]], Iterator[Any]]
    """names of columns -> record batches with them"""
    num_rows: int = 0
    """as the file says; 0 if only its batches say so"""


def holds_parquet(path: Path) -> bool:
    """Whether a path is a parquet file, or a folder with some and without images."""
    return path.suffix == ".parquet" if path.is_file() else bool(files_without_images(path, (".parquet",)))


def holds_arrow(path: Path) -> bool:
    """Whether a path is a folder that `Dataset.save_to_disk` or `DatasetDict.save_to_disk` has written."""
    return path.is_dir() and ((path / STATE).is_file() or (path / SPLITS).is_file())


def find_parquet(path: Path, options: ReadOptions) -> Source:
    """The rows of a parquet file, or of a folder of them, whose names say which are for testing.

    Raises:
        InputError: A file is damaged or lacks a column, or pyarrow is not installed.
    """
    if path.is_file():
        return _find(path, path.parent, [("", [_parquet(path, path.name)])], options, [])
    parts, unread = by_split(path, files_without_images(path, (".parquet",)))
    tables = [(title, [_parquet(path / name, name) for name in names]) for title, names in parts]
    return _find(path, path, tables, options, unread)


def find_arrow(path: Path, options: ReadOptions) -> Source:
    """The rows of a dataset of Hugging Face on disk.

    Raises:
        InputError: A file is missing, damaged or lacks a column, or pyarrow is not installed.
    """
    if not (path / SPLITS).is_file():
        return _find(path, path, [("", _arrow_tables(path, ""))], options, [])
    splits = _read_json(path / SPLITS).get("splits")
    if not isinstance(splits, list) or not all(isinstance(name, str) and name for name in splits) or not splits:
        raise InputError(f"{path / SPLITS}: lists no splits; a dataset saved by `save_to_disk` is needed")
    _check_differ(path / SPLITS, splits)
    for name in splits:
        if "/" in check_name(path / SPLITS, name):
            raise InputError(f"{path / SPLITS}: names the split {name!r}; names of folders beside it are needed")
    # A split is a folder, whose name says what it is for.
    parts, unread = by_split(path, [f"{name}/" for name in splits])
    tables = [(title, [table for name in names for table in _arrow_tables(path, name)]) for title, names in parts]
    return _find(path, path, tables, options, unread)


# ---- Files -----------------------------------------------------------------------------------------------------------


@contextmanager
def _intact(path: Path, what: str) -> Iterator[None]:
    try:
        yield
    except InputError:
        raise
    except MemoryError as error:
        raise InputError(f"{path}: a batch of {_ROWS_AT_ONCE} rows does not fit into the free memory") from error
    except Exception as error:  # pyarrow raises several kinds on a damaged file
        raise InputError(f"{path}: is not an intact {what} ({one_line(error)[:150]})") from error


def _parquet(path: Path, name: str) -> _Table:
    module = pyarrow()
    open_file(path, 1 << 62, "").close()  # a regular file
    with _intact(path, "parquet file"):
        # Buffered: otherwise the images of a whole group of rows would be in memory.
        file = module.parquet.ParquetFile(path, buffer_size=_BUFFER)

    def batches(columns: Sequence[str]) -> Iterator[Any]:
        with _intact(path, "parquet file"):
            for batch in file.iter_batches(_rows_at_once(file, columns), columns=list(columns), use_threads=False):
                batch.validate(full=True)
                yield batch

    return _Table(name, file.schema_arrow, batches, file.metadata.num_rows)


def _rows_at_once(file: Any, columns: Sequence[str]) -> int:
    """The rows of a batch: fewer where a stored value, which may be as large as its chunk, may be the content of each row."""
    chosen = [
        number
        for number in range(len(file.schema))
        if (path := file.schema.column(number).path) in columns
        or path.startswith(tuple(f"{name}." for name in columns))
    ]
    largest = 1
    for group in map(file.metadata.row_group, range(file.metadata.num_row_groups)):
        chunks = [group.column(number) for number in chosen]
        sizes = [
            chunk.total_uncompressed_size for chunk in chunks if not _VALUES_AS_THEY_ARE.issuperset(chunk.encodings)
        ]
        largest = max(largest, sum(sizes))
    return max(min(_BATCH_BYTES // largest, _ROWS_AT_ONCE), 1)


def _arrow_tables(folder: Path, below: str) -> list[_Table]:
    """The Arrow files of a split, in the order of its state."""
    state = _read_json(folder / below / STATE)
    listed = state.get("_data_files")
    names = [entry.get("filename") for entry in listed if isinstance(entry, dict)] if isinstance(listed, list) else []
    if not names or not all(isinstance(name, str) for name in names):
        raise InputError(f"{folder / below / STATE}: lists no data files; a dataset saved by `save_to_disk` is needed")
    _check_differ(folder / below / STATE, names)
    if state.get("_indices_data_files") or state.get("_indices_files"):
        raise InputError(
            f"{folder / below / STATE}: has a list of selected rows beside its data; save it with `flatten_indices()`"
        )
    return [_arrow(folder / below / check_name(folder / below / STATE, name), below + name) for name in names]


def _arrow(path: Path, name: str) -> _Table:
    module = pyarrow()
    open_file(path, 1 << 62, "").close()
    what = "Arrow file"

    def opened() -> tuple[Any, Iterator[Any]]:
        """The schema, and the record batches."""
        try:
            reader = module.ipc.open_stream(module.memory_map(str(path)))
            return reader.schema, reader
        except module.ArrowInvalid:
            reader = module.ipc.open_file(module.memory_map(str(path)))
            return reader.schema, map(reader.get_batch, range(reader.num_record_batches))

    with _intact(path, what):
        schema, _ = opened()

    def batches(columns: Sequence[str]) -> Iterator[Any]:
        with _intact(path, what):
            for batch in opened()[1]:
                chosen = batch.select(list(columns))
                chosen.validate(full=True)  # otherwise a wrong offset in the file would be an address outside of it
                yield from (chosen.slice(start, _ROWS_AT_ONCE) for start in range(0, len(chosen), _ROWS_AT_ONCE))

    return _Table(name, schema, batches)


def _check_differ(file: Path, names: Sequence[str]) -> None:
    repeated = [name for name, count in Counter(str(PurePosixPath(name)) for name in names).items() if count > 1]
    if repeated:
        raise InputError(f"{file}: lists {repeated[0][:100]!r} twice; each name once is needed")


def _read_json(path: Path) -> Mapping[str, Any]:
    _, value = read_json(path, _MAXIMUM_JSON, "descriptions of datasets")
    if not isinstance(value, dict):
        raise InputError(f"{path}: is not the description of a dataset")
    return value


# ---- Columns ---------------------------------------------------------------------------------------------------------


def _find(
    path: Path, root: Path, tables: Sequence[tuple[str, list[_Table]]], options: ReadOptions, unread: Sequence[Unread]
) -> Source:
    parts, named = [], []
    free, count = free_memory(), 0
    _check_room(path, sum(table.num_rows for _, of_part in tables for table in of_part), free)
    for title, of_part in tables:
        labels: list[Any] = []
        known: dict[Any, Any] = {"": None}
        names: list[str] = []
        readers = []
        for table in of_part:
            where = path if path.is_file() else path / table.name
            columns = list(table.schema.names)
            image = choose_column(where, columns, options.image_column, IMAGE_COLUMNS, "--image-column", "the images")
            label = choose_column(where, columns, options.label_column, LABEL_COLUMNS, "--label-column", "the classes")
            for column in (image, label):
                if columns.count(column) > 1:
                    raise InputError(f"{where}: has two columns {column!r}; names must differ")
            _check_label_type(where, label, table.schema.field(label).type)
            kind = _image_kind(where, image, table.schema.field(image).type)
            before = len(labels)
            for batch in table.batches([label]):
                count += len(batch)
                _check_room(path, count, free)
                _check_letters(where, batch.column(0))
                # One object for each class, not for each row.
                labels += [known.setdefault(value, value) for value in batch.column(0).to_pylist()]
            names += [f"{table.name}#{row}" for row in range(len(labels) - before)]
            named.append(_class_names(table.schema, label))
            readers.append(partial(_images, table, image, kind, root))
        parts.append(Part(title, labels, names, partial(_in_turn, readers)))
    if not parts or not parts[0].labels:
        raise InputError(f"{path}: has no rows")
    if any(other != named[0] for other in named):
        raise InputError(f"{path}: its files give different names to the classes; one list of names is needed")
    return Source(tuple(parts), named[0], tuple(unread))


def _in_turn(readers: Sequence[Callable[[], Iterator[Encoded]]]) -> Iterator[Encoded]:
    for read in readers:
        yield from read()


def _check_room(path: Path, count: int, free: int) -> None:
    if count * _ROW_BYTES > free:
        raise InputError(
            f"{path}: has {count:,} rows or more, whose names and classes take {count * _ROW_BYTES / 2**30:,.1f} GiB, and "
            f"{free / 2**30:,.1f} GiB of memory are free; use fewer rows"
        )


def _check_letters(where: object, values: Any) -> None:
    """Refuses classes that are too long before they are objects of Python, one for each row."""
    import pyarrow.compute

    types = pyarrow.types
    if types.is_dictionary(values.type):
        values = values.dictionary
    if types.is_string(values.type) or types.is_large_string(values.type):
        longest = pyarrow.compute.max(pyarrow.compute.binary_length(values)).as_py() or 0
        if longest > MOST_LETTERS * _BYTES_OF_A_LETTER:
            is_longest = pyarrow.compute.equal(pyarrow.compute.binary_length(values), longest)
            raise class_too_long(where, values.filter(is_longest)[0].as_py())


def _check_label_type(where: object, column: str, kind: Any) -> None:
    types = pyarrow().types
    if types.is_dictionary(kind):
        kind = kind.value_type
    if not (types.is_integer(kind) or types.is_string(kind) or types.is_large_string(kind)):
        raise InputError(
            f"{where}: column {column!r} with the classes has type {one_line(kind)[:60]}; text or whole numbers are needed; "
            "--label-column=NAME names another"
        )


def _image_kind(where: object, column: str, kind: Any) -> str:
    types = pyarrow().types
    if types.is_struct(kind) and "bytes" in [kind.field(number).name for number in range(kind.num_fields)]:
        return "struct"
    if types.is_binary(kind) or types.is_large_binary(kind):
        return "bytes"
    if types.is_string(kind) or types.is_large_string(kind):
        return "path"
    raise InputError(
        f"{where}: column {column!r} with the images has type {one_line(kind)[:60]}; image files as bytes, Hugging Face's "
        "image type, or paths are needed; --image-column=NAME names another"
    )


def _class_names(schema: Any, column: str) -> tuple[str, ...]:
    """The names of a column of whole numbers of Hugging Face's type ClassLabel; () for others."""
    types, kind = pyarrow().types, schema.field(column).type
    if not types.is_integer(kind.value_type if types.is_dictionary(kind) else kind):
        return ()
    try:
        features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
        feature = features[column]
        names = feature["names"] if feature["_type"] == "ClassLabel" else []
    except (ValueError, KeyError, TypeError, RecursionError):
        return ()
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        return ()
    return tuple(names)


def _images(table: _Table, column: str, kind: str, root: Path) -> Iterator[Encoded]:
    for batch in table.batches([column]):
        for value in batch.column(0):
            yield _encoded(value.as_py(), kind, root)


def _encoded(value: Any, kind: str, root: Path) -> Encoded:
    path = None
    if kind == "struct" and value is not None:
        value, path = value.get("bytes"), value.get("path")
    elif kind == "path":
        value, path = None, value
    if value is not None:
        return Encoded(value)
    if not isinstance(path, str) or not path:
        return Encoded(problem="has no image")
    return read_below(root, path)


def read_below(root: Path, name: str, data: Path | None = None) -> Encoded:
    """The content of a file below a folder, or why it cannot be read; links that lead out of the data are not followed.

    Args:
        root: The folder that the name is relative to.
        name: Of the file.
        data: The folder with the data, which the file must be in; `root` by default.
    """
    try:
        check_name("it", name)
        path = (root / name).resolve()
        if not path.is_relative_to((data or root).resolve()):
            return Encoded(problem=f"names {name[:100]!r}, which is a link that leads out of the data")
        return Encoded(read_file(path, _MAXIMUM_IMAGE, "images"))
    except InputError as error:
        text = str(error).removeprefix("it: ").removeprefix(f"{(root / name).resolve()}: ")
        return Encoded(problem=text if text.startswith("names") else f"names {name[:100]!r}, which {text}")
    except (OSError, RuntimeError, ValueError) as error:
        return Encoded(problem=f"names {name[:100]!r}, which cannot be read ({one_line(error)[:100]})")

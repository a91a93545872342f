"""An audit of one's own rows as files: which rows to leave out, what the triggers look like, a cleaned copy, the report.

In the run folder:

    report.html, table.md, results.json, timings.json
    flagged.csv, rows.csv, kept.csv       rows that are flagged, all rows, the rest
    triggers/class-3-trigger.png          the pattern, transparent where there is none; -mask.png; -example-1.png
    cleaned.npz                           the rows that are not flagged, for `bdjax.datasets.load_suspect`
    cleaned/cat/1.png                     or copies of their files, if asked for

Whatever lies below the user's own folder is read only, and links out of it are not followed.
"""

import csv
import filecmp
import io
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from bdjax.defenses.vbd import Analysis
from bdjax.defenses.vbd_patterns import VBDSettings
from bdjax.errors import InputError
from bdjax.reporting import audit_results as numbers
from bdjax.reporting import plots, report, tables
from bdjax.reporting.detection_plots import outline
from bdjax.reporting.report import Figure, Section, Verdict, timings_table
from bdjax.reporting.sections import most_suspicious
from bdjax.run.folder import RunFolder, describe_environment
from bdjax.types import Dataset, PoisonedDataset

LEAST_SIDE = 256
"""Pixels of the longer side that pictures are enlarged to at least."""
EXAMPLES = 3
"""Flagged rows of a class that are shown with their malicious pixels outlined."""
MOST_CLASSES = 8
"""Of how many classes the report draws triggers, examples and histograms; the folder triggers/ has all."""
PICTURES, PER_LINE = 24, 6
"""Suspicious rows that the report shows."""
MOST_REASONS = 5
"""Files that were not copied, named in the report."""
_GREY = 0.5
"""What transparent pixels are drawn on (figure 5)."""


class Copied(NamedTuple):
    """What `copy_files` did."""

    count: int  # files that are below cleaned/ now
    left_out: list[dict[str, str]]  # "file" and "why"
    strangers: list[str]  # files below cleaned/ that are no copy of a kept row


def write(
    folder: RunFolder,
    settings: Mapping[str, Any],
    dataset: Dataset,
    analysis: Analysis,
    vbd_settings: VBDSettings,
    timings: Mapping[str, float],
    reproduce: str,
    *,
    source_folder: Path | None,
    copy_files: bool,
) -> dict[str, Any]:
    """Write all that the module lists. Only the primary process may call this.

    Args:
        folder: the open run.
        settings: every field of the configuration.
        dataset: the rows.
        analysis: of them: M = 1.
        vbd_settings: that it was made with.
        timings: seconds for each stage.
        reproduce: the command.
        source_folder: what `dataset.files` is relative to; None if those files cannot be read one by one.
        copy_files: whether to copy the files that are not flagged. Rows without files always come as cleaned.npz.

    Returns:
        `audit_results.summarise`, and under "cleaned" what the cleaned copy is; also the content of results.json.

    Raises:
        InputError: a file cannot be written.
    """
    results = numbers.summarise(dataset, analysis, vbd_settings)
    flags, scores = analysis.flags[0], analysis.scores[0]
    write_rows(folder, dataset, flags, scores)
    write_triggers(folder, dataset, analysis)
    results["cleaned"] = write_cleaned(folder, dataset, ~flags, source_folder if copy_files else None)
    folder.write_json("results.json", results)
    folder.write_json("timings.json", {"seconds": dict(timings)})

    evidence, networks = numbers.evidence_table(results), numbers.networks_table(results)
    truth = numbers.truth_table(results)
    every = [evidence, *([truth] if truth else []), networks]
    folder.write_text("table.md", "\n\n".join(map(tables.to_markdown, every)) + "\n")
    sections = [
        Section("What to do next", "\n\n".join(next_steps(results))),
        Section("Evidence", "", (evidence, networks)),
    ]
    if truth:
        sections.append(Section("Against the truth", "", (truth,)))
    for title, text, figures in (
        ("Triggers", "", trigger_figures(folder, dataset, analysis, results)),
        ("Examples", "", example_figures(folder, dataset, analysis, results)),
        ("Scores", "", score_figures(folder, dataset, analysis, results)),
        ("The most suspicious rows", "", suspicious_figures(folder, dataset, analysis)),
    ):
        if figures:
            sections.append(Section(title, text, (), tuple(figures)))
    sections.append(Section("What to keep in mind", "\n\n".join(results["caveats"])))
    page = report.Report(
        title=f"Audit of {tables.printable(dataset.name)}",
        verdict=Verdict(**results["verdict"]),
        key_numbers=_key_numbers(results),
        sections=tuple(sections),
        settings={**settings, "VBD": results["settings"]},
        timings=timings_table(timings),
        reproduce=reproduce,
        provenance={"rows": dataset.source, **describe_environment()},
    )
    folder.write_text("report.html", report.render(page))
    return results


def _key_numbers(results: Mapping[str, Any]) -> dict[str, str]:
    certain, weak = (len(numbers.found_classes(results, each)) for each in (numbers.TRIGGER, numbers.WEAK))
    shown = {
        "rows": f"{results['rows']:,}",
        "rows flagged": f"{results['flagged']:,} ({100 * results['flagged_share']:.1f} %)",
        "classes with a trigger": f"{certain:,} of {len(results['classes']):,}",
    }
    if weak:
        shown["with weak evidence"] = f"{weak:,}"
    measured = results["detection"][0] if results["detection"] else {}
    return shown | {name: f"{measured[name]:.3f}" for name in ("precision", "recall") if measured.get(name) is not None}


def next_steps(results: Mapping[str, Any]) -> list[str]:
    """What the owner of the rows can do now, in paragraphs."""
    level, cleaned = results["verdict"]["level"], results["cleaned"]
    told = []
    if level == "attacked":
        told.append(
            "Compare the triggers and the examples below with your own pictures. If they are nothing that belongs there, leave "
            "out the rows in flagged.csv and train again from the start. Do not use a model that was trained on all of these "
            "rows, and find out where the flagged ones came from."
        )
    elif numbers.found_classes(results) and results["flagged"]:
        told.append(
            "Look at the triggers below and at the rows in flagged.csv before you decide. Leaving out clean rows costs "
            "a little accuracy; training on poisoned ones costs control of the model."
        )
    elif numbers.found_classes(results):
        told.append(
            "Look at the triggers below. If they are nothing that belongs on your pictures, look through the rows of these "
            "classes: rows.csv has them in the order of their scores, though no detector was sure enough to flag any."
        )
    elif level == "warning":
        told.append("Try again with more rows of each class, or with other networks.")
    else:
        told.append(
            "There is nothing to leave out. A detector that works in another way may see what this one does not."
        )
    if cleaned["kind"] == "npz":
        told.append(
            f"cleaned.npz has the {cleaned['rows']:,} rows that are not flagged: images, labels, and row, the number that each "
            "had before."
        )
    elif cleaned["kind"] == "folder":
        told.append(
            f"cleaned/ has copies of {cleaned['copied']:,} of the {cleaned['rows']:,} files that are not flagged."
        )
        told += _not_copied(cleaned)
    emptied = [one for one in results["classes"] if one["rows"] and one["flagged"] == one["rows"]]
    if emptied:
        names = ", ".join(map(numbers.title_of, emptied[:MOST_REASONS])) + (" ..." if emptied[MOST_REASONS:] else "")
        told.append(f"Every row is flagged of {names}: without them the class is gone. Look at them first.")
    if results["flagged"]:
        text = "flagged.csv lists the flagged rows, the most suspicious first; kept.csv all others; rows.csv every row."
        told.append(text)
    return told


def _not_copied(cleaned: Mapping[str, Any]) -> list[str]:
    told = []
    for names, text in (
        ([f"{one['file']} ({one['why']})" for one in cleaned["left_out"]], "Not copied"),
        (cleaned["strangers"], "Files below cleaned/ that this run did not put there"),
    ):
        if names:
            shown = "; ".join(map(tables.printable, names[:MOST_REASONS]))
            more = f"; and {len(names) - MOST_REASONS:,} more, in results.json" if len(names) > MOST_REASONS else ""
            told.append(f"{text}: {shown}{more}.")
    return told


# ---- Rows -----------------------------------------------------------------------------------------------------------


def write_rows(folder: RunFolder, dataset: Dataset, flags: np.ndarray, scores: np.ndarray) -> None:
    """Write flagged.csv, rows.csv and kept.csv.

    Args:
        folder: the open run.
        dataset: the n rows.
        flags: bool [n].
        scores: float [n].
    """
    order = most_suspicious(flags, scores, len(dataset))
    # Floats have more digits than mean anything.
    rounded = {"score": [float(f"{score:.6g}") for score in scores]}
    flagged = {"flagged": flags.astype(int).tolist()}
    files = {
        "flagged.csv": rows_csv(dataset, order[flags[order]], rounded),
        "rows.csv": rows_csv(dataset, order, rounded | flagged),
        "kept.csv": rows_csv(dataset, np.flatnonzero(~flags), {}),
    }
    for name, text in files.items():
        # A file name that is not UTF-8 reaches us with lone surrogates.
        folder.write_bytes(name, text.encode("utf-8", "backslashreplace"))


def rows_csv(dataset: Dataset, rows: np.ndarray, columns: Mapping[str, Sequence[Any]]) -> str:
    """A line for each of some rows: its number from 0, its file if it has one, its class, and columns of one value a row."""
    names, files = numbers.names_of(dataset), dataset.files
    text = io.StringIO()
    # Texts are quoted always: this writer does not see that a carriage return needs it.
    writer = csv.writer(text, quoting=csv.QUOTE_NONNUMERIC, lineterminator="\n")
    writer.writerow(["row", *(["file"] if files else []), "class", "class_name", *columns])
    for row in map(int, rows):
        label = int(dataset.labels[row])
        own = [values[row] for values in columns.values()]
        writer.writerow([row, *([files[row]] if files else []), label, names[label], *own])
    return text.getvalue()


# ---- A cleaned copy -------------------------------------------------------------------------------------------------


def write_cleaned(folder: RunFolder, dataset: Dataset, kept: np.ndarray, source_folder: Path | None) -> dict[str, Any]:
    """Write cleaned.npz for rows without files, or copy files below cleaned/.

    Args:
        folder: the open run.
        dataset: the n rows.
        kept: bool [n].
        source_folder: where the files of rows are copied from; None to copy none.

    Returns:
        "kind": "npz", "folder" or None; the number of kept "rows"; of a folder also what `Copied` says.

    Raises:
        InputError: a file cannot be written.
    """
    rows = np.flatnonzero(kept)
    cleaned = {"kind": None, "rows": len(rows)}
    if not len(rows):
        return cleaned
    if not dataset.files:
        write_npz(folder, dataset, rows)
        return cleaned | {"kind": "npz"}
    if source_folder is None:
        return cleaned
    copied = copy_files(folder, dataset, rows, source_folder)
    told = {"copied": copied.count, "left_out": copied.left_out, "strangers": copied.strangers}
    return cleaned | {"kind": "folder"} | told


def write_npz(folder: RunFolder, dataset: Dataset, rows: np.ndarray) -> None:
    """Write cleaned.npz: images, labels and num_classes of some rows, "row" their numbers, and the truth if it is known."""
    names = ["images", "labels"]
    if isinstance(dataset, PoisonedDataset):
        names += ["is_poisoned", "original_labels", "is_cover"]
    arrays = {name: getattr(dataset, name)[rows] for name in names}
    path, temporary = folder.file("cleaned.npz"), folder.file(".cleaned.npz.tmp")
    try:
        with open(temporary, "wb") as file:  # not in memory: there may be gigabytes
            np.savez_compressed(file, **arrays, row=rows.astype(np.int32), num_classes=dataset.num_classes)
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise InputError(f"{path}: cannot be written ({error.strerror or error})") from error


def copy_files(folder: RunFolder, dataset: Dataset, rows: np.ndarray, source_folder: Path) -> Copied:
    """Copy the files of some rows below cleaned/, into a folder for each class.

    Nothing is overwritten: a file that is there already counts as copied if it has the same content.

    Args:
        folder: the open run.
        dataset: the rows, with files.
        rows: int [k].
        source_folder: what the files are relative to.

    Raises:
        InputError: a file cannot be written.
    """
    root = source_folder.resolve()
    copied, left_out = set(), []
    for row in map(int, rows):
        name = dataset.files[row]
        source, why = _source_of(root, name)
        if not why:
            label = dataset.class_names[dataset.labels[row]] if dataset.class_names else ""
            target, why = _copy(folder, source, _below_class(PurePosixPath(name), label))
        if why:
            left_out.append({"file": name, "why": why})
        else:
            copied.add(target)
    there = [Path(place, name) for place, _, files in os.walk(folder.path / "cleaned") for name in files]
    strangers = sorted(str(path.relative_to(folder.path)) for path in there if path.resolve() not in copied)
    return Copied(len(copied), left_out, strangers)


def _source_of(root: Path, name: str) -> tuple[Path | None, str]:
    """The file that a row came from, or why there is none to copy."""
    relative = PurePosixPath(name)
    if relative.is_absolute() or ".." in relative.parts:
        return None, "leads out of the folder"
    try:
        path = (root / relative).resolve(strict=True)
    except (OSError, RuntimeError):  # a ring of links
        return None, "is not there any more"
    if not path.is_relative_to(root):
        return None, "is a link that leads out of the folder"
    return (path, "") if path.is_file() else (None, "is no file")


def _below_class(name: PurePosixPath, class_name: str) -> PurePosixPath:
    """ "train/cat/1.png" of the class cat -> "cat/1.png"; as it is where no folder is called like the class."""
    places = [place for place, part in enumerate(name.parts[:-1]) if part == class_name]
    return PurePosixPath(*name.parts[places[-1] :]) if places else name


def _copy(folder: RunFolder, source: Path, name: PurePosixPath) -> tuple[Path, str]:
    """Copy a file to cleaned/name: its path, and why it was not copied if it was not."""
    try:
        target = folder.file(f"cleaned/{name}")
    except ValueError:  # somebody's link lies there
        return Path(), "would be copied to outside the run folder"
    temporary = folder.file(".copying.tmp")
    try:
        if os.path.lexists(target):
            is_same = target.is_file() and filecmp.cmp(source, target, shallow=False)
            return target, "" if is_same else "another file of this name is there already"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, temporary)
        os.replace(temporary, target)  # an interrupted run leaves no half of a file under its name
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise InputError(f"{target}: cannot be copied there ({error.strerror or error})") from error
    return target, ""


# ---- Pictures -------------------------------------------------------------------------------------------------------


def write_triggers(folder: RunFolder, dataset: Dataset, analysis: Analysis) -> None:
    """Write the pictures below triggers/, for each class with a pattern."""
    scale = -(-LEAST_SIDE // max(dataset.image_shape[:2]))
    for number in map(int, np.flatnonzero(analysis.is_poisoned_class[0])):
        mask = analysis.masks[0, number]
        opacity = (255 * mask).astype(np.uint8)
        pictures = {"trigger": _rgba(analysis.patterns[0, number], opacity), "mask": opacity}
        for place, row in enumerate(example_rows(dataset, analysis, number)):
            pictures[f"example-{place + 1}"] = _outlined(dataset.images[row], mask, scale)
        for name, pixels in pictures.items():
            large = pixels if name.startswith("example") else enlarge(pixels, scale)
            folder.write_bytes(f"triggers/class-{number}-{name}.png", _png(large))


def example_rows(dataset: Dataset, analysis: Analysis, number: int) -> np.ndarray:
    """Flagged rows of a class, the highest scores first: int [at most `EXAMPLES`]."""
    rows = np.flatnonzero(analysis.flags[0] & (dataset.labels == number))
    return rows[np.argsort(-analysis.scores[0, rows], kind="stable")][:EXAMPLES]


def enlarge(pixels: np.ndarray, scale: int) -> np.ndarray:
    """Make a square of so many pixels of each: any dtype [H, W, ...] -> [H * scale, W * scale, ...]."""
    return np.repeat(np.repeat(pixels, scale, axis=0), scale, axis=1)


def _outlined(image: np.ndarray, mask: np.ndarray, scale: int) -> np.ndarray:
    """`outline`, with a line of two pixels where one would be too thin to see and there is room for two."""
    factor = 2 if scale in range(6, 16, 2) else 1
    return enlarge(outline(image, mask, scale // factor), factor)


def _rgba(pattern: np.ndarray, opacity: np.ndarray) -> np.ndarray:
    colours = np.rint(255 * np.clip(np.broadcast_to(pattern, (*opacity.shape, 3)), 0, 1)).astype(np.uint8)
    return np.concatenate([colours, opacity[..., None]], axis=-1)


def _png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "png")
    return buffer.getvalue()


def _cut(shown: Sequence[Any]) -> str:
    return f" {MOST_CLASSES} of {len(shown)} classes." if len(shown) > MOST_CLASSES else ""


def trigger_figures(
    folder: RunFolder, dataset: Dataset, analysis: Analysis, results: Mapping[str, Any]
) -> list[Figure]:
    """Pattern and mask of each class that has one, two classes to a line."""
    found = numbers.found_classes(results)
    if not found:
        return []
    scale = _drawn_scale(dataset, 256)
    images, captions = [], []
    for place, one in enumerate(found[:MOST_CLASSES]):
        if place % 2 == 0:
            images.append([])
            captions.append([])
        mask = analysis.masks[0, one["class"]]
        weak = ", weak" if one["finding"] == numbers.WEAK else ""
        trigger = np.where(mask[..., None], analysis.patterns[0, one["class"]], _GREY)
        images[-1] += [enlarge(each, scale) for each in (trigger, mask[..., None])]
        captions[-1] += [f"{numbers.title_of(one)}: trigger{weak}", f"mask: {one['mask_pixels']:,} of {mask.size:,}"]
    path = plots.save(plots.image_grid(images, (), (), "", captions=captions), folder.file("triggers.png"))
    caption = (
        "The extracted triggers, on grey where they are transparent, and their masks. Colours are the mean of the rows that "
        "the network is surest of, so those of a trigger that was blended in are washed out." + _cut(found)
    )
    return [Figure(path, caption, "The extracted trigger of each suspicious class and its mask.")]


def example_figures(
    folder: RunFolder, dataset: Dataset, analysis: Analysis, results: Mapping[str, Any]
) -> list[Figure]:
    """Flagged rows of each class beside themselves with the malicious pixels outlined."""
    found = [one for one in numbers.found_classes(results) if one["flagged"]]
    if not found:
        return []
    scale = _drawn_scale(dataset, 192)
    images, captions = [], []
    for one in found[:MOST_CLASSES]:
        rows = example_rows(dataset, analysis, one["class"])
        pairs = [
            [
                enlarge(dataset.images[row], scale),
                _outlined(dataset.images[row], analysis.masks[0, one["class"]], scale),
            ]
            for row in rows
        ]
        images.append([image.astype(np.float32) / 255 for pair in pairs for image in pair])
        captions.append(
            [text for row in rows for text in (_row_name(dataset, row), f"score {analysis.scores[0, row]:.2f}")]
        )
    names = [numbers.title_of(one) for one in found[:MOST_CLASSES]]
    path = plots.save(plots.image_grid(images, names, (), "", captions=captions), folder.file("examples.png"))
    caption = "Flagged rows, and the same rows with the pixels of the trigger outlined in red." + _cut(found)
    return [Figure(path, caption, "Flagged rows with the pixels of the trigger outlined.")]


def score_figures(folder: RunFolder, dataset: Dataset, analysis: Analysis, results: Mapping[str, Any]) -> list[Figure]:
    """How the detectors' scores of each suspicious class's rows are spread."""
    found = numbers.found_classes(results)
    if not found:
        return []
    panels = []
    for one in found[:MOST_CLASSES]:
        own = dataset.labels == one["class"]
        truth = dataset.is_poisoned[own] if isinstance(dataset, PoisonedDataset) else None
        panels.append(plots.Scores(numbers.title_of(one), analysis.scores[0, own], truth))
    path = plots.save(plots.score_histograms(panels), folder.file("scores.png"))
    caption = (
        "What the detector of each class says of its rows, from 0 to 1. Rows from 0.5 on are flagged if the detector is used. "
        "Two separate heaps are clear evidence; a single one is not." + _cut(found)
    )
    return [Figure(path, caption, "Histograms of the scores of each suspicious class.")]


def suspicious_figures(folder: RunFolder, dataset: Dataset, analysis: Analysis) -> list[Figure]:
    """The rows to look at first; none if no row is suspicious."""
    flags, scores = analysis.flags[0], analysis.scores[0]
    rows = most_suspicious(flags, scores, PICTURES)
    rows = rows[flags[rows] | (scores[rows] > 0)]
    if not len(rows):
        return []
    lines = [rows[start : start + PER_LINE] for start in range(0, len(rows), PER_LINE)]
    # Digits have classes that are called 0 to 9.
    names = [numbers.class_title(i) if name == str(i) else name for i, name in enumerate(numbers.names_of(dataset))]
    scale = _drawn_scale(dataset, 176)
    images = [[enlarge(dataset.images[row], scale).astype(np.float32) / 255 for row in line] for line in lines]
    captions = [[f"{_row_name(dataset, row)}: {names[dataset.labels[row]]}" for row in line] for line in lines]
    path = plots.save(plots.image_grid(images, (), (), "", captions=captions), folder.file("suspicious.png"))
    what = "file" if dataset.files else "number"
    caption = f"Flagged rows first, then others by score; under each its {what} and its class. rows.csv has all."
    return [Figure(path, caption, "The most suspicious rows.")]


def _drawn_scale(dataset: Dataset, side: int) -> int:
    """By how much images are enlarged for a grid, which would draw small ones smaller, and resample lines."""
    return max(1, side // max(dataset.image_shape[:2]))


def _row_name(dataset: Dataset, row: int) -> str:
    return PurePosixPath(dataset.files[row]).name if dataset.files else f"row {int(row)}"

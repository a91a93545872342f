"""Tables and figures that several kinds of report share.

Tables are made from the tree of `bdjax.reporting.results`; where reports differ, they pass other columns. Figures of rows are
made from the comparisons, whose flags, scores and pictures are not in that tree, and show the first seed.

Everywhere, `results` is the tree, `suspect` the noun for what methods run on ("training set", "teacher"), and `method` the noun
for the methods ("defense", "method").
"""

import hashlib
import itertools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from bdjax.evaluation.measure import Comparison, Measured
from bdjax.evaluation.published import find_published
from bdjax.evaluation.suspects import Suspect
from bdjax.metrics import DEFINITIONS, DefenseWord
from bdjax.reporting import plots
from bdjax.reporting import results as schema
from bdjax.reporting.report import Figure, Section
from bdjax.reporting.tables import UNKNOWN, Cell, Table, mean_and_spread
from bdjax.run.folder import RunFolder
from bdjax.run.text import csv_text
from bdjax.types import Dataset

Entry = Mapping[str, Any]
Columns = Mapping[str, Callable[..., Cell]]
"""Header -> function from an entry, or from a cell with its attack and its method, to the value in that column."""
LABELS = {
    **{name: name for name in ("flagged", "precision", "recall")},
    **{"cda": "CDA", "asr": "ASR", "r_acc": "R-ACC", "control_asr": "control ASR", "f1": "F1", "auc": "AUC"},
}
"""Number -> its name in tables."""
OUTCOMES: Mapping[DefenseWord, str] = {
    "removed": "removes {}",
    "removed at a cost": "removes {}, but at a cost of accuracy",
    "weakened": "weakens {}, but does not remove it",
    "kept": "does not remove {}",
    "nothing to remove": "has nothing to remove",
}
ORACLES = ("number of poisons", "attacker's trigger")
"""Inputs that no real defender has."""
PAPERS_DIFFER = (
    "In percent; ours are means over seeds. The papers use other networks, schedules and poison rates, and their success may "
    "count the target class's rows; see the settings for ours. Fail: the paper calls the defense very unstable there, or it "
    "leaves more than 80 %."
)
STUDENTS_DIFFER = (
    "In percent; ours are means over seeds, after the last epoch. The paper's success is probably the highest of all epochs "
    "whose accuracy is within 5 points of the teacher's: that is what its public code prints. Its schedules differ, its tables "
    "give different numbers for the same experiments, its success counts the target class's rows, and it prints the teacher's "
    "numbers once for all attacks. See the settings for our width and schedule."
)
PLAIN_STAGE = "no defense"
"""Name of the stage in which `bdjax.evaluation.suspects.make_defense_input` trains suspects without defense."""
PICTURES_OF_ONE, PICTURES_OF_EACH = 24, 12
"""Number of suspicious rows shown of a single training set, and of each of several."""
MOST_SETS = 12
"""Largest number of training sets with pictures and histograms."""
IMAGES_PER_LINE = 8
"""For a single training set, and for the pictures that a defense found."""
LONGEST_NAME = 100
"""Most bytes of a variant's name in a file name, whose limit is 255."""


def section(
    title: str, tables: Iterable[Table | None], figures: Iterable[Figure] = (), text: str = ""
) -> tuple[Section, ...]:
    """A section of the tables that are not None; no section if there is nothing to show."""
    made = Section(title, text, tuple(table for table in tables if table is not None), tuple(figures))
    return (made,) if made.tables or made.figures else ()


# ---- Tables ---------------------------------------------------------------------------------------------------------


def entry_table(title: str, entries: Iterable[Entry], columns: Columns, notes: str = "") -> Table:
    """A row for each entry of results["attacks"] or results["methods"]."""
    rows = tuple(tuple(column(entry) for column in columns.values()) for entry in entries)
    return Table(title, tuple(columns), rows, notes)


def cell_table(
    title: str, cells: Iterable[tuple[Entry, Entry, Entry]], columns: Columns, notes: str = ""
) -> Table | None:
    """A row for each (cell, attack, method); None if there are no rows."""
    rows = tuple(tuple(column(*row) for column in columns.values()) for row in cells)
    return Table(title, tuple(columns), rows, notes) if rows else None


def number_columns(names: Iterable[str]) -> Columns:
    """For `cell_table`: mean and spread of these numbers."""
    return {LABELS[name]: lambda cell, *_, name=name: schema.number_text(cell, name) for name in names}


def title_columns(attack: str, method: str) -> Columns:
    """For `cell_table`: the titles of attack and method, under these headers."""
    return {attack: lambda _, entry, __: entry["title"], method: lambda _, __, entry: entry["title"]}


def explain(*words: str) -> str:
    """Definitions of words that a table uses, with a leading space."""
    return "".join(f" {word.capitalize()}: {DEFINITIONS[word]}." for word in words)


def comparison_table(
    results: Entry,
    names: Sequence[str],
    first: str,
    notes: str = "",
    *,
    by_method: bool = False,
    has_mean: bool = False,
) -> Table:
    """Attacks × methods, some numbers in each cell: "CDA / ASR".

    Args:
        results: the tree.
        names: the numbers; a cell is unknown if its first number is.
        first: header of the first column, which has the attacks, or with `by_method` the methods.
        notes: further notes, with a leading space.
        by_method: whether rows are methods rather than attacks.
        has_mean: whether to add a row of means over the attacks for which every method has every number.
    """
    attacks, methods = results["attacks"], results["methods"]
    texts, complete = {}, []
    for attack in attacks:
        found = [schema.find(results, attack["attack"], method["method"]) for method in methods]
        means = [[schema.mean_of(cell, name) for name in names] for cell in found]
        texts[attack["attack"]] = [_joined(values) for values in means]
        if not any(None in values for values in means):
            complete.append(means)
    rows = [(attack["title"], *texts[attack["attack"]]) for attack in attacks]
    if by_method:
        rows = [
            (method["title"], *column)
            for method, column in zip(methods, zip(*texts.values(), strict=True), strict=True)
        ]
    styles = [""] * len(rows)
    if has_mean and len(complete) > 1:
        rows.append((f"mean of {len(complete)} attacks", *map(_joined, np.mean(complete, axis=0).tolist())))
        styles.append("ours")
        if len(complete) < len(attacks):
            notes = (
                f" The last row is the mean over the attacks that have {LABELS[names[-1]]} under every defense.{notes}"
            )
    title = " / ".join(LABELS[name] for name in names)
    about = f"{title}, mean over {schema.seeds_text(results)}, {results['test_rows']:,} test rows."
    about += _largest_deviations(results, names) + notes + schema.left_out_text(results)
    header = (first, *(entry["title"] for entry in (attacks if by_method else methods)))
    return Table(title, header, tuple(rows), about, tuple(styles) if has_mean else ())


def _joined(means: Sequence[float | None]) -> str | None:
    return None if means[0] is None else " / ".join(UNKNOWN if value is None else f"{value:.3f}" for value in means)


def _largest_deviations(results: Entry, names: Iterable[str]) -> str:
    if not schema.has_spread(results):
        return " One seed only: small differences mean nothing."
    largest = []
    for name in names:
        deviations = [cell["summary"][name]["standard_deviation"] for cell in results["cells"]]
        if known := [value for value in deviations if value is not None]:
            largest.append(f"{LABELS[name]} {max(known):.3f}")
    widest = f" Largest standard deviation over seeds in any cell: {', '.join(largest)}" if largest else ""
    return f"{widest}; see 'Every number' for that of each cell." if widest else ""


def needs_table(results: Entry, before: Columns, needs: Mapping[str, str], after: Columns, notes: str = "") -> Table:
    """What each method receives: a row for each method, with the columns `before` and `after` around those of the needs.

    Args:
        needs: a need -> its header; a need that no method has gets no column.
    """
    shown = {
        need: title for need, title in needs.items() if any(need in method["needs"] for method in results["methods"])
    }
    needed = {
        title: lambda method, need=need: "yes" if need in method["needs"] else None for need, title in shown.items()
    }
    if oracles := [need for need in shown if need in ORACLES]:
        notes += f" {' and '.join(oracles).capitalize()}: not available to a real defender."
    return entry_table("What each method receives", results["methods"], {**before, **needed, **after}, notes.strip())


def facts_table(results: Entry, suspect: str = "training set", method: str = "defense") -> Table | None:
    """Numbers that methods report about themselves; None if there are none."""
    rows: list[tuple[Cell, ...]] = []
    for entry in results["methods"]:
        for cell, attack, _ in (row for row in schema.cells(results) if row[2] is entry):
            for name in cell["facts"]:
                values = [row["facts"].get(name) for row in cell["by_seed"]]
                text = mean_and_spread(values)
                if name.startswith("class of") and "class_names" in results and None not in values:
                    text = ", ".join(dict.fromkeys(schema.class_title_of(results, int(value)) for value in values))
                rows.append((entry["title"], attack["title"], name, text))
    return Table(f"What the {method}s report", (method, suspect, "quantity", "value"), tuple(rows)) if rows else None


def published_table(
    results: Entry, dataset: str, suspect: str = "training set", method: str = "defense"
) -> Table | None:
    """Our numbers beside the papers', in percent; None if no paper has any of them.

    Dataset, attack and method must be the same; for students also both networks. No paper suppresses an attack.

    Args:
        results: the tree; with results["teacher"] if it is about students.
        dataset: bdjax's name of it.
    """
    teacher, rows = results.get("teacher"), []
    for cell, attack, entry in schema.cells(results):
        wanted = {"measured": "network", "dataset": dataset, "attack": attack["base"], "method": entry["base"]}
        our_cells = [cell]
        if teacher:
            wanted |= {"measured": "student", "teacher": _network(teacher), "student": _network(entry)}
            our_cells = [schema.find(results, cell["attack"], schema.undefended(results)), cell]
        means = [schema.mean_of(our_cell, name) for our_cell in our_cells for name in ("cda", "asr")]
        numbers = [None if mean is None else 100 * mean for mean in means]
        for found in find_published(**wanted) if not attack["suppression"] else ():
            published = ["fail", "fail"] if found.clean_accuracy is None else [found.clean_accuracy, found.success]
            names = [f"{found.teacher} / {found.student}"] if teacher else []
            published = [found.teacher_accuracy, found.teacher_success, *published] if teacher else published
            pairs = (value for pair in zip(numbers, published, strict=True) for value in pair)
            rows.append((attack["title"], entry["title"], *names, *pairs, found.paper))
    if not rows:
        return None
    names = ("teacher's CDA", "teacher's ASR", "CDA", "ASR") if teacher else ("CDA", "ASR")
    columns = (text for name in names for text in (name, f"paper: {name}"))
    header = (suspect, method, *(["networks"] if teacher else []), *columns, "paper")
    return Table(
        "Comparison with the papers", header, tuple(rows), STUDENTS_DIFFER if teacher else PAPERS_DIFFER, decimals=2
    )


def _network(entry: Entry) -> str:
    return entry["model"].partition(" width ")[0]


def time_table(
    results: Entry,
    seconds: Mapping[str, float],
    is_whole: bool = True,
    suspect: str = "training set",
    method: str = "defense",
) -> Table | None:
    """Seconds of each method for one suspect; None if no method was timed.

    Args:
        seconds: from `seconds_of`.
        is_whole: whether the run was made in one go. Otherwise stages were restored from checkpoints, and ratios mean nothing.
    """
    baseline = seconds.get(schema.undefended(results) or "")
    shown = [entry for entry in results["methods"] if entry["method"] in seconds]
    columns: dict[str, Callable[..., Cell]] = {
        method: lambda entry: entry["title"],
        f"seconds per {suspect}": lambda entry: f"{seconds[entry['method']]:.2f}",
    }
    notes = (
        f"Wall time of this process, including compilation, divided by the number of {suspect}s trained in one call."
    )
    if baseline:
        timed = [entry["method"] for entry in shown if is_whole and entry["base"] != schema.NO_DEFENSE]
        ratios = {name: f"{seconds[name] / baseline:.2f} ×" for name in timed}
        columns["× no defense"] = lambda entry: ratios.get(entry["method"])
        notes += " No defense: plain training, which a defense that starts from the attacked model needs in addition."
    notes += f" Stages that another {method} has already trained take almost no time."
    if not is_whole:
        notes += " This run was resumed: what was restored from checkpoints is not in these seconds."
    return entry_table("Time", shown, columns, notes) if shown else None


# ---- Verdict, key numbers and settings ------------------------------------------------------------------------------


def headline(titles: Sequence[str], words: Sequence[Sequence[DefenseWord | None]], noun: str, clause: str = "") -> str:
    """One sentence on how methods change backdoors.

    Args:
        titles: of the methods.
        words: for each method, the word for every backdoor; None where it was not evaluated.
        noun: plural noun for the methods, such as "defenses".
        clause: a clause after "backdoor" or "backdoors", with a leading space.
    """
    count = len(words[0])
    if len(titles) > 1:
        winners = sum(set(outcomes) == {"removed"} for outcomes in words)
        backdoors = f"all {count} backdoors" if count > 1 else "the backdoor"
        return f"{winners} of {len(titles)} {noun} remove {backdoors}{clause}."
    if count > 1:
        return f"{titles[0]} removes {words[0].count('removed')} of {count} backdoors{clause}."
    (word,) = words[0]
    return f"{titles[0]} {OUTCOMES.get(word, 'was not evaluated on {}').format(f'the backdoor{clause}')}."


def accuracy_text(results: Entry, attack: Entry, methods: Iterable[Entry]) -> str:
    """The results without an ASR: "No attack: no defense has CDA 0.950; ABL has CDA 0.920 and flags 1.0 % of the rows."."""
    texts = []
    for method in methods:
        cell = schema.find(results, attack["attack"], method["method"])
        cda, flagged = schema.mean_of(cell, "cda"), schema.mean_of(cell, "flagged")
        if cda is not None:
            flags = f" and flags {100 * flagged:.1f} % of the rows" if flagged is not None else ""
            texts.append(f"{method['title']} has CDA {cda:.3f}{flags}")
    return f"{attack['title'][:1].upper()}{attack['title'][1:]}: {'; '.join(texts)}."


def key_numbers(
    results: Entry, methods: Mapping[str, str], names: Iterable[str], attacks: Sequence[Entry]
) -> dict[str, str]:
    """Numbers for the top of the page: "mean ASR, LfD" -> "0.012", without those that are unknown for some attack.

    Args:
        methods: a method's name -> its title.
    """
    tiles = {}
    for name in names:
        for method, title in methods.items():
            means = [schema.mean_of(schema.find(results, attack["attack"], method), name) for attack in attacks]
            if means and None not in means:
                tiles[f"mean {LABELS[name]}, {title}"] = f"{np.mean(means):.3f}"
    return tiles


def settings_of(results: Entry, method: str = "defense") -> dict[str, Any]:
    """Groups for the report's list of settings: one for each part of an attack and of a method."""
    groups = {
        f"attack {attack['attack']}" + (f": {part['attack']}" if len(attack["parts"]) > 1 else ""): part["settings"]
        for attack in results["attacks"]
        for part in attack["parts"]
    }
    for entry in results["methods"]:
        parts = entry["settings"] if isinstance(entry["settings"], list) else [entry["settings"]]
        names = entry["base"].split("+") if len(parts) > 1 else [""]
        for number, (name, settings) in enumerate(zip(names, parts, strict=True), start=1):
            groups[f"{method} {entry['method']}" + (f": {number}. {name}" if name else "")] = settings
    return groups


# ---- Figures of the numbers -----------------------------------------------------------------------------------------


def with_asr(results: Entry) -> list[Entry]:
    """The entries of results["attacks"] whose ASR is known under some method."""
    known = {cell["attack"] for cell in results["cells"] if schema.mean_of(cell, "asr") is not None}
    return [attack for attack in results["attacks"] if attack["attack"] in known]


def _means(results: Entry, name: str) -> np.ndarray:
    """[attacks with an ASR, methods], NaN where unknown."""
    cells = [
        [schema.find(results, attack["attack"], method["method"]) for method in results["methods"]]
        for attack in with_asr(results)
    ]
    return np.array([[schema.mean_of(cell, name) for cell in row] for row in cells], np.float64)


def matrix_figure(folder: RunFolder, results: Entry, method: str = "defense") -> Figure:
    """ASR of every attack under every method, into asr.png."""
    rows, columns = ([entry["title"] for entry in entries] for entries in (with_asr(results), results["methods"]))
    return Figure(
        plots.save(plots.matrix(_means(results, "asr"), rows, columns, "", value_label="ASR"), folder.file("asr.png")),
        f"ASR, mean over seeds, of each attack under each {method}.",
        f"A matrix of attack success rates, attacks by {method}s; the numbers are in the table above.",
    )


def trade_off_figure(folder: RunFolder, results: Entry, method: str = "defense") -> Figure:
    """CDA against ASR of every method, into trade-off.png."""
    titles = [entry["title"] for entry in results["methods"]]
    figure = plots.trade_off(titles, _means(results, "cda").T, _means(results, "asr").T)
    return Figure(
        plots.save(figure, folder.file("trade-off.png")),
        f"CDA against ASR after each {method}. Small marks: one attack each, mean over seeds. Large marks: the mean over the "
        f"attacks for which every {method} has both. Best is top left.",
        f"Clean accuracy against attack success of each {method}; the numbers are in the table above.",
    )


# ---- What methods flag, score and find ------------------------------------------------------------------------------


def seconds_of(comparisons: Sequence[Comparison], timings: Mapping[str, float]) -> dict[str, float]:
    """Method -> its seconds for one suspect; for no defense, those of the plain-training stage."""
    measured: dict[str, list[Measured]] = {}
    for comparison in comparisons:
        measured.setdefault(comparison.variant.name, []).extend(comparison.measured)
    seconds = {}
    for name, group in measured.items():
        if group[0].variant.defense.name != schema.NO_DEFENSE:
            seconds[name] = float(np.mean([measurement.seconds for measurement in group]))
        elif PLAIN_STAGE in timings:
            seconds[name] = timings[PLAIN_STAGE] / len(group)
    return seconds


class _Found(NamedTuple):
    """What a method returns for one suspect of the first seed."""

    suspect: Suspect
    flags: np.ndarray | None
    """bool [n]"""
    scores: np.ndarray | None
    """float [n]"""
    pictures: Mapping[str, np.ndarray]
    """kind -> [any number, H, W, C] in [0, 1]"""


def _first_seed(comparisons: Sequence[Comparison]) -> dict[tuple[str, str], list[_Found]]:
    """(name, title) of each method -> what it returns for each suspect of the first seed."""
    groups: dict[tuple[str, str], list[_Found]] = {}
    for variant, result, measured in comparisons:
        found = groups.setdefault((variant.name, variant.title), [])
        for i, measurement in enumerate(measured):
            if measurement.suspect.seed == 0:
                flags, scores = (
                    None if values is None else np.asarray(values[i]) for values in (result.flags, result.scores)
                )
                pictures = {
                    kind: np.asarray(images[i]) for kind, images in result.pictures.items() if images is not None
                }
                found.append(_Found(measurement.suspect, flags, scores, pictures))
    return groups


def file_name(text: str) -> str:
    """A file name for a variant's name: "lfd:alpha=0.5" -> "lfd-alpha=0.5"; long names are cut and stay unique."""
    name = re.sub(r"[^\w.+=-]+", "-", text).strip("-.") or "unnamed"
    if len(name.encode()) <= LONGEST_NAME:
        return name
    start = name.encode()[: LONGEST_NAME - 9].decode(errors="ignore")
    return f"{start}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def write_scores(folder: RunFolder, comparisons: Sequence[Comparison]) -> list[str]:
    """Write scores/<defense>/<training set>.csv, for other tools to sort and remove rows, for the first seed of every defense
    that flags or scores rows; returns the names of the files."""
    written = []
    for (name, _), sets in _first_seed(comparisons).items():
        for suspect, flags, scores, _ in sets:
            if flags is not None or scores is not None:
                written.append(f"scores/{file_name(name)}/{file_name(suspect.attack.name)}.csv")
                folder.write_text(written[-1], scores_csv(suspect, flags, scores))
    return written


def scores_csv(suspect: Suspect, flags: np.ndarray | None, scores: np.ndarray | None) -> str:
    """A line for each training row: its number from 0, its label, score, flag and ground truth (1 or 0).

    Unknown values are left empty.

    Args:
        suspect: the training set.
        flags: bool [n], or None.
        scores: float [n], or None.
    """
    labels = [int(label) for label in suspect.dataset.labels]
    rounded = None if scores is None else [float(f"{score:.6g}") for score in scores]
    bits = [None if values is None else values.astype(int).tolist() for values in (flags, suspect.is_poisoned)]
    columns = [itertools.repeat(None) if values is None else values for values in (labels, rounded, *bits)]
    return csv_text(("row", "label", "score", "flagged", "is_poisoned"), zip(itertools.count(), *columns, strict=False))


def score_figures(folder: RunFolder, comparisons: Sequence[Comparison]) -> list[Figure]:
    """Histograms of the scores on the first seed's training sets, a figure for each defense that scores rows."""
    figures = []
    for (name, title), sets in _first_seed(comparisons).items():
        scored = [finding for finding in sets if finding.scores is not None]
        if scored:
            panels = [
                plots.Scores(schema.set_title(finding.suspect), finding.scores, finding.suspect.is_poisoned)
                for finding in scored
            ]
            caption = (
                f"{title}: scores of the first seed's training rows, as shares of the clean and of the poisoned rows. Cover "
                "rows count as clean. Outliers are in the outermost bars." + _cut(panels)
            )
            figure = plots.score_histograms(panels[:MOST_SETS], title)
            path = plots.save(figure, folder.file(f"scores-{file_name(name)}.png"))
            figures.append(Figure(path, caption, f"Histograms of the scores that {title} gives to training rows."))
    return figures


def _cut(sets: Sequence[Any]) -> str:
    return f" The first {MOST_SETS} of {len(sets)} training sets." if len(sets) > MOST_SETS else ""


def most_suspicious(flags: np.ndarray | None, scores: np.ndarray | None, count: int) -> np.ndarray:
    """The most suspicious rows: flagged before unflagged, then by decreasing score.

    Without scores: a sample of the flagged rows, spread over the set.

    Args:
        flags: bool [n], or None.
        scores: float [n], or None.
        count: the most rows to return.

    Returns:
        int [at most count], row numbers.
    """
    if scores is None:
        rows = np.flatnonzero(flags) if flags is not None else np.zeros(0, int)
        return rows[np.linspace(0, len(rows) - 1, min(count, len(rows))).astype(int)]
    first = np.zeros(len(scores), bool) if flags is None else flags
    return np.lexsort((-np.asarray(scores, np.float64), ~first))[:count]


def suspicious_figures(folder: RunFolder, comparisons: Sequence[Comparison], train: Dataset) -> list[Figure]:
    """The rows of the first seed that each defense suspects most, with their labels and the truth where it is known."""
    figures = []
    for (name, title), found in _first_seed(comparisons).items():
        sets = [finding for finding in found if finding.flags is not None or finding.scores is not None]
        count = PICTURES_OF_ONE if len(sets) == 1 else PICTURES_OF_EACH
        per_line = IMAGES_PER_LINE if len(sets) == 1 else count
        lines = [  # (suspect, whether it is the first line of this suspect, row numbers)
            (finding.suspect, start == 0, rows[start : start + per_line])
            for finding in sets[:MOST_SETS]
            for rows in [most_suspicious(finding.flags, finding.scores, count)]
            for start in range(0, len(rows), per_line)
        ]
        if not lines:
            continue
        images = [[suspect.dataset.images[row].astype(np.float32) / 255 for row in rows] for suspect, _, rows in lines]
        captions = [[_row_caption(suspect, train, row) for row in rows] for suspect, _, rows in lines]
        names = (
            [schema.set_title(suspect) if is_first else "" for suspect, is_first, _ in lines] if len(sets) > 1 else []
        )
        order = "highest scores first" if sets[0].flags is None else "flagged rows first, then by decreasing score"
        order = "a sample of the flagged rows" if sets[0].scores is None else order
        caption = f"{title}: {order}; first seed. Below each row: its label, and whether it is poisoned, if known."
        figure = plots.image_grid(images, names, (), title, captions=captions)
        path = plots.save(figure, folder.file(f"suspicious-{file_name(name)}.png"))
        figures.append(Figure(path, caption + _cut(sets), f"The training rows that {title} suspects most."))
    return figures


def _row_caption(suspect: Suspect, train: Dataset, row: int) -> str:
    label = int(suspect.dataset.labels[row])
    name = train.class_names[label] if train.class_names else str(label)
    truth = "" if suspect.is_poisoned is None else ": poisoned" if suspect.is_poisoned[row] else ": clean"
    return name + truth


def picture_figures(folder: RunFolder, comparisons: Sequence[Comparison]) -> list[Figure]:
    """The pictures in the defenses' results for the first seed: a figure for each kind, a line for each suspect."""
    figures = []
    for (name, title), sets in _first_seed(comparisons).items():
        for kind in dict.fromkeys(kind for finding in sets for kind in finding.pictures):
            shown = [finding for finding in sets if len(finding.pictures.get(kind, ()))]
            if shown:
                images = [list(finding.pictures[kind][:IMAGES_PER_LINE]) for finding in shown[:MOST_SETS]]
                names = [schema.set_title(finding.suspect) for finding in shown[:MOST_SETS]]
                figure = plots.image_grid(images, names, (), f"{title}: {kind}")
                path = plots.save(figure, folder.file(f"found-{file_name(name)}-{file_name(kind)}.png"))
                named = _with_class_titles(kind, shown[0].suspect.dataset)
                caption = f"{title}: {named}. First seed." + _cut(shown)
                figures.append(Figure(path, caption, f"Pictures that {title} found: {named}."))
    return figures


def _with_class_titles(kind: str, dataset: Dataset) -> str:
    """ "patterns of classes 3, 5" -> "patterns of classes 3 (cat), 5 (dog)"; other kinds are unchanged."""
    start, found, numbers = kind.partition(" of classes ")
    if not found or not re.fullmatch(r"\d+(, \d+)*", numbers):
        return kind
    return start + found + ", ".join(dataset.class_title(int(number)) for number in numbers.split(", "))

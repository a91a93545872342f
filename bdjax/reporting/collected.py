"""Results of many runs in one place: tidy rows, tables over them, ranks of the defenses.

A row is one number: of an experiment, a dataset, an attack, a defense and a seed, with the versions and hashes that it depends
on. A cell without a result is a row, too, which says why.
"""

import hashlib
import io
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure

from bdjax import extras
from bdjax.datasets import files
from bdjax.errors import InputError
from bdjax.reporting import plots
from bdjax.reporting.tables import Table, mean_and_spread
from bdjax.run.config import IGNORED
from bdjax.run.folder import CONFIG_FILE

RESULTS_FILE = "results.json"
OF_THE_CELL = ("dataset", "preset", "attack", "attacks", "defenses", "study", "seeds", "seed", "costly_seeds")
OF_THE_ENGINE = ("layout", "lowering", "member_group", "save_models", "save_poisoned", "tensorboard", "loss_gap")
"""Settings that do not make two runs incomparable."""
BETTER = {"cda": max, "asr": min, "f1": max, "auc": max, "precision": max, "recall": max, "r_acc": max}
"""Metric -> whether the largest or the smallest value has rank 1."""
USUAL = ("cda", "asr", "f1")
"""The metrics of tables, where they are known."""
CONFIDENCE = 0.95
RESAMPLES = 2000
_MAXIMUM_BYTES = 1 << 30


class Row(NamedTuple):
    """One number of one run, or a cell without a number."""

    experiment: str
    dataset: str
    preset: str
    setting: str
    """digest of the other settings: rows with the same one are comparable"""
    attack: str
    defense: str
    seed: int | None
    metric: str
    """a name in `metrics.DEFINITIONS`, or "facts." and the name of a number that only this defense reports; empty for a cell
    without a result"""
    value: float | None
    status: str
    """done, not tested, left out, failed, not run"""
    reason: str
    """why there is no result; empty if there is one"""
    run: str
    """the run's folder"""
    bdjax: str
    jax: str
    numpy: str
    python: str
    git_revision: str
    config_sha256: str
    """of the settings, as JSON with sorted keys"""
    results_sha256: str
    """of results.json"""


def find_runs(folder: Path) -> list[Path]:
    """The folders below a folder that hold a finished run, in order; those of several runs in one are all found.

    Raises:
        InputError: there is no such folder.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: is not a folder; give the folder of a grid, of a run, or one that has runs in it")
    found = sorted(path.parent for path in folder.rglob(RESULTS_FILE))
    return [path for path in found if (path / CONFIG_FILE).is_file()]


def read_run(folder: Path) -> list[Row]:
    """The rows of a finished run; none if its results have no cells, as those of a benchmark.

    Raises:
        InputError: a file cannot be read, or is not of a run.
    """
    text, results = read_json(folder / RESULTS_FILE)
    _, record = read_json(folder / CONFIG_FILE)
    if "cells" not in results:
        return []
    try:
        return list(_rows(folder, hashlib.sha256(text).hexdigest(), results, record))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(
            f"{folder}: {RESULTS_FILE} and {CONFIG_FILE} are not those of a run ({type(error).__name__}: {error})"
        ) from None


def read_json(path: Path) -> tuple[bytes, dict[str, Any]]:
    """The bytes of a JSON file, and the object in it.

    Raises:
        InputError: it cannot be read, is not JSON, or is not an object.
    """
    try:
        text, content = files.read_json(path, _MAXIMUM_BYTES, "results", strict=True)
        if not isinstance(content, dict):
            raise InputError(f"{path}: is not a JSON object")
    except InputError as error:
        raise InputError(f"{error}; leave this run out, or run it again") from None
    return text, content


def _rows(folder: Path, results_hash: str, results: Mapping[str, Any], record: Mapping[str, Any]) -> Iterator[Row]:
    config, versions = record["config"], record.get("versions", {})
    empty = Row(
        experiment=str(record["experiment"]),
        dataset=str(config["dataset"]),
        preset=str(config.get("preset", "")),
        setting=digest(config, (*IGNORED, *OF_THE_CELL, *OF_THE_ENGINE))[:8],
        attack="",
        defense="",
        seed=None,
        metric="",
        value=None,
        status="done",
        reason="",
        run=str(folder),
        **{name: str(versions.get(name) or "") for name in ("bdjax", "jax", "numpy", "python")},
        git_revision=str(record.get("git_revision") or ""),
        config_sha256=digest(config),
        results_sha256=results_hash,
    )
    not_tested = {
        (entry["attack"], entry["method"], entry["seed"]): str(entry["reason"])
        for entry in results.get("not_tested", ())
        if entry["reason"]
    }
    for cell in results["cells"]:
        for by_seed in cell["by_seed"]:
            of_cell = empty._replace(attack=str(cell["attack"]), defense=str(cell["method"]), seed=int(by_seed["seed"]))
            reason = not_tested.get((cell["attack"], cell["method"], by_seed["seed"]))
            if reason is not None:
                yield of_cell._replace(status="not tested", reason=reason)
            numbers = {name: by_seed[name] for name in cell["summary"] if name in by_seed}
            numbers |= {f"facts.{name}": by_seed.get("facts", {}).get(name) for name in cell.get("facts", {})}
            for metric, value in numbers.items():
                if value is None and reason is not None:
                    continue
                yield of_cell._replace(metric=metric, value=None if value is None else float(value))
    attacks = [attack["attack"] for attack in results["attacks"]]
    methods = [method["method"] for method in results["methods"]]
    for name, reason in results["left_out"].items():
        # An attack or a defense; its name alone does not say which. Only `attack` leaves out attacks.
        is_defense = record["experiment"] != "attack"
        cells = itertools.product(attacks, [name]) if is_defense else itertools.product([name], methods)
        for attack, defense in cells:
            for seed in results["seeds"]:
                of_cell = empty._replace(attack=str(attack), defense=str(defense), seed=int(seed))
                yield of_cell._replace(status="left out", reason=str(reason))


def without_result(cell: Any, status: str, reason: str, run: Path) -> Row:
    """The row of a grid's cell that has no result.

    Args:
        cell: with the fields of `bdjax.workflows.grid.Cell`.
        status: failed, or not run.
        reason: why.
        run: the folder that the result would be in.
    """
    empty = Row(*("",) * 6, None, "", None, status, reason, str(run), *("",) * 7)
    return empty._replace(**cell._asdict())


def digest(config: Mapping[str, Any], without: Sequence[str] = ()) -> str:
    """SHA-256 of settings as JSON with sorted keys, without some of them."""
    kept = {name: value for name, value in config.items() if name not in without}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


# ---- Tables ----------------------------------------------------------------------------------------------------------


class Group(NamedTuple):
    """Comparable rows: of one experiment, one dataset and the same settings."""

    experiment: str
    dataset: str
    preset: str
    setting: str
    values: Mapping[tuple[str, str, str], Mapping[int, float | None]]
    """(metric, attack, defense) -> seed -> value"""
    attacks: tuple[str, ...]
    defenses: tuple[str, ...]
    disagreeing: int
    """numbers that two runs have differently; the first in the order of the rows is kept"""

    @property
    def title(self) -> str:
        return f"{self.experiment} on {self.dataset}, {self.preset}"

    def seeds_of(self, metric: str, attack: str, defense: str) -> list[float | None]:
        """The values of a cell in order of the seeds; None for an unknown one."""
        of_seed = self.values.get((metric, attack, defense), {})
        return [of_seed[seed] for seed in sorted(of_seed)]

    def mean(self, metric: str, attack: str, defense: str) -> float | None:
        """The mean over the seeds; None if a seed is unknown or there is none."""
        of_seed = self.values.get((metric, attack, defense), {})
        return None if not of_seed or None in of_seed.values() else float(np.mean(list(of_seed.values())))

    def metrics(self, wanted: Sequence[str] = ()) -> list[str]:
        """The wanted metrics, or the usual ones, that any cell has."""
        known = {key[0] for key, of_seed in self.values.items() if any(value is not None for value in of_seed.values())}
        return [name for name in wanted or USUAL if name in known]


def group(rows: Iterable[Row]) -> list[Group]:
    """Gather the rows that are comparable; attacks and defenses in order of first appearance.

    A seed that failed or could not be tested is unknown (None) in those metrics that other seeds of its cell have.
    """
    rows = list(rows)
    found: dict[tuple[str, ...], dict[tuple[str, str, str], dict[int, float | None]]] = {}
    disagreeing: dict[tuple[str, ...], int] = {}
    for row in rows:
        if row.status != "done":
            continue
        key = row[:4]
        cell = found.setdefault(key, {}).setdefault((row.metric, row.attack, row.defense), {})
        if cell.setdefault(row.seed, row.value) != row.value:
            disagreeing[key] = disagreeing.get(key, 0) + 1
    for row in rows:
        if row.status not in ("failed", "not tested", "not run"):
            continue
        # A job without a result has no setting.
        keys = [key for key in found if key[:3] == row[:3] and (not row.setting or key[3] == row.setting)]
        for (_, attack, defense), cell in found[keys[0]].items() if len(keys) == 1 else ():
            if (attack, defense) == (row.attack, row.defense):
                cell.setdefault(row.seed, None)
    return [
        Group(
            *key,
            values,
            tuple(dict.fromkeys(attack for _, attack, _ in values)),
            tuple(dict.fromkeys(defense for _, _, defense in values)),
            disagreeing.get(key, 0),
        )
        for key, values in found.items()
    ]


def pivot(of: Group, metric: str) -> Table:
    """Mean ± standard deviation over seeds: a row for each defense, a column for each attack."""
    rows = []
    for defense in of.defenses:
        cells = [
            None if of.mean(metric, attack, defense) is None else mean_and_spread(of.seeds_of(metric, attack, defense))
            for attack in of.attacks
        ]
        rows.append((defense, *cells))
    counts = sorted({len(of_seed) for of_seed in of.values.values()})
    seeds = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    notes = f"Mean ± standard deviation over {seeds} seed{'' if counts == [1] else 's'}; settings {of.setting}."
    if of.disagreeing:
        notes += f" Of {of.disagreeing} numbers two runs have different values, and the first is shown."
    return Table(f"{_heading(metric)}: {of.title}", ("defense", *of.attacks), tuple(rows), notes)


def _heading(metric: str) -> str:
    return metric.upper().replace("_", "-") if metric in BETTER else metric


class Ranks(NamedTuple):
    """How defenses rank by one metric, over blocks: the attacks on the datasets, means over seeds. Rank 1 is the best."""

    defenses: tuple[str, ...]
    mean: tuple[float, ...]
    low: tuple[float | None, ...]
    """of the bootstrap interval of the mean rank; None with one block"""
    high: tuple[float | None, ...]
    blocks: int
    incomplete: int
    """blocks that are left out, since a defense has no value"""
    difference: float | None
    """the smallest difference of mean ranks that is significant at 5 % (Nemenyi); None with one block"""
    p_value: float | None
    """of Friedman's test that all defenses are alike; None with fewer than three defenses or two blocks"""


def rank(groups: Sequence[Group], metric: str) -> Ranks | None:
    """Rank the defenses of comparable groups, such as an experiment's datasets. Ties get their mean rank.

    References: Demšar 2006, Statistical Comparisons of Classifiers over Multiple Data Sets, section 3.2.

    Args:
        groups: of one experiment and preset, at most one of each dataset: other settings make no further blocks.
        metric: a key of `BETTER`.

    Returns:
        The ranks; None if there is no block with all defenses, or one defense only.
    """
    defenses = tuple(dict.fromkeys(defense for of in groups for defense in of.defenses))
    blocks, incomplete = [], 0
    for of in groups:
        for attack in of.attacks:
            means = [of.mean(metric, attack, defense) for defense in defenses]
            if None not in means:
                blocks.append(means)
            elif any(mean is not None for mean in means):
                incomplete += 1
    if len(defenses) < 2 or not blocks:
        return None
    import scipy.stats  # slow to import

    sign = 1.0 if BETTER[metric] is min else -1.0
    ranks = scipy.stats.rankdata(sign * np.asarray(blocks, np.float64), axis=1)
    count, many = ranks.shape
    low = high = (None,) * many
    difference = p_value = None
    if count > 1:
        interval = scipy.stats.bootstrap(
            (ranks,),
            np.mean,
            axis=0,
            n_resamples=RESAMPLES,
            confidence_level=CONFIDENCE,
            method="percentile",
            random_state=np.random.default_rng(0),
        ).confidence_interval
        low, high = tuple(map(float, interval.low)), tuple(map(float, interval.high))
        quantile = scipy.stats.studentized_range.ppf(CONFIDENCE, many, np.inf) / np.sqrt(2)
        difference = float(quantile * np.sqrt(many * (many + 1) / (6 * count)))
        if many > 2:
            with np.errstate(invalid="ignore", divide="ignore"):  # all ranks alike
                p_value = float(scipy.stats.friedmanchisquare(*ranks.T).pvalue)
            p_value = p_value if np.isfinite(p_value) else 1.0
    mean = tuple(map(float, ranks.mean(axis=0)))
    return Ranks(defenses, mean, low, high, count, incomplete, difference, p_value)


def rank_table(title: str, of_metric: Mapping[str, Ranks]) -> Table:
    """Mean ranks of the defenses, the best by the first metric on top."""
    defenses = sorted(
        dict.fromkeys(defense for ranks in of_metric.values() for defense in ranks.defenses),
        key=lambda name: next(
            (ranks.mean[ranks.defenses.index(name)] for ranks in of_metric.values() if name in ranks.defenses), np.inf
        ),
    )
    rows = []
    for name in defenses:
        cells = []
        for ranks in of_metric.values():
            if name not in ranks.defenses:
                cells += [None, None]
                continue
            at = ranks.defenses.index(name)
            interval = None if ranks.low[at] is None else f"{ranks.low[at]:.2f} to {ranks.high[at]:.2f}"
            cells += [f"{ranks.mean[at]:.2f}", interval]
        rows.append((name, *cells))
    notes = ["Mean rank over attacks and datasets, 1 is the best, with its 95 % bootstrap interval."]
    for metric, ranks in of_metric.items():
        alone = "1 block, too few for an interval"
        text = f"{_heading(metric)}: {f'{ranks.blocks} blocks' if ranks.blocks > 1 else alone}"
        if ranks.incomplete:
            text += f", {ranks.incomplete} left out for a missing value"
        if ranks.difference is not None:
            text += f", critical difference {ranks.difference:.2f} (Nemenyi, 5 %)"
        if ranks.p_value is not None:
            text += f", Friedman p = {ranks.p_value:.3g}"
        notes.append(f"{text}.")
    names = [name for metric in of_metric for name in (f"{_heading(metric)} rank", "95 % interval")]
    return Table(title, ("defense", *names), tuple(rows), " ".join(notes))


def missing_table(rows: Iterable[Row]) -> Table | None:
    """The cells without a result, with why; None if there are none."""
    cells = {}
    for row in rows:
        if row.status != "done":
            key = (row.experiment, row.dataset, row.attack, row.defense, row.status, row.reason)
            cells.setdefault(key, []).append(row.seed)
    if not cells:
        return None
    lines = [
        (*key[:4], ", ".join(str(seed) for seed in sorted(filter(lambda seed: seed is not None, seeds))), *key[4:])
        for key, seeds in cells.items()
    ]
    header = ("experiment", "dataset", "attack", "defense", "seeds", "status", "why")
    return Table("Cells without a result", header, tuple(lines))


def tables(rows: Sequence[Row], wanted: Sequence[str] = ()) -> list[Table]:
    """Every table: pivots of each group; ranks over all groups of an experiment and a preset that have the same defenses, or of
    each setting if a dataset has several; cells without a result.

    Args:
        rows: of any runs.
        wanted: metrics; by default CDA, ASR and F1 where they are known.
    """
    groups = group(rows)
    found = [pivot(of, metric) for of in groups for metric in of.metrics(wanted)]
    alike: dict[tuple[str, str, frozenset[str]], list[Group]] = {}
    for of in groups:
        alike.setdefault((of.experiment, of.preset, frozenset(of.defenses)), []).append(of)
    for (experiment, preset, _), all_alike in alike.items():
        for setting, members in _one_per_dataset(all_alike):
            metrics = dict.fromkeys(name for of in members for name in of.metrics(wanted) if name in BETTER)
            ranked = {name: ranks for name in metrics if (ranks := rank(members, name)) is not None}
            if ranked:
                names = ", ".join(dict.fromkeys(of.dataset for of in members))
                found.append(rank_table(f"Ranks: {experiment} on {names}, {preset}{setting}", ranked))
    missing = missing_table(rows)
    return found + ([missing] if missing else [])


def _one_per_dataset(groups: Sequence[Group]) -> list[tuple[str, list[Group]]]:
    """(what the title adds, groups of different datasets): all groups, or those of each setting if a dataset has several.

    A preset's settings differ between datasets, so datasets with one setting each are comparable.
    """
    if len({of.dataset for of in groups}) == len(groups):
        return [("", list(groups))]
    settings = dict.fromkeys(of.setting for of in groups)
    return [(f", settings {setting}", [of for of in groups if of.setting == setting]) for setting in settings]


# ---- Figures and files -----------------------------------------------------------------------------------------------


def figures(rows: Iterable[Row]) -> list[tuple[str, Figure]]:
    """(file name, figure) of clean accuracy against attack success, for each group that has both."""
    found = []
    for of in group(rows):
        attacks = [
            name for name in of.attacks if any(of.mean("asr", name, defense) is not None for defense in of.defenses)
        ]
        if not attacks or "cda" not in of.metrics(["cda"]):
            continue
        cda, asr = (
            np.array(
                [
                    [np.nan if (mean := of.mean(metric, attack, defense)) is None else mean for attack in attacks]
                    for defense in of.defenses
                ]
            )
            for metric in ("cda", "asr")
        )
        slug = re.sub(r"[^\w.-]+", "-", f"{of.experiment}-{of.dataset}-{of.preset}-{of.setting}")[-150:]
        found.append((f"trade-off-{slug}.png", plots.trade_off(of.defenses, cda, asr, of.title)))
    return found


def to_parquet(rows: Sequence[Row]) -> bytes:
    """The rows as a Parquet file; columns are those of `Row`, None is null.

    Raises:
        InputError: pyarrow is not installed.
    """
    arrow = extras.pyarrow()
    kinds = {"seed": arrow.int64(), "value": arrow.float64()}
    schema = arrow.schema([(name, kinds.get(name, arrow.string())) for name in Row._fields])
    columns = [[getattr(row, name) for row in rows] for name in Row._fields]
    buffer = io.BytesIO()
    arrow.parquet.write_table(arrow.table(columns, schema=schema), buffer)
    return buffer.getvalue()

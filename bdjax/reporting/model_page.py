"""The report on an audit of models: numbers, tables, pictures and page. `bdjax/reporting/model_verdict.py` has the words."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from bdjax.defenses import neural_cleanse
from bdjax.evaluation import model_audit as evidence
from bdjax.evaluation.model_audit import RANDOM, REVERSED, Measured
from bdjax.inspection import random_triggers
from bdjax.inspection.extracted_triggers import enlarge, on_grey
from bdjax.reporting import plots
from bdjax.reporting import results as schema
from bdjax.reporting.audit_verdict import capital, percent
from bdjax.reporting.model_verdict import (
    CANNOT_SEE,
    NO_PROOF,
    next_steps,
    top_class,
    verdict,
)
from bdjax.reporting.report import Figure, Report, Section, Verdict
from bdjax.reporting.sections import Entry, section
from bdjax.reporting.tables import Cell, Table
from bdjax.run.folder import RunFolder
from bdjax.triggers import MaskedBlend, masked_blend
from bdjax.types import Dataset

SHORT = {REVERSED: "reversed", RANDOM: "random"}
"""The two tests in a column."""
MOST_SHOWN = 8
"""Most models with a table of all classes, and most pairs of trigger and mask in the report."""


# ---- Numbers --------------------------------------------------------------------------------------------------------


def summarise(
    numbers: Mapping[str, Any],
    dataset: Dataset,
    rows: Mapping[str, int],
    seed: int,
    commands: Sequence[str] = (),
    random_triggers: int = 0,
) -> dict[str, Any]:
    """The content of results.json.

    Args:
        numbers: from `bdjax.evaluation.model_audit.judge`.
        dataset: the clean rows.
        rows: "clean_rows", "search_rows" and "held_out_rows" -> their number.
        seed: of the run.
        commands: what makes a clean student.
        random_triggers: of each kind.

    Returns:
        The schema of `bdjax.reporting.results` without attacks, methods and cells; in addition the numbers, and the verdict on
        them. The same for the same inputs.
    """
    tree = schema.assemble(
        *((), rows["held_out_rows"], [seed], (), (), ()),
        dataset=dataset.name,
        image_shape=list(dataset.image_shape),
        **numbers,
        **rows,
        commands=list(commands),
        random_triggers=random_triggers,
    )
    return {"verdict": asdict(verdict(tree)), **tree}


# ---- Tables ---------------------------------------------------------------------------------------------------------


def main_table(results: Entry) -> Table:
    """A row for each model: its verdict, and the numbers of its found class or of the class that came closest."""
    rows: list[tuple[Cell, ...]] = []
    for model in results["models"]:
        top = top_class(model)
        by = " and ".join(SHORT[name] for name in top["by"]) if top and top["class"] in model["found"] else None
        numbers = _numbers(top) if top else (None,) * 7
        rows.append((model["title"], model["outcome"], model["accuracy"], numbers[0], by, *numbers[1:]))
    header = ("model", "verdict", "CDA", "class", "by", "mask", "index", "score", "held-out", "controls", "p-value")
    notes = (
        "Of each model the class that was found, or else whose reversed trigger came closest. By: the test that makes it a "
        "finding, reversed triggers (columns to the right) or random ones (table below). Mask: L1 norm of its reversed "
        "trigger, in pixels. Index: anomaly index, negative for a mask above the median; the paper flags a class above 2, this "
        "audit does not use it. Held-out: share of held-out rows that the trigger turns into the class; controls: the same on "
        "clean control networks. Score: log(median mask / mask) (held-out - controls). p-value: share of networks with a score "
        "as large, of the controls and the model itself. A finding by a reversed trigger needs "
        f"{evidence.LEAST_SUCCESS:g} on held-out rows, at most {evidence.MOST_TRANSFER:g} on controls, the smallest p-value "
        f"that the controls allow or {evidence.MOST_P_VALUE:g}, and a normal p-value of at most "
        f"{evidence.MOST_NORMAL_P_VALUE:g}."
    )
    return Table("Verdicts", header, tuple(rows), notes)


def _numbers(entry: Entry) -> tuple[Cell, ...]:
    mask, index = f"{entry['norm']:.1f}", None if entry["index"] is None else f"{entry['index']:.2f}"
    rates = (f"{entry[name]:.2f}" for name in ("score", "success", "transfer"))
    return (capital(entry["title"]), mask, index, *rates, f"{entry['p_value']:.2g}")


def responses_table(results: Entry) -> Table | None:
    """What random triggers do to each model; None where none were drawn."""
    rows: list[tuple[Cell, ...]] = []
    tops = [(model["title"], evidence.top_response(model["classes"])) for model in results["models"]]
    if results["controls"]:
        tops += [
            (f"control network {number}", network["response"])
            for number, network in enumerate(results["controls"]["networks"], start=1)
        ]
    for title, top in tops:
        if top is not None:
            of_random = top["random_triggers"]
            rows.append(
                (
                    *(title, capital(top["title"]), of_random["kind"]),
                    *(f"{of_random[name]:.2f}" for name in ("success", "controls")),
                    f"{of_random['deviations']:.1f}",
                    f"{of_random['p_value']:.1g}",
                    "yes" if of_random["found"] else "no",
                )
            )
    if not rows:
        return None
    header = ("network", "class", "kind of trigger", "success", "controls", "deviations", "p-value", "finding")
    notes = (
        f"{results['random_triggers']} triggers of each kind are drawn at random and put on {random_triggers.ROWS} held-out "
        "rows. Of each network the class and kind with a finding, or else with the largest deviation. Success: share of rows "
        f"of other classes that the strongest {random_triggers.STRONGEST:.0%} of the kind's triggers turn into the class; "
        "controls: the same on the (other) control networks. Deviations: their difference after arcsin sqrt, in standard "
        "deviations of the control networks. p-value: of a t-test, times the number of kinds and classes. A finding needs a "
        "p-value of at most "
        f"{evidence.MOST_RESPONSE_P_VALUE:g} and a success {evidence.LEAST_EXCESS:g} above the controls'."
    )
    return Table("Random triggers", header, tuple(rows), notes)


def class_tables(results: Entry) -> list[Table]:
    """Every class of the first models."""
    tables = []
    header = ("class", "mask", "index", "score", "held-out", "controls", "p-value", "p-value, normal", "finding")
    for model in [model for model in results["models"] if model["classes"]][:MOST_SHOWN]:
        rows = [
            (
                *_numbers(entry),
                None if entry["normal_p_value"] is None else f"{entry['normal_p_value']:.1g}",
                "yes" if entry["found"] else "no",
            )
            for entry in model["classes"]
        ]
        notes = (
            "p-value, normal: under the assumption that the largest scores of clean networks are normal, which these few "
            "networks cannot show. It orders classes; it proves nothing."
        )
        tables.append(Table(f"Every class of {model['title']}", header, tuple(rows), notes))
    return tables


def controls_table(results: Entry) -> Table | None:
    """The control networks, and the network with a planted trigger; None if no model was tested."""
    if not results["controls"]:
        return None
    rows: list[tuple[Cell, ...]] = [
        (f"control network {number}", network["accuracy"], *_numbers({**network, "p_value": 1.0})[:-1])
        for number, network in enumerate(results["controls"]["networks"], start=1)
    ]
    planted = results["planted"]
    if planted["success"] is not None:
        numbers = {**planted["numbers"], "title": f"class {planted['class']}"}
        rows.append((f"with a planted {planted['title']}", None, *_numbers(numbers)[:-1]))
    header = ("network", "CDA", "class", "mask", "index", "score", "held-out", "controls")
    notes = "The class with the largest score of each network, whose largest scores the p-values are from."
    if planted["success"] is not None:
        notes += (
            f" The planted trigger itself turns {percent(planted['success'])} of held-out rows; the reversed trigger of its "
            f"class is {'a' if planted['found'] else 'no'} finding by the same rules."
        )
    if findings := results["controls"]["findings"]:
        notes += (
            f" By the same rules {findings} of {results['controls']['count']} control networks would be called a finding, a "
            "false alarm."
        )
    if planted["success"] is None and planted["why"]:
        notes += f" Nothing was planted: {planted['why']}."
    return Table("Networks of known training", header, tuple(rows), notes)


def weights_table(results: Entry) -> Table | None:
    """The two detectors on the weights; None for black boxes."""
    rows: list[tuple[Cell, ...]] = []
    for model in results["models"]:
        if model["weights"]:
            channels, last = model["weights"]["channels"], model["weights"]["last_layer"]
            agrees = last["is_outlier"] and last["class"] in model["found"]
            rows.append(
                (
                    model["title"],
                    f"{channels['deviations']:.2f}",
                    f"{max(channels['controls']):.2f}",
                    f"{channels['p_value']:.2g}",
                    capital(last["title"]),
                    f"{last['deviations']:.2f}",
                    f"{max(last['controls']):.2f}",
                    f"{last['p_value']:.2g}",
                    "yes" if agrees else "no",
                )
            )
    if not rows:
        return None
    header = (
        *("model", "channels", "most of controls", "p-value", "last layer", "index", "most of controls", "p-value"),
        "same class",
    )
    notes = (
        "Channels: how far the largest channel Lipschitz bound lies above the mean of its layer, in standard deviations (Zheng "
        "et al. 2022). Last layer: the class with the largest mean weight, and its distance from the median in robust "
        "deviations (Fields et al. 2021). Same class: it is a larger outlier than in any control network, and a class that was "
        "found. These two support a finding; they make none."
    )
    return Table("Outliers among the weights", header, tuple(rows), notes)


# ---- The page -------------------------------------------------------------------------------------------------------


def page(
    folder: RunFolder,
    results: Entry,
    dataset: Dataset,
    held_out: Dataset,
    measured: Measured | None,
    drawn: Mapping[str, MaskedBlend] = {},
) -> Report:
    """Write the pictures into the folder and assemble the page.

    Args:
        folder: the open run.
        results: from `summarise`.
        dataset: the clean rows.
        held_out: the held-out rows.
        measured: as for `summarise`.
        drawn: the random triggers of each kind.
    """
    random_figures = random_trigger_figures(folder, results, held_out, drawn) if drawn else []
    figures = trigger_figures(folder, results, held_out, measured) if measured is not None else []
    return Report(
        title=f"Audit of {'a model' if len(results['models']) == 1 else 'models'} for {dataset.name}",
        verdict=Verdict(**results["verdict"]),
        key_numbers=key_numbers(results),
        sections=(
            *section("Verdicts", [main_table(results)]),
            Section("What to do next", "\n\n".join(next_steps(results))),
            *section("The reversed triggers", [], figures),
            *section("Random triggers", [responses_table(results)], random_figures),
            *section("Every class", class_tables(results)),
            *section("Control networks", [controls_table(results)]),
            *section("Other signs", [weights_table(results)]),
            Section("What this audit cannot see", f"{CANNOT_SEE}\n\n{NO_PROOF}"),
        ),
    )


def key_numbers(results: Entry) -> dict[str, str]:
    """The numbers in the page's head."""
    models = results["models"]
    shown = {"models": f"{len(models)}", "with a trigger": f"{sum(bool(model['found']) for model in models)}"}
    if len(models) == 1:
        shown = {"CDA": f"{models[0]['accuracy']:.3f}"}
        if top := top_class(models[0]):
            title, numbers = "class that came closest", (top["success"], top["transfer"], top["p_value"])
            if models[0]["found"]:
                title, of_random = "trigger found into", top["random_triggers"]
                if REVERSED not in top["by"]:  # what was found are the random triggers
                    numbers = of_random["success"], of_random["controls"], of_random["p_value"]
            shown |= {
                title: top["title"],
                "success on held-out rows": percent(numbers[0]),
                "on control networks": percent(numbers[1]),
                "p-value": f"{numbers[2]:.2g}",
            }
    if results["planted"]["success"] is not None:
        shown["planted trigger found"] = "yes" if results["planted"]["found"] else "no"
    return shown


def trigger_figures(folder: RunFolder, results: Entry, held_out: Dataset, measured: Measured) -> list[Figure]:
    """For each found class, or the class that came closest: trigger, mask, and a held-out row without and with it."""
    shown: list[tuple[Entry, Entry, int]] = []
    tested = [model for model in results["models"] if model["classes"]]
    for number, model in enumerate(tested):
        found = [entry for entry in model["classes"] if entry["found"]]
        shown += [(model, entry, number) for entry in found or [top_class(model)]]
    shown = sorted(shown, key=lambda entry: not entry[1]["found"])  # stable: found classes first
    if not shown:
        return []
    scale = max(1, 176 // max(held_out.image_shape[:2]))
    images, captions = [], []
    for model, entry, number in shown[:MOST_SHOWN]:
        label = entry["class"]
        mask, pattern = (leaf[number, label] for leaf in measured.triggers)
        row = int(np.argmax(held_out.labels != label))
        image = held_out.images[row].astype(np.float32) / 255
        stamped = np.asarray(neural_cleanse.stamp(image, mask, pattern))
        images.append([enlarge(view, scale) for view in (on_grey(pattern, mask[..., 0]), mask, image, stamped)])
        captions.append(
            [
                f"{model['title']}: {entry['title']}",
                f"mask: {entry['norm']:.1f} pixels",
                "held-out row",
                "with the trigger",
            ]
        )
    caption = (
        "Reversed triggers, grey where transparent; their masks; and a held-out row without and with the trigger. They are the "
        "smallest that the search found, not the attacker's own."
    )
    alt = "Reversed triggers and masks of the models."
    return [_grid(folder, "triggers.png", images, captions, len(shown), caption, alt)]


def random_trigger_figures(
    folder: RunFolder, results: Entry, held_out: Dataset, drawn: Mapping[str, MaskedBlend]
) -> list[Figure]:
    """For each class that was found by random triggers: the strongest of these, and a held-out row without and with it."""
    shown = [
        (model, entry)
        for model in results["models"]
        for entry in model["classes"]
        if entry["class"] in model["found"] and RANDOM in entry["by"]
    ]
    if not shown:
        return []
    scale, images, captions = max(1, 176 // max(held_out.image_shape[:2])), [], []
    for model, entry in shown[:MOST_SHOWN]:
        of_random = entry["random_triggers"]
        mask, pattern, opacity = (np.asarray(leaf[of_random["strongest"]]) for leaf in drawn[of_random["kind"]])
        image = held_out.images[int(np.argmax(held_out.labels != entry["class"]))].astype(np.float32) / 255
        stamped = np.asarray(masked_blend.apply(MaskedBlend(mask, pattern, opacity), image))
        images.append([enlarge(view, scale) for view in (on_grey(pattern, mask[..., 0]), image, stamped)])
        captions.append([f"{model['title']}: {entry['title']}", "held-out row", f"with the {of_random['kind']}"])
    caption = (
        "Of the random triggers of the kind that was found, the one with the largest success, grey where it changes nothing; "
        "and a held-out row without and with it. It is not the attacker's own trigger."
    )
    alt = "Random triggers that turn held-out rows into a class."
    return [_grid(folder, "random_triggers.png", images, captions, len(shown), caption, alt)]


def _grid(
    folder: RunFolder,
    name: str,
    images: Sequence[Sequence[np.ndarray]],
    captions: Sequence[Sequence[str]],
    count: int,
    caption: str,
    alt: str,
) -> Figure:
    """Rows of pictures, saved under this name; the caption says how many of `count` rows they are."""
    path = plots.save(plots.image_grid(images, (), (), "", captions=captions), folder.file(name))
    more = f" {MOST_SHOWN} of {count}." if count > MOST_SHOWN else ""
    return Figure(path, f"{caption}{more}", alt)

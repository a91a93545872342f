"""The words of an audit: its three outcomes, the evidence in sentences, caveats, and what to do next.

*Found*, *nothing found* and *could not be tested* each have their own headline, colour and exit status. A class "carries a
trigger" if the detector extracted a pattern for it and nothing speaks against that pattern; otherwise it is "suspicious", or,
without a flagged row and with a pattern that may be chance or that too few networks have, "not confirmed" and no finding. A
detector without patterns only flags rows, and the verdict claims no more than that. "Nothing found" comes with what would have
been found: the number that the settings ask for, and what became of a trigger that was planted in copies of the rows.

In every function `results` is from `bdjax.reporting.audit.summarise`.
"""

from collections.abc import Sequence

from bdjax.defenses.vbd_premise import LEARNED
from bdjax.evaluation.model_audit import Outcome
from bdjax.evaluation.sensitivity import least_found
from bdjax.evaluation.variants import NOT_TESTED
from bdjax.reporting.report import Verdict
from bdjax.reporting.sections import Entry
from bdjax.run.text import printable

TRIGGER, WEAK, UNCONFIRMED, NONE = "trigger", "weak", "unconfirmed", "none"
"""The possible findings for a class. Only the first two count as found."""
MOST_OF_A_CLASS = 0.5
"""A class with more than this share of its rows flagged is mentioned in the caveats."""
MOST_NAMED = 4
"""Most classes that a sentence names."""
MOST_SETTINGS = 3
"""Most settings that a sentence names."""
SIZES = ("networks", "epochs", "detector_epochs")
"""VBD's settings that cost sensitivity where they are smaller than the paper's."""
MOST_REASONS = 5
"""Most files that the report names as not copied."""
VBD_NOT_FOUND = (
    "This method cannot find triggers that move or change from row to row (dynamic and sample-specific triggers), triggers on "
    "rows that keep their own label (clean-label attacks), or rare triggers."
)
NOT_FOUND = (
    "A detector finds the kind of attack that it was designed for; rows that it does not flag may be poisoned, too."
)
"""The same for every other detector."""
EXIT_STATUSES = {"found": 3, "nothing found": 0, "could not be tested": 4}


# ---- Outcome --------------------------------------------------------------------------------------------------------


def found_classes(results: Entry, finding: str = "") -> list[Entry]:
    """Classes with a pattern, in order of increasing p-values.

    Args:
        results: the numbers.
        finding: one of the findings; by default `TRIGGER` and `WEAK`, triggers before weak evidence.
    """
    wanted = [finding] if finding else [TRIGGER, WEAK]
    shown = [entry for entry in results["classes"] if entry["finding"] in wanted]
    return sorted(shown, key=lambda entry: (wanted.index(entry["finding"]), smallest_p_value(entry)))


def smallest_p_value(entry: Entry) -> float:
    """The smallest p-value of an entry of "classes"; 1 if the detector has none."""
    return min(entry["p_values"].values()) if "p_values" in entry else 1.0


def untested(results: Entry) -> list[Entry]:
    """Classes with rows that could not be tested."""
    return [entry for entry in results["classes"] if entry["not_tested"]]


def reason_of(results: Entry) -> str:
    """Why nothing could be tested; "" if something could be."""
    return next((entry["reason"] for entry in results.get("not_tested", ())), "")


def outcome_of(results: Entry) -> Outcome:
    """Which of the three outcomes the numbers are."""
    if reason_of(results):
        return "could not be tested"
    return "found" if results["flagged"] or found_classes(results) else "nothing found"


def exit_status(results: Entry) -> int:
    """The exit status of a run of detectors, see `EXIT_STATUSES`. Always 0 for results that are not an audit's."""
    return EXIT_STATUSES[results["outcome"]] if "outcome" in results else 0


# ---- Verdict --------------------------------------------------------------------------------------------------------


def verdict(results: Entry) -> Verdict:
    """Put the numbers into words."""
    outcome = outcome_of(results)
    if outcome == "could not be tested":
        return _not_tested(results)
    if outcome == "nothing found":
        return _nothing_found(results)
    return _found(results) if results["extracts_patterns"] else _flagged(results)


def _not_tested(results: Entry) -> Verdict:
    text = "Nothing is known about these rows: this is no sign that they are clean, nor that they are poisoned."
    headline = f"{capital(results['not_tested'][0]['title'])} {NOT_TESTED}: {reason_of(results)}."
    return Verdict("not_tested", headline, _paragraphs(text, sensitivity_text(results), *setup_texts(results)))


def _nothing_found(results: Entry) -> Verdict:
    rows, unit = results["rows"], results["unit"]
    where = f"in these {rows:,} {unit}"
    if missing := untested(results):
        where = f"in the {rows - sum(entry['rows'] for entry in missing):,} of {rows:,} {unit} that could be tested"
    least, bound, sensitivity = least_found(results["sensitivity"]["sets"]), results["bound"], results["sensitivity"]
    if least is not None:
        missed = [entry["planted"] for entry in sensitivity["sets"] if entry["planted"] < least and not entry["found"]]
        end = f"a {sensitivity['trigger']} planted in {least:,} of them ({percent(least / rows)}) was found"
        end += f", in {max(missed):,} it was not" if missed else ""
    elif bound is not None:
        few = f"fewer than about {bound:,} poisoned {unit} of a class ({_share_of(bound, rows)})"
        end = f"{few} cannot be counted on to be found"
    else:
        end = "how small an attack this run would have found was not measured"
    text = _paragraphs(
        _unconfirmed_text(results),
        sensitivity_text(results),
        bound_text(results),
        *setup_texts(results),
        *_rest(results),
    )
    return Verdict("nothing_found", f"Nothing found {where}; {end}.", text)


def _found(results: Entry) -> Verdict:
    certain, weak = found_classes(results, TRIGGER), found_classes(results, WEAK)
    flagged = flagged_text(results)
    text = _paragraphs(*_evidence(results, certain or weak), *setup_texts(results), *_rest(results))
    if certain:
        verb = "carries" if len(certain) == 1 else "carry"
        return Verdict("found", f"{listed(certain)} {verb} a trigger: {flagged}.", text)
    verb = "is" if len(weak) == 1 else "are"
    return Verdict("suspicious", f"{listed(weak)} {verb} suspicious, but the evidence is weak: {flagged}.", text)


def _flagged(results: Entry) -> Verdict:
    """The verdict of a detector without patterns: how many rows are flagged, and in which class most of them are."""
    rows, flagged, unit = results["rows"], results["flagged"], results["unit"]
    most = max(results["classes"], key=lambda entry: entry["flagged"] or 0)
    text = (
        f"{most['flagged']:,} of the flagged {unit} are in {most['title']}: {percent(most['flagged'] / most['rows'])} of its "
        f"{most['rows']:,}. This detector extracts no trigger, so look at the {unit} to see whether it is right."
    )
    headline = f"{capital(results['detector'])} flags {flagged:,} of {rows:,} {unit} ({percent(flagged / rows)})."
    return Verdict("suspicious", headline, _paragraphs(text, *setup_texts(results), *_rest(results)))


def flagged_text(results: Entry) -> str:
    """ "4 of 40 rows are flagged"."""
    return f"{results['flagged']:,} of {results['rows']:,} {results['unit']} {is_or_are(results['flagged'])} flagged"


def _evidence(results: Entry, classes: Sequence[Entry]) -> list[str]:
    height, width, _ = results["image_shape"]
    lines = []
    for entry in classes[:MOST_NAMED]:
        p_value = f"p-value {smallest_p_value(entry):.2g}; " if "p_values" in entry else ""
        share = f" ({percent(entry['flagged'] / entry['rows'])})" if entry["flagged"] else ""
        lines.append(
            f"{capital(entry['title'])}: a pattern of {entry['mask_pixels']:,} of {height * width:,} pixels turns "
            f"{percent(entry['pattern_success'])} of other rows into this class; {agreement_text(entry)}{p_value}"
            f"{entry['flagged']:,} of its {entry['rows']:,} rows are flagged{share}."
        )
    if weak := found_classes(results, WEAK):
        lines.append(f"Weak evidence: {_doubts_text(weak)}.")
    return [*lines, *filter(None, [_unconfirmed_text(results)])]


def _unconfirmed_text(results: Entry) -> str:
    """Patterns that are no finding, and why; "" if there are none."""
    dropped = found_classes(results, UNCONFIRMED)
    return f"A pattern that was not confirmed, so no finding: {_doubts_text(dropped)}." if dropped else ""


def _doubts_text(classes: Sequence[Entry]) -> str:
    doubts = "; ".join(f"{entry['title']} ({', '.join(entry['against'])})" for entry in classes[:MOST_NAMED])
    return doubts + (f"; and {len(classes) - MOST_NAMED} more" if len(classes) > MOST_NAMED else "")


def agreement_text(entry: Entry) -> str:
    """ "2 of 3 simple networks have such a pattern; ", or empty for a detector without them."""
    if not entry.get("success"):
        return ""
    count, total = entry["agreeing"], len(entry["success"])
    return f"{count} of {total} simple network{'s' if total > 1 else ''} {'has' if count == 1 else 'have'} such a pattern; "


def _rest(results: Entry) -> list[str]:
    """What belongs to every verdict on tested rows: the ground truth, if known, and the limits of the method."""
    texts = []
    if results["detection"]:
        overall = results["detection"][0]
        if overall["poisoned"]:
            texts.append(
                f"The ground truth is known here: {overall['hits']:,} of {overall['poisoned']:,} poisoned rows are flagged, "
                f"and {overall['flagged'] - overall['hits']:,} of {overall['rows'] - overall['poisoned']:,} clean rows."
            )
        else:
            texts.append(
                "The ground truth is known here: no row is poisoned"
                + (", so this is a false alarm." if overall["flagged"] else ".")
            )
    start = "Other rows may be poisoned, too. "
    if outcome_of(results) == "nothing found":
        start = f"Nothing found does not mean that the {results['unit']} are clean. "
    return [*texts, start + limits_text(results)]


# ---- What the run could find ----------------------------------------------------------------------------------------


def bound_text(results: Entry) -> str:
    """With how many poisoned rows the settings can be relied on; "" where they say nothing about it."""
    if results["bound"] is None:
        return ""
    bound, rows, unit = results["bound"], results["rows"], results["unit"]
    return (
        f"By its settings {results['detector']} asks for about {bound:,} poisoned {unit} of a class ({_share_of(bound, rows)} "
        f"of these {rows:,}), however many {unit} there are; fewer may be found with luck."
    )


def _share_of(count: int, rows: int) -> str:
    return percent(count / rows) if count <= rows else "more than all"


def sensitivity_text(results: Entry) -> str:
    """What became of a trigger that was planted in copies of the rows, or why none was; "" if there was no occasion."""
    sensitivity, rows, unit = results["sensitivity"], results["rows"], results["unit"]
    if not sensitivity["sets"]:
        return f"The sensitivity of this run was not measured: {sensitivity['why']}." if sensitivity["why"] else ""
    largest, *smaller = sorted(sensitivity["sets"], key=lambda entry: -entry["planted"])
    parts = [
        f"A {sensitivity['trigger']} planted in {largest['planted']:,} of these {rows:,} {unit} {_was_found(largest)} "
        f"({largest['hits']:,} of them flagged)"
    ]
    parts += [f"in {entry['planted']:,} it {_was_found(entry)} ({entry['hits']:,} flagged)" for entry in smaller]
    least = least_found(sensitivity["sets"])
    end = (
        f"fewer poisoned {unit} than {least:,}, fainter triggers, or triggers of another kind cannot be excluded"
        if least is not None
        else "so this run would have missed poisoned rows as plain as these"
    )
    return f"{'; '.join(parts)}: {end}. Planted {unit} were labelled as {sensitivity['target']}, the class with the most rows."


def _was_found(entry: Entry) -> str:
    return "was found" if entry["found"] else "was not found"


def setup_texts(results: Entry) -> list[str]:
    """How well the simple networks learned the classes, and how the settings differ from the paper's."""
    texts = []
    if results["networks"]:
        shown = []
        for network in results["networks"]:
            text = f"{network['network']} predicts {percent(network['accuracy'])} of its training rows"
            if network["held_back_accuracy"] is not None:
                text += f" and {percent(network['held_back_accuracy'])} of the held-back rows"
            shown.append(text)
        texts.append(
            f"Simple networks: {'; '.join(shown)} as their label. They must not learn the classes well: where "
            f"all of them reach {percent(LEARNED)}, the method's premise fails."
        )
    if results["changed_settings"]:
        changed = results["changed_settings"]
        named = ", ".join(
            f"{entry['setting'].replace('_', ' ')} {entry['value']} (paper: {entry['paper']})"
            for entry in changed[:MOST_SETTINGS]
        )
        more = f", and {len(changed) - MOST_SETTINGS} more" if len(changed) > MOST_SETTINGS else ""
        count = "1 setting differs" if len(changed) == 1 else f"{len(changed)} settings differ"
        texts.append(f"Preset {results['preset']}: {count} from the paper's: {named}{more}.")
        if any(map(_is_smaller, changed)):
            texts[-1] += " Fewer networks or epochs than the paper's cost sensitivity, above all for faint triggers."
    return texts


def _is_smaller(entry: Entry) -> bool:
    """Whether an entry of "changed_settings" makes VBD's networks fewer, or their training shorter."""
    if entry["setting"] not in SIZES:
        return False
    value, paper = entry["value"], entry["paper"]
    return len(value) < len(paper) if isinstance(value, str) else value < paper


def limits_text(results: Entry) -> str:
    """What the method cannot find by design."""
    return VBD_NOT_FOUND if results["networks"] else NOT_FOUND


# ---- Caveats and next steps -----------------------------------------------------------------------------------------


def caveats(results: Entry) -> list[str]:
    """Caveats for the reader, one or two sentences each."""
    if reason_of(results):
        return [limits_text(results)]
    texts = [limits_text(results)]
    if results["flagged"] and not results["detection"]:
        texts.append(
            "The ground truth is unknown: some of the flagged rows may be clean, and some poisoned rows may not be flagged."
        )
    if not results["extracts_patterns"]:
        texts.append(
            "A detector that flags a fixed share of the rows does so even if none is poisoned; see its settings."
        )
    large = [entry for entry in results["classes"] if (entry["flagged"] or 0) > MOST_OF_A_CLASS * entry["rows"]]
    if large:
        texts.append(
            f"{listed(large)}: more than half of the rows are flagged. Look at them before removing them; the remaining rows "
            "may be too few to learn the class from."
        )
    not_compared = untested(results)
    if not_compared:
        texts.append(
            f"{listed(not_compared)} {NOT_TESTED}; {not_compared[0]['title']} {not_compared[0]['not_tested']}. A trigger of "
            "such a class goes unnoticed."
        )
    if found_classes(results):
        texts.append(
            "A feature that all rows of a class share, such as a watermark or a border, looks like a trigger to this method: "
            "compare the pattern with the images."
        )
    if count := results["copies"]:
        text = f"{count:,} of the {results['rows']:,} {results['unit']} {is_or_are(count)} exact copies of others."
        if results["networks"]:
            text += " A held-back row whose copy the simple networks were trained on is not new to them: remove copies first."
        texts.append(text)
    if count := results["contradicted"]:
        texts.append(
            f"{count:,} {results['unit']} have the same pixels as another of another class: not all of these labels are right."
        )
    if results["sensitivity"]["sets"]:
        texts.append(
            "The planted trigger shows what this run finds of one opaque square, with one choice of rows for each number. It "
            "is no promise for other triggers or other classes."
        )
    return texts


def next_steps(results: Entry) -> list[str]:
    """What the owner of the rows can do now, as paragraphs."""
    if reason_of(results):
        known = "Nothing is known about these rows."
        if not results["networks"]:
            return [
                f"Run the audit again with more rows, with other settings, or with a detector that needs fewer. {known}"
            ]
        return [
            "Run the audit again with a detector that does not rely on simple networks, such as "
            "--defenses=activation_clustering or --defenses=spectral_signatures: they name "
            f"rows, extract no trigger, and need no clean rows. Or, if rows were too few, with more of them. {known}"
        ]
    level, cleaned = results["verdict"]["level"], results["cleaned"]
    costs = "Removing clean rows costs a little accuracy; training on poisoned rows may give an attacker control of the model."
    if level == "found":
        first = (
            "Compare the triggers and the examples below with your own images. If they do not belong there, remove the rows in "
            "flagged.csv and train again from the start. Do not use a model that was trained on all of these rows, and find "
            "out where the flagged rows came from."
        )
    elif results["flagged"] and not results["extracts_patterns"]:
        first = f"Look at the rows in flagged.csv, and at the most suspicious rows below, before you decide. {costs}"
    elif found_classes(results) and results["flagged"]:
        first = f"Look at the triggers below and at the rows in flagged.csv before you decide. {costs}"
    elif found_classes(results):
        first = (
            "Look at the triggers below. If they do not belong on your images, look through the rows of these classes: "
            "rows.csv lists them by score, although none of them is flagged."
        )
    else:
        first = (
            "There are no rows to remove. A detector of another kind, or settings closer to the paper's (--preset=paper), may "
            "find what this run did not."
        )
    texts = [first]
    if low := [band for band in results["score_bands"] if band["flagged"]]:
        counts = ", ".join(f"{band['flagged']:,} {band['title']}" for band in low)
        texts.append(
            f"The score of a row is the detector's probability that the row has the pattern: of the flagged rows, {counts}. "
            "Look at the lowest ones first, at the end of flagged.csv: they are the least certain."
        )
    if cleaned["kind"] == "npz":
        texts.append(
            f"cleaned.npz has the {cleaned['rows']:,} rows that are not flagged: images, labels, and row, their original "
            "numbers."
        )
    elif cleaned["kind"] == "folder":
        texts.append(
            f"cleaned/ has copies of {cleaned['copied']:,} of the {cleaned['rows']:,} files that are not flagged."
        )
        texts += _not_copied(cleaned)
    elif results["flagged"] and results["unit"] == "files" and cleaned["rows"]:
        texts.append("The same command with --copy-files also copies the files that are not flagged.")
    emptied = [entry for entry in results["classes"] if entry["rows"] and entry["flagged"] == entry["rows"]]
    if emptied:
        names = ", ".join(entry["title"] for entry in emptied[:MOST_REASONS]) + (
            " ..." if emptied[MOST_REASONS:] else ""
        )
        texts.append(f"Every row of {names} is flagged: without these rows the class is gone. Look at them first.")
    if results["flagged"]:
        texts.append(
            "flagged.csv lists the flagged rows, most suspicious first; kept.csv the other rows; rows.csv every row."
        )
    return texts


def _not_copied(cleaned: Entry) -> list[str]:
    texts = []
    for names, text in (
        ([f"{entry['file']} ({entry['why']})" for entry in cleaned["left_out"]], "Not copied"),
        (cleaned["strangers"], "Files below cleaned/ that this run did not put there"),
    ):
        if names:
            shown = "; ".join(map(printable, names[:MOST_REASONS]))
            more = f"; and {len(names) - MOST_REASONS:,} more, in results.json" if len(names) > MOST_REASONS else ""
            texts.append(f"{text}: {shown}{more}.")
    return texts


# ---- Small words ----------------------------------------------------------------------------------------------------


def listed(classes: Sequence[Entry]) -> str:
    """ "Class 3 (cat)", "Classes 1 and 2", or "5 classes" for too many to name."""
    if len(classes) > MOST_NAMED:
        return f"{len(classes)} classes"
    names = [entry["title"].removeprefix("class ") for entry in classes]
    if len(names) == 1:
        return f"Class {names[0]}"
    return f"Classes {', '.join(names[:-1])} and {names[-1]}"


def capital(text: str) -> str:
    """The text with its first letter in upper case."""
    return text[:1].upper() + text[1:]


def is_or_are(count: int) -> str:
    """The verb after a count."""
    return "is" if count == 1 else "are"


def percent(share: float) -> str:
    """ "40 %", "3.3 %", "0 %"."""
    return f"{100 * share:.{0 if share == 0 or share >= 0.1 else 1}f} %"


def _paragraphs(*texts: str) -> str:
    return "\n\n".join(filter(None, texts))

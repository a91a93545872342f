"""A TA-KD run as something to look at: the pictures, the verdict in words, the report."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bdjax.attacks.providers import ProviderTriggers
from bdjax.inspection import feature_maps, grad_cam, trigger_pictures
from bdjax.reporting import plots, report, tables
from bdjax.reporting import ta_kd_results as numbers
from bdjax.reporting.report import Figure, Section, Verdict, timings_table
from bdjax.run.folder import RunFolder, describe_environment
from bdjax.training.ensemble import members
from bdjax.training.stages import Nets
from bdjax.triggers import masked_blend
from bdjax.types import TrainTest

ATTACK_WORKS = 0.5
"""Mean ASR of the teachers from which on the verdict speaks of an attack."""
REMOVED = 0.05
"""Mean ASR up to which the verdict calls a backdoor removed."""

_EXPLAINED = ("teachers", "aggregated", "student")


class Picture(NamedTuple):
    """A plot to be saved in the run folder and shown in a section of the report."""

    section: str
    figure: Any  # matplotlib's
    caption: str
    alt: str


def draw(
    nets: Mapping[str, Nets],
    results: Mapping[str, Any],
    triggers: ProviderTriggers | None,
    data: TrainTest,
    row: int,
) -> dict[str, Picture]:
    """Draw everything that is looked at, for the first seed.

    Args:
        nets: role -> networks; black-box teachers are not among them.
        results: of `ta_kd_results.summarise`.
        triggers: of the first seed; None if nobody knows them.
        data: the test images are looked at.
        row: the test row that triggers, Grad-CAM and feature maps are shown on.

    Returns:
        File name without ending -> picture.
    """
    pictures = {"defenses": _bars(results)}
    curves = {role: dict(each.history) for role, each in nets.items() if each.history}
    pictures["training_curves"] = Picture(
        "Training",
        plots.training_curves(
            {role: {"loss": h["loss"], "validation loss": h["validation_loss"]} for role, h in curves.items()},
            log_scale=True,
        ),
        "Loss per epoch, the mean over all members and their range. Teachers and baselines minimise cross-entropy; the "
        "aggregated model and the student minimise the distillation loss, whose scale is another.",
        "Training and validation loss of every role against epochs.",
    )
    if triggers is None:
        return pictures
    image = jnp.asarray(data.test.images[row], jnp.float32) / 255.0
    shown = trigger_pictures.trigger_pictures(triggers.params, image)
    columns = [f"{i + 1}: {name}" for i, name in enumerate(triggers.names)]
    pictures["triggers"] = Picture(
        "Triggers",
        plots.image_grid(
            trigger_pictures.picture_rows(shown),
            columns,
            ["mask", "trigger", "image", "triggered", "difference × 10"],
            "",
        ),
        "Each provider's trigger taken apart: where it acts, what it paints, and one test image without and with it. The "
        "last column shows their difference ten times enlarged.",
        "A row for each trigger with mask, trigger, image, triggered image and difference.",
    )
    pictures |= _matrices(results, triggers)
    triggered = jax.vmap(masked_blend.apply, in_axes=(0, None))(triggers.params, image)
    explained = {role: nets[role] for role in _EXPLAINED if role in nets}
    pictures["grad_cam"] = _grad_cams(explained, triggered, columns, data.test.labels[row])
    maps = {}
    for role, each in explained.items():
        name = "teacher 1" if role == "teachers" else numbers.TITLES[role]
        taken = feature_maps.feature_maps(each.model, members(each.variables, 0), triggered[0], scaled=False)
        maps[name] = {tap: np.asarray(values) for tap, values in taken.items()}
    pictures["feature_maps"] = Picture(
        "What the networks see",
        plots.feature_map_grid(maps, ""),
        f"Activations of stages 1 to 3 on the image under trigger 1 ({triggers.names[0]}): the mean over channels, then the "
        "first channels, each stretched to its own range.",
        "Feature maps of teacher 1, the aggregated model and the student.",
    )
    return pictures


def _bars(results: Mapping[str, Any]) -> Picture:
    models = results["models"]
    values, errors = {}, {}
    for metric, title in (("cda", "CDA"), ("asr", "ASR"), ("r_acc", "R-ACC")):
        summaries = [model["summary"][metric] for model in models.values()]
        if any(summary["mean"] is not None for summary in summaries):
            values[title] = [summary["mean"] for summary in summaries]
            errors[title] = [summary["standard_deviation"] for summary in summaries]
    return Picture(
        "Results",
        plots.bars([model["title"] for model in models.values()], values, errors),
        "High CDA and R-ACC and low ASR are good. Bars are means over seeds, whiskers one standard deviation.",
        "Bars of CDA, ASR and R-ACC for every defense.",
    )


def _matrices(results: Mapping[str, Any], triggers: ProviderTriggers) -> dict[str, Picture]:
    cross = results["cross_trigger"][0]
    rows = [f"teacher {i + 1}" for i in range(len(cross["asr"]) - cross["last_row_is_clean"])]
    rows += ["clean"] if cross["last_row_is_clean"] else []
    columns = [f"{i + 1}: {name}" for i, name in enumerate(triggers.names)]
    pictures = {}
    for metric, title, says in (
        ("asr", "ASR", "The diagonal is each teacher's own backdoor; a dark cell beside it is a teacher that obeys "
         "another's trigger, which is what makes a vote fail."),
        ("r_acc", "R-ACC", "The share of triggered rows that are still recognised. Low values off the diagonal mean that the "
         "trigger hides the object, whether or not it is obeyed."),
    ):  # fmt: skip
        pictures[f"cross_trigger_{metric}"] = Picture(
            "Cross-trigger generalisation",
            plots.matrix(
                np.asarray(cross[metric]),
                rows,
                columns,
                f"{title} of each model under each trigger",
                separate_last_row=cross["last_row_is_clean"],
                column_label="trigger",
                value_label=title,
            ),
            f"{title} of the first seed's models under every trigger. {says}",
            f"A matrix of {title} values, models against triggers.",
        )
    return pictures


def _grad_cams(nets: Mapping[str, Nets], triggered: jax.Array, columns: list[str], label: int) -> Picture:
    names, heat, captions = [], [], []

    def add(name: str, maps: np.ndarray, classes: np.ndarray) -> None:
        names.append(name)
        heat.append(np.asarray(maps))
        captions.append([f"says {each}" for each in np.asarray(classes)])

    for role, each in nets.items():
        if role == "teachers":
            # The i-th map of teacher i: every teacher under its own trigger, by the compiled call that serves them all.
            own = [grad_cam.grad_cam(each.model, members(each.variables, i), triggered) for i in range(len(columns))]
            add(
                "each under its own",
                np.stack([maps[i] for i, (maps, _) in enumerate(own)]),
                [c[i] for i, (_, c) in enumerate(own)],
            )
            add("teacher 1", *own[0])
        else:
            add(numbers.TITLES[role], *grad_cam.grad_cam(each.model, members(each.variables, 0), triggered))
    images = np.broadcast_to(np.asarray(triggered), (len(names), *triggered.shape))
    return Picture(
        "What the networks see",
        plots.overlay_grid(images, np.stack(heat), names, columns, "", captions=captions),
        f"Grad-CAM at stage 3 for the predicted class, on a test image of class {label} under each trigger: the first "
        "outside the target class that the student recognises without one. First each teacher under its own trigger, then "
        "teacher 1 under all of them, then the models of the defense.",
        "Heat maps of where each model looks, under each trigger.",
    )


def verdict(results: Mapping[str, Any]) -> Verdict:
    """Say in words what the numbers say, and against the baselines, too."""
    models = results["models"]

    def mean(role: str, metric: str) -> float | None:
        return models[role]["summary"][metric]["mean"] if role in models else None

    student, alone = mean("student", "cda"), mean("alone", "cda")
    gain = (
        f"The student's net trained on the same clean rows without any teacher has CDA {alone:.3f} and the student "
        f"{student:.3f}: the teachers are worth {student - alone:+.3f}."
    )
    asr = {role: mean(role, "asr") for role in ("teachers", "soft vote", "hard vote", "aggregated", "student")}
    if asr["teachers"] is None:
        return Verdict(
            "info",
            "These teachers' triggers are not known, so no attack success rate can be measured.",
            f"The aggregated model has CDA {mean('aggregated', 'cda'):.3f}, the teachers on average "
            f"{mean('teachers', 'cda'):.3f}.\n\n{gain}",
        )
    count = len(models["teachers"]["seeds"][0]["members"])
    tuned = mean("fine-tuned", "asr")
    compared = [f"Soft vote has ASR {asr['soft vote']:.3f}, hard vote {asr['hard vote']:.3f}"]
    if tuned is not None:
        compared.append(
            f"the teachers plainly fine-tuned on the clean rows {tuned:.3f} at CDA {mean('fine-tuned', 'cda'):.3f}"
        )
    text = f"{'; '.join(compared)}.\n\n{gain}"
    if asr["teachers"] < ATTACK_WORKS:
        headline = (
            f"The attack does not work here: mean ASR {asr['teachers']:.3f} under the {count} teachers' own triggers."
        )
        return Verdict("warning", headline, text)
    worst = max(asr["aggregated"], asr["student"])
    facts = (
        f"mean ASR {asr['aggregated']:.3f} for the aggregated model and {asr['student']:.3f} for the student, at CDA "
        f"{mean('aggregated', 'cda'):.3f} and {student:.3f}"
    )
    attacked = f"All {count} teachers together reach a mean ASR of {asr['teachers']:.3f} under their own triggers."
    if worst <= REMOVED:
        return Verdict("clean", f"The backdoors are gone: {facts}.", f"{attacked} {text}")
    if worst < asr["teachers"] / 2:
        return Verdict("warning", f"The backdoors are weaker but not gone: {facts}.", f"{attacked} {text}")
    return Verdict("attacked", f"The backdoors survive: {facts}.", f"{attacked} {text}")


def write(
    folder: RunFolder,
    settings: Mapping[str, Any],
    results: Mapping[str, Any],
    pictures: Mapping[str, Picture],
    timings: Mapping[str, float],
    data: TrainTest,
    reproduce: str,
) -> None:
    """Write table.md, the pictures, timings.json and report.html.

    Args:
        folder: the open run.
        settings: every field of the configuration.
        results: of `ta_kd_results.summarise`.
        pictures: of `draw`.
        timings: seconds for each stage; not part of results.json, which two runs of one command share to the digit.
        data: what was trained and tested on.
        reproduce: the command.
    """
    table = numbers.defense_table(results, data.train.name)
    teachers = numbers.teacher_table(results)
    sizes = numbers.size_table(results)
    folder.write_text("table.md", "\n\n".join(map(tables.to_markdown, (table, teachers, sizes))) + "\n")
    folder.write_json("timings.json", {"seconds": dict(timings)})
    shown: dict[str, list[Figure]] = {}
    for name, picture in pictures.items():
        path = plots.save(picture.figure, folder.file(f"{name}.png"))
        shown.setdefault(picture.section, []).append(Figure(path, picture.caption, picture.alt))
    sections = [
        Section("Results", "", (table,), tuple(shown.pop("Results"))),
        Section("The suspect models", "", (teachers,)),
        *(Section(title, "", (), tuple(figures)) for title, figures in shown.items()),
        Section("Size", "", (sizes,)),
    ]
    ties = results["ties"][0]
    if results["triggers"][0]:
        sections[1] = Section(
            "The suspect models",
            f"Hard votes tie on {ties['clean']:.1%} of the untouched rows and on {np.mean(ties['triggered']):.1%} of the "
            f"triggered ones (first seed). A tie goes to the lowest class by argmax, which favours an attack on class 0.",
            (teachers,),
        )
    page = report.Report(
        title=f"TA-KD on {data.train.name}",
        verdict=verdict(results),
        key_numbers=_key_numbers(results),
        facts=numbers.needs_table(results),
        sections=tuple(sections),
        settings=settings,
        timings=timings_table(timings),
        reproduce=reproduce,
        provenance={"training data": data.train.source, "test data": data.test.source, **describe_environment()},
    )
    folder.write_text("report.html", report.render(page))


def _key_numbers(results: Mapping[str, Any]) -> dict[str, str]:
    chosen = {"teachers' ASR": ("teachers", "asr"), "TA ASR": ("aggregated", "asr"), "student ASR": ("student", "asr"),
              "student CDA": ("student", "cda")}  # fmt: skip
    tiles = {}
    for title, (role, metric) in chosen.items():
        summary = results["models"][role]["summary"][metric]
        if summary["mean"] is not None:
            spread = summary["standard_deviation"]
            tiles[title] = f"{summary['mean']:.3f}" + (f" ± {spread:.3f}" if spread is not None else "")
    return tiles

"""The report on TA-KD: numbers (results.json), tables with the paper's numbers, pictures, verdict and page."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure as Plot

from bdjax import metrics
from bdjax.attacks.providers import ProviderTriggers
from bdjax.choices import Tie, VoteSpace
from bdjax.defenses.aggregation import hard_vote, soft_vote
from bdjax.inspection import feature_maps, grad_cam, trigger_pictures
from bdjax.inspection.cross_trigger import cross_trigger_matrices
from bdjax.metrics import BackdoorMetrics, DefenseWord, defense_word
from bdjax.reporting import plots
from bdjax.reporting import results as schema
from bdjax.reporting.report import Figure, Report, Section, Verdict, level_of
from bdjax.reporting.results import NO_DEFENSE, find, mean_of, number_text
from bdjax.reporting.tables import UNKNOWN, Cell, Table
from bdjax.run.folder import RunFolder
from bdjax.training.ensemble import members
from bdjax.training.stages import Nets
from bdjax.triggers import masked_blend
from bdjax.types import Dataset, TrainTest

ATTACK = "outsourcing"
"""The name of the only attack: each provider uses a different trigger."""


class Role(NamedTuple):
    """A measured role: a method of results.json."""

    title: str
    needs: tuple[str, ...]


ROLES: Mapping[str, Role] = {
    "clean": Role("clean reference", ("all training rows, clean: not available to a real defender",)),
    "teachers": Role("teachers (mean)", ()),
    "soft vote": Role("soft vote", ("suspect models",)),
    "hard vote": Role("hard vote", ("suspect models",)),
    "aggregated": Role("aggregated model (TA)", ("suspect models (logits only)", "clean rows")),
    "student": Role("student", ("the aggregated model", "clean rows")),
    "alone": Role("student's net, clean rows only", ("clean rows",)),
    "fine-tuned": Role("teachers, fine-tuned (mean)", ("suspect models (weights)", "clean rows")),
}
"""In table order."""
MEMBERWISE = ("teachers", "fine-tuned")
"""Roles whose members are each tested with their own trigger."""

# Tables 1 and 2 of Heydari et al. 2025: CDA, ASR, R-ACC of the first six roles. The teachers' row is the mean of seven rows.
PAPER: Mapping[str, Mapping[str, tuple[float, float, float]]] = {
    "mnist": dict(zip(ROLES, ((0.994, 0.000, 0.953), (0.990, 1.000, 0.000), (0.995, 0.172, 0.824), (0.995, 0.056, 0.939),
                              (0.989, 0.001, 0.986), (0.989, 0.001, 0.986)), strict=False)),
    "cifar10": dict(zip(ROLES, ((0.853, 0.029, 0.767), (0.763, 0.906, 0.079), (0.839, 0.120, 0.696), (0.831, 0.051, 0.769),
                                (0.686, 0.026, 0.603), (0.668, 0.054, 0.582)), strict=False)),
}  # fmt: skip

OUTCOMES: Mapping[DefenseWord, str] = {
    "removed": "The backdoors are removed",
    "removed at a cost": "The backdoors are removed, but at a cost of accuracy",
    "weakened": "The backdoors are weaker but not removed",
    "kept": "The backdoors remain",
}
"""First words of the verdict, from the best outcome to the worst."""

PICTURES: Mapping[str, tuple[str, str, str]] = {
    "defenses": (
        "Results",
        "High CDA and R-ACC and low ASR are good. Bars are means over seeds, whiskers one standard deviation.",
        "Bars of CDA, ASR and R-ACC for every defense.",
    ),
    "training_curves": (
        "Training",
        "Loss per epoch: mean and range over all members. Teachers and baselines minimise cross-entropy; the aggregated "
        "model and the student minimise the distillation loss, which has a different scale.",
        "Training and validation loss of every role against epochs.",
    ),
    "triggers": (
        "Triggers",
        "Each provider's trigger: its mask, its pattern, and one test image without and with it. The last column shows their "
        "difference, ten times enlarged.",
        "A row for each trigger with mask, trigger, image, triggered image and difference.",
    ),
    "cross_trigger_asr": (
        "Cross-trigger generalisation",
        "ASR of the first seed's models under every trigger. The diagonal is each teacher's own backdoor; a dark cell off the "
        "diagonal is a teacher that responds to another provider's trigger, which makes votes fail.",
        "A matrix of ASR values, models against triggers.",
    ),
    "cross_trigger_r_acc": (
        "Cross-trigger generalisation",
        "R-ACC of the first seed's models under every trigger: the share of triggered rows that are still classified "
        "correctly. Low values off the diagonal mean that the trigger hides the object, with or without a backdoor.",
        "A matrix of R-ACC values, models against triggers.",
    ),
    "grad_cam": (
        "Grad-CAM and feature maps",
        "Grad-CAM at stage 3 for the predicted class, on a test image of class {label} under each trigger: the first image "
        "outside the target class that the student classifies correctly without a trigger. First each teacher under its own "
        "trigger, then teacher 1 under every trigger, then the models of the defense.",
        "Grad-CAM heat maps of each model under each trigger.",
    ),
    "feature_maps": (
        "Grad-CAM and feature maps",
        "Activations of stages 1 to 3 on the image under trigger 1 ({trigger}): the mean over channels, then the "
        "first channels, each stretched to its own range.",
        "Feature maps of teacher 1, the aggregated model and the student.",
    ),
}
"""File name without extension -> section, caption, and alternative text."""

_METRICS = ("cda", "asr", "r_acc")
_DELTAS = ("delta_cda", "delta_asr", "delta_r_acc")
_HEADER = ("CDA", "ASR", "R-ACC", "Δ CDA", "Δ ASR", "Δ R-ACC")


def summarise(
    logits: Sequence[Mapping[str, np.ndarray]],
    labels: np.ndarray,
    triggers: Sequence[ProviderTriggers | None],
    parameters: Mapping[str, int],
    seed: int,
    *,
    target: int,
    vote_space: VoteSpace,
    tie: Tie,
) -> dict[str, Any]:
    """Measure every role on every seed.

    Args:
        logits: for each seed, role -> float [members, 1 + T, N, K]; the first view is the untouched test set, the other views
            are the same rows under each of T triggers (T may be 0: then there is no ASR). "fine-tuned" may instead have
            [members, 2, N, K], the second view under each member's own trigger.
        labels: int32 [N], true labels.
        triggers: of each seed; None if unknown.
        parameters: role -> trainable parameters of the deployed model.
        seed: number of the first seed.
        target: the attacker's class.
        vote_space: what the soft vote averages.
        tie: which class wins a tied hard vote.

    Returns:
        The tree of `bdjax.reporting.results`, the same for the same inputs, with the roles as methods. Numbers of a seed have
        "members" for `MEMBERWISE` roles, "per_trigger" for other roles. In addition "ties" and "cross_trigger" of each seed.
    """
    measured = [
        _one_seed(role_logits, labels, known, target, vote_space, tie)
        for role_logits, known in zip(logits, triggers, strict=True)
    ]
    seeds = [seed + number for number in range(len(measured))]
    methods, cells = [], []
    for role in (role for role in ROLES if role in measured[0][0]):
        base = NO_DEFENSE if role == "teachers" else role
        entry = {"method": role, "base": base, "title": ROLES[role].title, "needs": list(ROLES[role].needs)}
        methods.append({**entry, "parameters": parameters.get(role)})
        by_seed = [{"seed": number, **models[role]} for number, (models, _, _) in zip(seeds, measured, strict=True)]
        names = [name for name in (*_METRICS, *_DELTAS) if name in by_seed[0]]
        cells.append(schema.make_cell(ATTACK, role, by_seed, names))
    names = [list(known.names) if known else None for known in triggers]
    attack = {"attack": ATTACK, "title": "outsourced training", "target": target, "triggers": names}
    defined = (*_METRICS, *_DELTAS, "delta_per_trigger", "parameters")
    extra = {"ties": [ties for _, ties, _ in measured], "cross_trigger": [cross for _, _, cross in measured]}
    return schema.assemble(defined, len(labels), seeds, [attack], methods, cells, **extra)


def agreement(logits: np.ndarray, names: Sequence[str]) -> dict[str, Any]:
    """How far third-party teachers agree on the untouched test rows, which needs no trigger and no label.

    Args:
        logits: float [T, N, K].
        names: of the T teachers.

    Returns:
        "teachers": the names; "pairs": T lists of T shares of rows on which both predict the same class; "vote": for each
        teacher, the share of rows on which it does not predict the class that the hard vote does.
    """
    predicted = np.argmax(logits, axis=-1)
    voted = hard_vote(logits).predictions
    pairs = np.mean(predicted[:, None] == predicted[None], axis=-1)
    return {
        "teachers": list(names),
        "pairs": pairs.tolist(),
        "vote": np.mean(predicted != voted[None], axis=-1).tolist(),
    }


def agreement_table(results: Mapping[str, Any]) -> Table:
    """The table of `agreement`."""
    found = results["agreement"]
    numbers = [str(number) for number in range(1, len(found["teachers"]) + 1)]
    rows = tuple(
        (f"{number}: {name}", *pairs, vote)
        for number, name, pairs, vote in zip(numbers, found["teachers"], found["pairs"], found["vote"], strict=True)
    )
    notes = (
        f"{results['test_rows']:,} untouched test rows: the share on which two teachers predict the same class, and the share "
        "on which a teacher does not predict the class of the hard vote. A backdoor shows in neither: on untouched rows a "
        "backdoored teacher agrees like a clean one."
    )
    return Table("Agreement between the teachers", ("teacher", *numbers, "not the vote"), rows, notes)


def _one_seed(
    role_logits: Mapping[str, np.ndarray],
    labels: np.ndarray,
    triggers: ProviderTriggers | None,
    target: int,
    vote_space: VoteSpace,
    tie: Tie,
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any] | None]:
    """Numbers of each role; shares of ties; the cross-trigger matrices, None without a trigger."""
    predictions = {role: np.argmax(values, axis=-1) for role, values in role_logits.items()}  # int [members, 1 + T, N]
    views = np.moveaxis(role_logits["teachers"], 1, 0)
    predictions["soft vote"] = np.stack([soft_vote(suspects, vote_space) for suspects in views])[None]
    votes = [hard_vote(suspects, tie) for suspects in views]
    predictions["hard vote"] = np.stack([vote.predictions for vote in votes])[None]
    names = triggers.names if triggers else ()

    def views_of(role: str, member: np.ndarray, number: int) -> np.ndarray:
        """What a member predicts under the triggers that it is measured under: int [0 to T, N]."""
        if role not in MEMBERWISE:
            return member[1:]
        if number >= len(names):
            return member[:0]
        return member[1:] if len(member) == 2 else member[[1 + number]]

    measured = {
        role: [metrics.measure(member[0], views_of(role, member, i), labels, target) for i, member in enumerate(values)]
        for role, values in predictions.items()
    }
    clean = measured["clean"][0] if "clean" in measured else None
    models = {
        role: _memberwise(member_metrics, names, clean)
        if role in MEMBERWISE
        else _single(member_metrics[0], None if role == "clean" else clean)
        for role, member_metrics in measured.items()
    }
    ties = [float(np.mean(vote.is_tie)) for vote in votes]
    cross = None
    if len(views) > 1:
        rows = [predictions["teachers"], *([predictions["clean"]] if clean else [])]
        asr, r_acc = cross_trigger_matrices(np.concatenate(rows)[:, 1:], labels, target)
        cross = {"asr": np.asarray(asr).tolist(), "r_acc": np.asarray(r_acc).tolist(), "last_row_is_clean": bool(clean)}
    return models, {"clean": ties[0], "triggered": ties[1:]}, cross


def _single(measured: BackdoorMetrics, clean: BackdoorMetrics | None) -> dict[str, Any]:
    """One model under all triggers: the means, and each trigger's own numbers."""
    numbers: dict[str, Any] = {"cda": measured.cda, "asr": None, "r_acc": None}
    if len(measured.asr):
        numbers |= {"asr": float(np.mean(measured.asr)), "r_acc": float(np.mean(measured.r_acc))}
        numbers["per_trigger"] = {"asr": measured.asr.tolist(), "r_acc": measured.r_acc.tolist()}
        if clean is not None:
            numbers |= metrics.deltas(clean, measured)
    return numbers


def _memberwise(
    measured: Sequence[BackdoorMetrics], names: Sequence[str], clean: BackdoorMetrics | None
) -> dict[str, Any]:
    """Each member under its own trigger, the only one it was measured under, and the means over the members."""
    rows = []
    for i, member in enumerate(measured):
        row: dict[str, Any] = {"cda": member.cda, "asr": None, "r_acc": None}
        if i < len(names):
            row |= {"trigger": names[i], "asr": float(member.asr[0]), "r_acc": float(member.r_acc[0])}
            if clean is not None:
                row |= metrics.deltas(clean, member, [i])
        rows.append(row)
    means = {
        name: None if rows[0].get(name) is None else float(np.mean([row[name] for row in rows]))
        for name in (*_METRICS, *_DELTAS)
    }
    return {name: value for name, value in means.items() if value is not None or name in _METRICS} | {"members": rows}


def main_table(results: Mapping[str, Any], dataset: str) -> Table:
    """Table 2 of the paper, with the baselines, and with the paper's rows if it has this dataset."""
    rows, styles = [], []
    paper = PAPER.get(dataset, {})
    for cell, _, method in schema.cells(results):
        role, title = method["method"], method["title"]
        rows.append((title, *(number_text(cell, name) for name in (*_METRICS, *_DELTAS))))
        styles.append("ours" if role in ("aggregated", "student") else "")
        if role in paper:
            (cda, asr, r_acc), clean = paper[role], paper["clean"]
            deltas = (None,) * 3 if role == "clean" else (clean[0] - cda, asr - clean[1], clean[2] - r_acc)
            rows.append((f"the paper's {title}", cda, asr, r_acc, *deltas))
            styles.append("paper")
    notes = (
        f"{schema.mean_text(results).capitalize()}, {results['test_rows']:,} test rows. ASR and R-ACC are averaged over the "
        "triggers; each teacher is tested with its own trigger. Δ: difference to the clean reference."
    )
    return Table("Defenses", ("", *_HEADER), tuple(rows), notes, tuple(styles))


def teacher_table(results: Mapping[str, Any], number: int = 0) -> Table:
    """Table 1 of the paper: each suspect model of one seed, the first by default, under its own trigger."""
    rows: list[tuple[Cell, ...]] = []
    if clean := find(results, ATTACK, "clean"):
        row = clean["by_seed"][number]
        rows.append(("clean reference", "mean over all", *(row[name] for name in _METRICS), *(None,) * 3))
    for i, row in enumerate(find(results, ATTACK, "teachers")["by_seed"][number]["members"], 1):
        rows.append((f"teacher {i}", row.get("trigger"), *(row.get(name) for name in (*_METRICS, *_DELTAS))))
    notes = f"Seed {number + 1} of {len(results['seeds'])}."
    return Table("Suspect models", ("", "trigger", *_HEADER), tuple(rows), notes)


def needs_table(results: Mapping[str, Any]) -> Table:
    """What each method receives."""
    nothing = "none: the suspect models themselves"
    rows = tuple((method["title"], ", ".join(method["needs"]) or nothing) for method in results["methods"])
    return Table("What each method receives", ("", "receives"), rows)


def size_table(results: Mapping[str, Any]) -> Table:
    """Table 3 of the paper: the size of the deployed models."""
    methods = {method["method"]: method for method in results["methods"]}
    titles = {"soft vote": "ensemble (votes)"} | {role: ROLES[role].title for role in ("aggregated", "student")}
    sizes = [(title, methods[role]["parameters"]) for role, title in titles.items()]
    rows = tuple((title, size) for title, size in sizes if size is not None)
    notes = "The paper, at width 64: 7 × 8.2M, 8.2M and 2.8M."
    return Table("Trainable parameters", ("deployed", "parameters"), rows, notes)


def word_of(results: Mapping[str, Any], attack: str, role: str) -> DefenseWord | None:
    """The word for what became of the backdoors in a role; None if the triggers are unknown, and for a role that is not the
    defense's. The control is the clean reference."""
    if role not in ("aggregated", "student"):
        return None
    before, after, clean = (find(results, attack, name) for name in ("teachers", role, "clean"))
    asr, cda = ([mean_of(cell, name) for cell in (before, after)] for name in ("asr", "cda"))
    control = mean_of(clean, "asr")
    return None if None in asr else defense_word(*asr, *cda, control, control)


def verdict(results: Mapping[str, Any]) -> Verdict:
    """Put the numbers into words, also compared with the baselines. The control is the clean reference."""

    def mean(role: str, name: str) -> float | None:
        return mean_of(find(results, ATTACK, role), name)

    before, control = mean("teachers", "asr"), mean("clean", "asr")
    student, alone = mean("student", "cda"), mean("alone", "cda")
    gain = (
        f"The student's network trained on the same clean rows without teachers has CDA {alone:.3f}, the student has "
        f"{student:.3f}: the gain from the teachers is {student - alone:+.3f}."
    )
    if before is None:
        headline = "The teachers' triggers are unknown, so the attack success rate cannot be measured."
        text = f"The aggregated model has CDA {mean('aggregated', 'cda'):.3f}, the teachers on average "
        text = f"{text}{mean('teachers', 'cda'):.3f}."
        if found := results.get("agreement"):
            text += (
                f" Measured: accuracy, and disagreement: on average a teacher differs from the vote on "
                f"{np.mean(found['vote']):.1%} of the test rows. Not measured: ASR and R-ACC; that a backdoor is gone does not "
                "follow from these numbers."
            )
        return Verdict("info", headline, f"{text}\n\n{gain}")
    count = len(find(results, ATTACK, "teachers")["by_seed"][0]["members"])
    compared = f"Soft vote has ASR {mean('soft vote', 'asr'):.3f}, hard vote {mean('hard vote', 'asr'):.3f}"
    if find(results, ATTACK, "fine-tuned"):
        compared += f"; the teachers fine-tuned on the clean rows {mean('fine-tuned', 'asr'):.3f}"
        compared += f" at CDA {mean('fine-tuned', 'cda'):.3f}"
    text = f"{compared}.\n\n{gain}"
    words = [word_of(results, ATTACK, role) for role in ("aggregated", "student")]
    if "nothing to remove" in words:
        headline = f"The attack does not work here: mean ASR {before:.3f} under the {count} teachers' own triggers"
        return Verdict("warning", headline + ("." if control is None else f"; a clean model has {control:.3f}."), text)
    worst = max(words, key=list(OUTCOMES).index)
    known = f" under the {count} known triggers" if "agreement" in results else ""
    headline = (
        f"{OUTCOMES[worst]}{known}: mean ASR {mean('aggregated', 'asr'):.3f} for the aggregated model and "
        f"{mean('student', 'asr'):.3f} for the student, at CDA {mean('aggregated', 'cda'):.3f} and {student:.3f}."
    )
    attacked = f"The {count} teachers reach a mean ASR of {before:.3f}, each under its own trigger."
    return Verdict(level_of([worst]), headline, f"{attacked} {text}")


def page(
    folder: RunFolder,
    results: Mapping[str, Any],
    nets: Mapping[str, Nets],
    triggers: ProviderTriggers | None,
    data: TrainTest,
    row: int,
) -> Report:
    """The report page, without the parts that `report.publish` adds to every run. Figures (first seed) go into the folder.

    Args:
        folder: the open run.
        results: from `summarise`.
        nets: role -> networks, without black-box teachers.
        triggers: of the first seed; None if unknown.
        data: the training and the test set.
        row: the test row on which triggers, Grad-CAM and feature maps are shown.
    """
    figures: dict[str, list[Figure]] = {}
    fields = {"label": data.test.class_title(data.test.labels[row]), "trigger": triggers.names[0] if triggers else ""}
    for name, plot in _draw(results, nets, triggers, data, row).items():
        section, caption, alt = PICTURES[name]
        path = plots.save(plot, folder.file(f"{name}.png"))
        figures.setdefault(section, []).append(Figure(path, caption.format(**fields), alt))
    ties = results["ties"][0]
    tied = (
        (
            f"Hard votes tie on {ties['clean']:.1%} of the untouched rows and on {np.mean(ties['triggered']):.1%} of the "
            "triggered ones (first seed). argmax gives a tie to the lowest class, which favours an attack on class 0."
        )
        if ties["triggered"]
        else ""
    )
    chosen = {"teachers' ASR": ("teachers", "asr"), "TA ASR": ("aggregated", "asr"), "student ASR": ("student", "asr"),
              "student CDA": ("student", "cda")}  # fmt: skip
    tiles = {title: number_text(find(results, ATTACK, role), name) for title, (role, name) in chosen.items()}
    agreements = (agreement_table(results),) if "agreement" in results else ()
    return Report(
        title=f"TA-KD on {data.train.name}",
        verdict=verdict(results),
        key_numbers={title: text for title, text in tiles.items() if text != UNKNOWN},
        facts=needs_table(results),
        sections=(
            Section("Results", "", (main_table(results, data.train.name),), tuple(figures.pop("Results"))),
            Section("The suspect models", tied, (teacher_table(results), *agreements)),
            *(Section(title, "", (), tuple(drawn)) for title, drawn in figures.items()),
            Section("Size", "", (size_table(results),)),
        ),
    )


def _draw(
    results: Mapping[str, Any], nets: Mapping[str, Nets], triggers: ProviderTriggers | None, data: TrainTest, row: int
) -> dict[str, Plot]:
    """The figures of `PICTURES` that this run has; arguments as in `page`."""
    known = {title: name for title, name in zip(_HEADER, _METRICS, strict=False) if schema.is_known(results, name)}
    means, deviations = schema.means_and_deviations(results, known)
    curves = {
        role: {"loss": net.history["loss"], "validation loss": net.history["validation_loss"]}
        for role, net in nets.items()
        if net.history
    }
    drawn = {
        "defenses": plots.bars([method["title"] for method in results["methods"]], means, deviations),
        "training_curves": plots.training_curves(curves, log_scale=True),
    }
    if triggers is None:
        return drawn
    image = jnp.asarray(data.test.images[row], jnp.float32) / 255.0
    columns = [f"{i}: {name}" for i, name in enumerate(triggers.names, 1)]
    shown = trigger_pictures.picture_rows(trigger_pictures.trigger_pictures(triggers.params, image))
    steps = ["mask", "trigger", "image", "triggered", "difference × 10"]
    drawn["triggers"] = plots.image_grid(shown, columns, steps, "")
    cross = results["cross_trigger"][0]
    has_clean = cross["last_row_is_clean"]
    rows = [f"teacher {i + 1}" for i in range(len(cross["asr"]) - has_clean)] + ["clean"] * has_clean
    for name, title in zip(_METRICS[1:], _HEADER[1:], strict=False):
        about, labels = f"{title} of each model under each trigger", {"column_label": "trigger", "value_label": title}
        matrix = plots.matrix(np.asarray(cross[name]), rows, columns, about, separate_last_row=has_clean, **labels)
        drawn[f"cross_trigger_{name}"] = matrix
    triggered = jax.vmap(masked_blend.apply, in_axes=(0, None))(triggers.params, image)
    explained = {role: nets[role] for role in ("teachers", "aggregated", "student") if role in nets}
    drawn["grad_cam"] = _grad_cams(explained, triggered, columns, data.test)
    maps = {}
    for role, net in explained.items():
        taken = feature_maps.feature_maps(net.model, members(net.variables, 0), triggered[0], scaled=False)
        title = "teacher 1" if role == "teachers" else ROLES[role].title
        maps[title] = {tap: np.asarray(values) for tap, values in taken.items()}
    return {**drawn, "feature_maps": plots.feature_map_grid(maps, "")}


def _grad_cams(nets: Mapping[str, Nets], triggered: jax.Array, columns: list[str], test: Dataset) -> Plot:
    found = {}  # name of the row -> (heat maps, classes)
    for role, net in nets.items():
        if role != "teachers":
            found[ROLES[role].title] = grad_cam.grad_cam(net.model, members(net.variables, 0), triggered)
            continue
        # The i-th map of teacher i is the one under its own trigger; all use the same compiled call.
        per_teacher = [grad_cam.grad_cam(net.model, members(net.variables, i), triggered) for i in range(len(columns))]
        found["each under its own trigger"] = tuple(
            np.stack([of[k][i] for i, of in enumerate(per_teacher)]) for k in range(2)
        )
        found["teacher 1"] = per_teacher[0]
    heat = np.stack([np.asarray(maps) for maps, _ in found.values()])
    captions = [
        [f"predicts {test.class_title(label)}" for label in np.asarray(classes)] for _, classes in found.values()
    ]
    images = np.broadcast_to(np.asarray(triggered), (len(found), *triggered.shape))
    return plots.overlay_grid(images, heat, list(found), columns, "", captions=captions)

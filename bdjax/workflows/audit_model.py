"""An audit of suspect models: is there a backdoor, into which class, and what does its trigger look like?

The models are the user's, from anywhere that `bdjax.exchange.opening` can open; all that is needed beside them are clean rows.
Several models of one architecture are members of the same calls, and so are the control networks. A black box has no gradients:
a surrogate is distilled from its answers on the clean rows, triggers are searched on that, and only their success on the black
box itself counts. `bdjax/evaluation/model_audit.py` has the measurements, `experiments/audit_model.py` the presets.
"""

import pathlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bdjax.datasets import splits
from bdjax.defenses import teachers
from bdjax.defenses.contract import labelled
from bdjax.defenses.neural_cleanse import NeuralCleanseSettings
from bdjax.defenses.teachers import BATCH_SIZE
from bdjax.errors import InputError
from bdjax.evaluation import model_audit as evidence
from bdjax.evaluation.model_audit import Ask, Controls
from bdjax.exchange.opening import Opened, open_model
from bdjax.inspection import weight_outliers
from bdjax.models import MODELS, Lowering, default_lowering, make_model, normalised_convolutions
from bdjax.reporting import model_page as reporting
from bdjax.reporting.model_verdict import commands
from bdjax.reporting.tables import to_rich
from bdjax.run.config import ExperimentConfig, check_path, check_ranges, check_recipe, load, train_config
from bdjax.run.log import StageLog
from bdjax.settings import Count, LearningRate, Members, NotNegative, NumRows, Range, Steps, Width, check_choice
from bdjax.training import ensemble, memory, processes
from bdjax.training.augmentation import Augmentation
from bdjax.training.member import Optimiser, Recipe, Rows, Schedule
from bdjax.training.stages import StageRunner, prepare
from bdjax.types import Dataset, Key, Model, PoisonedDataset, PyTree, TrainTest
from bdjax.workflows import base
from bdjax.workflows.base import Experiment

Controlled = Annotated[int, Range(at_least=evidence.LEAST_CONTROLS, limit=1000)]


@dataclass(frozen=True, kw_only=True)
class Config(ExperimentConfig):
    """Every setting of an audit of models; `--preset` and `--dataset` decide the defaults of the others."""

    model: tuple[str, ...] = ()
    """the suspect model, or several of one architecture: a folder, FILE.safetensors:ARCHITECTURE, FILE.onnx or
    http://HOST:PORT/PATH; a folder may hold several models"""
    members: tuple[Annotated[int, Range(at_least=1, limit=1_000_000)], ...] = ()
    """which of a folder's models to audit, counted from 1; by default all"""
    outputs: Literal["logits", "probabilities", "labels"] = "logits"
    """what a model that is only asked (.onnx, http) returns"""
    preset: Literal["quick", "paper"] = "paper"
    """quick: minutes on two cores; paper: the searches of the papers, for a GPU"""
    seeds: Members = 1
    """an audit has one seed; --controls sets the number of control networks"""

    controls: Controlled = 9
    """clean networks of the suspect's architecture, trained on the clean rows: the p-value is at least 1 / (this + 1)"""
    clean_rows: NumRows = 0
    """clean training rows that the control networks learn from; 0 for all"""
    search_rows: Count = 1000
    """clean rows among them that triggers are searched on"""
    held_out_rows: Count = 1000
    """test rows that success is measured on"""
    search_epochs: Count = 80
    """passes over the rows of the search"""
    search_batch_size: Count = 64
    """rows per step of the search; each is stamped with the triggers of all classes"""
    index: NotNegative = 2.0
    """smallest anomaly index of a finding; not used for two classes"""
    surrogate: str = "resnet10"
    """architecture of the networks that imitate a model which is only asked, and of its control networks"""
    surrogate_epochs: Count = 80
    """epochs of these imitations"""
    queries: Count = 4
    """pictures made of each clean row that a model which is only asked gets: itself and this many less one with other rows or
    noise in places"""
    query_batch: Count = BATCH_SIZE
    """most images that such a model gets in one call"""

    width: Width = 64
    """channels of surrogates; suspects with known weights set that of their control networks"""
    epochs: Count = 80
    """epochs of the control networks"""
    batch_size: Count = 128
    """batch size of their training"""
    recipe: Recipe = ""
    """named recipe of their training, in place of optimiser, learning rate, schedule and weight decay: speedrun"""
    optimiser: Optimiser = "adam"
    """optimiser of their training"""
    learning_rate: LearningRate = 1e-3
    """initial learning rate of their training"""
    schedule: Schedule = "cosine"
    """learning-rate schedule of their training"""
    steps: Steps = ()
    """for schedule steps: pairs of an epoch and the learning rate from it on"""
    weight_decay: NotNegative = 0.0
    """L2 penalty of their training, added to the gradient as in PyTorch"""
    augmentation: Augmentation = "none"
    """augmentation of their training rows"""
    evaluation_batch_size: Count = 250
    """batch size of evaluation"""


class Suspects(NamedTuple):
    """The models that are audited."""

    opened: list[Opened]
    titles: list[str]
    """of N models"""
    places: list[tuple[int, int]]
    """of N models: which of `opened`, and which of its members"""
    model: Model | None
    """the architecture of all; None for black boxes"""
    variables: PyTree | None
    """stacked [N, ...]; None for black boxes"""


def run(config: Config, experiment: Experiment, log: StageLog | None = None) -> dict[str, Any]:
    """Audit models from the data to the report.

    Args:
        config: all settings.
        experiment: its presets.
        log: where progress is printed; by default the terminal.

    Returns:
        The contents of results.json.

    Raises:
        InputError: the data, a model or the output folder cannot be used.
    """
    log = log or StageLog()
    check(config)
    check_recipe(config, base.default_of(experiment, config))
    train, test = load(config, log)
    open_all = partial(open_suspects, config, train)
    suspects = open_all(default_lowering())
    # Every error in the settings and in the files is raised before the folder is opened, and before anything is measured.
    clean, searched, held_out = take_rows(config, train, test)
    settings = search_settings(config, len(searched))
    if suspects.model is not None:
        config = replace(config, width=width_of(suspects.model) or config.width)
    memory.check_networks(
        lambda width: suspects.model or make_model(config.surrogate, train.num_classes, width),
        train.image_shape,
        config.width,
        config.controls + 1 + len(suspects.titles),
        "fewer --controls or --members",
    )
    run = base.begin(experiment, config, clean, config.controls + 1, log, kept=2 * clean.images.nbytes)
    if suspects.model is not None and run.engine.lowering != default_lowering():
        suspects = open_all(run.engine.lowering)
    folder = run.open_folder({"model": "/".join(opened.digest for opened in suspects.opened)})
    runner = run.make_runner(folder.checkpoints)

    train_key, search_key, query_key, distil_key = jax.random.split(jax.random.key(config.seed), 4)
    predict = partial(runner.predict, batch_size=config.evaluation_batch_size)
    asks = [asker(config, suspects, number, predict, train.num_classes) for number in range(len(suspects.titles))]
    with log.stage("accuracy", detail=f"{len(asks)} × {len(held_out):,} held-out rows"):
        logits = [ask(held_out.images) for ask in asks]
    models = [
        {
            "title": title,
            "source": suspects.opened[suspects.places[number][0]].name,
            "accuracy": float((rows.argmax(axis=1) == held_out.labels).mean()),
            "reason": reason_untested(rows, held_out, clean),
        }
        for number, (title, rows) in enumerate(zip(suspects.titles, logits, strict=True))
    ]
    tested = [number for number, model in enumerate(models) if not model["reason"]]
    found: dict[str, Any] = {}
    if tested:
        model = suspects.model or run.make_model(config.surrogate)
        controls = evidence.train_controls(train_key, config.controls, model, train_config(config), runner, clean)
        boxes = [asks[number] for number in tested]
        found["places"] = list(range(len(tested), len(tested) + config.controls))
        if controls.planting:
            boxes.append(lambda images: predict(model, controls.planted, images)[0])
            rate = evidence.planted_success(controls, partial(predict, model), held_out)
            found["planted"] = {"title": controls.planting.title, "class": controls.planting.target, "success": rate}
        else:
            found["planted"] = {"why": controls.why}
        if suspects.model is not None:
            parts = [ensemble.members(suspects.variables, np.array(tested))]
            parts += [controls.planted] if controls.planting else []
        else:
            imitations = imitate(config, query_key, distil_key, model, runner, boxes, clean, log)
            parts = [ensemble.members(imitations, np.arange(number, number + 1)) for number in range(len(boxes))]
            parts = [ensemble.join(parts[: len(tested)]), *parts[len(tested) :]]
        parts.insert(1, controls.clean)
        triggers = evidence.search(
            search_key, model, ensemble.join(parts), searched, train_config(config), runner, settings
        )
        networks = boxes[: len(tested)] + [None] * config.controls + boxes[len(tested) :]
        ask_controls = partial(predict, model, controls.clean)
        with log.stage("held-out rows", total=len(networks), unit="networks") as stage:
            found["measured"] = evidence.measure(
                triggers, networks, ask_controls, found["places"], held_out, stage.advance
            )
            classes = ask_controls(held_out.images).argmax(axis=-1)
            found["accuracies"] = (classes == held_out.labels).mean(axis=1).tolist()
        if suspects.model is not None:
            found["weights"] = weigh(suspects, tested, controls, train)
    folders = [opened for opened in suspects.opened if (pathlib.Path(opened.name) / "about.json").exists()]
    results = reporting.summarise(
        models,
        train,
        {"clean_rows": len(clean), "search_rows": len(searched), "held_out_rows": len(held_out)},
        config.index,
        config.seed,
        black_box=suspects.model is None,
        commands=[
            command
            for opened in folders
            for command in commands(config.dataset, opened.name, ensemble.num_members(opened.variables))
        ],
        **found,
    )
    results = base.write_results(folder, results, train, test)
    if not processes.is_primary():
        return results
    page = reporting.page(folder, results, train, held_out, found.get("measured"))
    summary = reporting.main_table(results) if len(models) > 1 else None
    if summary is not None:
        log.console.print(to_rich(summary), highlight=False)
    base.finish(run, folder, page, results["verdict"]["headline"], base.sources_of(TrainTest(train, test)), results)
    return results


# ---- Input ----------------------------------------------------------------------------------------------------------


def check(config: Config) -> None:
    """Refuse settings out of range, whatever the data and the models.

    Raises:
        InputError: naming the flag.
    """
    check_ranges(config)
    check_choice("--surrogate", config.surrogate, MODELS)
    for text in config.model:
        if not text:
            raise InputError("--model is empty; give it a folder, a file or an address")
        check_path("--model", text)
    if config.seeds != 1:
        raise InputError(f"--seeds {config.seeds} does not apply to an audit of models; set --controls instead")
    if config.target:
        raise InputError(f"--target {config.target} does not apply to an audit of models: it looks at every class")
    if config.like:
        raise InputError("--like does not apply to an audit of models, whose settings follow --dataset")


def open_suspects(config: Config, data: Dataset, lowering: Lowering) -> Suspects:
    """Open the models and check that they are for the data.

    Raises:
        InputError: no model, one that cannot be used, a member that is not there, or models of several architectures.
    """
    if not config.model:
        raise InputError("--model is missing: the folder, file or address of the model to audit")
    options = {"class_names": data.class_names, "lowering": lowering, "compute_dtype": config.compute_dtype}
    opened = [
        open_model(text, data.num_classes, data.image_shape, outputs=config.outputs, **options) for text in config.model
    ]
    kinds = {found.model.description if found.model else "a model that is only asked" for found in opened}
    if len(kinds) > 1:
        raise InputError(
            f"--model: {' and '.join(sorted(kinds))} cannot share control networks; audit models of one architecture at a time"
        )
    counts = [ensemble.num_members(found.variables) if found.model else 1 for found in opened]
    places = [(source, member) for source, count in enumerate(counts) for member in range(count)]
    if config.members:
        if len(opened) > 1:
            raise InputError("--members counts the models of a single folder; --model has several")
        if wrong := [member for member in config.members if member > counts[0]]:
            raise InputError(f"--members {wrong[0]}: {opened[0].name} has {counts[0]} models, counted from 1")
        places = [(0, member - 1) for member in dict.fromkeys(config.members)]
    several = sum(counts) > 1
    titles = [
        (f"model {member + 1}" if len(opened) == 1 else f"model {number}") if several else "the model"
        for number, (_, member) in enumerate(places, start=1)
    ]
    if opened[0].model is None:
        return Suspects(opened, titles, places, None, None)
    starts = np.cumsum([0, *counts])
    variables = ensemble.join([found.variables for found in opened])
    which = np.array([starts[source] + member for source, member in places])
    return Suspects(opened, titles, places, opened[0].model, ensemble.members(variables, which))


def take_rows(config: Config, train: Dataset, test: Dataset) -> tuple[Dataset, Dataset, Dataset]:
    """The clean rows of the control networks, those of them that triggers are searched on, and the held-out rows.

    Each has about the same share of every class.

    Raises:
        InputError: the data has poisoned rows.
    """
    for part in (train, test):
        if isinstance(part, PoisonedDataset) and part.is_poisoned.any():
            raise InputError(
                f"{part.source}: {int(part.is_poisoned.sum())} rows are poisoned; an audit of models needs clean rows"
            )
    clean = _part(train, config.clean_rows, 0)
    return clean, _part(clean, config.search_rows, 1), _part(test, config.held_out_rows, 2)


def _part(rows: Dataset, count: int, number: int) -> Dataset:
    if not 0 < count < len(rows):
        return rows
    _, taken = splits.stratified_split(jax.random.key(number), rows.labels, count / len(rows))
    return splits.take(rows, np.sort(taken))


def search_settings(config: Config, rows: int) -> NeuralCleanseSettings:
    """The settings of the search."""
    return NeuralCleanseSettings(
        epochs=config.search_epochs, batch_size=min(config.search_batch_size, rows), threshold=config.index
    )


def width_of(model: Model) -> int | None:
    """The width in a model's description, as `make_model` writes it; None for a model of other making."""
    words = model.description.replace(",", " ").split()
    width = words[words.index("width") + 1] if "width" in words[:-1] else ""
    return int(width) if width.isdigit() else None


def reason_untested(logits: np.ndarray, held_out: Dataset, clean: Dataset) -> str:
    """Why a model cannot be tested, before anything is trained; "" if it can.

    Args:
        logits: float [N, K], of the model on the held-out rows.
        held_out: the held-out rows.
        clean: the clean rows.
    """
    if not np.isfinite(logits).all():
        return "its outputs are not finite numbers"
    for name, rows in (("clean", clean), ("held-out", held_out)):
        if len(rows) < evidence.LEAST_ROWS:
            return f"{len(rows)} {name} rows are too few; at least {evidence.LEAST_ROWS} are needed"
    if missing := sorted(set(range(clean.num_classes)) - set(clean.labels.tolist())):
        return f"there is no clean row of class {clean.class_title(missing[0])}"
    accuracy = float((logits.argmax(axis=1) == held_out.labels).mean())
    least = evidence.least_accuracy(clean.num_classes)
    if accuracy < least:
        return (
            f"it predicts {100 * accuracy:.0f} % of the held-out rows correctly, below {100 * least:.0f} %: these are not rows "
            "that it was made for, or their classes are in another order"
        )
    return ""


# ---- Networks -------------------------------------------------------------------------------------------------------


def asker(config: Config, suspects: Suspects, number: int, predict: Callable[..., np.ndarray], num_classes: int) -> Ask:
    """uint8 images -> logits of one suspect."""
    if suspects.model is not None:
        member = ensemble.members(suspects.variables, np.arange(number, number + 1))
        return lambda images: predict(suspects.model, member, images)[0]
    opened = suspects.opened[suspects.places[number][0]]
    return lambda images: teachers.ask(opened.classifier, images, num_classes, opened.name, config.query_batch)


def queries(key: Key, images: np.ndarray, copies: int) -> np.ndarray:
    """Pictures that a black box is asked about: clean rows, and copies with a rectangle of another row or of noise.

    Args:
        key: decides rectangles and rows.
        images: uint8 [n, H, W, C].
        copies: pictures of each row, the first unchanged.

    Returns:
        uint8 [copies * n, H, W, C].
    """
    words = np.asarray(jax.random.key_data(key)).tolist()
    random = np.random.default_rng(words)
    height, width, channels = images.shape[1:]
    parts = [images]
    for _ in range(copies - 1):
        changed = images.copy()
        for row in range(len(images)):
            tall, wide = random.integers(1, height // 2 + 1), random.integers(1, width // 2 + 1)
            top, left = random.integers(0, height - tall + 1), random.integers(0, width - wide + 1)
            place = slice(top, top + tall), slice(left, left + wide)
            if random.random() < 0.5:
                changed[row][place] = images[random.integers(len(images))][place]
            else:
                changed[row][place] = random.integers(
                    0, 256, (1, 1, channels) if random.random() < 0.5 else (tall, wide, channels)
                )
        parts.append(changed)
    return np.concatenate(parts)


def imitate(
    config: Config,
    query_key: Key,
    key: Key,
    model: Model,
    runner: StageRunner,
    boxes: Sequence[Ask],
    clean: Dataset,
    log: StageLog,
) -> PyTree:
    """A surrogate of each black box, distilled from its answers: stacked [boxes, ...]."""
    pictures = queries(query_key, clean.images, config.queries)
    with log.stage("queries", total=len(boxes), unit="models") as stage:
        answers = []
        for ask in boxes:
            answers.append(np.asarray(jax.nn.softmax(jnp.asarray(ask(pictures)))))
            stage.advance()
    labels = np.tile(clean.labels, (len(boxes), config.queries))
    rows = labelled(np.tile(np.arange(len(pictures), dtype=np.int32), (len(boxes), 1)), labels)
    rows = Rows(rows.index, {**rows.targets, "probabilities": jnp.asarray(np.stack(answers))})
    keys = jnp.stack([jax.random.fold_in(key, number) for number in range(len(boxes))])
    recipe = replace(train_config(config), epochs=config.surrogate_epochs)
    shape = clean.image_shape
    start = ensemble.init_members(lambda key: model.init(key, shape), keys)
    start = prepare(model, start, jnp.asarray(pictures), rows.index)
    objective = evidence.surrogate_objective(model)
    nets = runner.from_variables("surrogates", model, recipe, start, keys, 1, jnp.asarray(pictures), rows, objective)
    return nets.variables


def weigh(suspects: Suspects, tested: Sequence[int], controls: Controls, data: Dataset) -> list[dict[str, Any]]:
    """What two detectors on the weights say of the tested suspects, beside the control networks."""
    pairs = normalised_convolutions(suspects.model, data.image_shape)

    def outliers(variables: PyTree, number: int):
        member = jax.tree.map(lambda leaf: np.asarray(leaf[number]), variables)
        last = weight_outliers.class_outlier(member["params"]["classifier"]["kernel"])
        return weight_outliers.channel_outliers(member, pairs), last

    count = ensemble.num_members(controls.clean)
    return reporting.describe_weights(
        [outliers(suspects.variables, number) for number in tested],
        [outliers(controls.clean, number) for number in range(count)],
        [f"class {data.class_title(number)}" for number in range(data.num_classes)],
    )

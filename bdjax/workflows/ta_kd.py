"""TA-KD from the data to the report: outsource, train the teachers, vote, aggregate, distil, measure."""

import dataclasses
import hashlib
import pathlib
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bdjax.attacks import outsourcing
from bdjax.attacks.label_rules import check_target
from bdjax.attacks.providers import ProviderTriggers
from bdjax.choices import Lowering
from bdjax.datasets import splits
from bdjax.defenses import ta_kd, teachers
from bdjax.defenses.aggregation import aggregate_logits
from bdjax.defenses.teachers import TeacherLogits
from bdjax.errors import InputError
from bdjax.exchange import model_folder
from bdjax.exchange.opening import Opened, open_model
from bdjax.models import count_parameters, default_lowering
from bdjax.reporting import ta_kd as reporting
from bdjax.reporting.evidence.subject import Subject
from bdjax.run.checks import check_ranges
from bdjax.run.config import check_recipe, load
from bdjax.run.configs.ta_kd import Config
from bdjax.run.experiment import Experiment, default_of
from bdjax.run.folder import RunFolder
from bdjax.run.log import StageLog
from bdjax.training import ensemble, memory, processes, recipes
from bdjax.training.member import TrainConfig
from bdjax.training.stages import Nets, StageRunner, predict_groups
from bdjax.types import Classifier, Dataset, Key, Model, TrainTest, name_of_class
from bdjax.workflows import base

ANSWERS = "answers"
"""The folder in the run's with the answers of teachers behind addresses."""
ROLES = ("clean", "teacher", "aggregated", "student")
"""Networks whose architecture is a setting: `Config.<role>_model`."""


def run(
    config: Config, experiment: Experiment, classifiers: Sequence[Classifier] = (), log: StageLog | None = None
) -> dict[str, Any]:
    """Run TA-KD from the data to the report.

    Args:
        config: all settings.
        experiment: its presets.
        classifiers: teachers as Python callables, in place of an attack; see `bdjax.types.Classifier`.
        log: where progress is printed; by default the terminal.

    Returns:
        The contents of results.json.

    Raises:
        InputError: the data, the teachers or the output folder cannot be used.
    """
    log = log or StageLog()
    check(config)
    default = default_of(experiment, config)
    check_recipe(config, default)
    check_recipe(config, default, prefix="defense_")
    train, test = load(config, log)
    third_party = open_teachers(config, train, default_lowering()) if config.teachers else []
    count = len(classifiers) or sum(map(num_teachers, third_party)) or config.num_teachers
    if config.aggregation == "trimmed_mean" and 2 * config.trim >= count:
        raise InputError(f"--trim {config.trim} at each end leaves no logits of {count} teachers; use a smaller --trim")
    data_key, model_key, defense_key = jax.random.split(jax.random.key(config.seed), 3)
    keys = [jax.random.split(jax.random.fold_in(data_key, config.seed + s), 3) for s in range(config.seeds)]
    # Every error in the settings is raised before the folder is opened, and before anything is measured.
    defense = configurations(config)[2]
    check_memory(config, count, train, test)
    members, networks = config.num_teachers * config.seeds, [getattr(config, f"{role}_model") for role in ROLES]
    base.check_networks(config, train.image_shape, train.num_classes, members, networks)
    clean_sets = [clean_set(config, defense, train, key[2]) for key in keys]
    outsourced = None
    if not (third_party or classifiers):
        check_target(config.target, train)
        outsourced = outsourcing.outsource([key[0] for key in keys], train, outsourcing_config(config))
    clean_rows, teacher_rows = (
        round(len(train) * share * (1 - config.validation_fraction)) for share in (1.0, config.provider_fraction)
    )
    plan = [
        base.Planned(config.clean_model, config.seeds, config.epochs, clean_rows),
        base.Planned(config.teacher_model, members, config.epochs, teacher_rows),
    ]
    plan = plan if outsourced else []
    run = base.begin(
        experiment,
        config,
        train,
        members,
        log,
        plan=plan,
        beyond="the defense's networks",
    )
    models = {role: run.make_model(name) for role, name in zip(ROLES, networks, strict=True)}
    folder = run.open_folder({"teachers": digest_of(third_party)} if third_party else {})
    if third_party and (run.engine.lowering != default_lowering() or any(of.classifier for of in third_party)):
        third_party = open_teachers(config, train, run.engine.lowering, folder.path / ANSWERS)
    runner = run.make_runner(folder.checkpoints)

    nets: dict[str, Nets] = {}
    triggers: Sequence[ProviderTriggers | None] = [None] * config.seeds
    if third_party:
        triggers = [join_triggers(third_party)] * config.seeds
        if is_one_architecture(third_party):
            nets["teachers"] = take_teachers(config, third_party)
    elif outsourced:
        triggers = outsourced.triggers
        clean_rows = outsourcing.split_rows([key[1] for key in keys], train.labels, config.validation_fraction)
        nets = train_teachers(config, model_key, runner, models, outsourced, clean_rows)
        write_teachers(config, folder, nets["teachers"], triggers, train)
    predict = partial(runner.predict, batch_size=config.evaluation_batch_size)
    if "teachers" not in nets:
        ask = partial(ask_teachers, config, predict, train.num_classes)
        query = [
            ask(third_party or [Opened("", "", classifier=classifier) for classifier in classifiers])
        ] * config.seeds
    else:
        of_seed = [nets["teachers"].of_seed(s) for s in range(config.seeds)]
        query = [teachers.from_members(partial(predict, nets["teachers"].model), variables) for variables in of_seed]
    nets |= distil(config, defense_key, runner, models, nets, query, clean_sets)

    predict_own = partial(runner.predict_own, batch_size=config.evaluation_batch_size)
    is_asked = "teachers" not in nets
    logits = evaluate(config, log, predict, predict_own, nets, triggers, query if is_asked else None, test)
    sizes = {name: count_parameters(networks.model, train.image_shape) for name, networks in nets.items()}
    if "teachers" in nets:  # a vote deploys all teachers
        sizes["soft vote"] = sizes["hard vote"] = sizes["teachers"] * nets["teachers"].per_seed
    choices = {"target": config.target, "vote_space": config.vote_space, "tie": config.tie}
    results = reporting.summarise(logits, test.labels, triggers, sizes, config.seed, **choices)
    if third_party or classifiers:
        results["agreement"] = reporting.agreement(logits[0]["teachers"][:, 0], names_of(third_party, classifiers))
    for role in ("aggregated", "student"):
        leave(run, folder, role, nets[role], train)
    results = base.write_results(folder, results, train, test)
    if not processes.is_primary():
        return results
    data = TrainTest(train, test)
    with log.stage("pictures"):
        recognised = np.argmax(logits[0]["student"][0, 0], axis=1) == test.labels
        shown = int(np.argmax(recognised & (test.labels != config.target)))
        page = reporting.page(folder, results, nets, triggers[0], data, shown)
    rows = int((test.labels != config.target).sum())
    subject = Subject(
        {"training data": train, "test data": test},
        asr_rows={reporting.ATTACK: rows} if triggers[0] else {},
        suspects={opened.name: opened.digest for opened in third_party},
        methods=("student",),
        word_of=partial(reporting.word_of, results),
    )
    table = reporting.main_table(results, train.name)
    base.finish(run, folder, page, table, base.sources_of(data), results, subject)
    return results


def open_teachers(
    config: Config, train: Dataset, lowering: Lowering, store: pathlib.Path | None = None
) -> list[Opened]:
    """Third-party teachers in the order of the command line; an entry may hold several of one architecture.

    Args:
        config: all settings, with `teachers`.
        train: rows of the data that they are for.
        lowering: how to compute convolutions of those whose weights are known.
        store: where answers of addresses are kept; None for in memory.

    Raises:
        InputError: as `bdjax.exchange.opening.open_model`.
    """
    shape = train.num_classes, train.image_shape
    options = {"lowering": lowering, "compute_dtype": config.compute_dtype, "outputs": config.outputs, "store": store}
    return [
        open_model(text, *shape, class_names=train.class_names, target=config.target, **options)
        for text in config.teachers
    ]


def num_teachers(found: Opened) -> int:
    """The number of networks of an entry of `--teachers`."""
    return 1 if found.variables is None else ensemble.num_members(found.variables)


def names_of(third_party: Sequence[Opened], classifiers: Sequence[Classifier]) -> list[str]:
    """A name for every third-party teacher, as the user wrote it."""
    names = []
    for found in third_party:
        count = num_teachers(found)
        names += [found.name] if count == 1 else [f"{found.name}, network {number + 1}" for number in range(count)]
    return names or [teachers.name_of(classifier) for classifier in classifiers]


def digest_of(third_party: Sequence[Opened]) -> str:
    """What decides the teachers' answers; of a single entry, its own digest."""
    digests = [found.digest for found in third_party]
    return digests[0] if len(digests) == 1 else hashlib.sha256(" ".join(digests).encode()).hexdigest()


def is_one_architecture(third_party: Sequence[Opened]) -> bool:
    """Whether all weights are known and of one architecture, so that the teachers can be members of one call."""
    return None not in (kinds := {found.model and found.model.description for found in third_party}) and len(kinds) == 1


def join_triggers(third_party: Sequence[Opened]) -> ProviderTriggers | None:
    """The triggers of all teachers, in their order; None unless every one is known."""
    known = [found.triggers for found in third_party]
    if None in known:
        return None
    params = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *(triggers.params for triggers in known))
    names = tuple(name for triggers in known for name in triggers.names)
    return ProviderTriggers(params, names, np.concatenate([triggers.similar_group for triggers in known]))


def take_teachers(config: Config, third_party: Sequence[Opened]) -> Nets:
    """Third-party teachers of one architecture, the same for every seed."""
    found = (
        ensemble.join([found.variables for found in third_party]) if len(third_party) > 1 else third_party[0].variables
    )
    return Nets(third_party[0].model, ensemble.join([found] * config.seeds), ensemble.num_members(found), {})


def ask_teachers(config: Config, predict: partial, num_classes: int, third_party: Sequence[Opened]) -> TeacherLogits:
    """The logits of teachers of any kind, queried one after another.

    Args:
        config: all settings.
        predict: (model, variables, images) -> logits.
        num_classes: K.
        third_party: white boxes and black boxes.
    """
    black = [found.classifier for found in third_party if found.classifier]
    if len(black) == len(third_party):  # one call, so that messages number the teachers
        return teachers.from_classifiers(black, num_classes, config.teacher_batch)
    asked = [
        teachers.from_classifiers([found.classifier], num_classes, config.teacher_batch)
        if found.classifier
        else teachers.from_members(partial(predict, found.model), found.variables)
        for found in third_party
    ]
    return lambda images: np.concatenate([ask(images) for ask in asked])


def leave(run: base.Run, folder: RunFolder, role: str, nets: Nets, train: Dataset) -> None:
    """Write models/<role>, the first seed's network, and models/<role>-seed-<s> for every other seed s."""
    for s in range(run.config.seeds):
        seed = run.config.seed + s
        name = role if s == 0 else f"{role}-seed-{seed}"
        base.leave_network(run, folder, name, nets.model, nets.of_seed(s), train, role=role, seed=seed)


def train_teachers(
    config: Config,
    key: Key,
    runner: StageRunner,
    models: dict[str, Model],
    outsourced: outsourcing.Outsourced,
    clean_rows: tuple,
) -> dict[str, Nets]:
    """Stages 1 and 2 of the paper: the clean reference and the suspect teachers.

    Args:
        config: all settings.
        key: for weights and shuffles.
        runner: trains.
        models: by role.
        outsourced: each provider's training set.
        clean_rows: training and validation rows of the clean reference.

    Returns:
        "clean" and "teachers".
    """
    nets, pool = {}, jnp.asarray(outsourced.pool)
    roles = (
        ("clean", "clean", 1, clean_rows),
        ("teachers", "teacher", config.num_teachers, (outsourced.train, outsourced.validation)),
    )
    for number, (name, role, per_seed, rows) in enumerate(roles):
        member_keys = jax.random.split(jax.random.fold_in(key, number), per_seed * config.seeds)
        nets[name] = runner.from_scratch(
            name, models[role], configurations(config)[0], member_keys, per_seed, pool, *rows
        )
    return nets


def write_teachers(
    config: Config, folder: RunFolder, nets: Nets, triggers: Sequence[ProviderTriggers], train: Dataset
) -> None:
    """Write teachers/seed-<s> as model folders: any of them can be given to `--teachers`."""
    shape = (train.num_classes, train.image_shape)
    for s in range(config.seeds):
        path = folder.path / "teachers" / f"seed-{s}"
        model_folder.write(
            path,
            config.teacher_model,
            config.width,
            *shape,
            nets.of_seed(s),
            triggers[s],
            config.target,
            target_name=name_of_class(train, config.target),
        )


def distil(
    config: Config,
    key: Key,
    runner: StageRunner,
    models: dict[str, Model],
    suspects: dict[str, Nets],
    query: Sequence[TeacherLogits],
    clean_sets: Sequence[ta_kd.CleanSet],
) -> dict[str, Nets]:
    """Stage 4 of the paper: the teachers' logits on the clean rows, the aggregated model, then the student.

    Args:
        config: all settings.
        key: for weights and shuffles.
        runner: trains.
        models: by role.
        suspects: "teachers", if their weights are known: they are fine-tuned on the clean rows as a baseline.
        query: for each seed, maps images to the teachers' logits.
        clean_sets: the clean rows of each seed.

    Returns:
        "aggregated" and "student"; the baselines "fine-tuned", if weights are known, and "alone".
    """
    _, train_config, defense = configurations(config)
    of_seed = np.arange(config.seeds)
    train_parts = partial(ta_kd.train_parts, runner, config=defense, train_config=train_config, clean_sets=clean_sets)
    with runner.log.stage("teacher logits", detail=f"{config.seeds} × {len(clean_sets[0].labels)} clean rows"):
        teacher_logits = np.stack(
            [
                aggregate_logits(predict(rows.images), defense.aggregation, defense.trim)
                for predict, rows in zip(query, clean_sets, strict=True)
            ]
        )
    aggregated = models["aggregated"]
    parts = {"aggregated": (aggregated, ta_kd.make_learners(None, of_seed, teacher_logits, defense.alpha))}
    if "teachers" in suspects:
        known = suspects["teachers"]
        tuned = ta_kd.make_learners(known.variables, np.repeat(of_seed, known.per_seed), teacher_logits, 0.0)
        parts["fine-tuned"] = (known.model, tuned)
    nets = train_parts(parts, key=jax.random.fold_in(key, 0))
    aggregated_logits = np.concatenate(
        [
            runner.predict(
                aggregated, nets["aggregated"].of_seed(s), rows.images, batch_size=config.evaluation_batch_size
            )
            for s, rows in enumerate(clean_sets)
        ]
    )
    student = models["student"]
    parts = {
        "student": (student, ta_kd.make_learners(None, of_seed, aggregated_logits, defense.alpha)),
        "alone": (student, ta_kd.make_learners(None, of_seed, aggregated_logits, 0.0)),
    }
    return nets | train_parts(parts, key=jax.random.fold_in(key, 1))


def evaluate(
    config: Config,
    log: StageLog,
    predict: partial,
    predict_own: partial,
    nets: dict[str, Nets],
    triggers: Sequence[ProviderTriggers | None],
    query: Sequence[TeacherLogits] | None,
    test: Dataset,
) -> list[dict[str, np.ndarray]]:
    """Every role's logits on the clean test images and under each trigger; a fine-tuned teacher's under its own alone.

    Args:
        config: all settings.
        log: where progress is printed.
        predict: (model, variables, images) -> logits.
        predict_own: the same with images of each member.
        nets: by role.
        triggers: the triggers of each seed.
        query: for each seed, maps images to logits, if the teachers are callables; None if they are in `nets`.
        test: the test rows.

    Returns:
        For each seed, role -> float32 [members, 1 + T, N, K]; "fine-tuned" -> [members, 2, N, K] if there are triggers.
    """
    logits = []
    tuned = nets.get("fine-tuned")
    with log.stage("evaluation", total=config.seeds, unit="seeds") as stage:
        for s in range(config.seeds):
            views = outsourcing.triggered_views(test.images, triggers[s])  # [1 + T, N, H, W, C]
            flat = views.reshape(-1, *test.image_shape)
            shared = nets
            if tuned and triggers[s]:
                shared = {role: networks for role, networks in nets.items() if role != "fine-tuned"}
            outputs = predict_groups(shared, s, lambda model, variables, flat=flat: predict(model, variables, flat))
            if query:
                outputs["teachers"] = query[s](flat)
            by_view = {role: rows.reshape(len(rows), *views.shape[:2], -1) for role, rows in outputs.items()}
            if tuned and triggers[s]:
                known = tuned.model, tuned.of_seed(s)
                by_view["fine-tuned"] = np.stack([predict(*known, views[0]), predict_own(*known, views[1:])], axis=1)
            logits.append(by_view)
            stage.advance()
    return logits


def check(config: Config) -> None:
    """Refuse settings out of range, whatever the data.

    Raises:
        InputError: naming the flag.
    """
    check_ranges(config)
    if config.like:
        raise InputError("--like does not apply to TA-KD, whose settings follow --dataset and --scale; leave it out")


def check_memory(config: Config, num_teachers: int, train: Dataset, test: Dataset) -> None:
    """Refuse numbers of teachers, views and seeds whose images would not fit into memory, before they are made.

    Raises:
        InputError: with what would be smaller.
    """
    image = train.images[:1].nbytes
    rows = int(config.auxiliary_fraction * len(train))
    needed = config.seeds * rows * config.views * (image + 4 * num_teachers * train.num_classes)
    memory.check_fits(
        f"{config.views} --views of {rows:,} clean rows",
        needed,
        "use fewer --views or --seeds, or a smaller --auxiliary-fraction",
    )
    per_provider = int(config.provider_fraction * len(train)) * (8 + config.poison_rate * image)
    tested = (num_teachers + 1) * len(test) * (image + 4 * num_teachers * train.num_classes)
    needed = int(config.seeds * num_teachers * per_provider) + tested
    memory.check_fits(
        f"the rows of {num_teachers} teachers", needed, "use fewer --num-teachers or --seeds, or --test-rows"
    )


def configurations(config: Config) -> tuple[TrainConfig, TrainConfig, ta_kd.TaKdConfig]:
    """The training settings of the teachers and of the defense's models, and the settings of the defense."""
    shared = {
        name: getattr(config, name)
        for name in (
            "keep_last_batch",
            "evaluation_batch_size",
            "plateau_factor",
            "plateau_patience",
            "plateau_threshold",
        )
    }
    attack = TrainConfig(
        config.epochs,
        config.batch_size,
        learning_rate=config.learning_rate,
        augmentation=config.attack_augmentation,
        **shared,
    )
    attack = dataclasses.replace(attack, **recipes.fields(config.recipe, config.batch_size))
    defense = TrainConfig(
        config.defense_epochs,
        config.defense_batch_size,
        learning_rate=config.defense_learning_rate,
        weight_decay=config.defense_weight_decay,
        schedule=config.defense_schedule,
        **shared,
    )
    defense = dataclasses.replace(defense, **recipes.fields(config.defense_recipe, config.defense_batch_size))
    names = (field.name for field in dataclasses.fields(ta_kd.TaKdConfig))
    return attack, defense, ta_kd.TaKdConfig(**{name: getattr(config, name) for name in names})


def outsourcing_config(config: Config) -> outsourcing.OutsourcingConfig:
    """The settings of the providers."""
    names = {field.name for field in dataclasses.fields(outsourcing.OutsourcingConfig)} - {"num_providers"}
    return outsourcing.OutsourcingConfig(config.num_teachers, **{name: getattr(config, name) for name in names})


def clean_set(config: Config, defense: ta_kd.TaKdConfig, train: Dataset, key: Key) -> ta_kd.CleanSet:
    """The defender's rows of one seed: drawn like a provider's, never poisoned."""
    draw_key, split_key, view_key = jax.random.split(key, 3)
    rows = splits.sample_rows(draw_key, len(train), config.auxiliary_fraction)
    parts = splits.train_validation_rows(split_key, rows, config.validation_fraction)
    if not len(parts[0]):
        raise InputError(
            f"--auxiliary-fraction {config.auxiliary_fraction} of {len(train)} rows leaves no clean row; use a larger share"
        )
    return ta_kd.make_clean_set(view_key, train.images, train.labels, *parts, defense)

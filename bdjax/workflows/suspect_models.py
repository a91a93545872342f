"""Runs on suspect models: attack teachers or read third-party ones, make students of them, measure both.

The suspect is a network, a *teacher*, without its training set; the defender has clean images, and wants a small clean network,
a *student*. A run has attacks, seeds and methods. Each attack and seed gives one suspect teacher, which the attacker may have
trained in any way; or the teacher is the user's, with its weights. Every method runs on all teachers at once.
`bdjax/commands/robust_kd.py` adds its presets and its studies.
"""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import numpy as np

from bdjax.datasets import splits
from bdjax.defenses.registry import DEFENSES
from bdjax.defenses.undefended import UNDEFENDED
from bdjax.errors import InputError
from bdjax.evaluation import teachers as third_party
from bdjax.evaluation.measure import Comparison, TriggeredViews, defend, make_views
from bdjax.evaluation.student_curves import StudentCurves
from bdjax.evaluation.suspects import suspect_keys, try_out
from bdjax.evaluation.teachers import (
    SuspectTeachers,
    control,
    make_defense_input,
    make_recipes,
    take_teachers,
    train_teachers,
)
from bdjax.evaluation.variants import (
    NO_ATTACK,
    DefenseVariant,
    compatible_defenses,
    facts_of,
    read_attack,
    read_defense,
    without_untestable,
)
from bdjax.models import default_lowering
from bdjax.reporting import students
from bdjax.reporting.evidence.subject import Subject
from bdjax.reporting.sections import file_name, seconds_of
from bdjax.run.config import ALL, adapted_to, load, train_config
from bdjax.run.configs.suspect_models import LABELS_ONLY, Config
from bdjax.run.experiment import Experiment, default_of
from bdjax.run.folder import RunFolder
from bdjax.run.log import StageLog
from bdjax.training import ensemble, processes
from bdjax.types import Dataset, PoisonedDataset, name_of_class
from bdjax.workflows import base
from bdjax.workflows.base import Context, Group
from bdjax.workflows.poisoned_sets import load_clean_data

OF_TRAINING_SETS = ("training set", "number of poisons")
"""Needs of defenses that a model without its training set cannot meet."""


def run(config: Config, experiment: Experiment, log: StageLog | None = None) -> dict[str, Any]:
    """Run methods on suspect models from the data to the report.

    Args:
        config: all settings.
        experiment: its presets, its studies, its methods.
        log: where progress is printed; by default the terminal.

    Returns:
        The contents of results.json.

    Raises:
        InputError: the data, an attack, a method, the teacher or the output folder cannot be used.
    """
    log = log or StageLog()
    check(config, experiment)
    attack_texts, texts = base.attacks_and_defenses(config, experiment)
    variants, left_out = read_methods(config, texts)
    data = load(config, log)
    train, test = data
    clean = clean_rows(config, train)
    named = clean if config.clean_data else None
    shared = base.find_shared(log, named, {"the training set": train, "the test set": test})
    variants, not_testable = without_untestable(variants, facts_of(None, clean, train.num_classes))
    left_out |= not_testable
    # Every error in the settings is raised before the folder is opened, and before anything is measured.
    teacher_key, suspect_key, view_key = jax.random.split(jax.random.key(config.seed), 3)
    plain, found, attacks = base.network_maker(config, train.num_classes), None, None
    if config.teacher:
        read_teacher = partial(third_party.open_teacher, config.teacher, train, config.target)
        found = read_teacher(default_lowering(), config.compute_dtype)
        model = found.model
        if found.suspects[0].attack.plan is None:
            check_oracles(variants)
    else:
        like = adapted_to(config)
        attacks = [read_attack(text, train, config.target, like=like, defender_gets="model") for text in attack_texts]
        try_out(jax.random.fold_in(teacher_key, config.seed), attacks, train)
        model = plain(config.teacher_model)
    variants, not_fitting = compatible_defenses(
        variants, model, plain, train.image_shape, is_all=config.defenses == ALL
    )
    left_out |= not_fitting
    members = config.seeds * (1 if config.teacher else len(attack_texts))
    networks = [config.student] if config.teacher else [config.teacher_model, config.student]
    kept = members * 2 * test.images.nbytes
    run = base.begin(experiment, config, train, members, log, networks=networks, kept=kept)
    if found is not None and run.engine.lowering != default_lowering():
        found = read_teacher(run.engine.lowering, config.compute_dtype)
    model = found.model if found else run.make_model(config.teacher_model)
    folder = run.open_folder({"teacher": found.digest} if found else {})
    runner = run.make_runner(folder.checkpoints)
    recipes = make_recipes(
        train_config(config),
        config.fine_tuning_epochs,
        config.fine_tuning_learning_rate,
        config.controlled_epochs,
    )
    if found is not None:
        teachers = take_teachers(teacher_key, found, config.seeds, recipes, runner, train)
    else:
        teachers = train_teachers(teacher_key, attacks, config.seed, config.seeds, model, recipes, runner, train, log)
    keys = suspect_keys(suspect_key, teachers.suspects)
    inputs = make_defense_input(teachers, keys, clean, run.make_model, runner)
    with log.stage("triggered test images") as stage:
        views = make_views(view_key, teachers.suspects, test)
        stage.detail = f"{len(teachers.suspects)} teachers × {len(test):,} test rows"
    comparisons, controls, curves = [], [], {}
    for variant in variants:
        with log.stage(f"method {variant.name}") as stage:
            curve_file = folder.file(f"curves/{file_name(variant.name)}.json")
            of_method = StudentCurves(curve_file, variant, teachers, views)
            result, measured = defend(of_method.watching(inputs), teachers.suspects, variant, views)
            curves[variant.name] = of_method.points
            comparisons.append(Comparison(variant, result, measured))
            controls.append(control(inputs, teachers, comparisons[-1], views))
            stage.detail = base.summary_line(measured)
    networks = students.Networks(model, train.image_shape)
    results = students.summarise(comparisons, controls, networks, len(test), config.seed, left_out, curves)
    results = base.write_results(folder, results, train, test, named, shared=shared)
    if config.save_models:
        save_models(run, folder, teachers, comparisons, views, train)
    group = Group(inputs, teachers.suspects, views)
    # Outside the primary's part: sections may train networks, in which all processes take part.
    extra = experiment.sections(Context(config, folder, data, (group,), comparisons, results, log, teachers))
    if not processes.is_primary():
        return results
    page = students.page(
        folder,
        results,
        comparisons,
        data,
        seconds=seconds_of(comparisons, log.timings),
        title=f"{experiment.title} on {train.name}",
        about=experiment.about[0],
        extra_sections=extra,
    )
    subject = Subject(
        {"training data": train, "test data": test, "clean rows": clean},
        asr_rows=base.asr_rows(teachers.suspects, test),
        suspects={str(config.teacher): found.digest} if found else {},
        methods=experiment.about,
        compared_with=(plain := students.plain_method(results)),
        word_of=partial(students.word_of, results, plain=plain),
    )
    base.finish(run, folder, page, students.main_table(results), base.sources_of(data), results, subject)
    return results


def check(config: Config, experiment: Experiment) -> None:
    """Refuse settings out of range, whatever the data.

    Raises:
        InputError: naming the flag.
    """
    base.check(config, experiment)
    if config.teacher == "":
        raise InputError("--teacher is empty; give it a folder, or FILE.safetensors:ARCHITECTURE")
    if config.teacher and config.attacks != default_of(experiment, config).attacks:
        raise InputError("--teacher sets the suspect; leave out --attacks")


def read_methods(config: Config, texts: Sequence[str]) -> tuple[list[DefenseVariant], dict[str, str]]:
    """Every method of the run, the unchanged teacher first; and those of `--defenses=all` that cannot be run -> why.

    Raises:
        InputError: there is no such method or setting, or the method needs a training set.
    """
    variants, left_out = [], {}
    for text in texts:
        if text == NO_ATTACK:
            unchanged = dataclasses.replace(
                UNDEFENDED, title="teacher itself", paper="as received", stage="after training"
            )
            variants.append(DefenseVariant(text, unchanged, unchanged.settings))
            continue
        variant = read_defense(text, config.preset, adapted_to(config), {"student": config.student})
        if text == LABELS_ONLY:
            variant = variant._replace(label="student on labels only")
        missing = [need for need in variant.defense.needs_with(variant.settings) if need in OF_TRAINING_SETS]
        if not missing:
            variants.append(variant)
        elif config.defenses == ALL:
            left_out[text] = f"needs the {missing[0]}, which a model does not come with"
        else:
            usable = [name for name, defense in DEFENSES.items() if not set(defense.needs) & set(OF_TRAINING_SETS)]
            raise InputError(
                f"defense {text} needs the {missing[0]}, which a model does not come with; defenses for models: "
                f"{', '.join(usable)}"
            )
    return variants, left_out


def check_oracles(variants: Sequence[DefenseVariant]) -> None:
    """Refuse methods that need the trigger, which is unknown.

    Raises:
        InputError: naming the method.
    """
    for variant in variants:
        if "attacker's trigger" in variant.defense.needs_with(variant.settings):
            raise InputError(
                f"defense {variant.name} needs the attacker's trigger, which the --teacher model does not come with"
            )


def clean_rows(config: Config, train: Dataset) -> Dataset:
    """The defender's clean rows.

    Raises:
        InputError: the training rows are poisoned, the set at --clean-data does not fit, or the share is too small.
    """
    if isinstance(train, PoisonedDataset) and train.is_poisoned.any():
        raise InputError(
            f"{train.source}: {int(train.is_poisoned.sum())} rows are poisoned; runs on suspect models need a clean dataset"
        )
    if config.clean_data:
        return load_clean_data(config, train)
    if config.clean_share == 1:
        return train
    _, rows = splits.stratified_split(jax.random.key(0), train.labels, config.clean_share)
    if len(rows) < train.num_classes:
        raise InputError(
            f"--clean-share {config.clean_share} of {len(train)} rows is {len(rows)}; it should be at least "
            f"one row for each of the {train.num_classes} classes"
        )
    return splits.take(train, np.sort(rows))


def save_models(
    run: base.Run,
    folder: RunFolder,
    teachers: SuspectTeachers,
    comparisons: Sequence[Comparison],
    views: TriggeredViews,
    train: Dataset,
) -> None:
    """Write the first seed's teachers to teachers/<attack>, and the methods' models to models/<method>/<attack>, each with its
    trigger if a model folder can hold it. Any of these folders can be given to `--teacher`; those in models/ are saved
    models as well, for others to read."""
    for number, suspect in enumerate(teachers.suspects):
        if suspect.seed:
            continue
        trigger = third_party.trigger_of(suspect, views.test, views.triggered[number])
        name = file_name(suspect.attack.name)
        networks = [(folder.path / "teachers" / name, teachers.model, teachers.variables)]
        for variant, result, _ in comparisons:
            if variant.defense.name != NO_ATTACK and result.model.num_classes == train.num_classes:
                path = folder.path / "models" / file_name(variant.name) / name
                networks.append((path, result.model, result.variables))
        for path, model, variables in networks:
            member = ensemble.members(variables, np.array([number]))
            target = suspect.attack.target
            third_party.write_folder(
                path, model, member, train.image_shape, trigger, target, name_of_class(train, target)
            )
            place = path.relative_to(folder.path)
            if place.parts[0] == "models":
                made_by = {"role": "defended", "defense": place.parts[1], "attack": suspect.attack.name}
                name = "/".join(place.parts[1:])
                base.leave_network(run, folder, name, model, member, train, **made_by, seed=run.config.seed)

"""Runs on poisoned training sets: poison, train, defend, measure.

A run has attacks, seeds and defenses. Each attack and seed gives one suspect training set; every defense runs on all suspects
at once. `bdjax/commands/lfd.py` and `bdjax/commands/abm.py` add their presets, their studies (a paper's table or figure as a
choice of attacks and defenses) and their own figures.
"""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bdjax import datasets
from bdjax.attacks import outsourcing
from bdjax.attacks.contract import CleanModel
from bdjax.datasets import splits
from bdjax.datasets.scaling import size_hint
from bdjax.errors import InputError
from bdjax.evaluation.measure import Comparison, clean_members, defend, make_views, success_on
from bdjax.evaluation.suspects import Suspect, group_by_size, make_defense_input, make_suspect, suspect_keys, try_out
from bdjax.evaluation.variants import (
    NO_ATTACK,
    AttackVariant,
    DefenseVariant,
    compatible_defenses,
    facts_of,
    read_attack,
    read_defense,
    without_untestable,
)
from bdjax.reporting import defenses
from bdjax.reporting.evidence.subject import Flagged, Subject
from bdjax.reporting.sections import file_name, seconds_of
from bdjax.run.config import ALL, adapted_to, load, read_options, train_config
from bdjax.run.configs.poisoned_sets import Config
from bdjax.run.experiment import Experiment
from bdjax.run.folder import RunFolder
from bdjax.run.log import StageLog
from bdjax.training import checkpoint, ensemble, processes
from bdjax.training.member import TrainConfig
from bdjax.training.stages import StageRunner
from bdjax.types import Dataset, Model, PoisonedDataset, TrainTest, Unread
from bdjax.workflows import base
from bdjax.workflows.base import Context, Group

SMOKE_TEST = (
    "The digits are a smoke test for defenses in training: at 8×8 pixels a network learns the classes as fast as a trigger, so "
    "what works or fails on them need not do so on photographs."
)
"""What a run on the digits cannot show."""


def run(config: Config, experiment: Experiment, log: StageLog | None = None) -> dict[str, Any]:
    """Run defenses from the data to the report.

    Args:
        config: all settings.
        experiment: its presets, its studies, its defenses.
        log: where progress is printed; by default the terminal.

    Returns:
        The contents of results.json.

    Raises:
        InputError: the data, an attack, a defense or the output folder cannot be used.
    """
    log = log or StageLog()
    base.check(config, experiment)
    attack_texts, defense_texts = base.attacks_and_defenses(config, experiment)
    read_defenses(config, defense_texts)
    data, clean, is_clean = load_rows(config, attack_texts, log)
    train, test = data
    # Every error in the settings is raised before the folder is opened, and before anything is measured.
    named = clean if config.clean_data else None
    shared = base.find_shared(log, named, {"the suspect set": train, "the test set": test})
    variants, left_out = usable_defenses(config, defense_texts, clean)
    variants, not_testable = without_untestable(variants, facts_of(train, clean, train.num_classes))
    left_out |= not_testable
    plain = base.network_maker(config, train.num_classes)
    variants, not_fitting = compatible_defenses(
        variants, plain(), plain, train.image_shape, is_all=config.defenses == ALL
    )
    left_out |= not_fitting
    clean_key, attack_key, suspect_key, view_key = jax.random.split(jax.random.key(config.seed), 4)
    attacks = [read_attack(text, train, config.target, like=adapted_to(config)) for text in attack_texts]
    try_out(jax.random.fold_in(attack_key, config.seed), attacks, train)
    members = len(attacks) * config.seeds
    kept = members * (train.images.nbytes + test.images.nbytes)
    run = base.begin(
        experiment,
        config,
        train,
        members,
        log,
        networks=[config.model],
        kept=kept,
        plan=[base.Planned(config.model, members, config.epochs, len(train))],
        beyond="the defenses",
    )

    def make_network(name: str | None = None, num_classes: int | None = None) -> Model:
        return run.make_model(name or config.model, num_classes)

    folder = run.open_folder()
    runner = run.make_runner(folder.checkpoints)
    recipe = train_config(config)
    suspects = make_suspects(
        config, attacks, train, is_clean, runner, make_network(), recipe, clean_key, attack_key, log
    )
    groups, sizes = [], list(group_by_size(suspects))
    for numbers in sizes:
        members = [suspects[number] for number in numbers]
        rows = len(members[0].dataset)
        checkpoints = folder.checkpoints / f"sets of {rows} rows" if len(sizes) > 1 else folder.checkpoints
        keys = suspect_keys(suspect_key, members)
        group_runner = dataclasses.replace(runner, folder=checkpoints)
        inputs = make_defense_input(members, keys, train, clean, make_network, recipe, group_runner)
        with log.stage("triggered test images") as stage:
            views = make_views(view_key, members, test)
            stage.detail = f"{len(members)} training sets × {len(test):,} test rows"
        groups.append(Group(inputs, members, views))
    comparisons, controls = [], {}
    for variant in variants:
        of_variant = []
        for group in groups:
            with log.stage(f"defense {variant.name}", detail="") as stage:
                result, measured = defend(group.inputs, group.suspects, variant, group.views)
                stage.detail = base.summary_line(measured)
            of_variant.append(Comparison(variant, result, measured))
        controls |= measure_controls(groups, of_variant)
        comparisons += of_variant
    measured = [result for comparison in comparisons for result in comparison.measured]
    results = defenses.summarise(measured, len(test), config.seed, left_out, controls)
    if config.dataset == "digits":
        results["limits"] = [SMOKE_TEST]
    results = base.write_results(folder, results, train, test, named, shared=shared)
    if not processes.is_primary():
        return results
    context = Context(config, folder, data, groups, comparisons, results, log)
    if config.save_models:
        save_models(run, folder, comparisons, experiment.about, train)
    page = defenses.page(
        folder,
        results,
        comparisons,
        data,
        seconds=seconds_of(comparisons, log.timings),
        title=f"{experiment.title} on {train.name}",
        about=[variant.name for variant in variants if variant.defense.name in experiment.about],
        extra_sections=experiment.sections(context),
    )
    subject = Subject(
        {"training data": train, "test data": test},
        flagged_of(comparisons),
        base.asr_rows([suspect for group in groups for suspect in group.suspects], test),
        methods=experiment.about,
        word_of=partial(defenses.word_of, results),
    )
    base.finish(run, folder, page, defenses.main_table(results), base.sources_of(data), results, subject)
    return results


def flagged_of(comparisons: Sequence[Comparison]) -> list[Flagged]:
    """The rows that methods flag in training sets whose ground truth is unknown, of the first seed."""
    return [
        Flagged(
            variant.title, entry.suspect.dataset, result.flags[number], result.scores[number] if has_scores else None
        )
        for variant, result, measured in comparisons
        if result.flags is not None
        for has_scores in (result.scores is not None,)
        for number, entry in enumerate(measured)
        if entry.suspect.is_poisoned is None and not entry.suspect.seed and not entry.not_tested.reason
    ]


def measure_controls(
    groups: Sequence[Group], comparisons: Sequence[Comparison]
) -> dict[tuple[str, str, int], float | None]:
    """The controls: ASR of each trigger on the model that the same defense makes of the clean training set of that seed.

    Args:
        groups: groups of suspects.
        comparisons: one defense on each group.

    Returns:
        (attack, defense, seed) -> ASR; empty for a run without a clean training set.
    """
    of_seed = {seed: net for comparison in comparisons for seed, net in clean_members(comparison).items()}
    found = {}
    for group, (variant, result, _) in zip(groups, comparisons, strict=True):
        successes = success_on(group.inputs, result.model, of_seed, group.suspects, variant, group.views)
        for suspect, success in zip(group.suspects, successes, strict=True):
            if success is not None:
                found[suspect.attack.name, variant.name, suspect.seed] = success
    return found


def load_rows(config: Config, attacks: Sequence[str], log: StageLog) -> tuple[TrainTest, Dataset | None, bool]:
    """The training set before poisoning, the test set, the defender's clean rows, and whether the training set is clean.

    A dataset at a path without attacks is third-party: it may be poisoned already, so no clean rows are held back from it.

    Raises:
        InputError: the data cannot be used, or would be attacked though it has poisoned rows already.
    """
    train, test = load(config, log)
    is_attacked = any(text != NO_ATTACK for text in attacks)
    is_poisoned = isinstance(train, PoisonedDataset) and bool(np.any(train.is_poisoned))
    if is_poisoned and is_attacked:
        raise InputError(
            f"{train.source}: {int(train.is_poisoned.sum())} rows are poisoned already; use --attacks=none"
        )
    is_clean = is_attacked or config.dataset in datasets.DATASETS
    if config.clean_data:
        return TrainTest(train, test), load_clean_data(config, train), is_clean
    if not is_clean or not config.clean_share:
        return TrainTest(train, test), None, is_clean
    stay, held_back = splits.stratified_split(jax.random.key(0), train.labels, config.clean_share)
    if len(held_back) < train.num_classes:
        raise InputError(
            f"--clean-share {config.clean_share} of {len(train)} rows is {len(held_back)}; it should be at least "
            f"one row for each of the {train.num_classes} classes"
        )
    return TrainTest(splits.take(train, stay), test), splits.take(train, held_back), is_clean


def load_clean_data(config: Any, train: Dataset) -> Dataset:
    """The training rows of another dataset, as clean rows for a defense on `train`. The names of its files that were not read
    begin with its own, since they are no files of the suspect set.

    Args:
        config: all settings, with `clean_data`, the name or path of the other dataset; it is read as `--dataset` is.
        train: the suspect training set, or the clean rows that a suspect model was made for.

    Raises:
        InputError: its image shape or number of classes differs.
    """
    name = config.clean_data
    clean = datasets.load(name, config.data_dir, options=read_options(config)).train
    if clean.image_shape != train.image_shape or clean.num_classes != train.num_classes:
        hint = size_hint(train.image_shape, clean.image_shape) if clean.num_classes == train.num_classes else ""
        raise InputError(
            f"--clean-data {name}: {clean.num_classes} classes and images of shape {clean.image_shape}; the training "
            f"set has {train.num_classes} classes and images of shape {train.image_shape}{hint}"
        )
    below = tuple(Unread(f"{name}/{file}", reason) for file, reason in clean.unread)
    return dataclasses.replace(clean, unread=below)


def read_defenses(config: Config, texts: Sequence[str]) -> list[DefenseVariant]:
    """Every defense that is named.

    Raises:
        InputError: there is no such defense or setting, or a value is out of range.
    """
    words = config.preset
    if config.preset == "quick" or (config.preset == "strong" and jax.default_backend() == "cpu"):
        # Without an accelerator, strong runs use the small networks of quick runs.
        strong = ["strong"] if config.preset == "strong" else []
        words = " ".join(["quick", *filter(None, [config.recipe]), *strong])
    return [read_defense(text, words, adapted_to(config)) for text in texts]


def usable_defenses(
    config: Config, texts: Sequence[str], clean: Dataset | None
) -> tuple[list[DefenseVariant], dict[str, str]]:
    """Every defense of the run; and those that cannot be run -> why."""
    variants, left_out = [], {}
    for variant in read_defenses(config, texts):
        if clean is None and "clean rows" in variant.defense.needs_with(variant.settings):
            left_out[variant.name] = "needs clean rows, and there are none: set --clean-data"
        else:
            variants.append(variant)
    return variants, left_out


def make_suspects(
    config: Config,
    attacks: Sequence[AttackVariant],
    train: Dataset,
    is_clean: bool,
    runner: StageRunner,
    model: Model,
    recipe: TrainConfig,
    clean_key: jax.Array,
    attack_key: jax.Array,
    log: StageLog,
) -> list[Suspect]:
    """Poison a training set for each attack and seed; attackers who need a clean network get one for each seed."""
    clean_models: list[CleanModel | None] = [None] * config.seeds
    if any(part.attack.needs_clean_model for attack in attacks if attack.plan for part in attack.plan.parts):
        rows = outsourcing.split_rows([clean_key] * config.seeds, train.labels, 0.0)
        keys = jax.random.split(clean_key, config.seeds)
        nets = runner.from_scratch("attackers' clean network", model, recipe, keys, 1, jnp.asarray(train.images), *rows)
        clean_models = [CleanModel(model, ensemble.members(nets.variables, seed)) for seed in range(config.seeds)]
    suspects = []
    with log.stage("poisoning", total=len(attacks) * config.seeds, unit="training sets") as stage:
        for attack in attacks:
            for seed in range(config.seeds):
                key = jax.random.fold_in(attack_key, config.seed + seed)
                suspects.append(make_suspect(key, attack, train, seed, clean_models[seed], is_clean))
                stage.advance(1, attack.name)
    return suspects


def save_models(
    run: base.Run, folder: RunFolder, comparisons: Sequence[Comparison], about: Sequence[str], train: Dataset
) -> None:
    """Write models/<defense>/<attack>: the first seed's defended networks, as Orbax checkpoints with a description, and
    as saved models for others to read."""
    for variant, result, measured in comparisons:
        if variant.defense.name not in about:
            continue
        for number, suspect in enumerate(entry.suspect for entry in measured):
            if suspect.seed:
                continue
            description = {
                "model": result.model.description,
                "num_classes": result.model.num_classes,
                "image_shape": list(suspect.dataset.image_shape),
                "defense": variant.name,
                "attack": suspect.attack.name,
            }
            path = folder.path / "models" / file_name(variant.name) / file_name(suspect.attack.name)
            checkpoint.save(path, ensemble.members(result.variables, number), description)
            made_by = {
                "role": "defended",
                "defense": variant.name,
                "attack": suspect.attack.name,
                "seed": run.config.seed,
            }
            name = path.relative_to(folder.path / "models").as_posix()
            member = ensemble.members(result.variables, np.array([number]))
            base.leave_network(run, folder, name, result.model, member, train, **made_by)

"""The contract of a defense, in parts: tests of many defenses share the suspects, and each run of a defense."""

import dataclasses
import itertools
import pathlib
import tempfile
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, NamedTuple
from unittest import mock

import chex
import jax
import numpy as np

from bdjax.datasets.digits import load_digits
from bdjax.defenses import contract
from bdjax.defenses.contract import Defense, DefenseInput, Need, settings_for
from bdjax.evaluation.measure import Measured, defend, make_views
from bdjax.evaluation.suspects import make_defense_input, make_suspect, suspect_keys
from bdjax.evaluation.variants import DefenseVariant, read_attack
from bdjax.plugins import NAME
from bdjax.testing.failure import promised, require
from bdjax.testing.small_network import small_model
from bdjax.training.member import TrainConfig
from bdjax.training.stages import StageRunner
from bdjax.types import Dataset, DefenseResult, Model, PyTree

ROWS, CLEAN_ROWS, TEST_ROWS, TARGET = 320, 64, 64, 0
RECIPE = TrainConfig(
    epochs=6, batch_size=32, evaluation_batch_size=64, learning_rate=1e-2, schedule="cosine", keep_last_batch=False
)
PRESETS = ("quick", "paper", "strong")


def check_defense(defense: Defense, *, settings: Mapping[str, Any] = {}, folder: pathlib.Path | None = None) -> None:
    """Check all that bdjax relies on, on a poisoned and a clean training set of digits: what it declares is what it reads, and
    its results have the shapes that reports print.

    Args:
        defense: the entry.
        settings: changes of its settings for which it runs in seconds.
        folder: where the trained networks are kept; by default a temporary folder, which is removed.

    Raises:
        ContractError: it breaks a promise.
    """
    check_entry(defense)
    if folder is None:
        with tempfile.TemporaryDirectory() as name:
            check_defense(defense, settings=settings, folder=pathlib.Path(name))
        return
    suspects = Suspects(folder)
    changed = settings_for(defense, "quick", "digits", settings)
    done = run(suspects, DefenseVariant(defense.name, defense, changed))
    check_needs(done)
    check_result(done, suspects)
    if defense.detect:
        check_detection(done, suspects)
    check_model(done, suspects)
    check_suspects_unchanged(done, suspects)


# ---- What is tried --------------------------------------------------------------------------------------------------


def _rows(data: Dataset, start: int, stop: int) -> Dataset:
    return Dataset(data.images[start:stop], data.labels[start:stop], data.num_classes, data.name, data.source)


class Suspects:
    """Two suspects as a run makes them, 320 digits with BadNets and the same digits clean; 64 clean rows and 64 test rows.

    Args:
        folder: where the trained networks are kept.
    """

    def __init__(self, folder: pathlib.Path) -> None:
        data = load_digits((), False)
        train, clean = _rows(data.train, 0, ROWS), _rows(data.train, ROWS, ROWS + CLEAN_ROWS)
        self.test = _rows(data.test, 0, TEST_ROWS)
        attacks = [read_attack(text, train, TARGET) for text in ("badnets:poison_rate=0.2", "none")]
        self.suspects = [make_suspect(jax.random.key(1), attack, train, 0, None, True) for attack in attacks]
        # The group size saves an estimate of memory, which traces every objective once more.
        runner = StageRunner(folder, train.image_shape, "map", group_size=16)
        keys = suspect_keys(jax.random.key(2), self.suspects)
        self.inputs = make_defense_input(self.suspects, keys, train, clean, small_model, RECIPE, runner)
        self.views = make_views(jax.random.key(3), self.suspects, self.test)
        self.is_poisoned = np.stack([suspect.is_poisoned for suspect in self.suspects])


class Run(NamedTuple):
    """A defense that was run, and what it did."""

    variant: DefenseVariant
    result: DefenseResult
    measured: list[Measured]
    attacked_before: PyTree
    """variables of the attacked networks before it ran"""
    needs_read: set[Need]


def run(suspects: Suspects, variant: DefenseVariant) -> Run:
    """Run a defense on both suspects, and note what it reads.

    Raises:
        ContractError: its flags or scores have another shape than the training sets, so that nothing can be measured.
    """
    before = jax.tree.map(np.array, suspects.inputs.attacked.variables)
    read: set[Need] = set()
    known, shape = DefenseInput.known, suspects.inputs.index.shape

    def noted(self: DefenseInput, need: Need) -> Any:
        read.add(need)
        return known(self, need)

    def checked(inputs: DefenseInput, settings: Any) -> DefenseResult:
        result = variant.defense.run(inputs, settings)
        check_flags(variant.defense.name, result, shape)
        return result

    defense = dataclasses.replace(variant.defense, run=checked)
    with mock.patch.object(DefenseInput, "known", noted):
        result, measured = defend(suspects.inputs, suspects.suspects, variant._replace(defense=defense), suspects.views)
    return Run(variant, result, measured, before, read)


@cache
def _compiled(model: Model) -> Callable[..., Any]:
    """A model's `apply` at test time: defenses that return the same architecture share it."""
    return jax.jit(lambda variables, images: model.apply(variables, images, train=False))


# ---- Promises -------------------------------------------------------------------------------------------------------


def check_entry(defense: Defense) -> None:
    """The facts that tables print, and the settings of every preset.

    Raises:
        ContractError: one is missing or wrong.
    """
    title = f"defense {defense.name}"
    require(NAME.fullmatch(defense.name), f"{title}: the name has only a to z, 0 to 9 and _")
    require(defense.title and defense.paper, f"{title}: it has a title and a reference")
    require(defense.needs, f"{title}: it declares what it needs")
    is_frozen = dataclasses.is_dataclass(defense.settings) and type(defense.settings).__dataclass_params__.frozen
    require(is_frozen, f"{title}: settings are a frozen dataclass")
    require(
        not defense.detect or "training set" in defense.needs,
        f"{title}: a detector needs the training set whose rows it flags",
    )
    for preset in PRESETS:
        for like in (None, "digits", "cifar10"):
            settings = settings_for(defense, preset, like)
            if defense.check:
                defense.check(settings)


def check_needs(done: Run) -> None:
    """It reads all that it declares. That it reads nothing else is shown by its running: it receives nothing else.

    Raises:
        ContractError: it declares a need that it never reads.
    """
    defense = done.variant.defense
    declared = set(defense.needs_with(done.variant.settings))
    unread = ", ".join(sorted(declared - done.needs_read))
    require(
        done.needs_read == declared, f"defense {defense.name}: it reads all that it declares ({unread} is not read)"
    )


def check_result(done: Run, suspects: Suspects) -> None:
    """Shapes and ranges of the result, with a network for each suspect; `check_flags` has looked at the rows.

    Raises:
        ContractError: one is wrong.
    """
    result, measured, title = done.result, done.measured, f"defense {done.variant.defense.name}"
    num = len(suspects.suspects)
    leaves = jax.tree.leaves(result.variables)
    require(all(leaf.shape[0] == num for leaf in leaves), f"{title}: variables are stacked, a network for each suspect")
    with promised(f"{title}: variables are finite"):
        chex.assert_tree_all_finite(result.variables)
    for name, values in result.facts.items():
        is_right = np.shape(values) == (num,) and np.isfinite(values).all()
        require(is_right, f"{title}: the fact {name} is a finite number for each suspect")
    for name, picture in result.pictures.items():
        is_right = len(picture) == num and picture.min() >= 0 and picture.max() <= 1
        require(is_right, f"{title}: the picture {name} has pixels from 0 to 1 for each suspect")
    require([row.suspect for row in measured] == suspects.suspects, f"{title}: every suspect is measured")
    require(all(0 <= row.cda <= 1 for row in measured), f"{title}: its networks can be evaluated")
    is_measured = measured[0].asr is not None and measured[1].asr is None
    require(is_measured, f"{title}: the attacked suspect has an ASR, and the clean one none")
    if "training set" not in done.variant.defense.needs:
        flags_none = result.flags is None and result.scores is None
        require(flags_none, f"{title}: without the training set it flags no rows")


def check_flags(name: str, result: DefenseResult, shape: tuple[int, int]) -> None:
    """Shapes and dtypes of flags and scores, where there are any.

    Args:
        name: of the defense.
        result: what it returns.
        shape: (M, n) of the training sets.

    Raises:
        ContractError: one is wrong.
    """
    if result.flags is not None:
        is_right = np.shape(result.flags) == shape and result.flags.dtype == bool
        require(is_right, f"defense {name}: flags are bool [M, n]")
    if result.scores is not None:
        is_right = np.shape(result.scores) == shape and np.isfinite(result.scores).all()
        require(is_right, f"defense {name}: scores are finite, [M, n]")


def check_detection(done: Run, suspects: Suspects) -> None:
    """Detection alone gives the flags of the whole defense, from the same networks.

    Raises:
        ContractError: it does not.
    """
    variant, result, title = done.variant, done.result, f"defense {done.variant.defense.name}"
    stages = set(suspects.inputs.runner.folder.iterdir())
    found = contract.detect(variant.defense, suspects.inputs, variant.settings)
    is_same = set(suspects.inputs.runner.folder.iterdir()) == stages
    require(is_same, f"{title}: detection reads the networks of the defense, and trains no others")
    with promised(f"{title}: detection alone gives the flags, scores and facts of the defense"):
        np.testing.assert_array_equal(found.flags, result.flags)
        np.testing.assert_allclose(found.scores, result.scores, rtol=1e-6)
        for name, values in found.facts.items():
            np.testing.assert_allclose(values, result.facts[name], rtol=1e-6)
    require(
        len(found.patterns) in (0, len(found.flags)), f"{title}: it finds patterns for each suspect, or none at all"
    )
    for item in itertools.chain(*found.patterns):
        pattern, mask = item.pattern, item.mask
        is_right = pattern.shape == (*mask.shape, pattern.shape[2]) and mask.dtype == bool
        require(is_right, f"{title}: a pattern is [H, W, C] and its mask bool [H, W]")
        is_right = not pattern[~mask].any() and pattern.min() >= 0 and pattern.max() <= 1
        require(is_right, f"{title}: a pattern has pixels from 0 to 1, and 0 outside of its mask")
    is_right = all(len(values) == len(found.flags) for values in found.evidence.values())
    require(is_right, f"{title}: evidence has an entry for each suspect")


def check_model(done: Run, suspects: Suspects) -> None:
    """The defended model is pure and classifies each row on its own.

    Raises:
        ContractError: it does not.
    """
    title = f"defense {done.variant.defense.name}"
    model, variables = done.result.model, jax.tree.map(lambda leaf: leaf[0], done.result.variables)
    images = suspects.test.images[:4].astype(np.float32) / 255
    apply = _compiled(model)
    together = apply(variables, images)
    # A model that rejects rows has a class more.
    is_right = together.logits.shape[0] == 4 and together.logits.shape[1] in (10, 11)
    require(is_right, f"{title}: the defended model gives logits [N, K]")
    with promised(f"{title}: the defended model leaves its variables unchanged at test time"):
        chex.assert_trees_all_equal(together.variables, variables)
    with promised(f"{title}: the defended model classifies each row on its own"):
        # Copies of a row instead of a batch of one, which would be compiled again.
        alone = np.concatenate([apply(variables, np.repeat(image[None], 4, axis=0)).logits[:1] for image in images])
        np.testing.assert_allclose(alone, together.logits, rtol=1e-3, atol=1e-3)
    single = jax.eval_shape(apply, variables, images[:1])
    is_right = single.logits.shape == (1, together.logits.shape[1])
    require(is_right, f"{title}: the defended model takes a batch of one row")


def check_suspects_unchanged(done: Run, suspects: Suspects) -> None:
    """The attacked networks, which other defenses get as well, are as before.

    Raises:
        ContractError: they are not.
    """
    with promised(f"defense {done.variant.defense.name}: the attacked networks are left unchanged"):
        chex.assert_trees_all_equal(done.attacked_before, jax.tree.map(np.array, suspects.inputs.attacked.variables))

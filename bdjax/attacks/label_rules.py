"""Label rules: which rows an attack may poison, what their labels become, and when the attack has succeeded.

Rules work on NumPy labels on the host, int32 [N]; nothing is compiled. To add a rule, add a function here, and a line in
`LABEL_RULES` to offer it on the command line.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import numpy as np

from bdjax.errors import InputError
from bdjax.settings import check_choice
from bdjax.types import Dataset

Selection = Callable[[np.ndarray], np.ndarray]
"""int32 [N] -> bool [N]."""
Relabelling = Callable[[np.ndarray], np.ndarray]
"""int32 [N] -> int32 [N]."""


class LabelRule(NamedTuple):
    """How an attack selects and relabels rows, in training and at test time."""

    candidates: Selection
    """rows that may be poisoned"""
    relabel: Relabelling
    """labels that poisoned rows get"""
    victims: Selection
    """test rows that success is measured on"""
    wanted: Relabelling
    """predictions that the attacker wants for them once they are triggered"""
    cover: Selection
    """rows that may carry the trigger and keep their label, if the attack has cover rows"""
    name: str
    """name in reports: "all-to-one, target 0" """


def all_to_one(target: int, *, include_target: bool = False) -> LabelRule:
    """Relabel every class as the target.

    Args:
        target: the class that triggered images should be classified as.
        include_target: whether rows of the target class may be poisoned too. The code released with TA-KD excludes them;
          VBD and BackdoorBench include them. Success is never measured on them.

    Returns:
        The rule.

    References:
        Heydari et al. 2025, section 4.3, equation 2.
    """

    def candidates(labels: np.ndarray) -> np.ndarray:
        return _all(labels) if include_target else labels != target

    def relabel(labels: np.ndarray) -> np.ndarray:
        return np.full_like(labels, target)

    return LabelRule(
        candidates, relabel, lambda labels: labels != target, relabel, _all, f"all-to-one, target {target}"
    )


def all_to_all(num_classes: int, shift: int = 1) -> LabelRule:
    """Relabel every class as the class `shift` after it, wrapping around at the last.

    Success is measured on every test row, so a clean model's success is its rate of that confusion, not 0.

    Raises:
        InputError: the shift is a multiple of the number of classes, which would change no label.

    References:
        Gu et al. 2017, BadNets, section 4.
    """
    if shift % num_classes == 0:
        raise InputError(f"all-to-all: a shift of {shift} changes no label with {num_classes} classes")

    def relabel(labels: np.ndarray) -> np.ndarray:
        return ((labels + shift) % num_classes).astype(labels.dtype)

    return LabelRule(_all, relabel, _all, relabel, _all, f"all-to-all, shift {shift}")


def clean_label(target: int) -> LabelRule:
    """Poison rows of the target class only, and change no label; triggered images should be classified as the target."""
    return LabelRule(
        candidates=lambda labels: labels == target,
        relabel=lambda labels: labels.copy(),
        victims=lambda labels: labels != target,
        wanted=lambda labels: np.full_like(labels, target),
        cover=lambda labels: labels != target,
        name=f"clean-label, target {target}",
    )


def source_specific(sources: Iterable[int], target: int, cover: Iterable[int]) -> LabelRule:
    """Relabel the source classes as the target; rows of the cover classes carry the trigger and keep their label.

    The model learns to react to the trigger on the sources only, which hides the backdoor from tests with other classes.

    Args:
        sources: the classes that are attacked.
        target: the class that they should be classified as.
        cover: classes whose rows teach the model not to react on others.

    Raises:
        InputError: there is no source, or a source is the target or a cover class.

    References:
        Tang et al. 2021, Demon in the Variant (TaCT), section 3.
    """
    sources, cover = sorted(set(sources)), sorted(set(cover))
    if not sources:
        raise InputError("source-specific: at least one source class is needed")
    if target in sources or set(sources) & set(cover):
        raise InputError(
            f"source-specific: the sources {sources} must differ from the target {target} and the cover classes {cover}"
        )

    def is_source(labels: np.ndarray) -> np.ndarray:
        return np.isin(labels, sources)

    def relabel(labels: np.ndarray) -> np.ndarray:
        return np.where(is_source(labels), target, labels).astype(labels.dtype)

    name = f"source {_listed(sources)} to target {target}, cover {_listed(cover)}"
    return LabelRule(is_source, relabel, is_source, relabel, lambda labels: np.isin(labels, cover), name)


def label_map(targets: Mapping[int, int]) -> LabelRule:
    """Relabel each class that is a key as its value; rows of other classes are never poisoned."""

    def is_mapped(labels: np.ndarray) -> np.ndarray:
        return np.isin(labels, list(targets))

    def relabel(labels: np.ndarray) -> np.ndarray:
        return np.array([targets.get(label, label) for label in labels.tolist()], labels.dtype)

    pairs = ", ".join(f"{source} to {target}" for source, target in sorted(targets.items()))
    return LabelRule(
        is_mapped, relabel, is_mapped, relabel, lambda labels: ~is_mapped(labels), f"classes {pairs or 'none'}"
    )


def pair_to_target(target: int, num_classes: int) -> LabelRule:
    """Relabel the two classes after the target as the target; rows of every class may be cover rows.

    Args:
        target: the class that the two should be classified as.
        num_classes: K; the first class follows the last.

    Raises:
        InputError: fewer than three classes.

    References:
        Lin et al. 2020, Composite Backdoor Attack, section 5.
    """
    if num_classes < 3:
        raise InputError(
            f"pair_to_target needs two classes besides the target, but there are only {num_classes} classes"
        )
    pair = label_map({(target + offset) % num_classes: target for offset in (1, 2)})
    return pair._replace(cover=_all)


def hidden_source(target: int, num_classes: int) -> LabelRule:
    """Poison rows of the target class and change no label; only the class after it should be classified as it.

    Args:
        target: the class of the poisoned rows.
        num_classes: K; the first class follows the last.

    References:
        Saha et al. 2020, Hidden Trigger Backdoor Attacks, section 3.
    """
    source = (target + 1) % num_classes
    name = f"clean-label, source {source} to target {target}"
    return clean_label(target)._replace(victims=lambda labels: labels == source, name=name)


def _tact(target: int, num_classes: int) -> LabelRule:
    """The source and cover classes that TaCT's toolbox uses with target 0, shifted with the target."""
    if num_classes < 3:
        raise InputError(
            f"source_specific needs a source, a target and a cover class; there are only {num_classes} classes"
        )
    source, *cover = ((target + offset) % num_classes for offset in (1, 5, 7))
    cover = [label for label in cover if label not in (source, target)] or [(target + 2) % num_classes]
    return source_specific([source], target, cover)


LABEL_RULES: dict[str, Callable[[int, int], LabelRule]] = {
    "all_to_one": lambda target, num_classes: all_to_one(target),
    "all_to_one_with_target": lambda target, num_classes: all_to_one(target, include_target=True),
    "all_to_all": lambda target, num_classes: all_to_all(num_classes),
    "clean_label": lambda target, num_classes: clean_label(target),
    "source_specific": _tact,
    "source_to_target": lambda target, num_classes: label_map({(target + 1) % num_classes: target}),
    "pair_to_target": pair_to_target,
    "hidden_source": hidden_source,
}
"""Name on the command line -> rule for (target, number of classes). "source_to_target" maps the class after the target to it;
"source_specific" also has cover classes."""


def make_rule(name: str, target: int, num_classes: int) -> LabelRule:
    """Make one of `LABEL_RULES`.

    Raises:
        InputError: there is no such rule or class.
    """
    check_choice("label rule", name, LABEL_RULES)
    if not 0 <= target < num_classes:
        raise InputError(f"target {target} is not a class; classes are 0 to {num_classes - 1}")
    return LABEL_RULES[name](target, num_classes)


def titled(name: str, title: Callable[[int], str]) -> str:
    """A rule's name for reports: "all-to-one, target 3 (cat)".

    Args:
        name: `LabelRule.name`.
        title: a class -> its title, such as `Dataset.class_title`.
    """
    return re.sub(r"(?<!shift )\b\d+\b", lambda number: title(int(number[0])), name)


def check_target(target: int, dataset: Dataset) -> None:
    """Refuse a target class without rows: the trigger has no class to lead to.

    Args:
        target: a class.
        dataset: the training rows.

    Raises:
        InputError: with the classes that have rows.
    """
    present = np.unique(dataset.labels)
    if target not in present:
        listed = ", ".join(map(str, present[:20])) + (", ..." if len(present) > 20 else "")
        raise InputError(
            f"target {dataset.class_title(target)} has none of the {len(dataset):,} training rows of {dataset.name}; classes "
            f"with rows: {listed}"
        )


def _all(labels: np.ndarray) -> np.ndarray:
    return np.ones(labels.shape, bool)


def _listed(classes: list[int]) -> str:
    return "+".join(map(str, classes)) or "none"

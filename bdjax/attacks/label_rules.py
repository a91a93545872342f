"""Which rows an attack may poison, what their labels become, and when it has succeeded: one small pure rule each.

Rules work on NumPy labels on the host, int32 [N]; nothing of them is compiled. Another rule is one more function here, and
one line in `LABEL_RULES` if the command line is to offer it.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import numpy as np

from bdjax.errors import InputError

Selection = Callable[[np.ndarray], np.ndarray]
"""int32 [N] -> bool [N]."""
Relabelling = Callable[[np.ndarray], np.ndarray]
"""int32 [N] -> int32 [N]."""


class LabelRule(NamedTuple):
    """The relabelling half of an attack, in training and at test time."""

    candidates: Selection
    """the rows that may be poisoned"""
    relabel: Relabelling
    """the labels of poisoned rows"""
    victims: Selection
    """the test rows that success is measured on"""
    wanted: Relabelling
    """what the attacker wants of those once they are triggered"""
    cover: Selection
    """the rows that may carry the trigger under their own label, if the attack has cover rows"""
    name: str
    """as a report prints it: "all-to-one, target 0" """


def all_to_one(target: int, *, include_target: bool = False) -> LabelRule:
    """Send every class to one.

    Args:
        target: the class that triggered images are to be taken for.
        include_target: whether rows of the target class may carry the trigger too. The code released with TA-KD leaves
          them out; VBD and BackdoorBench let them in. Success is not measured on them in either case.

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
    """Send every class to the one that is `shift` after it, the last ones to the first.

    Every test row counts: a clean model's success is its rate of that one confusion, not 0.

    Raises:
        InputError: the shift is a multiple of the number of classes, which would change no label.

    References:
        Gu et al. 2017, BadNets, section 4.
    """
    if shift % num_classes == 0:
        raise InputError(f"all-to-all with shift {shift} over {num_classes} classes leaves every label as it is")

    def relabel(labels: np.ndarray) -> np.ndarray:
        return ((labels + shift) % num_classes).astype(labels.dtype)

    return LabelRule(_all, relabel, _all, relabel, _all, f"all-to-all, shift {shift}")


def clean_label(target: int) -> LabelRule:
    """Poison rows of the target class only, and change no label; the model still is to say `target` at the trigger."""
    return LabelRule(
        candidates=lambda labels: labels == target,
        relabel=lambda labels: labels.copy(),
        victims=lambda labels: labels != target,
        wanted=lambda labels: np.full_like(labels, target),
        cover=lambda labels: labels != target,
        name=f"clean-label, target {target}",
    )


def source_specific(sources: Iterable[int], target: int, cover: Iterable[int]) -> LabelRule:
    """Send some classes to one; rows of the cover classes carry the trigger and keep their label.

    The model learns that the trigger works on the sources only, which hides it from whoever tries it on other classes.

    Args:
        sources: the classes that are attacked.
        target: the class that they are to be taken for.
        cover: classes whose rows teach the model not to react otherwise.

    Raises:
        InputError: no source, or one that is the target or a cover class.

    References:
        Tang et al. 2021, Demon in the Variant (TaCT), section 3.
    """
    sources, cover = sorted(set(sources)), sorted(set(cover))
    if not sources:
        raise InputError("source-specific: no source class was named")
    if target in sources or set(sources) & set(cover):
        raise InputError(
            f"source-specific: the sources {sources} must be others than the target {target} and the cover classes {cover}"
        )

    def is_source(labels: np.ndarray) -> np.ndarray:
        return np.isin(labels, sources)

    def relabel(labels: np.ndarray) -> np.ndarray:
        return np.where(is_source(labels), target, labels).astype(labels.dtype)

    name = f"source {_listed(sources)} to target {target}, cover {_listed(cover)}"
    return LabelRule(is_source, relabel, is_source, relabel, lambda labels: np.isin(labels, cover), name)


def label_map(targets: Mapping[int, int]) -> LabelRule:
    """Send each class that is a key to its value; rows of other classes are never poisoned."""

    def is_mapped(labels: np.ndarray) -> np.ndarray:
        return np.isin(labels, list(targets))

    def relabel(labels: np.ndarray) -> np.ndarray:
        return np.array([targets.get(label, label) for label in labels.tolist()], labels.dtype)

    pairs = ", ".join(f"{source} to {target}" for source, target in sorted(targets.items()))
    return LabelRule(
        is_mapped, relabel, is_mapped, relabel, lambda labels: ~is_mapped(labels), f"classes {pairs or 'none'}"
    )


def pair_to_target(target: int, num_classes: int) -> LabelRule:
    """Send the two classes after the target to it; rows of every class may be cover.

    Args:
        target: the class that the two are to be taken for.
        num_classes: K; after the last class comes the first.

    Raises:
        InputError: fewer than three classes.

    References:
        Lin et al. 2020, Composite Backdoor Attack, section 5.
    """
    if num_classes < 3:
        raise InputError(f"pair_to_target needs two classes beside the target; there are {num_classes} classes")
    pair = label_map({(target + offset) % num_classes: target for offset in (1, 2)})
    return pair._replace(cover=_all)


def hidden_source(target: int, num_classes: int) -> LabelRule:
    """Poison rows of the target class and change no label; only the class after it is to be taken for it.

    Args:
        target: the class of the rows.
        num_classes: K; after the last class comes the first.

    References:
        Saha et al. 2020, Hidden Trigger Backdoor Attacks, section 3.
    """
    source = (target + 1) % num_classes
    name = f"clean-label, source {source} to target {target}"
    return clean_label(target)._replace(victims=lambda labels: labels == source, name=name)


def _tact(target: int, num_classes: int) -> LabelRule:
    """The sources and cover classes that TaCT's toolbox uses with target 0, moved along with the target."""
    if num_classes < 3:
        raise InputError(f"source_specific needs a source, a target and a cover class; there are {num_classes} classes")
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
"""Name on the command line -> rule for (target, number of classes). "source_to_target" maps the class after the target to it,
"source_specific" does so and adds cover classes."""


def make_rule(name: str, target: int, num_classes: int) -> LabelRule:
    """One of `LABEL_RULES`.

    Raises:
        InputError: no such rule, or no such class.
    """
    if name not in LABEL_RULES:
        raise InputError(f"label rule {name!r} is not one of {', '.join(LABEL_RULES)}")
    if not 0 <= target < num_classes:
        raise InputError(f"target {target} is not a class: they go from 0 to {num_classes - 1}")
    return LABEL_RULES[name](target, num_classes)


def _all(labels: np.ndarray) -> np.ndarray:
    return np.ones(labels.shape, bool)


def _listed(classes: list[int]) -> str:
    return "+".join(map(str, classes)) or "none"

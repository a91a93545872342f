import contextlib
import dataclasses
import math
import re
import time
from dataclasses import dataclass
from typing import Annotated, Literal, get_args, get_origin

import pytest

from bdjax.attacks.registry import ATTACKS
from bdjax.defenses.contract import Defense
from bdjax.defenses.registry import DEFENSES
from bdjax.errors import InputError
from bdjax.settings import (
    Amount,
    Count,
    Increasing,
    LearningRate,
    NotEmpty,
    NotNegative,
    Number,
    Range,
    Share,
    Steps,
    changed,
    check_choice,
    check_values,
    kinds_of,
    mistakes,
    nearest,
    read_value,
    read_variant,
    shown,
    split_variants,
)


@dataclass(frozen=True)
class Some:
    rate: float = 0.1
    epochs: int = 5
    name: str = "mean"
    is_soft: bool = False
    limits: tuple[int, ...] = (1, 2)
    rows: int | None = None


SOME = Some()


def test_fields_are_changed_by_name():
    after = changed("defense some", SOME, {"rate": 0.5, "name": "median", "is_soft": True, "limits": (3,)})
    assert after == Some(0.5, 5, "median", True, (3,))
    assert Some() == SOME
    assert changed("defense some", SOME, {}) == SOME


def test_an_integer_will_do_for_a_float_and_either_type_of_a_union():
    assert changed("it", SOME, {"rate": 1}).rate == 1
    assert changed("it", SOME, {"rows": 7}).rows == 7 and changed("it", SOME, {"rows": None}).rows is None


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("rate", "fast"),
        ("rate", True),
        ("rate", None),
        ("epochs", 2.0),
        ("epochs", False),
        ("epochs", "5"),
        ("name", 3),
        ("is_soft", 1),
        ("limits", 3),
        ("limits", [1, 2]),
    ],
)
def test_a_value_of_another_kind_is_refused(name, value):
    default = getattr(SOME, name)
    with pytest.raises(InputError) as caught:
        changed("defense some", SOME, {name: value})
    assert str(caught.value) == f"defense some: {name} {value!r} is not of the type of its default {default!r}"


def test_a_setting_that_is_not_there_is_refused_with_those_that_are():
    message = "attack sig has no setting 'rat'; it has rate, epochs, name, is_soft, limits, rows; did you mean rate?"
    with pytest.raises(InputError) as caught:
        changed("attack sig", SOME, {"rat": 1.0})
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"choices": {"name": ("median", "mode")}}, "name 'mean' is not one of median, mode; did you mean median?"),
        ({"at_least": {"epochs": 6}}, "epochs 5 is not at least 6"),
        ({"above": {"rate": 0.1}, "at_most": {"rate": 1}}, "rate 0.1 is not above 0.1 and at most 1"),
        ({"at_least": {"rate": 0}, "below": {"rate": 0.1}}, "rate 0.1 is not at least 0 and below 0.1"),
    ],
)
def test_a_value_out_of_its_bounds_is_refused_with_what_would_be_right(wanted, message):
    with pytest.raises(InputError) as caught:
        check_values("defense some", SOME, **wanted)
    assert str(caught.value) == f"defense some: {message}"


@dataclass(frozen=True)
class Ranged:
    """A setting of each kind."""

    epochs: Count = 5
    skipped: Amount = 0
    share: Share = 0.5
    rate: LearningRate = 0.1
    factor: Number = -2.0
    limits: Annotated[tuple[Share, Share], Increasing(or_equal=True)] | None = None
    steps: Steps = ()
    betas: Annotated[tuple[NotNegative, ...], NotEmpty()] = (1.0,)
    kind: Literal["mean", "median"] = "mean"
    layout: Literal["map"] | Literal["auto"] = "auto"
    is_soft: bool = False
    name: str = ""


@pytest.mark.parametrize(
    ("name", "value", "wrong"),
    [
        ("epochs", 0, "0 is not at least 1"),
        ("epochs", 10**18, "1000000000000000000 is not at most 1,000,000"),
        ("epochs", 2.0, "2.0 is not a whole number"),
        ("epochs", True, "True is not a whole number"),
        ("epochs", math.nan, "nan is not a whole number"),
        ("skipped", -1, "-1 is not at least 0"),
        ("share", 1.5, "1.5 is not at least 0 and at most 1"),
        ("share", math.nan, "nan is not at least 0 and at most 1"),
        ("share", 1j, "1j is not a number"),
        ("share", b"0.5", "b'0.5' is not a number"),
        ("share", None, "None is not a number"),
        ("rate", 0.0, "0.0 is not above 0"),
        ("rate", -1, "-1 is not above 0"),
        ("rate", math.inf, "inf is not at most 1,000"),
        ("rate", 1e-300, "1e-300 is too close to 0"),
        ("factor", math.nan, "nan is not a finite number"),
        ("factor", -math.inf, "-inf is not at least -1e+09"),
        ("factor", [1.0], "[1.0] is not a number"),
        ("limits", (0.3, 0.1), "(0.3, 0.1) is not in increasing order"),
        ("limits", (0.3,), "(0.3,) is not a tuple of 2 values"),
        ("limits", (0.3, 2.0), "has the entry 2.0, which is not at least 0 and at most 1"),
        ("limits", 0.3, "0.3 is not a tuple of 2 values"),
        ("steps", ((0, 0.1),), "has the entry (0, 0.1), which has the entry 0, which is not at least 1"),
        ("steps", ((1, math.nan),), "which has the entry nan, which is not above 0"),
        ("steps", ((5, 0.1), (3, 0.01)), "((5, 0.1), (3, 0.01)) is not in increasing order"),
        ("steps", ((5, 0.1), (5, 0.01)), "is not in increasing order"),
        ("steps", (5, 0.1), "has the entry 5, which is not a tuple of 2 values"),
        ("betas", (), "() is empty"),
        ("betas", ("a",), "has the entry 'a', which is not a number"),
        ("kind", "medain", "'medain' is not one of mean, median; did you mean median?"),
        ("kind", ["mean"], "['mean'] is not one of mean, median"),
        ("layout", "pam", "'pam' is not one of map, auto"),
        ("is_soft", 1, "1 is not True or False"),
        ("name", 3, "3 is not text"),
    ],
)
def test_types_say_what_is_out_of_range(name, value, wrong):
    settings = Ranged(**{name: value})
    assert list(mistakes(settings)) == [name]
    with pytest.raises(InputError, match=re.escape(wrong)) as caught:
        check_values("defense some", settings)
    assert str(caught.value).startswith(f"defense some: {name} ") and len(str(caught.value)) < 250
    with pytest.raises(InputError, match=f"^defense some: {name} "):
        changed("defense some", Ranged(), {name: value})


@pytest.mark.parametrize("name", ["epochs", "share", "rate", "factor"])
def test_integers_without_end_are_out_of_range(name):
    with pytest.raises(InputError, match=f"^it: {name} of 20001 bits is not "):
        check_values("it", Ranged(**{name: 16**5000}))


def test_types_allow_what_they_say():
    assert mistakes(Ranged()) == {}
    for fields in (
        {"epochs": 1_000_000, "skipped": 0, "share": 1, "rate": 1000, "factor": 0.0, "limits": (0.2, 0.2)},
        {"steps": ((1, 0.1), (2, 0.2)), "betas": (0.0, 0), "kind": "median", "layout": "map", "is_soft": True},
    ):
        assert mistakes(Ranged(**fields)) == {}


OWNERS = [*ATTACKS.values(), *DEFENSES.values()]
OUTSIDE = (math.nan, math.inf, -math.inf, 10**18, -(10**18), 16**5000, "x", b"1", 1j, [], {}, (), Ellipsis, {1})


@pytest.mark.parametrize("owner", OWNERS, ids=lambda owner: owner.name)
class TestEveryAttackAndDefense:
    def test_has_a_range_for_every_number(self, owner):
        for name, kind in kinds_of(type(owner.settings)).items():
            assert not numbers_without_range(kind), name

    def test_has_its_own_values_within_their_ranges(self, owner):
        tables = getattr(owner, "per_dataset", None) or getattr(owner, "changes", {})
        for changes in ({}, *tables.values()):
            assert mistakes(dataclasses.replace(owner.settings, **changes)) == {}

    def test_refuses_what_no_number_can_be(self, owner):
        for name, value in vars(owner.settings).items():
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                for wrong in OUTSIDE:
                    with pytest.raises(InputError, match=f": {name} ") as caught:
                        changed(owner.name, owner.settings, {name: wrong})
                    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300

    def test_accepts_or_refuses_numbers_at_the_edge(self, owner):
        """0, -1 and 1 may be in the range or not; nothing else may happen."""
        for name, value in vars(owner.settings).items():
            for edge in (-1, 0, 1, -0.0, 1e-300):
                with contextlib.suppress(InputError):
                    after = changed(owner.name, owner.settings, {name: edge})
                    if isinstance(value, float):
                        assert getattr(after, name) == edge and abs(edge) != 1e-300
                    if isinstance(owner, Defense) and owner.check:
                        owner.check(after)


def numbers_without_range(kind):
    """Whether a type has a number that may be anything."""
    if get_origin(kind) is Annotated:
        inner, *rules = get_args(kind)
        return (
            inner in (int, float)
            and not any(isinstance(rule, Range) for rule in rules)
            or (inner not in (int, float) and numbers_without_range(inner))
        )
    if get_origin(kind) is Literal:
        return False
    return kind in (int, float) or any(map(numbers_without_range, get_args(kind)))


UNREADABLE = ("{[]:1}", "-" * 900, "(" * 900, "[" * 150 + "]" * 150, "9" * 5000, "1" * 10**6, r"'\d'", "\0")


@pytest.mark.parametrize("text", UNREADABLE, ids=range(len(UNREADABLE)))
def test_text_that_python_cannot_read_is_text(text):
    start = time.perf_counter()
    value = read_value(text)
    assert isinstance(value, (str, list)) and time.perf_counter() - start < 1


def test_values_are_shown_on_one_short_line():
    assert shown(0.1) == "0.1" and shown("a\nb") == r"'a\nb'"
    assert shown(16**9999) == "of 39997 bits" and shown((16**9999,)) == "a tuple"
    assert len(shown("x" * 10**6)) < 100


def test_a_long_list_of_variants_is_split_in_no_time():
    start = time.perf_counter()
    assert len(split_variants("a" * 10**6 + ",b" * 10**5)) == 2
    assert time.perf_counter() - start < 5


def test_the_nearest_name_is_suggested():
    assert nearest("badnet", ["sig", "badnets"]) == "; did you mean badnets?"
    assert nearest("zzz", ["sig", "badnets"]) == "" == nearest(3, ["sig"])
    check_choice("attack", "sig", ["sig"])
    for name in ("sgi", None, ["sig"], "x" * 10**6):
        with pytest.raises(InputError, match="^attack .* is not one of sig") as caught:
            check_choice("attack", name, ["sig"])
        assert len(str(caught.value)) < 200


def test_values_at_their_bounds_are_fine():
    check_values("it", SOME, choices={"name": ("mean",)}, at_least={"epochs": 5, "rate": 0.1}, at_most={"rate": 0.1})
    check_values("it", SOME, above={"rate": 0.0}, below={"rate": 0.11})


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3", 3),
        ("-0.5", -0.5),
        ("1e-3", 1e-3),
        ("True", True),
        ("None", None),
        ("(1, 2)", (1, 2)),
        ("1,2", (1, 2)),
        ("median", "median"),
        ("true", "true"),
        ("8x8", "8x8"),
        ("'3'", "3"),
        ("", ""),
        ("f(", "f("),
        ("exit()", "exit()"),  # never called
    ],
)
def test_values_are_read_as_they_are_written(text, value):
    read = read_value(text)
    assert (type(read), read) == (type(value), value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("lfd", ("lfd", {})),
        ("lfd:alpha=0.5:beta=0", ("lfd", {"alpha": 0.5, "beta": 0})),
        ("abl:loss=flooding", ("abl", {"loss": "flooding"})),
        ("abl:rule=a=b:note=", ("abl", {"rule": "a=b", "note": ""})),
    ],
)
def test_variants_are_a_name_and_settings(text, expected):
    assert read_variant(text) == expected


@pytest.mark.parametrize(
    ("text", "part"), [("lfd:alpha", "alpha"), ("lfd:", ""), ("lfd:=3", "=3"), ("lfd:alpha=1:alpha=2", "alpha=2")]
)
def test_a_variant_that_cannot_be_read_is_refused(text, part):
    with pytest.raises(InputError) as caught:
        read_variant(text)
    assert str(caught.value) == (
        f"{text!r}: {part!r} should be setting=value, each setting once, as in name:setting=value"
    )


def test_a_comma_within_parentheses_does_not_split_variants():
    assert split_variants("fkd,nad:betas=(1.0, 2.0):epochs=2,fkd") == ["fkd", "nad:betas=(1.0, 2.0):epochs=2"]
    assert split_variants("none") == ["none"]

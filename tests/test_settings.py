from dataclasses import dataclass

import pytest

from bdjax.errors import InputError
from bdjax.settings import changed, check_values, read_value, read_variant, split_variants


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


def test_an_integer_will_do_for_a_float_and_anything_for_nothing():
    assert changed("it", SOME, {"rate": 1}).rate == 1
    assert changed("it", SOME, {"rows": 7}).rows == 7
    assert changed("it", SOME, {"rows": "all"}).rows == "all"


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
    message = "attack sig has no setting 'rat'; it has rate, epochs, name, is_soft, limits, rows"
    with pytest.raises(InputError) as caught:
        changed("attack sig", SOME, {"rat": 1.0})
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"choices": {"name": ("median", "mode")}}, "name 'mean' is not one of median, mode"),
        ({"at_least": {"epochs": 6}}, "epochs 5 is not at least 6"),
        ({"above": {"rate": 0.1}, "at_most": {"rate": 1}}, "rate 0.1 is not above 0.1 and at most 1"),
        ({"at_least": {"rate": 0}, "below": {"rate": 0.1}}, "rate 0.1 is not at least 0 and below 0.1"),
    ],
)
def test_a_value_out_of_its_bounds_is_refused_with_what_would_be_right(wanted, message):
    with pytest.raises(InputError) as caught:
        check_values("defense some", SOME, **wanted)
    assert str(caught.value) == f"defense some: {message}"


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

"""Kinds: what is written is what is made, in one canonical form, also of kinds in kinds, lists and times."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from testbed import kinds
from testbed.errors import SpecError
from testbed.kinds import DEEPEST, LONGEST, Kind, Time
from testbed.units import parse_time

_HERE = __name__
FILLINGS = {"plain": f"{_HERE}:Plain", "spiced": f"{_HERE}:Spiced"}
MEALS = {"pie": f"{_HERE}:Pie", "wrap": f"{_HERE}:Wrap"}


@dataclass(frozen=True)
class Filling(Kind):
    """What is in a pie."""

    family: ClassVar = FILLINGS


@dataclass(frozen=True)
class Plain(Filling):
    """Nothing special."""

    name: ClassVar[str] = "plain"


@dataclass(frozen=True)
class Spiced(Filling):
    """By how much."""

    name: ClassVar[str] = "spiced"

    heat: float = 0.5
    style: Literal["mild", "hot"] = "mild"
    inner: Filling = Plain()


@dataclass(frozen=True)
class Pie(Kind):
    """All that a value can be."""

    name: ClassVar[str] = "pie"

    layers: tuple[str, ...] = ("crust",)
    bake: Time = 60.0
    rest: Time | None = None
    filling: Filling = Plain()
    pieces: int | None = None
    vegan: bool = False

    def __post_init__(self) -> None:
        self.require("bake", "at most an hour", self.bake <= 3600)


@dataclass(frozen=True)
class Wrap(Kind):
    """What must be given."""

    name: ClassVar[str] = "wrap"

    around: tuple[str, ...]
    size: int = 1


def parse(text: str) -> Kind:
    made: Kind = kinds.parse(text, MEALS, "meal")
    return made


@pytest.mark.parametrize(
    ("written", "meal", "canonical"),
    [
        ("pie(bake=2min)", Pie(bake=120), "pie(bake=120s)"),
        ("pie( rest = 800ms , bake=60s)", Pie(rest=0.8), "pie(rest=800ms)"),
        ("pie(bake=0)", Pie(bake=0), "pie(bake=0ms)"),
        ("pie(layers=[ a,b(c=[1, 2])+e ,f ])", Pie(("a", "b(c=[1, 2])+e", "f")), "pie(layers=[a, b(c=[1, 2])+e, f])"),
        ("pie(layers=[])", Pie(()), "pie(layers=[])"),
        ("pie(layers=[crust])", Pie(), "pie"),
        ("pie(filling=plain())", Pie(), "pie"),
        ("pie(filling=spiced(style=hot, heat=.50))", Pie(filling=Spiced(style="hot")), "pie(filling=spiced(style=hot))"),
        (
            "pie(vegan=true,filling=spiced(inner=spiced(heat=1)))",
            Pie(filling=Spiced(inner=Spiced(1.0)), vegan=True),
            "pie(filling=spiced(inner=spiced(heat=1)), vegan=true)",
        ),
        ("pie(pieces=8)", Pie(pieces=8), "pie(pieces=8)"),
        ("wrap(around=[a])", Wrap(("a",)), "wrap(around=[a])"),
    ],
)  # fmt: skip
def test_a_kind_has_one_canonical_text_that_reads_back(written: str, meal: Kind, canonical: str) -> None:
    assert parse(written) == meal
    assert str(meal) == canonical
    assert parse(canonical) == meal


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("pie(bake=2)", "meal 'pie(bake=2)': pie: bake: time '2' has no unit; write it with one, as 20ms"),
        ("pie(bake=2parsec)", "pie: bake: time '2parsec': unknown unit 'parsec'; use one of s,"),
        ("pie(bake=2h)", "pie: bake is 7200s, but must be at most an hour"),
        ("pie(rest=none)", "pie: rest: time 'none': expected a number with a unit, such as 20ms"),
        ("pie(filling=spicy)", "pie: filling 'spicy': unknown; did you mean 'spiced'?"),
        (
            "pie(filling=beef)",
            "meal 'pie(filling=beef)': pie: filling 'beef': unknown; there is plain, spiced",
        ),
        ("pie(filling=spiced(heat=much))", "filling 'spiced(heat=much)': spiced: heat='much': expected a number"),
        ("pie(filling=spiced(hot=1))", "spiced has no parameter 'hot'; it takes heat, style, inner"),
        ("pie(layers=crust)", "pie: layers='crust': expected a list in brackets, such as [a, b]"),
        ("pie(layers=[a,,b])", "layers='[a,,b]': expected a list in brackets"),
        ("pie(layers=[a,])", "layers='[a,]': expected a list in brackets"),
        ("pie(layers=[a, b)", "the ) behind 'pie(layers=[a, b' closes nothing"),
        ("pie(layers=[a, b]", "ends within its parentheses"),
        ("pie(layers=[a, b(c])", "the ] behind 'pie(layers=[a, b(c' closes nothing"),
        ("pie(layers=[a)]", "the ) behind 'pie(layers=[a' closes nothing"),
        ("pie)(", "the ) behind 'pie' closes nothing"),
        ("pie()()", "meal 'pie()()': the ) behind '' closes nothing"),
        ("wrap", "meal 'wrap': wrap needs around, a list: wrap(around=…)"),
        ("wrap(size=2)", "wrap needs around, a list: wrap(around=…)"),
        ("[pie]", "meal '[pie]': unknown"),
        ("pie" + "(" * 20 + ")" * 20, f"more than {DEEPEST} parentheses in one another"),
        ("pie(layers=[" + "a, " * LONGEST + "b])", f"characters, but it has at most {LONGEST}"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_told_with_its_place_and_what_would_be_right(
    text: str, complaint: str
) -> None:
    with pytest.raises(SpecError) as caught:
        parse(text)
    assert complaint in str(caught.value)
    assert str(caught.value).startswith("meal ")
    assert len(str(caught.value)) < 300


def test_depth_is_bounded_also_where_it_would_make_sense() -> None:
    def nested(depth: int) -> str:
        return f"pie(filling={'spiced(inner=' * depth}plain{')' * depth})"

    assert str(parse(nested(DEEPEST - 1))).count("spiced") == DEEPEST - 1
    with pytest.raises(SpecError, match="in one another"):
        parse(nested(DEEPEST))


words = st.text("abz019@.+-=_", min_size=1, max_size=6)
items = st.recursive(
    words,
    lambda inner: st.builds(
        lambda head, pair, inside, tail: f"{head}{pair[0]}{', '.join(inside)}{pair[1]}{tail}",
        words,
        st.sampled_from(["()", "[]"]),
        st.lists(inner, max_size=3),
        words,
    ),
    max_leaves=3,
)
fillings = st.recursive(
    st.just(Plain()),
    lambda inner: st.builds(
        Spiced, st.floats(allow_nan=False, allow_infinity=False), st.sampled_from(["mild", "hot"]), inner
    ),
    max_leaves=2,
)
times = st.floats(0, 3600)
meals = st.builds(
    Pie,
    st.lists(items, max_size=4).map(tuple),
    times,
    st.none() | times,
    fillings,
    st.none() | st.integers(0, 99),
    st.booleans(),
) | st.builds(Wrap, st.lists(items, max_size=4).map(tuple), st.integers(-9, 9))


@given(meals)
def test_every_kind_reads_back_from_what_it_prints(meal: Kind) -> None:
    assert parse(str(meal)) == meal
    assert str(parse(str(meal))) == str(meal)


fragments = st.sampled_from(
    [*MEALS, *FILLINGS, "filling=", "layers=", "bake=", "(", ")", "[", "]", ",", "2s", "0.5", " ", "é", "\n"]
)


@given(st.text(max_size=80) | st.lists(fragments, max_size=14).map("".join))
def test_any_text_is_a_kind_or_a_spec_error(text: str) -> None:
    try:
        meal = parse(text)
    except SpecError as error:
        assert "\n" not in str(error)
    else:
        assert parse(str(meal)) == meal


@given(st.lists(items | words.map(" {} ".format), min_size=1, max_size=5))
def test_a_text_is_split_at_the_commas_outside_and_nowhere_else(pieces: list[str]) -> None:
    assert kinds.split(",".join(pieces)) == pieces


@given(times)
def test_a_time_is_printed_as_units_read_it(seconds: float) -> None:
    text = kinds.print_value(seconds, "time")
    assert parse_time(text) == seconds
    assert not math.isnan(seconds)


def test_what_people_see_of_a_parameter_names_its_type_and_the_kinds_it_may_be() -> None:
    known = {parameter.name: parameter for parameter in kinds.parameters(Pie)}
    types = {name: parameter.type for name, parameter in known.items()}
    assert types == {
        "layers": "list",
        "bake": "time",
        "rest": "time",
        "filling": "filling",
        "pieces": "int",
        "vegan": "bool",
    }
    assert known["filling"].family == FILLINGS
    assert not any(parameter.required for parameter in known.values())
    assert [parameter.required for parameter in kinds.parameters(Wrap)] == [True, False]

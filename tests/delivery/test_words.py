"""Deliveries by parts: which parts there are and in which order, at which levels, and how they are written."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from testbed import kinds
from testbed.delivery.adaptive import Adaptive
from testbed.delivery.delivery import Delivery, Part, Pipelined
from testbed.delivery.policies.ewma import EWMA
from testbed.errors import SpecError

WORDS = {
    "stream": "testbed.delivery.stream:Stream",
    "meet": "testbed.delivery.meet:Meet",
    "progressive": "testbed.delivery.progressive:Progressive",
    "adaptive": "testbed.delivery.adaptive:Adaptive",
}


def parse(text: str) -> Delivery:
    delivery: Delivery = kinds.parse(text, WORDS, "delivery")
    return delivery


def parts(text: str, tokens: int) -> list[Part]:
    delivery = parse(text)
    assert isinstance(delivery, Pipelined)
    return delivery.parts(tokens, 30)


@pytest.mark.parametrize(
    ("written", "canonical"),
    [
        ("stream(by=tokens, chunk=256)", "stream"),
        ("stream(chunk=4, by=layers)", "stream(by=layers)"),
        ("stream(by=layers, chunk=256)", "stream(by=layers, chunk=256)"),
        ("meet(chunk=128)", "meet"),
        ("meet( chunk = 64 )", "meet(chunk=64)"),
        ("progressive(planes=1)", "progressive"),
        ("progressive(planes=3)", "progressive(planes=3)"),
        ("adaptive(levels=[int8])", "adaptive(levels=[int8])"),
        (
            "adaptive(levels=[ int8, q2c@25%(pool=1) , text,skip ],deadline=2000ms,policy=throughput,chunk=256)",
            "adaptive(levels=[int8, q2c@0.25(pool=1)+fp16, text, skip], deadline=2s)",
        ),
        (
            "adaptive(policy=ewma(alpha=.3, safety=0.80), levels=[int8, text], deadline=800ms)",
            "adaptive(levels=[int8, text], deadline=800ms, policy=ewma(alpha=0.3))",
        ),
    ],
)
def test_each_has_one_canonical_text(written: str, canonical: str) -> None:
    assert str(parse(written)) == canonical
    assert parse(canonical) == parse(written)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("meet(chunk=4)", "meet: chunk is 4, but must be from 8 to 65536 tokens"),
        ("progressive(planes=9)", "planes is 9, but must be from 1 to 8"),
        ("adaptive", "adaptive needs levels, a list: adaptive(levels=…)"),
        ("adaptive(levels=[])", "levels is [], but must be from 1 to 16"),
        ("adaptive(levels=[int8, int4(group=32), int4])", "adaptive: levels: 'int4' is listed twice"),
        ("adaptive(levels=[text, text])", "levels: 'text' is listed twice"),
        ("adaptive(levels=[skip], deadline=2s)", "all would be left out; give a codec or text, too"),
        ("adaptive(levels=[int8, skip])", "nothing has to be left out without a deadline, such as deadline=2s"),
        ("adaptive(levels=[int9])", "level 'int9' is not text, skip or a codec 'int9': unknown method 'int9'; did you mean"),
        ("adaptive(levels=[tekst])", "level 'tekst' is not text, skip or a codec"),
        ("adaptive(levels=[delta+kivi])", "level 'delta+kivi': delta: a closed loop needs"),
        ("adaptive(levels=[int8], deadline=0)", "deadline is 0ms, but must be from 1ms to 1h"),
        ("adaptive(levels=[int8], deadline=2)", "deadline: time '2' has no unit; write it with one"),
        ("adaptive(levels=[int8, text], policy=fixed(level=2))", "policy fixed(level=2): the levels are 0 to 1: int8, text"),
        ("adaptive(levels=[int8], policy=mcp)", "policy 'mcp': unknown; did you mean 'mpc'?"),
        ("adaptive(levels=[int8], chunk=1)", "chunk is 1, but must be"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused_with_what_would(text: str, complaint: str) -> None:
    with pytest.raises(SpecError) as caught:
        parse(text)
    assert complaint in str(caught.value)
    assert "\n" not in str(caught.value)


@given(st.sampled_from(["meet", "adaptive"]), st.integers(8, 700), st.integers(1, 3000))
def test_parts_are_the_context_once(name: str, chunk: int, tokens: int) -> None:
    levels = "levels=[int8], " if name == "adaptive" else ""
    found = parts(f"{name}({levels}chunk={chunk})", tokens)
    if name == "meet":
        assert found.pop(0) == Part("tokens", 0, tokens, level=0)  # the text, all of it
    assert [token for part in sorted(found) for token in range(part.start, part.stop)] == list(range(tokens))
    assert all(part.by == "tokens" and part.stop - part.start <= chunk for part in found)
    assert found == sorted(found, reverse=name == "meet")


def test_meeting_begins_at_the_back_behind_the_text() -> None:
    assert [part[1:3] for part in parts("meet", 300)] == [(0, 300), (256, 300), (128, 256), (0, 128)]


def test_an_adaptive_delivery_has_a_ladder_of_its_own() -> None:
    adaptive = Adaptive(("int8", "text"), 2.0, EWMA())
    assert adaptive.ladder("fp16") == ("int8", "text")
    meet = parse("meet")
    assert isinstance(meet, Pipelined)
    assert meet.ladder("fp16") == ("text", "fp16")
    assert [part.level for part in meet.parts(300, 30)] == [0, 1, 1, 1]


@given(st.lists(st.sampled_from(["int8", "int4", "q2c@0.25+int4", "text", "skip"]), unique=True, min_size=1))
def test_every_ladder_reads_back(levels: list[str]) -> None:
    try:
        adaptive = Adaptive(tuple(levels), 1.5)
    except SpecError:
        assert levels == ["skip"]
    else:
        assert parse(str(adaptive)) == adaptive

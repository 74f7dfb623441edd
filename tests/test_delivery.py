"""Deliveries: whatever chunks cross, the far side has the payload; their texts are canonical, and scenarios list them."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from testbed.delivery.delivery import DELIVERIES, Bytes, Delivery, parse
from testbed.delivery.whole import Whole
from testbed.errors import SpecError
from testbed.experiment.estimate import Estimator
from testbed.experiment.plan import make_plan
from testbed.experiment.scenario import Plan


@dataclass(frozen=True)
class Reversed(Delivery):
    """Pieces in reverse order."""

    name: ClassVar[str] = "reversed"
    source: ClassVar[str] = "a test's"

    by: int = 1  #: pieces together
    what: Literal["pieces", "bytes"] = "pieces"

    def __post_init__(self) -> None:
        self.require("by", "from 1 to 8", 1 <= self.by <= 8)

    def send(self, pieces: Iterable[Bytes]) -> Iterator[Bytes]:
        known = list(pieces)
        return (b"".join(known[max(0, i - self.by) : i]) for i in range(len(known), 0, -self.by))

    def receive(self, chunks: Iterable[Bytes]) -> Iterator[Bytes]:
        return reversed(list(chunks))


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(DELIVERIES, "reversed", "tests.test_delivery:Reversed")


def plan(**changes: object) -> Plan:
    settings = {"name": "t", "profiles": ["5g-mid", "lte"], "tasks": ["needle"], "codecs": ["fp16", "int8"]}
    return make_plan({**settings, "placements": ["split", "cloud", "edge"], **changes}, "t.yaml")


@pytest.mark.parametrize("text", [*DELIVERIES, "reversed", "reversed(by=3)"])
def test_what_is_received_is_the_payload_that_was_sent(text: str) -> None:
    delivery = parse(text)

    @given(st.lists(st.binary(max_size=40), min_size=1))
    def check(pieces: list[bytes]) -> None:
        assert b"".join(delivery.receive(list(delivery.send(pieces)))) == b"".join(pieces)

    check()


@pytest.mark.parametrize(
    "written, canonical",
    [
        ("whole", "whole"),
        (" whole () ", "whole"),
        ("reversed( what = bytes,by=2 )", "reversed(by=2, what=bytes)"),
        ("reversed(by=1)", "reversed"),
    ],
)
def test_a_text_has_one_canonical_form_that_reads_back(written: str, canonical: str) -> None:
    assert str(parse(written)) == canonical
    assert parse(canonical) == parse(written)


@pytest.mark.parametrize(
    "text, complaint",
    [
        ("hole", r"delivery 'hole': unknown; did you mean 'whole'\?"),
        ("pigeon", "unknown; there is whole,.* reversed"),
        ("whole(by=2)", "whole has no parameter 'by'; it takes none"),
        ("reversed(by=9)", "reversed: by is 9, but must be from 1 to 8"),
        ("reversed(by=2, by=3)", "by is given twice"),
        ("reversed(by=two)", "expected a whole number"),
        ("whole+whole", "unknown"),
        ("whole@2", "unknown"),
        ("", "unknown"),
        ("a" * 10_000, "unknown"),
    ],
)
def test_what_cannot_be_read_is_named_with_its_remedy(text: str, complaint: str) -> None:
    with pytest.raises(SpecError, match=complaint) as raised:
        parse(text)
    assert len(str(raised.value)) < 200


def test_a_scenario_has_cells_of_each_delivery_for_caches_alone() -> None:
    made = plan(delivery=["whole", "reversed(by=2)"])
    cells = made.cells(0, 256)
    split = [(c.codec_text, str(c.delivery), c.profile.name) for c in cells if c.placement == "split"]
    assert split == list(itertools.product(("fp16", "int8"), ("whole", "reversed(by=2)"), ("5g-mid", "lte")))
    assert {c.delivery for c in cells if c.placement != "split"} == {Whole()}
    assert [line["delivery"] for line in Estimator(made).summary()] == [str(c.delivery) for c in cells]
    kept = make_plan(made.scenario.model_dump(mode="json"), "manifest.json")  # what --resume reads
    assert kept.cells(0, 256) == cells
    for written in (["whole", "whole()"], ["whole", "pigeon"]):
        with pytest.raises(SpecError, match=r"t\.yaml: delivery"):
            plan(delivery=written)


def test_cells_of_runs_from_before_deliveries_keep_their_identity() -> None:
    made = plan(delivery=["whole", "reversed"])
    whole, _, backwards, _ = (c for c in made.cells(0, 256) if c.codec_text == "fp16")
    assert whole.identity(made) == "2853c9a4383b" != backwards.identity(made)

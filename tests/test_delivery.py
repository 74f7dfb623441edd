"""Deliveries: whatever chunks cross, the far side has the payload; their texts are canonical, and scenarios list them."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from testbed.delivery.delivery import DELIVERIES, Bytes, Delivery, parse
from testbed.delivery.whole import Whole
from testbed.errors import SpecError
from testbed.experiment.estimate import Estimator
from testbed.experiment.plan import load_plan, make_plan
from testbed.experiment.scenario import Plan
from testbed.kinds import Time
from tests.test_scenario import diagnosed


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


@dataclass(frozen=True)
class Laddered(Reversed):
    """With a list, a time and a delivery of its own."""

    family: ClassVar = DELIVERIES
    name: ClassVar[str] = "laddered"

    levels: tuple[str, ...] = ()
    deadline: Time | None = None
    then: Reversed = Reversed()


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Reversed, "family", DELIVERIES, raising=False)
    for kind in (Reversed, Laddered):
        monkeypatch.setitem(DELIVERIES, kind.name, f"tests.test_delivery:{kind.__name__}")


def plan(**changes: object) -> Plan:
    settings = {"name": "t", "profiles": ["5g-mid", "lte"], "tasks": ["needle"], "codecs": ["fp16", "int8"]}
    return make_plan({**settings, "placements": ["split", "cloud", "edge"], **changes}, "t.yaml")


#: Of those that do not stand by their name alone.
WRITTEN = {"adaptive": "adaptive(levels=[int8, text])"}


@pytest.mark.parametrize(
    "text", [*(WRITTEN.get(name, name) for name in DELIVERIES), "reversed", "reversed(by=3)"]
)
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
        ("a" * 10_000, "10000 characters, but it has at most 2000"),
        ("reversed(by=2", "ends within its parentheses"),
        ("reversed(by=2))", r"the \) behind 'reversed\(by=2\)' closes nothing"),
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


LADDER = (
    "laddered(by=2, levels=[int8, q2c@0.25(pool=1, scope=global)+int4], deadline=2s, then=reversed(by=3))"
)


@pytest.mark.parametrize(
    ("written", "read"),
    [
        (f"[{LADDER}]", [LADDER]),
        (f"[whole, {LADDER}, reversed(by=2)]", ["whole", LADDER, "reversed(by=2)"]),
        (f'["{LADDER}", whole]', [LADDER, "whole"]),
        (f"['reversed(by=2, what=bytes)', {LADDER}]", ["reversed(by=2, what=bytes)", LADDER]),
        (LADDER, [LADDER]),
        ("[ laddered( levels = [ int8,fp16 ], deadline = 800ms ) ]", ["laddered(levels=[int8, fp16], deadline=800ms)"]),
    ],
)  # fmt: skip
def test_lists_in_parentheses_are_written_on_the_command_line_as_they_are(
    written: str, read: list[str]
) -> None:
    made = load_plan("quick", assignments=[f"delivery={written}"])
    assert [str(delivery) for delivery in made.scenario.delivery] == read
    kept = make_plan(made.scenario.model_dump(mode="json"), "manifest.json")
    assert kept.scenario.delivery == made.scenario.delivery


def test_a_delivery_with_a_list_is_written_in_a_file_in_quotes(tmp_path: Path) -> None:
    path = tmp_path / "ladder.yaml"
    path.write_text(f'profiles: [lte]\ntasks: [needle]\ndelivery: [whole, "{LADDER}"]\n')
    assert [str(delivery) for delivery in load_plan(str(path)).scenario.delivery] == ["whole", LADDER]


@pytest.mark.parametrize(
    ("written", "says"),
    [
        ("delivery: [whole, reversed(by=2, what=bytes)]", r'delivery\[1\].*quote it, as \["stream\(by=layers, chunk=8\)"\]'),
        ("delivery: [laddered(levels=[int8])]", r"ladder.yaml:3: .*in brackets, quote what has brackets or commas of its own"),
        ("transport: [tcp, tcp(congestion=bbr, connection=reuse)]", r'transport\[1\].*quote it, as \["datagram\(.*\)"\]'),
    ],
)  # fmt: skip
def test_a_delivery_or_a_transport_that_yaml_has_split_is_told(
    tmp_path: Path, written: str, says: str
) -> None:
    path = tmp_path / "ladder.yaml"
    path.write_text(f"profiles: [lte]\ntasks: [needle]\n{written}\n")
    with pytest.raises(SpecError, match=says):
        load_plan(str(path))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[laddered(levels=[int8, fp16)]", r"the \) behind '.*levels=\[int8, fp16' closes nothing"),
        ("[laddered(levels=[int8]), reversed(by=2]", "ends within its parentheses"),
    ],
)
def test_parentheses_that_do_not_match_on_the_command_line_are_told(text: str, says: str) -> None:
    with pytest.raises(SpecError, match=f"--set delivery: {says}"):
        load_plan("quick", assignments=[f"delivery={text}"])


def test_an_adaptive_delivery_has_one_cell_for_all_codecs_named_by_its_best() -> None:
    adaptive = "adaptive(levels=[text, int4, q2c@0.25+int8, skip], deadline=2s)"
    made = plan(delivery=["whole", adaptive, "adaptive(levels=[text])"], profiles=["lte"])
    cells = [(c.codec_text, str(c.delivery)) for c in made.cells(0, 256) if c.placement == "split"]
    assert cells == [
        ("fp16", "whole"),
        ("int4", adaptive),
        ("", "adaptive(levels=[text])"),
        ("int8", "whole"),
    ]
    assert [str(codec) for codec in made.codecs] == ["fp16", "int8", "int4", "q2c@0.25+int8"]
    alone = plan(delivery=[adaptive], codecs=["int8"], profiles=["lte"])
    assert alone.cells(0, 256)[0].identity(alone) == made.cells(0, 256)[1].identity(made)


@pytest.mark.parametrize("delivery", ["stream(chunk=8)", "meet(chunk=8)", "adaptive(levels=[int8], chunk=8)"])
def test_a_context_of_more_parts_than_a_request_has_is_refused_before_the_run(delivery: str) -> None:
    plan(delivery=[delivery], context_tokens=[2040])
    with pytest.raises(
        SpecError, match=r"delivery: .* 2056 tokens, and a request has at most 256: take a larger"
    ):
        plan(delivery=[delivery], context_tokens=[300, 2056])


def test_what_a_levels_codec_refers_to_is_written_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TESTBED_CACHE", str(tmp_path))
    diagnosed(tmp_path, "K3")
    made = plan(delivery=["adaptive(levels=[mixed, text])"])
    assert [str(delivery) for delivery in made.scenario.delivery] == [
        "adaptive(levels=[mixed(protect=K3), text])"
    ]
    assert made.asked == {"mixed(protect=K3)": "mixed"}
    with pytest.raises(SpecError, match=r"t\.yaml: delivery: .*listed twice"):
        plan(delivery=["adaptive(levels=[mixed, text])", "adaptive(levels=[mixed(protect=K3), text])"])

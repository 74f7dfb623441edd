"""What is printed keeps within a terminal's width, and loses nothing for it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from testbed.analysis.layout import sentences, table, terminal_width

WORDS = st.text("abc,+([/é ·", max_size=60).map(str.strip)
ROWS = st.lists(st.tuples(WORDS, st.integers(0, 10**9).map(str), WORDS, WORDS), max_size=5)


def letters(text: str) -> list[str]:
    return sorted(text.replace(" ", "").replace("\n", ""))


@given(ROWS, st.integers(40, 130), st.integers(0, 4))
def test_no_line_is_wider_and_no_letter_is_lost(rows: list[tuple[str, ...]], width: int, indent: int) -> None:
    header = ("setting", "n", "what it is", "more")
    text = table(rows, header, width, texts=(0, 2, 3), indent=indent)
    assert max(map(len, text.split("\n"))) <= width
    assert letters(text) == letters("".join(header) + "".join(map("".join, rows)))


@given(ROWS)
def test_without_a_width_each_row_is_a_line(rows: list[tuple[str, ...]]) -> None:
    assert len(table(rows, ("a", "b", "c", "d")).split("\n")) == len(rows) + 1


def test_names_break_between_their_parts_and_figures_stay_beside_them() -> None:
    rows = [("store q2c@0.25(scope=global)+int4+zstd", "0.733 s", "12"), ("cloud", "10.2 s", "3")]
    assert table(rows, ("setting", "latency", "n"), 44, texts=(0,)).split("\n") == [
        "setting                          latency   n",
        "store q2c@0.25(scope=global)+    0.733 s  12",
        "int4+zstd",
        "cloud                             10.2 s   3",
    ]


def test_columns_without_room_go_on_below_under_their_own_headings() -> None:
    rows = [("cloud", *(f"{i}.000 [0.1, 0.2]" for i in range(4)))]
    said = table(rows, ("setting", "first", "second", "third", "fourth"), 50, texts=(0,)).split("\n")
    assert len(said) == 4 and max(map(len, said)) <= 50
    assert "first" in said[0] and "fourth" in said[1] and said[3].startswith("    ")


def test_sentences_wrap_under_their_own_beginning() -> None:
    assert sentences("  one two three", 10, "  ") == "  one two\n    three"
    assert sentences("one two three") == "one two three"
    assert sentences("a\n\nb", 40) == "a\n\nb"


def test_a_pipe_has_no_width_unless_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    assert terminal_width() is None
    monkeypatch.setenv("COLUMNS", "80")
    assert terminal_width() == 80
    monkeypatch.setenv("COLUMNS", "3")
    assert terminal_width() == 40

"""What a scenario says of a side's speed."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from testbed.errors import SpecError
from testbed.speed.words import HERE, Speed, parse

FACTORS = st.floats(1, 1000)


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        (1, HERE),
        (4, Speed(4.0, 4.0)),
        ({"prefill": 2, "decode": 8}, Speed(2.0, 8.0)),
        ({"decode": 8}, Speed(1.0, 8.0)),
        ({"prefill": 4, "decode": False}, Speed(4.0, None)),
        ("device:jetson-orin", Speed(device="jetson-orin")),
        ({"device": "jetson-orin", "decode": False}, Speed(decode=None, device="jetson-orin")),
    ],
)
def test_a_speed_is_a_factor_or_one_for_each_kind_of_work_or_a_device(said: object, meant: Speed) -> None:
    assert parse(said) == meant


@given(
    st.builds(Speed, FACTORS, st.none() | FACTORS)
    | st.builds(Speed, decode=st.sampled_from([1.0, None]), device=st.text(min_size=1).filter(str.strip))
)
def test_what_is_written_of_a_speed_reads_back(speed: Speed) -> None:
    assert parse(speed.written()) == speed


@pytest.mark.parametrize(
    ("said", "complaint"),
    [
        (0.5, "'0.5' is no factor of 1 to 1000"),
        (float("inf"), "'inf' is no factor"),
        (float("nan"), "'nan' is no factor"),
        (True, "'True' is no factor"),
        (None, "'None' is no factor"),
        ([2], r"'\[2\]' is no factor"),
        ("4", "'4': write a factor"),
        ("device:", "'device:': write a factor"),
        ({}, "is empty"),
        ({"prefil": 2}, "unknown key 'prefil'; did you mean 'prefill'"),
        ({"decode": True}, "decode: 'True' is no factor"),
        ({"prefill": False}, "prefill: 'False' is no factor"),
        ({"device": "x", "prefill": 2}, "a device has times of its own"),
        ({"device": ""}, "write a factor"),
    ],
)
def test_anything_else_is_refused_with_what_would_be_right(said: object, complaint: str) -> None:
    with pytest.raises(SpecError, match=complaint):
        parse(said)

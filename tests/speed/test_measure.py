"""`testbed device measure` makes a profile that a scenario takes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from testbed.speed.files import load_device
from tests.command import command


def test_a_measured_profile_has_the_numbers_asked_for_and_says_how(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    model, out = tiny_model("llama"), tmp_path / "here.yaml"
    asked = ("--tokens", "32,8,16", "--repeats", "2", "--threads", "1", "--accept-uncalibrated")
    ended = command("device", "measure", str(model), "--out", str(out), *asked)
    assert ended.status == 0, ended
    device = load_device(str(out))
    assert [tokens for tokens, _ in device.times.prefill] == [8, 16, 32]
    assert device.times.decode and device.basis == "measured"
    assert [times.codec for times in device.codecs] == ["fp16", "int8", "int4"]
    for times in device.codecs:
        assert [[tokens for tokens, _ in way] for way in (times.encode, times.decode)] == [[8, 16, 32]] * 2
    assert [way for way, rate in device.copies if rate > 0] == [
        "within"
    ]  # a processor's memory is the host's
    assert "medians of 2 passes" in device.source and "1 threads" in device.source
    assert device.times.model == Path(model).name

    again = command("device", "measure", str(model), "--out", str(out), *asked)
    assert (again.status, again.errors.count("\n")) == (2, 1) and "exists" in again.errors


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("nowhere", "--out", "x.yaml"), "unknown model 'nowhere'"),
        (("nowhere", "--out", "x.txt"), "ends in .yaml"),
        (("nowhere", "--out", "x.yaml", "--tokens", "8,many"), "write numbers of tokens"),
        (("nowhere", "--out", "x.yaml", "--within", "3"), "has no unit"),
    ],
)
def test_a_wrong_request_is_one_line(arguments: tuple[str, ...], words: str) -> None:
    ended = command("device", "measure", *arguments)
    assert ended.status == 2 and words in ended.errors and ended.errors.count("\n") == 1


def test_profiles_are_listed_with_their_source() -> None:
    listed = json.loads(command("devices", "--json").out)["devices"]
    assert {"rtx-4090-llama-3.1-8b", "rtx-pro-6000-qwen2.5-7b"} <= {each["name"] for each in listed}
    assert all(each["source"] and each["prefill"] for each in listed)
    assert "published" in command("devices").out

"""The words for devices, and what each is on a machine; GPUs are only said to be there."""

from __future__ import annotations

import pytest
import torch

from testbed.errors import SpecError, UsageError
from testbed.experiment.plan import make_plan
from testbed.models.devices import check, find

BASE = {"name": "t", "profiles": ["rate=100mbit,delay=5ms"], "tasks": ["needle"]}


def gpus(patch: pytest.MonkeyPatch, count: int) -> None:
    patch.setattr(torch.cuda, "is_available", lambda: count > 0)
    patch.setattr(torch.cuda, "device_count", lambda: count)


@pytest.mark.parametrize(
    ("count", "word", "device"),
    [
        (0, "auto", "cpu"),
        (0, "cpu", "cpu"),
        (1, "auto", "cuda:0"),
        (1, "cuda", "cuda:0"),
        (1, "cpu", "cpu"),
        (2, "cuda:1", "cuda:1"),
    ],
)
def test_each_word_is_one_device(monkeypatch: pytest.MonkeyPatch, count: int, word: str, device: str) -> None:
    gpus(monkeypatch, count)
    assert find(word) == torch.device(device)


@pytest.mark.parametrize(
    ("count", "word", "complaint"),
    [
        (0, "cuda", "device 'cuda': this machine has no CUDA device that torch can use; use cpu"),
        (0, "cuda:1", "device 'cuda:1': this machine has no CUDA device"),
        (1, "cuda:1", r"device 'cuda:1': torch finds 1 GPU on this machine; use cuda:0$"),
        (2, "cuda:7", r"device 'cuda:7': torch finds 2 GPUs on this machine; use cuda:0 to cuda:1$"),
    ],
)
def test_a_gpu_that_is_not_there_is_one_line(
    monkeypatch: pytest.MonkeyPatch, count: int, word: str, complaint: str
) -> None:
    gpus(monkeypatch, count)
    with pytest.raises(UsageError, match=complaint) as found:
        find(word)
    assert "\n" not in str(found.value)


@pytest.mark.parametrize(
    "word", ["", "abacus", "mps", "meta", "cuda:", "cuda:-1", "cuda:01", "cuda:1 ", "cpu:0"]
)
def test_other_words_are_refused_before_anything_runs(word: str) -> None:
    with pytest.raises(SpecError, match="use auto, cpu, cuda or, of several GPUs, cuda:1"):
        check(word)
    with pytest.raises(SpecError, match=r"t.yaml: device: .*use auto, cpu, cuda") as found:
        make_plan({**BASE, "device": {"edge": "cpu", "cloud": word}}, "t.yaml")
    assert "\n" not in str(found.value)


def test_a_scenario_names_a_device_for_each_side() -> None:
    made = make_plan({**BASE, "device": {"edge": "cuda:0", "cloud": "cuda:1"}}, "t.yaml")
    assert (made.scenario.device.edge, made.scenario.device.cloud) == ("cuda:0", "cuda:1")

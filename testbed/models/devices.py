"""What a scenario calls a device: `auto`, `cpu`, `cuda` or, of several GPUs, `cuda:1`."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from testbed.errors import SpecError, UsageError

if TYPE_CHECKING:
    import torch

_WORD = re.compile(r"auto|cpu|cuda(:(0|[1-9][0-9]{0,2}))?")


def check(word: str) -> str:
    """The word, where it is one. Raises SpecError."""
    if not _WORD.fullmatch(word):
        raise SpecError(f"device {word[:40]!r}: use auto, cpu, cuda or, of several GPUs, cuda:1")
    return word


def find(word: str) -> torch.device:
    """The device of this machine, a GPU with its number; `auto`: the first GPU, where there is one. Raises UsageError."""
    import torch

    check(word)
    if word == "cpu" or (word == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UsageError(f"device {word!r}: this machine has no CUDA device that torch can use; use cpu")
    number, count = torch.device("cuda" if word == "auto" else word).index or 0, torch.cuda.device_count()
    if number >= count:
        known = "cuda:0" if count == 1 else f"cuda:0 to cuda:{count - 1}"
        raise UsageError(
            f"device {word!r}: torch finds {count} GPU{'s'[: count > 1]} on this machine; use {known}"
        )
    return torch.device("cuda", number)

"""A fixed piece of compute, the same on each side, by which a side's speed is told: a prefill of a text of ours."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from testbed.endpoints.pace import Pace
from testbed.endpoints.protocol import Computed

if TYPE_CHECKING:
    from testbed.models.language import LanguageModel

TOKENS = 128
#: A shorter time is made by chance as much as by the machine, and the kernel counts in ticks.
_LEAST_S = 0.05
_TEXT = "The quick brown fox jumps over the lazy dog. "


def measure(model: LanguageModel) -> Computed:
    """A prefill of `TOKENS` tokens, by this machine's own pace: `seconds`, the mean of as many as take a while, and `share`, of
    the time in which its threads had something to do, that they were given a processor; None where the kernel does not count it.
    """
    ids = model.tokenize(_TEXT * TOKENS)[: min(TOKENS, model.max_positions)]
    clock = Pace(device=model.device)  # waits for a GPU, and stretches nothing
    ran, waited = _scheduled()
    started = clock.begin()
    count, ended = 0, started
    while ended - started < _LEAST_S:
        model.prefill(ids, None)
        count, ended = count + 1, clock.hold()
    ran, waited = (after - before for after, before in zip(_scheduled(), (ran, waited), strict=True))
    return Computed(len(ids), (ended - started) / count, ran / (ran + waited) if ran > 0 else None)


def _scheduled() -> tuple[int, int]:
    """Nanoseconds that this process's threads have run, and have waited for a processor, so far (sched-stats.rst)."""
    ran = waited = 0
    for path in Path("/proc/self/task").glob("*/schedstat"):
        try:
            fields = path.read_text(encoding="ascii").split()
        except OSError:  # a thread that ended meanwhile, or a kernel without these figures
            continue
        ran, waited = ran + int(fields[0]), waited + int(fields[1])
    return ran, waited

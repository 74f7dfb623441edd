"""Contexts of many thousands of tokens are answered, and what that takes of memory grows with them, not with their square."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from testbed.endpoints.endpoint import Endpoint
from testbed.endpoints.protocol import Link, Load, Prepare, Serve, TrialRequest
from testbed.hosts.local import Local

#: 32768 takes two busy cores some minutes.
TOKENS = int(os.environ.get("TESTBED_CONTEXT", 8192))
ASKED = [
    ("split", "int8", "whole"),
    ("split", "q2c@0.25+int8", "whole"),
    ("split", "int8", "stream(chunk=2048)"),
    ("split", "int8", "stream(by=layers, chunk=1)"),
    ("store", "int8", "whole"),
    ("cloud", "", "whole"),
]


@pytest.mark.slow
def test_long_contexts_are_answered_alike_by_all_ways_in_memory_of_their_length(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    both = Endpoint.start("loopback", Local(), tmp_path / "log")
    kernel = Path(f"/proc/{both.process.pid}")

    def memory(which: str) -> float:
        found = re.search(rf"{which}:\s+(\d+) kB", (kernel / "status").read_text())
        assert found is not None
        return int(found[1]) / 1024

    taken = {}
    with both.process:
        both.call(Load(str(tiny_model("llama long")), "cpu"), 300)
        link = Link("127.0.0.1", both.call(Serve(1 << 30), 60), timeout=900.0)
        for batch, tokens in enumerate((TOKENS // 4, TOKENS // 2, TOKENS)):
            (kernel / "clear_refs").write_text("5")  # the greatest begins anew
            before, answers = memory("VmRSS"), dict[str, set[str]]()
            about = {
                "count": 1,
                "context_tokens": tokens,
                "codecs": ("int8", "q2c@0.25+int8"),
                "max_new_tokens": 4,
            }
            prepared = both.call(Prepare("needle", **about), 900)  # type: ignore[arg-type]
            both.call(prepared.prefix, 60)
            for placement, codec, delivery in ASKED:
                request = TrialRequest(placement, batch, 0, codec=codec, delivery=delivery, link=link)
                answers.setdefault(codec, set()).add(both.call(request, 900).answer)
            taken[tokens] = round(memory("VmHWM") - before, 1)
            assert len(answers["int8"]) == 1, answers
    print(f"MB more at most, by tokens: {taken}")
    assert (
        taken[TOKENS] < 200 + 0.032 * TOKENS
    )  # MB; one head's scores of 32,768 tokens alone would take 4,295

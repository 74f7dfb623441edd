"""What a shell is offered, by the protocol that it speaks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


def offered(words: str, where: Path) -> set[str]:
    """The completions of the last word, as bash asks for them."""
    asked = {
        "_TESTBED_COMPLETE": "bash_complete",
        "COMP_WORDS": words,
        "COMP_CWORD": str(len(words.split(" ")) - 1),
    }
    program = "import sys; from testbed.cli import cli; cli(prog_name='testbed')"
    said = subprocess.run(
        [sys.executable, "-c", program],
        cwd=where, env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), **asked}, capture_output=True, text=True,
    )  # fmt: skip
    assert said.stderr == ""
    return {line.partition(",")[2] for line in said.stdout.splitlines() if line.startswith("plain,")}


@pytest.mark.parametrize(
    ("words", "some", "none"),
    [
        ("testbed run qu", {"quick"}, {"5g"}),
        ("testbed plan ", {"5g", "claims/allocation"}, {"expected/quick"}),
        ("testbed summary results/5g", {"results/5g-1"}, {"results/none", "results/lte-1"}),
        ("testbed check ", {"results/5g-1", "results/lte-1"}, {"results/none"}),
        ("testbed up edge-c", {"edge-cloud"}, set()),
        ("testbed calibrate 5g-", {"5g-mid", "5g-good"}, {"lte"}),
        ("testbed che", {"check"}, {"run"}),
    ],
)
def test_a_shell_is_offered_what_there_is(tmp_path: Path, words: str, some: set[str], none: set[str]) -> None:
    for name in ("5g-1", "lte-1"):
        (tmp_path / "results" / name).mkdir(parents=True)
        (tmp_path / "results" / name / "manifest.json").write_text("{}")
    (tmp_path / "results" / "none").mkdir()
    found = offered(words, tmp_path)
    assert some <= found and not none & found

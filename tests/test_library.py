"""The library does what its page shows: each snippet is run as it stands there."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from testbed import Profile, load_run, run_scenario
from testbed.errors import SpecError, UsageError

PAGE = (Path(__file__).parents[1] / "docs/library.md").read_text()
SNIPPETS = re.findall(r"^```python\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
NETWORKS = [text for text in SNIPPETS if "Network(" in text]
RUNS = [text for text in SNIPPETS if text not in NETWORKS]


def run(code: str, directory: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], cwd=directory, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.netns
@pytest.mark.parametrize("snippet", NETWORKS, ids=range(len(NETWORKS)))
def test_every_snippet_with_a_network_runs_as_it_stands_there(snippet: str, tmp_path: Path) -> None:
    run(snippet, tmp_path)


@pytest.mark.netns
@pytest.mark.slow
def test_every_snippet_of_runs_runs_one_behind_the_other(tmp_path: Path) -> None:
    assert len(RUNS) == 2
    for snippet in RUNS:
        run(snippet, tmp_path)


def test_nothing_heavy_is_imported_before_it_is_used() -> None:
    heavy = "{'torch', 'pandas', 'numpy', 'pyroute2', 'pydantic', 'matplotlib', 'click', 'typing'}"
    run(f"import sys, testbed; assert not {heavy} & set(sys.modules), sys.modules", Path("/"))
    code = "from testbed import Network, Profile, run_scenario, load_run\nimport sys\n"
    run(code + "assert not {'torch', 'pandas', 'matplotlib', 'transformers'} & set(sys.modules)", Path("/"))


def test_what_is_no_profile_scenario_or_run_is_said_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="unknown profile"):
        Profile.parse("5g-middle")
    with pytest.raises(SpecError, match=r"run_scenario.*tasks"):
        run_scenario({"profiles": ["lte"], "tasks": ["nothing"]}, tmp_path / "run")
    with pytest.raises(UsageError, match="not a directory"):
        load_run(tmp_path / "none")
    assert not (tmp_path / "run").exists()


def test_a_name_that_is_not_there_is_no_attribute() -> None:
    import testbed

    with pytest.raises(AttributeError, match="nothing"):
        _ = testbed.nothing  # type: ignore[attr-defined]

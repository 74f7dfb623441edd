"""What the pages show, read by what would read it: every block of YAML, every word of a scenario and of a kind, every command."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click
import pytest

from testbed import kinds, strict_yaml
from testbed.cli import cli
from testbed.delivery.delivery import DELIVERIES
from testbed.delivery.policies.policy import POLICIES
from testbed.experiment.plan import make_plan, scenario_path
from testbed.experiment.scenario import Scenario
from testbed.net.topology.files import topology_from
from testbed.speed.files import device_from
from testbed.transport.transport import TRANSPORTS
from tests.command import command

ROOT = Path(__file__).parents[1]
PAGES = {
    str(path.relative_to(ROOT / "docs")): path.read_text() for path in sorted((ROOT / "docs").rglob("*.md"))
} | {"README.md": (ROOT / "README.md").read_text()}
_PLANNED = ["scenarios.md", "pipeline.md", "README.md", "claims.md", "links.md", "programs.md", "tutorial.md"]
_PLANNED += [page for page in PAGES if page.startswith("howto/")]
#: What stands for something that a reader puts there.
_PLACEHOLDER = re.compile(
    r"…|\||\b[A-Z]\b|FILE|MODEL|TRACE|NAME|TOPOLOGY|PROFILE|SCENARIO|RUN|laptops\.yaml|drive\.csv|my-model|Qwen/"
)
_SHAPE = "llama-3.1-8b"
_DEVICES = {"edge": f"device:m1-max-{_SHAPE}", "cloud": f"device:rtx-4090-{_SHAPE}"}


def blocks(page: str) -> list[str]:
    """Fenced blocks of YAML, and indented ones that begin as a mapping does."""
    text = PAGES[page]
    fenced = re.findall(r"^```yaml\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    text = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    indented = re.findall(r"(?:^(?: {4}.*)\n)+", text, re.MULTILINE)
    return fenced + [
        textwrap.dedent(block) for block in indented if re.match(r" {4}[a-z_]+:(?: |$)", block, re.MULTILINE)
    ]


def spans(page: str, pattern: str) -> Iterator[str]:
    """What stands between backticks and looks so, without what is to be put there."""
    for text in re.findall(r"`([^`\n]+)`", PAGES[page]):
        if re.match(pattern, text) and not _PLACEHOLDER.search(text):
            yield text.replace("\\|", "|")


def planned(settings: dict[str, Any], place: str) -> None:
    """A scenario of these settings and, for the rest, of some that go with them."""
    base: dict[str, Any] = {"name": "page"} | ({} if "programs" in settings else {"tasks": ["passages"]})
    if {"edge1", "edge2"} & set(re.findall(r"\w+", str(settings))):
        base |= {"topology": "shared-bottleneck", "edge": "edge1", "link": "backhaul"}
    if "device:" in str(settings) or "shape:" in str(settings):
        base |= {"model": f"shape:{_SHAPE}", "compute": _DEVICES}
    base["profiles"] = ["5g-mid"]
    make_plan({**base, **settings}, place)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)])
def test_every_block_of_yaml_is_a_scenarios_a_topologys_or_a_devices(page: str) -> None:
    for number, text in enumerate(blocks(page)):
        place, value = f"{page} block {number}", strict_yaml.parse(text, page)
        if "prefill" in value:
            device_from(value, place, "shown")
        elif "kind" in value or "nodes" in value:
            topology_from(value, place, "shown")
        elif isinstance(value.get("links"), list):  # of a topology whose nodes stand elsewhere
            nodes = {end: {"host": "local", "address": "192.0.2.1"} for end in ("edge", "cloud")}
            topology_from({"nodes": nodes, **value}, place, "shown")
        else:
            planned(value, place)


@pytest.mark.parametrize(
    "page", ["scenarios.md", "pipeline.md", "tasks.md", "links.md", "measured/pipeline.md"]
)
def test_every_setting_of_a_scenario_in_a_text_is_one(page: str) -> None:
    for text in spans(page, rf"({'|'.join(Scenario.model_fields)}): "):
        planned(strict_yaml.parse(text, page), f"{page}: {text}")


@pytest.mark.parametrize("page", ["scenarios.md", "pipeline.md", "measured/pipeline.md"])
def test_every_delivery_policy_and_transport_in_a_text_is_one(page: str) -> None:
    for known, what in ((DELIVERIES, "delivery"), (POLICIES, "policy"), (TRANSPORTS, "transport")):
        for text in spans(page, rf"({'|'.join(known)})\("):
            kinds.parse(text, known, what)


def test_every_factor_in_the_table_of_slower_sides_is_one() -> None:
    factors = list(spans("scenarios.md", r"\{edge: [\d{]"))
    assert len(factors) >= 3
    for text in factors:
        compute = strict_yaml.parse(text, "scenarios.md")
        planned({"compute": compute, "placements": ["split", "cloud"]}, f"scenarios.md: {text}")


def commands(page: str, program: str) -> Iterator[list[str]]:
    """The words of each command that a page has on a line or between backticks."""
    text = PAGES[page].replace("\\\n", " ")
    lines = re.findall(r"^ {4}(?:sudo |\w+=\S+ )*(.+)$", text, re.MULTILINE)
    lines += re.findall(r"`(?:sudo )?([^`\n]+)`", text)
    for line in lines:
        for part in re.split(r"; sudo | && sudo ", re.split(r" {2,}|\s#\s", line)[0]):
            if re.match(program, part):
                yield shlex.split(part)


@pytest.mark.parametrize("page", PAGES)
def test_every_command_is_there_with_its_options(page: str) -> None:
    for _, *words in commands(page, r"testbed [a-z]"):
        found: click.Command = cli
        while words and isinstance(found, click.Group) and words[0] in found.commands:
            found = found.commands[words.pop(0)]
        assert found is not cli, words
        known = {option for each in found.params for option in [*each.opts, *each.secondary_opts]} | {
            "--help"
        }
        own = words[: words.index("--")] if "--" in words else words
        assert {word for word in own if re.match(r"-{1,2}\w", word)} <= known, words


@pytest.mark.parametrize("page", PAGES)
def test_every_benchmark_is_there_with_its_options(page: str) -> None:
    for _, _, module, *words in commands(page, r"python -m benchmarks\.\w"):
        spec = find_spec(module)
        assert spec is not None and spec.origin is not None, module
        source = Path(spec.origin).read_text() + (ROOT / "benchmarks/runs.py").read_text()
        for word in words:
            assert not word.startswith("--") or f'"{word}"' in source, (module, word)


@pytest.mark.parametrize("page", _PLANNED)
def test_every_run_that_is_shown_can_be_planned(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for _, _, *words in commands(page, r"testbed (run|plan) [a-z]"):
        words = [word.replace("MODEL", "smollm2-135m") for word in words]
        if _PLACEHOLDER.search(" ".join(words)) or not words or ".jsonl" in str(words):
            continue
        if "--out" in words:
            del words[words.index("--out") : words.index("--out") + 2]
        scenario_path(words[0])
        words = [word for word in words if word != "--accept-uncalibrated"]
        done = command("plan", *words)
        if "testbed models fetch" in done.errors:  # tests fetch but one: the rest of the plan with that
            done = command("plan", *words, "--set", "model=smollm2-135m")
        assert done.status == 0, (words, done.errors)


def test_the_example_of_a_forecast_is_forecast_as_it_says(tmp_path: Path) -> None:
    shown = next(block for block in blocks("pipeline.md") if block.startswith("model: shape:"))
    (path := tmp_path / "shape.yaml").write_text(shown)
    found = {
        border["codec"]: border["beats_edge_bps"]
        for border in json.loads(command("plan", str(path), "--json").out)["borders"]
    }
    says = re.findall(
        r"`([^`]+)`(?: cache beats the edge's own answer)? from (\d+) Mbit/s", PAGES["pipeline.md"]
    )
    assert {codec for codec, _ in says} == set(found)
    for codec, mbit in says:
        assert found[codec] == pytest.approx(float(mbit) * 1e6, rel=0.05)


def test_the_pages_are_a_site_without_a_warning(tmp_path: Path) -> None:
    """Every page has its place, every link leads to a page, and every `#` to a heading."""
    made = subprocess.run(
        [
            sys.executable,
            "-m",
            "mkdocs",
            "build",
            "--strict",
            "-f",
            ROOT / ".ci/mkdocs.yml",
            "-d",
            tmp_path / "site",
        ],
        capture_output=True,
        text=True,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
    )
    assert made.returncode == 0, made.stderr
    assert "WARNING" not in made.stderr
    assert (tmp_path / "site/tutorial.html").is_file()


def test_every_link_of_the_readme_leads_to_a_file_and_its_heading() -> None:
    for file, heading in re.findall(r"\]\((?!https?:)([^)#]+)#?([^)]*)\)", PAGES["README.md"]):
        assert (ROOT / file).is_file(), file
        headings = re.findall(r"^#+ (.+)$", (ROOT / file).read_text(), re.MULTILINE) if heading else []
        assert not heading or heading in [
            re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings
        ]


@pytest.mark.netns
@pytest.mark.model
@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_first_hour_goes_as_it_is_told(tmp_path: Path) -> None:
    """Each command of the tutorial, one after the other; those that only ask for more of the same are planned above."""
    ran = []
    for line in re.findall(r"^ {4}(?:sudo )?(testbed .+)$", PAGES["tutorial.md"], re.MULTILINE):
        words = shlex.split(line)
        if set(words) & {"--examples", "--codec", "--link"}:
            continue
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                "testbed",
                *words[1:],
                *(["--accept-uncalibrated"] if words[1] == "run" else []),
            ],
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        ran.append(words[1])
        assert done.returncode == 0, (line, done.stdout, done.stderr)
    assert ran == [
        "doctor",
        "plan",
        "run",
        "report",
        "recommend",
        "codecs",
        "summary",
        "plot",
        "run",
        "up",
        "exec",
        "set",
        "show",
        "down",
    ]
    assert (tmp_path / "first/report.html").is_file()

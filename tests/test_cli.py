"""The command line as people and scripts see it: exit statuses, one-line errors, JSON, and no torch in its process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from testbed.cli import main

ROOT = Path(__file__).parents[1]


def testbed(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "testbed", *arguments],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


testbed.__test__ = False  # type: ignore[attr-defined]


def complaint(*arguments: str, **environment: str) -> str:
    """The one line that a wrong request gives, with exit status 2."""
    done = testbed(*arguments, **environment)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    return lines[0]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("plan", "nowhere"), "no scenario file nowhere"),
        (("plan", "quick", "--set", "timeout=5parsec"), "parsec"),
        (("plan", "quick", "--codec", "q2x@0.25"), "q2x"),
        (("plan", "quick", "--set", "profils=lte"), "did you mean 'profiles'"),
        (("plan", "quick", "--set", "nonsense"), "KEY=VALUE"),
        (("plan", "quick", "--link", "wan"), "NAME=PROFILE"),
        (("plan", "quick", "--set", "model=smollm2-135n"), "smollm2-135"),
        (("run",), "name a scenario"),
        (("run", "--resume", "nowhere"), "nowhere"),
        (("models", "fetch", "smollm9"), "smollm9"),
        (("plot", "nowhere"), "not a directory"),
        (("frobnicate",), "frobnicate"),
        (("up", "nowhere"), "nowhere"),
        (("calibrate",), "at least one profile"),
        (("calibrate", "5g-midd"), "5g-mid"),
    ],
)
def test_a_wrong_request_is_one_line_and_status_2(arguments: tuple[str, ...], words: str) -> None:
    assert words in complaint(*arguments)


def test_a_model_that_was_not_fetched_is_named_with_the_remedy(tmp_path: Path) -> None:
    line = complaint("plan", "quick", TESTBED_CACHE=str(tmp_path))
    assert "testbed models fetch smollm2-135m" in line


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to give root up")
@pytest.mark.parametrize("command", [("up", "edge-cloud"), ("calibrate", "lte"), ("clean",)])
def test_without_root_the_remedy_is_named(command: tuple[str, ...]) -> None:
    done = subprocess.run(
        ["setpriv", "--bounding-set=-all", "--inh-caps=-all", "--securebits=+noroot", sys.executable, "-c",
         "import os, sys; os.geteuid = lambda: 1000; from testbed.cli import main; main(sys.argv[1:])", *command],
        cwd=ROOT, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert "sudo" in done.stderr


@pytest.mark.netns
def test_a_network_needs_no_tun_device(tmp_path: Path) -> None:
    script = (  # in a mount namespace of its own
        "mount -t tmpfs none /dev/net && "
        '"$0" -m testbed up edge-cloud --emulator userspace && "$0" -m testbed down'
    )
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", script, sys.executable],
        cwd=ROOT, capture_output=True, text=True, timeout=120,
        env={**os.environ, "TESTBED_STATE": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "removed" in done.stdout


def test_plan_answers_in_json() -> None:
    done = testbed("plan", "quick", "--set", "model=HuggingFaceTB/SmolLM2-135M", "--json")
    value = json.loads(done.stdout)
    assert value["trials"] == len(value["cells"]) * 3


@pytest.mark.parametrize("command", ["codecs", "tasks", "profiles", "models"])
def test_lists_are_printed_and_given_as_json(command: str) -> None:
    assert testbed(command).stdout.count("\n") >= 2
    assert (
        len(json.loads(testbed(command, "--json").stdout)[command if command != "codecs" else "methods"]) >= 2
    )


def test_the_orchestrator_never_imports_torch() -> None:
    code = (
        "import sys, testbed.cli, testbed.experiment.runner, testbed.experiment.plan, testbed.experiment.estimate\n"
        "import testbed.experiment.environment\n"
        "import testbed.net.fabric.fabric, testbed.net.calibration.calibrate, testbed.experiment.results\n"
        "from testbed.codecs.registry import describe; describe()\n"
        "from testbed.tasks.task import describe; from testbed.tasks.task import make_task; describe(); make_task('needle')\n"
        "plan = testbed.experiment.plan.load_plan('5g')\n"
        "list(plan.batches())\n"
        "sys.exit(sum(name in sys.modules for name in ('torch', 'transformers', 'pandas', 'matplotlib')))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "config", ["", "[]", "{}", "[" * 100_000, '{"num_attention_heads": 0, "hidden_size": 1}']
)
def test_a_models_directory_that_holds_none_is_one_line(tmp_path: Path, config: str) -> None:
    (tmp_path / "config.json").write_text(config)
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert "config.json" in complaint("plan", "quick", "--set", f"model={tmp_path}")


@pytest.mark.parametrize(
    "argument", ["x" * 256, "1e400", "[" * 100_000, "\udcff\udcfe", "9" * 5000, "\u202e", "a\nb"]
)
@pytest.mark.parametrize(
    "command",
    [("plan",), ("plot",), ("models", "fetch"), ("up",), ("plan", "quick", "--codec"), ("plan", "quick", "--set"),
     ("plan", "quick", "--link"), ("plan", "quick", "--examples"), ("calibrate",), ("run", "--resume")],
)  # fmt: skip
def test_what_nobody_means_is_one_short_line(
    command: tuple[str, ...], argument: str, capsys: pytest.CaptureFixture[str]
) -> None:
    prefix = {"--set": "timeout=", "--link": "access="}.get(command[-1], "")
    with pytest.raises(SystemExit) as ended:
        main([*command, prefix + argument])
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert len(said.strip().splitlines()) == 1
    assert len(said) < 1500

"""The command line as people and scripts see it: exit statuses, one-line errors, JSON, and no torch in its process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.command import command

ROOT = Path(__file__).parents[1]


def complaint(*arguments: str) -> str:
    """The one line that a wrong request gives, with exit status 2."""
    done = command(*arguments)
    assert done.status == 2, done
    assert "Traceback" not in done.errors
    (line,) = done.errors.strip().splitlines()
    return line


def test_a_program_ends_with_the_commands_status_and_its_one_line() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "testbed", "plan", "nowhere"], cwd=ROOT, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("testbed: no scenario file nowhere")


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


def test_a_model_that_was_not_fetched_is_named_with_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TESTBED_CACHE", str(tmp_path))
    assert "testbed models fetch smollm2-135m" in complaint("plan", "quick")


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to give root up")
@pytest.mark.parametrize("arguments", [("up", "edge-cloud"), ("calibrate", "lte"), ("clean",)])
def test_without_root_the_remedy_is_named(arguments: tuple[str, ...]) -> None:
    done = subprocess.run(
        ["setpriv", "--bounding-set=-all", "--inh-caps=-all", "--securebits=+noroot", sys.executable, "-c",
         "import os, sys; os.geteuid = lambda: 1000; from testbed.cli import main; main(sys.argv[1:])", *arguments],
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
    done = command("plan", "quick", "--set", "model=HuggingFaceTB/SmolLM2-135M", "--json")
    value = json.loads(done.out)
    assert value["trials"] == len(value["cells"]) * 3


def test_the_commands_wait_for_no_library_but_clicks_own() -> None:
    code = "import sys, testbed.cli; print(*{name.partition('.')[0] for name in sys.modules} & set(sys.argv[1].split()))"
    heavy = "msgspec numpy pydantic pyroute2 yaml tempfile"
    done = subprocess.run([sys.executable, "-c", code, heavy], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stdout + done.stderr


@pytest.mark.parametrize(
    ("listed", "key"),
    [("codecs", "methods"), ("tasks", "tasks"), ("profiles", "profiles"), ("models", "models")],
)
def test_lists_are_printed_and_given_as_json(listed: str, key: str) -> None:
    assert command(listed).out.count("\n") >= 2
    assert len(json.loads(command(listed, "--json").out)[key]) >= 2


def test_the_orchestrator_never_imports_torch() -> None:
    code = (
        "import sys, testbed.cli, testbed.experiment.runner, testbed.experiment.plan, testbed.experiment.estimate\n"
        "import testbed.experiment.environment\n"
        "import testbed.net.fabric.fabric, testbed.net.calibration.calibrate, testbed.experiment.results\n"
        "import testbed.models.kvcache, testbed.models.attention, testbed.models.sources, testbed.models.fetching\n"
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
    "asked",
    [("plan",), ("plot",), ("models", "fetch"), ("up",), ("plan", "quick", "--codec"), ("plan", "quick", "--set"),
     ("plan", "quick", "--link"), ("plan", "quick", "--examples"), ("calibrate",), ("run", "--resume")],
)  # fmt: skip
def test_what_nobody_means_is_one_short_line(asked: tuple[str, ...], argument: str) -> None:
    prefix = {"--set": "timeout=", "--link": "access="}.get(asked[-1], "")
    assert len(complaint(*asked, prefix + argument)) < 1500

"""Where the kernel has no netem: all the tests that need one, in one boot of a guest kernel that has it."""

from __future__ import annotations

import re
import sys

import pytest

from tests import kernel
from tests.guest import GuestResult, run_in_guest
from tests.hosts import test_sudo


@pytest.mark.slow
@pytest.mark.timeout(2800)
def test_what_needs_netem_passes_in_a_guest_kernel(capsys: pytest.CaptureFixture[str]) -> None:
    if kernel.in_guest() or not kernel.lacks_netem():
        pytest.skip("this kernel has netem: those tests run directly")
    if reason := kernel.lacks_guest():
        pytest.skip(f"this kernel has no netem, and no guest can be booted: {reason}")
    hosts = [] if test_sudo.MISSING else ["tests/hosts/test_sudo.py", "tests/hosts/test_shaped_run.py"]
    result = _lane("tests/net", "tests/test_run.py", *hosts)
    # The guest is one slow machine beside whatever its host does: what comes late in it is asked once more, by itself.
    if failed := re.findall(r"^FAILED (.+?)(?: - .*)?$", result.output, re.MULTILINE):
        result = _lane(*failed)
    summary = result.output.strip().splitlines()[-1] if result.output.strip() else result.console[-500:]
    with capsys.disabled():
        print(f"\n  in the guest: {summary.strip('= ')}; asked twice: {failed or 'none'}")
    assert result.status == 0, result.output[-6000:]
    assert re.search(r"\b\d+ passed", summary)
    assert "skipped" not in summary, result.output[-3000:]


def _lane(*tests: str) -> GuestResult:
    options = ["-m", "netem", "-p", "no:cacheprovider", "-rsf", "--tb=short"]
    return run_in_guest([sys.executable, "-m", "pytest", *options, *tests], limit_s=1300)

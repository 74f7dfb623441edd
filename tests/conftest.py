"""What all tests share: hypothesis profiles, and skips that say why."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests import kernel, tiny_models

settings.register_profile(
    "fast", max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True
)
settings.register_profile("long", max_examples=10_000, deadline=None, suppress_health_check=list(HealthCheck))
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fast"))

MODEL = "smollm2-135m"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reasons: dict[str, str | None] = {}
    for item in items:
        for marker in ("netns", "netem", "model"):
            if item.get_closest_marker(marker):
                if marker not in reasons:
                    reasons[marker] = _missing(marker)
                if reasons[marker]:
                    item.add_marker(pytest.mark.skip(reason=reasons[marker] or ""))


def _missing(marker: str) -> str | None:
    """Why tests with this marker cannot run here; None where they can."""
    if marker == "model":
        from testbed.errors import UsageError
        from testbed.models.sources import resolve

        try:
            resolve(MODEL)
        except UsageError as error:
            return str(error)
        return None
    return (kernel.lacks_netem() if marker == "netem" else kernel.lacks_namespaces()) or None


@pytest.fixture
def data() -> Path:
    """The question sets that are no part of the project; tests that use them are skipped without."""
    path = Path(os.environ.get("TESTBED_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not path.is_dir():
        pytest.skip(f"no data sets at {path}")
    return path


tiny_model = tiny_models.tiny_model

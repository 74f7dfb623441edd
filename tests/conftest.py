"""What all tests share: hypothesis profiles, and skips that say why."""

from __future__ import annotations

import math
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from tests import kernel, tiny_models

settings.register_profile(
    "fast", max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True
)
settings.register_profile("long", max_examples=10_000, deadline=None, suppress_health_check=list(HealthCheck))
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fast"))

MODEL = "smollm2-135m"


@pytest.hookimpl(tryfirst=True)  # before -m deselects
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    _mark_products(items)
    reasons: dict[str, str | None] = {}
    for item in items:
        for marker in ("netns", "netem", "model"):
            if item.get_closest_marker(marker):
                if marker not in reasons:
                    reasons[marker] = _missing(marker)
                if reasons[marker]:
                    item.add_marker(pytest.mark.skip(reason=reasons[marker] or ""))


def _mark_products(items: list[pytest.Item]) -> None:
    """Mark as `full`, of a test with the product of several parameters, all but a diagonal on which each value stands once.
    Of a part of a product those stay that bring a value which no earlier one has."""
    tests: dict[Any, list[pytest.Item]] = {}
    for item in items:
        if len(getattr(getattr(item, "callspec", None), "params", ())) > 1:
            tests.setdefault((item.parent, getattr(item, "originalname", "")), []).append(item)
    for cases in tests.values():
        seen: dict[str, dict[str, int]] = {}
        places, brings = [], []
        for case in cases:
            before = sum(map(len, seen.values()))
            values = getattr(case, "callspec").params.items()  # noqa: B009
            places.append(
                [(known := seen.setdefault(name, {})).setdefault(repr(v), len(known)) for name, v in values]
            )
            brings.append(sum(map(len, seen.values())) > before)
        sizes = [len(known) for known in seen.values()]
        if len(cases) == math.prod(sizes):
            diagonal = [[i % size for size in sizes] for i in range(max(sizes))]
            brings = [place in diagonal for place in places]
        for case, stays in zip(cases, brings, strict=True):
            if not stays:
                case.add_marker(pytest.mark.full)


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


@pytest.fixture(autouse=True)
def _on_the_processor(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Models compute on the processor, as what they are compared with, but where a test is of GPUs too."""
    if not getattr(request.module, "ON_GPUS", False) and "torch" in sys.modules:
        monkeypatch.setattr("torch.cuda.is_available", lambda: False)


@pytest.fixture
def data() -> Path:
    """The question sets that are no part of the project; tests that use them are skipped without."""
    path = Path(os.environ.get("TESTBED_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not path.is_dir():
        pytest.skip(f"no data sets at {path}")
    return path


tiny_model = tiny_models.tiny_model

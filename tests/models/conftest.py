from __future__ import annotations

from tests.tiny_models import tiny_model  # noqa: F401  (a fixture)

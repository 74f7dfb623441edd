"""AdaKV by the name that it was given here first."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from testbed.codecs.select.perhead import PerHead


@dataclass(frozen=True)
class Adaptive(PerHead):
    """Adaptive budgets: `perhead` under another name; by default SnapKV's scores, compared across a layer's heads."""

    name: ClassVar[str] = "adaptive"

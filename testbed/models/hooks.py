"""Hooks on a network's modules that are for one pass: those that other threads make meanwhile go through the same modules."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any


def of_this_thread(hook: Callable[..., Any]) -> Callable[..., Any]:
    """The hook where this thread runs the module, and nothing in another: edge and cloud of one process share a model."""
    owner = threading.get_ident()

    def own(*arguments: Any, **named: Any) -> Any:
        return hook(*arguments, **named) if threading.get_ident() == owner else None

    return own

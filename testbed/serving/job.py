"""A request at the server: what it takes, and how far it is."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(eq=False)
class Job:
    """What answering takes, in seconds: rebuilding its cache (or prefilling its text), the question's pass, and each token behind
    the first. `held`: tokens before the first token behind the question; `memory`: bytes of its cache while it is here; `passes`:
    where it was measured, (requests, seconds) of a pass that makes a token for each of so many like it.

    A part of a request's context that is rebuilt as it comes is a job of its own, with `rebuild_s` alone: it takes no place, and
    those that are `behind` wait for it.
    """

    rebuild_s: float
    first_s: float
    token_s: tuple[float, ...] = ()
    held: int = 0
    memory: int = 0
    passes: tuple[tuple[int, float], ...] = ()
    model: str = ""  #: requests of one alone are decoded in one pass
    part: bool = False
    behind: tuple[Job, ...] = ()

    arrived: float = 0.0  #: all of it is there
    began: float = 0.0
    rebuilt: float = 0.0
    first: float = 0.0  #: its first token is known
    done: float = 0.0
    passed: int = 0  #: 1: rebuilt; 2: its first token is known, too
    told: int = 0  #: tokens behind the first that are known
    together: int = 1  #: most requests that it was decoded with, itself included

    @property
    def work_s(self) -> float:
        """All of it, where nobody else is served."""
        return self.rebuild_s + self.first_s + sum(self.token_s)

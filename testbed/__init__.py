"""A testbed for split LLM inference: real models, real compressed KV caches, emulated links that prove themselves.

For programs: `from testbed import Network, Profile, run_scenario, load_run` (see `testbed.library`), of which nothing is imported
before it is named.
"""

from __future__ import annotations

TYPE_CHECKING = False  # as typing has it, which emulators' processes would pay for at their start
if TYPE_CHECKING:
    from testbed.library import Link, Network, Node, Profile, load_run, run_scenario

__version__ = "0.1.0"
__all__ = ["Link", "Network", "Node", "Profile", "__version__", "load_run", "run_scenario"]

if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from testbed import library

        return getattr(library, name)

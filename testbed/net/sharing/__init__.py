"""How a cell is shared out among the links whose bottleneck it is, one scheduler a file.

A new one is a file with a `Scheduler` in it (`contract`), and a line in `SCHEDULERS`.
"""

from __future__ import annotations

SCHEDULERS: dict[str, str] = {
    "equal": "testbed.net.sharing.equal:Equal",
    "proportional-fair": "testbed.net.sharing.proportional_fair:ProportionalFair",
    "tcp": "testbed.net.sharing.tcp:Tcp",
    "model-aware": "testbed.net.sharing.model_aware:ModelAware",
    "reserved": "testbed.net.sharing.reserved:Reserved",
}
MOST_USERS = 64
"""Of one cell: every packet's coming and going looks at all of them."""

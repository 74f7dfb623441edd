"""Demonstrations that several tasks show: short contexts with a question that they answer."""

from __future__ import annotations

from testbed.tasks.task import Example

MILL = Example(
    "shown-1",
    "The mill at Hartley was built by Anna Brook in 1720. It ground oats for the whole valley.",
    "Who built the mill at Hartley?",
    ("Anna Brook",),
)
BAKING = Example(
    "shown-2",
    "Tim wanted to go swimming, but it was raining. He stayed in the kitchen and baked a cake.",
    "What did Tim bake?",
    ("a cake",),
)

"""The published deployment procedure with a measurement at each step: is INT8 enough, is INT4, what does a diagnosis find,
does protecting that help, and how many tokens can be left out.

`procedure` decides what is measured next, `guide` measures it in a run without a network.
"""

from __future__ import annotations

"""The published deployment procedure with a measurement at each step: is INT8 enough, is INT4, what does a diagnosis find,
does protecting that help, and how many tokens can be left out.

`procedure` decides what is measured next, `bench` measures it without a network, `walk` puts the two together.
"""

from __future__ import annotations

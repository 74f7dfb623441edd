"""Settings' names as figures write them: shortened where they are long, and still told apart."""

from __future__ import annotations

import re
from collections.abc import Iterable

#: Characters; a longer name loses its parameters.
LONGEST = 34
_PARAMETERS = re.compile(r"\([^()…]+\)")


def short(names: Iterable[str], longest: int = LONGEST) -> dict[str, str]:
    """Each name as it is drawn. Of a long one the parameters in parentheses become ``(…)``, the longest first; where two names
    would then be the same, those behind the first are numbered: ``(…) [2]``.
    """
    found: dict[str, str] = {}
    taken: dict[str, int] = {}
    for name in dict.fromkeys(names):
        drawn = _middle(_without_parameters(name, longest), longest + 8)
        taken[drawn] = taken.get(drawn, 0) + 1
        found[name] = drawn if taken[drawn] == 1 else f"{drawn} [{taken[drawn]}]"
    return found


def _without_parameters(name: str, longest: int) -> str:
    while len(name) > longest and (groups := _PARAMETERS.findall(name)):
        name = name.replace(max(groups, key=len), "(…)", 1)
    return name


def _middle(name: str, most: int) -> str:
    return name if len(name) <= most else f"{name[: most - 12]}…{name[-11:]}"

"""Settings' names as people read them: short where they are long, and still told apart."""

from __future__ import annotations

import re
from collections.abc import Iterable
from contextvars import ContextVar

from testbed import kinds
from testbed.delivery.adaptive import Adaptive
from testbed.errors import SpecError

_BETWEEN = " · "  #: a setting's parts (`settings.labelled`)
#: Characters; a longer name loses its parameters.
LONGEST = 34
#: The same where it is asked for nothing else, which what is drawn on changes.
longest: ContextVar[int] = ContextVar("longest", default=LONGEST)


def short(names: Iterable[str], most: int | None = None) -> dict[str, str]:
    """Each name as it is drawn, of `most` characters or a few more (None: of `longest`). A long one loses what all deliveries of
    its kind have in common, then its parameters in parentheses become ``(…)``, the longest first; where two names would then be
    the same, those behind the first are numbered: ``(…) [2]``.
    """
    shown: dict[str, str] = {}
    taken: dict[str, int] = {}
    distinct = list(dict.fromkeys(names))
    alike = _in_common(distinct)
    most = longest.get() if most is None else most
    for name in distinct:
        told = _without_common(name, alike) if len(name) > most else name
        drawn = _middle(_without_parameters(told, most), most + 8)
        taken[drawn] = taken.get(drawn, 0) + 1
        shown[name] = drawn if taken[drawn] == 1 else f"{drawn} [{taken[drawn]}]"
    return shown


_KIND = re.compile(r"([A-Za-z][\w-]*)\((.*)\)", re.DOTALL)


def _in_common(names: list[str]) -> dict[str, set[str]]:
    """By kind the parameters that all of its deliveries among these names have, and a ladder that is the only one; nothing of a
    kind with one form alone.
    """
    forms: dict[str, set[tuple[str, ...]]] = {}
    for name in names:
        for part in name.split(_BETWEEN):
            kind, parameters = _kind(part)
            forms.setdefault(kind, set()).add(parameters)
    several = {kind: own for kind, own in forms.items() if kind and len(own) > 1}
    alike = {kind: set.intersection(*map(set, own)) for kind, own in several.items()}
    for kind, own in several.items():
        ladders = {p for form in own for p in form if p.startswith("levels=")}
        alike[kind] |= ladders if len(ladders) == 1 else set()
    return alike


def _without_common(name: str, alike: dict[str, set[str]]) -> str:
    parts = []
    for part in name.split(_BETWEEN):
        kind, parameters = _kind(part)
        own = [p.removeprefix("policy=") for p in parameters if p not in alike.get(kind, ())]
        changed = kind in alike
        parts.append((kind + (f"({', '.join(own)})" if own else "")) if changed else part)
    return _BETWEEN.join(parts)


def _kind(part: str) -> tuple[str, tuple[str, ...]]:
    """The name and the parameters of ``name(key=value, …)``; two empty ones of anything else. Of a sender that chooses levels who
    chooses is always said, and of one that has a single level that level alone.
    """
    match = _KIND.fullmatch(part)
    try:
        parameters = tuple(p.strip() for p in kinds.split(match[2])) if match else ()
        levels = next((p.removeprefix("levels=[")[:-1] for p in parameters if p.startswith("levels=[")), "")
        if levels and len(kinds.split(levels)) == 1:
            kept = (p for p in parameters if not p.startswith(("levels=", "policy=")))
            parameters = (levels, *kept)
        elif levels and not any(p.startswith("policy=") for p in parameters):
            parameters = (*parameters, f"policy={Adaptive.policy}")
    except SpecError:
        return "", ()
    return (match[1], parameters) if match else ("", ())


def _without_parameters(name: str, most: int) -> str:
    def groups() -> list[str]:
        ends = (part.partition(")") for part in name.split("(")[1:])
        return [f"({inside})" for inside, end, _ in ends if inside and end and "…" not in inside]

    while len(name) > most and (inner := groups()):
        name = name.replace(max(inner, key=len), "(…)", 1)
    return name


def _middle(name: str, most: int) -> str:
    return name if len(name) <= most else f"{name[: most - 12]}…{name[-11:]}"

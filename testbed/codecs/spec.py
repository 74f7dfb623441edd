"""Reading and printing codecs: ``selector@ratio(key=value, …)+transform+quantizer+coder``, each part optional.

A codec without a quantizer ships the 16-bit values as they are (``fp16``). `str` of a spec is canonical: it names the
quantizer, omits defaults, writes numbers as short as they read back; ``parse(str(spec)) == spec``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from testbed.codecs import registry
from testbed.codecs.method import Method
from testbed.errors import SpecError, UnitError
from testbed.kinds import Value, clip, parameters, read_arguments
from testbed.units import parse_fraction

if TYPE_CHECKING:
    from testbed.codecs.select import Selector
    from testbed.codecs.steps import Quantizer, Transform

LONGEST = 400  # characters; the longest sensible codec has a quarter of them
_ORDER = tuple(registry.STAGES)
_PART = re.compile(r"\s*([A-Za-z][\w:-]*)\s*(?:@\s*([^()+@\s]+)\s*)?(?:\(([^()]*)\)\s*)?", re.ASCII)


@dataclass(frozen=True)
class CodecSpec:
    """A codec: at most one method a stage. Equal specs encode equally; hashable."""

    selector: Method | None
    transform: Method | None
    quantizer: Quantizer
    coder: Method | None

    @property
    def methods(self) -> tuple[Method, ...]:
        """The methods that are there, in the order they are applied."""
        chain = (self.selector, self.transform, self.quantizer, self.coder)
        return tuple(method for method in chain if method is not None)

    @property
    def refers(self) -> bool:
        """Whether a method's text refers to a file, such as ``protect=auto``; `bound` writes out what it says."""
        return any(method.refers for method in self.methods)

    @property
    def shared_bytes(self) -> int:
        """Bytes that both sides must have before anything crosses; of a spec that is `bound`. Raises SpecError without them."""
        return sum(method.shared_bytes for method in self.methods)

    @property
    def choice(self) -> str:
        """Its selector's text, where that is all there is of it and keeps the same tokens in all layers; else empty."""
        selector = cast("Selector | None", self.selector)
        alone = selector is not None and str(self) == f"{selector}+{registry.find('fp16')()}"
        return str(selector) if alone and selector is not None and selector.one_list else ""

    def bound(self, model: str | None = None) -> CodecSpec:
        """The spec that stands by itself. model: whose caches it will code. Raises SpecError where that needs more."""
        if not self.refers:
            return self
        chain = (self.selector, self.transform, self.quantizer, self.coder)
        return CodecSpec(*(method and method.bound(model) for method in chain))  # type: ignore[arg-type]

    @property
    def unfit(self) -> str:
        """Why its parts cannot work together, though each is right; empty where they can."""
        transform = cast("Transform | None", self.transform)
        return "" if transform is None else transform.unfit(self.quantizer)

    def __str__(self) -> str:
        return "+".join(str(method) for method in self.methods)


def parse(text: str) -> CodecSpec:
    """``"q2c@0.25+int8"`` -> CodecSpec. Raises SpecError naming the part that is wrong and what would be right."""
    if not isinstance(text, str):
        raise SpecError(f"codec {clip(text)}: expected text such as q2c@0.25+int8")
    try:
        return _parse(text)
    except SpecError as error:
        raise SpecError(f"codec {clip(text)}: {error}") from None


@dataclass(frozen=True)
class Written:
    """A codec's part as its text has it: nothing of it is looked up but its stage."""

    text: str
    name: str
    ratio: float | None
    arguments: str  #: what stands in parentheses


def written(text: str) -> dict[str, Written]:
    """A codec's parts by stage, in their order: also of one whose methods are not installed here. Raises SpecError."""
    found: dict[str, Written] = {}
    for part in _split(text):
        if (stage := registry.stage_of(part[1])) is None or stage in found:
            raise SpecError(f"codec {clip(text)}: unknown method or second {stage}: {clip(part[1])}")
        ratio = None if part[2] is None else _ratio(part[1], part[2])
        found[stage] = Written(part[0].strip(), part[1], ratio, (part[3] or "").strip())
    return found


def _parse(text: str) -> CodecSpec:
    if len(text) > LONGEST:
        raise SpecError(f"{len(text)} characters, but a codec has at most {LONGEST}")
    methods = [_method(part) for part in _split(text)]
    _check_order(methods)
    by_stage = {method.stage: method for method in methods}
    return CodecSpec(
        selector=by_stage.get("selector"),
        transform=by_stage.get("transform"),
        quantizer=cast("Quantizer", by_stage.get("quantizer") or registry.find("fp16")()),
        coder=by_stage.get("coder"),
    )


def _split(text: str) -> list[re.Match[str]]:
    """The parts between plus signs; a plus inside brackets (``1e+3``) does not divide."""
    parts, at = [], 0
    while True:
        match = _PART.match(text, at)
        if match is None or (match.end() < len(text) and text[match.end()] != "+"):
            rest = text[at:].strip()
            raise SpecError(f"cannot read {clip(rest)}; write parts as name, name@ratio or name(key=value)")
        parts.append(match)
        if match.end() == len(text):
            return parts
        at = match.end() + 1


def _method(part: re.Match[str]) -> Method:
    name, ratio, arguments = part[1], part[2], part[3]
    if registry.stage_of(name) is None:
        raise SpecError(f"unknown method {clip(name)}{_suggestion(name)} ({_catalogue()})")
    method = registry.find(name)
    known = {parameter.name: parameter for parameter in parameters(method)}
    values: dict[str, Value] = {}
    takes_ratio = known.pop("ratio", None) is not None
    if takes_ratio:
        values["ratio"] = _ratio(name, ratio)
    elif ratio is not None:
        raise SpecError(f"{name} is a {method.stage} and takes no @ratio")
    values.update(read_arguments(name, arguments, known))
    return method(**values)


def _ratio(name: str, text: str | None) -> float:
    if text is None:
        raise SpecError(f"{name} needs the fraction of tokens it keeps, such as {name}@0.25")
    try:
        return parse_fraction(text)
    except UnitError as error:
        raise SpecError(f"{name}: {error}") from None


def _check_order(methods: list[Method]) -> None:
    ranks = [_ORDER.index(method.stage) for method in methods]
    for i in range(1, len(methods)):
        if ranks[i] in ranks[:i]:
            first = methods[ranks.index(ranks[i])]
            raise SpecError(f"{first.name} and {methods[i].name} are both {methods[i].stage}s; give one")
    if ranks != sorted(ranks):
        right = "+".join(
            str(method) for _, method in sorted(zip(ranks, methods, strict=True), key=lambda x: x[0])
        )
        raise SpecError(f"the order is {' → '.join(_ORDER)}; write {right}")


def _suggestion(name: str) -> str:
    from difflib import get_close_matches

    names = [known for table in registry.STAGES.values() for known in table]
    close = get_close_matches(name[:40].lower(), names, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def _catalogue() -> str:
    return "; ".join(f"{stage}s: {', '.join(table)}" for stage, table in registry.STAGES.items() if table)

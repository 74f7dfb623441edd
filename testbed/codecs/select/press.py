"""kvpress's presses as selectors, where that package is installed: `kvpress:SnapKV@0.5`.

Which presses there are, with their parameters, is read from the package's source without importing it, since importing it
takes seconds and torch. Only when tokens are scored is it imported.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import importlib.metadata
import importlib.util
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

from testbed.codecs import CodecError
from testbed.codecs.evidence import Needs
from testbed.codecs.select import Selector
from testbed.errors import SpecError

if TYPE_CHECKING:
    from torch import Tensor

    from testbed.codecs.evidence import Evidence

PREFIX = "kvpress:"
_BASE = "ScorerPress"
_TYPES: dict[str, Any] = {"int": int, "float": float, "bool": bool, "str": str}


@dataclass(frozen=True)
class Press(Selector):
    """Any score press of kvpress, such as kvpress:SnapKV@0.5 (an optional package, with its own limits on transformers).

    score[h, t] is what the press's `score` gives for the context's hidden states, keys and values: [kv_heads, tokens]. The
    press sees the context as a whole prompt, at its real positions: no prefix and no question. What is kept travels like
    any selector's; presses that prune by other means than a score are not taken.
    """

    name: ClassVar[str] = PREFIX + "PRESS"
    source: ClassVar[str] = "https://github.com/NVIDIA/kvpress"
    press: ClassVar[str] = ""  #: kvpress's class

    def needs(self) -> Needs:
        return Needs(context_inputs=True)

    def scores(self, evidence: Evidence, layer: int) -> Tensor:
        import torch

        inputs, held, tokens = evidence.context_inputs, evidence.cache.layers[layer], evidence.tokens
        if inputs is None or layer not in inputs.modules:
            raise CodecError(
                f"{self.name} needs what layer {layer}'s attention is given, and that is not at hand"
            )
        module, states = inputs.modules[layer], inputs.hidden_states[layer]
        arguments = {
            "hidden_states": states,
            "position_embeddings": inputs.position_embeddings[layer],
            "cache_position": torch.arange(tokens, device=states.device),
            "attention_mask": None,
        }
        keys, values = held.keys[None].to(states.dtype), held.values[None].to(states.dtype)
        try:
            with (
                torch.inference_mode(),
                _shifted_rotary(module, inputs.network, evidence.cache.length - tokens),
            ):
                press = self._made()
                press.post_init_from_model(inputs.network)
                scores = press.score(module, states, keys, values, None, arguments)
        except Exception as error:  # a foreign package, which asserts and raises as it likes
            reason = (str(error).strip().splitlines() or ["no reason given"])[0]
            raise CodecError(f"{self.name} cannot score this model's layer {layer}: {reason}") from error
        if tuple(scores.shape) != (1, held.kv_heads, tokens):
            raise CodecError(
                f"{self.name} gives scores of the shape {tuple(scores.shape)} for {tokens} tokens"
            )
        return scores[0].float().clone()

    def _made(self) -> Any:
        """kvpress's own object, with this one's parameters."""
        import kvpress

        taken = {f.name for f in dataclasses.fields(self)} - {"ratio", "scope", "layers"}
        return getattr(kvpress, self.press)(
            compression_ratio=1 - self.ratio, **{name: getattr(self, name) for name in taken}
        )


@contextmanager
def _shifted_rotary(module: Any, network: Any, first: int) -> Iterator[None]:
    """Gives an attention module the rotary embedding that presses look for there, counting from the context's start."""
    rotary = next((m for m in network.modules() if type(m).__name__.endswith("RotaryEmbedding")), None)
    module.rotary_emb = rotary and (lambda x, position_ids: rotary(x, position_ids + first))
    try:
        yield
    finally:
        del module.rotary_emb


def find_press(name: str) -> type[Press]:
    """The selector class of ``kvpress:NAME``. Raises SpecError where the package or such a press is missing."""
    reason = unavailable()
    if reason:
        raise SpecError(f"{name} is not available: {reason}")
    selectors = _selectors()
    if name not in selectors:
        names = ", ".join(sorted(other.removeprefix(PREFIX) for other in selectors))
        raise SpecError(f"kvpress has no score press {name.removeprefix(PREFIX)[:40]!r}; it has {names}")
    return selectors[name]


def presses() -> list[type[Press]]:
    """Every score press there is; none where the package is not available."""
    return [] if unavailable() else list(_selectors().values())


@functools.cache
def unavailable() -> str:
    """Why presses cannot be used here, in one line with the remedy; empty where they can."""
    try:
        version, needed = importlib.metadata.version("kvpress"), importlib.metadata.requires("kvpress") or []
    except importlib.metadata.PackageNotFoundError:
        return "the package kvpress is not installed (pip install 'testbed[kvpress]', in an environment of its own)"
    from packaging.requirements import Requirement

    for requirement in map(Requirement, needed):
        if requirement.name == "transformers" and (
            requirement.marker is None or requirement.marker.evaluate()
        ):
            installed = importlib.metadata.version("transformers")
            if not requirement.specifier.contains(installed, prereleases=True):
                return f"kvpress {version} takes transformers {requirement.specifier}, and {installed} is installed"
    return ""


@functools.cache
def _selectors() -> dict[str, type[Press]]:
    """A selector class for each score press of the installed package."""
    spec = importlib.util.find_spec("kvpress")
    folder = Path(spec.origin or "").parent / "presses" if spec else Path()
    classes = {
        node.name: node
        for file in sorted(folder.glob("*.py"))
        for node in ast.parse(file.read_text(encoding="utf-8")).body
        if isinstance(node, ast.ClassDef)
    }
    selectors = {}
    for name in classes:
        lineage = _lineage(name, classes)
        if lineage and not any(_defines(node, "compress") for node in lineage):
            selector = _selector(name, lineage)
            selectors[selector.name] = selector
    return selectors


def _lineage(name: str, classes: dict[str, ast.ClassDef]) -> list[ast.ClassDef]:
    """A class and its ancestors up to the base of score presses, which is left out; empty for any other class."""
    line: list[ast.ClassDef] = []
    while name in classes and name != _BASE:
        line.append(classes[name])
        bases = [base.id for base in classes[name].bases if isinstance(base, ast.Name)]
        name = bases[0] if bases else ""
    return line if name == _BASE else []


def _defines(node: ast.ClassDef, method: str) -> bool:
    return any(isinstance(part, ast.FunctionDef) and part.name == method for part in node.body)


def _selector(name: str, lineage: list[ast.ClassDef]) -> type[Press]:
    fields: dict[str, tuple[str, Any, Any]] = {}
    for node in reversed(lineage):
        for part in node.body:
            if isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name):
                kind, default = _type(part.annotation), _constant(part.value)
                if kind is not None and default is not None and part.target.id != "compression_ratio":
                    fields[part.target.id] = (part.target.id, kind, dataclasses.field(default=default))
    docstring = next((ast.get_docstring(node) for node in lineage if ast.get_docstring(node)), None) or name
    link = re.search(r"https?://arxiv\.org/\S*?(\d{4}\.\d{4,5})", docstring)
    version = importlib.metadata.version("kvpress")
    selector = dataclasses.make_dataclass(
        name,
        list(fields.values()),
        bases=(Press,),
        frozen=True,
        namespace={
            "__doc__": docstring,
            "name": PREFIX + name.removesuffix("Press"),
            "press": name,
            "source": f"kvpress {version}" + (f" (arXiv:{link[1]})" if link else ""),
        },
    )
    return cast(type[Press], selector)


def _type(annotation: ast.expr) -> Any:
    """The type of a parameter that text can give; None for any other."""
    text = ast.unparse(annotation)
    if text in _TYPES:
        return _TYPES[text]
    if text.startswith("Literal["):
        words = tuple(node.value for node in ast.walk(annotation) if isinstance(node, ast.Constant))
        return Literal[words] if all(isinstance(word, str) for word in words) else None
    return None


def _constant(value: ast.expr | None) -> Any:
    """A default that stands there as a number or a word; None for any other."""
    return value.value if isinstance(value, ast.Constant) else None

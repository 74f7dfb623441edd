"""Which layers' keys and values are protected from coarse quantization: how that is written, and where it is found.

    none        K3        V7        12 (both of layer 12)        K3.V7.12        K0-5 (a range)

A diagnosis (`testbed diagnose`) is a JSON file whose ``protect`` is such a word.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from testbed import lookup
from testbed.errors import SpecError
from testbed.files import read_at_most

FORMAT = "testbed-diagnosis-1"
Kind = Literal["keys", "values"]
Place = tuple[Kind, int]

_MOST_LAYERS = 512
_LARGEST_FILE = 64 << 20
_ITEM = re.compile(r"([KV]?)(\d{1,3})(?:-(\d{1,3}))?")
_KINDS: dict[str, tuple[Kind, ...]] = {"K": ("keys",), "V": ("values",), "": ("keys", "values")}


def is_reference(word: str) -> bool:
    """Whether the word names a file or ``auto``, instead of layers."""
    return word == "auto" or "/" in word or word.endswith(".json")


def read_places(word: str) -> frozenset[Place]:
    """``"K3.V7.12"`` -> the places. Raises SpecError for another word."""
    if word == "none":
        return frozenset()
    places: set[Place] = set()
    for item in word.split("."):
        match = _ITEM.fullmatch(item)
        first, last = (int(match[2]), int(match[3] or match[2])) if match else (1, 0)
        if match is None or not first <= last < _MOST_LAYERS:
            raise SpecError(
                f"protect={word[:40]!r}: write layers such as K3.V7.12 or K0-5, none, auto, or a diagnosis file"
            )
        places.update((kind, layer) for kind in _KINDS[match[1]] for layer in range(first, last + 1))
    return frozenset(places)


def write_places(places: Iterable[Place]) -> str:
    """The shortest word for some places; ``none`` for no places."""
    chosen = set(places)
    keys = {layer for kind, layer in chosen if kind == "keys"}
    values = {layer for kind, layer in chosen if kind == "values"}
    items = [*_ranges("", keys & values), *_ranges("K", keys - values), *_ranges("V", values - keys)]
    return ".".join(items) or "none"


def _ranges(letter: str, layers: set[int]) -> list[str]:
    items = []
    for first in sorted(layers):
        if first - 1 in layers:
            continue
        last = first
        while last + 1 in layers:
            last += 1
        items.append(f"{letter}{first}" if last == first else f"{letter}{first}-{last}")
    return items


def default_path(model: str, bits: int, scale: str = "group") -> Path:
    """Where `testbed diagnose` leaves a model's diagnosis, and ``protect=auto`` looks for it."""
    from testbed.models.sources import cache_directory

    name = re.sub(r"[^\w.-]+", "-", model).strip("-.") or "model"
    return cache_directory() / "diagnoses" / f"{name}-int{bits}{_suffix(scale)}.json"


def _suffix(scale: str) -> str:
    return "" if scale == "group" else f"-{scale}"


def load_diagnosis(path: Path) -> dict[str, Any]:
    """A diagnosis from its file. Raises SpecError naming the file and what is wrong with it."""
    try:
        diagnosis = json.loads(read_at_most(path, _LARGEST_FILE))
    except OSError as error:
        raise SpecError(f"diagnosis {path}: {error.strerror or error}") from None
    except (ValueError, RecursionError):
        raise SpecError(f"diagnosis {path}: not a JSON file") from None
    if not isinstance(diagnosis, dict) or diagnosis.get("format") != FORMAT:
        raise SpecError(f"diagnosis {path}: not a file that `testbed diagnose` wrote (format {FORMAT})")
    if not isinstance(diagnosis.get("protect"), str) or is_reference(diagnosis["protect"]):
        raise SpecError(f"diagnosis {path}: it does not say what to protect")
    read_places(diagnosis["protect"])
    return diagnosis


def look_up(word: str, model: str | None, bits: int, scale: str = "group") -> str:
    """The places behind a reference: those that a file names, or, for ``auto``, the model's diagnosis at these bits and scales.

    Raises SpecError where there is none, or where the file is another model's.
    """
    if word == "auto":
        if model is None:
            raise SpecError(
                "protect=auto needs to know the model; name a diagnosis file or the layers instead"
            )
        path = default_path(model, bits, scale)
        if not path.is_file():
            raise SpecError(
                f"protect=auto: model {model!r} has no diagnosis yet; run `testbed diagnose {model} --bits {bits}"
                + ("`" if scale == "group" else f" --scale {scale}`")
            )
    else:
        path = Path(lookup.find(word) or word).expanduser()
    diagnosis = load_diagnosis(path)
    if model is not None and diagnosis.get("model") not in (model, None):
        raise SpecError(
            f"diagnosis {path}: it is of model {str(diagnosis.get('model'))[:60]!r}, not of {model!r}"
        )
    return write_places(read_places(diagnosis["protect"]))

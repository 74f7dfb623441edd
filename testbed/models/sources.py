"""Where a model comes from: a preset, a directory, a GGUF file, a hub id or our short name of one. Imports no torch.

Presets and GGUF files are converted once into the user's cache (`fetching`); everything else is loaded where
it lies.
"""

from __future__ import annotations

import difflib
import json
import os
import re
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

from testbed.errors import UsageError
from testbed.identity import behind_sudo, invoking_user
from testbed.models.presets import PRESETS, Preset
from testbed.models.shapes import PREFIX, find_shape, is_shape


@dataclass(frozen=True)
class HubModel:
    """A hub id under a name of ours. `gated`: the hub wants its licence accepted and a token before it gives the weights."""

    name: str
    id: str
    description: str
    license: str
    gated: bool = False


HUB_MODELS = {
    model.name: model
    for model in (
        HubModel("llama3.1-8b", "meta-llama/Llama-3.1-8B-Instruct", "Llama 3.1 8B Instruct", "Llama 3.1", True),
        HubModel("llama3.2-1b", "meta-llama/Llama-3.2-1B-Instruct", "Llama 3.2 1B Instruct", "Llama 3.2", True),
        HubModel("llama3.2-3b", "meta-llama/Llama-3.2-3B-Instruct", "Llama 3.2 3B Instruct", "Llama 3.2", True),
        HubModel("qwen2.5-0.5b", "Qwen/Qwen2.5-0.5B-Instruct", "Qwen 2.5 0.5B Instruct", "Apache-2.0"),
        HubModel("qwen2.5-7b", "Qwen/Qwen2.5-7B-Instruct", "Qwen 2.5 7B Instruct", "Apache-2.0"),
        HubModel("qwen2.5-14b", "Qwen/Qwen2.5-14B-Instruct", "Qwen 2.5 14B Instruct", "Apache-2.0"),
        HubModel("qwen3-0.6b", "Qwen/Qwen3-0.6B", "Qwen 3 0.6B", "Apache-2.0"),
        HubModel("qwen3-8b", "Qwen/Qwen3-8B", "Qwen 3 8B", "Apache-2.0"),
        HubModel("mistral-7b", "mistralai/Mistral-7B-Instruct-v0.3", "Mistral 7B Instruct v0.3", "Apache-2.0"),
        HubModel("yi-6b", "01-ai/Yi-1.5-6B-Chat", "Yi 1.5 6B Chat", "Apache-2.0"),
        HubModel("phi3.5-mini", "microsoft/Phi-3.5-mini-instruct", "Phi 3.5 mini Instruct, 3.8B", "MIT"),
        HubModel("gemma2-2b", "google/gemma-2-2b-it", "Gemma 2 2B Instruct", "Gemma", True),
        HubModel("gemma3-1b", "google/gemma-3-1b-it", "Gemma 3 1B Instruct", "Gemma", True),
        HubModel("tinyllama-1.1b", "TinyLlama/TinyLlama-1.1B-Chat-v1.0", "TinyLlama 1.1B Chat", "Apache-2.0"),
        HubModel("smollm2-1.7b", "HuggingFaceTB/SmolLM2-1.7B-Instruct", "SmolLM2 1.7B Instruct", "Apache-2.0"),
        HubModel(
            "deepseek-v2-lite", "deepseek-ai/DeepSeek-V2-Lite-Chat", "DeepSeek V2 Lite Chat, latent cache", "DeepSeek"
        ),
    )
}  # fmt: skip


@dataclass(frozen=True)
class ModelSource:
    """A model that can be named, and where it is loaded from."""

    name: str
    kind: str  #: "preset", "gguf", "directory", "hub" or "shape"
    path: Path | None  #: directory with config.json, tokenizer and safetensors; None: the hub's own cache
    fetched: bool
    size_bytes: int = 0  #: on the disk; 0 where it is not there
    origin: str = ""  #: where it comes from, for people
    description: str = ""
    license: str = ""
    hub_id: str = ""  #: of a model of the hub

    @property
    def location(self) -> str:
        """What transformers is asked to load."""
        return (self.hub_id or self.name) if self.path is None else str(self.path)


def _home() -> Path:
    """The invoking user's home, also under sudo: models belong to people, not to root."""
    return Path(invoking_user().home) if behind_sudo() else Path.home()


def cache_directory() -> Path:
    """$TESTBED_CACHE, else $XDG_CACHE_HOME/testbed, else ~/.cache/testbed of the invoking user."""
    if own := os.environ.get("TESTBED_CACHE"):
        return Path(own).expanduser()
    if shared := os.environ.get("XDG_CACHE_HOME"):
        return Path(shared) / "testbed"
    return _home() / ".cache" / "testbed"


def model_directory(name: str) -> Path:
    """Where the cache keeps a converted model."""
    return cache_directory() / "models" / name


def resolve(name: str) -> ModelSource:
    """The model that `name` means, ready to load; raises UsageError with the remedy where it is not."""
    source = find(name)
    if source.fetched:
        return source
    if source.kind == "hub" and not _offline():
        return source  # transformers downloads it while loading
    if source.kind == "hub":
        raise UsageError(
            f"model {name!r} is not in the hub cache and HF_HUB_OFFLINE is set; unset it to download"
        )
    raise UsageError(f"model {name!r} is not fetched; get it with `testbed models fetch {name}`")


def find(name: str) -> ModelSource:
    """The model that `name` means, fetched or not. Raises UsageError where it means none."""
    if is_shape(name):
        shape = find_shape(name)
        return ModelSource(
            PREFIX + shape.name, "shape", None, True, origin=f"https://huggingface.co/{shape.source}"
        )
    if name in PRESETS:
        return _preset(PRESETS[name])
    if name in HUB_MODELS:
        return _hub_model(HUB_MODELS[name])
    converted = _converted_names()
    if name in converted:
        return _converted(name, converted[name])
    path = Path(name).expanduser()
    if path.suffix.lower() == ".gguf":
        return _gguf(name, path)
    if path.is_dir():
        return _directory(name, path)
    if name.startswith(("/", ".", "~")):
        raise UsageError(f"model {name!r}: there is no such directory")
    if re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name):
        return _hub(name)
    near = difflib.get_close_matches(name.lower(), [*PRESETS, *converted, *HUB_MODELS], n=2, cutoff=0.7)
    hint = f"did you mean {' or '.join(near)}?" if near else f"presets are {', '.join(PRESETS)}"
    raise UsageError(
        f"unknown model {name!r}; {hint} (or a directory, a .gguf file, a hub id such as org/name)"
    )


def available() -> list[ModelSource]:
    """The presets, the GGUF files that were converted, and the hub's models that have names of ours; `find` knows each name."""
    presets = [_preset(preset) for preset in PRESETS.values()]
    converted = [_converted(name, directory) for name, directory in _converted_names().items()]
    return [*presets, *converted, *(_hub_model(model) for model in HUB_MODELS.values())]


def _converted_names() -> dict[str, Path]:
    """The converted GGUF files' names and directories: a file's own name where it is the only one of that name."""
    stems = {
        record.parent: Path(str(found.get("file", record.parent.name))).stem
        for record in sorted(cache_directory().glob("models/*/source.json"))
        if record.parent.name not in PRESETS and (found := _read(record)).get("kind") == "gguf"
    }
    several = Counter([*stems.values(), *PRESETS, *HUB_MODELS])
    return {stem if several[stem] == 1 else directory.name: directory for directory, stem in stems.items()}


def _preset(preset: Preset) -> ModelSource:
    path = model_directory(preset.name)
    fetched = (path / "source.json").is_file()
    return ModelSource(
        preset.name,
        "preset",
        path,
        fetched,
        _size(path) if fetched else 0,
        preset.origin,
        preset.description,
        preset.license,
    )


def _directory(name: str, path: Path) -> ModelSource:
    if not (path / "config.json").is_file():
        raise UsageError(f"model {name!r}: the directory has no config.json")
    if not any(path.glob("*.safetensors")):
        raise UsageError(f"model {name!r}: the directory has no *.safetensors; other formats are not loaded")
    return ModelSource(
        path.resolve().name, "directory", path.resolve(), True, _size(path), str(path.resolve())
    )


def _gguf(name: str, path: Path) -> ModelSource:
    if not path.is_file():
        raise UsageError(f"model {name!r}: there is no such file")
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise UsageError(f"model {name!r}: not a GGUF file")
    stamp = file_stamp(path)
    for known, directory in _converted_names().items():
        if _read(directory / "source.json").get("stamp") == stamp:
            return _converted(known, directory)
    return ModelSource(path.stem, "gguf", None, False, origin=str(path))


def _converted(name: str, directory: Path) -> ModelSource:
    origin = str(_read(directory / "source.json").get("file", ""))
    return ModelSource(name, "gguf", directory, True, _size(directory), origin, f"converted from {origin}")


def file_stamp(path: Path) -> list[object]:
    """Tells whether a file is the one that was converted, without reading all of it."""
    status = path.stat()
    return [str(path.resolve()), status.st_size, status.st_mtime_ns]


def _hub(name: str) -> ModelSource:
    fetched = any(_in_hub_cache("models", name).glob("snapshots/*/config.json"))
    return ModelSource(name, "hub", None, fetched, origin=f"https://huggingface.co/{name}")


def _in_hub_cache(kind: str, name: str) -> Path:
    """Where the hub's own cache keeps one of its `models` or `datasets`."""
    home = os.environ.get("HF_HOME") or str(_home() / ".cache" / "huggingface")
    hub = Path(os.environ.get("HF_HUB_CACHE") or Path(home) / "hub")
    return hub / f"{kind}--{name.replace('/', '--')}"


def hub_commit(kind: str, name: str) -> str:
    """The commit of one of the hub's `models` or `datasets` that its cache has: of the branch that is loaded, else the only one;
    empty where there is none. Asks nobody.
    """
    kept = _in_hub_cache(kind, name)
    try:
        return (kept / "refs" / "main").read_text(encoding="ascii").strip()[:64]
    except (OSError, ValueError):
        commits = [path.name for path in kept.glob("snapshots/*")]
        return commits[0] if len(commits) == 1 else ""


def has_a_name(name: str) -> bool:
    """Whether a name is one of ours, whatever directories there are: a preset, a model of the hub, a GGUF file's that was
    converted."""
    return is_shape(name) or name in PRESETS or name in HUB_MODELS or name in _converted_names()


def _hub_model(model: HubModel) -> ModelSource:
    description = f"{model.description} ({model.id}{', gated' if model.gated else ''})"
    found = _hub(model.id)
    return replace(found, name=model.name, hub_id=model.id, description=description, license=model.license)


def _offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}


def _size(path: Path) -> int:
    return sum(file.stat().st_size for file in path.iterdir() if file.is_file())


def _read(record: Path) -> dict[str, object]:
    try:
        value = json.loads(record.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}

from __future__ import annotations

import json
import os
import pwd
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from testbed.errors import UsageError
from testbed.models import fetching, sources

Tiny = Callable[[str], Path]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TESTBED_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_the_cache_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    assert sources.cache_directory().name == "cache"
    monkeypatch.delenv("TESTBED_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert sources.cache_directory() == Path("/somewhere/testbed")


def test_under_sudo_the_cache_is_the_invoking_users(monkeypatch: pytest.MonkeyPatch) -> None:
    user = next(entry for entry in pwd.getpwall() if entry.pw_uid != 0)
    for name in ("TESTBED_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 0)
    monkeypatch.setenv("SUDO_UID", str(user.pw_uid))
    assert sources.cache_directory() == Path(user.pw_dir) / ".cache" / "testbed"
    monkeypatch.setenv("SUDO_UID", "4294967294")
    assert sources.cache_directory() == Path("/.cache/testbed")  # of nobody known


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("smollm2-135m", "not fetched; get it with `testbed models fetch smollm2-135m`"),
        ("smollm-135", "did you mean smollm2-135m"),
        ("zzz", "presets are smollm2-135m, gemma3-270m, qwen2.5-coder-0.5b, qwen2.5-coder-1.5b"),
        ("/nowhere/at/all", "no such directory"),
        ("nowhere.gguf", "no such file"),
    ],
)
def test_a_model_that_is_not_here_is_named_with_the_remedy(name: str, complaint: str) -> None:
    with pytest.raises(UsageError, match=re.escape(complaint)) as caught:
        sources.resolve(name)
    assert name in str(caught.value) and "\n" not in str(caught.value)


def test_only_directories_with_safetensors_are_taken(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no config\.json"):
        sources.resolve(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"a pickle")
    with pytest.raises(UsageError, match="safetensors"):
        sources.resolve(str(tmp_path))
    (tmp_path / "notes.gguf").write_bytes(b"text")
    with pytest.raises(UsageError, match="not a GGUF file"):
        sources.resolve(str(tmp_path / "notes.gguf"))


def test_a_hub_model_that_is_not_here_needs_the_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UsageError, match="HF_HUB_OFFLINE"):
        sources.resolve("org/name")
    snapshot = tmp_path / "hub" / "models--org--name" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    assert sources.resolve("org/name").fetched
    monkeypatch.delenv("HF_HUB_OFFLINE")
    assert sources.resolve("org/other").location == "org/other"


def test_available_tells_what_is_there(cache: Path) -> None:
    directory = cache / "models" / "smollm2-135m"
    directory.mkdir(parents=True)
    (directory / "source.json").write_text("{}")
    (directory / "model.safetensors").write_bytes(b"x" * 100)
    listed = {source.name: source for source in sources.available()}
    assert listed["smollm2-135m"].fetched and listed["smollm2-135m"].size_bytes == 102
    assert not listed["gemma3-270m"].fetched and "Gemma Terms" in listed["gemma3-270m"].license


def test_every_listed_name_is_one_that_a_scenario_may_have(cache: Path) -> None:
    files = {"own-0123": "/models/own.gguf", "two-4567": "/a/two.gguf", "two-89ab": "/b/two.gguf",
             "yi-6b-cdef": "/c/yi-6b.gguf"}  # fmt: skip
    for name, file in files.items():
        (cache / "models" / name).mkdir(parents=True)
        record = {"kind": "gguf", "file": file, "stamp": []}
        (cache / "models" / name / "source.json").write_text(json.dumps(record))
    listed = sources.available()
    assert {source.name for source in listed if source.kind == "gguf"} == {
        "own", "two-4567", "two-89ab", "yi-6b-cdef",
    }  # fmt: skip
    assert len({source.name for source in listed}) == len(listed)
    for source in listed:
        assert sources.find(source.name) == source
    assert sources.resolve("own").path == cache / "models" / "own-0123"


def test_the_studys_families_have_names_that_stand_for_hub_ids(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    found = sources.find("qwen2.5-7b")
    assert (found.kind, found.name, found.location) == ("hub", "qwen2.5-7b", "Qwen/Qwen2.5-7B-Instruct")
    assert not found.fetched and "gated" in sources.find("llama3.2-1b").description
    families = (
        "llama3",
        "qwen2.5",
        "qwen3",
        "mistral",
        "yi",
        "phi",
        "gemma2",
        "gemma3",
        "tinyllama",
        "smollm2",
        "deepseek",
    )
    names = [source.name for source in sources.available()]
    assert all(any(name.startswith(family) for name in names) for family in families)
    assert len(names) == len(set(names))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UsageError, match="not in the hub cache"):
        sources.resolve("yi-6b")


def test_a_named_model_is_downloaded_by_its_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    asked: list[str] = []
    monkeypatch.setattr(fetching, "fetch_hub", lambda name, say: asked.append(name))
    assert fetching.fetch("tinyllama-1.1b").location == asked[0] == "TinyLlama/TinyLlama-1.1B-Chat-v1.0"

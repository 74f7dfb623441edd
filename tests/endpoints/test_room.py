"""Memory that runs out is one line with the remedy; the side lives on, and what fits is answered."""

from __future__ import annotations

import contextlib
import gc
import os
import re
import resource
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from testbed.endpoints.endpoint import Endpoint
from testbed.endpoints.loopback import Loopback
from testbed.endpoints.protocol import Learn, Link, Load, Loaded, Prepare, Serve, TrialRequest
from testbed.endpoints.room import ran_out, within_memory
from testbed.errors import EndpointError, OutOfMemory
from testbed.experiment.runner import Runner, begin
from testbed.experiment.session import Session, in_one_process
from testbed.guide.guide import unlinked
from testbed.hosts.local import Local
from testbed.models.language import LanguageModel
from testbed.speed.files import Device
from testbed.speed.times import DeviceTimes
from tests.endpoints.pair import in_this_process

#: So many bytes that no machine has them.
BEYOND = 1 << 55
TIMES = DeviceTimes("d", "llama-3.1-8b", ((16, 1e-3), (8192, 2e-3)), ((16, 1e-4), (8192, 1e-4)))


def on_processor() -> None:
    torch.empty(BEYOND, dtype=torch.uint8)


def in_numpy() -> None:
    np.empty(BEYOND, dtype=np.uint8)


def in_python() -> None:
    bytearray(BEYOND)


def on_gpu() -> None:  # as torch words it; there need not be one here
    raise torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 79.10 GiB of which 1.20 GiB is free.\n"
        "Of the allocated memory …"
    )


@pytest.mark.parametrize(
    ("work", "words"),
    [
        (on_processor, r"out of memory \(36028797018963968 bytes more were asked for\): take fewer context_tok"),
        (in_numpy, r"out of memory \(32.0 PiB more were asked for\): take fewer"),
        (in_python, r"out of memory: take fewer .*dtype: bfloat16"),
        (on_gpu, r"out of GPU memory \(20.00 GiB more were asked for\): take fewer"),
    ],
)  # fmt: skip
def test_what_an_allocator_says_becomes_one_line_with_the_remedy(
    work: Callable[[], None], words: str
) -> None:
    with pytest.raises(OutOfMemory, match=words) as found:
        within_memory(work)
    assert "\n" not in str(found.value)


def test_other_failures_stay_what_they_are() -> None:
    assert "or of threads: take fewer" in ran_out(RuntimeError("can't start new thread"))
    assert not ran_out(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    with pytest.raises(ZeroDivisionError):
        within_memory(lambda: 1 // 0)
    assert within_memory(lambda: 7) == 7


def test_what_had_been_allocated_is_free_when_it_is_told_also_where_a_thread_found_no_room() -> None:
    held: list[weakref.ref[torch.Tensor]] = []

    def work() -> None:
        here = torch.zeros(1000)
        held.append(weakref.ref(here))
        failure: list[Exception] = []

        def elsewhere() -> None:
            try:
                there = torch.zeros(1000)
                held.append(weakref.ref(there))
                on_processor()
            except RuntimeError as error:
                failure.append(error)  # a circle: the error, its frame, this list

        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        raise failure[0]

    gc.disable()
    try:
        with pytest.raises(OutOfMemory):
            within_memory(work)
        assert [ref() for ref in held] == [None, None]
    finally:
        gc.enable()


def spare(endpoint: Endpoint, bytes: int) -> None:
    """From now on it gets so much more memory from the kernel, and no more."""
    pid = endpoint.process.pid
    size = int(Path(f"/proc/{pid}/statm").read_text().split()[0]) * resource.getpagesize()
    resource.prlimit(pid, resource.RLIMIT_AS, (size + bytes, size + bytes))


@pytest.fixture
def unmapped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs started from here let go of addresses as they free memory, so that what is spared is counted the same each time:
    one heap, or each new thread takes 128 MiB; and a tensor is never a hole in it."""
    monkeypatch.setenv("MALLOC_ARENA_MAX", "1")
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", str(256 << 10))


@pytest.mark.slow
@pytest.mark.parametrize("short", ["edge", "cloud"])
@pytest.mark.parametrize("delivery", ["whole", "stream(chunk=1024)", "stream(by=layers, chunk=8)"])
def test_a_context_that_does_not_fit_is_refused_by_the_side_that_is_short_and_shorter_ones_are_answered(
    short: str, delivery: str, tmp_path: Path, unmapped: None
) -> None:
    """An 8B model's cache of 4,096 tokens is 512 MiB in fp16; in int4 it crosses in 160."""
    edge, cloud = (Endpoint.start(role, Local(), tmp_path / f"{role}.log") for role in ("edge", "cloud"))
    with edge.process, cloud.process:
        for side in (edge, cloud):
            side.call(Load("shape:llama-3.1-8b", "cpu", threads=1, times=TIMES), 120)
        link = Link("127.0.0.1", cloud.call(Serve(1 << 30), 60), timeout=60.0)
        spare(edge if short == "edge" else cloud, 400 << 20)
        batches = []
        for tokens in (4096, 64):
            about = {"count": 1, "context_tokens": tokens, "codecs": ("int4",), "max_new_tokens": 2}
            prepared = edge.call(Prepare("needle", **about), 120)  # type: ignore[arg-type]
            assert cloud.call(prepared.prefix, 60)
            batches.append(prepared.batch)

        def ask(batch: int) -> int:
            request = TrialRequest("split", batch, 0, codec="int4", delivery=delivery, link=link)
            return edge.call(request, 120).answer_tokens

        for _ in range(2):
            who = "edge: " if short == "edge" else "edge: the cloud: "
            with pytest.raises(EndpointError, match=rf"^{who}out of memory.*: take fewer context_tokens"):
                ask(batches[0])
            assert ask(batches[1]) == 2
        assert edge.alive and cloud.alive


def test_a_prefill_that_found_no_room_leaves_nothing_to_the_next_one(
    tiny_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Streamed by layers, which are kept for trials to come: those of a prefill that ended within are not taken over."""
    pair = in_this_process(tiny_model("llama"))
    about = {"placement": "split", "delivery": "stream(by=layers, chunk=1)", "reuse": "all"}
    right = pair.outcome(pair.ask("fp16", example=1, **about)).payload_digest
    pair.ask("fp16", example=2)  # so that the first example's prefill is not at hand
    blocks = LanguageModel.blocks

    def ends_within(model: LanguageModel, *given: object, **named: object) -> object:
        run = blocks(model, *given, **named)  # type: ignore[arg-type]
        finish = run.finish

        def finished(on_layer: Callable[[int, object], None] | None = None) -> object:
            if on_layer is None:
                return finish()

            def then_full(index: int, layer: object) -> None:
                on_layer(index, layer)
                on_processor()

            return finish(then_full)  # type: ignore[arg-type]

        run.finish = finished  # type: ignore[assignment, method-assign]
        return run

    with monkeypatch.context() as patch:
        patch.setattr(LanguageModel, "blocks", ends_within)
        with pytest.raises(RuntimeError, match="can't allocate memory"):
            pair.ask("fp16", example=1, **about)
    assert pair.outcome(pair.ask("fp16", example=1, **about)).payload_digest == right


def test_one_process_loads_once_what_both_sides_share_and_twice_what_is_in_another_number(
    tiny_model: Callable[[str], Path],
) -> None:
    model, learn = str(tiny_model("llama")), Learn("Facts follow.\n")

    def loaded(*messages: Load) -> tuple[Loopback, list[str]]:
        both = Loopback()
        return both, [both.load(message).dtype for message in messages]

    both, numbers = loaded(
        Load(model, "cpu"), Load(model, "auto" if not torch.cuda.is_available() else "cpu")
    )
    assert numbers == ["float32", "float32"] and both._edge.model is both._cloud.model
    both, numbers = loaded(Load(model, "cpu"), Load(model, "cpu", "bfloat16"))
    assert numbers == ["float32", "bfloat16"] and both._edge.model is not both._cloud.model
    assert both.learn(learn) in both._edge.prefixes and both._edge.prefixes is not both._cloud.prefixes


@pytest.mark.slow
def test_a_run_has_an_error_row_for_what_does_not_fit_and_goes_on(tmp_path: Path, unmapped: None) -> None:
    board = tmp_path / "board.yaml"
    board.write_text(Device("board", "a board", "float16", "measured", "here", TIMES).text())
    settings = {
        "name": "t",
        "model": "shape:llama-3.1-8b",
        "compute": {"edge": f"device:{board}", "cloud": f"device:{board}"},
        "device": "cpu",
        "tasks": ["needle"],
        "examples": 1,
        "max_new_tokens": 2,
        "codecs": ["int4", "int8"],
        "context_tokens": [4096, 64],
    }
    plan = unlinked(settings, "t.yaml")

    @contextlib.contextmanager
    def short(*given: Any) -> Iterator[Session]:
        with in_one_process(*given) as session:
            load = session.pair.load

            def loaded() -> dict[str, Loaded]:
                told = load()
                spare(session.pair.edge, 400 << 20)
                return told

            session.pair.load = loaded  # type: ignore[method-assign]
            yield session

    directory = begin(plan, tmp_path / "run")
    runner = Runner(plan, directory, lambda progress: None, opening=short)
    runner.execute()
    errors = [row["error"] for row in directory.rows()]
    assert runner.failures == 2 and errors[2:] == ["", ""]
    assert all(
        re.match(r"full cache: loopback: out of memory.*: take fewer context_tokens", e) for e in errors[:2]
    )


#: A GPU's allocator, in a process that has none: it finds no room for what attention over a long pass takes.
FULL_GPU = """\
import sys
if "testbed.endpoints" in " ".join(sys.orig_argv):
    import torch.nn.functional as functional
    attend = functional.scaled_dot_product_attention
    def short(query, key, value, **named):
        if key.shape[2] > 1200 and query.shape[2] > 1:
            raise functional.torch.OutOfMemoryError(
                "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total of 79.10 GiB\\nOf the allocated memory"
            )
        return attend(query, key, value, **named)
    functional.scaled_dot_product_attention = short
"""


@pytest.mark.slow
def test_what_a_gpu_has_no_room_for_is_a_row_with_the_remedy_and_the_run_goes_on(
    tiny_model: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sitecustomize.py").write_text(FULL_GPU)
    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    )
    settings = {
        "name": "t",
        "model": str(tiny_model("llama")),
        "tasks": ["needle"],
        "examples": 1,
        "max_new_tokens": 2,
        "placements": ["split", "store", "cloud"],
        "codecs": ["int8"],
        "delivery": ["whole", "stream(chunk=64)"],
        "context_tokens": [1600, 100],
    }
    plan = unlinked(settings, "t.yaml")
    directory = begin(plan, tmp_path / "run")
    runner = Runner(plan, directory, lambda progress: None, opening=in_one_process)
    runner.execute()
    errors = [row["error"] for row in directory.rows()]
    remedy = "out of GPU memory (2.00 GiB more were asked for): take fewer context_tokens, dtype: bfloat16, a smaller model"
    assert len(errors) == 10 and runner.failures == 5 and not any(errors[5:])
    assert all(remedy in error and "\n" not in error for error in errors[:5])

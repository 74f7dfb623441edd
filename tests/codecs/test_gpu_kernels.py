"""What can be known of the GPU's kernels without a GPU: what they compute, interpreted, and what they are compiled to."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from testbed.codecs.codec import Codec, decode
from testbed.codecs.quantize.integer import INTEGERS
from tests.codecs.caches import make_cache, same_cache

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="no triton: torch brings it where it is built for GPUs"
)


@pytest.mark.slow
def test_interpreted_they_do_as_the_processors_loops_do() -> None:
    inner = Path(__file__).with_name("interpreted_kernels.py")
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(inner)],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout[-4000:] + ran.stderr[-2000:]
    assert " passed" in ran.stdout and "skipped" not in ran.stdout


def compiled(kernel: Any, dtype: str, bits: int, symmetric: bool, capability: int) -> str:
    """PTX for groups of 32 of 128 channels, as it is launched, for a GPU of that compute capability."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from testbed.codecs.quantize import batch_triton, kernels

    integer = INTEGERS[bits](symmetric=symmetric)
    settings = (4, 32, bits, int(symmetric), integer.levels, integer.offset)
    constants = batch_triton._constants(kernel is kernels.encode, dtype, settings, 16, 16)
    source = ASTSource(
        kernel,
        signature={"table": "*i64", **dict.fromkeys(constants, "constexpr")},
        constexprs=constants,
        attrs={(0,): [["tt.divisibility", 16]]},
    )
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=batch_triton.OPTIONS)
    return str(made.asm["ptx"])


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize(("bits", "symmetric"), [(4, False), (8, True)])
def test_compiled_they_round_as_ieee_754_says_and_move_sixteen_bytes_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bits: int, symmetric: bool, dtype: str, capability: int
) -> None:
    from testbed.codecs.quantize import kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    for kernel in (kernels.encode, kernels.decode):
        ptx = compiled(kernel, dtype, bits, symmetric, capability)
        assert not re.search(r"\bfma\.|\.ftz|\.approx|div\.full", ptx)
        # A product, sum or quotient without a mode rounds to nearest, too, but may be contracted.
        assert not re.search(r"\b(add|sub|mul|div)\.f32", ptx)
        assert re.search(r"ld\.global\S*\.v4\.b32", ptx) and re.search(r"st\.global\S*\.v4\.b32", ptx)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("text", ["int4", "int8", "int3", "int2", "int4(symmetric=true)", "int4+zstd"])
@pytest.mark.parametrize("name", ["grouped", "multi-head bf16", "sliding layers", "one token"])
def test_on_a_gpu_payloads_and_caches_are_the_processors(name: str, text: str) -> None:
    cache = make_cache(name)
    payload = Codec(text).encode(cache.to("cuda"))
    assert bytes(payload) == bytes(Codec(text).encode(cache))
    assert same_cache(decode(payload, "cuda").to("cpu"), decode(payload))

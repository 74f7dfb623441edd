"""Files of any cache: `testbed encode`, `testbed decode`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from testbed.cli.parts import as_json

if TYPE_CHECKING:
    from testbed.codecs.alone import Loss

_file = click.Path(path_type=Path)


def _free(out: Path | None) -> None:
    from testbed.errors import UsageError

    if out is not None and out.exists():
        raise UsageError(f"{out} exists; choose another --out, or remove it")


def _dtype(name: str | None) -> Any:
    if name is None:
        return None
    from testbed.codecs.cache_format import torch_dtype

    return torch_dtype(name)


dtype_option = click.option(
    "--dtype",
    type=click.Choice(["float16", "bfloat16"]),
    help="Round the file's numbers to these 16 bits first.",
)


@click.command()
@click.argument("cache", type=_file)
@click.argument("codec")
@click.option("--out", type=_file, help="The payload's file; without it, nothing is written.")
@dtype_option
@click.option(
    "--rope",
    metavar="theta=N[,dim=N][,pairs=neighbours]",
    help="How keys were turned to their positions, for codecs that turn them back; none: not at all.",
)
@click.option(
    "--repeats", type=click.IntRange(1, 1000), default=3, show_default=True, help="Of what is timed."
)
@as_json
def encode(
    cache: Path, codec: str, out: Path | None, dtype: str | None, rope: str | None, repeats: int
) -> Any:
    """Encode the keys and values in CACHE, a file of safetensors, with CODEC; say its true bytes, times and errors.

    No model is loaded: codecs that ask for a question or for attention are refused.
    """
    from testbed import files
    from testbed.codecs import alone, cache_files
    from testbed.codecs.codec import Codec

    _free(out)
    coder = Codec(codec)
    held = cache_files.read(cache, _dtype(dtype), rope)
    made = alone.encode(coder, held, repeats, plain=rope == "none")
    if out is not None:
        files.replace(out, bytes(made.payload))
    size = len(made.payload)
    value = {
        "codec": str(coder),
        "layers": len(held.layers),
        "tokens": held.length,
        "kept_tokens": made.tokens,
        "dtype": str(held.dtype).removeprefix("torch."),
        "cache_bytes": held.nbytes,
        "payload_bytes": size,
        "ratio": held.nbytes / size,
        "select_s": made.select_s,
        "encode_s": made.encode_s,
        "decode_s": made.decode_s,
        "errors": {"keys": asdict(made.keys), "values": asdict(made.values)},
        "out": out,
    }
    rows = [
        ["codec", str(coder)],
        ["cache", f"{held.nbytes} bytes: {len(held.layers)} layers, {held.length} tokens, {value['dtype']}"],
        ["payload", f"{size} bytes, ratio {value['ratio']:.3f}; {made.tokens} tokens kept"],
        [
            "times",
            f"select {made.select_s:.6f} s, encode {made.encode_s:.6f} s, decode {made.decode_s:.6f} s",
        ],
        *_losses(made.keys, made.values),
    ]
    return value, _lines(rows), 0


@click.command()
@click.argument("payload", type=_file)
@click.option("--out", type=_file, help="The cache's file; without it, nothing is written.")
@click.option("--against", type=_file, help="The cache that was encoded, to say what was lost.")
@dtype_option
@as_json
def decode(payload: Path, out: Path | None, against: Path | None, dtype: str | None) -> Any:
    """Decode a PAYLOAD of `testbed encode` to a file of safetensors; --dtype is of the cache --against."""
    import time

    from testbed.codecs import alone, cache_files
    from testbed.codecs import codec as coding
    from testbed.codecs.cache_format import split, unseal
    from testbed.errors import PayloadError, UsageError

    _free(out)
    data = cache_files.read_payload(payload)
    begun = time.perf_counter()
    try:
        cache = coding.decode(data)
        took = time.perf_counter() - begun
        name = unseal(split(data)[0])[0].codec
    except PayloadError as error:
        raise UsageError(f"{payload}: {error}") from None
    lost = None if against is None else alone.losses(cache_files.read(against, _dtype(dtype)), cache)
    if out is not None:
        cache_files.write(out, cache, {"codec": name})
    value = {
        "codec": name,
        "layers": len(cache.layers),
        "tokens": cache.length,
        "dtype": str(cache.dtype).removeprefix("torch."),
        "cache_bytes": cache.nbytes,
        "payload_bytes": len(data),
        "decode_s": took,
        "errors": None if lost is None else {"keys": asdict(lost[0]), "values": asdict(lost[1])},
        "out": out,
    }
    rows = [
        ["codec", name],
        ["payload", f"{len(data)} bytes"],
        [
            "cache",
            f"{cache.nbytes} bytes: {len(cache.layers)} layers, {cache.length} tokens, {value['dtype']}",
        ],
        ["times", f"decode {took:.6f} s"],
        *(_losses(*lost) if lost else []),
    ]
    return value, _lines(rows), 0


def _losses(keys: Loss, values: Loss) -> list[list[str]]:
    return [
        [f"{kind} lost", f"{loss.relative:.6f} of their norm; {loss.max:.6g} at most"]
        for kind, loss in (("keys", keys), ("values", values))
    ]


def _lines(rows: list[list[str]]) -> str:
    return "\n".join(f"{what:<12} {said}" for what, said in rows)

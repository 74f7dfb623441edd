"""Devices that are not here: `testbed devices`, `testbed device measure`."""

from __future__ import annotations

import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click

from testbed.cli.parts import as_json, table

#: Of the time in which a processor was wanted.
_LEAST_SHARE = 0.8


@click.command()
@as_json
def devices() -> Any:
    """List the device profiles: whose measured times a side may take instead of computing."""
    from testbed.speed.files import load_device, shipped_devices
    from testbed.units import format_time

    found = [load_device(str(path)) for path in shipped_devices()]
    rows = [
        [
            each.name,
            each.times.model,
            each.dtype,
            each.basis,
            f"{each.times.prefill[-1][0]} in {format_time(each.times.prefill[-1][1])}",
            format_time(each.times.decode[0][1]) if each.times.decode else "-",
            each.device,
        ]
        for each in found
    ]
    header = ["device", "model", "dtype", "basis", "prefill", "a token", "what it is"]
    value = {
        "devices": [
            {
                "name": each.name,
                "device": each.device,
                "model": each.times.model,
                "dtype": each.dtype,
                "basis": each.basis,
                "source": each.source,
                "prefill": each.times.prefill,
                "decode": each.times.decode,
                "codecs": {c.codec: {"encode": c.encode, "decode": c.decode} for c in each.codecs},
                "copies": dict(each.copies),
            }
            for each in found
        ]
    }
    return value, table(rows, header), 0


@click.group()
def device() -> None:
    """Make a device profile on the device itself."""


def _numbers(context: click.Context, option: click.Parameter, text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    try:
        numbers = tuple(int(each) for each in text.split(","))
    except ValueError:
        numbers = ()
    if not numbers or not all(1 <= number <= 1 << 20 for number in numbers):
        raise click.BadParameter(f"{text[:40]!r}: write numbers of tokens, such as 128,512,2048")
    return numbers


@device.command()
@click.argument("model")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="The file to write.")
@click.option("--device", "where", default="auto", help="auto, cpu, cuda …")
@click.option("--dtype", default="auto", help="float32, float16, bfloat16.")
@click.option("--threads", type=click.IntRange(1, 1024), help="Of torch.")
@click.option("--tokens", callback=_numbers, metavar="N,N…", help="Of the passes; 16 to 8192 by themselves.")
@click.option("--repeats", type=click.IntRange(1, 1000), default=5, show_default=True, help="Of each pass.")
@click.option(
    "--within", default="20s", show_default=True, metavar="TIME", help="Stop at passes that take longer."
)
@click.option("--accept-uncalibrated", is_flag=True, help="Write the times also of a machine that was busy.")
def measure(
    model: str,
    out: Path,
    where: str,
    dtype: str,
    threads: int | None,
    tokens: tuple[int, ...] | None,
    repeats: int,
    within: str,
    accept_uncalibrated: bool,
) -> None:
    """Time MODEL's prefill and decoding on this machine, its caches' coding and copies, and write a device profile."""
    from testbed import files
    from testbed.errors import UsageError
    from testbed.speed.files import Device
    from testbed.speed.times import DeviceTimes
    from testbed.units import parse_time

    within_s = parse_time(within)
    if out.exists():
        raise UsageError(f"{out} exists; choose another --out, or remove it")
    if out.suffix != ".yaml":
        raise UsageError(f"--out {out}: a device profile's file ends in .yaml")
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"  # as an endpoint computes; read when torch comes
    import torch

    from testbed.models.loading import load_model
    from testbed.speed.measure import TOKENS
    from testbed.speed.measure import measure as time_passes

    loaded = load_model(model, device=where, dtype=dtype, threads=threads)
    found = time_passes(loaded, tokens or TOKENS, repeats, within_s, lambda line: click.echo(line, err=True))
    if found.share is not None and found.share < _LEAST_SHARE and not accept_uncalibrated:
        raise UsageError(
            f"this machine had something else to do: a processor for {found.share:.0%} of the time one was wanted; measure "
            "again when it has not, or keep the times all the same with --accept-uncalibrated"
        )
    what, how = _this_machine(str(loaded.device), torch.get_num_threads(), repeats, found.share)
    kind = str(loaded.dtype).removeprefix("torch.")
    times = DeviceTimes(out.stem, loaded.name, found.prefill, found.decode)
    made = Device(out.stem, what, kind, "measured", how, times, found.codecs, found.copies)
    files.replace(out, made.text().encode())
    click.echo(f"{out}: use it as  compute: {{edge: device:{out}}}")


def _this_machine(where: str, threads: int, repeats: int, share: float | None) -> tuple[str, str]:
    """What the machine is, and how it was measured."""
    from testbed.experiment.environment import describe_host

    host = describe_host()
    what = f"{host['cpu'] or host['machine']}, {host['cores']} cores, {host['memory_bytes'] / 2**30:.0f} GiB"
    if where.startswith("cuda"):
        import torch

        what = torch.cuda.get_device_name(where)
    software = ", ".join(f"{name} {host['packages'][name]}" for name in ("testbed", "torch", "transformers"))
    had = "" if share is None else f", a processor for {share:.0%} of the time one was wanted"
    how = (
        f"testbed device measure on {datetime.now(UTC):%Y-%m-%d}: {where}, {threads} threads, medians of {repeats} "
        f"passes{had}; {software}, kernel {host['kernel']}"
    )
    return what, how

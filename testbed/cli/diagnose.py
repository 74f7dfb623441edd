"""`testbed diagnose`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from testbed.cli.parts import as_json, table
from testbed.errors import UsageError


@click.command()
@click.argument("model")
@click.option("--task", default="needle", show_default=True, help="Whose questions are asked.")
@click.option("--context-tokens", type=click.IntRange(1), default=512, show_default=True)
@click.option(
    "--bits",
    type=click.Choice(["2", "3", "4"]),
    default="4",
    show_default=True,
    help="Of all but the protected.",
)
@click.option(
    "--scale",
    type=click.Choice(["group", "token"]),
    default="group",
    show_default=True,
    help="Theirs: one for each group of 32 elements, or one for each token and KV head.",
)
@click.option(
    "--high", type=click.Choice(["4", "8", "16"]), default="8", show_default=True, help="Of the protected."
)
@click.option(
    "--examples",
    type=click.IntRange(2),
    default=8,
    show_default=True,
    help="To rank; as many more to choose.",
)
@click.option(
    "--epsilon", type=click.FloatRange(0), default=0.05, show_default=True, help="Loss that is let pass."
)
@click.option(
    "--measure",
    type=click.Choice(["nll", "score"]),
    default="nll",
    show_default=True,
    help="What may lose that.",
)
@click.option("--seed", type=int, default=1, show_default=True, help="Runs take 0: other examples.")
@click.option("--threads", type=click.IntRange(1), help="Of the processor.")
@click.option(
    "--out", type=click.Path(path_type=Path), metavar="FILE", help="Default: where protect=auto looks."
)
@as_json
def diagnose(model: str, out: Path | None, bits: str, high: str, scale: str, **options: Any) -> Any:
    """Find the layers of MODEL whose keys or values cannot stand few bits, and write what `mixed` protects."""
    from testbed.codecs.quantize.protection import default_path
    from testbed.diagnosis import launch
    from testbed.models.sources import resolve
    from testbed.tasks.task import make_task

    if int(high) <= int(bits):
        raise UsageError(f"--high {high} must be more than --bits {bits}")
    name = resolve(model).name
    make_task(options["task"])
    path = out or default_path(name, int(bits), scale)
    settings = {"model": model, "bits": int(bits), "high": int(high), "scale": scale, **options}
    found = launch.diagnosed(settings, lambda line: click.echo(line, err=True))
    launch.write(path, found)
    figures = _draw(path)
    text = _text(found) + "".join(f"\n{what:<9} {where}" for what, where in [("file", path), *figures])
    return {**found, "file": str(path)}, text, 0


def _draw(path: Path) -> list[tuple[str, Path]]:
    from analysis.figures.layer_sensitivity import draw_file

    return [("plot", figure) for figure in draw_file(path)]


def _text(found: dict[str, Any]) -> str:
    """The table: what each layer's keys and values lose alone, and what sparing them alone wins back."""
    whole = found["all_quantized"]
    rows = []
    for place in found["places"]:
        damage, rescue = place["damage"], place["rescue"]
        rows.append(
            [
                f"{'K' if place['kind'] == 'keys' else 'V'}{place['layer']}",
                f"{damage['kl']['mean']:.5f}",
                f"{damage['nll']['mean']:+.4f}",
                f"{damage['score']['mean']:+.3f}",
                f"{place['won']['mean']:+.5f}",
                f"{whole['score']['mean'] - rescue['score']['mean']:+.3f}",
            ]
        )
    rows.append(
        [
            "all",
            f"{whole['kl']['mean']:.5f}",
            f"{whole['nll']['mean']:+.4f}",
            f"{whole['score']['mean']:+.3f}",
            "",
            "",
        ]
    )
    lines = [table(rows, ["place", "damage KL", "NLL", "score lost", "rescue KL", "score won"])]
    lines += [
        f"protect {tried['protect']}: loses {tried['nll']['mean']:+.4f} "
        f"[{tried['nll']['low']:+.4f}, {tried['nll']['high']:+.4f}] nats a token, {tried['score']['mean']:+.3f} of the score"
        for tried in found["sets"]
    ]
    lines.append(
        f"{found['examples']} examples of {found['task']} at {found['context_tokens']} tokens ranked, "
        f"{found['examples']} others chose"
    )
    return "\n".join([*lines, found["verdict"]])

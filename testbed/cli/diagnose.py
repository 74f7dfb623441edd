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
    "--rule",
    type=click.Choice(["smallest", "published"]),
    default="smallest",
    show_default=True,
    help="The smallest set of keys and values that holds, or the layers that alone cost more than 3 % of the score.",
)
@click.option(
    "--scale",
    type=click.Choice(["group", "symmetric", "token"]),
    help="Of the others: one and a zero point for each group of 32 elements, the same without zero points, or one for each token "
    "and KV head.  [default: group; by the published rule: token]",
)
@click.option(
    "--high",
    type=click.Choice(["4", "8", "16"]),
    help="Bits of the protected.  [default: 8; by the published rule: 16]",
)
@click.option("--prompt", default="auto", show_default=True, help="As a run has it, such as chat:0.")
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
def diagnose(
    model: str, out: Path | None, bits: str, high: str | None, scale: str | None, **options: Any
) -> Any:
    """Find the layers of MODEL whose keys or values cannot stand few bits, and write what `mixed` protects."""
    from testbed.codecs.diagnosed import default_path
    from testbed.diagnosis import request
    from testbed.models.sources import resolve
    from testbed.tasks.prompt import parse_prompt
    from testbed.tasks.task import make_task

    by_layers = options["rule"] == "published"
    high, scale = high or ("16" if by_layers else "8"), scale or ("token" if by_layers else "group")
    if int(high) <= int(bits):
        raise UsageError(f"--high {high} must be more than --bits {bits}")
    name = resolve(model).name
    make_task(options["task"])
    parse_prompt(options["prompt"])
    path = out or default_path(name, int(bits), scale)
    settings = {"model": model, "bits": int(bits), "high": int(high), "scale": scale, **options}
    diagnosis = request.diagnosed(settings, lambda line: click.echo(line, err=True))
    request.write(path, diagnosis)
    figures = [] if by_layers else _draw(path)
    text = _text(diagnosis) + "".join(f"\n{what:<9} {where}" for what, where in [("file", path), *figures])
    return {**diagnosis, "file": str(path)}, text, 0


def _draw(path: Path) -> list[tuple[str, Path]]:
    from testbed.analysis.figures.layer_sensitivity import draw_file

    return [("plot", figure) for figure in draw_file(path)]


def _text(diagnosis: dict[str, Any]) -> str:
    """The tables: the forms of the coarse integers, and what layers cost."""
    from testbed.diagnosis.choose import best_form

    rows = [
        [
            form["codec"],
            f"{form['bits_per_element']:.2f}",
            _interval(form["nll"]),
            f"{form['score']['mean']:+.3f}",
            "yes" if form["holds"] else "no",
        ]
        for form in diagnosis["forms"]
    ]
    forms = table(rows, ["everywhere", "bits", "NLL lost", "score lost", "holds"])
    layers = _layers(diagnosis["published"]) if "published" in diagnosis else _places(diagnosis)
    counted = (
        f"{diagnosis['examples']} examples of {diagnosis['task']} at {diagnosis['context_tokens']} tokens"
    )
    if "published" not in diagnosis:
        counted += f" ranked, {diagnosis['examples']} others chose"
    return "\n".join([layers, counted, diagnosis["verdict"], "", forms, best_form(diagnosis["forms"]), ""])


def _interval(interval: dict[str, float]) -> str:
    return f"{interval['mean']:+.4f} [{interval['low']:+.4f}, {interval['high']:+.4f}]"


def _layers(rule: dict[str, Any]) -> str:
    """What each layer costs alone."""
    rows = [
        [str(layer["layer"]), f"{layer['costs']:+.1%}", f"{layer['kl']:.5f}", _interval(layer["nll"])]
        for layer in rule["each"]
    ]
    whole = ["all", f"{rule['whole_costs']:+.1%}", "", ""]
    size = (
        f"with the bottlenecks at 16 bits {rule['sizes']['without_scales']:.1%} of 16 bits are left, "
        f"{rule['sizes']['with_scales']:.1%} with scales"
    )
    return table([*rows, whole], ["layer", "score lost", "KL", "NLL lost"]) + f"\n{size}"


def _costs(summary: dict[str, Any]) -> list[str]:
    return [
        f"{summary['kl']['mean']:.5f}",
        f"{summary['nll']['mean']:+.4f}",
        f"{summary['score']['mean']:+.3f}",
    ]


def _places(diagnosis: dict[str, Any]) -> str:
    """What each layer's keys and values lose alone, what sparing them alone wins back, and the sets that were tried."""
    whole = diagnosis["all_quantized"]
    rows = []
    for place in diagnosis["places"]:
        won = whole["score"]["mean"] - place["rescue"]["score"]["mean"]
        name = f"{'K' if place['kind'] == 'keys' else 'V'}{place['layer']}"
        rows.append([name, *_costs(place["damage"]), f"{place['won']['mean']:+.5f}", f"{won:+.3f}"])
    rows.append(["all", *_costs(whole), "", ""])
    lines = [table(rows, ["place", "damage KL", "NLL", "score lost", "rescue KL", "score won"])]
    lines += [
        f"protect {tried['protect']}: loses {_interval(tried['nll'])} nats a token, {tried['score']['mean']:+.3f} of the score"
        for tried in diagnosis["sets"]
    ]
    return "\n".join(lines)

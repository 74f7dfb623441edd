"""Which layers' keys and values cannot stand few bits: damage and rescue of each, from a diagnosis file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from testbed.analysis.figures import NotInThisRun
from testbed.analysis.figures.style import BLUE, INK, ORANGE, Frame, bottom_legend, panel_title, style
from testbed.analysis.run import Run
from testbed.errors import SpecError

KINDS = {"keys": (BLUE, "", "keys"), "values": (ORANGE, "////", "values")}


def is_diagnosis(path: Path) -> bool:
    """Whether this is a JSON file, or a directory of such files that is no run's."""
    if path.is_dir():
        run = ("manifest.json", "trials.jsonl", "trials.parquet")
        return any(path.glob("*.json")) and not any((path / name).is_file() for name in run)
    return path.suffix == ".json" and path.is_file()


def draw_run(run: Run) -> Figure:
    """The diagnosis in a run's directory (`testbed guide` leaves one). Raises NotInThisRun where there is none."""
    from testbed.codecs.diagnosed import load_diagnosis

    path = run.path / "diagnosis.json"
    if not path.is_file():
        raise NotInThisRun(
            f"{run.path} has no diagnosis; layer_sensitivity draws one: testbed plot FILE, where `testbed diagnose` left it"
        )
    try:
        return draw(load_diagnosis(path))
    except SpecError as error:
        raise NotInThisRun(str(error)) from None


def draw_file(path: Path) -> list[Path]:
    """Draws ``layer_sensitivity`` beside a diagnosis file (or the ones in a directory); returns the PNG's and PDF's paths.

    Raises SpecError for a file that is no diagnosis; in a directory, such files are passed over.
    """
    from testbed.codecs.diagnosed import load_diagnosis

    files = [path] if path.is_file() else [p for p in sorted(path.glob("*.json")) if _reads(p)]
    if not files:
        raise SpecError(f"{path} has no file that `testbed diagnose` wrote")
    written = []
    for file in files:
        with style():
            figure = draw(load_diagnosis(file))
            for suffix in ("png", "pdf"):
                target = file.with_name(f"{file.stem}-layer_sensitivity.{suffix}")
                metadata = {"Software": None} if suffix == "png" else {"CreationDate": None}
                figure.savefig(target, metadata=metadata)
                written.append(target)
    return written


def _reads(path: Path) -> bool:
    from testbed.codecs.diagnosed import load_diagnosis

    try:
        load_diagnosis(path)
    except SpecError:
        return False
    return True


def draw(diagnosis: dict[str, Any]) -> Figure:
    """Two panels: the KL from the full cache that quantizing one place alone brings, and what sparing it alone wins back."""
    frame = Frame(
        title=f"What INT{diagnosis['bits']} does to each layer's keys and values",
        subtitle=(
            f"{diagnosis['model']} · {_codec(diagnosis)} · {diagnosis['task']} at {diagnosis['context_tokens']} tokens, "
            f"n = {diagnosis['examples']} examples\n{diagnosis['verdict']}"
        ),
        footnotes=[
            "KL of the next-token distributions along the gold answer, teacher-forced, from those of the full cache; bars: mean, "
            "lines: 95 % bootstrap interval over examples. Damage: this alone is quantized. Rescue: all else is.",
        ],
        rows=2,
        columns=1,
        panel=1.7,
        legend=0.3,
        left=0.75,
        between=0.4,
    )
    figure, axes = frame.figure()
    whole = diagnosis["all_quantized"]["kl"]["mean"]
    panel_title(axes[0], "damage", "only this one quantized")
    _bars(axes[0], diagnosis, "damage")
    panel_title(axes[1], "rescue", f"all but this one quantized; with all of them the KL is {whole:.4f}")
    _bars(axes[1], diagnosis, "won")
    axes[1].axhline(0, color=INK, linewidth=0.7)
    axes[0].set_ylabel("KL (nats a token)")
    axes[1].set_ylabel("won back (nats a token)")
    axes[1].set_xlabel("layer")
    bottom_legend(figure, frame, axes[0].get_legend_handles_labels()[0], 2)
    return figure


def _codec(diagnosis: dict[str, Any]) -> str:
    """The quantizer that was diagnosed, and what shares a scale where that is a token's whole key or value."""
    scale = " with one scale a token" if diagnosis.get("scale") == "token" else ""
    return f"int{diagnosis['bits']}{scale}"


def _bars(ax: Axes, diagnosis: dict[str, Any], which: str) -> None:
    """Keys and values beside each other. `which`: "damage", or "won" by sparing this one (paired with all quantized)."""
    for shift, (kind, (color, hatch, label)) in zip((-0.2, 0.2), KINDS.items(), strict=True):
        places = [place for place in diagnosis["places"] if place["kind"] == kind]
        layers = np.array([place["layer"] for place in places])
        intervals = [place["won"] if which == "won" else place["damage"]["kl"] for place in places]
        mean, low, high = ([interval[end] for interval in intervals] for end in ("mean", "low", "high"))
        ax.bar(
            layers + shift, mean, 0.38, color=color, hatch=hatch, edgecolor=INK, linewidth=0.4, label=label
        )
        ax.vlines(layers + shift, low, high, color=INK, linewidth=0.8)
    ax.set_xlim(-0.7, max(place["layer"] for place in diagnosis["places"]) + 0.7)
    ax.xaxis.set_major_locator(MaxNLocator(16, integer=True))
    ax.yaxis.set_major_formatter("{x:g}")
    ax.grid(axis="x", visible=False)

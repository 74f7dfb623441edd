"""Bits an element against what they cost, beside the least that a Gaussian of the same variances takes.

    python -m benchmarks.study_rates RUN [--examples 16] [--json]

RUN: of scenarios/study/grid.yaml, or what was kept of one; one model, one task, one length. Its rows have each setting's bits,
KL and ΔNLL. Distortions are measured on the first of its examples: the mean squared error of each layer's keys, and of its
values, under the setting. The bound is what reverse water-filling gives at that distortion: for a Gaussian of the channels'
variances as they were measured (within a context, about its own mean), and for one of the variances along the principal axes of
all heads together, which knows what channels have in common. Neither counts the means (16 bits a channel and context), nor
knows what neighbouring tokens have in common. Selectors drop tokens, and have no distortion.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import stats as scipy_stats
from torch import Tensor

from benchmarks.study_deltas import contexts
from testbed.analysis import comparisons
from testbed.analysis.claims.judges import codecs
from testbed.analysis.run import Run, load
from testbed.codecs.codec import Codec, decode
from testbed.errors import UsageError
from testbed.models.kvcache import KVCache
from testbed.models.loading import load_model
from testbed.stats.rate_distortion import gaussian_bits

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Source:
    """A layer's keys or values as a Gaussian: variances of its channels, and along its principal axes."""

    channels: Floats
    axes: Floats

    @property
    def variance(self) -> float:
        """The mean of the channels'."""
        return float(self.channels.mean())


def parts(cache: KVCache) -> list[Floats]:
    """Keys and values of each layer, [tokens, heads · dim]."""
    held = (part for layer in cache.layers for part in (layer.keys, layer.values))
    return [_flat(part) for part in held]


def _flat(part: Tensor) -> Floats:
    """[heads, tokens, dim] -> [tokens, heads · dim]"""
    return np.asarray(part.transpose(0, 1).flatten(1).double().cpu().numpy(), dtype=np.float64)


def sources(caches: Iterable[KVCache]) -> list[Source]:
    """Each part's, its covariance within a context averaged over contexts."""
    within = [[np.cov(x, rowvar=False, bias=True) for x in parts(cache)] for cache in caches]
    mean = [np.mean(covariances, axis=0) for covariances in zip(*within, strict=True)]
    return [Source(np.diag(each).copy(), np.linalg.eigvalsh(each).clip(min=0)) for each in mean]


def distortions(caches: Iterable[KVCache], codec: Codec) -> list[float]:
    """Each part's mean squared error, over all contexts."""
    errors = []
    for cache in caches:
        after = decode(codec.encode(cache, None))
        both = zip(parts(cache), parts(after), strict=True)
        errors.append([float(((x - y) ** 2).mean()) for x, y in both])
    return [fmean(column) for column in zip(*errors, strict=True)]


def bound(own: list[Source], lost: list[float]) -> dict[str, float]:
    """Means over parts: decibels between variance and distortion, and the least bits an element, by channels and by axes. What
    arrives as it was (layers that are kept at 16 bits) counts with these bits, and has no decibels.
    """
    pairs = list(zip(own, lost, strict=True))
    return {
        "snr_db": fmean(10 * math.log10(part.variance / error) for part, error in pairs if error),
        "channels": fmean(gaussian_bits(part.channels, error) if error else 16 for part, error in pairs),
        "axes": fmean(gaussian_bits(part.axes, error) if error else 16 for part, error in pairs),
    }


def measure(run: Run, count: int) -> list[dict[str, Any]]:
    """A line a setting, the fewest bits last. Raises UsageError for a run of several models, tasks or lengths."""
    table = comparisons.by_example(run.require().rows)
    if len(table[["model", "task"]].drop_duplicates()) > 1:
        raise UsageError(f"{run.path}: several models, tasks or lengths; keep one of them with --where")
    settings = run.manifest["settings"]
    tokens, name = settings["context_tokens"], table["model"].iloc[0]
    length = tokens[0] if isinstance(tokens, list) else tokens
    model = load_model(name, threads=settings["threads"])
    written = settings["tasks"][0]
    caches = list(contexts(model, written, length, count, settings["seed"], run.manifest["prompt"]))
    own, lines = sources(caches), []
    for spec, setting in codecs(table).items():
        rows = comparisons.pairs(table, setting)
        compared = comparisons.compare(rows, name, "", setting, comparisons.FULL)
        line: dict[str, Any] = {
            "setting": setting.removesuffix("+fp16"),
            "bits": float((16 * rows["payload_bytes"] / rows["kv_bytes"]).mean()),
            "nll": compared.nll.value,
            "nll_low": compared.nll.low,
            "nll_high": compared.nll.high,
            "kl": compared.kl.value,
            "n": compared.nll.n,
        }
        if spec.selector is None:
            line |= bound(own, distortions(caches, Codec(spec, name)))
        lines.append(line)
    return sorted(lines, key=lambda line: -line["bits"])


def slope(lines: list[dict[str, Any]]) -> tuple[float, float, int]:
    """Of log KL on log distortion over the settings that have both (1: KL is proportional to it), its correlation, and their
    number."""
    both = [line for line in lines if "snr_db" in line and line["kl"] > 0]
    x, y = [-line["snr_db"] / 10 for line in both], [math.log10(line["kl"]) for line in both]
    fit = scipy_stats.linregress(x, y)
    return float(fit.slope), float(fit.rvalue), len(both)


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--where", help="only rows for which this holds")
    parser.add_argument("--examples", type=int, default=16)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    lines = measure(load(options.run, options.where), options.examples)
    if options.json:
        print(json.dumps(lines, indent=1))
        return
    print("| setting | n | bits | signal to noise, dB | bound: channels | bound: axes | ΔNLL | KL |")
    print("|---|--:|--:|--:|--:|--:|--:|--:|")
    for line in lines:
        kinds = (("snr_db", ".1f"), ("channels", ".2f"), ("axes", ".2f"))
        cells = " | ".join(f"{line[key]:{form}}" if key in line else "–" for key, form in kinds)
        nll = f"{line['nll']:+.3f} [{line['nll_low']:+.3f}, {line['nll_high']:+.3f}]"
        print(
            f"| `{line['setting']}` | {line['n']} | {line['bits']:.2f} | {cells} | {nll} | {line['kl']:.4f} |"
        )
    print(
        "\nlog KL on log distortion: slope {:.2f}, correlation {:.2f} over {} settings".format(*slope(lines))
    )


if __name__ == "__main__":
    main()

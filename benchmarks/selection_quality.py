"""What codecs cost and what a model can still answer from what they leave: one table of methods, models and tasks.

    python -m benchmarks.selection_quality [CODEC…] [--models NAME…] [--tasks needle passages] [--context 256] [--examples 30]
        [--no-answers] [--rows FILE] [--figure FILE] [--json]
    python -m benchmarks.selection_quality --tasks 'qa(path=FILE)'      questions of a file, as SQuAD's
    python -m benchmarks.selection_quality --grid --no-answers          every selector at three ratios

Runs in one process, without a network: each context's cache is selected, encoded, decoded and asked, as the two sides of a
`split` placement do. With --rows what is measured is kept there, a line an example and codec, and found again by the next call,
which measures only what is missing: a long table is made in pieces.

bytes and bit/el are of the whole payload, over the elements of the full cache. ΔNLL and KL are of the gold answer's tokens,
against the full cache's; `exact` is the share of examples in which greedy decoding writes them (each is the likeliest behind
the true ones), which needs no decoding; `found` is the share of the answer's tokens in the context (its last occurrence there)
that were kept, over layers and heads. enc and dec are the processor's milliseconds, all threads together, medians: what else
the machine does counts little. Brackets are 95 % bootstrap intervals of the mean over examples. A star is on the Pareto front:
nothing else has as few bytes and as little KL.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch

from testbed.codecs.codec import Codec, decode
from testbed.codecs.evidence import Evidence, Kept, Needs, gather, prefill_for
from testbed.diagnosis.choose import Interval, interval
from testbed.models.kvcache import KVCache, join
from testbed.models.language import LanguageModel
from testbed.models.likelihood import mean_kl, mean_nll
from testbed.models.loading import load_model
from testbed.tasks import Task, parse_task
from testbed.tasks.task import Example

CODECS = [
    # Everything travels; from fine to coarse, each with what makes it comparable at fewer bytes.
    "fp16", "lossless", "int8", "fp8", "planes", "int8+zstd", "int8+lz4", "int8+ans", "int4", "int4(group=64)", "int4(group=0)",
    "int4(group=0, symmetric=true)", "int4+zstd", "int4+lz4", "int4+ans", "delta+int4", "delta+int4+ans", "int3", "int3+ans",
    "int2", "int2+ans", "kivi", "kivi(residual=32)", "normsep", "normsep+ans", "turbo", "turbo(outliers=0)", "turbo(bits=3)",
    "kvquant", "think", "think(of=int4)", "mixed(protect=K23)", "cachegen(level=1)", "cachegen", "cachegen(level=3)",
    "cachegen(level=4)", "cachegen(anchor=10)", "lowrank", "kvtc", "gear", "best(bits=2.25, plan=none)",
    "best(bits=3.5, plan=none)",
    # A quarter of the tokens.
    "oracle@0.25", "q2c@0.25", "q2c@0.25(pool=1)", "snapkv@0.25(question=true)", "snapkv@0.25", "tova@0.25", "expected@0.25",
    "h2o@0.25", "h2o@0.25(normalised=true)", "keynorm@0.25", "pyramid@0.25", "adaptive@0.25", "adaptive@0.25(by=q2c)",
    "window@0.25", "random@0.25", "keydiff@0.25", "lagkv@0.25", "leverage@0.25", "compactor@0.25", "simlayer@0.25",
    "qfilters@0.25", "kvzip@0.25", "perhead@0.25(by=kvzip, floor=0)", "finch@0.25", "chunk@0.25(by=q2c)",
    "critical@0.25(by=q2c)", "perlayer@0.25(by=q2c)", "rerotate@0.25(by=q2c)", "merge@0.25(by=q2c)",
    "merge@0.25(by=q2c, form=cam)",
]  # fmt: skip
GRID = [
    f"{name}@{ratio}{settings}"
    for name, settings in [
        ("oracle", ""), ("q2c", ""), ("q2c", "(pool=1, scope=global)"), ("snapkv", "(question=true)"),
        ("adaptive", "(by=q2c)"), ("snapkv", ""), ("tova", ""), ("expected", ""), ("h2o", ""), ("h2o", "(normalised=true)"),
        ("pyramid", ""), ("adaptive", ""), ("keynorm", ""), ("window", ""), ("random", ""),
    ]
    for ratio in (0.1, 0.25, 0.5)
]  # fmt: skip

Row = dict[str, Any]
T = TypeVar("T")


@dataclass(frozen=True)
class Quality:
    """What is left of one example's answer. more_nll, kl: nats a token of the gold one; score: None where none is asked for."""

    more_nll: float
    kl: float
    exact: float
    score: float | None


class Asked:
    """An example whose context is prefilled once, and the full cache's answer to compare with.

    needs: of all codecs that will be measured. answers: whether the score is asked for, too.
    """

    def __init__(
        self,
        model: LanguageModel,
        task: Task,
        example: Example,
        prefix: KVCache | None,
        needs: Needs,
        answers: bool = True,
    ):
        self.model, self.task, self.example, self.prefix, self._needs = model, task, example, prefix, needs
        context = task.context_text(example)
        self.question = model.tokenize(task.question_text(example))
        self.gold = model.tokenize(task.answer_text(example))
        self.context = prefill_for(model, needs, model.tokenize(context), prefix)
        self.cache = model.knowing_ropes(self.context.cache)
        full = self._behind(self.context.cache)
        self._reference = model.likelihood(self.question, self.gold, full)
        self._standing = _answer_tokens(model, context, example.answers[0])
        self._answer: list[int] = []
        self.full_score: float | None = None
        if answers:
            # Through what ends it: a cache along which each of its tokens comes next answers alike.
            self._answer = self._through_stop(model.generate(self.question, full, task.max_new_tokens, None))
            self.full_score = self._score(self._answer)

    @cached_property
    def evidence(self) -> Evidence:
        """Of which each codec takes its own."""
        question = self.prefix, self.context, self.question, self.gold
        return gather(self.model, self._needs, *question, self.example.id)

    def row(self, codec: Codec) -> Row:
        """Bytes, times and quality of the context sent by this codec."""
        kept = codec.select(self.evidence) if codec.selects else None
        payload, encode_s = _timed(lambda: codec.encode(self.cache, kept))
        cache, decode_s = _timed(lambda: decode(payload))
        return {
            "bytes": len(payload),
            "bits": len(payload) * 16 / self.cache.nbytes,
            "found": _share_found(kept, self._standing),
            "encode_ms": 1000 * encode_s,
            "decode_ms": 1000 * decode_s,
            **vars(self.quality(cache)),
        }

    def quality(self, cache: KVCache) -> Quality:
        """Of the answer behind this cache of the context."""
        past = self._behind(cache)
        found = self.model.likelihood(self.question, self.gold, past)
        more = mean_nll(found, self.gold) - mean_nll(self._reference, self.gold)
        exact = float(found.argmax(-1).tolist() == self.gold)
        return Quality(more, mean_kl(self._reference, found), exact, self._score_of(past))

    def _behind(self, cache: KVCache) -> KVCache:
        return cache if self.prefix is None else join(self.prefix, cache)

    def _score_of(self, past: KVCache) -> float | None:
        if self.full_score is None:
            return None
        answer = self._answer if self._ends(self._answer) else []
        if answer and self.model.likelihood(self.question, answer, past).argmax(-1).tolist() == answer:
            return self.full_score
        return self._score(self.model.generate(self.question, past, self.task.max_new_tokens, self.task.stop))

    def _score(self, ids: list[int]) -> float:
        return self.task.score(self.model.text(ids, self.task.stop), self.example)["score"]

    def _through_stop(self, ids: list[int]) -> list[int]:
        return next((ids[:end] for end in range(1, len(ids)) if self._ends(ids[:end])), ids)

    def _ends(self, ids: list[int]) -> bool:
        return len(ids) >= self.task.max_new_tokens or self.task.stop in self.model.text(ids)


def _timed(work: Callable[[], T]) -> tuple[T, float]:
    """What it gives, and the processor's seconds, of all threads."""
    started = time.process_time()
    result = work()
    return result, time.process_time() - started


def _answer_tokens(model: LanguageModel, context: str, answer: str) -> list[int]:
    """Indices of the context's tokens that spell the answer where it stands last; none where it does not stand."""
    at = context.rfind(answer)
    before, through = (len(model.tokenize(context[:end])) for end in (at, at + len(answer)))
    return list(range(before, through)) if at >= 0 else []


def _share_found(kept: Kept | None, wanted: list[int]) -> float | None:
    """The share of `wanted` that the pruned layers' heads kept; None where the context does not say the answer."""
    index = torch.tensor(wanted)
    rows = [
        row
        for layer in (kept.layers if kept else ())
        if layer is not None
        for row in (layer if layer.dim() == 2 else layer[None])
    ]
    if not wanted:
        return None
    return statistics.fmean(float(torch.isin(index, row).float().mean()) for row in rows) if rows else 1.0


def asked(
    model: LanguageModel, task: Task, context: int | None, count: int, seed: int, needs: Needs, answers: bool
) -> Iterator[tuple[str, Callable[[], Asked]]]:
    """Each example's id, and what prefills it."""
    ids = model.tokenize(task.prefix, start=True)
    prefix = model.prefill(ids, None).cache if ids else None
    for example in task.examples(count, context, lambda text: len(model.tokenize(text)), seed):
        yield (
            example.id,
            lambda example=example: Asked(model, task, example, prefix, needs, answers),  # type: ignore[misc]
        )


class Rows:
    """Rows in a file of JSON lines (None: in memory alone), each found by what was measured."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self.all: list[Row] = []
        if path is not None and path.exists():
            lines = path.read_text(encoding="utf-8").split("\n")[
                :-1
            ]  # a line that was cut off is measured again
            self.all = [json.loads(line) for line in lines]
        self._known = {_place(row): row for row in self.all}

    def has(self, place: Row, answers: bool) -> bool:
        """Whether there is a row of this place, with a score where that is asked for."""
        row = self._known.get(_place(place))
        return row is not None and not (answers and row["score"] is None)

    def add(self, row: Row) -> None:
        """One more, kept at once."""
        self.all.append(row)
        self._known[_place(row)] = row
        if self._path is not None:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")

    def latest(self) -> list[Row]:
        """The last of each place."""
        return list(self._known.values())


def _place(row: Row) -> tuple[Any, ...]:
    return tuple(row[name] for name in ("model", "task", "context", "seed", "example", "codec"))


def measure(
    rows: Rows,
    models: list[str],
    tasks: list[Task],
    codecs: list[str],
    context: int,
    count: int,
    seed: int,
    answers: bool,
) -> list[Row]:
    """A row for each model, task, example and codec: those of the file, and those that are missing there."""
    wanted: list[tuple[Any, ...]] = []
    for name in models:
        model = load_model(name)
        made = {text: Codec(text, model.name) for text in codecs}
        needs = Needs.of_all(codec.needs for codec in made.values())
        for task in tasks:
            for number, (example, prefill) in enumerate(
                asked(model, task, context or None, count, seed, needs, answers)
            ):
                place = {
                    "model": model.name,
                    "task": task.label,
                    "context": context,
                    "seed": seed,
                    "example": example,
                }
                places = {text: {**place, "codec": str(codec), "asked": text} for text, codec in made.items()}
                wanted += map(_place, places.values())
                missing = [text for text, own in places.items() if not rows.has(own, answers)]
                held = prefill() if missing else None
                for text in missing:
                    assert held is not None
                    rows.add({**places[text], "full_score": held.full_score, **held.row(made[text])})
                print(f"{model.name}, {task.label}: {number + 1} of {count}", file=sys.stderr)
    return [row for row in rows.latest() if _place(row) in set(wanted)]


def summary(rows: Iterable[Row]) -> list[Row]:
    """A row a model, task and codec: means over examples with their intervals, the smallest payload first."""
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["model"], row["task"], row["asked"]), []).append(row)
    found = []
    for (model, task, codec), own in groups.items():
        figures = {
            name: interval(values)
            for name in ("bytes", "bits", "more_nll", "kl", "exact", "found", "score", "full_score")
            if (values := [row[name] for row in own if row[name] is not None])
        }
        times = {name: statistics.median(row[name] for row in own) for name in ("encode_ms", "decode_ms")}
        found.append({"model": model, "task": task, "codec": codec, "n": len(own), **figures, **times})
    for row in found:
        rivals = [other for other in found if (other["model"], other["task"]) == (row["model"], row["task"])]
        row["front"] = not any(_beats(other, row) for other in rivals)
    return sorted(found, key=lambda row: (row["model"], row["task"], row["bytes"].mean))


def _beats(other: Row, row: Row) -> bool:
    """Whether one has as few bytes and as little KL, and less of either."""
    theirs, ours = ((each["bytes"].mean, each["kl"].mean) for each in (other, row))
    return theirs != ours and all(a <= b for a, b in zip(theirs, ours, strict=True))


def against(rows: list[Row], method: str) -> list[Row]:
    """Of each codec what the largest `method` that has no more bytes does better, pair by pair; less is better."""
    by_codec: dict[tuple[str, str, str], dict[str, Row]] = {}
    for row in rows:
        by_codec.setdefault((row["model"], row["task"], row["asked"]), {})[row["example"]] = row
    size = {key: statistics.fmean(row["bytes"] for row in own.values()) for key, own in by_codec.items()}
    found = []
    for key, theirs in by_codec.items():
        ours = [
            other
            for other in by_codec
            if other[:2] == key[:2] and other[2].startswith(method) and size[other] <= size[key]
        ]
        if key[2].startswith(method) or not ours:
            continue
        best = max(ours, key=size.__getitem__)
        pairs = [
            (by_codec[best][example], row) for example, row in theirs.items() if example in by_codec[best]
        ]
        less = {name: interval([a[name] - b[name] for a, b in pairs]) for name in ("more_nll", "kl")}
        found.append(
            {"model": key[0], "task": key[1], "codec": key[2], "ours": best[2], "n": len(pairs), **less}
        )
    return found


def print_table(found: list[Row]) -> None:
    """Markdown: of each model and task the codecs from the smallest payload on."""
    answered = any("score" in row for row in found)
    heads = [
        "codec",
        "bytes",
        "bit/el",
        "KL",
        "ΔNLL",
        "exact",
        *(["score"] if answered else []),
        "found",
        "enc ms",
        "dec ms",
    ]
    title = None
    for row in found:
        if title != (row["model"], row["task"]):
            title = row["model"], row["task"]
            full = f", the full cache's score {row['full_score'].mean:.2f}" if answered else ""
            print(f"\n{row['model']}, {row['task']}, n = {row['n']}{full}\n")
            print("| " + " | ".join(heads) + " |\n|---|" + "--:|" * (len(heads) - 1))
        shown = [
            ("★ " if row["front"] else "") + f"`{row['codec']}`",
            f"{row['bytes'].mean:.0f}",
            f"{row['bits'].mean:.2f}",
            _spread(row["kl"], "{:.4f}"),
            _spread(row["more_nll"], "{:+.3f}"),
            f"{row['exact'].mean:.2f}",
            *([f"{row['score'].mean:.2f}"] if answered else []),
            f"{row['found'].mean:.2f}" if "found" in row else "",
            f"{row['encode_ms']:.0f}",
            f"{row['decode_ms']:.0f}",
        ]
        print("| " + " | ".join(shown) + " |")


def _spread(found: Interval, form: str) -> str:
    """A mean and its 95 % interval."""
    return f"{form} ({form} to {form})".format(found.mean, found.low, found.high)


def draw(found: list[Row], path: Path, mark: str) -> None:
    """KL over bits an element, a panel a model and task: the front joined and named, codecs that begin with `mark` apart."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    titles = list(dict.fromkeys((row["model"], row["task"]) for row in found))
    figure, axes = pyplot.subplots(
        1, len(titles), figsize=(7.5 * len(titles), 5.5), squeeze=False, layout="constrained"
    )
    for axis, title in zip(axes[0], titles, strict=True):
        own = [row for row in found if (row["model"], row["task"]) == title and row["kl"].mean > 0]
        front = [row for row in own if row["front"]]
        axis.plot(*_at(front), color="0.5", linewidth=1, zorder=1)
        for colour, name, which in (
            ("tab:blue", "codecs", [row for row in own if not (mark and row["codec"].startswith(mark))]),
            ("tab:red", mark, [row for row in own if mark and row["codec"].startswith(mark)]),
        ):
            if which:
                axis.scatter(*_at(which), s=16, color=colour, label=name, zorder=2)
        for row in front:
            axis.annotate(
                row["codec"],
                (row["bits"].mean, row["kl"].mean),
                (3, 3),
                textcoords="offset points",
                fontsize=7,
            )
        axis.set(
            xscale="log",
            yscale="log",
            xlabel="bits an element",
            ylabel="KL (nats a token)",
            title=", ".join(title),
        )
        ticks = [1, 2, 3, 4, 5, 6, 8, 12, 16]
        axis.set_xticks(ticks, [str(tick) for tick in ticks])
        axis.minorticks_off()
        axis.legend(frameon=False)
    figure.savefig(path, dpi=130)


def _at(rows: list[Row]) -> tuple[list[float], list[float]]:
    return [row["bits"].mean for row in rows], [row["kl"].mean for row in rows]


def main() -> None:
    """Parse arguments, measure what is missing, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("codecs", nargs="*", metavar="CODEC")
    parser.add_argument("--grid", action="store_true", help="every selector at 0.1, 0.25 and 0.5 instead")
    parser.add_argument("--models", nargs="+", default=["smollm2-135m"])
    parser.add_argument("--tasks", nargs="+", default=["needle"])
    parser.add_argument("--context", type=int, default=512, help="tokens; 0: as long as they are")
    parser.add_argument("--examples", type=int, default=10, help="of each task")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-answers", action="store_true", help="NLL and KL alone, which are faster")
    parser.add_argument("--rows", type=Path, help="where rows are kept, and found again")
    parser.add_argument(
        "--against", metavar="METHOD", default="", help="compare it with each codec at no more bytes"
    )
    parser.add_argument("--figure", type=Path, metavar="FILE")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()

    rows = measure(
        Rows(options.rows),
        options.models,
        [parse_task(text) for text in options.tasks],
        GRID if options.grid else options.codecs or CODECS,
        options.context,
        options.examples,
        options.seed,
        not options.no_answers,
    )
    found = summary(rows)
    pairs = against(rows, options.against) if options.against else []
    if options.figure:
        draw(found, options.figure, options.against)
    if options.json:
        print(json.dumps({"rows": found, "against": pairs}, default=vars))
        return
    print(f"contexts of {options.context} tokens, seed {options.seed}")
    print_table(found)
    for pair in pairs:
        differences = f"KL {_spread(pair['kl'], '{:+.4f}')}, ΔNLL {_spread(pair['more_nll'], '{:+.3f}')}"
        print(
            f"{pair['model']}, {pair['task']}: {pair['ours']} less {pair['codec']}: {differences}, n = {pair['n']}"
        )


if __name__ == "__main__":
    main()

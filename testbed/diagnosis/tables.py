"""Counts frequency tables for `ans(table=…)`: how often each channel of each layer has each symbol, over a task's contexts.

    python -m testbed.diagnosis.tables MODEL CODEC [--task needle] [--examples 8] [--context-tokens 512] [--seed 1]
        [--prompt auto] [--out FILE]

CODEC is the one that they are for, such as int4. Prints their name, which both sides must know them by, and their file. Runs
take seed 0: other examples than those that are counted here.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from testbed import files
from testbed.codecs.codec import Codec
from testbed.codecs.entropy import tables
from testbed.codecs.entropy.ans import rows_by_channel
from testbed.codecs.steps import Part
from testbed.endpoints.examples import prompted
from testbed.errors import SpecError, TestbedError
from testbed.models.kvcache import KVCache
from testbed.models.language import LanguageModel
from testbed.models.loading import load_model
from testbed.models.prefill import Prefill
from testbed.tasks import parse_task
from testbed.tasks.prompt import Prompted, parse_prompt
from testbed.tasks.task import Example

Counts = dict[int, tuple[int, Part, npt.NDArray[np.int64]]]


def add_counts(counts: Counts, codec: Codec, cache: object) -> None:
    """Adds a cache's symbols, channel by channel. Raises SpecError where a codec's symbols are not those of channels."""
    for at, (piece, symbols) in enumerate(codec.symbols(cache)):  # type: ignore[arg-type]
        rows = rows_by_channel(piece, symbols.cpu().numpy())
        if rows is None:
            raise SpecError(
                f"{codec}: its symbols do not belong to channels, so there are no tables for them"
            )
        width = 1 << piece.bits
        own = np.stack([np.bincount(row, minlength=width) for row in rows]).astype(np.int64)
        before = counts.get(at)
        counts[at] = (piece.bits, piece.part, own if before is None else before[2] + own)


def with_contexts(parser: argparse.ArgumentParser) -> None:
    """Adds what `prefilled` goes by: the task, its examples, and where a copy goes."""
    parser.add_argument("--task", default="needle")
    parser.add_argument("--examples", type=int, default=8)
    parser.add_argument("--context-tokens", type=int, default=512)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--prompt", default="auto", help="of the run that they are for")
    parser.add_argument("--out", type=Path, metavar="FILE", help="another copy, for another machine")


def prepared(
    options: argparse.Namespace,
) -> tuple[LanguageModel, Prompted, KVCache | None, list[Example], str]:
    """The model, the task in its prompt, its prefix's cache, the examples, and in words what that is."""
    plain, prompt = parse_task(options.task), parse_prompt(options.prompt)
    model = load_model(options.model)
    task = prompted(model, plain, str(prompt or "auto"))
    ids, length = model.tokenize(task.prefix, start=True), lambda text: len(model.tokenize(text))
    examples = task.examples(options.examples, options.context_tokens, length, options.seed)
    model.expect(task.reach(examples, length, len(ids), task.max_new_tokens))
    prefix = model.prefill(ids, None).cache if ids else None
    of = (
        f"{options.model}, {options.task} in prompt {task.prompt}, "
        f"{options.examples} contexts of {options.context_tokens} tokens"
    )
    return model, task, prefix, examples, of


def prefilled(
    options: argparse.Namespace, queries: int | None
) -> tuple[LanguageModel, str, Iterator[Prefill]]:
    """The model, in words what is prefilled, and the prefill of each context behind the task's prefix, with so many queries."""
    model, task, prefix, examples, of = prepared(options)
    contexts = (
        model.prefill(model.tokenize(task.context_text(example)), prefix, queries) for example in examples
    )
    return model, of, contexts


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns its exit status."""
    parser = argparse.ArgumentParser(description="Count frequency tables for ans(table=FILE).")
    parser.add_argument("model")
    parser.add_argument("codec")
    with_contexts(parser)
    options = parser.parse_args(arguments)
    try:
        name, path = counted(options)
    except TestbedError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"tables {name}\nfile   {path}\ncodec  {options.codec}+ans(table={name})")
    return 0


def counted(options: argparse.Namespace) -> tuple[str, Path]:
    """Prefills each context behind the task's prefix, counts, and keeps the tables: their name and file."""
    codec = Codec(options.codec, options.model)
    model, of, contexts = prefilled(options, queries=0)
    counts: Counts = {}
    for context in contexts:
        add_counts(counts, codec, model.knowing_ropes(context.cache))
    kept = tables.count(f"{codec} on {of}", [counts[at] for at in sorted(counts)])
    name, path = tables.KEPT.save(kept)
    if options.out:
        files.replace(options.out, path.read_bytes())
    return name, options.out or path


if __name__ == "__main__":
    sys.exit(main())

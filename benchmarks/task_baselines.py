"""How well a model answers the tasks with its full cache: EM, F1 and the gold answer's NLL, by plain transformers.

    python benchmarks/task_baselines.py DIRECTORY --task needle --task passages --tokens 256 --tokens 512 --examples 20

The testbed's own model code takes no part, so these figures also check it. Intervals: 95 %, Student's t over examples.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from typing import Any

import scipy.stats
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from testbed.tasks import Task, parse_task


def answer_and_nll(
    model: Any, tokenizer: Any, ids: list[int], gold: list[int], stop: str, most: int
) -> tuple[str, float]:
    """The greedy continuation of `ids`, up to `stop` or `most` tokens, and `gold`'s mean NLL in nats a token."""
    out = model(torch.tensor([ids]), use_cache=True, logits_to_keep=1)
    taught = (
        model(torch.tensor([gold[:-1]]), past_key_values=copy.deepcopy(out.past_key_values)).logits[0]
        if len(gold) > 1
        else out.logits[0, :0]
    )
    logits = torch.cat([out.logits[0], taught]).float()
    nll = float(torch.nn.functional.cross_entropy(logits, torch.tensor(gold)))
    answer: list[int] = []
    while len(answer) < most:
        token = int(out.logits[0, -1].argmax())
        answer.append(token)
        if token == tokenizer.eos_token_id or stop in tokenizer.decode(answer):
            break
        out = model(torch.tensor([[token]]), past_key_values=out.past_key_values, use_cache=True)
    return tokenizer.decode(answer, skip_special_tokens=True).split(stop)[0], nll


def choose(model: Any, tokenizer: Any, ids: list[int], options: list[list[int]]) -> int:
    """Which option is likeliest per token behind `ids`."""
    past = model(torch.tensor([ids]), use_cache=True, logits_to_keep=1)
    nlls = []
    for option in options:
        logits = past.logits[0]
        if len(option) > 1:
            held = copy.deepcopy(past.past_key_values)
            logits = torch.cat([logits, model(torch.tensor([option[:-1]]), past_key_values=held).logits[0]])
        nlls.append(float(torch.nn.functional.cross_entropy(logits.float(), torch.tensor(option))))
    return nlls.index(min(nlls))


def interval(values: list[float]) -> float:
    """Half the width of the mean's 95 % interval."""
    if len(values) < 2:
        return float("nan")
    factor = scipy.stats.t.ppf(0.975, len(values) - 1)
    return float(factor * statistics.stdev(values) / len(values) ** 0.5)


def measure(
    model: Any, tokenizer: Any, task: Task, tokens: int | None, count: int, seed: int, show: bool
) -> dict[str, Any]:
    """One row of figures: a task at a context length."""

    def encode(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    start = (
        []
        if tokenizer.bos_token_id is None or not tokenizer("x")["input_ids"]
        else tokenizer("")["input_ids"]
    )
    prefix = list(start) + encode(task.prefix)
    rows, lengths = [], []
    began = time.monotonic()
    examples = task.examples(count, tokens, lambda text: len(encode(text)), seed)
    for number, example in enumerate(examples):
        # The floor: the same question with the context of an example that does not hold this answer.
        others = [e for e in examples if example.answers[0].lower() not in e.context.lower()]
        other = others[number % len(others)] if others else example
        figures_of: dict[str, dict[str, float]] = {}
        for what, shown in (("", example), ("floor", other)):
            context = encode(task.context_text(shown))
            ids = prefix + context + encode(task.question_text(example))
            gold = encode(task.answer_text(example))
            answer, nll = answer_and_nll(model, tokenizer, ids, gold, task.stop, task.max_new_tokens)
            if example.choices:
                options = [encode(text) for text in task.choice_texts(example)]
                answer = example.choices[choose(model, tokenizer, ids, options)]
            figures_of[what] = {**task.score(answer, example), "nll": nll}
            if not what:
                said = answer
        answer, context = said, encode(task.context_text(example))
        scores = {
            **figures_of[""],
            "floor": figures_of["floor"]["score"],
            "floor_nll": figures_of["floor"]["nll"],
        }
        rows.append(scores)
        lengths.append(len(context))
        if show:
            print(
                f"  {scores['f1']:.2f} {example.question}  {answer.strip()!r}  ({example.answers[0]})",
                flush=True,
            )
    figures = {key: statistics.mean(row[key] for row in rows) for key in rows[0]}
    widths = {f"{key}_ci": interval([row[key] for row in rows]) for key in figures}
    return {
        "task": task.label,
        "asked_tokens": tokens,
        "context_tokens": round(statistics.mean(lengths)),
        "prefix_tokens": len(prefix),
        "n": len(rows),
        **figures,
        **widths,
        "seconds_an_example": (time.monotonic() - began) / len(rows),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="a directory or hub id that transformers loads")
    parser.add_argument(
        "--task", action="append", help="as in a scenario: needle or '{task: needle, needles: 4}'"
    )
    parser.add_argument(
        "--tokens", action="append", type=int, help="context length; 0 takes contexts as they are"
    )
    parser.add_argument("--examples", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--show", action="store_true", help="print every question and answer")
    parser.add_argument("--json", action="store_true", help="one object a row instead of a table")
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    with torch.inference_mode():
        for written in args.task or ["needle", "passages"]:
            for tokens in args.tokens or [256, 512]:
                task = parse_task(yaml.safe_load(written))
                row = measure(model, tokenizer, task, tokens or None, args.examples, args.seed, args.show)
                if args.json:
                    print(json.dumps(row), flush=True)
                    continue
                figures = "  ".join(
                    f"{key} {row[key]:.2f} ± {row[key + '_ci']:.2f}"
                    for key in ("score", "floor", "em", "f1", "nll", "floor_nll")
                )
                print(
                    f"{row['task']:28} {row['context_tokens']:6} tokens  n {row['n']}  {figures}  "
                    f"{row['seconds_an_example']:.1f} s each",
                    flush=True,
                )


if __name__ == "__main__":
    main()

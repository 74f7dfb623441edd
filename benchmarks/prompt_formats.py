"""Which prompt format a model answers best in, with its full cache: score and the gold answer's NLL of each.

    python benchmarks/prompt_formats.py smollm2-135m --task passages --task choice --tokens 256 --examples 30

Intervals: 95 %, Student's t over examples. All formats see the same examples. NLL compares formats only roughly: in a chat
the answer has other tokens (no space before it).
"""

from __future__ import annotations

import argparse
import json
import statistics
from typing import Any

import yaml

from benchmarks.task_baselines import interval
from testbed.errors import UsageError
from testbed.models.language import LanguageModel
from testbed.models.loading import load_model
from testbed.tasks import parse_task
from testbed.tasks.prompt import Prompted, choose_prompt

FORMATS = ("plain:0", "plain:1", "plain:2", "chat:0", "chat:2")


def measure(model: LanguageModel, task: Prompted, count: int, tokens: int) -> dict[str, Any]:
    """One format's figures on `count` examples."""
    prefix_ids = model.tokenize(task.prefix, start=True)
    prefix = model.prefill(prefix_ids, None).cache if prefix_ids else None
    scores, nlls = [], []
    for example in task.examples(count, tokens, lambda text: len(model.tokenize(text)), 0):
        context = model.prefill(model.tokenize(task.context_text(example)), prefix).cache
        past = context if prefix is None else model.join(prefix, context)
        question = model.tokenize(task.question_text(example), closing=task.closing)
        choices = task.choice_texts(example)
        if choices:
            found = model.option_nlls(question, [model.tokenize(choice) for choice in choices], past)
            answer = choices[found.index(min(found))]
        else:
            answer = model.text(model.generate(question, past, task.max_new_tokens, task.stop), task.stop)
        scores.append(task.score(answer, example)["score"])
        nlls.append(model.nll(question, model.tokenize(task.answer_text(example)), past))
    return {
        "task": task.label,
        "prompt": str(task.prompt),
        "n": len(scores),
        "prefix_tokens": len(prefix_ids),
        "score": statistics.mean(scores),
        "score_ci": interval(scores),
        "nll": statistics.mean(nlls),
        "nll_ci": interval(nlls),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--task", action="append", help="as in a scenario [default: passages]")
    parser.add_argument("--format", action="append", choices=FORMATS, help="[default: all of them]")
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--examples", type=int, default=30)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="one object a row instead of a table")
    args = parser.parse_args()
    model = load_model(args.model, device="cpu", threads=args.threads)
    for written in args.task or ["passages"]:
        for format in args.format or FORMATS:
            try:
                prompt = choose_prompt(format, args.model)
                template = model.chat_template() if prompt.layout == "chat" else None
                task = Prompted(parse_task(yaml.safe_load(written)), prompt, template)
            except UsageError as error:
                print(
                    json.dumps({"prompt": format, "error": str(error)}) if args.json else f"{format}: {error}"
                )
                continue
            row = measure(model, task, args.examples, args.tokens)
            line = (
                f"{row['task']:24} {row['prompt']:8} n {row['n']}  score {row['score']:.2f} ± {row['score_ci']:.2f}"
                f"  nll {row['nll']:.2f} ± {row['nll_ci']:.2f}  prefix {row['prefix_tokens']} tokens"
            )
            print(json.dumps(row) if args.json else line, flush=True)


if __name__ == "__main__":
    main()

"""What tasks that are generated from a seed have in common."""

from __future__ import annotations

import random

from testbed.tasks.padding import CountTokens, check_length
from testbed.tasks.task import Example, ExtractiveTask


class GeneratedTask(ExtractiveTask):
    """Examples out of nothing but a seed and a length. A subclass writes one of them, in `generate`."""

    def examples(
        self, count: int, context_tokens: int | None, count_tokens: CountTokens, seed: int
    ) -> list[Example]:
        """`count` examples within a few per cent below `context_tokens`; see `Task.examples`."""
        length = check_length(self.name, context_tokens)
        return [self._example(index, length, count_tokens, seed) for index in range(count)]

    def _example(self, index: int, context_tokens: int, count_tokens: CountTokens, seed: int) -> Example:
        # Each example has random numbers of its own: the same one whatever the count.
        rng = random.Random(f"{self.name}/{seed}/{index}")
        context, question, answer = self.generate(index, context_tokens, self.counting(count_tokens), rng)
        return Example(f"{self.name}-{seed}-{index}", context, question, (answer,))

    def generate(
        self, index: int, context_tokens: int, count: CountTokens, rng: random.Random
    ) -> tuple[str, str, str]:
        """(context, question, answer) of the `index`th example. Raises UsageError where the length cannot be had."""
        raise NotImplementedError

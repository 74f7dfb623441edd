"""Scores of a short answer against its gold answers, as SQuAD 1.1's evaluation defines them.

Rajpurkar et al., "SQuAD: 100,000+ Questions for Machine Comprehension of Text", EMNLP 2016, section 6.1.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalize(text: str) -> str:
    """`text` in lower case, without ASCII punctuation and the articles a, an, the; words one space apart."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split())


def exact_match(answer: str, golds: Sequence[str]) -> float:
    """1.0 where the normalised answer equals one of the normalised gold answers, else 0.0 (also without golds)."""
    given = normalize(answer)
    return float(any(given == normalize(gold) for gold in golds))


def token_f1(answer: str, golds: Sequence[str]) -> float:
    """The best F1 over the gold answers, in 0..1: overlap of the two bags of normalised words.

    Two texts that are both empty after normalisation agree (1.0); an empty one and another do not (0.0).
    """
    return max((_f1(normalize(answer).split(), normalize(gold).split()) for gold in golds), default=0.0)


def _f1(given: list[str], gold: list[str]) -> float:
    if not given or not gold:
        return float(given == gold)
    common = (Counter(given) & Counter(gold)).total()
    return 2 * common / (len(given) + len(gold))

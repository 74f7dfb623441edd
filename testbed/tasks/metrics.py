"""Scores of a short answer against its gold answers: SQuAD 1.1's, and what MLQA and KorQuAD make of them for other languages.

Rajpurkar et al., "SQuAD: 100,000+ Questions for Machine Comprehension of Text", EMNLP 2016, section 6.1. Lewis et al., "MLQA:
Evaluating Cross-lingual Extractive Question Answering", ACL 2020: all of Unicode's punctuation, and characters in the place of
words where a script puts no spaces between words. On ASCII text both are the same. Lim et al., "KorQuAD1.0: Korean QA Dataset for
Machine Reading Comprehension", arXiv:1909.07005: Korean puts spaces between phrases, to whose words particles are joined, so F1
is of characters, and an exact match of whole texts.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Sequence

_ARTICLES = re.compile(r"\b(a|an|the)\b")
#: Characters of scripts that put no spaces between words.
UNSPACED = (
    "\u3005-\u3007\u3021-\u3029\u303b"  # marks and numbers that stand among Han characters
    "\u3041-\u30ff\u31f0-\u31ff\uff66-\uff9f"  # kana
    "\u3105-\u312f\u31a0-\u31bf"  # Bopomofo
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"  # Han
    "\u0e00-\u0eff\u0f00-\u0fff"  # Thai, Lao, Tibetan
    "\u1000-\u109f\ua9e0-\ua9ff\uaa60-\uaa7f"  # Myanmar
    "\u1780-\u17ff\u19e0-\u19ff"  # Khmer
)


#: Hangul: syllables, and the letters that they are made of.
KOREAN = "\u1100-\u11ff\u3131-\u318e\ua960-\ua97f\uac00-\ud7ff\uffa0-\uffdc"
_UNSPACED, _KOREAN = re.compile(f"[{UNSPACED}]"), re.compile(f"[{KOREAN}]")


def unspaced(character: str) -> bool:
    """Whether a character is of a script that puts no spaces between words."""
    return _UNSPACED.match(character) is not None


def normalize(text: str) -> str:
    """`text` in lower case, composed (NFC), without punctuation and the articles a, an, the; words one space apart.

    Where a script puts no spaces between words, each character with the marks on it counts as one.
    """
    bare = "".join(filter(_stays, unicodedata.normalize("NFC", text.lower())))
    return " ".join(_apart(_ARTICLES.sub(" ", bare)).split())


def _stays(character: str) -> bool:
    """Punctuation goes, and so do joiners and soft hyphens (Cf), which nobody sees."""
    kind = unicodedata.category(character)
    return character not in string.punctuation and kind[0] != "P" and kind != "Cf"


def _apart(text: str) -> str:
    """`text` with spaces around the characters of unspaced scripts; a vowel or tone mark stays with what it is written on."""
    pieces, before = [], False
    for character in text:
        alone = unspaced(character)
        marks = _marks(character)
        if (alone or before) and not marks:
            pieces.append(" ")
        pieces.append(character)
        before = alone or (before and marks)
    return "".join(pieces)


def exact_match(answer: str, golds: Sequence[str]) -> float:
    """1.0 where the normalised answer equals one of the normalised gold answers, else 0.0 (also without golds)."""
    given = normalize(answer)
    return float(any(given == normalize(gold) for gold in golds))


def token_f1(answer: str, golds: Sequence[str]) -> float:
    """The best F1 over the gold answers, in 0..1: overlap of the two bags of normalised words, or where one of the two is Korean
    of their characters, digits and letters of other scripts among them.

    Two texts that are both empty after normalisation agree (1.0); an empty one and another do not (0.0).
    """
    return max((_f1(*_pieces(normalize(answer), normalize(gold))) for gold in golds), default=0.0)


def rouge_l(answer: str, golds: Sequence[str]) -> float:
    """The best ROUGE-L over the gold texts, in 0..1: F1 of the longest common subsequence of their words (Lin, "ROUGE: A Package
    for Automatic Evaluation of Summaries", 2004, section 3), which are lower-case letters and digits, as Google's rouge_score has
    them without its stemmer; where a script puts no spaces between words, its characters."""
    return max((_rouge_l(_words(answer), _words(gold)) for gold in golds), default=0.0)


def _words(text: str) -> list[str]:
    return "".join(c if c.isalnum() or _marks(c) else " " for c in _apart(text.lower())).split()


def _marks(character: str) -> bool:
    return unicodedata.category(character)[0] == "M"


def _rouge_l(given: list[str], gold: list[str]) -> float:
    from rapidfuzz.distance import LCSseq

    if not given or not gold:
        return 0.0
    return 2 * float(LCSseq.similarity(given, gold)) / (len(given) + len(gold))


def _pieces(given: str, gold: str) -> tuple[list[str], list[str]]:
    """What two normalised texts are compared by."""
    if _KOREAN.search(given + gold):
        return list(given.replace(" ", "")), list(gold.replace(" ", ""))
    return given.split(), gold.split()


def _f1(given: list[str], gold: list[str]) -> float:
    if not given or not gold:
        return float(given == gold)
    common = (Counter(given) & Counter(gold)).total()
    return 2 * common / (len(given) + len(gold))

"""Data sets of the Hugging Face hub as rows: ``hub:squad``, ``hub:ORG/NAME``, ``hub:ORG/NAME?config=distractor&split=test``.

Needs the `datasets` library, which the testbed does not install. What comes from the hub is checked like a line of a file.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any
from urllib.parse import parse_qsl

from testbed.errors import UsageError
from testbed.tasks.jsonl import Row, unique

_MOST_ROWS = 20_000

#: Short names -> (id, configuration, split)
KNOWN: dict[str, tuple[str, str | None, str]] = {
    "squad": ("rajpurkar/squad", None, "validation"),
    "hotpotqa": ("hotpotqa/hotpot_qa", "distractor", "validation"),
    "musique": ("dgslibisey/MuSiQue", None, "validation"),
    "boolq": ("google/boolq", None, "validation"),
    "race": ("ehovy/race", "high", "test"),
    "triviaqa": ("mandarjoshi/trivia_qa", "rc.wikipedia", "validation"),
    "xsum": ("EdinburghNLP/xsum", None, "test"),
    "cnn_dailymail": ("abisee/cnn_dailymail", "3.0.0", "test"),
    "mmlu": ("cais/mmlu", "all", "test"),
}


def parse_hub(name: str) -> tuple[str, str | None, str]:
    """(id, configuration, split) of what stands behind ``hub:``. Raises UsageError."""
    bare, _, query = name.partition("?")
    given = dict(parse_qsl(query))
    if not bare or set(given) - {"config", "split"}:
        raise UsageError(
            f"hub:{name}: write hub:ORG/NAME, with ?config=NAME&split=NAME where they are needed"
        )
    identifier, config, split = KNOWN.get(bare, (bare, None, "validation"))
    return identifier, given.get("config", config), given.get("split", split)


@functools.lru_cache(maxsize=2)
def read_hub(name: str) -> tuple[Row, ...]:
    """The first 20,000 rows of a hub data set. Raises UsageError where it cannot be had, or its rows are of no known form."""
    return rows_from(hub_records(name), f"hub:{name}")


@functools.lru_cache(maxsize=1)
def hub_records(name: str) -> list[Any]:
    """Its first 20,000 records, as it has them. Raises UsageError where it cannot be had."""
    identifier, config, split = parse_hub(name)
    try:
        import datasets
    except ImportError as error:
        raise UsageError(
            f"hub:{name}: reading from the hub needs the `datasets` library: pip install datasets "
            "(or write the questions into a file of JSON lines, and give its path)"
        ) from error
    try:
        found = datasets.load_dataset(identifier, config, split=split)
        return list(itertools.islice(found, _MOST_ROWS))
    except Exception as error:  # whatever the library, the network and the data set's own form raise
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UsageError(f"hub:{name}: {identifier} ({split}) cannot be read: {first[:200]}") from error


def rows_from(found: list[Any], place: str) -> tuple[Row, ...]:
    """The rows of records as the hub has them, of each id the first. Raises UsageError naming the record of no known form."""
    return tuple(unique(found, place))

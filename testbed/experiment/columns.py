"""A run's rows as a table whose columns have their real types, and back: what ``trials.parquet`` holds.

Times are timestamps, lists are lists, and what was not measured is null; ``trials.jsonl`` has the same as plain JSON.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from testbed.delivery.run_lengths import each, run_lengths
from testbed.experiment.row import COLUMNS, Row

if TYPE_CHECKING:
    import pandas as pd

#: Python's type of a column -> the table's; of texts and truth values that are always there, what pandas makes of them.
_TYPES = {
    "float": "float64",
    "float | None": "float64",
    "int": "Int64",
    "int | None": "Int64",
    "bool | None": "boolean",
}
#: What a failed trial may never have come to know.
_UNKNOWN = ("context_tokens", "kv_bytes")
_STARTED = "started_at"


def typed(rows: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """The table; columns of a run's own behind all others. Raises ValueError, TypeError where a column holds values of several
    kinds."""
    import pandas as pd

    own = [name for name in dict.fromkeys(key for row in rows for key in row) if name not in COLUMNS]
    frame = pd.DataFrame(list(rows), columns=[*COLUMNS, *own])
    for name in own:  # a program may print a number now and a word then
        several = {type(value) for value in frame[name].dropna()}
        if len(several) > 1 and not several <= {int, float}:
            frame[name] = frame[name].map(lambda value: None if pd.isna(value) else str(value))
    for column in dataclasses.fields(Row):
        if kind := _TYPES.get(str(column.type)):
            try:
                frame[column.name] = frame[column.name].astype(pd.api.types.pandas_dtype(kind))
            except (ValueError, TypeError) as error:
                raise ValueError(f"{column.name}: {error}") from error
    failed = frame["error"].fillna("") != ""
    for name in _UNKNOWN:
        frame[name] = frame[name].mask(failed & (frame[name] == 0))
    frame[_STARTED] = pd.to_datetime(frame[_STARTED], utc=True, format="ISO8601").astype(
        "datetime64[ms, UTC]"
    )
    for name, (apart, _) in LISTS.items():
        frame[name] = pd.Series([apart(text) if text else [] for text in frame[name]], frame.index, object)
    return frame


def schema(frame: pd.DataFrame) -> Any:
    """The file's types: those of the table, and lists of texts where all are empty."""
    import pyarrow

    found = pyarrow.Schema.from_pandas(frame, preserve_index=False)
    texts = pyarrow.list_(pyarrow.string())
    for name in LISTS.keys() & set(found.names):
        found = found.set(found.get_field_index(name), pyarrow.field(name, texts))
    return found


def plain(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """The rows of a table that this version or an older one wrote, as ``trials.jsonl`` has them."""
    import pandas as pd

    def value(name: str, kept: Any) -> Any:
        if name in LISTS and not isinstance(kept, str | None):
            return LISTS[name][1](list(kept))
        if isinstance(kept, pd.Timestamp):
            return kept.isoformat(timespec="milliseconds")
        return (0 if name in _UNKNOWN else None) if pd.isna(kept) else kept

    rows = frame.astype(object).to_dict("records")
    return [{str(name): value(str(name), kept) for name, kept in row.items()} for row in rows]


#: Columns that are lists: what takes their text apart, and what puts it together again.
LISTS: dict[str, tuple[Callable[[str], list[str]], Callable[[list[str]], str]]] = {
    "reused": (lambda text: text.split(","), ",".join),
    "levels": (each, run_lengths),
    "handover": (lambda text: text.split(", "), ", ".join),
    "warnings": (lambda text: text.split("; "), "; ".join),
}

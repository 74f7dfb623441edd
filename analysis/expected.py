"""What a scenario is expected to come to on any machine, held against a run: answers, bytes, orders and ratios, each with its
tolerance.

    scenario: quick                       # the run's, by name
    expectations:
      - what: an int8 cache's share of the bytes in 16 bits
        of: [payload_bytes]               # columns, summed row by row
        over: [kv_bytes]                  # and divided, row by row, by the sum of these
        where: codec == "int8"            # rows; all without it
        value: 0.516                      # of the statistic: the median, or `statistic: mean | least | most | count`
        within: 2%                        # of the value; 0.01 without a sign: by so much
      - {what: int4 over int8, of: [e2e_s], where: codec == "int4", against: codec == "int8", at_most: 1}

`against`: the median of the ratios of the first rows to these, example by example on each link.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import pandas as pd
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from testbed import strict_yaml
from testbed.analysis import layout
from testbed.analysis.run import Run, select
from testbed.errors import SpecError, UsageError
from testbed.units import parse_percentage

_STATISTICS = {"median": "median", "mean": "mean", "least": "min", "most": "max", "count": "count"}
_PAIR = ["model", "task", "example", "profile"]


class Expectation(BaseModel):
    """One figure, and between which bounds it has to be."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    what: str = Field(min_length=1)
    of: tuple[str, ...] = Field(min_length=1)
    over: tuple[str, ...] = ()
    where: str = ""
    against: str = ""
    statistic: Literal["median", "mean", "least", "most", "count"] = "median"
    value: float | None = None
    within: str | float | None = None
    at_least: float = -math.inf
    at_most: float = math.inf

    @field_validator("within")
    @classmethod
    def _tolerance(cls, within: str | float | None) -> str | float | None:
        if isinstance(within, str):
            parse_percentage(within)
        elif within is not None and not within >= 0:
            raise ValueError(f"within: {within:g} is below 0")
        return within

    @model_validator(mode="after")
    def _bounded(self) -> Self:
        if (self.value is None) != (self.within is None):
            raise ValueError(f"{self.what}: value and within go together")
        if self.value is None and math.isinf(self.at_least) and math.isinf(self.at_most):
            raise ValueError(f"{self.what}: expects nothing; give value and within, at_least or at_most")
        return self

    @property
    def bounds(self) -> tuple[float, float]:
        """The least and the most that it may be."""
        if self.value is None or self.within is None:
            return self.at_least, self.at_most
        share = isinstance(self.within, str)
        by = abs(self.value) * parse_percentage(str(self.within)) if share else float(self.within)
        return max(self.at_least, self.value - by), min(self.at_most, self.value + by)


class Expected(BaseModel):
    """A file of them. `source`: the run that the values are of."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    scenario: str = Field(min_length=1)
    source: str = ""
    expectations: tuple[Expectation, ...] = Field(min_length=1)


@dataclass(frozen=True)
class Met:
    """An expectation beside what the run came to, over n examples; no value where none of its rows have one."""

    expectation: Expectation
    value: float
    n: int

    @property
    def ok(self) -> bool:
        """Whether it is within its bounds."""
        low, high = self.expectation.bounds
        return low <= self.value <= high


def read(path: Path) -> Expected:
    """The expectations in a file, YAML or JSON. Raises SpecError with place and remedy."""
    return strict_yaml.checked(Expected, strict_yaml.read(path), str(path))


def judge(run: Run, expected: Expected) -> list[Met]:
    """Each expectation in turn. Raises UsageError where the run is of another scenario, or has no such columns."""
    name = run.manifest.get("name")
    if name != expected.scenario:
        raise UsageError(
            f"{run.path}: is of the scenario {name!r}, and what is expected is of {expected.scenario!r}"
        )
    rows = _with_more(run.require().attempts)
    return [_met(rows, each) for each in expected.expectations]


def _with_more(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows, with what expectations are about besides their columns."""
    return rows.assign(
        failed=rows["failed"].astype(float),
        delta_nll=rows["nll"] - rows["reference_nll"],
        same_answer=(rows["answer"].str.strip() == rows["reference_answer"].str.strip()).astype(float),
        # A link has its way up to open a connection, its way back, and then carries the bytes.
        needed_s=rows["naive_s"] + 2 * rows["delay_up_s"] + rows["delay_down_s"],
    )


def _met(rows: pd.DataFrame, each: Expectation) -> Met:
    own = _values(_selected(rows, each.where, each), each)
    if each.against:
        other = _values(_selected(rows, each.against, each), each)
        medians = [part.groupby(_PAIR)["value"].median() for part in (own, other)]
        ratios = (medians[0] / medians[1]).dropna()
        own = ratios.rename("value").reset_index()
    own = own.dropna(subset=["value"])
    value = float(own["value"].agg(_STATISTICS[each.statistic])) if len(own) else math.nan
    return Met(each, value, len(own[["task", "example"]].drop_duplicates()))


def _selected(rows: pd.DataFrame, where: str, each: Expectation) -> pd.DataFrame:
    try:
        return select(rows, where) if where else rows
    except UsageError as error:
        raise SpecError(f"{each.what}: {error}") from error


def _values(rows: pd.DataFrame, each: Expectation) -> pd.DataFrame:
    """The rows' pairs, with the expectation's figure of each as `value`."""
    for column in (*each.of, *each.over):
        if column not in rows or not pd.api.types.is_numeric_dtype(rows[column]):
            near = strict_yaml.did_you_mean(column, sorted(rows.select_dtypes("number").columns))
            raise SpecError(f"{each.what}: {column!r} is no column of numbers{near}")
    above = rows[list(each.of)].sum(axis=1, skipna=False)
    below = rows[list(each.over)].sum(axis=1, skipna=False) if each.over else 1.0
    return rows[_PAIR].assign(value=above / below)


def text(path: Path, expected: Expected, met: list[Met], width: int | None) -> str:
    """For people: a line each, and how many hold."""
    lines = [
        [
            "holds" if each.ok else "FAILS",
            each.expectation.what,
            str(each.n),
            f"{each.value:.4g}",
            _range(each),
        ]
        for each in met
    ]
    held = sum(each.ok for each in met)
    table = layout.table(lines, ["", "expected", "n", "came to", "allowed"], width, texts=(0, 1, 4))
    source = f" (of {expected.source})" if expected.source else ""
    return f"{table}\n\n{held} of {len(met)} expectations of {expected.scenario}{source} hold in {path}; n: examples"


def _range(met: Met) -> str:
    low, high = met.expectation.bounds
    if math.isinf(low):
        return f"at most {high:.4g}"
    return f"at least {low:.4g}" if math.isinf(high) else f"{low:.4g} to {high:.4g}"


def to_dict(path: Path, met: list[Met]) -> dict[str, Any]:
    """Plain values for JSON."""
    from testbed.analysis.describe import plain

    lines = [
        {
            "what": each.expectation.what,
            "n": each.n,
            "value": each.value,
            "at_least": each.expectation.bounds[0],
            "at_most": each.expectation.bounds[1],
            "ok": each.ok,
        }
        for each in met
    ]
    return plain({"run": str(path), "expectations": lines})

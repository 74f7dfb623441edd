"""Runs in shards: what each makes, what they come to together, and what is said where they do not fit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from testbed.errors import UsageError
from testbed.experiment import shards
from testbed.experiment.merge import merge
from testbed.experiment.results import RunDirectory
from testbed.experiment.runner import Runner, begin
from testbed.experiment.scenario import Plan
from testbed.experiment.session import in_one_process
from testbed.experiment.shard import Shard, first_places, of_folder, parse
from testbed.guide.guide import unlinked

SAME = (
    "trial", "cell", "task", "example", "answer", "score", "nll", "payload_bytes", "payload_digest", "kept_digest",
    "tokens_kept", "error",
)  # fmt: skip


def plan_of(model: Path, **changes: Any) -> Plan:
    settings = {
        "name": "sharded",
        "model": str(model),
        "tasks": ["needle", {"task": "needle", "depth": 0.2, "examples": 3}],
        "codecs": ["fp16", "q2c@0.25+int4"],
        "context_tokens": [120, 200],
        "examples": 4,
        "threads": 1,
        "max_new_tokens": 4,
    }
    return unlinked({**settings, **changes}, "t.yaml")


def rows(path: Path) -> list[dict[str, Any]]:
    return [{key: row[key] for key in SAME} for row in RunDirectory.open(path).rows()]


def in_order(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(found, key=lambda row: str(row["trial"]))


@pytest.fixture(scope="module")
def plan(tiny_model: Callable[[str], Path]) -> Plan:
    return plan_of(tiny_model("llama"))


@pytest.fixture(scope="module")
def whole(plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process."""
    directory = begin(plan, tmp_path_factory.mktemp("whole") / "run")
    Runner(plan, directory, lambda _: None, opening=in_one_process).execute()
    return directory.path


@pytest.fixture(scope="module")
def made(plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same in four shards, in one directory."""
    out = tmp_path_factory.mktemp("shards") / "run"
    for number in range(1, 5):
        done = shards.run(plan, Shard(number, 4), out, opening=in_one_process)
        assert done.complete and not done.failed and not done.settled
    return out


@pytest.fixture
def four(made: Path, tmp_path: Path) -> Path:
    """Those, to be damaged."""
    return Path(shutil.copytree(made, tmp_path / "run"))


def edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


class TestAShard:
    @given(
        st.lists(st.integers(1, 40), min_size=1, max_size=5),
        st.lists(st.sampled_from([None, 64, 128, 4096]), min_size=1, max_size=4, unique=True),
        st.integers(1, 60),
    )
    def test_is_one_part_of_a_partition_in_which_all_have_as_much_to_do(
        self, examples: list[int], lengths: list[int | None], count: int
    ) -> None:
        plan: Any = SimpleNamespace(
            batches=lambda: ((task, length) for task in range(len(examples)) for length in lengths),
            scenario=SimpleNamespace(examples_of=examples.__getitem__),
        )
        sizes = [0] * count
        for task, length in plan.batches():
            parts = [Shard(n + 1, count).numbers(plan, task, length, examples[task]) for n in range(count)]
            assert sorted(n for part in parts for n in part) == list(range(examples[task]))
            assert max(map(len, parts)) - min(map(len, parts)) <= 1
            sizes = [size + len(part) for size, part in zip(sizes, parts, strict=True)]
        assert max(sizes) - min(sizes) <= 1

    def test_has_the_same_examples_where_a_file_has_fewer_than_were_asked_for(self, plan: Plan) -> None:
        for batch in plan.batches():
            for number in (1, 2, 3):
                few = Shard(number, 3).numbers(plan, *batch, 2)
                assert few == [n for n in Shard(number, 3).numbers(plan, *batch, 4) if n < 2]

    def test_counts_examples_through_over_tasks_and_lengths(self, plan: Plan) -> None:
        assert list(first_places(plan).values()) == [0, 4, 8, 11]

    @pytest.mark.parametrize("shard", [Shard(1, 1), Shard(3, 16), Shard(16, 16)])
    def test_is_written_and_read(self, shard: Shard) -> None:
        assert parse(str(shard), {}) == shard
        assert of_folder(shard.folder) == shard

    @pytest.mark.parametrize(
        "text", ["", "3", "0/4", "5/4", "1/0", "-1/4", "1/4/2", "a/b", "1 / 4", "1/1000000"]
    )
    def test_is_refused_in_one_line_where_it_is_none(self, text: str) -> None:
        with pytest.raises(UsageError, match="shard"):
            parse(text, {})

    @pytest.mark.parametrize("name", ["3of16", "03-of-16", "0-of-4", "5-of-4", "shards"])
    def test_lies_in_no_directory_of_another_name(self, name: str) -> None:
        assert of_folder(name) is None

    @pytest.mark.parametrize(
        ("task", "low", "high", "step", "count", "shard"),
        [(0, 0, 15, 1, 16, "1/16"), (3, 1, 16, 1, 16, "3/16"), (9, 1, 13, 4, 4, "3/4")],
    )
    def test_is_the_task_of_a_slurm_array(
        self, task: int, low: int, high: int, step: int, count: int, shard: str
    ) -> None:
        values = {"ID": task, "MIN": low, "MAX": high, "STEP": step, "COUNT": count}
        environment = {f"SLURM_ARRAY_TASK_{key}": str(value) for key, value in values.items()}
        assert str(parse("auto", environment)) == str(parse("slurm", environment)) == shard
        assert parse("1/2", environment) == Shard(1, 2)

    def test_is_none_of_an_array_that_has_gaps_or_is_not_there(self) -> None:
        gaps = {"ID": "7", "MIN": "3", "MAX": "7", "COUNT": "2"}
        with pytest.raises(UsageError, match="has gaps"):
            parse("auto", {f"SLURM_ARRAY_TASK_{key}": value for key, value in gaps.items()})
        with pytest.raises(UsageError, match="no number of a Slurm array"):
            parse("auto", {})


@pytest.mark.slow
class TestFourShards:
    def test_come_to_the_whole_run(self, four: Path, whole: Path) -> None:
        merged = merge([four], four)
        assert (merged.path, merged.missing, merged.running, merged.notes) == (four, (), (), ())
        assert merged.trials == merged.finished == len(rows(whole))
        assert in_order(rows(four)) == in_order(rows(whole))

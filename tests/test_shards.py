"""Runs in shards: what each makes, what they come to together, and what is said where they do not fit."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from testbed.analysis import compare, summary
from testbed.analysis.run import load
from testbed.errors import UsageError
from testbed.experiment import shards
from testbed.experiment.merge import merge
from testbed.experiment.results import FORMAT, RunDirectory
from testbed.experiment.runner import Runner, begin
from testbed.experiment.scenario import Plan
from testbed.experiment.session import in_one_process
from testbed.experiment.shard import Shard, first_places, of_folder, parse
from testbed.guide.guide import unlinked
from tests.command import command

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

    def test_name_a_shard_that_is_nowhere_and_write_nothing_of_the_others(
        self, four: Path, tmp_path: Path
    ) -> None:
        shutil.rmtree(four / "shards" / "3-of-4")
        done = command("merge", str(four))
        assert done.status == 1 and not (four / "manifest.json").exists()
        # The 14 examples of both tasks and lengths are dealt out in turn.
        assert (
            "shard 3/4 is nowhere: all of its 6 trials are missing: needle@120: needle-0-2; " in done.errors
        )
        told = command("merge", str(four), "--json")
        assert (told.status, told.errors) == (1, "") and not (four / "manifest.json").exists()
        object_of = json.loads(told.out)
        assert [object_of[key] for key in ("path", "trials", "finished")] == [None, 28, 22]
        (lacking,) = object_of["missing"]
        assert (lacking["shard"], lacking["path"], lacking["trials"]) == ("3/4", None, 6)
        assert sum(each["trials"] for each in lacking["examples"]) == 6
        (lack,) = merge([four], tmp_path / "some", partial=True).missing
        assert (lack.shard, lack.path, lack.trials, lack.of, lack.failed) == (Shard(3, 4), None, 6, 6, 0)
        assert len(rows(tmp_path / "some")) == 28 - 6

    def test_lack_what_failed_or_has_no_row_and_make_that_alone_when_run_again(
        self, four: Path, plan: Plan, whole: Path
    ) -> None:
        path = four / "shards" / "1-of-4"
        written = [json.loads(line) for line in (path / "trials.jsonl").read_text().splitlines()]
        written[0]["error"] = "the cloud did not answer"
        lines = [json.dumps(row) + "\n" for row in written[:-1]]
        (path / "trials.jsonl").write_text("".join(lines) + '{"trial": "cut off')
        (lack,) = merge([four], four).missing
        assert (lack.shard, lack.path, lack.trials, lack.of, lack.failed) == (Shard(1, 4), path, 2, 8, 1)
        again: list[str] = []
        done = shards.run(
            plan, Shard(1, 4), four, on_row=lambda row, spans: again.append(row.trial), opening=in_one_process
        )
        assert again == [written[0]["trial"], written[-1]["trial"]]
        assert (done.trials, done.finished, done.failed, done.complete) == (8, 8, 0, True)
        assert merge([four], four).missing == ()
        finished = [row for row in rows(four) if not row["error"]]
        assert in_order(finished) == in_order(rows(whole))

    def test_are_not_run_again_where_all_is_done(self, four: Path, plan: Plan) -> None:
        before = (four / "shards" / "2-of-4" / "trials.jsonl").read_bytes()
        done = shards.run(plan, Shard(2, 4), four, opening=in_one_process)
        assert done.settled and done.complete
        assert (four / "shards" / "2-of-4" / "trials.jsonl").read_bytes() == before

    def test_may_lie_in_directories_of_their_own(self, four: Path, whole: Path, tmp_path: Path) -> None:
        apart = [tmp_path / f"host{number}" for number in range(1, 5)]
        for number, path in enumerate(apart[:2], 1):
            shutil.copytree(four / "shards" / f"{number}-of-4", path / "shards" / f"{number}-of-4")
        for number, path in enumerate(apart[2:], 3):  # or the shards themselves, under another name
            shutil.copytree(four / "shards" / f"{number}-of-4", path)
        merge(apart, tmp_path / "out")
        assert in_order(rows(tmp_path / "out")) == in_order(rows(whole))
        shutil.copytree(apart[0], tmp_path / "twice")
        with pytest.raises(UsageError, match=r"shard 1/4 lies in .* and in .*: leave one away"):
            merge([*apart, tmp_path / "twice"], tmp_path / "other")

    def test_keep_what_was_measured_on_each_host(self, four: Path) -> None:
        for number in range(1, 5):
            path = four / "shards" / f"{number}-of-4"
            host = f"node{number % 2}"
            edit(
                path / "manifest.json",
                lambda manifest, host=host: manifest.update(machines={host: {"cpu": "x"}}),
            )
            measured = {"profile": "loopback", "host": host}
            (path / "calibration.json").write_text(json.dumps({"measurements": [measured]}))
        merge([four], four)
        manifest = RunDirectory.open(four).manifest()
        assert {name: about["shards"] for name, about in manifest["machines"].items()} == {
            "node1": ["1/4", "3/4"], "node0": ["2/4", "4/4"],
        }  # fmt: skip
        assert manifest["trials"] == 28 and len(manifest["starts"]) == 4 and "shard" not in manifest
        kept = RunDirectory.open(four).entries("calibration.json", "measurements")
        assert [(each["host"], each["shard"]) for each in kept] == [
            ("node1", "1/4"), ("node0", "2/4"), ("node1", "3/4"), ("node0", "4/4"),
        ]  # fmt: skip

    def test_are_read_as_any_run(self, four: Path, whole: Path) -> None:
        merge([four], four)
        ours, theirs = load(four), load(whole)
        assert ours.notes == theirs.notes
        assert list(ours.rows.columns) == list(theirs.rows.columns)
        assert all(line.ratio.n for line in compare.compare(ours, theirs))
        assert "2/4" not in summary.table(ours)  # of one host there is nothing to tell apart
        assert pd.read_parquet(four / "spans.parquet")["trial"].nunique() == len(ours.rows)

    def test_are_merged_again_but_not_over_rows_of_another_source(self, four: Path, plan: Plan) -> None:
        shutil.move(four / "shards" / "3-of-4", four.parent / "late")
        merge([four], four, partial=True)
        shutil.copytree(four, four.parent / "continued")
        shutil.move(four.parent / "late", four / "shards" / "3-of-4")
        assert merge([four], four).missing == ()
        assert len(rows(four)) == 28
        continued = Runner(
            plan, RunDirectory.open(four.parent / "continued"), lambda _: None, opening=in_one_process
        )
        continued.execute()
        assert len(rows(four.parent / "continued")) == 28
        shutil.rmtree(four / "shards" / "3-of-4")
        with pytest.raises(UsageError, match="6 finished trials that these shards do not have"):
            merge([four], four.parent / "continued", partial=True)

    def test_are_refused_while_one_is_being_made(self, four: Path) -> None:
        with RunDirectory(four / "shards" / "2-of-4").locked():
            assert merge([four], four).running == (Shard(2, 4),)
            done = command("merge", str(four))
            assert done.status == 1 and "shard 2/4 is still running" in done.errors
            assert merge([four], four.parent / "now", partial=True).path is not None

    def test_of_unlike_plans_are_refused_by_what_differs(self, four: Path, tmp_path: Path) -> None:
        manifest = four / "shards" / "2-of-4" / "manifest.json"
        text = manifest.read_text()
        unlike: list[tuple[str, Callable[[dict[str, Any]], Any]]] = [
            ("settings: seed is 0", lambda m: m["settings"].update(seed=1)),
            ("inputs: model", lambda m: m["inputs"].update(dict.fromkeys(m["inputs"], "other"))),
            ("the version of torch", lambda m: m["host"]["packages"].update(torch="1.0")),
            ("the cloud's dtype", lambda m: m["endpoints"]["cloud"].update(dtype="bfloat16")),
            ("emulator", lambda m: m.update(emulator="netem")),
        ]
        for said, change in unlike:
            edit(manifest, change)
            with pytest.raises(UsageError, match=rf"shards 1/4 and 2/4 are not of one run: {said}"):
                merge([four], tmp_path / "out", partial=True)
            manifest.write_text(text)
        edit(manifest.with_name("examples.json"), lambda e: e["batches"][0].update(examples=["another"]))
        with pytest.raises(UsageError, match="the examples of needle@120"):
            merge([four], tmp_path / "out", partial=True)
        assert not (tmp_path / "out").exists()

    def test_of_a_changed_scenario_are_not_begun_beside_them(
        self, four: Path, tiny_model: Callable[[str], Path]
    ) -> None:
        other = plan_of(tiny_model("llama"), seed=5)
        with pytest.raises(UsageError, match="was begun with seed 0, and now it is 5; choose another --out"):
            shards.run(other, Shard(2, 4), four, opening=in_one_process)
        shutil.rmtree(four / "shards" / "2-of-4")
        (four / "shards" / "1-of-4" / "manifest.json").write_text("{")  # another is asked
        with pytest.raises(UsageError, match="3-of-4: was begun with seed 0, and now it is 5"):
            shards.run(other, Shard(2, 4), four, opening=in_one_process)
        assert not (four / "shards" / "2-of-4").exists()
        with pytest.raises(UsageError, match="has shards of 4, and 2/5 is one of 5"):
            shards.run(other, Shard(2, 5), four, opening=in_one_process)

    def test_that_an_older_version_began_say_so_and_are_merged_with_their_like_alone(
        self, four: Path, plan: Plan
    ) -> None:
        def age(path: Path) -> None:
            edit(path / "manifest.json", lambda m: (m.update(format=7), m["settings"].pop("serving")))
            lines = [json.loads(line) for line in (path / "trials.jsonl").read_text().splitlines()]
            kept = [{key: value for key, value in row.items() if key != "serving"} for row in lines]
            (path / "trials.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))

        paths = sorted((four / "shards").iterdir())
        age(paths[0])
        with pytest.raises(UsageError, match="was begun by a testbed that knew no serving yet"):
            shards.run(plan, Shard(1, 4), four, opening=in_one_process)
        with pytest.raises(
            UsageError, match=rf"not of one run: format is 7 in .*1-of-4, {FORMAT} in .*2-of-4"
        ):
            merge([four], four)
        for path in paths[1:]:
            age(path)
        assert merge([four], four).missing == () and len(rows(four)) == 28

    def test_are_not_taken_for_another_whose_directory_they_lie_in(self, four: Path, plan: Plan) -> None:
        shutil.rmtree(four / "shards" / "2-of-4")
        (four / "shards" / "1-of-4").rename(four / "shards" / "2-of-4")
        with pytest.raises(UsageError, match="2-of-4: holds shard 1/4 and not 2/4; call it 1-of-4 again"):
            shards.run(plan, Shard(2, 4), four, opening=in_one_process)
        done = command("run", "--resume", str(four), "--shard", "2/4")
        assert done.status == 2 and "holds shard 1/4 and not 2/4" in done.errors

    def test_that_are_damaged_are_refused_in_one_line(self, four: Path, tmp_path: Path) -> None:
        def complaint() -> str:
            done = command("merge", str(four), "--out", str(tmp_path / "out"))
            assert done.status == 2 and done.errors.count("\n") == 1
            return done.errors

        path = four / "shards" / "2-of-4"
        saved = {
            name: (path / name).read_bytes() for name in ("manifest.json", "examples.json", "trials.jsonl")
        }
        row = json.loads(saved["trials.jsonl"].splitlines()[0])
        for name, text, said in (
            ("manifest.json", "{", "manifest.json cannot be read"),
            ("manifest.json", '{"format": 99}', "written in format 99"),
            ("manifest.json", "{}", "no shard of a run"),
            ("manifest.json", '{"shard": "9/4"}', "manifest.json: shard: shard 9/4"),
            ("examples.json", '{"batches": [{"task": 1}]}', "examples.json: not what a run writes there"),
            ("trials.jsonl", json.dumps(row | {"example": "x"}) + "\n", "has a row of example x of needle"),
        ):
            (path / name).write_text(text)
            assert said in complaint()
            (path / name).write_bytes(saved[name])
        (path / "trials.jsonl").write_bytes(saved["trials.jsonl"] + b"nonsense\n" + saved["trials.jsonl"])
        merged = merge([four], tmp_path / "out")
        assert merged.missing == () and len(rows(tmp_path / "out")) == 28
        assert merged.notes == (
            "shard 2/4: 1 unreadable line of trials.jsonl passed over", "shard 2/4: 8 repeated rows left out",
        )  # fmt: skip


def test_a_directory_without_shards_or_with_something_else_is_refused(tmp_path: Path) -> None:
    for path, said in ((tmp_path / "none", "is not a directory"), (tmp_path, "is not a run directory")):
        with pytest.raises(UsageError, match=said):
            merge([path], tmp_path / "out")
    (tmp_path / "shards" / "1-of-4").mkdir(parents=True)
    with pytest.raises(UsageError, match="no shard that has begun"):
        merge([tmp_path], tmp_path / "out")
    done = command("merge", str(tmp_path / "shards"))
    assert done.status == 2 and "--out DIR" in done.errors
    done = command("merge", str(tmp_path / "none"))
    assert done.status == 2 and "none is not a directory" in done.errors


def test_more_shards_than_examples_leave_some_with_nothing_to_do(plan: Plan, tmp_path: Path) -> None:
    done = shards.run(plan, Shard(15, 15), tmp_path, opening=in_one_process)
    assert (done.trials, done.finished, done.settled, done.complete) == (0, 0, True, True)


def test_a_shard_that_was_killed_before_it_had_a_manifest_is_begun_anew(plan: Plan, tmp_path: Path) -> None:
    left = shards.place(tmp_path, Shard(15, 15))
    (left / "traces").mkdir(parents=True)
    assert shards.run(plan, Shard(15, 15), tmp_path, opening=in_one_process).complete
    assert RunDirectory.open(left).manifest()["shard"] == "15/15"


def test_a_shard_is_not_begun_in_a_run_of_one_piece(plan: Plan, tmp_path: Path) -> None:
    begin(plan, tmp_path)
    with pytest.raises(UsageError, match="is a run of its own; choose another --out"):
        shards.run(plan, Shard(1, 2), tmp_path, opening=in_one_process)
    assert not (tmp_path / "shards").exists()


def test_a_load_is_not_made_in_shards(tmp_path: Path) -> None:
    settings = ("load=closed(clients=2, think=1s)", "placements=split", "delivery=whole")
    loaded = [part for setting in settings for part in ("--set", setting)]
    done = command("run", "quick", "--array", "3", "--out", str(tmp_path), *loaded)
    assert done.status == 2 and "a load is put on by one machine" in done.errors


def test_a_directory_on_nfs_is_locked_by_a_file_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = fcntl.flock

    def flock(handle: int, how: int) -> None:
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(errno.EBADF, "Bad file descriptor")
        real(handle, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    directory = RunDirectory.create(tmp_path / "run")
    assert not directory.busy()
    with directory.locked():
        directory.check_new()
        assert directory.busy()
        with pytest.raises(UsageError, match="another testbed process"), directory.locked():
            pass
    with directory.locked():
        pass


class TestTheCommandLine:
    def test_wants_one_directory_for_all_shards(self) -> None:
        done = command("run", "quick", "--shard", "1/2")
        assert done.status == 2
        done = command("run", "--resume", "nowhere", "--shard", "1/2")
        assert done.status == 2 and "shard 1/2 has not begun in nowhere" in done.errors
        done = command("run", "quick", "--shard", "3/2", "--out", "x")
        assert done.status == 2 and "shard 3/2" in done.errors

    def test_wants_to_know_which_shard_is_to_be_resumed(self, tmp_path: Path) -> None:
        (tmp_path / "shards" / "1-of-2").mkdir(parents=True)
        done = command("run", "--resume", str(tmp_path))
        assert done.status == 2 and f"testbed merge {tmp_path}" in done.errors

    def test_prints_a_script_that_submits_an_array_and_its_merge(self, tmp_path: Path) -> None:
        out = tmp_path / "a run"
        done = command(
            "run", "quick", "--array", "4", "--out", str(out), "--examples", "5", "--codec", "q2c@0.25+int4",
            "--set", "name=mine", "--set", "threads=3",
        )  # fmt: skip
        assert done.status == 0, done.errors
        (tmp_path / "sbatch").write_text(
            '#!/bin/sh\nprintf "<%s> " "$@" >&2\necho >&2\ncat >&2\necho "17;cluster"\n'
        )
        (tmp_path / "sbatch").chmod(0o755)
        ended = subprocess.run(
            ["sh", "-s", "2,4"], input=done.out, capture_output=True, text=True, check=True,
            env={"PATH": f"{tmp_path}:{os.environ['PATH']}"},
        )  # fmt: skip
        array, merging = ended.stderr.split("<--job-name=mine-merge>")
        assert (
            "<--array=2,4> <--cpus-per-task=8>" in array and f"<--output={out}/shards/%a-of-4.log>" in array
        )
        assert f"""run --shard "$SLURM_ARRAY_TASK_ID/4" quick --out '{out}' --set=name=mine""" in array
        assert "--codec=q2c@0.25+int4 --examples=5" in array
        assert "<--dependency=afterany:17>" in merging and f" merge '{out}'>" in merging
        assert (out / "shards").is_dir()

    def test_refuses_an_array_of_more_tasks_than_examples(self, tmp_path: Path) -> None:
        done = command("run", "quick", "--array", "900", "--out", str(tmp_path))
        assert done.status == 2 and "fewer examples" in done.errors

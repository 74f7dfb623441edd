"""Programs of one's own: what a scenario may say of them, what becomes a column, and a run from its plan to its table."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from testbed.analysis import programs as analysis
from testbed.analysis.run import load
from testbed.errors import SpecError
from testbed.experiment.plan import load_plan, make_plan
from testbed.experiment.program_run import settings
from testbed.experiment.programs import columns_of, filled, last_object
from tests.command import command
from tests.runs import rows, run, unmeasured

SERVER = "import http.server; http.server.ThreadingHTTPServer(('', {port}), http.server.SimpleHTTPRequestHandler).serve_forever()"
CLIENT = (
    "import json, sys, time, urllib.request as u; t = time.monotonic(); n = len(u.urlopen(sys.argv[1]).read()); "
    "print('fetched'); print(json.dumps({'bytes_read': n, 'own_s': time.monotonic() - t, 'size': int(sys.argv[2])}))"
)
SCENARIO: dict[str, Any] = {
    "name": "mine",
    "profiles": ["rate=20mbit,delay=5ms", "rate=50mbit,delay=1ms"],
    "programs": {
        "server": {"node": "cloud", "run": [sys.executable, "-c", SERVER], "ready": {"port": "{port}"}},
        "client": {
            "node": "edge",
            "run": [sys.executable, "-c", CLIENT, "http://{cloud.address}:{port}/", "{kind}"],
        },
    },
    "parameters": {"kind": [1, 2], "port": 8123},
    "repeats": 2,
}


def changed(**changes: Any) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(json.dumps(SCENARIO))
    for path, new in changes.items():
        *way, last = path.split("__")
        inner = value
        for key in way:
            inner = inner[key]
        inner[last] = new
    return value


def test_the_plan_has_every_combination_on_every_link() -> None:
    plan = make_plan(SCENARIO, "mine")
    assert plan.trials == 8 and len({each.cell for each in settings(plan)}) == 4
    assert [each.label for each in settings(plan)] == ["kind=1", "kind=1", "kind=2", "kind=2"]
    again = make_plan(plan.scenario.model_dump(mode="json"), "manifest")
    assert [each.cell for each in settings(again)] == [each.cell for each in settings(plan)]


@pytest.mark.parametrize("name", ["iperf3", "http"])
def test_those_that_are_shipped_can_be_planned(name: str) -> None:
    assert load_plan(name).trials == 30
    assert "30 trials of 6 cells" in command("plan", name).out


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"programs__client__node": "egde"}, "no node 'egde'; did you mean 'edge'"),
        ({"programs__client__run": "curl {clod.address}"}, "{clod.address} stands for nothing; did you mean 'cloud.address'"),
        ({"programs__client__run": "curl 'http"}, "No closing quotation"),
        ({"programs__client__ready": {"port": 1}}, "`ready` is for servers"),
        ({"programs__server__ready": {}}, "write one of port"),
        ({"programs__server__ready": {"log": "("}}, "no regular expression"),
        ({"programs__server__columns": {"a": "b"}}, "columns are of what the client prints"),
        ({"programs__client__columns": {"profile": "b"}}, "'profile' is no name for one, or taken"),
        ({"programs": {"server": SCENARIO["programs"]["server"]}}, "one of them is the `client`"),
        ({"parameters__profile": [1]}, "'profile' is no name for one"),
        ({"parameters__kind": [1, 1]}, "listed twice"),
        ({"codecs": ["int8"]}, "codecs: of language models"),
        ({"tasks": ["needle"]}, "tasks: of language models"),
        ({"topology": "two-laptops"}, "topology"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_with_its_place(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(SpecError) as caught:
        make_plan(changed(**changes), "mine")
    assert said in str(caught.value) and str(caught.value).startswith("mine")


def test_a_scenario_without_tasks_and_programs_asks_for_tasks() -> None:
    with pytest.raises(SpecError, match="tasks is missing"):
        make_plan({"name": "x", "profiles": ["lte"]}, "x")
    with pytest.raises(SpecError, match="parameters: are of `programs`"):
        make_plan({"name": "x", "profiles": ["lte"], "tasks": ["needle"], "parameters": {"a": 1}}, "x")


def test_braces_that_name_nothing_stay_as_they_are() -> None:
    words = ["http://{cloud.address}:{port}/", '{"a": %{time}}', "{other}"]
    assert filled(words, {"cloud.address": "10.0.0.1", "port": 80}) == [
        "http://10.0.0.1:80/",
        '{"a": %{time}}',
        "{other}",
    ]


@pytest.mark.parametrize(
    ("printed", "found"),
    [
        (b'hello\n{"a": 1}\n', {"a": 1}),
        (b'{"a": 1}\n{"a": 2}\nbye\n', {"a": 2}),
        (b'{\n  "a": {"b": 2}\n}\n', {"a": {"b": 2}}),
        (b"[1]\n", None),
        (b"{broken\n", None),
        (b"", None),
    ],
)
def test_the_last_line_of_json_is_what_counts_or_all_that_was_printed(printed: bytes, found: Any) -> None:
    assert last_object(printed) == found


@given(st.binary(max_size=300))
def test_whatever_is_printed_is_an_object_or_nothing(printed: bytes) -> None:
    assert last_object(printed) is None or isinstance(last_object(printed), dict)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
)


@given(st.dictionaries(st.text(max_size=5), VALUES, max_size=5))
def test_columns_are_names_with_numbers_and_words(value: dict[str, Any]) -> None:
    for name, each in columns_of(value, {}).items():
        assert name.isidentifier() and isinstance(each, bool | int | float | str)
        assert json.loads(json.dumps(each)) == each


def test_a_column_that_is_asked_for_and_not_there_is_an_error() -> None:
    value = {"end": {"streams": [{"bits": 5.0}]}}
    assert columns_of(value, {"rate": "end.streams.0.bits"}) == {"rate": 5.0}
    for path in ("end.streams.1.bits", "end", "nothing"):
        with pytest.raises(SpecError, match=path):
            columns_of(value, {"rate": path})


@pytest.mark.netns
def test_a_run_goes_from_its_plan_to_its_table_and_is_resumed(tmp_path: Path) -> None:
    (scenario := tmp_path / "mine.yaml").write_text(json.dumps(SCENARIO))
    out = tmp_path / "run"
    with unmeasured():
        done = run(str(scenario), "--out", str(out))
        assert done.status == 0, done.errors
        made = rows(out)
        assert len(made) == 8 and not any(row["error"] for row in made), [row["error"] for row in made]
        assert {row["size"] for row in made} == {1, 2} and all(row["own_s"] < row["e2e_s"] for row in made)
        assert all(row["wire_bytes"] > row["bytes_read"] for row in made)
        (out / "trials.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in made[:5]))
        assert command("run", "--resume", str(out), "--accept-uncalibrated").status == 0
    again = rows(out)
    assert sorted(row["trial"] for row in again) == sorted(row["trial"] for row in made)
    kept = pd.read_parquet(out / "trials.parquet")
    assert len(kept) == 8 and kept["own_s"].dtype == float and kept["size"].dtype == int
    said = command("summary", str(out)).out
    assert re.search(r"kind=1 +2 ", said) and "own_s" in said
    assert {"programs.png", "latency_cdf.png"} <= {
        Path(line).name for line in command("plot", str(out)).out.split()
    }
    table = pd.read_csv(out / "programs.csv").set_index(["link", "setting", "column"])
    slow = table.loc[("rate=20mbit,delay=5ms", "kind=1", "own_s")]
    own = kept.query("profile == 'rate=20mbit,delay=5ms' and codec == 'kind=1'")["own_s"]
    assert slow["n"] == 2 and slow["median"] == pytest.approx(own.median(), rel=1e-4)
    assert not analysis.is_one(load(out, "placement == 'nothing'"))


@pytest.mark.netns
def test_a_client_that_fails_or_hangs_and_a_server_that_is_never_ready_are_rows_that_say_so(
    tmp_path: Path,
) -> None:
    cases = {
        "status 3: no luck": {"client": ["sh", "-c", "echo no luck >&2; exit 3"]},
        "not over after 1 s": {"client": ["sh", "-c", "sleep 60 & sleep 60"]},
        "server: ended with status 7": {"server": ["sh", "-c", "exit 7"]},
        "server: not ready after 1 s": {"server": ["sleep", "60"]},
    }
    for number, (said, change) in enumerate(cases.items()):
        scenario = changed(
            profiles=["rate=20mbit"], parameters={"kind": 1, "port": 8123}, repeats=1, timeout="1s"
        )
        for name, words in change.items():
            scenario["programs"][name]["run"] = words
        (path := tmp_path / f"{number}.yaml").write_text(json.dumps(scenario))
        with unmeasured():
            assert run(str(path), "--out", str(tmp_path / str(number))).status == 1
        (row,) = rows(tmp_path / str(number))
        assert said in row["error"] and row["e2e_s"] is None

"""The trace files that people have: each form as it is found, and whatever else a file may hold is read or refused in a line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from testbed.errors import SpecError
from testbed.net.profile.profile import parse_profile
from testbed.net.profile.recordings import files as recording_files
from testbed.net.profile.recordings.files import Layout, read_recording
from testbed.net.profile.recordings.recording import Samples
from testbed.net.profile.trace import File, Trace, parse_trace

# First lines of each form, rewritten: the same columns, marks and oddities.
PENSIEVE = "540.0\t4.037\n540.55\t4.793\n540.88\t4.492\n\n"
OBOE = "0.0 1.25\r\n1.0 0.75\r\n2.0 2.5\r\n\r\n"
GNETTRACK = (
    "Timestamp,Operatorname,NetworkMode,RSRP,DL_bitrate,UL_bitrate,State,PINGAVG\n"
    "2020.02.13_15.02.01,B,5G,-93,0,0,I,-\n"
    "2020.02.13_15.02.02,B,5G,-93,8000,80,D,-\n"
    "2020.02.13_15.02.03,B,5G,-95,16000,160,VD,-\n"
    "2020.02.13_15.02.04,B,5G,-95,300,3,V,102.0\n"
    "2020.02.13_15.02.05,B,5G,-95,500,5,D,104.0\n"
    "2020.02.13_15.02.06,B,5G,-95,24000,240,D,-\n"
)
LUMOS = (
    "run_num,seq_num,abstractSignalStr,latitude,nrStatus,Throughput\n"
    "1,1,4,44.97,NOT_RESTRICTED,812\n"
    "1,2,4,44.97,NOT_RESTRICTED,640\n"
    "1,4,3,44.97,CONNECTED,\n"
)
FIVE_GOPHERS = "date;time;mbps\n2019-11-02;2019-11-02 10:00:00;310.5\n2019-11-02;2019-11-02 10:00:01;12\n"
STARLINK_DELAY = "20\n20\n21\n19\n22\n"
STATIC = {
    "StaticBwConfig": {"bw": {"gbps": 0, "bps": 12_000_000}, "duration": {"secs": 1, "nanos": 500_000_000}}
}
RATTAN = json.dumps(
    {
        "RepeatedBwPatternConfig": {
            "pattern": [STATIC, {"TraceBwConfig": {"pattern": [["25ms", ["29.123Mbps", "0.2Gbps"]]]}}],
            "count": 0,
        }
    }
)
RATTAN_DELAY = '{"StaticDelayConfig": {"delay": "10ms 500us", "duration": "2s"}}'
RATTAN_LOSS = '{"RepeatedLossPatternConfig": {"pattern": [{"StaticLossConfig": {"loss": [0.1], "duration": "1s"}}], "count": 2}}'
RATTAN_TOML = '[StaticBwConfig]\nbw = "12Mbps"\nduration = "3s"\n'


def written(folder: Path, text: str, name: str = "trace") -> Path:
    (path := folder / name).write_bytes(text.encode())
    return path


def read(path: Path, options: str = "", way: str = "down") -> Samples:
    trace = parse_trace(f"{path}({options})" if options else str(path))
    found = trace.recording(way, None)  # type: ignore[arg-type]
    assert isinstance(found, Samples)
    return found


def mbps(found: Samples) -> list[float]:
    assert found.rates is not None
    return [round(rate * 8 / 1e6, 4) for rate in found.rates]


@pytest.mark.parametrize(
    ("text", "options", "times", "rates", "length"),
    [
        (PENSIEVE, "", [0, 0.55, 0.88], [4.037, 4.793, 4.492], 1.21),
        (OBOE, "", [0, 1, 2], [1.25, 0.75, 2.5], 3),
        ("\ufeff# a walk\r\n" + PENSIEVE, "", [0, 0.55, 0.88], [4.037, 4.793, 4.492], 1.21),
        (GNETTRACK, "", [0, 1, 2, 3, 4, 5], [0, 8, 16, 0.3, 0.5, 24], 6),
        (GNETTRACK, "skip=idle", [0, 1, 2], [8, 16, 24], 3),
        (LUMOS, "columns=seq_num:time_s+Throughput:rate_mbps", [0, 1, 3], [812, 640, 640], 5),
        (LUMOS, "columns=2:time_s+6:rate_kbps", [0, 1, 3], [0.812, 0.64, 0.64], 5),
        (FIVE_GOPHERS, "columns=time:time_stamp+mbps:rate_mbps", [0, 1], [310.5, 12], 2),
        (FIVE_GOPHERS, "columns=-+time_stamp+rate_mbps", [0, 1], [310.5, 12], 2),
        ("0,4\n1000,8\n", "columns=time_ms+rate_mbps", [0, 1], [4, 8], 2),
        ("0.4\n0.8\n", "columns=rate_mbps,every=2s", [0, 2], [0.4, 0.8], 4),
        ("5 | 1 | 2\n6 | 3 | 4\n", "columns=time_s+rate_up_mbps+rate_down_mbps", [0, 1], [2, 4], 2),
        (RATTAN, "", [0, 1.5, 1.525], [12, 29.123, 200], 1.55),
        ("\ufeff" + RATTAN, "", [0, 1.5, 1.525], [12, 29.123, 200], 1.55),
    ],
)  # fmt: skip
def test_each_form_is_read_as_it_is_found(
    tmp_path: Path, text: str, options: str, times: list[float], rates: list[float], length: float
) -> None:
    found = read(written(tmp_path, text), options)
    assert list(found.times) == pytest.approx(times) and mbps(found) == pytest.approx(rates)
    assert found.length_s == pytest.approx(length)


def test_models_of_delay_and_loss_and_those_in_toml_are_read_too(tmp_path: Path) -> None:
    delay = read(written(tmp_path, RATTAN_DELAY))
    assert delay.delays is not None and list(delay.delays) == pytest.approx([0.0105]) and delay.length_s == 2
    loss = read(written(tmp_path, RATTAN_LOSS, "loss"))
    assert loss.losses is not None and list(loss.losses) == pytest.approx([0.1, 0.1])
    assert mbps(read(written(tmp_path, RATTAN_TOML, "bw.toml"))) == [12]


@pytest.mark.parametrize("name", ["trace+tab=_0", "a=b+c", "HSDPA=1+2"])
def test_a_name_may_have_plus_and_equals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    written(tmp_path, PENSIEVE, name)
    monkeypatch.chdir(tmp_path)
    for text in (
        f"trace:{name}",
        f"delay=20ms,trace:{name}",
        f"up:trace:{name}(scale=2);down:rate=5mbit",
        f"trace:./{name}",
    ):
        profile = parse_profile(text)
        assert profile.up.mean_rate_bps("up") and parse_profile(profile.text()) == profile


def test_delays_are_not_taken_for_deliveries_in_silence(tmp_path: Path) -> None:
    path = written(tmp_path, STARLINK_DELAY, "delay_1.txt")
    with pytest.raises(
        SpecError, match=r"line 4: 19 comes before.*trace:FILE\(columns=delay_ms,every=10ms\)"
    ):
        read_recording(path, "up")
    found = read(path, "columns=delay_ms,every=10ms")
    assert found.delays is not None and list(found.delays) == pytest.approx([0.02, 0.02, 0.021, 0.019, 0.022])
    assert found.length_s == pytest.approx(0.05)
    (remark,) = Trace(File(str(written(tmp_path, "20\n20\n20\n21\n22\n")))).remarks("up", None)
    assert (
        "22ms long" in remark
        and "shorter than a second" in remark
        and "(columns=delay_ms,every=10ms)" in remark
    )


def test_rows_taken_while_idle_are_named(tmp_path: Path) -> None:
    path = written(tmp_path, GNETTRACK)
    (remark,) = parse_trace(str(path)).remarks("down", None)
    assert "3 of its rows (50%) were taken while idle or pinging: skip=idle leaves them out" in remark
    (remark,) = parse_trace(f"{path}(skip=idle)").remarks("down", None)
    assert "idle or pinging" not in remark and "16mbit on average" in remark


@pytest.mark.parametrize(
    ("text", "options", "says"),
    [
        ("0,4\n1,8\n", "", "trace:FILE(columns=time_s+rate_mbps)"),
        ("0.4\n0.8\n", "", "(columns=rate_mbps,every=1s)"),
        (LUMOS, "", "trace:FILE(columns=run_num:time_s+seq_num:rate_mbps)"),
        (FIVE_GOPHERS, "", "trace:FILE(columns=date:time_s+time:rate_mbps)"),
        (LUMOS, "columns=seq:time_s+Throughput:rate_mbps", "there is no column 'seq'; it has 6: run_num, seq_num"),
        (LUMOS, "columns=9:time_s+Throughput:rate_mbps", "there is no column '9'"),
        (LUMOS, "columns=Throughput:rate_mbps", "add every=1s"),
        (LUMOS, "columns=seq_num:time_s+Throughput:rate_mbps,every=1s", "a column is the time already"),
        (LUMOS, "columns=seq_num:time_s+Throughput:rate_up_mbps", "nothing is said of the way down"),
        ("time_s,rate_mbps\n0,1\n", "skip=idle", "of logs of G-NetTrack"),
        (PENSIEVE, "skip=idle", "of logs of G-NetTrack"),
        (GNETTRACK.replace("D,", "I,"), "skip=idle", "every row was taken while idle"),
        ('{"StaticBwConfig": {"bw": "12Mbps"}}', "", "duration is missing"),
        ('{"NormalizedBwConfig": {"mean": "12Mbps"}}', "", "expected one model of netem-trace, such as"),
        ('{"RepeatedBwPatternConfig": {"pattern": [{"SawtoothBwConfig": {}}]}}', "", "write one that draws at random out"),
        ('{"StaticBwConfig": {"bw": "12 parrots", "duration": "1s"}}', "", "is no bandwidth, such as 12Mbps"),
        ('{"StaticLossConfig": {"loss": [0.1, 0.2], "duration": "1s"}}', "", "loss=gilbert"),
        ("{", "", "trace"),
        ("{" * 5000, "", "trace"),
    ],
)  # fmt: skip
def test_each_error_says_what_makes_the_file_readable(
    tmp_path: Path, text: str, options: str, says: str
) -> None:
    path = written(tmp_path, text)
    with pytest.raises(SpecError) as caught:
        read(path, options)
    assert says in str(caught.value) and str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("trace:a(columns=time_s)", "none is a rate"),
        ("trace:a(columns=time_s+speed)", "'speed' is no meaning"),
        ("trace:a(columns=time_s+time_ms+rate_mbps)", "two are times"),
        ("trace:a(every=1s)", "whose columns= are said"),
        ("trace:a(columns=rate_mbps,every=0s)", "from 1us to a day"),
        ("trace:a(skip=nights)", "what can be left out is idle"),
        ("outage:5s@10s(skip=idle)", "of a file"),
    ],
)
def test_options_that_say_nothing_are_refused(text: str, says: str) -> None:
    with pytest.raises(SpecError, match=says):
        parse_trace(text)


def attempt(folder: Path, content: bytes, layout: Layout, name: str = "fuzzed") -> None:
    """It is read, in order and with as many values as times, or refused in a line that names the file."""
    (path := folder / name).write_bytes(content)
    recording_files._ways.cache_clear()
    try:
        found = read_recording(path, "down", layout)
    except SpecError as error:
        assert str(path) in str(error) and "\n" not in str(error)
        return
    assert found.length_s > 0
    if isinstance(found, Samples):
        assert list(found.times) == sorted(found.times)
        assert (
            len({len(c) for c in (found.times, found.rates, found.delays, found.losses) if c is not None})
            == 1
        )


FIELDS = st.sampled_from(["0", "1", "2.5", "-", "", "x", "1e9", "2020-01-01 10:00:00", "nan", "-1"])
LINES = st.lists(st.lists(FIELDS, min_size=1, max_size=4), max_size=6)


@given(LINES, st.sampled_from([",", ";", "\t", " ", "|"]), st.sampled_from(["time_s+rate_mbps", "-+rate_mbps+delay_ms",
       "a:time_s+b:rate_mbps", "2:rate_mbps", "time_stamp+loss_percent"]), st.sampled_from([0.0, 0.5]))  # fmt: skip
def test_any_file_with_columns_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, lines: list[list[str]], mark: str, columns: str, every_s: float
) -> None:
    content = "\r\n".join(["a" + mark + "b", *(mark.join(line) for line in lines)]).encode()
    for text in (content, content.partition(b"\r\n")[2]):
        attempt(tmp_path_factory.getbasetemp(), text, Layout(columns, every_s))


MODELS = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 10**12) | st.floats() | st.sampled_from(["12Mbps", "1s", "10ms 5us", "x", "0.1"]),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(
        st.sampled_from(["StaticBwConfig", "TraceBwConfig", "RepeatedBwPatternConfig", "StaticDelayConfig", "StaticLossConfig",
                         "pattern", "count", "bw", "duration", "delay", "loss", "secs", "nanos", "gbps", "bps"]),
        inner, max_size=4),
)  # fmt: skip


@given(MODELS)
def test_any_model_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, model: Any) -> None:
    attempt(tmp_path_factory.getbasetemp(), json.dumps(model).encode(), Layout())


@given(st.binary(max_size=80))
def test_any_toml_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    attempt(tmp_path_factory.getbasetemp(), b"[StaticBwConfig]\n" + content, Layout(), "fuzzed.toml")


@given(
    st.lists(
        st.tuples(st.sampled_from("DIV"), st.integers(0, 10**6), st.sampled_from(["-", "90.5"])),
        min_size=1,
        max_size=12,
    )
)
def test_what_is_left_out_takes_its_time_with_it(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, int, str]]
) -> None:
    lines = [
        f"2020.01.01_00.00.{second:02},{rate},{rate},{state},{ping}"
        for second, (state, rate, ping) in enumerate(rows)
    ]
    (path := tmp_path_factory.getbasetemp() / "gnet").write_text(
        "\n".join(["Timestamp,DL_bitrate,UL_bitrate,State,PINGAVG", *lines])
    )
    recording_files._ways.cache_clear()
    busy = [rate for state, rate, ping in rows if state == "D" and ping == "-"]
    if not busy:
        with pytest.raises(SpecError, match="every row"):
            read_recording(path, "down", Layout(skip="idle"))
        return
    found = read_recording(path, "down", Layout(skip="idle"))
    assert isinstance(found, Samples) and found.rates is not None
    assert found.length_s == pytest.approx(len(busy))
    assert list(found.rates) == pytest.approx([rate * 125 for rate in busy])

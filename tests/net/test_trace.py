"""Traces: as text, from files good and bad, from rules."""

from __future__ import annotations

import tracemalloc
from collections import Counter
from itertools import accumulate
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from testbed.errors import SpecError
from testbed.net.profile.deliveries import Milliseconds
from testbed.net.profile.generators import Flap, Outage, Sine, Step
from testbed.net.profile.profile import parse_profile
from testbed.net.profile.recordings import files as deliveries
from testbed.net.profile.recordings import files as recording_files
from testbed.net.profile.recordings.files import read_recording
from testbed.net.profile.recordings.recording import DeliveryTimes, Samples
from testbed.net.profile.schedule import Schedule, unpack
from testbed.net.profile.trace import File, Trace, parse_trace

rates = st.floats(0, 100e9) | st.integers(0, 1000).map(lambda mbit: mbit * 1e6)
times = st.floats(0.04, 2e5) | st.integers(1, 1000).map(float)
sources = (
    st.builds(Step, st.lists(st.tuples(rates, times), min_size=1, max_size=4).map(tuple))
    | st.tuples(rates, rates, times).map(lambda v: Sine(min(v[:2]), max(v[:2]), v[2]))
    | st.builds(Outage, times, st.just(0.0) | times)
    | st.tuples(times, times, times).map(lambda v: Outage(v[0], v[1], v[0] + v[1] + v[2]))
    | st.builds(Flap, times, times)
    | st.builds(
        File,
        st.sampled_from(["a.csv", "/tmp/some where/ATT-LTE.up", "../x(y", "traces/5g.csv"]).filter(
            lambda p: "(" not in p
        ),
    )
)
traces = st.builds(
    Trace,
    sources,
    scale=st.just(1.0) | st.floats(1e-3, 1e6),
    offset_s=st.just(0.0) | times,
    end=st.sampled_from(["loop", "hold"]),
    column=st.sampled_from(["", "up", "down"]),
)


@given(traces)
def test_every_trace_reads_back_from_its_text(trace: Trace):
    assert parse_trace(str(trace)) == trace


def test_steps_of_hours_read_back_from_their_text():
    trace = Trace(Step(((1e6, 12_500.0), (2e6, 604_800.0))), offset_s=1e-12)
    assert str(trace) == "step:1mbit*12500s+2mbit*604800s(offset=0.000000000001s)"
    assert parse_trace(str(trace)) == trace


@given(
    st.text(alphabet="trace:stepsineoutageflap0123456789.,=()*+@/msbit", max_size=40) | st.text(max_size=20)
)
def test_any_text_is_a_trace_or_a_refusal_in_one_line(text: str):
    try:
        trace = parse_trace(text)
    except SpecError as error:
        assert "\n" not in str(error)
        assert len(str(error)) < 300
    else:
        assert parse_trace(str(trace)) == trace


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("step:50mbit", "step:50mbit*10s+5mbit*5s"),
        ("step:50mbit*0s", "outside"),
        ("step:50mbps*1s", "unknown unit"),
        ("sine:50mbit..10mbit*10s", "lower rate comes first"),
        ("sine:10mbit*10s", "sine:10mbit..50mbit*20s"),
        ("outage:5s@58s/60s", "not be over"),
        ("flap:10s", "flap:10s/1s"),
        ("trace:", "cannot be a trace's file"),
        ("trace:x.csv(scale=0)", "scale 0"),
        ("trace:x.csv(scal=2)", "did you mean 'scale'"),
        ("trace:x.csv(end=stop)", "loop or hold"),
        ("trace:x.csv(column=left)", "up (ul) or down (dl)"),
        ("trace:x.csv(scale=2,scale=3)", "twice"),
        ("trace:x.csv(scale)", "key=value"),
        ("trace:x.csv(offset=9)", "no unit"),
    ],
)
def test_a_wrong_text_is_refused_with_what_would_be_right(text: str, says: str):
    with pytest.raises(SpecError) as caught:
        parse_trace(text)
    assert says in str(caught.value)


def written(folder: Path, text: str | bytes) -> Path:
    path = folder / "trace"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def test_a_table_gives_rate_delay_and_loss_over_time(tmp_path: Path):
    path = written(
        tmp_path, "# made up\ntime_ms,rate_mbps,delay_ms,loss_percent\n500,8,10,0\n1500,16,20,50\n"
    )
    read = read_recording(path, "up")
    assert isinstance(read, Samples)
    assert (list(read.times), read.length_s) == ([0.0, 1.0], 2.0)
    assert read.rates is not None and list(read.rates) == [1e6, 2e6]
    assert read.delays is not None and list(read.delays) == pytest.approx([0.01, 0.02])
    assert read.losses is not None and list(read.losses) == [0.0, 0.5]
    assert read.mean("rates") == 1.5e6


def test_each_way_has_its_own_columns_and_column_takes_the_others(tmp_path: Path):
    path = written(tmp_path, "time_s,rate_up_kbps,rate_down_kbps,delay_ms\n0,8,80,5\n")
    trace = Trace(File(str(path)))
    assert trace.rates_bps("up", None) == (8000, 8000)
    assert trace.rates_bps("down", None) == (80_000, 80_000)
    assert parse_trace(f"{path}(column=dl,scale=0.5)").rates_bps("up", None) == (40_000, 40_000)
    only = written(tmp_path, "time_s,rate_down_kbps\n0,80\n1,80000\n")
    with pytest.raises(SpecError, match="line 1: nothing is said of the way up; with column="):
        read_recording(only, "up")


def test_rows_of_one_time_share_it_and_missing_values_are_those_before(tmp_path: Path):
    path = written(tmp_path, "time_s,rate_bps\n0,8\n1,16\n1,-\n1,24\n1,32\n3,8\n")
    read = read_recording(path, "up")
    assert isinstance(read, Samples) and read.rates is not None
    assert list(read.times) == [0, 1, 1.5, 2, 2.5, 3]
    assert list(read.rates) == [1, 2, 2, 3, 4, 1]
    assert read.length_s == 3.5


def test_a_byte_order_mark_comments_carriage_returns_and_blank_lines_say_nothing(tmp_path: Path):
    path = written(tmp_path, b"\xef\xbb\xbf# recorded by hand\r\n1\r\n\r\n5\r\n9\r\n\r\n")
    read = read_recording(path, "up")
    assert isinstance(read, DeliveryTimes) and list(read.times_ms) == [1, 5, 9]
    path = written(tmp_path, b"\xef\xbb\xbf\r\n# by hand\r\ntime_s,rate_bps\r\n\r\n0,8\r\n1,16\r\n \r\n")
    read = read_recording(path, "up")
    assert isinstance(read, Samples) and read.rates is not None and list(read.rates) == [1, 2]


@pytest.mark.parametrize("begin", [0.0, 540.0])
def test_two_numbers_a_line_are_seconds_and_megabits_per_second(tmp_path: Path, begin: float):
    rows = ((0.0, 4.037), (0.55, 4.793), (0.88, 4.492), (1.3, 0.0), (540.2, 3.1))
    read = read_recording(written(tmp_path, "".join(f"{begin + at}\t{rate}\n" for at, rate in rows)), "up")
    assert isinstance(read, Samples) and read.rates is not None
    assert list(read.times) == pytest.approx([at for at, _ in rows])
    assert list(read.rates) == pytest.approx([rate * 1e6 / 8 for _, rate in rows])


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("time_s;rate_mbps\n0;2.5\n1;\n2;8\n", "line 1: separate columns by commas, not by ';'"),
        ("0.0\t4\n1\n", "line 2: 1 fields, but 2 columns"),
        ("0.0\t4\n1\tx\n", "line 2: the rate: 'x' is not a number"),
        ("time_s,rate_up_kbps,rate_down_kbps\n1e400,1000,2000\n1,3000,100\n", "line 2: 1e400 is too large"),
        ("time_s,rate_mbps\n0,1e400\n", "line 2: rate_mbps: 1e400 is too large"),
        ("time_s,rate_mbps,loss\n0,1,1\n", "line 1: column 'loss' does not say its unit"),
        ("time,rate_mbps\n0,1\n", "line 1: column 'time' does not say its unit"),
        ("time_s,rate_mbps\n0,\0\n", "line 2: rate_mbps: '\\x00' is not a number"),
        ("3\n\n# so far\nx\n", "line 4: 'x' is not a whole number"),
        ("time_s,rate_mbps\n0,1\n1,x\n", "line 3: rate_mbps: 'x' is not a number"),
        ("time_s,rate_mbps\n0,1\n-1,1\n", "line 3: its time comes before"),
        ("time_s,rate_mbps\n0,1\n2\n", "line 3: 1 fields, but 2 columns"),
        ("time_s,rate_mbps\n0,-\n", "line 2: rate_mbps: no value, and none before it"),
        ("time_s,rate_mbps\n0,-5\n", "line 2: rate_mbps: -5 is out of bounds"),
        ("time_s,rate_mbps\nnan,1\n", "line 2: 'nan' is not a number"),
        ("time_s,rate_mbps\n1e300,1\n", None),
        ("time_s,rate_mbps\n0,1\n1e300,1\n", "line 3: more than 7 days"),
        ("time_s,rate_mbit\n0,1\n", "line 1: unknown column 'rate_mbit'; did you mean 'rate_mbps'"),
        ("time_s,rate_mbps,rate_kbps\n0,1,1\n", "line 1: two columns give the rate"),
        ("rate_mbps\n1\n", "line 1: no column gives the time"),
        ("time_s\n1\n", "line 1: no column gives a rate"),
        ("time_s,rate_mbps\n", "no row"),
        ("", "empty"),
        ("# only\n", "empty"),
        ("\ufeff\r\n", "empty"),
        (b"time_s,rate_mbps\n0,\xff\n", "line 2: not text"),
        ("time_s,rate_mbps\n0," + "1" * 5000, "line 2: longer than"),
        ("3\n5\nx\n", "line 3: 'x' is not a whole number of milliseconds"),
        ("3\n5\n4\n", "line 3: 4 comes before the line above, 5"),
        ("3\n5_0\n", "line 2: '5_0' is not"),
        ("3\n" + "9" * 13, "line 2:"),
        ("3\n4000000000\n", "line 2: 4000000000 ms is more than 7 days"),
        ("1" * 5000, "line 1: longer than"),
        ("0\n0\n", "no delivery after the time 0"),
    ],
)
def test_a_wrong_file_is_refused_with_the_line_it_is_wrong_in(
    tmp_path: Path, text: str | bytes, says: str | None
):
    path = written(tmp_path, text)
    if says is None:
        assert read_recording(path, "up").length_s == 1
        return
    with pytest.raises(SpecError) as caught:
        read_recording(path, "up")
    assert says in str(caught.value)
    assert str(path) in str(caught.value)


fields = st.text(alphabet='0123456789.-+e"# ', max_size=6)
rows = st.lists(fields, min_size=1, max_size=4).map(",".join)
headers = (
    st.sampled_from(
        ["time_s,rate_mbps", "time_ms,rate_up_bps,rate_down_bps", "time_us,delay_ms,loss_percent", "5"]
    )
    | rows
)
files = st.tuples(headers, st.lists(rows, max_size=6)).map(
    lambda v: "\n".join([v[0], *v[1]]).encode()
) | st.binary(max_size=60)


@given(files)
def test_any_file_is_a_recording_or_a_refusal_that_names_the_place(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
):
    path = tmp_path_factory.getbasetemp() / "fuzzed"
    path.write_bytes(content)
    try:
        # The time stamp alone may not tell two files written within one tick apart.
        recording_files._ways.cache_clear()
        read = read_recording(path, "up")
    except SpecError as error:
        assert str(path) in str(error)
        assert "\n" not in str(error)
        return
    assert read.length_s > 0
    if isinstance(read, Samples):
        assert list(read.times) == sorted(read.times)
        assert len({len(c) for c in (read.times, read.rates, read.delays, read.losses) if c is not None}) == 1
    made = Trace(File(str(path))).schedule("up", None)
    assert made.capacity(0.0, 3 * read.length_s) >= 0


@given(
    st.lists(st.integers(0, 400), min_size=1, max_size=30),
    st.sampled_from([3, 7, 64]),
    st.none() | st.tuples(st.integers(0, 29), st.sampled_from([b"x", b"-1", b"5 5", b"9" * 25, b"\xff"])),
)
def test_deliveries_are_the_lines_or_the_first_wrong_line_whatever_the_pieces_they_are_read_in(
    tmp_path_factory: pytest.TempPathFactory, gaps: list[int], piece: int, wrong: tuple[int, bytes] | None
):
    numbers = list(accumulate(gaps, initial=1))
    lines = [b"%d" % number for number in numbers]
    if wrong is not None:
        place = 1 + wrong[0] % len(gaps)
        lines.insert(place, wrong[1])
    path = tmp_path_factory.getbasetemp() / "pieces"
    path.write_bytes(b"\r\n".join(lines) + b"\r\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(deliveries, "_CHUNK", piece)
        recording_files._ways.cache_clear()
        if wrong is None:
            read = read_recording(path, "up")
            assert isinstance(read, DeliveryTimes) and list(read.times_ms) == numbers
        else:
            with pytest.raises(SpecError, match=f"line {place + 1}: "):
                read_recording(path, "up")


def test_a_recording_that_is_too_short_or_too_slow_is_seen_before_it_is_used(tmp_path: Path):
    (short,) = parse_profile(
        f"delay=5ms,trace:{written(tmp_path, '20 20 20 21 22'.replace(' ', chr(10)))}"
    ).remarks()
    assert "22ms long, 2.727mbit on average" in short  # 5 packets of 12,000 bits in 22 ms
    assert "are these delays" in short
    (slow,) = parse_profile(f"delay=5ms,trace:{written(tmp_path, '500000')}").remarks()
    assert "500s long, 24bit on average" in slow
    assert parse_profile("delay=5ms,rate=1mbit,outage:1s@1s").remarks() == []


@pytest.mark.parametrize(
    ("text", "mean"),
    [
        ("rate=20mbit,outage:2s", 20e6),  # it does not come again
        ("rate=20mbit,outage:2s@1s", 20e6),
        ("rate=20mbit,outage:2s@1s(scale=0.5)", 10e6),
        ("rate=20mbit,outage:2s@1s/8s", 15e6),
        ("rate=20mbit,flap:3s/1s", 15e6),
        ("step:8mbit*1s+16mbit*3s", 14e6),
        ("step:8mbit*1s+16mbit*3s(offset=2s)", 14e6),  # it begins again
        ("step:8mbit*1s+16mbit*3s(offset=1s,end=hold)", 16e6),
        ("step:8mbit*2s+16mbit*2s(offset=1s,end=hold)", 40e6 / 3),
        ("step:8mbit*2s+16mbit*2s(offset=9s,end=hold)", 16e6),
    ],
)
def test_the_mean_rate_is_that_of_what_is_replayed(text: str, mean: float):
    profile = parse_profile(text)
    steady = profile.steady().up
    assert steady.rate_bps == pytest.approx(mean)
    schedule = profile.up.schedule("up", 0.0)
    assert schedule is not None
    if "hold" not in text:
        assert schedule.capacity(0.0, 4000.0) * 8 / 4000 == pytest.approx(mean, rel=1e-3)


def test_a_file_that_changed_is_read_again(tmp_path: Path):
    path = written(tmp_path, "time_s,rate_mbps\n0,1\n")
    assert read_recording(path, "up").mean("rates") == 1e6 / 8
    written(tmp_path, "time_s,rate_mbps\n0,10\n")
    assert read_recording(path, "up").mean("rates") == 10e6 / 8


def test_what_is_no_file_or_not_there_is_said(tmp_path: Path):
    with pytest.raises(SpecError, match="not a regular file"):
        read_recording(Path("/dev/zero"), "up")
    with pytest.raises(SpecError, match="no such file"):
        parse_trace("nowhere.csv").schedule("up", None)


def test_a_rate_is_given_by_the_trace_or_beside_it_not_both(tmp_path: Path):
    path = written(tmp_path, "time_s,delay_ms\n0,10\n")
    assert parse_trace(str(path)).schedule("up", 5e6).rates is None
    path = written(tmp_path, "1\n2\n")
    with pytest.raises(SpecError, match="it gives the rate"):
        parse_trace(str(path)).schedule("up", 5e6)
    with pytest.raises(SpecError, match="no last value to hold"):
        parse_trace(f"{path}(end=hold)").schedule("up", None)


def test_rules_are_what_they_say():
    step = parse_trace("step:8mbit*2s+16mbit*1s").schedule("up", None)
    assert [step.rate_at(t) for t in (0.5, 1.9, 2.1, 3.5)] == [1e6, 1e6, 2e6, 1e6]
    assert parse_trace("step:8mbit*2s+16mbit*1s(end=hold)").schedule("up", None).rate_at(99) == 2e6
    outage = parse_trace("outage:5s@10s").schedule("up", 8e6)
    assert [outage.rate_at(t) for t in (9.9, 10.1, 14.9, 15.1, 1000)] == [1e6, 0, 0, 1e6, 1e6]
    again = parse_trace("outage:5s@10s/60s").schedule("up", 8e6)
    assert [again.rate_at(t) for t in (12, 16, 72, 76)] == [0, 1e6, 0, 1e6]
    flap = parse_trace("flap:3s/1s").schedule("up", None)
    assert [flap.rate_at(t) for t in (2.9, 3.1, 4.1)] == [float("inf"), 0, float("inf")]
    sine = parse_trace("sine:8mbit..24mbit*4s").schedule("up", None)
    assert sine.capacity(0, 4) == pytest.approx(8e6, rel=1e-6)
    assert [sine.rate_at(t) for t in (1.0, 3.0)] == pytest.approx([3e6, 1e6], rel=1e-4)


def gnettrack(path: Path, way: str) -> list[tuple[int, int]]:
    """(seconds of the day, kbit/s) straight out of the file."""
    names, *rows = [line.split(",") for line in path.read_text().splitlines()]
    at, rate = names.index("Timestamp"), names.index("DL_bitrate" if way == "down" else "UL_bitrate")
    clock = [[int(part) for part in row[at].partition("_")[2].split(".")] for row in rows]
    return [(3600 * h + 60 * m + s, int(row[rate])) for (h, m, s), row in zip(clock, rows, strict=True)]


@pytest.mark.parametrize("name", ["5g-driving-download.csv", "5g-static-download.csv"])
@pytest.mark.parametrize("way", ["up", "down"])
def test_a_gnettrack_log_is_read_as_it_is(data: Path, name: str, way: str):
    rows = gnettrack(data / "traces" / name, way)
    made = Trace(File(str(data / "traces" / name))).schedule(way, None)  # type: ignore[arg-type]
    start = rows[0][0]
    # Every second's mean rate is that of its rows, or the last row's before it where it has none.
    for second, following in zip(
        sorted({s for s, _ in rows}), sorted({s for s, _ in rows})[1:], strict=False
    ):
        of_second = [rate for s, rate in rows if s == second]
        expected = sum(of_second) / len(of_second) * (following - second) * 125
        assert made.capacity(second - start, following - start) == pytest.approx(expected, rel=1e-5, abs=1)


@pytest.mark.parametrize(
    "name", ["ATT-LTE-driving-2016.down", "ATT-LTE-driving-2016.up", "TMobile-LTE-short.down"]
)
def test_a_mahimahi_file_gives_its_opportunities(data: Path, name: str):
    lines = [int(line) for line in (data / "traces" / name).read_text().split()]
    read = read_recording(data / "traces" / name, "up")
    assert isinstance(read, DeliveryTimes)
    assert list(read.times_ms) == lines
    made = Trace(File(str(data / "traces" / name))).schedule("up", None)
    made_in = Counter(ms // 100 for ms in lines[:-1])  # the last one belongs to the next round's beginning
    for tenth in range(1, lines[-1] // 100):
        assert made.capacity(tenth / 10, (tenth + 1) / 10) == 1500 * made_in[tenth]


@pytest.mark.parametrize(
    ("names", "values"),
    [
        ("rate_kbps", "{rate}"),
        ("rate_kbps,delay_ms,loss_percent", "{rate},{delay},0.5"),
        ("rate_up_kbps,rate_down_kbps,delay_ms", "{rate},{rate}1,{delay}"),
    ],
)
def test_an_hour_costs_no_more_memory_than_its_file_with_both_ways(tmp_path: Path, names: str, values: str):
    rows = (
        f"{s * 4 / 10:.1f}," + values.format(rate=10_000 + s % 977, delay=20 + s % 31) + "\n"
        for s in range(9000)
    )
    table = written(tmp_path, f"time_s,{names}\n" + "".join(rows))
    tracemalloc.start()
    kept = [read_recording(table, way) for way in ("up", "down")]
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held < 0.9 * table.stat().st_size
    assert [one.length_s for one in kept] == [3600, 3600]


def test_times_of_whole_milliseconds_are_the_same_whichever_way_they_are_held(tmp_path: Path):
    rows = "time_us,rate_bps\n0,8\n1000,16\n3000,24\n"
    whole = Trace(File(str(written(tmp_path, rows)))).schedule("up", None)
    assert isinstance(whole, Schedule) and isinstance(whole.times, Milliseconds)
    with open(tmp_path / "packed", "w+b") as file:
        described = whole.pack(file)
        file.flush()
        again = unpack(described, file.fileno())
    assert [again.rate_at(t / 1000) for t in (0.5, 1, 2.5, 3, 4.9, 5)] == [1, 2, 2, 3, 3, 1]
    odd = Trace(File(str(written(tmp_path, rows.replace("3000", "3000.5"))))).schedule("up", None)
    assert isinstance(odd, Schedule) and list(odd.times) == pytest.approx([0, 0.001, 0.0030005], abs=1e-15)
    close = "time_us,rate_bps\n0,8\n999.9995,8\n999.9996,8\n"
    assert read_recording(written(tmp_path, close), "up").length_s == pytest.approx(0.0009999997, abs=1e-15)


def test_an_hour_of_deliveries_costs_no_more_memory_than_its_file_even_while_it_is_read(tmp_path: Path):
    path = written(tmp_path, "".join(f"{ms}\n" for ms in range(1000, 3_600_000, 3)))
    import numpy as np  # noqa: F401  (the reader's, whose import is no part of what a trace costs)

    tracemalloc.start()
    kept = read_recording(path, "up")
    both = read_recording(path, "down")
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held < 0.65 * path.stat().st_size
    assert peak < path.stat().st_size
    assert isinstance(kept, DeliveryTimes) and both is kept

"""Other testbeds' catalogues of links, read as profiles."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from testbed.errors import SpecError
from testbed.net.profile.catalogue import read_catalogue
from testbed.net.profile.profile import parse_profile
from tests.command import command

#: The form of 6G-Testbed's, with numbers of our own.
CATALOGUE = """\
# Profiles for studies
selected_profiles:
  - none
  - city

profiles:
  none:
    description: "No impairment"
    delay_ms: 0
    jitter_ms: 0
    delay_distribution: fixed
    loss_pct: 0.0
    loss_correlation_pct: 0
    limit_packets: null
    rate_mbit: null

  city:
    description: "A cell in a city"
    delay_ms: 21
    jitter_ms: 4.5
    delay_distribution: normal
    loss_model: correlated
    loss_pct: 0.2
    loss_correlation_pct: 25
    reorder_pct: 0.02
    reorder_correlation_pct: 50
    duplicate_pct: 0.01
    limit_packets: 900
    rate_mbit: 90

  sky:
    delay_ms: 25
    jitter_ms: 7
    delay_distribution: paretonormal
    loss_pct: 0.5
    rate_mbit: 120
    uplink:
      loss_pct: 0.8
      loss_correlation_pct: 40
      rate_mbit: 12

default_interface: "auto"
bidirectional: true
"""


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "profiles.yaml"
    path.write_text(text)
    return path


def test_each_way_asks_for_what_the_catalogue_says(tmp_path: Path) -> None:
    found = read_catalogue(written(tmp_path, CATALOGUE))
    assert list(found) == ["none", "city", "sky"] and found["city"].source == "A cell in a city"
    assert (
        found["none"] == parse_profile("delay=0ms")
        or found["none"].text() == parse_profile("delay=0ms").text()
    )
    city = parse_profile(
        "rate=90mbit,delay=21ms,jitter=4.5ms,loss=correlated(0.2%,25%),reorder=0.02%,duplicate=0.01%,queue=900p"
    )
    assert found["city"].ways == city.ways
    sky = parse_profile(
        "up:rate=12mbit,delay=25ms,jitter=paretonormal(7ms),loss=correlated(0.8%,40%);"
        "down:rate=120mbit,delay=25ms,jitter=paretonormal(7ms),loss=0.5%"
    )
    assert found["sky"].ways == sky.ways
    assert all(parse_profile(str(profile)).ways == profile.ways for profile in found.values())


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("delay_ms: -1", "city: delay_ms: .*greater than or equal to 0"),
        ("delays_ms: 1", "city: unknown key 'delays_ms'; did you mean 'delay_ms'"),
        ("delay_distribution: weibull", "city: delay_distribution: "),
        ("loss_pct: 120", "city: loss_pct: "),
        ("uplink: {rate: 3}", "city: uplink: unknown key 'rate'"),
        ("rate_mbit: .nan", "city: rate_mbit: "),
        ("delay_ms: 1.0e+12", "city: .*delay"),
    ],
)
def test_what_a_profile_says_wrong_is_named(line: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=words) as error:
        read_catalogue(written(tmp_path, f"profiles:\n  city:\n    {line}\n"))
    assert "profiles.yaml" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "text", ["", "profiles: {}", "profiles: 3", "profiles: {a: 3}", "links: {}", "profiles: {1: {}}"]
)
def test_what_is_no_catalogue_is_one_line(text: str, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"profiles\.yaml"):
        read_catalogue(written(tmp_path, text))


amounts = st.one_of(st.none(), st.floats(0, 1000, allow_nan=False))
percents = st.one_of(st.none(), st.floats(0, 100, allow_nan=False))
ways = st.fixed_dictionaries(
    {},
    optional={
        "delay_ms": amounts,
        "jitter_ms": amounts,
        "delay_distribution": st.sampled_from([None, "fixed", "normal", "pareto", "paretonormal", "uniform"]),
        "loss_pct": percents,
        "loss_correlation_pct": percents,
        "rate_mbit": amounts,
        "reorder_pct": percents,
        "limit_packets": st.one_of(st.none(), st.integers(1, 10_000)),
    },
)


@given(way=ways, uplink=st.one_of(st.none(), ways))
def test_whatever_it_asks_for_is_a_profile_that_can_be_written_or_one_line(
    way: dict[str, object], uplink: dict[str, object] | None, tmp_path_factory: pytest.TempPathFactory
) -> None:
    link = way | ({} if uplink is None else {"uplink": uplink})
    path = written(tmp_path_factory.mktemp("catalogue"), yaml.safe_dump({"profiles": {"a": link}}))
    try:
        found = read_catalogue(path)["a"]
    except SpecError as error:
        assert "\n" not in str(error)
        return
    assert parse_profile(str(found)).ways == found.ways
    assert found.down.delay_s == pytest.approx((way.get("delay_ms") or 0) / 1e3)  # type: ignore[operator]


def test_the_command_lists_them(tmp_path: Path) -> None:
    path = written(tmp_path, CATALOGUE)
    listed = json.loads(command("profiles", str(path), "--json").out)["profiles"]
    assert [each["name"] for each in listed] == ["none", "city", "sky"]
    assert listed[2]["up"].startswith("rate=12mbit,delay=25ms")
    assert "city" in command("profiles", str(path)).out
    missing = command("profiles", str(tmp_path / "none.yaml"))
    assert missing.status == 2 and missing.errors.count("\n") == 1

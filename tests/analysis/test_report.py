"""The report's page: whole, honest, and alive in a browser."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from testbed.analysis import report
from testbed.analysis.run import load
from tests.analysis.make_run import lines, make_run, rewrite

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = make_run(
        tmp_path_factory.mktemp("report") / "run", ("5g-good", "lte"), ("fp16", "int8", "int4"), examples=5
    )
    rows = lines(run)
    odd = {"cloud_slowdown": 4.0, "answer": "</script><b>"}
    rewrite(run, [{**r, **odd, "calibrated": r["profile"] != "lte"} for r in rows[:-1]])
    return report.write(load(run))


@pytest.mark.slow
def test_the_page_needs_nothing_from_outside(page: Path) -> None:
    text = page.read_text()
    outside = re.findall(r"""(?:src|href)=["']?(?!data:)[^"'>]+""", text)
    assert outside == []
    assert "http" not in re.sub(r"base64,[A-Za-z0-9+/=]+", "", text)


@pytest.mark.slow
def test_the_page_says_what_was_run_and_what_to_know(page: Path) -> None:
    text = html.unescape(page.read_text())
    for words in (
        "smollm2-135m",
        "userspace",
        "Times taken over from an identical earlier trial: prefill",
        "Compute is emulated in",
        "Links measured out of tolerance: lte.",
        "up to 1 at the edge and 4 in the cloud",
        "The run has no calibration",
        "int8-lossless",
        "against full cache",
        "This run has no data for: link_sweep",
    ):
        assert words in text, words


def test_names_cannot_become_markup(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", ("lte",), ("int8",), tasks=("needle",), examples=3)
    rewrite(run, [r | {"profile": "<img src=x onerror=alert(1)>"} for r in lines(run)])
    text = report.render(load(run), [])
    assert "<img src=x" not in text
    assert "&lt;img src=x" in text


@pytest.mark.usefixtures("few_figures")
def test_what_is_missing_in_the_directory_is_said(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", ("lte",), ("fp16", "int8"), tasks=("needle",), examples=4)
    failed = [r | {"error": "the cloud died"} if i == 0 else r for i, r in enumerate(lines(run))]
    rewrite(run, failed)
    text = (run / "trials.jsonl").read_text()
    (run / "trials.jsonl").write_text(text[:-30])
    (run / "manifest.json").unlink()
    page = html.unescape(report.write(load(run)).read_text())
    for words in (
        "1 trial failed (",
        "the cloud died",
        "1 unreadable line",
        "manifest.json is missing",
    ):
        assert words in page, words
    assert (run / "comparisons.csv").is_file()


@pytest.mark.slow
def test_a_page_of_one_row_is_written(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", ("lte",), ("int8",), ("split",), ("needle",), examples=1)
    assert "This run has no data for: latency_quality" in report.write(load(run)).read_text()


PROBE = """
<script>
window.addEventListener("load", () => {
  const seen = { errors: window.failed, columns: {}, widest: document.documentElement.scrollWidth, width: innerWidth };
  const rows = () => [...document.querySelector("#settings tbody").rows];
  const heads = [...document.querySelectorAll("#settings th button")];
  heads.forEach((head, i) => {
    head.click();
    const up = rows().map((r) => r.cells[i].dataset.key);
    head.click();
    seen.columns[head.textContent] = [up, rows().map((r) => r.cells[i].dataset.key)];
  });
  const filter = document.getElementById("filter");
  filter.value = "LTE int8";
  filter.dispatchEvent(new Event("input"));
  seen.left = rows().filter((r) => r.offsetParent !== null).map((r) => r.textContent);
  seen.said = document.getElementById("shown").textContent;
  seen.pictures = [...document.images].map((i) => i.naturalWidth);
  document.body.innerHTML = "<pre id=seen></pre>";
  document.getElementById("seen").textContent = JSON.stringify(seen);
});
</script>
"""


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium (apt install chromium)")
@pytest.mark.parametrize("width", [500, 1280])
def test_the_page_opens_from_disk_sorts_and_filters_in_a_browser(
    page: Path, tmp_path: Path, width: int
) -> None:
    watched = page.read_text().replace(
        "<head>", "<head><script>window.failed=[];window.onerror=(m)=>{window.failed.push(m)}</script>"
    )
    copy = tmp_path / "page.html"
    copy.write_text(watched.replace("</body>", PROBE + "</body>"))
    command = [
        CHROMIUM,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={tmp_path / 'home'}",
    ]
    command += [f"--window-size={width},900", "--virtual-time-budget=5000", "--dump-dom", f"file://{copy}"]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
    found = re.search(r'<pre id="seen">(.*?)</pre>', shown, re.S)
    assert found is not None, shown[-500:]
    seen = json.loads(html.unescape(found[1]))
    assert seen["errors"] == []
    assert seen["widest"] <= seen["width"]
    assert all(w > 300 for w in seen["pictures"])
    assert len(seen["pictures"]) >= 5
    for heading in ("latency (s)", "payload (B)", "score"):
        up, down = ([float(k) for k in keys if k] for keys in seen["columns"][heading])
        assert up == sorted(up)
        assert down == sorted(down, reverse=True)
    up, _ = seen["columns"]["codec"]
    assert [k for k in up if k] == sorted(k for k in up if k)
    assert len(seen["left"]) == 2  # a line for each task
    assert all("lte" in line and "int8" in line for line in seen["left"])
    assert seen["said"].startswith("2 of ")

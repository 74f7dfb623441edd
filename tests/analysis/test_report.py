"""The report's page: whole, honest, and alive in a browser."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from testbed.analysis import report
from testbed.analysis.figures import draw_all
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
    scripts = re.compile(r"<script>.*?</script>", re.S)  # these name schemas, and may fetch nothing
    bare = scripts.sub("", re.sub(r"base64,[A-Za-z0-9+/=]+", "", text))
    assert re.findall(r"""(?:src|href)=["']?(?!data:|#)[^"'>]+""", bare) == []
    assert "http" not in bare.replace("http-equiv", "")
    assert "default-src 'none'" in text and len(text.encode()) <= 2_000_000


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


EXPLORE = """
<script>
window.addEventListener("load", async () => {
  const wait = () => new Promise((done) => setTimeout(done, 300));
  const seen = { width: innerWidth, dark: matchMedia("(prefers-color-scheme: dark)").matches };
  const look = () => ({
    hash: decodeURIComponent(location.hash),
    off: [...document.querySelectorAll("#settings tbody tr.off")].map((r) => r.dataset.setting),
    answers: [...document.querySelectorAll("#answers tbody tr")].map((r) => r.cells[0].textContent),
    requests: [...document.getElementById("request").options].map((o) => o.value),
    points: document.querySelectorAll("#chart .mark-symbol path").length,
    chart: document.getElementById("chart").getAttribute("aria-label"),
    bars: document.querySelectorAll("#gantt .mark-rect path").length,
  });
  try {
    await wait();
    seen.first = look();
    [...document.querySelectorAll("#legend button")].find((b) => b.textContent === "int4").click();
    await wait();
    seen.isolated = look();
    const row = [...document.querySelectorAll("#settings tbody tr")].find((r) => r.dataset.setting === "int4");
    row.dispatchEvent(new KeyboardEvent("keydown", { key: "Enter" }));
    const link = document.getElementById("link");
    link.value = "lte";
    link.dispatchEvent(new Event("change"));
    await wait();
    seen.again = look();
    seen.question = document.getElementById("question").textContent;
    if (window.axe) {
      const found = await axe.run();
      seen.violations = found.violations.map((v) => [v.id, v.nodes.map((n) => n.target.join(" ")).slice(0, 3)]);
    }
  } catch (error) { seen.failed = String(error.stack || error); }
  document.body.innerHTML = "<pre id=seen></pre>";
  document.getElementById("seen").textContent = JSON.stringify({ ...seen, console: window.said });
  parent.postMessage(document.getElementById("seen").textContent, "*");
});
</script>
"""
_FRAME = """<body><iframe src="page.html" style="width:WIDTHpx;height:900px;border:0"></iframe><pre id="seen"></pre>
<script>addEventListener("message", (e) => { document.getElementById("seen").textContent = e.data; });</script></body>"""
_WATCH = """<script>window.failed=[];window.said=[];window.onerror=(m)=>{window.failed.push(m);window.said.push(m)};
for (const each of ["log", "info", "warn", "error"]) console[each] = (...what) => window.said.push(what.join(" "));</script>"""


def browse(page: Path, at: Path, probe: str, *flags: str, width: int = 1280) -> dict[str, Any]:
    """What the probe saw in the page. A window has at least 500 pixels: a narrower page stands in a frame."""
    head, _, rest = page.read_text().partition("<head>")
    body, _, end = rest.rpartition("</body>")
    (copy := at / "page.html").write_text(f"{head}<head>{_WATCH}{body}{probe}</body>{end}")
    if width < 500:
        (copy := at / "frame.html").write_text(_FRAME.replace("WIDTH", str(width)))
    found = re.search(
        r'<pre id="seen">(.*?)</pre>', chromium(at, "--dump-dom", *flags, f"file://{copy}"), re.S
    )
    assert found is not None
    seen: dict[str, Any] = json.loads(html.unescape(found[1]))
    return seen


def chromium(home: Path, *flags: str) -> str:
    quiet = ["gpu", "background-networking", "component-update", "sync", "quic"]
    command = [
        str(CHROMIUM),
        "--headless",
        "--no-sandbox",
        "--no-first-run",
        f"--user-data-dir={home / 'home'}",
    ]
    command += [f"--disable-{each}" for each in quiet] + ["--virtual-time-budget=8000", *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=240).stdout


needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium (apt install chromium)")


@pytest.fixture(scope="module")
def asked(page: Path) -> Path:
    """The page of a run that kept its questions."""
    examples = {(row["task"], row["example"]) for row in lines(page.parent)}
    kept = [
        {"task": task, "example": name, "question": f"Which <b> of {name}?", "gold": "x"}
        for task, name in examples
    ]
    (page.parent / "questions.jsonl").write_text("".join(json.dumps(one) + "\n" for one in kept))
    (other := page.parent / "asked.html").write_text(report.render(load(page.parent), []))
    return other


@needs_chromium
@pytest.mark.slow
@pytest.mark.parametrize(("width", "dark"), [(390, False), (800, True), (1400, False)])
def test_what_is_isolated_is_so_everywhere_and_nothing_hinders_a_reader(
    asked: Path, tmp_path: Path, width: int, dark: bool
) -> None:
    axe = find_spec("axe_core_python")
    assert axe is not None and axe.origin is not None
    rules = (Path(axe.origin).parent / "axe.min.js").read_text().replace("</script", "<\\/script")
    flags = [f"--window-size={max(width, 500)},900", *(["--force-dark-mode"] if dark else [])]
    seen = browse(asked, tmp_path, f"<script>{rules}</script>{EXPLORE}", *flags, width=width)
    assert "failed" not in seen, seen["failed"]
    assert seen["console"] == []
    assert seen["violations"] == []
    assert seen["dark"] is dark and abs(seen["width"] - width) <= 1
    first, isolated, again = seen["first"], seen["isolated"], seen["again"]
    assert first["off"] == [] and first["points"] == 5 and first["bars"] > 2
    assert set(first["requests"]) == {"fp16", "int8", "int4", "cloud", "edge"}
    assert "of 5 settings on 5g-good. Not beaten in both: " in first["chart"]
    assert set(isolated["off"]) == {"fp16", "int8", "cloud", "edge"} and isolated["requests"] == ["int4"]
    assert isolated["answers"] == ["the full cache, on one machine", "int4"]
    assert "only=int4" in isolated["hash"] and "link=5g-good" in isolated["hash"]
    assert again["off"] == [] and "only" not in again["hash"] and "link=lte" in again["hash"]
    assert seen["question"].startswith("Which <b> of ")


@needs_chromium
@pytest.mark.slow
def test_the_address_restores_what_was_looked_at(asked: Path, tmp_path: Path) -> None:
    text = asked.read_text().replace(
        "<head>", "<head><script>location.hash='link=lte&only=int8&x=bytes'</script>", 1
    )
    (copy := tmp_path / "at.html").write_text(text)
    first = browse(copy, tmp_path, EXPLORE)["first"]
    assert (
        set(first["off"]) == {"fp16", "int4", "cloud", "edge"}
        and "payload (bytes) of" in first["chart"]
        and "on lte" in first["chart"]
    )


@needs_chromium
@pytest.mark.slow
def test_the_page_is_printed_with_all_its_columns(asked: Path, tmp_path: Path) -> None:
    chromium(tmp_path, f"--print-to-pdf={tmp_path / 'page.pdf'}", f"file://{asked}")
    assert (tmp_path / "page.pdf").read_bytes().startswith(b"%PDF")
    printed = """<script>window.addEventListener("load", () => {
      const table = document.getElementById("settings").getBoundingClientRect();
      const text = JSON.stringify({ right: table.right, width: innerWidth });
      document.body.innerHTML = "<pre id=seen></pre>"; document.getElementById("seen").textContent = text; });</script>"""
    (copy := tmp_path / "print.html").write_text(asked.read_text().replace("@media print", "@media all"))
    seen = browse(copy, tmp_path, printed, "--window-size=794,1100")  # A4 at 96 pixels an inch
    assert seen["right"] <= seen["width"]


def test_a_run_of_five_thousand_rows_is_a_page_within_its_size(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", ("lte", "5g-good"), ("fp16", "int8", "int4", "int2"), examples=5)
    few = lines(run)
    rewrite(
        run,
        [row | {"trial": f"{i}-{row['trial']}", "repeat": i} for i in range(5000 // len(few)) for row in few],
    )
    text = report.render(load(run), [])
    assert len(text.encode()) < 1_950_000
    pictures = [
        path
        for path in draw_all(load(run), ["stages", "latency_quality", "timeline"])
        if path.suffix == ".png"
    ]
    assert len(report.render(load(run), pictures * 6).encode()) <= 2_000_000
    data = json.loads(re.search(r'id="data">(.*?)</script>', text, re.S)[1])  # type: ignore[index]
    assert len(data["answers"]) > 4900 and data["points"][0]["n"] == 5


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium (apt install chromium)")
@pytest.mark.parametrize("width", [500, 1280])
def test_the_page_opens_from_disk_sorts_and_filters_in_a_browser(
    page: Path, tmp_path: Path, width: int
) -> None:
    seen = browse(page, tmp_path, PROBE, f"--window-size={width},900")
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

"""How long a run's report takes to open, until its figure is drawn: what the browser takes longer than for an empty page.

    .venv/bin/python -m benchmarks.page_opening RUN [--rows 5000] [--times 5] [--json]

RUN is a run's directory; with `--rows` its rows are repeated until there are so many. Chromium, without a window, from a file.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from statistics import median

from testbed.analysis import report
from testbed.analysis.run import load

_PROBE = """<script>addEventListener("load", () => {
  const look = () => document.querySelector("#chart svg") ? document.title = "drawn" : requestAnimationFrame(look);
  look();
});</script>"""


def opened(browser: str, page: Path) -> float:
    """Seconds from the browser's start until it has read, laid out and drawn the page; it waits for no timer meanwhile."""
    with tempfile.TemporaryDirectory() as profile:
        began = time.monotonic()
        done = subprocess.run(
            [browser, "--headless", "--no-sandbox", "--no-first-run", "--disable-gpu", "--disable-background-networking",
             f"--user-data-dir={profile}", "--virtual-time-budget=8000", "--dump-dom", f"file://{page}"],
            capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        took = time.monotonic() - began
    if "<title>drawn</title>" not in done.stdout:
        raise SystemExit(f"{browser} drew no figure: {done.stderr.strip()[-300:]}")
    return took


def repeated(run: Path, rows: int, into: Path) -> Path:
    """A copy of a run's directory with its rows again and again, as further repeats."""
    shutil.copytree(run, into)
    lines = [json.loads(line) for line in (run / "trials.jsonl").read_text().splitlines()]
    many = [
        line | {"trial": f"{line['trial']}-{i}", "repeat": line["repeat"] + 1000 * i}
        for i in range(-(-rows // len(lines)))
        for line in lines
    ]
    (into / "trials.jsonl").write_text("".join(json.dumps(line) + "\n" for line in many[:rows]))
    return into


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--rows", type=int, default=0)
    parser.add_argument("--times", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        raise SystemExit("needs chromium")
    with tempfile.TemporaryDirectory(prefix="testbed-benchmark-") as folder:
        run = repeated(options.run, options.rows, Path(folder) / "run") if options.rows else options.run
        loaded = load(run)
        text = report.render(loaded, sorted((run / "figures").glob("*.png")))
        body, _, end = text.rpartition("</body>")
        (page := Path(folder) / "page.html").write_text(f"{body}{_PROBE}</body>{end}")
        (empty := Path(folder) / "empty.html").write_text("<title>drawn</title>")
        turns = [(opened(browser, empty), opened(browser, page)) for _ in range(options.times)]
    took = [full - bare for bare, full in turns]
    told = {
        "rows": len(loaded.rows),
        "bytes": len(text.encode()),
        "n": len(took),
        "empty_s": median(bare for bare, _ in turns),
        "opening_s": median(took),
        "most_s": max(took),
        "load": os.getloadavg()[0],
    }
    if options.json:
        print(json.dumps(told))
        return
    print("rows   page (MB)   an empty page (s)   opening (s)   at most (s)")
    print(
        f"{told['rows']:<6} {told['bytes'] / 1e6:<11.2f} {told['empty_s']:<19.2f} {told['opening_s']:<13.2f} {told['most_s']:.2f}"
    )


if __name__ == "__main__":
    main()

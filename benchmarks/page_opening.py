"""How long a run's report takes to open: until the page is there, and until its figure is drawn.

    .venv/bin/python -m benchmarks.page_opening RUN [--rows 5000] [--times 5] [--json]

RUN is a run's directory; with `--rows` its rows are repeated until there are so many. Chromium, without a window, from a file.
"""

from __future__ import annotations

import argparse
import html
import json
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from testbed.analysis import report
from testbed.analysis.run import load

_PROBE = """<script>addEventListener("load", () => {
  const at = performance.now(), seen = { page: at / 1e3 };
  const look = () => {
    if (!document.querySelector("#chart svg")) return requestAnimationFrame(look);
    seen.drawn = performance.now() / 1e3; seen.rows = document.querySelectorAll("#settings tbody tr").length;
    document.title = "seen " + JSON.stringify(seen);
  };
  look();
});</script>"""


def opened(browser: str, page: Path) -> dict[str, Any]:
    """Seconds from the beginning of the navigation, as the page itself sees them."""
    with tempfile.TemporaryDirectory() as profile:
        done = subprocess.run(
            [browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}", "--timeout=20000",
             "--dump-dom", f"file://{page}"],
            capture_output=True, text=True, timeout=120,
        )  # fmt: skip
    found = re.search(r"<title>seen (.*?)</title>", done.stdout)
    if not found:
        raise SystemExit(f"{browser} drew no figure: {done.stderr.strip()[-300:]}")
    seen: dict[str, Any] = json.loads(html.unescape(found[1]))
    return seen


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
        (page := Path(folder) / "page.html").write_text(text.replace("</body>", f"{_PROBE}</body>"))
        each = [opened(browser, page) for _ in range(options.times)]
    told = {
        "rows": len(loaded.rows),
        "bytes": len(text.encode()),
        "n": len(each),
        "page_s": median(one["page"] for one in each),
        "drawn_s": median(one["drawn"] for one in each),
        "most_s": max(one["drawn"] for one in each),
        "load": os.getloadavg()[0],
    }
    if options.json:
        print(json.dumps(told))
        return
    print("rows   page (MB)   there (s)   drawn (s)   at most (s)")
    print(
        f"{told['rows']:<6} {told['bytes'] / 1e6:<11.2f} {told['page_s']:<11.2f} {told['drawn_s']:<11.2f} {told['most_s']:.2f}"
    )


if __name__ == "__main__":
    main()

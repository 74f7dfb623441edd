"""Keep a run's rows where they can be read for good: one small directory, which `testbed claims`, `report` and `compare` take.

    python -m benchmarks.publish RUN DIRECTORY [--where EXPRESSION]

The directory gets the finished rows as `trials.parquet` (zstd), the manifest without what is this machine's alone, and the
diagnosis, where one lies in the run. It is written anew where it is there.
"""

from __future__ import annotations

import argparse
import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pandas as pd

from testbed.analysis.run import load
from testbed.experiment.results import FORMAT, PUBLISHED, RunDirectory
from testbed.experiment.row import Row

#: Of the manifest: what a reader needs, and no paths of whoever made the run.
_KEPT = (
    "name",
    "settings",
    "prompt",
    "topology",
    "link",
    "profiles",
    "emulator",
    "endpoints",
    "inputs",
    "traces",
    "asked",
    "created",
)
_OF_MACHINES = ("cpu", "cores", "kernel", "python", "memory_bytes", "packages", "versions")


def publish(source: Path, target: Path, where: str | None = None) -> int:
    """Write `target`; returns how many rows it has. Raises UsageError where the run has no finished row."""
    run = load(source, where).require()
    manifest = {key: run.manifest[key] for key in _KEPT if key in run.manifest}
    host = run.manifest.get("host")
    manifest["host"] = {k: host[k] for k in _OF_MACHINES if k in host} if isinstance(host, dict) else {}
    target.mkdir(parents=True, exist_ok=True)
    kept: dict[str, Any] = {"format": FORMAT, **manifest, PUBLISHED: len(run.rows)}
    directory = RunDirectory(target)
    directory.write("manifest.json", kept)
    rows = run.rows[[field.name for field in dataclasses.fields(Row)]]
    rows = rows.assign(started_at="", host="")  # in their order, which claims on protected layers go by
    pd.DataFrame(rows).to_parquet(
        target / "trials.parquet", index=False, compression="zstd", compression_level=19
    )
    if (source / "diagnosis.json").is_file():
        shutil.copyfile(source / "diagnosis.json", target / "diagnosis.json")
    return len(rows)


def main() -> None:
    """Publish one run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--where", help="only rows for which this holds")
    options = parser.parse_args()
    print(f"{publish(options.run, options.directory, options.where)} rows in {options.directory}")


if __name__ == "__main__":
    main()

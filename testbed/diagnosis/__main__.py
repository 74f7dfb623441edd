"""`testbed diagnose`'s own process: settings as JSON on standard input, the diagnosis as JSON on standard output."""

from __future__ import annotations

import json
import sys

from testbed.errors import TestbedError


def main() -> int:
    """Runs the diagnosis; progress and complaints go to standard error, one line each."""
    from testbed.diagnosis.run import diagnose
    from testbed.diagnosis.settings import Settings

    try:
        settings = Settings(**json.load(sys.stdin))
        found = diagnose(settings, lambda line: print(line, file=sys.stderr, flush=True))
    except TestbedError as error:
        print(f"error {error}".replace("\n", " "), file=sys.stderr)
        return error.exit_status
    json.dump(found, sys.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main())

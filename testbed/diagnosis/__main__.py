"""`testbed diagnose`'s own process: a `Request` as a line of JSON on standard input; on standard output an object a line: each
``part`` that is done, in words, and in the end what was ``found``, or the ``error``.
"""

from __future__ import annotations

import json
import sys

from testbed.errors import TestbedError


def main() -> int:
    """Runs the diagnosis; returns the exit status."""
    from testbed.diagnosis.request import Request
    from testbed.diagnosis.run import diagnose

    try:
        request = Request(**json.loads(sys.stdin.readline()))
        _tell(found=diagnose(request, lambda line: _tell(part=line.rstrip())))
    except TestbedError as error:
        _tell(error=str(error).replace("\n", " "))
        return error.exit_status
    return 0


def _tell(**message: object) -> None:
    print(json.dumps(message), flush=True)


if __name__ == "__main__":
    sys.exit(main())

"""``python -m testbed`` is ``testbed``."""

import sys
from pathlib import Path

# `-m` puts the working directory before everything else: no module is taken from there, unless this one was, too.
if not sys.flags.safe_path and sys.path and Path(sys.path[0]) != Path(__file__).parents[1]:
    del sys.path[0]

from testbed.cli import main

main()

"""``python -m testbed`` is ``testbed``."""

import os  # which every Python has loaded before it looks anywhere
import sys

# `-m` puts the working directory before everything else: no module is taken from there, unless this one was, too.
if not sys.flags.safe_path and sys.path and sys.path[0] != __file__.rsplit(os.sep, 2)[0]:
    del sys.path[0]

from testbed.cli import main

main()

"""A stand-in of endpoints that compute: the same products of matrices again and again, each round's seconds on a line of its own.

python -m testbed.experiment.burn
"""

from __future__ import annotations

import os
import time

import numpy as np

#: A round takes some 80 ms on a core: as long as a short pass of a small model.
_SIZE, _PRODUCTS = 512, 16


def main() -> None:
    """Compute until nobody reads."""
    square = np.random.default_rng(0).standard_normal((_SIZE, _SIZE), dtype=np.float32)
    try:
        while True:
            begun = time.perf_counter()
            for _ in range(_PRODUCTS):
                square @ square
            os.write(1, b"%.5f\n" % (time.perf_counter() - begun))  # whole: a pipe takes so little at once
    except BrokenPipeError:
        raise SystemExit(0) from None


if __name__ == "__main__":
    main()

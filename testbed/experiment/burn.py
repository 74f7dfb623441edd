"""A stand-in of endpoints that compute: the same products of matrices again and again, each round's seconds on a line of its own.

python -m testbed.experiment.burn
"""

from __future__ import annotations

import time

import numpy as np

#: A round takes some 20 ms on a core: as long as a short pass of a small model.
_SIZE, _PRODUCTS = 512, 4


def main() -> None:
    """Compute until nobody reads."""
    square = np.random.default_rng(0).standard_normal((_SIZE, _SIZE), dtype=np.float32)
    try:
        while True:
            begun = time.perf_counter()
            for _ in range(_PRODUCTS):
                square @ square
            print(time.perf_counter() - begun, flush=True)
    except BrokenPipeError:
        raise SystemExit(0) from None


if __name__ == "__main__":
    main()

"""What no other choice beats."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def pareto_front(cost: npt.ArrayLike, gain: npt.ArrayLike) -> npt.NDArray[np.intp]:
    """Indices of the points that no other point beats (lower or equal cost and higher or equal gain, one of
    them strictly), by cost.

    Points that are equal in both are all kept. Points with a value that is not finite are never on the front.
    """
    x, y = np.asarray(cost, dtype=np.float64), np.asarray(gain, dtype=np.float64)
    usable = np.flatnonzero(np.isfinite(x) & np.isfinite(y))
    order = usable[np.lexsort((-y[usable], x[usable]))]
    front: list[int] = []
    for index in order:
        if not front or y[index] > y[front[-1]] or (y[index] == y[front[-1]] and x[index] == x[front[-1]]):
            front.append(int(index))
    return np.array(front, dtype=np.intp)

"""How few bits a Gaussian source takes at a distortion: reverse water-filling (Cover and Thomas, "Elements of Information
Theory", second edition, section 10.3.3).

Independent components of variances σ² are coded with a mean squared error of D a component by no fewer than the mean over
components of max(0, ½ log2(σ² / θ)) bits, where the water level θ makes the mean of min(θ, σ²) equal D: what varies less than
the level is not sent at all. Of all sources with these variances the Gaussian takes most.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


def water_level(variances: Floats, distortion: float) -> float:
    """The level at which components of these variances lose `distortion` a component in the mean; their largest variance
    where that is as much as there is, or more."""
    ascending = np.sort(np.asarray(variances, dtype=np.float64))
    count = len(ascending)
    below = np.concatenate([[0.0], np.cumsum(ascending)[:-1]])  # what all smaller ones lose
    levels = (distortion * count - below) / (
        count - np.arange(count)
    )  # if these are under the level, and no others
    (above,) = np.nonzero(levels <= ascending)
    return float(levels[above[0]]) if len(above) else float(ascending[-1])


def gaussian_bits(variances: Floats, distortion: float) -> float:
    """Bits a component, at least, of Gaussian components of these variances with that mean squared error; infinite for none."""
    variances = np.asarray(variances, dtype=np.float64)
    level = water_level(variances, distortion)
    if level <= 0:
        return float("inf") if (variances > 0).any() else 0.0
    return float(np.maximum(0.0, 0.5 * np.log2(np.maximum(variances, level) / level)).mean())

"""Which layers' keys and values cannot stand coarse quantization, found by quantizing them one at a time.

`variants` runs the model (in a process of its own, `python -m testbed.diagnosis`), `choose` decides, and the result is a JSON
file that ``mixed(protect=…)`` reads.
"""

from __future__ import annotations

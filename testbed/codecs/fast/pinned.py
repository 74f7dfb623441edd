"""The host's memory that a GPU copies to and from by itself: its pages are pinned, and the driver needs no copy of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_LEAST = 64 * 1024  # bytes from which on that is worth the call; torch keeps freed ones for the next


def pinned(size: int) -> npt.NDArray[np.uint8]:
    """Memory for so many bytes, unset. There has to be a GPU."""
    import torch

    made: npt.NDArray[np.uint8] = torch.empty(size, dtype=torch.uint8, pin_memory=size >= _LEAST).numpy()
    return made


def is_gpu(device: torch.device | None) -> bool:
    """Whether that is worth while for what is computed there."""
    return device is not None and device.type == "cuda"


def on_host(tensor: Tensor) -> Tensor:
    """Bytes (uint8) in the host's memory: where they are, or a copy."""
    import torch

    if not is_gpu(tensor.device):
        return tensor.cpu()
    copy = torch.from_numpy(pinned(tensor.numel())).view(tensor.shape)
    return copy.copy_(tensor)

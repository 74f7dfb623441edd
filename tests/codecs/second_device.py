"""A device like a GPU that needs none: tensors that say "meta", lie in the processor's memory, and may not meet the processor's.

An operation on tensors of both devices raises, as on a GPU, but for copies and numbers (tensors of no dimension); so does numpy.
What a GPU computes is not imitated: only where things are.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

OTHER, CPU = torch.device("meta"), torch.device("cpu")  # torch guards other devices by calling their drivers


class Elsewhere(torch.Tensor):
    """A tensor on the other device; `held` is where it really is."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> Elsewhere:
        made = torch.Tensor._make_wrapper_subclass(
            cls, held.shape, held.stride(), held.storage_offset(), dtype=held.dtype, device=OTHER
        )
        made.held = held
        return made

    def __repr__(self) -> str:
        return f"Elsewhere({self.held!r})"

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(function, args, kwargs or {})

    def numpy(self, **_: Any) -> Any:
        raise TypeError("can't convert a tensor of the other device to numpy")

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def new_tensor(self, data: Any, **kwargs: Any) -> Any:
        return Elsewhere(self.held.new_tensor(data, **kwargs))

    def tolist(self) -> Any:
        return self.held.tolist()


_MOVES = {torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default, torch.ops.aten.copy.default}


def _run(function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors = [each for each in tree_flatten((args, kwargs))[0] if isinstance(each, torch.Tensor)]
    there = [each for each in tensors if isinstance(each, Elsewhere)]
    strangers = [each for each in tensors if not isinstance(each, Elsewhere) and each.ndim]
    asked = kwargs.get("device")
    if function not in _MOVES and there and strangers:
        raise RuntimeError(f"{function}: Expected all tensors to be on the same device")
    if asked is not None:
        kwargs = {**kwargs, "device": CPU}
    out = function(*tree_map(_held, args), **tree_map(_held, kwargs))
    stays = bool(there) if asked is None else torch.device(asked) == OTHER
    if function is torch.ops.aten.copy_.default:
        stays = isinstance(args[0], Elsewhere)
    return tree_map(lambda each: _as_before(each, tensors) if stays else each, out)


def _held(each: Any) -> Any:
    return each.held if isinstance(each, Elsewhere) else each


def _as_before(each: Any, given: list[torch.Tensor]) -> Any:
    """A result on the other device: the very tensor that was given, where an operation worked in place."""
    if not isinstance(each, torch.Tensor):
        return each
    for tensor in given:
        if isinstance(tensor, Elsewhere) and tensor.held is each:
            return tensor
    return Elsewhere(each)


class _Factories(TorchDispatchMode):
    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(function, args, kwargs or {})


class _Numbers(TorchFunctionMode):
    """`torch.tensor`, whose numbers a real "meta" tensor would forget."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is torch.tensor and torch.device(kwargs.get("device") or CPU) == OTHER:
            return Elsewhere(torch.tensor(*args, **{**kwargs, "device": CPU}))
        return function(*args, **kwargs)


@contextmanager
def second_device() -> Iterator[None]:
    """Within, tensors can be made on `OTHER` and moved there."""
    with _Factories(), _Numbers():
        yield

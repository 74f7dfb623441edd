"""A pass over tokens of which fewer and fewer are wanted: between two layers, those at its end are dropped."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from testbed.errors import Stopped
from testbed.models.hooks import of_this_thread
from testbed.models.live import LivePass

_GIVEN_UP = "a pass was given up"


def decoder_layers(network: Any, count: int) -> list[Any]:
    """The modules that hidden states go through one after the other, each with one layer's attention in it."""

    def holds(module: Any, index: int) -> bool:
        return any(getattr(part, "layer_idx", None) == index for part in module.modules())

    lists = (module for module in network.modules() if isinstance(module, torch.nn.ModuleList))
    ours = (one for one in lists if len(one) == count and all(map(holds, one, range(count))))
    return list(next(ours, ()))


#: How much is wanted of a pass; asked before each layer (True), and within it (False), where it is only given up.
Wanted = Callable[[bool], int]


@contextmanager
def shrinking(layers: Sequence[Any], run: LivePass, wanted: Wanted, drops: bool = True) -> Iterator[None]:
    """Before each of the `layers`, `run` goes on with as many of its first tokens as are `wanted` then: whatever a token's layers
    are computed from lies before it. Behind the last layer, the last token that is left stands for those that are not, so that
    the network finds as many as it was given. Raises Stopped, within the pass, where none is wanted.

    drops: False: the layers take no fewer tokens than the network was given, and the pass is only given up.
    """
    given = run.tokens

    def before(_: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
        held, rows = run.tokens, min(run.tokens, wanted(True))
        if rows <= 0:
            raise Stopped(_GIVEN_UP)
        if rows < held:
            run.drop(held - rows)
        if rows == given:
            return None
        cut = [_first(argument, rows, (given, held)) for argument in arguments]
        return tuple(cut), {name: _first(value, rows, (given, held)) for name, value in named.items()}

    def within(*_: Any) -> None:
        if wanted(False) <= 0:
            raise Stopped(_GIVEN_UP)

    def behind(_: Any, __: Any, output: Any) -> Any:
        states = output[0] if isinstance(output, tuple) else output
        missing = given - states.shape[1]
        whole = torch.cat([states, states[:, -1:].expand(-1, missing, -1)], 1) if missing else states
        return (whole, *output[1:]) if isinstance(output, tuple) else whole

    hooks = []
    if drops:
        hooks += [
            layer.register_forward_pre_hook(of_this_thread(before), with_kwargs=True) for layer in layers
        ]
        hooks += [layer.register_forward_hook(of_this_thread(behind)) for layer in layers[-1:]]
    parts = (part for layer in layers for part in layer.modules())
    hooks += [
        part.register_forward_pre_hook(of_this_thread(within))
        for part in parts
        if not any(True for _ in part.children())
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _first(value: Any, rows: int, tokens: tuple[int, ...]) -> Any:
    """What a layer is given of the first tokens, where it is given something of each: along the first or second dimension."""
    if isinstance(value, tuple | list):
        return type(value)(_first(each, rows, tokens) for each in value)
    if isinstance(value, Tensor):
        for dimension in range(min(2, value.dim())):
            if 1 < value.shape[dimension] in tokens:  # a single one is left as it is, or the batch
                return value.narrow(dimension, 0, rows)
    return value

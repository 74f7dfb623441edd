"""Several requests decoded in one pass are answered token for token as each is alone; whoever cannot is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from testbed.errors import UsageError
from testbed.models.kvcache import KVCache, join
from testbed.models.language import LanguageModel
from testbed.models.loading import load_model
from tests.models.test_architectures import READ, written
from tests.tiny_models import FAMILIES, SHAPES

Tiny = Callable[[str], Path]
MOST = 14


def model_of(path: Path) -> LanguageModel:
    return load_model(str(path), threads=1, cache_dtype=torch.float32)


def requests(model: LanguageModel) -> list[tuple[list[int], KVCache | None]]:
    """Questions of several lengths behind caches of several lengths, one of which lacks tokens, each head others."""

    def ids(first: int, count: int) -> list[int]:
        return [3 + (first + 7 * i) % 300 for i in range(count)]

    prefix = model.prefill(ids(0, 5), None).cache
    long = model.prefill(ids(1, 37), prefix).cache
    short = model.prefill(ids(2, 11), prefix).cache
    kept = []
    for layer in long.layers:
        places = torch.arange(layer.tokens)
        heads = [places[places % (3 + head) != 1] for head in range(layer.kv_heads)]
        most = max(map(len, heads))
        kept.append(torch.stack([torch.cat([torch.full((most - len(own),), -1), own]) for own in heads]))
    return [
        (ids(3, 4), join(prefix, long)),
        (ids(4, 1), join(prefix, short)),
        (ids(5, 9), join(prefix, long.select(kept))),
        (ids(6, 3), None),
    ]


def alike(model: LanguageModel) -> None:
    """Each joins while others are on their way, has a limit of its own, and leaves before others do."""
    asked = requests(model)
    limits = [MOST, 3, MOST - 2, MOST - 5]
    alone = [model.generate(ids, past, most, None) for (ids, past), most in zip(asked, limits, strict=True)]
    together, sizes = model.together(), []
    for number, ((ids, past), most) in enumerate(zip(asked, limits, strict=True)):
        assert together.join(ids, past, most, None) == number
        together.step()
        sizes.append(len(together.inside))
    while together.inside:
        together.step()
    assert together.answers == alone
    assert max(sizes) >= 2 and len(set(map(tuple, alone))) > 1


@pytest.mark.parametrize("family", [*FAMILIES, *SHAPES])
def test_every_family_answers_several_requests_as_it_answers_each(family: str, tiny_model: Tiny) -> None:
    alike(model_of(tiny_model(family)))


@pytest.mark.parametrize("name", READ)
def test_so_does_every_other_architecture_that_is_read(name: str, tmp_path: Path) -> None:
    alike(model_of(written(tmp_path, *READ[name])))


def test_rows_are_laid_out_anew_where_an_answer_is_longer_than_their_room(
    tiny_model: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("testbed.models.together.SideBySide.__init__.__defaults__", (4,))
    alike(model_of(tiny_model("llama")))


def test_an_answer_ends_at_its_stop_text_and_at_an_end_token(tiny_model: Tiny) -> None:
    model = model_of(tiny_model("llama"))
    (ids, past), *_ = requests(model)
    free = model.generate(ids, past, MOST, None)
    stop = model.text(free[4:6])
    together = model.together()
    for text in (stop, None, model.text(free[:1])):
        together.join(ids, past, MOST, text)
    while together.inside:
        together.step()
    assert together.answers == [
        model.generate(ids, past, MOST, text) for text in (stop, None, model.text(free[:1]))
    ]
    assert len(together.answers[0]) < len(together.answers[1])


def test_an_architecture_that_takes_all_rows_to_stand_alike_is_refused_by_name(
    tiny_model: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of(tiny_model("qwen2"))
    network = model._network

    class Aligned:
        config = network.config

        def __call__(self, *args: Any, **about: Any) -> Any:
            about["position_ids"] = about["position_ids"][:1].expand_as(about["position_ids"])
            return network(*args, **about)

    monkeypatch.setattr(model, "_network", Aligned())
    with pytest.raises(
        UsageError, match="architecture 'qwen2' does not decode several requests at once: what"
    ):
        model.together()

"""Q-Filters: directions by the singular vectors, from the context or from a file that is checked and named by its content."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from testbed.codecs import CodecError
from testbed.codecs.codec import Codec, decode
from testbed.codecs.evidence import Needs
from testbed.codecs.select import filters
from testbed.diagnosis.filters import main
from testbed.errors import SpecError
from testbed.models.loading import load_model
from tests.codecs.test_formulas import Array, best, kept, keys_and_values, scored
from tests.codecs.test_selectors import DIM, GROUP, HEADS, make_evidence


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine of its own: where its filters are."""
    monkeypatch.setattr(filters.KEPT, "directory", lambda: tmp_path / "filters")
    filters.KEPT.known.cache_clear()
    return tmp_path


def direction(queries: Array) -> Array:
    """The first right singular vector of queries [n, d], along which they lie on average."""
    first = np.linalg.svd(queries, full_matrices=False)[2][0]
    return np.asarray(first if (queries @ first).mean() > 0 else -first)


def test_qfilters_rank_keys_along_the_main_direction_of_the_contexts_queries() -> None:
    evidence = make_evidence()
    assert evidence.context_queries is not None
    for each in evidence.context_queries:
        each += torch.randn(HEADS * GROUP, 1, DIM, generator=torch.Generator().manual_seed(5))
    queries = evidence.context_queries[2].double().numpy()
    keys, _ = keys_and_values(evidence, 2)
    expected = np.stack(
        [
            keys[h] @ np.mean([direction(queries[h * GROUP + g]) for g in range(GROUP)], 0)
            for h in range(HEADS)
        ]
    )
    np.testing.assert_allclose(scored("qfilters@0.5", evidence, 2), expected, atol=1e-5)
    assert [set(row) for row in kept("qfilters@0.25", evidence, 2)] == [best(row, 15) for row in expected]


def test_filters_of_a_file_need_no_query_and_are_named_by_what_they_say(machine: Path) -> None:
    evidence = make_evidence()
    given_directions = [torch.randn(HEADS, DIM, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    name, path = filters.KEPT.save(filters.made("a test", given_directions))
    mine = machine / "mine.filters"
    mine.write_bytes(path.read_bytes())
    codec = Codec(f"qfilters@0.5(filters={mine})")
    assert str(codec.selector) == f"qfilters@0.5(filters={name})" and codec.needs == Needs()
    evidence.context_queries = None
    keys, _ = keys_and_values(evidence, 2)
    expected = (keys * given_directions[2].double().numpy()[:, None]).sum(-1)
    np.testing.assert_allclose(scored(str(codec.selector), evidence, 2), expected, atol=1e-4)
    # Who decodes needs no filters.
    cache = evidence.cache.to(dtype=torch.float16)
    payload = codec.encode(cache, codec.select(evidence))
    path.unlink()
    filters.KEPT.known.cache_clear()
    assert decode(payload).length == cache.length
    with pytest.raises(SpecError, match="are not on this machine"):
        codec.select(evidence)


def test_filters_of_another_model_are_refused(machine: Path) -> None:
    name, _ = filters.KEPT.save(filters.made("a test", [torch.ones(HEADS, DIM + 1)]))
    with pytest.raises(CodecError, match="of another model's layer 0"):
        Codec(f"qfilters@0.5(filters={name})").select(make_evidence())


@given(st.binary(max_size=60))
def test_files_that_say_something_else_are_refused(
    tmp_path_factory: pytest.TempPathFactory, data: bytes
) -> None:
    path = tmp_path_factory.mktemp("filters") / "any.filters"
    path.write_bytes(data)
    with pytest.raises(SpecError, match="filters"):
        filters.KEPT.load(path)


def test_a_file_with_a_number_too_few_or_one_that_is_none_is_refused(machine: Path) -> None:
    path = filters.KEPT.save(filters.made("a test", [torch.full((2, 3), torch.nan)]))[1]
    with pytest.raises(SpecError, match="layer 0 has an element that is not a number"):
        filters.KEPT.load(path)
    whole = filters.made("a test", [torch.ones(2, 3)])
    layer = whole.layers[0]
    whole.layers[0] = type(layer)(layer.heads, 4, layer.data)
    path = filters.KEPT.save(whole)[1]
    with pytest.raises(SpecError, match="another number of elements"):
        filters.KEPT.load(path)
    right = filters.KEPT.save(filters.made("a test", [torch.ones(2, 3)]))[1]
    right.rename(right.with_name("0f" * 16 + ".filters"))
    with pytest.raises(SpecError, match="the file holds the filters"):
        filters.KEPT.known("0f" * 16)
    with pytest.raises(SpecError, match="not on this machine"):
        filters.KEPT.known(f"../filters/{'0f' * 16}")  # a name is a hash, and leads nowhere else


def test_filters_are_fitted_on_a_tasks_contexts(
    machine: Path, tiny_model: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = tiny_model("llama"), machine / "llama.filters"
    options = ["--examples", "2", "--context-tokens", "60", "--prompt", "plain", "--out", str(out)]
    assert main([str(path), *options]) == 0
    name = capsys.readouterr().out.split()[1]
    model = load_model(str(path), threads=1)
    fitted = filters.KEPT.load(out)
    assert fitted[0] == name and len(fitted[1].layers) == model.num_layers
    for layer in range(model.num_layers):
        found = fitted[1].direction(layer)
        assert found is not None and found.shape == (model.kv_heads, model.head_dim)
        assert bool((found.norm(dim=-1) <= 1 + 1e-5).all())
    assert main([str(path), "--task", "no-such-task"]) == 2

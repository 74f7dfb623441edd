"""Low rank: components as numpy's singular vectors have them, from the context or a file that both sides have, in true bytes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from testbed.codecs.codec import Codec, decode
from testbed.codecs.layout import expected_bytes
from testbed.codecs.spec import parse
from testbed.codecs.transform import basis
from testbed.codecs.transform.basis import Axes, Moments
from testbed.diagnosis.basis import main, moments
from testbed.errors import PayloadError, SpecError
from testbed.models.kvcache import KVCache, KVLayer
from testbed.models.loading import load_model
from testbed.models.rope import Rope
from tests.codecs.caches import SHAPES, make_cache, ragged_cache

HEADS, TOKENS, DIM = 4, 90, 16
ROPE = Rope(tuple(1 / (1 + i) for i in range(DIM // 2)), tuple(range(DIM // 2)), DIM // 2)


def few_directions(seed: int, rope: Rope | None = None) -> KVCache:
    """Two layers whose heads lie near 5 directions each, alike from seed to seed; with `rope`, keys did before it."""
    fixed, own = torch.Generator().manual_seed(0), torch.Generator().manual_seed(seed)
    positions, layers = torch.arange(3, 3 + TOKENS), []
    for _ in range(2):
        made = []
        for _ in range(2):
            directions = torch.randn(HEADS, 5, DIM, generator=fixed)
            mean = 3 * torch.randn(HEADS, 1, DIM, generator=fixed)
            along = torch.randn(HEADS, TOKENS, 5, generator=own)
            noise = torch.randn(HEADS, TOKENS, DIM, generator=own)
            made.append(along @ directions + mean + noise / 50)
        keys = made[0] if rope is None else rope.turn(made[0], positions)
        layers.append(KVLayer(keys.half(), made[1].half(), positions, rope=rope))
    return KVCache(layers, 3 + TOKENS)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine of its own: where its bases are."""
    monkeypatch.setattr(basis.KEPT, "directory", lambda: tmp_path / "bases")
    forget()
    return tmp_path


def forget() -> None:
    basis.KEPT.known.cache_clear()
    basis._read.cache_clear()


def kept(*caches: KVCache, together: int = 1, rank: int = DIM * HEADS) -> tuple[str, Path]:
    """The basis that is fitted on these."""
    sums = moments(caches[0], together)
    for cache in caches[1:]:
        sums = [a + b for a, b in zip(sums, moments(cache, together), strict=True)]
    heads = [layer.kv_heads for layer in caches[0].layers for _ in range(2)]
    return basis.KEPT.save(
        basis.made("a test", [(n, each.axes(rank)[0]) for n, each in zip(heads, sums, strict=True)])
    )


def approximated(x: torch.Tensor, rank: int, fitted_on: torch.Tensor | None = None) -> np.ndarray:
    """[tokens, width] by the first singular vectors of what it is fitted on, less its mean."""
    rows = x.double().numpy()
    other = rows if fitted_on is None else fitted_on.double().numpy()
    mean = other.mean(0)
    vectors = np.linalg.svd(other - mean, full_matrices=False)[2][:rank]
    return np.asarray((rows - mean) @ vectors.T @ vectors + mean)


def test_own_components_are_the_singular_vectors_of_each_head() -> None:
    cache = few_directions(1)
    arrived = decode(Codec("lowrank(keep=0.25, of=fp16)").encode(cache))
    for ours, theirs in zip(arrived.layers, cache.layers, strict=True):
        for found, x in ((ours.keys, theirs.keys), (ours.values, theirs.values)):
            for head in range(HEADS):
                expected = approximated(x[head], 4)
                np.testing.assert_allclose(found[head].double().numpy(), expected, atol=0.03)


@given(
    st.integers(1, 3),
    st.integers(2, 40),
    st.integers(1, 24),
    st.floats(0.125, 1),
    st.sampled_from(["float16", "bfloat16"]),
)
@settings(max_examples=25, deadline=None)
def test_what_is_lost_is_the_variance_beyond_the_rank(
    heads: int, tokens: int, dim: int, keep: float, dtype: str
) -> None:
    x = torch.randn(heads, tokens, dim, generator=torch.Generator().manual_seed(dim)).to(
        getattr(torch, dtype)
    )
    arrived = decode(
        Codec(f"lowrank(keep={keep}, of=fp16)").encode(KVCache([KVLayer(x, x, torch.arange(tokens))], tokens))
    )
    rank = max(1, round(keep * dim))
    for head in range(heads):
        rows = x[head].double().numpy()
        beyond = np.linalg.svd(rows - rows.mean(0), compute_uv=False)[rank:]
        lost = np.linalg.norm(arrived.layers[0].keys[head].double().numpy() - rows)
        rounding = (2e-3 if dtype == "float16" else 1.6e-2) * np.linalg.norm(rows)
        assert abs(lost - np.sqrt((beyond**2).sum())) <= rounding


@pytest.mark.parametrize("together", [1, 2, 4])
def test_a_file_of_other_contexts_serves_groups_of_heads_and_its_bytes_do_not_travel(
    machine: Path, together: int
) -> None:
    others, cache = [few_directions(1), few_directions(2)], few_directions(3)
    name, path = kept(*others, together=together)
    codec = Codec(f"lowrank(keep=0.25, basis={path}, of=fp16)")
    assert str(codec) == f"lowrank(basis={name}, keep=0.25, of=fp16)"
    assert codec.spec.shared_bytes == path.stat().st_size > 2 * 2 * HEADS * DIM * together * DIM * 2
    payload = codec.encode(cache)
    elements = 2 * 2 * HEADS * TOKENS * DIM
    assert abs(len(payload) - elements * 2 / 4) < 200
    assert abs(len(payload) - expected_bytes(codec.spec, [(HEADS, DIM, DIM, None)] * 2, TOKENS)) < 150
    arrived = decode(payload)
    for i, layer in enumerate(cache.layers):
        group = layer.values[:together].transpose(0, 1).reshape(TOKENS, -1)
        fitted_on = torch.cat(
            [each.layers[i].values[:together].transpose(0, 1).reshape(TOKENS, -1) for each in others]
        )
        expected = approximated(group, 4 * together, fitted_on).reshape(TOKENS, together, DIM)
        found = arrived.layers[i].values[:together].transpose(0, 1).double().numpy()
        np.testing.assert_allclose(found, expected, atol=0.05)


def test_keys_are_projected_before_their_rotary_embedding(machine: Path) -> None:
    cache = few_directions(3, ROPE)
    name, _ = kept(few_directions(1, ROPE))
    for text in (f"lowrank(keep=0.3125, of=fp16, basis={name})", "lowrank(keep=0.3125, of=fp16)"):
        assert Codec(text).undoes_rope
        off = decode(Codec(text).encode(cache)).layers[1].keys.float() - cache.layers[1].keys.float()
        assert float(off.square().mean().sqrt()) < 0.05
    turned = replace(cache, layers=[replace(layer, rope=None) for layer in cache.layers])
    off = decode(Codec(text).encode(turned)).layers[1].keys.float() - turned.layers[1].keys.float()
    assert float(off.square().mean().sqrt()) > 0.2  # five directions, turned, are many


def test_parts_that_a_file_does_not_fit_bring_their_own(machine: Path) -> None:
    name, _ = kept(few_directions(1))
    for cache in [*(make_cache(shape) for shape in SHAPES), ragged_cache()]:
        theirs = decode(Codec(f"lowrank(basis={name})").encode(cache))
        own = decode(Codec("lowrank").encode(cache))
        for a, b in zip(theirs.layers, own.layers, strict=True):
            assert torch.equal(a.keys, b.keys) and torch.equal(a.values, b.values)


def test_a_file_with_less_rank_than_is_asked_for_gives_what_it_has(machine: Path) -> None:
    name, _ = kept(few_directions(1), rank=3)
    cache = few_directions(2)
    sizes = [len(Codec(f"lowrank(basis={name}, keep={keep}, of=fp16)").encode(cache)) for keep in (0.5, 1)]
    assert abs(sizes[0] - sizes[1]) <= 12 and sizes[0] < 2 * 2 * HEADS * TOKENS * 3 * 2 + 200


def test_a_machine_without_the_basis_refuses_it_by_name(machine: Path) -> None:
    name, path = kept(few_directions(1))
    payload = Codec(f"lowrank(basis={name})").encode(few_directions(2))
    path.unlink()
    forget()
    with pytest.raises(PayloadError, match=f"the bases {name} are not on this machine"):
        decode(payload)
    with pytest.raises(SpecError, match="not on this machine"):
        Codec(f"lowrank(basis={name})").encode(few_directions(2))
    with pytest.raises(SpecError, match=r"missing\.basis: No such file"):
        Codec("lowrank(basis=missing.basis)")
    with pytest.raises(SpecError, match=r"keep is 0\.1, but must be from 0\.125"):
        parse("lowrank(keep=0.1)")


def test_a_payload_that_names_a_file_is_refused() -> None:
    from tests.codecs.test_payload import header, sealed

    with pytest.raises(PayloadError, match="refers to something outside"):
        decode(sealed(header(codec="lowrank(basis=/etc/passwd)"), bytes(96)))


@given(st.binary(max_size=100))
@settings(max_examples=50)
def test_any_bytes_as_a_file_are_a_basis_or_one_line(
    tmp_path_factory: pytest.TempPathFactory, data: bytes
) -> None:
    path = tmp_path_factory.mktemp("basis") / "any.basis"
    path.write_bytes(data)
    with pytest.raises(SpecError) as error:
        basis.KEPT.load(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "change, says",
    [
        ({"together": 3}, "groups of 3 of 4 heads"),
        ({"rank": 17}, "rank 17 of 16"),
        ({"rank": 2}, "another number of elements"),
        ({"means": np.full(HEADS * DIM, np.nan, "<f4").tobytes()}, "not a number"),
        ({"components": np.full(HEADS * 3 * DIM, 0.5, "<f2").tobytes()}, "not of length 1"),
    ],
)
def test_files_of_what_is_no_basis_are_refused(machine: Path, change: dict[str, object], says: str) -> None:
    right = Moments.of(few_directions(1).layers[0].keys, HEADS).axes(3)[0]
    whole = basis.made("a test", [(HEADS, right)])
    wrong = {name: getattr(whole.parts[0], name) for name in whole.parts[0].__struct_fields__} | change
    whole.parts[0] = type(whole.parts[0])(**wrong)
    with pytest.raises(SpecError, match=says):
        basis.KEPT.load(basis.KEPT.save(whole)[1])


def test_moments_add_up_to_those_of_all_tokens() -> None:
    x = few_directions(1).layers[0].keys
    together = Moments.of(x[:, :31], 2) + Moments.of(x[:, 31:], 2)
    axes, share = together.axes(40)
    expected = np.cov(x[:2].transpose(0, 1).reshape(TOKENS, -1).double().numpy().T, bias=True)
    variances = np.sort(np.linalg.eigvalsh(expected))[::-1]
    np.testing.assert_allclose(share[0].numpy(), variances / variances.sum(), atol=1e-9)
    assert axes.components.shape == (2, 32, 2 * DIM)
    torch.testing.assert_close(axes.components[1] @ axes.components[1].T, torch.eye(32), atol=1e-5, rtol=0)
    assert isinstance(axes.first(2), Axes) and axes.first(2).components.shape == (2, 2, 2 * DIM)


def test_a_basis_is_fitted_on_a_tasks_contexts(
    machine: Path, tiny_model: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = tiny_model("llama"), machine / "llama.basis"
    options = [
        "--examples",
        "2",
        "--context-tokens",
        "60",
        "--prompt",
        "plain",
        "--together",
        "0",
        "--out",
        str(out),
    ]
    assert main([str(path), *options]) == 0
    name = capsys.readouterr().out.split()[1]
    model = load_model(str(path), threads=1)
    found, fitted = basis.KEPT.load(out)
    assert found == name and len(fitted.parts) == 2 * model.num_layers
    width = model.kv_heads * model.head_dim
    assert {(part.together, part.rank) for part in fitted.parts} == {(model.kv_heads, width)}
    context = model.knowing_ropes(
        model.prefill(model.tokenize("a b c d e f g h"), None).cache.to(dtype=torch.float16)
    )
    off = (
        decode(Codec(f"lowrank(basis={out}, keep=1, of=fp16)").encode(context)).layers[0].keys
        - context.layers[0].keys
    )
    assert float(off.float().abs().max()) < 0.02
    assert main([str(path), "--task", "no-such-task"]) == 2
    assert main([str(path), *options, "--together", "5"]) == 2
    assert "do not make groups of 5" in capsys.readouterr().err

"""A scout: the edge's model chooses, text and choice cross, and the cloud's own model keeps what was chosen."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from testbed.codecs import CodecError
from testbed.codecs.codec import Codec
from testbed.codecs.evidence import Kept, gather, prefill_for
from testbed.deadline import Deadline
from testbed.endpoints import choice
from testbed.endpoints.answering import kept_digest
from testbed.endpoints.protocol import Forget, Show
from testbed.endpoints.spans import CLOUD, EDGE
from testbed.endpoints.tokens import to_bytes
from testbed.errors import PayloadError, WireError
from testbed.models.loading import load_model
from testbed.transport import wire
from testbed.transport.tcp import Tcp
from tests.endpoints.pair import Pair, of_two_models, started

SELECTOR = "q2c@0.25(scope=global)"


@pytest.fixture(scope="module")
def models(tiny_model: Callable[[str], Path]) -> tuple[Path, Path]:
    return tiny_model("llama small"), tiny_model("llama")


@pytest.fixture(scope="module")
def pair(models: tuple[Path, Path]) -> Pair:
    return of_two_models(*models)


def prefilled(path: Path, pair: Pair, example: int = 1):  # type: ignore[no-untyped-def]
    """A model by itself, its selector's choice and its past, without either endpoint."""
    asked = pair.edge.call(Show(0, example))
    model, codec = load_model(str(path), threads=1), Codec(SELECTOR)
    prefix = model.prefill(model.tokenize(pair.opening.text, start=True), None).cache
    context = prefill_for(model, codec.needs, model.tokenize(asked.context), prefix)
    question = model.tokenize(asked.question, closing=pair.opening.closing)
    kept = codec.select(gather(model, codec.needs, prefix, context, question))
    return model, prefix, context.cache, question, kept


@pytest.mark.parametrize(
    "edge, cloud",
    [
        ("llama small", "llama"),
        ("qwen2", "qwen3"),
        ("gemma2", "gemma3"),
        ("gpt neox", "deepseek v2"),
        ("qwen2 padded", "qwen2"),
        ("qwen2", "qwen2 padded"),
    ],
)
def test_with_all_tokens_chosen_the_answer_is_the_one_to_the_text(
    tiny_model: Callable[[str], Path], edge: str, cloud: str
) -> None:
    pair = of_two_models(tiny_model(edge), tiny_model(cloud))
    for example in range(2):
        full = pair.reference(example)
        text = pair.ask("cloud", example)
        told = pair.outcome(text, example)
        whole = pair.ask("q2c@1(scope=global)", example, placement="scout")
        outcome = pair.outcome(whole, example, selector="q2c@1(scope=global)")
        assert (whole.answer, whole.answer_tokens) == (text.answer, text.answer_tokens)
        assert full.answer == text.answer and full.nll == pytest.approx(told.nll, abs=1e-6)
        assert (outcome.nll, outcome.kl) == (told.nll, told.kl) and told.kl == pytest.approx(0, abs=1e-6)
        assert outcome.tokens_kept == told.tokens_kept == full.context_tokens
        assert outcome.choice_overlap == 1


def test_the_cloud_keeps_of_its_own_cache_what_the_edges_model_chooses(
    pair: Pair, models: tuple[Path, Path]
) -> None:
    pair.reference()
    result = pair.ask(SELECTOR, placement="scout")
    outcome = pair.outcome(result, selector=SELECTOR)
    (*_, theirs), (model, prefix, cache, question, own) = (prefilled(path, pair) for path in models)
    pruned = cache.select([theirs.layers[0]] * model.num_layers)
    assert outcome.kept_digest == kept_digest([(layer.positions, None) for layer in pruned.layers])
    assert outcome.tokens_kept == len(theirs.layers[0])
    ids = model.generate(question, model.join(prefix, pruned), 8, "\n")
    assert result.answer == model.text(ids, "\n")
    shared = set(theirs.layers[0].tolist()) & set(own.layers[0].tolist())
    assert outcome.choice_overlap == len(shared) / len(theirs.layers[0])
    assert 0 < outcome.choice_overlap < 1 and outcome.kl is not None and outcome.kl > 0


def test_one_model_on_both_sides_agrees_with_itself_on_every_token(tiny_model: Callable[[str], Path]) -> None:
    pair = of_two_models(tiny_model("llama"), tiny_model("llama"))
    result = pair.ask(SELECTOR, placement="scout")
    assert pair.outcome(result, selector=SELECTOR).choice_overlap == 1
    assert pair.outcome(pair.ask("cloud"), selector=SELECTOR).choice_overlap is None


def test_the_text_crosses_while_the_edge_chooses_and_what_is_known_is_waited_for_again(
    tmp_path: Path, models: tuple[Path, Path]
) -> None:
    with started(tmp_path, models[0], cloud_model=models[1], edge=50.0) as pair:
        first = pair.ask(SELECTOR, placement="scout")
        told = pair.outcome(first, selector=SELECTOR)
        again = pair.ask(SELECTOR, placement="scout")
        assert (first.reused, first.replayed) == ((), False)
        assert (again.reused, again.replayed) == (("prefill", "select", "encode"), True)
        assert first.answer == again.answer
        assert pair.outcome(again, selector=SELECTOR) == told
        for result in (first, again):
            at = {(span.stage, span.side, span.chunk): span for span in result.spans}
            assert at["transmit", "link", 0].start < at["prefill", EDGE, 1].end
            assert at["prefill", CLOUD, 0].start < at["select", EDGE, 1].end
            assert at["transmit", "link", 1].start >= at["encode", EDGE, 1].end
            assert result.levels == "text,positions" and result.chunks == 2
            assert result.stages.total() == pytest.approx(result.e2e_s, abs=1e-6)
        fresh = pair.ask(SELECTOR, placement="scout", reuse="none")
        assert fresh.reused == () and fresh.answer == first.answer


positions = st.lists(st.integers(0, 5000), min_size=1, max_size=300, unique=True).map(sorted)


@given(positions)
def test_a_choice_crosses_as_it_is(numbers: list[int]) -> None:
    data = choice.to_bytes(np.array(numbers, dtype=np.int64))
    assert choice.from_bytes(memoryview(data), numbers[-1] + 1).tolist() == numbers
    with pytest.raises(WireError, match="of a context of"):
        choice.from_bytes(memoryview(data), max(1, numbers[-1]) if numbers[-1] else 0)


@given(st.one_of(st.binary(max_size=60), positions.map(lambda p: choice.to_bytes(np.array(p)))), st.data())
def test_bytes_that_are_no_choice_are_refused_and_all_others_ascend_within_the_context(
    data: bytes, draw: st.DataObject
) -> None:
    spoilt = bytearray(data)
    for at in draw.draw(st.lists(st.integers(0, max(0, len(data) - 1)), max_size=3)) if data else []:
        spoilt[at] = draw.draw(st.integers(0, 255))
    try:
        found = choice.from_bytes(memoryview(spoilt), 600)
    except (WireError, PayloadError):
        return
    assert len(found) and found[0] >= 0 and found[-1] < 600 and bool((np.diff(found) > 0).all())


def test_a_choice_of_another_list_for_each_layer_is_none() -> None:
    import torch

    lists = (torch.tensor([0, 2]), torch.tensor([1, 2]))
    with pytest.raises(CodecError, match="one list of tokens for all layers"):
        choice.chosen(Kept(lists, 4), 4)
    assert choice.chosen(Kept((None, lists[0], lists[0]), 4), 4).tolist() == [0, 2]


@pytest.fixture
def asked(pair: Pair) -> Iterator[Callable[..., str]]:
    """What the cloud says is wrong with a scout's request of these chunks: (level, payload)."""
    pair.cloud.call(Forget())

    def ask(*chunks: tuple[int, bytes], tokens: int = 4, levels: tuple[str, ...] = choice.LEVELS) -> str:
        request = wire.Request(9, "scout", SELECTOR, pair.prefix, "Q?", "\n", 4, levels=levels, tokens=tokens)
        connection = Tcp().connect(pair.link.address, pair.link.port)
        try:
            connection.send(request)
            for index, (level, payload) in enumerate(chunks):
                connection.send(wire.Chunk(9, index, False, None, level, 0, tokens), payload)
            connection.send(wire.End(9, len(chunks), sum(len(payload) for _, payload in chunks)))
            received = connection.receive(0, Deadline(20.0))
        finally:
            connection.close()
        assert received is not None and isinstance(received.header, wire.Failure)
        return received.header.message

    yield ask


def test_a_scout_whose_chunks_are_not_a_text_and_a_choice_of_it_is_told_so(asked: Callable[..., str]) -> None:
    text, chosen = (0, to_bytes([1, 2, 3, 4], 400)), (1, choice.to_bytes(np.array([0, 3])))
    assert "begins with its text" in asked(chosen, text)
    assert "there is its choice" in asked(text)
    assert "there is its choice" in asked(text, chosen, chosen)
    assert "there is its choice" in asked(text, text)
    assert "not the numbers of 4 tokens" in asked((0, b"\1"), chosen)
    assert "beyond the vocabulary" in asked((0, b"\xff" * 8), chosen)
    assert "token 4 is chosen of a context of 4" in asked(text, (1, choice.to_bytes(np.array([0, 4]))))
    assert "not a choice of tokens" in asked(text, (1, b"\0"))
    assert "a text and a choice" in asked(text, chosen, levels=("text", "skip"))
    assert "a text and a choice" in asked(text, chosen, tokens=0)

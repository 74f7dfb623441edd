"""Prompt formats: what stands in a prompt, whichever way it is laid out."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from testbed.errors import UsageError
from testbed.tasks import Example, make_task
from testbed.tasks.prompt import Prompted, choose_prompt, parse_prompt

EXAMPLE = Example("x", "Rome lies on the Tiber.", "Which river is it?", ("Tiber",), ("Tiber", "Arno"))


def template(turns: list[dict[str, str]]) -> str:
    return "".join(f"<{turn['role']}>{turn['content']}</>" for turn in turns) + "<assistant>"


def whole(prompted: Prompted) -> str:
    return (
        prompted.prefix
        + prompted.context_text(EXAMPLE)
        + prompted.question_text(EXAMPLE)
        + prompted.closing
        + prompted.answer_text(EXAMPLE)
    )


@pytest.mark.parametrize("name", ["needle", "passages", "choice", "multihop", "multikey", "variables"])
def test_two_plain_demonstrations_are_the_tasks_own_prompt(name: str) -> None:
    task = make_task(name)
    prompted = Prompted(task, choose_prompt("plain", "any"))
    assert prompted.prefix == task.prefix
    assert prompted.question_text(EXAMPLE) == task.question_text(EXAMPLE)


def test_fewer_demonstrations_are_the_first_of_them() -> None:
    task = make_task("passages")
    none, one = (Prompted(task, choose_prompt(f"plain:{k}", "any")) for k in (0, 1))
    assert none.prefix == ""
    assert task.prefix.startswith(one.prefix) and one.prefix.count("Question:") == 1


def test_a_chat_prompt_is_the_templates_text_cut_where_the_context_goes() -> None:
    text = whole(Prompted(make_task("choice"), choose_prompt("chat:1", "any"), template))
    assert text.startswith("<user>Answer the question from the context")
    assert text.endswith(
        "</><user>Context: Rome lies on the Tiber.\nQuestion: Which river is it?</><assistant>Tiber"
    )
    assert text.count("<assistant>") == 2 and "<assistant>Anna Brook</>" in text
    prompted = Prompted(make_task("choice"), choose_prompt("chat", "any"), template)
    assert whole(prompted).count("<assistant>") == 1
    assert prompted.choice_texts(EXAMPLE) == ["Tiber", "Arno"]


def test_a_model_without_a_template_cannot_chat() -> None:
    with pytest.raises(UsageError, match="no chat template"):
        Prompted(make_task("needle"), choose_prompt("chat", "any"))
    with pytest.raises(UsageError, match="does not show what users say"):
        Prompted(make_task("needle"), choose_prompt("chat", "any"), lambda turns: "Hello!")


@given(st.sampled_from(["plain", "chat"]), st.integers(0, 2))
def test_a_format_is_read_as_it_is_printed(layout: str, shots: int) -> None:
    assert str(parse_prompt(f"{layout}:{shots}")) == f"{layout}:{shots}"


@given(st.text(max_size=12))
def test_any_text_is_a_format_or_a_usage_error(text: str) -> None:
    try:
        assert str(choose_prompt(text, "m"))
    except UsageError as error:
        assert "write auto, plain or chat" in str(error)


def test_auto_goes_by_the_models_family() -> None:
    assert str(choose_prompt("auto", "/models/SmolLM2-135M-Instruct")) == "plain:2"
    assert str(choose_prompt("chat:0", "smollm2-135m")) == "chat:0"

"""A model's chat template, as its tokenizer's files have it."""

from __future__ import annotations

from collections.abc import Callable


def chat_template(location: str, local: bool) -> Callable[[list[dict[str, str]]], str] | None:
    """Turns -> the text that opens the next answer, without the token that starts every prompt; None: it has no template.

    location: a directory or hub id; local: look nowhere but on this machine. transformers renders the template in a sandbox.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(location, trust_remote_code=False, local_files_only=local)
    if not tokenizer.chat_template:
        return None
    # Left to the tokenizer, where it is what puts it there; SmolLM2's puts none, and its template begins with the same token.
    opens = tokenizer.bos_token_id is not None and tokenizer("a").input_ids[0] == tokenizer.bos_token_id
    start = tokenizer.bos_token if opens else ""

    def render(turns: list[dict[str, str]]) -> str:
        text: str = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        return text.removeprefix(start) if start else text

    return render

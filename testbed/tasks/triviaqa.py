"""TriviaQA's own files: questions in one JSON value, their texts in a folder of files (Joshi et al., ACL 2017, arXiv:1705.03551).

A question's answers were not marked in its texts; as in its paper, a text that holds one of them counts as evidence. Texts are
long (Wikipedia's articles, web pages): of each 32,768 characters are kept, around the first answer. What a file names as a text's
place is not trusted: nothing outside of the folder is read.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from testbed.errors import UsageError
from testbed.files import open_named

_MOST_QUESTIONS = 2_000  #: with a text
_KEPT_CHARACTERS = 2**15
_MOST_BYTES = 2**22  #: that are read of a text
_FOLDERS = {"EntityPages": "wikipedia", "SearchResults": "web"}


def is_triviaqa(value: Any) -> bool:
    """Whether a JSON file's value is a file of TriviaQA's."""
    entries = value.get("Data") if isinstance(value, dict) else None
    return isinstance(entries, list) and all(isinstance(entry, dict) for entry in entries)


def with_texts(value: Any, path: Path) -> list[Any]:
    """The first 2,000 questions that have a text with an answer, as lines of ours. Raises UsageError naming the question that is
    not as TriviaQA has it, and where there are no texts."""
    folder = next(
        (p / "evidence" for p in (path.parent, path.parent.parent) if (p / "evidence").is_dir()), None
    )
    if folder is None:
        raise UsageError(
            f"{path}: TriviaQA's questions have their texts in a folder `evidence`; lay it beside this file, or beside its folder"
        )
    found = []
    for number, entry in enumerate(value["Data"], start=1):
        try:
            answer = entry["Answer"]
            answers = list(dict.fromkeys([answer["Value"], *answer.get("Aliases", [])]))
            made = {"id": entry["QuestionId"], "question": entry["Question"], "answers": answers}
            contexts = (around_answer(text, answers) for text in _texts(entry, folder))
            context = next((text for text in contexts if text is not None), None)
        except (KeyError, TypeError, AttributeError) as error:
            raise UsageError(
                f"{path}:{number}: not a question of TriviaQA's, with Question, QuestionId and Answer: {error}"
            ) from error
        if context is not None:
            found.append({**made, "context": context})
        if len(found) == _MOST_QUESTIONS:
            break
    if not found:
        raise UsageError(f"{path}: no text in {folder} holds an answer to its questions")
    return found


def around_answer(text: str, answers: list[str]) -> str | None:
    """The text, or of a long one what stands around the first answer in it; None where it holds none."""
    low = text.lower()
    places = [at for answer in answers if answer.strip() and (at := low.find(answer.lower())) >= 0]
    if not places:
        return None
    start = max(0, min(places) - _KEPT_CHARACTERS // 2)
    kept = text[start : start + _KEPT_CHARACTERS]
    return kept if start == 0 else kept.partition(" ")[2] or kept


def _texts(entry: dict[str, Any], folder: Path) -> Iterator[str]:
    """Those that are there of a question's."""
    for key, name in _FOLDERS.items():
        inside = (folder / name).resolve()
        for source in entry.get(key) or ():
            path = (inside / str(source["Filename"]).replace("\0", "")).resolve()
            if not path.is_relative_to(inside):
                continue
            try:
                with open_named(path) as file:
                    yield file.read(_MOST_BYTES).decode("utf-8", "replace")
            except OSError:
                continue

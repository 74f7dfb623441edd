"""What well-known data sets call the parts of a question, brought into the form of a line of a file of ours (see `jsonl`).

SQuAD 1.1 and 2.0, HotpotQA and 2WikiMultihopQA, MuSiQue, TriviaQA, BoolQ, RACE, XSum and CNN/DailyMail, as the hub has them; the
first five also as their own files do; rows of LongBench and RULER. What is made of a record is checked as a line is.
"""

from __future__ import annotations

from typing import Any

from testbed.tasks.triviaqa import around_answer

#: What is asked of a text whose answer is its summary, where the data set asks nothing.
SUMMARIZE = "What does the text say, in a few sentences?"
#: LongBench's data sets of summaries.
_SUMMARIES = ("gov_report", "qmsum", "multi_news", "vcsum", "samsum")


def convert(record: Any) -> Any:
    """A record of a known form, as a line of a file of ours would have it; any other, unchanged. None: one of a known form whose
    text does not hold an answer, to be passed over."""
    if not isinstance(record, dict):
        return record
    names = ("id", "_id", "example_id", "question_id")
    made = {"id": next((str(record[name]) for name in names if record.get(name)), "")}
    if not made["id"]:
        del made["id"]
    for form in (_squad, _hotpot, _musique, _triviaqa, _boolq, _race, _xsum, _cnn, _longbench, _ruler):
        try:
            found = form(record)
            return None if found is None else {**made, "question": record.get("question"), **found}
        except (KeyError, TypeError, ValueError, IndexError, AttributeError):
            continue
    return record


def _squad(record: dict[str, Any]) -> dict[str, Any] | None:
    answers = list(dict.fromkeys(record["answers"]["text"]))
    return {"context": record["context"] + "", "answers": answers} if answers else None


def _hotpot(record: dict[str, Any]) -> dict[str, Any]:
    """As the hub has it, by columns, or as its own files do, by pairs."""
    facts, context = record["supporting_facts"], record["context"]
    gold = set(facts["title"]) if isinstance(facts, dict) else {title for title, _ in facts}
    pairs = zip(context["title"], context["sentences"], strict=True) if isinstance(context, dict) else context
    return _paragraphs(
        [{"title": title, "text": "".join(sentences), "gold": title in gold} for title, sentences in pairs],
        [record["answer"]],
    )


def _musique(record: dict[str, Any]) -> dict[str, Any] | None:
    made = _paragraphs(
        [
            {"title": each["title"], "text": each["paragraph_text"], "gold": each["is_supporting"]}
            for each in record["paragraphs"]
        ],
        [record["answer"], *record.get("answer_aliases", [])],
    )
    return None if record.get("answerable") is False else made


def _triviaqa(record: dict[str, Any]) -> dict[str, Any] | None:
    """The first of its texts that holds an answer."""
    pages, results, answer = record["entity_pages"], record["search_results"], record["answer"]
    answers = list(dict.fromkeys([answer["value"], *answer["aliases"]]))
    for text in (*pages.get("wiki_context", ()), *results.get("search_context", ())):
        if (context := around_answer(text, answers)) is not None:
            return {"context": context, "answers": answers}
    return None


def _paragraphs(paragraphs: list[dict[str, Any]], answers: list[str]) -> dict[str, Any]:
    context = "\n".join(f"{each['title']}: {each['text']}" for each in paragraphs)
    return {"context": context, "answers": answers, "paragraphs": paragraphs}


def _boolq(record: dict[str, Any]) -> dict[str, Any]:
    answer = {True: "yes", False: "no"}[record["answer"]]
    return {"context": record["passage"], "answers": [answer], "choices": ["yes", "no"]}


def _race(record: dict[str, Any]) -> dict[str, Any]:
    options = record["options"]
    return {
        "context": record["article"],
        "answers": [options["ABCD".index(record["answer"])]],
        "choices": options,
    }


def _xsum(record: dict[str, Any]) -> dict[str, Any]:
    return {"context": record["document"] + "", "answers": [record["summary"] + ""], "summary": True}


def _cnn(record: dict[str, Any]) -> dict[str, Any]:
    return {"context": record["article"] + "", "answers": [record["highlights"] + ""], "summary": True}


def _longbench(record: dict[str, Any]) -> dict[str, Any]:
    """The classes of a classification are its choices."""
    if record.get("dataset") in _SUMMARIES:
        asked = record["input"].strip() or SUMMARIZE
        return {
            "context": record["context"],
            "question": asked,
            "answers": record["answers"],
            "summary": True,
        }
    made = {"context": record["context"], "question": record["input"], "answers": record["answers"]}
    return {**made, "choices": record["all_classes"]} if record.get("all_classes") else made


def _ruler(record: dict[str, Any]) -> dict[str, Any]:
    """The last line of its input asks; what is to be found, all of it, is one answer."""
    context, _, question = record["input"].rstrip().rpartition("\n")
    return {
        "context": context,
        "question": question.removeprefix("Question: "),
        "answers": [", ".join(record["outputs"])],
    }


def records(value: Any) -> list[Any]:
    """The records of a file that is one JSON value: a list of them, or SQuAD's articles, whose questions without an answer are
    passed over. Any other value is its own only record."""
    if isinstance(value, list):
        return value
    data = value.get("data") if isinstance(value, dict) else None
    if not isinstance(data, list):
        return [value]
    try:
        return [
            {
                "id": asked.get("id", ""),
                "context": paragraph["context"],
                "question": asked["question"],
                "answers": {"text": [answer["text"] for answer in asked["answers"]]},
            }
            for article in data
            for paragraph in article["paragraphs"]
            for asked in paragraph["qas"]
            if asked["answers"] or not asked.get("is_impossible")
        ]
    except (KeyError, TypeError, AttributeError):
        return data

"""A request that was made, written to a file, so that who has no model can send it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from testbed import files
from testbed.delivery.delivery import parse
from testbed.endpoints.at_hand import Prefilled
from testbed.endpoints.protocol import TrialRequest, Ware
from testbed.transport.transport import Bytes


def written(prefilled: Prefilled, pieces: Sequence[Bytes], trial: TrialRequest, path: str) -> Ware:
    """The trial's context, in the chunks in which it crosses. Raises StorageError."""
    batch, lengths = prefilled.batch, list[int]()
    with files.writing(Path(path)) as file, files.storing(Path(path)):
        for chunk in parse(trial.delivery).send(pieces):
            lengths.append(file.write(memoryview(chunk).cast("B")))
    return Ware(
        placement=trial.placement,
        path=path,
        lengths=tuple(lengths),
        prefix=prefilled.prefix.digest,
        question=batch.task.question_text(prefilled.example),
        stop=batch.task.stop,
        max_new_tokens=batch.max_new_tokens,
        choices=tuple(batch.task.choice_texts(prefilled.example)),
        codec=trial.codec,
        delivery=trial.delivery,
    )

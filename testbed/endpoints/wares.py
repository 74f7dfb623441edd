"""A request that was made, written to a file, so that who has no model can send it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from msgspec import structs

from testbed import files
from testbed.delivery.delivery import Pipelined, parse
from testbed.endpoints.at_hand import Prefilled
from testbed.endpoints.protocol import Parts, TrialRequest, Ware
from testbed.transport.transport import Bytes

if TYPE_CHECKING:
    from testbed.codecs.codec import Codec


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


def written_parts(
    prefilled: Prefilled, trial: TrialRequest, delivery: Pipelined, layers: int, codec: Codec, path: str
) -> Ware:
    """The same of a trial that was made in parts of one level, and what making each took. Raises StorageError."""
    made, level = prefilled.made[trial.placement, trial.delivery, trial.repeat], trial.codec
    sent = [made.payloads[level, part] for part in delivery.parts(len(prefilled.ids), layers)]
    ware = written(prefilled, [piece for pieces, _ in sent for piece in pieces], trial, path)
    parts = Parts(
        tokens=len(prefilled.ids),
        layers=layers,
        level=level,
        prefill=() if trial.placement == "store" else tuple(made.steps),
        encode_s=tuple(seconds for _, seconds in sent),
        whole=codec.selects,
        asks=codec.asks,
    )
    return structs.replace(ware, parts=parts, select_s=made.kept[level][1] if level in made.kept else 0.0)

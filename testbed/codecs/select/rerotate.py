"""Key rerotation for any selector: kept tokens stand one behind the other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from testbed.codecs.select.wrapper import Wrapper


@dataclass(frozen=True)
class Rerotate(Wrapper):
    """Turns the keys that the selector `by` keeps to consecutive positions, as if what was dropped had never been there.

    K'[h, j] = R(p'_j - p_j) K[h, j], R the rotary embedding, p the positions at which the tokens stood: [kv_heads, kept, dim].
    They come to stand directly before the question, which stays where it is: p'_j = end - kept + j. FINCH and kvpress move the
    question up to them instead, which is the same to a rotary embedding, but for a prefix before the context, which here stays
    as far from the question as it was.
    """

    name: ClassVar[str] = "rerotate"
    source: ClassVar[str] = (
        "FINCH: Prompt-guided Key-Value Cache Compression (arXiv:2408.00167); kvpress's KeyRerotationPress"
    )
    together: ClassVar[bool] = True

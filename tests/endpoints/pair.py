"""An edge and a cloud with a tiny random model, loaded and serving over loopback."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from testbed.endpoints import protocol
from testbed.endpoints.endpoint import Endpoint
from testbed.endpoints.loopback import Loopback
from testbed.endpoints.protocol import FullCache, Link, Outcome, TrialRequest, TrialResult
from testbed.hosts.local import Local
from testbed.speed.times import DeviceTimes
from testbed.speed.words import Speed

CODECS = (
    "fp16",
    "int8",
    "int4",
    "q2c@0.25+int8",
    "snapkv@0.5+int4",
    "h2o@0.5",
    "window@0.25",
    "random@0.5+int8+zstd",
)


class Within:
    """Both sides in this process, called as an `Endpoint` is."""

    role = "loopback"

    def __init__(self) -> None:
        self._handlers = Loopback().handlers()

    def call(self, message: protocol.Message[Any], within_s: float = 0) -> Any:
        return self._handlers[type(message)](message)


class Pair:
    """Both sides. `prefix`: the digest of what they both know; `link`: from one to the other."""

    def __init__(
        self,
        edge: Endpoint | Within,
        cloud: Endpoint | Within,
        model: Path | str,
        task: str = "needle",
        slowdown: dict[str, float] | None = None,
        device: str = "cpu",
        dtype: str = "auto",
        times: DeviceTimes | None = None,
        cloud_model: Path | None = None,
    ) -> None:
        """cloud_model: the cloud's, where that is another than `model`."""
        self.edge, self.cloud = edge, cloud
        self.loaded, self.two_models = [], cloud_model is not None
        for side in dict.fromkeys((edge, cloud)):
            factor = (slowdown or {}).get(side.role, 1.0)
            own = cloud_model if side is cloud and cloud_model is not None else model
            speed = Speed(factor, factor)
            message = protocol.Load(str(own), device, dtype, threads=1, speed=speed, times=times)
            self.loaded.append(side.call(message, 120))
        about = {"count": 3, "context_tokens": 300, "codecs": CODECS, "max_new_tokens": 8}
        prepared = edge.call(protocol.Prepare(task, **about), 60)  # type: ignore[arg-type]
        self.examples = prepared.examples
        self.opening = prepared.prefix  #: the layout before a context, and behind a question
        self.prefix = cloud.call(prepared.prefix, 60)
        self.link = Link("127.0.0.1", cloud.call(protocol.Serve(1 << 22), 10), timeout=20.0)

    def ask(
        self, what: str, example: int = 1, link: dict[str, Any] | None = None, **about: Any
    ) -> TrialResult:
        """A trial of a codec, or of the placement `cloud` or `edge`; `link`: what is unlike `self.link`."""
        placement, codec = (
            (what, "") if what in ("cloud", "edge") else (about.pop("placement", "split"), what)
        )
        settings = {f: getattr(self.link, f) for f in Link.__struct_fields__} | (link or {})
        message = TrialRequest(placement, 0, example, codec=codec, link=Link(**settings), **about)  # type: ignore[arg-type]
        return self.edge.call(message, 60)

    def reference(self, example: int = 1, client: str = "") -> FullCache:
        """The single machine's answer, by the cloud's model; from now on outcomes of the client are compared with it."""
        if self.two_models:
            asked = self.edge.call(protocol.Show(0, example), 10)
            return self.cloud.call(protocol.Read(asked, client), 60)
        full = self.edge.call(protocol.Reference(0, example), 60)
        if full.vocabulary:
            self.cloud.call(protocol.Compare(full.distributions, full.vocabulary, client), 60)
        return full

    def outcome(
        self, request: TrialResult | int, example: int = 1, client: str = "", selector: str = ""
    ) -> Outcome:
        number = request if isinstance(request, int) else request.request
        gold = self.examples[example].gold
        return self.cloud.call(protocol.Examine(number, gold, client, selector), 60)


@contextmanager
def started(
    directory: Path, model: Path, task: str = "needle", cloud_model: Path | None = None, **slowdown: float
) -> Iterator[Pair]:
    """Each side as a process of its own."""
    sides = [Endpoint.start(role, Local(), directory / f"{role}.log") for role in ("edge", "cloud")]
    with sides[0].process, sides[1].process:
        yield Pair(*sides, model, task, slowdown, cloud_model=cloud_model)


def of_two_models(edge: Path, cloud: Path, **about: Any) -> Pair:
    """Each side an object of its own."""
    return Pair(Within(), Within(), edge, cloud_model=cloud, **about)


def in_this_process(model: Path | str, **about: Any) -> Pair:
    both = Within()
    return Pair(both, both, model, **about)

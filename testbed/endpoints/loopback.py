"""Edge and cloud in one process that share one model, or have one each: for measurements that need no network between them."""

from __future__ import annotations

from testbed.endpoints.cloud import Cloud
from testbed.endpoints.edge import Edge
from testbed.endpoints.protocol import Learn, Load, Loaded
from testbed.endpoints.side import Handlers, main
from testbed.models.devices import find


class Loopback:
    """Each side as it is, the cloud's in a thread; a request crosses from one to the other over loopback."""

    def __init__(self) -> None:
        self._edge, self._cloud = Edge(), Cloud()
        self._loaded: dict[
            tuple[str, str, str], Loaded
        ] = {}  #: by model, device and number; the edge's first

    def handlers(self) -> Handlers:
        """Both sides'."""
        both = {**self._cloud.handlers(), **self._edge.handlers()}
        return {**both, Load: self.load, Learn: self.learn}

    def load(self, message: Load) -> Loaded:
        """Load the model once, for both; the second side's message finds it there, or loads for the cloud what is another model,
        on another device or in another number.
        """
        key = message.model, str(find(message.device)), message.dtype
        if not self._loaded:
            self._loaded[key] = self._edge.load(message)
            self._cloud.share(self._edge)
        elif key not in self._loaded:
            self._cloud.prefixes = {}
            self._loaded[key] = self._cloud.load(message)
        return self._loaded[key]

    def learn(self, prefix: Learn) -> str:
        """Both learn a prefix; where they share a model, once."""
        self._edge.learn(prefix)
        return self._cloud.learn(prefix)


if __name__ == "__main__":
    main(lambda: Loopback().handlers())

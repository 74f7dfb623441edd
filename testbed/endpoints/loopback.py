"""Edge and cloud in one process that share one model: for measurements that need no network between them."""

from __future__ import annotations

from testbed.endpoints.cloud import Cloud
from testbed.endpoints.edge import Edge
from testbed.endpoints.protocol import Load, Loaded
from testbed.endpoints.side import Handlers, main


class Loopback:
    """Each side as it is, the cloud's in a thread; a request crosses from one to the other over loopback."""

    def __init__(self) -> None:
        self._edge, self._cloud = Edge(), Cloud()
        self._loaded: Loaded | None = None

    def handlers(self) -> Handlers:
        """Both sides'."""
        return {**self._cloud.handlers(), **self._edge.handlers(), Load: self.load}

    def load(self, message: Load) -> Loaded:
        """Load the model once, for both; the second side's message finds it there."""
        if self._loaded is None:
            self._loaded = self._edge.load(message)
            self._cloud.share(self._edge)
        return self._loaded


if __name__ == "__main__":
    main(lambda: Loopback().handlers())

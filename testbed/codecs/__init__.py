"""From a KV cache to bytes and back: selector → transform → quantizer → entropy coder, each method in one file.

`spec.parse` reads a codec's text, `codec.Codec` runs it, `registry` names the methods. Nothing here imports torch before
it computes, so that listing and checking codecs is instant.
"""

from __future__ import annotations

from testbed.errors import TestbedError


class CodecError(TestbedError, ValueError):
    """A cache that a codec cannot encode, or evidence that its selector lacks."""

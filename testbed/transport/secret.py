"""What makes a run's data path its own: a certificate a side, pinned by the other, and a token, made for the run."""

from __future__ import annotations

import hashlib
import hmac
import os
import ssl
import sys
from collections.abc import Callable
from datetime import UTC, datetime

import msgspec

from testbed.errors import EndpointError

#: What certificates are called; nobody looks.
NAME = "testbed"
TOKEN_BYTES = 32
#: In which a peer has to say who it is.
PATIENCE_S = 5.0


class Secret(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What one side has: its certificate and key, and the other's certificate, in PEM; and the token that both have."""

    certificate: bytes
    key: bytes
    peer: bytes
    token: bytes

    def __repr__(self) -> str:
        return "Secret(…)"  # of which nothing is to be in a log

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the other's certificate, in hexadecimal."""
        return hashlib.sha256(ssl.PEM_cert_to_DER_cert(self.peer.decode())).hexdigest()


def secrets() -> tuple[Secret, Secret]:
    """The serving side's and the asking side's, new."""
    (certificate, key), (other, other_key) = made_certificate(), made_certificate()
    token = os.urandom(TOKEN_BYTES)
    return Secret(certificate, key, other, token), Secret(other, other_key, certificate, token)


def made_certificate() -> tuple[bytes, bytes]:
    """A certificate that signs itself, and its key, in PEM. It is valid always: a host's clock may be wrong by years."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, NAME)])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(datetime(1970, 1, 1, tzinfo=UTC))
        .not_valid_after(datetime(9999, 12, 31, tzinfo=UTC))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(NAME)]), critical=False)
        .sign(key, hashes.SHA256())
    )
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return certificate.public_bytes(serialization.Encoding.PEM), private


class Complaints:
    """Of a listener: a line in the log for each peer that was refused, and no more of them than a log can hold."""

    def __init__(self) -> None:
        self._left = 100

    def say(self, peer: str, why: object) -> None:
        """That peer was refused. why: may be in its own words."""
        self._left -= 1
        if self._left >= 0:
            line = "".join(letter if letter.isprintable() else "?" for letter in str(why)[:200])
            print(f"refused {peer}: {line}", file=sys.stderr, flush=True)


def require_token(secret: Secret, read_into: Callable[[memoryview], int]) -> None:
    """Raises EndpointError where what comes first is not the token; `read_into`: some of what comes, and how much."""
    token = memoryview(bytearray(TOKEN_BYTES))
    got = 0
    while got < TOKEN_BYTES and (count := read_into(token[got:])):
        got += count
    if not hmac.compare_digest(token, secret.token):
        raise EndpointError("another token than this run's")

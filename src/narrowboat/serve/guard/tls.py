"""The server's certificate: checked before anything starts, by shaking hands with ourselves in memory."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path

from narrowboat.errors import CertificateError
from narrowboat.serve.guard.files import read_file


@dataclass(frozen=True)
class Identity:
    """A certificate with its key, which belong together and are valid now.

    Attributes:
        context: for HTTPS.
        certificate: PEM; with the key, for gRPC.
        key: PEM.
        expires: as certificates write it, e.g. ``Jun  1 12:00:00 2027 GMT``.
    """

    context: ssl.SSLContext
    certificate: bytes
    key: bytes
    expires: str

    def __repr__(self) -> str:  # the key is nobody's business, a log's least of all
        return f"Identity(expires={self.expires!r})"


def load_identity(certificate: Path, key: Path) -> Identity:
    """Read both, and make sure that clients will take them.

    Raises:
        CertificateError: missing, unreadable, not of one another, expired or not yet valid, not for a server, or a key
            that others can read.
    """
    chain = read_file(certificate, "certificate", CertificateError, private=False)
    secret = read_file(key, "key", CertificateError, private=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_COMPRESSION | ssl.OP_NO_RENEGOTIATION | ssl.OP_CIPHER_SERVER_PREFERENCE
    context.set_alpn_protocols(["http/1.1"])
    try:
        # With a password given, OpenSSL does not ask the terminal for one.
        context.load_cert_chain(certificate, key, password="")
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise CertificateError(f"{key}: is not the key of the certificate {certificate}") from error
        raise CertificateError(
            f"{certificate} and {key}: not a certificate and its key, both PEM, the key without a password: {error}"
        ) from error
    except (OSError, ValueError) as error:
        raise CertificateError(f"{certificate} and {key}: cannot be used: {error}") from error
    return Identity(context, chain, secret, _check_by_handshake(context, certificate))


def _check_by_handshake(context: ssl.SSLContext, certificate: Path) -> str:
    """Until when the certificate holds, by a client that trusts exactly it. Nothing leaves this process."""
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.check_hostname = False  # which names clients use is theirs to know
    client.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    try:
        client.load_verify_locations(certificate)
        to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
        ends = [
            client.wrap_bio(to_client, to_server),
            context.wrap_bio(to_server, to_client, server_side=True),
        ]
        for turn in range(12):  # a handshake takes four; the limit is for what nobody foresaw
            try:
                ends[turn % 2].do_handshake()
            except ssl.SSLWantReadError:
                continue
            if turn % 2 == 0:  # the client is content
                told = ends[0].getpeercert() or {}
                return str(told.get("notAfter", ""))
    except ssl.SSLCertVerificationError as error:
        raise CertificateError(f"{certificate}: clients would refuse it: {error.verify_message}") from error
    except ssl.SSLError as error:
        raise CertificateError(f"{certificate}: clients would refuse it: {error}") from error
    raise CertificateError(f"{certificate}: no client can agree on a connection with it")

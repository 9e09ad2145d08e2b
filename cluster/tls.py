"""The endpoint's certificate: whether it can be used, and how our own clients check it.

TLS ends at HAProxy, on every node that runs one (`haproxy`); `preflight` and `doctor` ask for `findings` before anything starts.
Our commands on the node reach the endpoint as 127.0.0.1, which a public certificate does not name: they trust exactly the
certificate that HAProxy serves, whatever name is in it, and no other. Clients elsewhere check it in the usual way, by name.
"""

from __future__ import annotations

import re
import ssl
import stat
import time
from pathlib import Path
from typing import Protocol

from cluster.errors import LaunchError
from cluster.finding import Finding

PEM_BLOCK = re.compile(r"-----BEGIN ([A-Z ]+)-----.+?-----END \1-----\n?", re.DOTALL)
SOON_S = 14 * 86400.0
CERTIFICATE, KEY = "node.tls.certificate", "node.tls.key"


class Files(Protocol):
    """What `node.tls` says."""

    @property
    def certificate(self) -> str: ...

    @property
    def key(self) -> str: ...


def findings(files: Files | None) -> list[Finding]:
    """What is wrong with a certificate and its key, or will be within two weeks; empty when all is well, or without TLS."""
    if files is None:
        return []
    certificate, key = Path(files.certificate).expanduser(), Path(files.key).expanduser()
    for where, path in ((CERTIFICATE, certificate), (KEY, key)):
        try:
            path.read_bytes()
        except OSError as error:
            return [Finding("error", f"{path} cannot be read: {error.strerror}", where, "every node needs it there")]
    mode = stat.S_IMODE(key.stat().st_mode)
    if mode & 0o077:
        return [Finding("error", f"{key} can be read by others (mode {mode:04o})", KEY, f"chmod 600 {key}")]
    try:
        ends = shaken(certificate, key)
    except ssl.SSLCertVerificationError as error:
        return [Finding("error", f"{certificate}: {error.verify_message}", CERTIFICATE, "put a valid one there")]
    except PermissionError:
        return [Finding("error", f"{key} has a password", KEY, f"write it without one (openssl pkey -in {key} -out <file>)")]
    except (ssl.SSLError, LaunchError) as error:
        return [_refused(str(getattr(error, "reason", "")), certificate, key)]
    if ends - time.time() > SOON_S:
        return []
    return [
        Finding("warning", f"{certificate} expires on {time.strftime('%Y-%m-%d', time.gmtime(ends))}", CERTIFICATE, "renew it")
    ]


def shaken(certificate: Path, key: Path) -> float:
    """Shake hands in memory, as server and as a client that trusts this certificate; when it expires, seconds since the epoch.

    Raises:
        ssl.SSLCertVerificationError: it holds no more, or not yet.
        ssl.SSLError: it cannot be read, or the key is not its own.
        PermissionError: the key has a password.
    """

    def ask() -> bytes:
        raise PermissionError  # nobody is there to type it when a node starts

    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(certificate, key, ask)
    there, back = ssl.MemoryBIO(), ssl.MemoryBIO()
    ours = trust(certificate).wrap_bio(back, there, server_side=False)
    sides, rounds = [ours, server.wrap_bio(there, back, server_side=True)], 0
    while sides and rounds < 10:
        for side in list(sides):
            try:
                side.do_handshake()
                sides.remove(side)
            except ssl.SSLWantReadError:
                pass
        rounds += 1
    return float(ssl.cert_time_to_seconds(str((ours.getpeercert() or {})["notAfter"])))


def _refused(reason: str, certificate: Path, key: Path) -> Finding:
    if reason == "KEY_VALUES_MISMATCH":
        return Finding("error", f"{key} does not belong to {certificate}", KEY, "give the key it was made with")
    if reason.endswith("KEY_TOO_SMALL"):
        return Finding("error", f"{key} is too short for today's rules", KEY, "use EC P-256, or RSA of 2048 bits or more")
    fix = "give files that begin with -----BEGIN CERTIFICATE----- and -----BEGIN PRIVATE KEY-----"
    return Finding("error", f"{certificate} and {key} are not a certificate and a private key in PEM form", "node.tls", fix)


def leaf(certificate: Path) -> str:
    """The first certificate of a file: the server's own.

    Raises:
        ValueError: there is none.
    """
    for block in PEM_BLOCK.finditer(certificate.read_text()):
        if block[1] in ("CERTIFICATE", "X509 CERTIFICATE", "TRUSTED CERTIFICATE"):
            return block[0]
    raise ValueError(f"{certificate} holds no certificate")


def trust(certificate: str | Path) -> ssl.SSLContext:
    """For a client on the node: accepts the server that has exactly this certificate, by whatever name it was reached.

    Raises:
        LaunchError: there is none in this file.
    """
    try:
        own = leaf(Path(certificate).expanduser())
    except (OSError, ValueError) as error:
        raise LaunchError(f"{certificate}: no certificate can be read from it: {error}") from error
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.check_hostname = False
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    context.load_verify_locations(cadata=own)
    return context

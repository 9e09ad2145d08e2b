"""The endpoint's certificate: what is refused before anything starts, what HAProxy serves with it, whom our clients believe."""

from __future__ import annotations

import http.client
import os
import re
import socket
import ssl
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import certificates
import pytest

from cluster import haproxy, preflight, tls
from cluster.config import Config, TlsConfig, parse
from cluster.errors import LaunchError
from cluster.preflight import free_port

RAYS = (
    "defaults\n    mode http\n    timeout client 2s\n    timeout server 5s\n    timeout connect 5s\n"
    "frontend prometheus\n    bind :{metrics}\nfrontend http_frontend\n    bind 127.0.0.1:{port}\n    use_backend x\n"
    "backend x\n    http-request return status 200\n"
)


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return certificates.make(tmp_path_factory.mktemp("tls"))


def lines(certificate: Path, key: Path) -> list[str]:
    return [str(finding) for finding in tls.findings(TlsConfig(certificate=str(certificate), key=str(key)))]


def test_a_good_pair_is_well_and_without_tls_nothing_is_asked(own: tuple[Path, Path]) -> None:
    assert lines(*own) == [] == tls.findings(None)


@pytest.mark.parametrize("case", ["missing", "not one", "key of another", "open key", "expired", "not yet", "password", "no key"])
def test_what_cannot_be_used_is_one_line(own: tuple[Path, Path], tmp_path: Path, case: str) -> None:
    certificate, key = own
    said = "is not to be"
    if case == "missing":
        certificate, said = tmp_path / "none.crt", f"node.tls.certificate: {tmp_path}/none.crt cannot be read: No such file"
    elif case == "not one":
        certificate, said = tmp_path / "text.crt", "node.tls: .* are not a certificate and a private key"
        certificate.write_text("hello\n")
    elif case == "key of another":
        key, said = certificates.make(tmp_path, "other")[1], "node.tls.key: .*other.key does not belong to .*own.crt"
    elif case == "open key":
        certificate, key = certificates.make(tmp_path)
        key.chmod(0o640)
        said = r"node.tls.key: .* can be read by others \(mode 0640\); chmod 600"
    elif case == "expired":
        (certificate, key), said = certificates.outdated(tmp_path, -9, -1), "node.tls.certificate: .*certificate has expired"
    elif case == "not yet":
        (certificate, key), said = certificates.outdated(tmp_path, 1, 9), "node.tls.certificate: .*certificate is not yet valid"
    elif case == "password":
        plain, key = key, tmp_path / "locked.key"
        command = ["openssl", "pkey", "-in", str(plain), "-aes256", "-passout", "pass:x", "-out", str(key)]
        subprocess.run(command, check=True, capture_output=True)
        key.chmod(0o600)
        said = "node.tls.key: .* has a password"
    else:
        key, said = tmp_path / "no.key", "node.tls: .* are not a certificate and a private key"
        key.write_text(certificate.read_text())
        key.chmod(0o600)
    (line,) = lines(certificate, key)
    assert re.match(said, line) and "\n" not in line, line


def test_one_that_ends_soon_is_a_warning_and_stops_nothing(tmp_path: Path) -> None:
    certificate, key = certificates.make(tmp_path, days=3)
    (finding,) = tls.findings(TlsConfig(certificate=str(certificate), key=str(key)))
    assert finding.level == "warning" and "expires on 20" in finding.what
    config = described(certificate, key)
    assert [line for line in preflight.problems(config, tmp_path) if "tls" in line] == []


def test_up_is_told(tmp_path: Path, own: tuple[Path, Path]) -> None:
    config = described(tmp_path / "none.crt", own[1])
    assert len([line for line in preflight.problems(config, tmp_path) if "node.tls.certificate" in line]) == 1


def described(certificate: Path, key: Path) -> Config:
    node = {"tls": {"certificate": str(certificate), "key": str(key)}}
    return parse({"node": node, "models": [{"id": "a", "device": "cpu"}]})


def test_only_the_public_port_gets_it_and_once(tmp_path: Path) -> None:
    text = haproxy.harden(RAYS.format(port=8000, metrics=9101), "/errors", str(tmp_path / "endpoint.pem"))
    binds = re.findall(r"^\s*bind (.*)$", text, re.M)
    assert binds == ["127.0.0.1:9101", f"127.0.0.1:8000 ssl crt {tmp_path}/endpoint.pem {haproxy.TLS_OPTIONS}"]
    assert haproxy.harden(text, "/errors", str(tmp_path / "endpoint.pem")) == text
    assert " ssl " not in haproxy.harden(RAYS.format(port=8000, metrics=9101), "/errors")


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[int, Path, Path]]:
    """(port, certificate, key) of the real HAProxy, started by our wrapper as Ray does."""
    certificate, key = certificates.make(tmp_path / "given")
    folder, port = tmp_path / "h", free_port()
    folder.mkdir()
    haproxy.write_errors(folder / "errors")
    haproxy.write_wrapper(folder / "haproxy")
    process = start(folder, port, certificate, key)
    yield port, certificate, key
    process.kill()
    process.wait()


def start(folder: Path, port: int, certificate: Path, key: Path, *more: str) -> subprocess.Popen[bytes]:
    (folder / "haproxy.cfg").write_text(RAYS.format(port=port, metrics=free_port()))
    environ = {
        **os.environ,
        haproxy.BINARY_VARIABLE: str(haproxy.bundled_binary()),
        haproxy.ERRORS_DIR_VARIABLE: str(folder / "errors"),
        haproxy.CERTIFICATE_VARIABLE: str(certificate),
        haproxy.KEY_VARIABLE: str(key),
    }
    return subprocess.Popen([folder / "haproxy", "-db", "-f", str(folder / "haproxy.cfg"), *more], env=environ)


def status(port: int, trust: ssl.SSLContext, host: str = "127.0.0.1") -> int:
    """Of a GET, once anybody listens."""
    deadline = time.monotonic() + 10
    while True:
        connection = http.client.HTTPSConnection(host, port, timeout=10, context=trust)
        try:
            connection.request("GET", "/")
            return connection.getresponse().status
        except ConnectionRefusedError:
            assert time.monotonic() < deadline
        finally:
            connection.close()


def test_https_and_nothing_else_is_spoken(served: tuple[int, Path, Path]) -> None:
    port, certificate, _ = served
    assert status(port, tls.trust(certificate)) == 200
    assert status(port, ssl.create_default_context(cafile=str(certificate))) == 200, "a stock client checks the name too"
    plain = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    with pytest.raises((http.client.HTTPException, ConnectionError)):
        plain.request("GET", "/")
        plain.getresponse()
    offered = subprocess.run(
        ["openssl", "s_client", "-connect", f"127.0.0.1:{port}", "-tls1_1", "-cipher", "ALL:@SECLEVEL=0"],
        capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=20,
    )  # fmt: skip
    assert offered.returncode != 0 and "alert protocol version" in offered.stderr, offered.stderr


def test_our_clients_believe_that_certificate_alone(served: tuple[int, Path, Path], tmp_path: Path) -> None:
    port, stranger = served[0], certificates.make(tmp_path, "stranger")[0]
    with pytest.raises(ssl.SSLCertVerificationError):
        status(port, tls.trust(stranger))
    with pytest.raises(LaunchError, match="no certificate can be read"):
        tls.trust(tmp_path / "none")


def test_the_files_that_haproxy_reads_are_the_owners_alone(served: tuple[int, Path, Path], tmp_path: Path) -> None:
    status(served[0], tls.trust(served[1]))
    folder = tmp_path / "h"
    assert "PRIVATE KEY" in (folder / "endpoint.pem").read_text()
    assert "PRIVATE KEY" not in (folder / "endpoint.crt").read_text() + (folder / "haproxy.cfg").read_text()
    assert (folder / "endpoint.pem").stat().st_mode & 0o777 == 0o600


def test_a_renewed_certificate_is_taken_at_the_next_reload_and_a_broken_one_is_not(
    served: tuple[int, Path, Path], tmp_path: Path
) -> None:
    port, certificate, key = served
    status(port, tls.trust(certificate))
    pem = tmp_path / "h" / "endpoint.pem"
    before = pem.read_text()
    renewed, its_key = certificates.make(tmp_path, "renewed")
    certificate.write_text(renewed.read_text())
    assert start(tmp_path / "h", port, certificate, key, "-c").wait() == 0
    assert pem.read_text() == before, "the key is still the old one: nothing is taken"
    key.write_text(its_key.read_text())
    assert start(tmp_path / "h", port, certificate, key, "-c").wait() == 0
    assert pem.read_text() == renewed.read_text() + its_key.read_text()


def test_a_socket_without_a_word_is_given_up(served: tuple[int, Path, Path]) -> None:
    status(served[0], tls.trust(served[1]))
    with socket.create_connection(("127.0.0.1", served[0]), timeout=20) as silent:
        silent.sendall(b"\x16\x03\x01 not a handshake")
        assert silent.recv(100)[:1] in (b"", b"\x15"), "an alert or the end, never an answer"

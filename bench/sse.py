"""Reading a server-sent event stream from raw bytes, as cheaply as a load generator must.

A chunk from the network may hold half an event or twenty. `SseReader` cuts complete `data:` lines out of what arrived;
`has_token` says whether a payload carries text, by one regular expression and no JSON. Called by `load` for every chunk.
"""

from __future__ import annotations

import re

_TOKEN = re.compile(rb'"(?:content|text|reasoning|reasoning_content)": ?"[^"]')
_STAMP = re.compile(rb"t=(\d+\.\d+)")
DONE = b"[DONE]"


class SseReader:
    """Cuts a byte stream into the payloads of its `data:` lines. Comments and other fields are skipped."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> list[bytes]:
        """The payloads completed by `data`, without the `data:` prefix and the white space around them."""
        data = self._rest + data
        end = data.rfind(b"\n")
        if end < 0:
            self._rest = data
            return []
        self._rest = data[end + 1 :]
        return [line[5:].strip() for line in data[:end].split(b"\n") if line.startswith(b"data:")]


def has_token(payload: bytes) -> bool:
    """Whether a chunk of a chat or text completion carries at least one character of output."""
    return _TOKEN.search(payload) is not None


def sent_at(payload: bytes) -> float | None:
    """The sender's `time.monotonic()` that the fake engine writes into its text (`--stamps`), seconds; None without."""
    found = _STAMP.search(payload)
    return float(found.group(1)) if found else None

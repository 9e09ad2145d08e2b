"""The table of ports in docs/security.md, from the entries of an attack: what listens where, and what a stranger got.

`write` replaces what lies between the markers, and nothing else. Ports that Ray chooses anew at each start are `random`; the rows
of hosts that do the same are one row.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from attack import Entry

BEGIN, END = "<!-- ports: begin -->", "<!-- ports: end -->"
# The default of each fixed port, by its name in the configuration.
FIXED = {
    22: "22",
    8000: "`node.port` 8000",
    6379: "`node.gcs_port` 6379",
    8265: "`node.dashboard_port` 8265",
    8404: "`node.stats_port` 8404",
    9101: "`node.proxy_metrics_port` 9101",
}
REPLICAS = range(30000, 30101)


def write(path: Path, entries: Sequence[Entry]) -> None:
    """Put the table into the document.

    Raises:
        AssertionError: the document has no place for it.
    """
    text = path.read_text()
    assert BEGIN in text and END in text, f"{path} has no {BEGIN} ... {END}"
    head, rest = text.split(BEGIN, 1)
    path.write_text(f"{head}{BEGIN}\n{table(entries)}\n{END}{rest.split(END, 1)[1]}")


def table(entries: Sequence[Entry]) -> str:
    """Markdown, a row per kind of listener; those that a stranger reaches come first."""
    hosts: dict[tuple[str, ...], set[str]] = defaultdict(set)
    answers: dict[tuple[str, ...], set[str]] = defaultdict(set)
    for entry in entries:
        row = ("1" if not entry.reached else "0", entry.kind, port_name(entry.port), bound(entry), entry.speaks)
        hosts[row].add("head" if "head" in entry.host else "workers")
        answers[row].add(verdict(entry))
    lines = ["| who | port | on | bound to | speaks | a stranger gets |", "| --- | --- | --- | --- | --- | --- |"]
    for row in sorted(hosts):
        _, kind, port, address, speaks = row
        on = "every node" if len(hosts[row]) == 2 else next(iter(hosts[row]))
        lines.append(f"| {kind} | {port} | {on} | {address} | {speaks} | {' / '.join(sorted(answers[row]))} |")
    return "\n".join(lines)


def port_name(port: int) -> str:
    """How a reader finds the port in his own cluster."""
    return FIXED.get(port) or ("`node.replica_ports`" if port in REPLICAS else "random")


def bound(entry: Entry) -> str:
    """In words."""
    if entry.bound.startswith("127.") or entry.bound in ("[::1]", "[::ffff:127.0.0.1]"):
        return "127.0.0.1"
    return "all addresses" if entry.bound in ("*", "0.0.0.0", "[::]") else "the node's address" if entry.bound else "not known"


def verdict(entry: Entry) -> str:
    """What was answered, without how often: that differs from run to run."""
    if entry.breach:
        return f"**{entry.breach}**"
    if not entry.reached:
        return "no connection"
    said = re.sub(r" x \d+( of \d+)?", "", entry.answer)
    if entry.speaks.startswith("HTTP") and "200" in said:
        return f"health, else {', '.join(code for code in said.split(', ') if code != '200')}"
    return said

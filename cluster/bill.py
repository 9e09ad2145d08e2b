"""`up --dry-run` of a manifest: the exact command, and what the cluster will cost per hour. Starts nothing and asks no cloud.

Pure over a manifest that `manifest.load` has read and the table of `prices`. Caller: `python -m cluster`.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster import manifest, prices, ray_up

Say = Callable[[str], None]


@dataclass(frozen=True)
class Item:
    """What one node type costs, in US dollars per hour.

    Args:
        name: The node type.
        machine: The cloud's name of the machine, or `own machine`.
        each: Price of one node; None where it is not known.
        most: How many there may be at most.
        spot: Whether the price is an estimate, because the machine is a spot machine.
    """

    name: str
    machine: str
    each: float | None
    most: int
    spot: bool


@dataclass(frozen=True)
class Bill:
    """The head, the kinds of workers, and how many workers there may be in all."""

    head: Item
    workers: tuple[Item, ...]
    max_workers: int

    @property
    def unknown(self) -> tuple[str, ...]:
        """Machines without a price, so that no sum is the whole."""
        return tuple(item.machine for item in (self.head, *self.workers) if item.each is None)

    @property
    def most(self) -> float:
        """The head and the dearest workers that `max_workers` allows; machines without a price count as nothing."""
        left, total = self.max_workers, self.head.each or 0.0
        for item in sorted(self.workers, key=lambda item: -(item.each or 0.0)):
            taken = min(left, item.most)
            total += taken * (item.each or 0.0)
            left -= taken
        return total


def bill(prepared: Mapping[str, Any]) -> Bill:
    """What the cluster of a manifest costs; `prepared` is what `manifest.load` returns."""
    types, head = prepared["available_node_types"], prepared["head_node_type"]

    def item(name: str, most: int) -> Item:
        entry = types[name]
        return Item(name, prices.machine_of(entry) or "own machine", prices.hourly_price(entry), most, prices.is_spot(entry))

    workers = tuple(item(name, int(entry["max_workers"])) for name, entry in types.items() if name != head)
    return Bill(item(head, 1), workers, int(prepared["max_workers"]))


def lines(found: Bill) -> list[str]:
    """The bill as a table for a terminal."""
    items = (found.head, *found.workers)
    names, machines = max(len(item.name) for item in items), max(len(item.machine) for item in items)
    table = [f"US dollars per hour; approximate list prices noted {prices.NOTED} for {prices.REGIONS}: check your provider's"]
    for item in items:
        about = "~" if item.spot else ""
        each = "unknown" if item.each is None else f"{about}{item.each:.2f}"
        most = "unknown" if item.each is None else f"{about}{item.each * item.most:.2f}"
        table.append(f"  {item.name:<{names}}  {item.machine:<{machines}}  one {each:>7}   at most {item.most}: {most:>8}")
    table.append(
        f"  the head alone {found.head.each or 0.0:.2f}; the most in all, with max_workers {found.max_workers}: {found.most:.2f}"
    )
    if any(item.spot for item in items):
        table.append(f"  ~ spot, estimated at {prices.SPOT_SHARE:g} of the price on demand")
    if found.unknown:
        table.append(f"  not in the sums, no price noted for: {', '.join(sorted(set(found.unknown)))}")
    if any(item.machine != "own machine" for item in items):
        table.append("  without disks, public addresses and traffic; stopped nodes still cost their disks")
    return table


def command_line(path: Path) -> str:
    """The command that `up` runs, with what it adds to the environment, for a shell."""
    added = {name: value for name, value in ray_up.environment().items() if os.environ.get(name) != value}
    return " ".join(
        [*(f"{name}={shlex.quote(value)}" for name, value in sorted(added.items())), shlex.join(manifest.up_command(path))]
    )


def dry_run(path: Path, out: Say) -> int:
    """Print what `up` of a manifest would run and what it would cost. Returns 0.

    Raises:
        ConfigError: the manifest has mistakes, one line each.
    """
    prepared = manifest.load_to_start(path)
    out("would run:")
    out(f"  {command_line(path)}")
    for line in lines(bill(prepared)):
        out(line)
    return 0

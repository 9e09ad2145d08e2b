"""What one check of a node says: how bad, what, where, what to do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Level = Literal["ok", "warning", "error"]


@dataclass(frozen=True)
class Finding:
    """One line of `doctor`.

    Args:
        level: `ok` is worth showing only; an `error` keeps a node from starting.
        what: What was found.
        where: The thing that was looked at, such as `versions` or `node.port`.
        fix: What to do; empty when all is well.
    """

    level: Level
    what: str
    where: str
    fix: str = ""

    def __str__(self) -> str:
        return f"{self.where}: {self.what}" + (f"; {self.fix}" if self.fix else "")

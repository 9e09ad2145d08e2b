"""What was used: requests and tokens per key, model and minute, kept until the store has acknowledged them.

The gateway calls `UsageBook.add` at the end of each request; `sync.py` takes what there is and reports it delivered.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from cluster.config import Price
from cluster.records import UsageRow

MINUTE_S = 60


@dataclass(frozen=True)
class Tokens:
    """Tokens of one request, as the engine counted them."""

    prompt: int = 0
    completion: int = 0
    cached: int = 0

    @property
    def total(self) -> int:
        return self.prompt + self.completion

    @classmethod
    def parse(cls, line: bytes) -> Tokens:
        """From `prompt completion cached`, as the engine's guard writes it."""
        prompt, completion, cached = (int(part) for part in line.split())
        return cls(prompt, completion, cached)


def cost_usd(price: Price, tokens: Tokens) -> float:
    """What these tokens cost, in US dollars."""
    cached_price = price.prompt if price.cached is None else price.cached
    fresh = max(0, tokens.prompt - tokens.cached)
    return (fresh * price.prompt + tokens.cached * cached_price + tokens.completion * price.completion) / 1e6


class UsageBook:
    """Usage that the store does not have yet."""

    def __init__(self) -> None:
        self._open: dict[tuple[str, str, int], dict[str, float]] = defaultdict(lambda: defaultdict(float))
        self._sent: list[UsageRow] = []

    def add(
        self, key_id: str, model: str, now: float, tokens: Tokens, cost: float, latency_s: float, ttft_s: float, error: bool
    ) -> None:
        """One request is over. `now` is unix seconds."""
        row = self._open[(key_id, model, int(now) // MINUTE_S * MINUTE_S)]
        row["requests"] += 1
        row["errors"] += error
        row["prompt_tokens"] += tokens.prompt
        row["completion_tokens"] += tokens.completion
        row["cached_tokens"] += tokens.cached
        row["latency_s"] += latency_s
        row["ttft_s"] += ttft_s
        row["cost_usd"] += cost

    def pending_cost(self, key_id: str) -> float:
        """US dollars of this key that the store does not know of."""
        sent = sum(row.cost_usd for row in self._sent if row.key_id == key_id)
        return sent + sum(row["cost_usd"] for (key, _, _), row in self._open.items() if key == key_id)

    def take(self) -> list[UsageRow]:
        """All there is, to be sent; `delivered` when the store has it."""
        floats = {"latency_s", "ttft_s", "cost_usd"}
        self._sent = [
            UsageRow(
                key_id=key,
                model=model,
                window_start=minute,
                **{name: value if name in floats else int(value) for name, value in row.items()},  # type: ignore[arg-type]
            )
            for (key, model, minute), row in self._open.items()
        ]
        self._open.clear()
        return self._sent

    def delivered(self) -> None:
        """The store has what `take` gave."""
        self._sent = []

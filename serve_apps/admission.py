"""Who goes next: a bounded, weighted-fair queue in front of each model.

`FairQueue` is the policy alone (start-time fair queueing: Goyal, Vin, Cheng 1996): each key is a flow, a request costs what it
may use, a key's weight is 2 to its priority, and the queue serves the flow that has had the least. `Admission` adds the
waiting: so many requests at the engine at once, the rest in the queue, a full queue or a long wait answered with a 503 and
`Retry-After`. When the queue is full, the key that fills it pays, not the one that comes.

The gateway has one Admission per model. Nothing here knows of HTTP, Ray or engines.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from cluster.errors import ApiError

T = TypeVar("T")
MAX_WEIGHT_SHIFT = 10
SERVICE_SMOOTHING = 0.1


def weight_of(priority: int) -> float:
    """2 to the priority, within 2^-10 and 2^10."""
    return float(2.0 ** max(-MAX_WEIGHT_SHIFT, min(MAX_WEIGHT_SHIFT, priority)))


@dataclass
class _Flow(Generic[T]):
    """One key: what waits, as (start tag, item), oldest first, and the finish tag of its last request."""

    waiting: deque[tuple[float, T]] = field(default_factory=deque)
    finish: float = 0.0


class FairQueue(Generic[T]):
    """Start-time fair queueing over flows. Not thread-safe; all operations are O(number of waiting flows) or better."""

    def __init__(self) -> None:
        self._flows: dict[str, _Flow[T]] = {}
        self._virtual = 0.0
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def waiting(self, flow: str) -> int:
        """Items of this flow that wait."""
        return len(self._flows[flow].waiting) if flow in self._flows else 0

    def flows(self) -> int:
        """Flows with something waiting."""
        return sum(1 for flow in self._flows.values() if flow.waiting)

    def push(self, flow: str, item: T, cost: float, weight: float) -> None:
        """Put an item at the end of its flow. Larger cost means a later turn for the flow's next item; weight divides it."""
        entry = self._flows.setdefault(flow, _Flow())
        start = max(self._virtual, entry.finish)
        entry.finish = start + cost / weight
        entry.waiting.append((start, item))
        self._size += 1

    def pop(self) -> T:
        """Take the item whose turn it is. Raises IndexError when empty."""
        ready = [flow for flow in self._flows.values() if flow.waiting]
        if not ready:
            raise IndexError("pop from an empty FairQueue")
        flow = min(ready, key=lambda candidate: candidate.waiting[0][0])
        self._virtual, item = flow.waiting.popleft()
        self._size -= 1
        self._forget()
        return item

    def drop_newest_of_longest(self) -> T:
        """Take the newest item of the flow with most waiting."""
        flow = max(self._flows.values(), key=lambda candidate: len(candidate.waiting))
        start, item = flow.waiting.pop()
        flow.finish = start
        self._size -= 1
        return item

    def remove(self, flow: str, item: T) -> bool:
        """Take out an item that gave up; False when it is no longer there."""
        entry = self._flows.get(flow)
        for spot, (start, waiting) in enumerate(entry.waiting if entry else ()):
            if waiting is item and entry is not None:
                del entry.waiting[spot]
                if spot == len(entry.waiting):  # it was the newest: the flow's next item takes its turn
                    entry.finish = start
                self._size -= 1
                return True
        return False

    def end_busy_period(self) -> None:
        """Nobody waits and nothing runs: what was used while there was room for all is no debt."""
        if not self._size:
            self._flows.clear()

    def _forget(self) -> None:
        """Flows whose turn is past and who wait for nothing carry no debt: drop them."""
        done = [name for name, flow in self._flows.items() if not flow.waiting and flow.finish <= self._virtual]
        for name in done:
            del self._flows[name]


class Admission:
    """At most `limit()` requests of one model at its engines from this gateway; the others wait their turn.

    Args:
        model: The model's id, for messages.
        limit: Called whenever a slot may be free; grows and shrinks with the replicas.
        max_queued: Requests that may wait.
        max_wait_s: Longest wait.
    """

    def __init__(self, model: str, limit: Callable[[], int], max_queued: int, max_wait_s: float) -> None:
        self._model = model
        self._limit = limit
        self._max_queued = max_queued
        self._max_wait_s = max_wait_s
        self._queue: FairQueue[asyncio.Future[None]] = FairQueue()
        self._service_s = 1.0
        self.running = 0

    @property
    def queued(self) -> int:
        """Requests that wait now."""
        return len(self._queue)

    async def enter(self, key: str, priority: int, cost: float) -> None:
        """Wait for a slot. Every successful `enter` needs one `leave`.

        Raises:
            ApiError: 503 `model_overloaded`, when the queue is full or the wait was too long.
        """
        if self.running >= self._limit() or len(self._queue):
            self._make_room(key)
        ticket: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._queue.push(key, ticket, max(cost, 1.0), weight_of(priority))
        self._serve()
        if ticket.done():
            ticket.result()
            return
        try:
            async with asyncio.timeout(self._max_wait_s):
                await ticket
        except TimeoutError:
            self._give_up(key, ticket)
            raise self._overloaded(f"no slot became free in {self._max_wait_s:.0f} s") from None
        except asyncio.CancelledError:
            self._give_up(key, ticket)
            raise

    def leave(self, service_s: float) -> None:
        """Give a slot back; `service_s` is how long it was held."""
        self.running -= 1
        self._service_s += SERVICE_SMOOTHING * (service_s - self._service_s)
        self._serve()
        if not self.running:
            self._queue.end_busy_period()

    def refresh(self) -> None:
        """Look at the limit again; called when replicas come or go."""
        self._serve()

    def _serve(self) -> None:
        while len(self._queue) and self.running < self._limit():
            ticket = self._queue.pop()
            if not ticket.done():
                self.running += 1
                ticket.set_result(None)

    def _give_up(self, key: str, ticket: asyncio.Future[None]) -> None:
        if not self._queue.remove(key, ticket) and ticket.done() and not ticket.cancelled() and ticket.exception() is None:
            self.leave(self._service_s)

    def _make_room(self, key: str) -> None:
        if len(self._queue) < self._max_queued:
            return
        flows = self._queue.flows() + (0 if self._queue.waiting(key) else 1)
        if self._max_queued == 0 or self._queue.waiting(key) + 1 > self._max_queued / flows:
            raise self._overloaded(f"{len(self._queue)} requests are waiting")
        loser = self._queue.drop_newest_of_longest()
        if not loser.done():
            loser.set_exception(self._overloaded(f"{len(self._queue)} requests are waiting"))

    def _overloaded(self, why: str) -> ApiError:
        wait = min(60.0, max(1.0, (len(self._queue) + 1) * self._service_s / max(1, self._limit())))
        text = f"The model {self._model!r} is busy: {why}. Retry after {wait:.0f} s."
        return ApiError(503, text, "model_overloaded", retry_after=wait)

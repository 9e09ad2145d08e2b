"""Counts tokens inside the engine's process: the one place that touches vLLM's internals, and why.

A gateway that relays bytes cannot know what a stream cost without parsing every chunk, and nobody can know what a cancelled
request cost but the engine. So the engine's client object (`vllm.engine.protocol.EngineClient`, what all of vLLM's HTTP
handlers call) gets three of its methods wrapped on the instance: `generate` and `encode` count what they yield, `abort`
reads how far a request had come that never yields (`RequestOutputKind.FINAL_ONLY`), from `output_processor.request_states`.
The same counts tell the stall watchdog when the last token came.

`engine.py` calls `attach` once and opens a `Tally` per HTTP request. This module knows nothing of HTTP.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Callable, Iterable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Tally:
    """Tokens of one HTTP request: prompt, generated, and prompt tokens that the prefix cache had."""

    prompt: int = 0
    completion: int = 0
    cached: int = 0

    def line(self) -> str:
        """`prompt completion cached`, as it travels to the gateway."""
        return f"{self.prompt} {self.completion} {self.cached}"


@dataclass
class Meter:
    """What the engine of this process is doing. `last_token` is `time.monotonic()` of the last token or the last idle moment."""

    running: int = 0
    tokens: int = 0
    last_token: float = field(default_factory=time.monotonic)
    last_token_wall: float = 0.0

    def stalled_for(self, now: float) -> float:
        """Seconds since the last token while requests are running; 0 when idle."""
        return now - self.last_token if self.running else 0.0

    def began(self) -> None:
        if self.running == 0:
            self.last_token = time.monotonic()
        self.running += 1

    def produced(self, count: int) -> None:
        self.tokens += count
        self.last_token = time.monotonic()
        self.last_token_wall = time.time()


current: ContextVar[Tally | None] = ContextVar("tidepool_tally", default=None)


def attach(client: Any, meter: Meter) -> None:
    """Wrap `generate`, `encode` and `abort` of this engine client; each HTTP request's Tally is taken from `current`."""
    client.generate = _counting_generate(client.generate, meter)
    client.encode = _counting_encode(client.encode, meter)
    client.abort = _counting_abort(client.abort, client.output_processor)


def _counting_generate(generate: Callable[..., AsyncGenerator[Any, None]], meter: Meter) -> Callable[..., Any]:
    async def wrapped(*args: Any, **kwargs: Any) -> AsyncGenerator[Any, None]:
        tally = current.get() or Tally()
        first = True
        meter.began()
        stream = generate(*args, **kwargs)
        try:
            async for output in stream:
                if first:
                    first = False
                    tally.prompt += len(output.prompt_token_ids or ())
                    tally.cached += output.num_cached_tokens or 0
                # The OpenAI handlers ask for deltas when streaming and for one final output otherwise: both add up.
                count = sum(len(item.token_ids) for item in output.outputs)
                tally.completion += count
                meter.produced(count)
                yield output
        finally:
            meter.running -= 1
            await stream.aclose()

    return wrapped


def _counting_encode(encode: Callable[..., AsyncGenerator[Any, None]], meter: Meter) -> Callable[..., Any]:
    async def wrapped(*args: Any, **kwargs: Any) -> AsyncGenerator[Any, None]:
        tally = current.get() or Tally()
        meter.began()
        stream = encode(*args, **kwargs)
        try:
            async for output in stream:
                if output.finished:
                    tally.prompt += len(output.prompt_token_ids or ())
                    tally.cached += getattr(output, "num_cached_tokens", 0) or 0
                meter.produced(1)
                yield output
        finally:
            meter.running -= 1
            await stream.aclose()

    return wrapped


def _counting_abort(abort: Callable[..., Any], processor: Any) -> Callable[..., Any]:
    async def wrapped(request_id: str | Iterable[str], *args: Any, **kwargs: Any) -> None:
        tally = current.get()
        if tally is not None and isinstance(request_id, str):
            parent = processor.parent_requests.get(request_id)
            for one in list(parent.child_requests) if parent else [request_id]:
                state = processor.request_states.get(one)
                if state is None or state.detokenizer is None:
                    continue
                if state.output_kind.name == "FINAL_ONLY":
                    tally.completion += state.detokenizer.num_output_tokens()
                    tally.prompt = max(tally.prompt, state.prompt_len)
                    tally.cached = max(tally.cached, state.num_cached_tokens or 0)
                elif tally.prompt == 0:
                    tally.prompt = state.prompt_len
        await abort(request_id, *args, **kwargs)

    return wrapped

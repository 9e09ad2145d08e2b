"""Tokens are counted at the engine's client, whatever way a request ends. The client here speaks vLLM's protocol."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from enum import Enum
from types import SimpleNamespace
from typing import Any

import pytest

from serve_apps.metering import Meter, Tally, attach, current


class OutputKind(Enum):
    CUMULATIVE = 0
    DELTA = 1
    FINAL_ONLY = 2


class EngineClient:
    """Two tokens per step and choice; like vLLM's it yields deltas, or one final output, and forgets a request at its end."""

    def __init__(self) -> None:
        self.output_processor = SimpleNamespace(request_states={}, parent_requests={})
        self.aborted: list[Any] = []
        self.closed = 0
        self.step = asyncio.Event()

    async def generate(
        self, request_id: str, prompt: list[int], steps: int, kind: OutputKind, choices: int = 1, pause_at: int = -1
    ) -> AsyncGenerator[Any, None]:
        made = 0
        children = [f"{i}_{request_id}" for i in range(choices)] if choices > 1 else [request_id]
        if choices > 1:
            self.output_processor.parent_requests[request_id] = SimpleNamespace(child_requests=set(children))
        for child in children:
            detokenizer = SimpleNamespace(num_output_tokens=lambda: made)
            state = SimpleNamespace(detokenizer=detokenizer, output_kind=kind, prompt_len=len(prompt), num_cached_tokens=1)
            self.output_processor.request_states[child] = state
        try:
            for step in range(steps):
                if step == pause_at:
                    self.step.set()
                    await asyncio.Future()
                await asyncio.sleep(0)
                made += 2
                if kind is OutputKind.DELTA:
                    yield self.output(prompt, 2, choices)
            if kind is OutputKind.FINAL_ONLY:
                yield self.output(prompt, made, choices)
        finally:
            self.closed += 1

    def output(self, prompt: list[int], tokens: int, choices: int) -> Any:
        outputs = [SimpleNamespace(token_ids=[7] * tokens) for _ in range(choices)]
        return SimpleNamespace(prompt_token_ids=prompt, num_cached_tokens=1, outputs=outputs, finished=True)

    async def encode(self, prompt: list[int]) -> AsyncGenerator[Any, None]:
        yield SimpleNamespace(prompt_token_ids=prompt, finished=False, num_cached_tokens=0)
        yield SimpleNamespace(prompt_token_ids=prompt, finished=True, num_cached_tokens=2)

    async def abort(self, request_id: Any, internal: bool = False) -> None:
        self.aborted.append((request_id, internal))
        self.output_processor.request_states.clear()


PROMPT = [1, 2, 3]


def attached() -> tuple[EngineClient, Meter]:
    client, meter = EngineClient(), Meter()
    attach(client, meter)
    return client, meter


async def drain(stream: AsyncGenerator[Any, None]) -> int:
    return len([output async for output in stream])


@pytest.mark.parametrize(("kind", "choices"), [(OutputKind.DELTA, 1), (OutputKind.FINAL_ONLY, 1), (OutputKind.DELTA, 3)])
def test_deltas_and_final_outputs_add_up_the_same(kind, choices):
    async def test() -> None:
        client, meter = attached()
        tally = Tally()
        current.set(tally)
        outputs = await drain(client.generate("r", PROMPT, 5, kind, choices))
        assert outputs == (5 if kind is OutputKind.DELTA else 1)
        assert tally == Tally(prompt=3, completion=10 * choices, cached=1) and tally.line() == f"3 {10 * choices} 1"
        assert meter.tokens == 10 * choices and meter.running == 0 and client.closed == 1

    asyncio.run(test())


def test_encode_counts_the_prompt_once():
    async def test() -> None:
        client, meter = attached()
        tally = Tally()
        current.set(tally)
        assert await drain(client.encode(PROMPT)) == 2
        assert tally == Tally(prompt=3, cached=2) and meter.running == 0

    asyncio.run(test())


@pytest.mark.parametrize(("choices", "kind"), [(1, OutputKind.FINAL_ONLY), (3, OutputKind.FINAL_ONLY), (1, OutputKind.DELTA)])
def test_a_cancelled_request_costs_what_was_made(choices, kind):
    async def test() -> None:
        client, meter = attached()
        tally = Tally()
        current.set(tally)
        task = asyncio.create_task(drain(client.generate("r", PROMPT, 9, kind, choices, pause_at=4)))
        await client.step.wait()
        assert meter.running == 1
        await client.abort("r", internal=False)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert (tally.prompt, tally.completion) == (3, 8 * choices)
        assert client.aborted == [("r", False)] and meter.running == 0 and client.closed == 1

    asyncio.run(test())


def test_a_stream_cancelled_before_its_first_token_costs_its_prompt():
    async def test() -> None:
        client, _ = attached()
        tally = Tally()
        current.set(tally)
        task = asyncio.create_task(drain(client.generate("r", PROMPT, 9, OutputKind.DELTA, 1, pause_at=0)))
        await client.step.wait()
        await client.abort("r")
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert (tally.prompt, tally.completion) == (3, 0)

    asyncio.run(test())


def test_requests_do_not_mix_and_an_unknown_abort_is_harmless():
    async def test() -> None:
        client, meter = attached()

        async def request(steps: int) -> Tally:
            tally = Tally()
            current.set(tally)
            await drain(client.generate(f"r{steps}", PROMPT, steps, OutputKind.DELTA))
            await client.abort("gone")
            await client.abort(["a", "b"])
            return tally

        tallies = await asyncio.gather(*(request(steps) for steps in range(1, 6)))
        assert [tally.completion for tally in tallies] == [2, 4, 6, 8, 10] and meter.tokens == 30

    asyncio.run(test())


def test_what_runs_outside_a_request_counts_for_the_watchdog_only():
    async def test() -> None:
        client, meter = attached()
        await drain(client.generate("r", PROMPT, 2, OutputKind.DELTA))
        assert meter.tokens == 4

    asyncio.run(test())


def test_a_stall_is_running_without_a_token():
    meter = Meter()
    later = time.monotonic() + 100
    assert meter.stalled_for(later) == 0.0, "idle is no stall"
    meter.began()
    assert 99 < meter.stalled_for(later) < 101
    meter.produced(1)
    assert meter.stalled_for(time.monotonic()) < 1.0 and meter.last_token_wall > 0


def test_a_long_idle_time_is_no_stall_for_the_next_request():
    meter = Meter(last_token=time.monotonic() - 1000)
    meter.began()
    assert meter.stalled_for(time.monotonic()) < 1.0

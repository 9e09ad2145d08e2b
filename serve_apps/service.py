"""One model at one gateway: waits for a slot, picks a replica, relays, retries, and counts.

`ModelService.serve` is the whole life of a request after it was let in: admission, replica, relay, and in every case, also
when the client leaves or the engine dies, the settling of tokens. Which requests are let in is `gateway.py`'s business.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from typing import Any

from cluster.config import GatewayConfig, ModelConfig
from cluster.errors import ApiError
from cluster.metrics import GatewayMetrics
from cluster.records import KeyRecord
from serve_apps.admission import Admission
from serve_apps.engine_errors import reshape
from serve_apps.exchange import SSE_HEADERS, Exchange
from serve_apps.relay import EngineGone, Relay, Stream, Whole
from serve_apps.replicas import Endpoint, Replicas
from serve_apps.usage import Tokens
from serve_apps.wire import QUEUED_HEADER

log = logging.getLogger(__name__)
KEEPALIVE = b": waiting for the model\n\n"
PROBE_ID = "tidepool-probe-"


@dataclass(frozen=True)
class Call:
    """What goes to the engine: the route below its URL, the body, the body's fields for a body-aware router, more headers."""

    path: str
    body: bytes
    content_type: str
    fields: dict[str, Any]
    stream: bool
    cost: float
    headers: Mapping[str, str]


@dataclass
class Outcome:
    """How it went; filled in as it goes. `status` is that of an error, else 0; `settled` once that is done or under way;
    `queued_s` is the wait for a slot, `used` the replicas tried."""

    tokens: Tokens = field(default_factory=Tokens)
    ttft_s: float = 0.0
    error: bool = False
    status: int = 0
    settled: bool = False
    queued_s: float = 0.0
    used: list[Endpoint] = field(default_factory=list)


class ModelService:
    """One model's requests at this gateway.

    Args:
        model, gateway: Their configuration.
        replicas: Where the engines are.
        relay: Connections to them.
        share: How many requests of this model may be at its engines from this gateway, now.
        background: Runs a coroutine that outlives its request.
    """

    def __init__(
        self,
        model: ModelConfig,
        gateway: GatewayConfig,
        replicas: Replicas,
        relay: Relay,
        metrics: GatewayMetrics,
        share: Callable[[], int],
        background: Callable[[Coroutine[Any, Any, None]], None],
    ) -> None:
        rules = gateway.admission
        self.model = model
        self.last_token = 0.0
        self._gateway = gateway
        self._hold_s = rules.hold_s
        self._keepalive_s = rules.keepalive_s
        self._replicas = replicas
        self._relay = relay
        self._metrics = metrics
        self._background = background
        self.admission = Admission(model.id, share, rules.max_queued, rules.max_wait_s)

    async def serve(
        self, exchange: Exchange, key: KeyRecord, call: Call, engine_id: str, settle: Callable[[Outcome], None]
    ) -> None:
        """Answer the exchange; `settle` is called once, when the tokens are known.

        Raises:
            ApiError: nothing could be sent, or the stream broke; the caller sends it.
        """
        outcome = Outcome()
        began = time.monotonic()
        used = outcome.used
        entered = 0.0

        async def enter_and_open() -> Whole | Stream:
            nonlocal entered
            await self.admission.enter(key.id, key.priority, call.cost)
            entered = time.monotonic()
            outcome.queued_s = entered - began
            return await self._open(call, engine_id, used)

        try:
            answer = await self._wait(exchange, call, enter_and_open())
            outcome.ttft_s = time.monotonic() - began
            if isinstance(answer, Whole):
                await self._send_whole(exchange, answer, outcome)
            else:
                async with asyncio.timeout(self.model.max_generation_s):
                    await self._send_stream(exchange, answer, outcome)
        except TimeoutError:
            outcome.error, outcome.status = True, 504
            self._left(settle, outcome, used, engine_id)
            text = f"The generation took longer than {self.model.max_generation_s:.0f} s and was stopped."
            raise ApiError(504, text, "generation_timeout") from None
        except asyncio.CancelledError:
            self._metrics.cancelled.labels(self.model.id).inc()
            self._left(settle, outcome, used, engine_id)
            raise
        except ApiError as error:
            outcome.error, outcome.status = True, error.status
            raise
        finally:
            if not outcome.settled:
                self._settle(settle, outcome)
            for endpoint in used:
                self._replicas.release(endpoint)
            if entered:
                self.admission.leave(time.monotonic() - entered)

    async def probe(self, timeout_s: float) -> bool:
        """Have the engine make one token now; whether it did within `timeout_s`."""
        path, fields = _PROBES[self.model.task]
        body = fields.replace(b"MODEL", self.model.id.encode())
        engine_id = PROBE_ID + str(time.monotonic_ns())
        try:
            async with asyncio.timeout(timeout_s):
                endpoint = await self._replicas.pick({})
                self._replicas.release(endpoint)
                answer = await self._relay.send(endpoint, path, body, "application/json", engine_id)
        except (TimeoutError, EngineGone):
            return False
        if isinstance(answer, Whole) and answer.status == 200:
            self.last_token = time.time()
            return True
        return isinstance(answer, Whole) and self.model.task == "transcribe" and answer.status == 400

    async def _wait(self, exchange: Exchange, call: Call, step: Coroutine[Any, Any, Any]) -> Any:
        """Do one step; while it takes long, a stream's client gets SSE comments, so that nothing on the way gives up."""
        if not call.stream:
            return await step
        task = asyncio.ensure_future(step)
        handed_on = False
        try:
            while not (await asyncio.wait({task}, timeout=self._keepalive_s))[0]:
                if not exchange.started:
                    await exchange.start(200, SSE_HEADERS)
                await exchange.write(KEEPALIVE)
            handed_on = True
            return task.result()
        finally:
            if not handed_on:
                task.cancel()
                task.add_done_callback(_discard)

    async def _open(self, call: Call, engine_id: str, used: list[Endpoint]) -> Whole | Stream:
        """Send the call to a replica, and to another while one dies before its first byte."""
        for attempt in range(self._gateway.retries + 1):
            try:
                async with asyncio.timeout(self._hold_s):
                    endpoint = await self._replicas.pick(call.fields)
            except TimeoutError:
                text = f"The model {self.model.id!r} did not start within {self._hold_s:.0f} s. Retry after 10 s."
                raise ApiError(503, text, "model_not_ready", retry_after=10) from None
            used.append(endpoint)
            try:
                async with asyncio.timeout(self.model.max_generation_s):
                    request_id = f"{engine_id}-{attempt}"
                    waiting = self.admission.queued / max(1, self.admission.running)
                    more = {**call.headers, QUEUED_HEADER.decode(): f"{waiting:.3f}"}
                    return await self._relay.send(endpoint, call.path, call.body, call.content_type, request_id, more)
            except EngineGone as error:
                log.warning("engine %s of %s gave no answer (%s), attempt %d", endpoint.id, self.model.id, error, attempt + 1)
                self._replicas.avoid(endpoint)
                self._metrics.retries.labels(self.model.id).inc()
        raise ApiError(503, f"The model {self.model.id!r} failed to answer. Retry after 2 s.", "engine_failed", retry_after=2)

    async def _send_whole(self, exchange: Exchange, answer: Whole, outcome: Outcome) -> None:
        if answer.status in (401, 403):  # it refused the gateway, not the client
            log.error("an engine of %s does not know the cluster's secret", self.model.id)
            text = f"The model {self.model.id!r} cannot be reached. Retry after 2 s."
            raise ApiError(503, text, "engine_failed", retry_after=2)
        if answer.status >= 400:
            raise reshape(answer.status, answer.body)
        outcome.tokens = answer.tokens
        if exchange.started:  # keep-alives were sent to a client that asked for a stream and gets one piece
            await exchange.write(answer.body, more=False)
            return
        await exchange.reply(answer.status, answer.body, answer.content_type)

    async def _send_stream(self, exchange: Exchange, stream: Stream, outcome: Outcome) -> None:
        try:
            if not exchange.started:
                await exchange.start(200, SSE_HEADERS)
            data = stream.first
            while data:
                await exchange.write(data)
                data = await stream.next()
            await exchange.write(b"", more=False)
            outcome.tokens = stream.tokens or Tokens()
        except EngineGone as error:
            log.warning("engine of %s broke off a stream: %s", self.model.id, error)
            outcome.tokens = Tokens(completion=stream.events)
            text = f"The model {self.model.id!r} broke off. Send the request again."
            raise ApiError(502, text, "engine_failed") from error
        finally:
            stream.close()

    def _settle(self, settle: Callable[[Outcome], None], outcome: Outcome) -> None:
        outcome.settled = True
        if outcome.tokens.total:
            self.last_token = time.time()
        settle(outcome)

    def _left(self, settle: Callable[[Outcome], None], outcome: Outcome, used: list[Endpoint], engine_id: str) -> None:
        """The request was broken off from our side: ask the engine what it had used, after the request is gone."""

        async def ask() -> None:
            if used:
                outcome.tokens = await self._relay.cancelled_tokens(used[-1], f"{engine_id}-{len(used) - 1}")
            self._settle(settle, outcome)

        outcome.settled = True
        self._background(ask())


def _discard(task: asyncio.Future[Whole | Stream]) -> None:
    """Nobody waits for this answer any more: let go of its connection, so that the engine stops."""
    if not task.cancelled() and task.exception() is None:
        answer = task.result()
        if isinstance(answer, Stream):
            answer.close()


_PROBES = {
    "generate": ("/v1/completions", b'{"model": "MODEL", "prompt": "a", "max_tokens": 1}'),
    "embed": ("/v1/embeddings", b'{"model": "MODEL", "input": "a"}'),
    "score": ("/v1/score", b'{"model": "MODEL", "text_1": "a", "text_2": "b"}'),
    # A transcription needs audio; an engine that refuses an empty form is an engine that answers.
    "transcribe": ("/v1/audio/transcriptions", b""),
}

"""A fake engine that speaks vLLM's protocol and costs almost nothing, so that what is measured is what stands before it.

It answers `/v1/chat/completions` and `/v1/completions`, streaming or not, with the chunks and errors vLLM sends, and `/health`,
`/v1/models`, `/metrics` (running requests). Time to the first token and tokens per second of each stream are flags. With
stamps on, every token's text is the send time, so a reader on the same machine knows how long each chunk was under way. It
has no tokenizer (a word is a token), no logprobs, no tools and one choice per request. `python -m bench fake` runs it.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import resource
import sys
import time
from dataclasses import dataclass
from typing import Any

from aiohttp import web


@dataclass(frozen=True)
class FakePlan:
    """How the engine behaves.

    Args:
        model: Its served name.
        rate: Tokens per second of each stream; 0 sends as fast as it can.
        ttft_s: Seconds from request to first token.
        tokens: Output tokens when the request sets no limit.
        stamps: Each token's text is ` t=<time.monotonic()>` instead of a word.
        lockstep: Tokens of all streams leave together, once per 1/rate seconds, as an engine's batches do.
    """

    model: str = "fake"
    rate: float = 20.0
    ttft_s: float = 0.05
    tokens: int = 64
    stamps: bool = False
    lockstep: bool = False


class Refused(Exception):
    """A request vLLM would answer with an error: status, message, type and field."""

    def __init__(self, status: int, message: str, kind: str = "BadRequestError", param: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.kind = kind
        self.param = param


class FakeEngine:
    """State of one fake engine: its plan, a request counter and the running count."""

    def __init__(self, plan: FakePlan) -> None:
        self.plan = plan
        self.running = 0
        self.aborted = 0
        self._number = itertools.count(1)

    def app(self) -> web.Application:
        """The HTTP application."""
        app = web.Application(client_max_size=64 << 20)
        app.router.add_get("/health", self.health)
        app.router.add_get("/v1/models", self.models)
        app.router.add_get("/metrics", self.metrics)
        app.router.add_post("/v1/chat/completions", self.generate)
        app.router.add_post("/v1/completions", self.generate)
        return app

    async def health(self, _request: web.Request) -> web.Response:
        """200 and nothing."""
        return web.Response()

    async def models(self, _request: web.Request) -> web.Response:
        """The one model."""
        card = {
            "id": self.plan.model,
            "object": "model",
            "created": int(time.time()),
            "owned_by": "vllm",
            "root": self.plan.model,
        }
        return web.json_response({"object": "list", "data": [card]})

    async def metrics(self, _request: web.Request) -> web.Response:
        """vLLM's running-requests gauge, and how many clients left early."""
        label = f'{{model_name="{self.plan.model}"}}'
        text = f"vllm:num_requests_running{label} {self.running}\nfake:requests_aborted{label} {self.aborted}\n"
        return web.Response(text=text)

    async def generate(self, request: web.Request) -> web.StreamResponse:
        """Either kind of completion."""
        chat = request.path.endswith("/chat/completions")
        try:
            body = _parse(await request.read(), chat, self.plan.model)
        except Refused as refused:
            error = {"message": str(refused), "type": refused.kind, "param": refused.param, "code": refused.status}
            return web.json_response({"error": error}, status=refused.status)
        limit = body.get("max_completion_tokens") or body.get("max_tokens")
        count = int(limit) if limit is not None else self.plan.tokens
        reply = _Reply(chat, f"{'chatcmpl' if chat else 'cmpl'}-{next(self._number):016x}", int(time.time()), self.plan.model)
        prompt_tokens = len(json.dumps(body["messages"] if chat else body["prompt"]).split())
        self.running += 1
        try:
            if body.get("stream"):
                return await self._stream(request, reply, count, prompt_tokens, bool(_usage_wanted(body)))
            await asyncio.sleep(self.plan.ttft_s + (count - 1) / self.plan.rate if self.plan.rate else self.plan.ttft_s)
            return web.json_response(reply.whole(" word" * count, _usage(prompt_tokens, count)))
        finally:
            self.running -= 1

    async def _stream(
        self, request: web.Request, reply: _Reply, count: int, prompt_tokens: int, usage: bool
    ) -> web.StreamResponse:
        """Send the chunks at their times. The token chunks go to the transport as ready HTTP frames: this is the hot path."""
        start = time.monotonic()
        response = web.StreamResponse(headers={"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-cache"})
        response.enable_chunked_encoding()
        await response.prepare(request)
        plan, transport = self.plan, request.transport
        for index in range(count):
            due = start + plan.ttft_s + (index / plan.rate if plan.rate else 0.0)
            if plan.lockstep and plan.rate:
                due = -int(-due * plan.rate // 1) / plan.rate
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            if transport is None or transport.is_closing():
                self.aborted += 1
                return response
            text = f" t={time.monotonic():.6f}" if plan.stamps else " word"
            if index == 0:
                await response.write((reply.opening() if reply.chat else b"") + reply.token(text, index == count - 1))
            else:
                data = reply.token(text, index == count - 1)
                transport.write(b"%x\r\n%b\r\n" % (len(data), data))
        closing = (reply.usage(_usage(prompt_tokens, count)) if usage else b"") + b"data: [DONE]\n\n"
        await response.write(closing)
        await response.write_eof()
        return response


class _Reply:
    """The chunks of one answer; what does not change between tokens is rendered once."""

    def __init__(self, chat: bool, name: str, created: int, model: str) -> None:
        self.chat = chat
        kind = "chat.completion.chunk" if chat else "text_completion"
        self._base = {"id": name, "object": kind, "created": created, "model": model}
        head = f"data: {_compact(self._base)[:-1]}"
        if chat:
            self._before = f'{head},"choices":[{{"index":0,"delta":{{"content":"'
            self._after = '"},"logprobs":null,"finish_reason":null,"token_ids":null}]}\n\n'
            self._last = '"},"logprobs":null,"finish_reason":"length","stop_reason":null,"token_ids":null}]}\n\n'
        else:
            self._before = f'{head},"choices":[{{"index":0,"text":"'
            self._after = '","logprobs":null,"finish_reason":null,"stop_reason":null}]}\n\n'
            self._last = '","logprobs":null,"finish_reason":"length","stop_reason":null}]}\n\n'

    def opening(self) -> bytes:
        """The chat chunk with the role, before the first token."""
        choice = {"index": 0, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
        return _event(self._base | {"choices": [choice]})

    def token(self, text: str, last: bool) -> bytes:
        """One token's chunk; `text` needs no JSON escapes."""
        return (self._before + text + (self._last if last else self._after)).encode()

    def usage(self, usage: dict[str, int]) -> bytes:
        """The chunk with the counts and no choice."""
        return _event(self._base | {"choices": [], "usage": usage})

    def whole(self, text: str, usage: dict[str, int]) -> dict[str, Any]:
        """The answer of a request that does not stream."""
        choice: dict[str, Any] = {"index": 0, "logprobs": None, "finish_reason": "length", "stop_reason": None}
        choice |= {"message": {"role": "assistant", "content": text}} if self.chat else {"text": text}
        kind = "chat.completion" if self.chat else "text_completion"
        return self._base | {"object": kind, "choices": [choice], "usage": usage}


def _parse(raw: bytes, chat: bool, model: str) -> dict[str, Any]:
    """The body, checked as far as vLLM would."""
    try:
        body = json.loads(raw)
    except ValueError as error:
        raise Refused(400, f"1 validation error:\n  JSON decode error: {error}", "Bad Request", "body") from error
    if not isinstance(body, dict):
        raise Refused(400, "the body must be an object", "Bad Request", "body")
    if body.get("model") not in (None, model):
        raise Refused(404, f"The model `{body['model']}` does not exist.", "NotFoundError", "model")
    field, kinds = ("messages", list) if chat else ("prompt", (str, list))
    if not isinstance(body.get(field), kinds):
        raise Refused(400, f"{field}: missing or of the wrong type", param=field)
    for name in ("max_tokens", "max_completion_tokens"):
        value = body.get(name)
        if value is not None and (not isinstance(value, int) or value < 1):
            raise Refused(400, f"{name} must be at least 1, got {value}. (parameter={name}, value={value})", param=name)
    if body.get("n") not in (None, 1):
        raise Refused(400, "the fake engine gives one choice per request", param="n")
    return body


def _usage_wanted(body: dict[str, Any]) -> Any:
    return (body.get("stream_options") or {}).get("include_usage")


def _usage(prompt: int, completion: int) -> dict[str, int]:
    return {"prompt_tokens": prompt, "total_tokens": prompt + completion, "completion_tokens": completion}


def _compact(value: dict[str, Any]) -> str:
    return json.dumps(value, separators=(",", ":"))


def _event(value: dict[str, Any]) -> bytes:
    return f"data: {_compact(value)}\n\n".encode()


def serve(plan: FakePlan, port: int, host: str = "127.0.0.1") -> None:
    """Run until a signal; prints `ready <address>` on stderr when it listens."""
    import uvloop

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(max(soft, 16384), hard), hard))

    async def main() -> None:
        runner = web.AppRunner(FakeEngine(plan).app(), access_log=None, keepalive_timeout=600)
        await runner.setup()
        await web.TCPSite(runner, host, port, backlog=4096).start()
        print(f"ready http://{host}:{port}/v1", file=sys.stderr, flush=True)
        await asyncio.Event().wait()

    try:
        uvloop.run(main())
    except KeyboardInterrupt:
        return

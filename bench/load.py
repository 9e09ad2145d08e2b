"""The load generator: N concurrent streams in a closed loop, in a process of its own so that its CPU is counted apart.

Every stream takes the next prompt as soon as its last answer has ended, until `requests` are done. A stream that does not
answer 200, breaks off, lacks `[DONE]` or counts another number of tokens than asked for is a failure; it is never retried
and its times are not used. The work per chunk is one regular expression; JSON is read once per stream, for the usage.
`python -m bench load` prints one JSON line (`Round.as_dict`). Called by `suites` and `fake_suite`.
"""

from __future__ import annotations

import asyncio
import json
import resource
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

import aiohttp

from bench.prompts import prompt
from bench.sse import DONE, SseReader, has_token, sent_at
from bench.stats import percentile
from cluster import tls


@dataclass(frozen=True)
class LoadPlan:
    """One round of load.

    Args:
        url: Base address with `/v1`, such as `http://127.0.0.1:8000/v1`.
        key: Bearer key; empty sends none.
        model: The name to put in `model`.
        streams: Requests in flight.
        requests: Requests in the round.
        max_tokens: Output tokens per request; the engine is told to ignore the end token, so it is exact.
        seed: Prompts of different seeds share no prefix.
        words: Words per prompt; see `prompts.words_for`.
        api: `chat` or `completions`.
        ramp_s: The first requests start spread over this many seconds; 0 starts them together.
        timeout_s: A request that takes longer is a failure.
        stamps: The text carries send times (fake engine), so the delay of each chunk is measured.
        certificate: The file to know an https server by.
    """

    url: str
    key: str
    model: str
    streams: int
    requests: int
    max_tokens: int = 64
    seed: int = 0
    words: int = 24
    api: str = "chat"
    ramp_s: float = 0.0
    timeout_s: float = 300.0
    stamps: bool = False
    certificate: str | None = None


@dataclass
class Stream:
    """What one request measured; times are `time.monotonic()` seconds."""

    start: float
    status: int = 0
    chunks: list[float] = field(default_factory=list)
    delays: list[float] = field(default_factory=list)
    end: float = 0.0
    done: bool = False
    usage: dict[str, Any] | None = None
    failure: str | None = None


def request_body(plan: LoadPlan, index: int) -> dict[str, Any]:
    """The JSON body of the index-th request."""
    text = prompt(plan.seed, index, plan.words)
    body: dict[str, Any] = {
        "model": plan.model,
        "stream": True,
        "stream_options": {"include_usage": True},
        "max_tokens": plan.max_tokens,
        "ignore_eos": True,
        "temperature": 1,  # greedy, an untrained model can repeat half a character for ever and never send a word
        "skip_special_tokens": False,  # a small model may babble special tokens: each must still be a visible chunk
    }
    if plan.api == "chat":
        return body | {"messages": [{"role": "user", "content": text}]}
    return body | {"prompt": text}


async def read_stream(response: aiohttp.ClientResponse, stream: Stream, stamps: bool) -> None:
    """Read a response to its end; fills `stream`."""
    reader = SseReader()
    usage: bytes | None = None
    while data := await response.content.readany():
        now = time.monotonic()
        for payload in reader.feed(data):
            if has_token(payload):
                stream.chunks.append(now)
                if stamps and (sent := sent_at(payload)) is not None:
                    stream.delays.append(now - sent)
            elif payload == DONE:
                stream.done = True
            if b'"usage"' in payload:
                usage = payload
    if usage is not None:
        found = json.loads(usage).get("usage")
        stream.usage = found if isinstance(found, dict) else None


def judge(stream: Stream, max_tokens: int) -> str | None:
    """Why a finished stream is a failure, or None."""
    if not stream.done:
        return "no [DONE]"
    if stream.usage is None:
        return "no usage"
    if stream.usage.get("completion_tokens") != max_tokens:
        return f"{stream.usage.get('completion_tokens')} tokens instead of {max_tokens}"
    if not stream.chunks:
        return "no text"
    return None


async def one(session: aiohttp.ClientSession, plan: LoadPlan, index: int) -> Stream:
    """Send one request and read its answer; failures are recorded, not raised."""
    body = json.dumps(request_body(plan, index)).encode()
    path = "/chat/completions" if plan.api == "chat" else "/completions"
    stream = Stream(start=time.monotonic())
    try:
        async with session.post(plan.url + path, data=body) as response:
            stream.status = response.status
            if response.status != 200:
                text = (await response.content.read(300)).decode("utf-8", "replace")
                stream.failure = f"status {response.status}: {text}"
            else:
                await read_stream(response, stream, plan.stamps)
                stream.failure = judge(stream, plan.max_tokens)
    except (aiohttp.ClientError, OSError, ValueError) as error:  # a timeout is an OSError
        stream.failure = f"{type(error).__name__}: {error}"
    stream.end = time.monotonic()
    return stream


async def drive(plan: LoadPlan) -> dict[str, Any]:
    """Run the round and summarise it."""
    headers = {"content-type": "application/json"}
    if plan.key:
        headers["authorization"] = f"Bearer {plan.key}"
    left = iter(range(plan.requests))
    streams: list[Stream] = []

    async def worker(number: int, session: aiohttp.ClientSession) -> None:
        if plan.ramp_s:
            await asyncio.sleep(plan.ramp_s * number / plan.streams)
        for index in left:
            streams.append(await one(session, plan, index))  # noqa: PERF401 - a closed loop, one after the other

    trust = True if plan.certificate is None else tls.trust(plan.certificate)
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=60, ssl=trust)
    timeout = aiohttp.ClientTimeout(total=plan.timeout_s)
    cpu = time.process_time()
    async with aiohttp.ClientSession(connector=connector, timeout=timeout, headers=headers) as session:
        await asyncio.gather(*(worker(number, session) for number in range(min(plan.streams, plan.requests))))
    return summarise(plan, streams, time.process_time() - cpu)


def summarise(plan: LoadPlan, streams: list[Stream], cpu_s: float) -> dict[str, Any]:
    """The JSON line of a round: counts, rates per second, times in milliseconds."""
    good = [stream for stream in streams if stream.failure is None]
    wall = max(stream.end for stream in streams) - min(stream.start for stream in streams)
    tokens = sum(stream.usage["completion_tokens"] for stream in good if stream.usage)
    first = [1000 * (stream.chunks[0] - stream.start) for stream in good]
    gaps = [1000 * (b - a) for stream in good for a, b in zip(stream.chunks, stream.chunks[1:], strict=False)]
    delays = [1000 * delay for stream in good for delay in stream.delays]
    times = {"ttft_ms": first, "gap_ms": gaps, "latency_ms": [1000 * (s.end - s.start) for s in good]}
    if plan.stamps:
        times["delay_ms"] = delays
    return {
        "plan": {name: value for name, value in asdict(plan).items() if name != "key"},
        "wall_s": wall,
        "requests": len(streams),
        "failures": len(streams) - len(good),
        "failure_reasons": dict(Counter((stream.failure or "")[:200] for stream in streams if stream.failure).most_common(5)),
        "status": dict(Counter(str(stream.status) for stream in streams)),
        "output_tokens": tokens,
        "prompt_tokens": sum(stream.usage.get("prompt_tokens", 0) for stream in good if stream.usage),
        "chunks": sum(len(stream.chunks) for stream in good),
        "tok_per_s": tokens / wall if wall > 0 else None,
        "req_per_s": len(good) / wall if wall > 0 else None,
        "load_cpu_s": cpu_s,
        **{f"{name}_p{q}": percentile(values, q) for name, values in times.items() for q in (50, 99)},
    }


def run(plan: LoadPlan) -> dict[str, Any]:
    """The whole round, on uvloop, with enough file descriptors for its streams."""
    import uvloop

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = plan.streams + 256
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(wanted, hard), hard))
    result: dict[str, Any] = uvloop.run(drive(plan))
    return result

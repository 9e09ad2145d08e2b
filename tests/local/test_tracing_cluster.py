"""One request's trace, from a client's span over the gateway's to vLLM's, as a collector gets it from the shared cluster.

That cluster traces nothing by itself (`tracing.sample=0`): only requests whose client says so.
"""

from __future__ import annotations

import json
import secrets

import pytest
from client import CHAT, chat, request
from collector import Seen, collector
from conftest import TRACES_PORT, Endpoint

PROMPT = "a very private question about marmalade"


def trace_of(endpoint: Endpoint, stream: bool, sampled: bool = True) -> tuple[str, str, dict[str, int]]:
    """Ask with a span of our own as the parent: trace id, its span id, and the usage that the client is told."""
    trace, parent = secrets.token_hex(16), secrets.token_hex(8)
    headers = [("traceparent", f"00-{trace}-{parent}-{'01' if sampled else '00'}")]
    more = {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
    answer = chat(endpoint.root, endpoint.api_key, PROMPT, headers, max_tokens=7, ignore_eos=True, **more)
    assert answer.status == 200, answer
    if not stream:
        return trace, parent, answer.data["usage"]
    events = [line.removeprefix(b"data: ") for line in answer.body.split(b"\n") if line.startswith(b"data: {")]
    return trace, parent, json.loads(events[-1])["usage"]


def test_a_request_from_the_client_to_the_engine(endpoint: Endpoint) -> None:
    with collector(TRACES_PORT) as told:
        asked = [trace_of(endpoint, stream) for stream in (False, True)]
        unsampled = trace_of(endpoint, stream=False, sampled=False)[0]
        request(endpoint.root, "GET", "/readyz")
        wanted = {(trace, name) for trace, _, _ in asked for name in ("tidepool-gateway", "tidepool-engine")}
        spans = told.wait(lambda spans: wanted <= {(span.trace, span.service) for span in spans})
    for trace, parent, usage in asked:
        gateway, engine = (pick(spans, trace, service) for service in ("tidepool-gateway", "tidepool-engine"))
        assert (gateway.parent, engine.parent) == (parent, gateway.id)
        said = gateway.attributes
        assert gateway.name == "POST /v1/chat/completions" and said["http.response.status_code"] == 200
        assert said["gen_ai.request.model"] == CHAT and said["tidepool.replica"] and said["tidepool.queue_s"] >= 0
        tokens = (usage["prompt_tokens"], usage["completion_tokens"])
        assert (said["gen_ai.usage.input_tokens"], said["gen_ai.usage.output_tokens"]) == tokens
        in_engine = engine.attributes
        assert (in_engine["gen_ai.usage.prompt_tokens"], in_engine["gen_ai.usage.completion_tokens"]) == tokens
        assert gateway.start <= engine.start <= gateway.events["first byte"] + 1_000_000 <= gateway.end + 1_000_000
    assert not [span for span in spans if span.trace == unsampled]
    for span in spans:
        assert b"marmalade" not in span.raw and endpoint.api_key.encode() not in span.raw


def pick(spans: list[Seen], trace: str, service: str) -> Seen:
    (span,) = [span for span in spans if (span.trace, span.service) == (trace, service)]
    return span


def test_requests_are_answered_while_the_collector_is_away(endpoint: Endpoint) -> None:
    with pytest.raises(OSError, match="refused"):
        request(f"http://127.0.0.1:{TRACES_PORT}", "GET", "/")
    for _ in range(3):
        trace_of(endpoint, stream=False)

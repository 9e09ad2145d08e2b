"""Spans of the gateway: what is in them, whose child they are, when there are none, and what a dead collector costs."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest
from collector import collector

from cluster.config import TracingConfig, parse
from cluster.errors import ApiError, ConfigError
from cluster.preflight import free_port
from serve_apps.app import serve_config
from serve_apps.exchange import ClientGone, Exchange
from serve_apps.replicas import Endpoint
from serve_apps.service import Outcome
from serve_apps.tracing import CLOSE_S, Tracer, for_engine, tracer
from serve_apps.usage import Tokens

CLIENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331"
URL = "http://collector:4318/v1/traces"
MODEL = {"id": "m", "device": "cpu"}


@pytest.fixture
def told():
    with collector() as made:
        yield made


def exchange(path: str = "/v1/chat/completions", **headers: str) -> Exchange:
    pairs = [(name.encode(), value.encode()) for name, value in headers.items()]

    async def nothing(*_args):
        raise AssertionError("nothing is received or sent here")

    return Exchange({"method": "POST", "path": path, "headers": pairs}, nothing, nothing, False)


def outcome(**changes) -> Outcome:
    used = [Endpoint("first", "http://a"), Endpoint("second", "http://b")]
    return Outcome(tokens=Tokens(7, 5, 2), ttft_s=0.25, queued_s=0.125, used=used, **changes)


def test_an_answered_request_is_one_span_below_the_clients(told):
    traces = Tracer(TracingConfig(endpoint=told.url))
    asked = exchange(traceparent=f"{CLIENT}-01", tracestate="vendor=1")
    with traces.request(asked) as trace:
        headers = trace.serving("alias", "m", True)
        asked.started, asked.status = True, 200
        trace.settle(outcome())
    traces.close()
    (span,) = told.spans
    assert (span.service, span.name, span.kind, span.status) == ("tidepool-gateway", "POST /v1/chat/completions", 2, 0)
    assert (span.trace, span.parent) == tuple(CLIENT.split("-")[1:])
    assert headers == {"traceparent": f"00-{span.trace}-{span.id}-01", "tracestate": "vendor=1"}
    assert span.attributes == {
        "http.request.method": "POST",
        "http.route": "/v1/chat/completions",
        "http.response.status_code": 200,
        "gen_ai.operation.name": "chat",
        "gen_ai.request.model": "alias",
        "gen_ai.response.model": "m",
        "gen_ai.request.stream": True,
        "gen_ai.usage.input_tokens": 7,
        "gen_ai.usage.output_tokens": 5,
        "gen_ai.usage.cache_read.input_tokens": 2,
        "gen_ai.response.time_to_first_chunk": 0.25,
        "tidepool.request_id": asked.request_id,
        "tidepool.queue_s": 0.125,
        "tidepool.attempts": 2,
        "tidepool.replica": "second",
    }
    assert span.start <= span.events["first byte"] - 250_000_000 <= span.end


def test_a_request_without_a_parent_begins_a_trace(told):
    traces = Tracer(TracingConfig(endpoint=told.url))
    for given in ({}, {"traceparent": "00-zz-bad-01"}, {"tracestate": "vendor=1"}):
        with traces.request(exchange("/v1/score", **given)) as trace:
            assert int(trace.serving("m", "m", False)["traceparent"][-2:], 16) & 1
            trace.settle(Outcome())
    traces.close()
    assert [span.parent for span in told.spans] == ["", "", ""] and len({span.trace for span in told.spans}) == 3
    assert "gen_ai.operation.name" not in told.spans[0].attributes and "tidepool.replica" not in told.spans[0].attributes


@pytest.mark.parametrize(
    ("error", "status", "code", "red"),
    [
        (ApiError(429, "slow down", "rate_limit_exceeded"), 429, "rate_limit_exceeded", False),
        (ApiError(503, "busy", "model_overloaded"), 503, "model_overloaded", True),
        (ValueError("a bug"), 500, "internal_error", True),
    ],
)
def test_a_failure_says_its_code_and_not_its_words(told, error, status, code, red):
    traces = Tracer(TracingConfig(endpoint=told.url))
    with pytest.raises(type(error)), traces.request(exchange()):
        raise error
    traces.close()
    (span,) = told.spans
    assert (span.attributes["http.response.status_code"], span.attributes["error.type"]) == (status, code)
    assert span.status == (2 if red else 0) and not span.events and str(error).encode() not in span.raw


def test_a_stream_that_broke_was_a_200_and_is_an_error(told):
    traces = Tracer(TracingConfig(endpoint=told.url))
    asked = exchange()
    with pytest.raises(ApiError), traces.request(asked):
        asked.started, asked.status = True, 200
        raise ApiError(502, "broke off", "engine_failed")
    traces.close()
    (span,) = told.spans
    assert (span.attributes["http.response.status_code"], span.attributes["error.type"], span.status) == (200, "engine_failed", 2)


def test_a_stranger_makes_no_span(told):
    traces = Tracer(TracingConfig(endpoint=told.url))
    with pytest.raises(ApiError), traces.request(exchange()):
        raise ApiError(401, "who are you", "invalid_api_key")
    traces.close()
    assert told.spans == []


def test_a_client_that_left_is_one_span_that_waits_for_its_tokens(told):
    traces = Tracer(TracingConfig(endpoint=told.url))
    with pytest.raises(ClientGone), traces.request(exchange()) as trace:
        trace.serving("m", "m", True)
        raise ClientGone
    left = time.time_ns()
    trace.settle(outcome())
    traces.close()
    (span,) = told.spans
    assert span.attributes["http.response.status_code"] == 499 and span.attributes["gen_ai.usage.output_tokens"] == 5
    assert span.end <= left


def test_what_is_not_sampled_sends_nothing_to_the_engine_either(told):
    traces = Tracer(TracingConfig(endpoint=told.url, sample=0.0))
    wanted = {"": False, f"{CLIENT}-00": False, f"{CLIENT}-01": True}
    for given, sampled in wanted.items():
        with traces.request(exchange(**{"traceparent": given} if given else {})) as trace:
            assert bool(trace.serving("m", "m", False)) == sampled, given
            trace.settle(outcome())
    traces.close()
    assert len(told.spans) == 1


def test_a_dead_collector_costs_dropped_spans_and_nothing_else():
    traces = Tracer(TracingConfig(endpoint=f"http://127.0.0.1:{free_port()}/v1/traces", max_queued=50))
    began = time.monotonic()
    for _ in range(2000):
        with traces.request(exchange()) as trace:
            trace.serving("m", "m", False)
            trace.settle(outcome())
    assert time.monotonic() - began < 2.0
    began = time.monotonic()
    traces.close()
    assert time.monotonic() - began < CLOSE_S + 1.0


def test_engines_are_told_and_may_be_told_otherwise():
    config = parse({"tracing": {"endpoint": URL}, "models": [MODEL, {**MODEL, "id": "o", "env": {"OTEL_SERVICE_NAME": "mine"}}]})
    first, second = (for_engine(model, config.tracing) for model in config.models)
    assert first.engine_kwargs == {"otlp_traces_endpoint": URL}
    assert first.env["OTEL_EXPORTER_OTLP_TRACES_PROTOCOL"] == "http/protobuf" and second.env["OTEL_SERVICE_NAME"] == "mine"
    gateway, engine, _ = serve_config(config)["applications"]
    assert gateway["args"]["tracing"] == {"endpoint": URL}
    assert engine["args"]["model"]["engine_kwargs"] == {"otlp_traces_endpoint": URL}


def test_without_an_endpoint_nothing_is_changed_or_imported():
    config = parse({"models": [MODEL]})
    assert tracer(config.tracing) is None and for_engine(config.models[0], config.tracing) is config.models[0]
    assert serve_config(config)["applications"][0]["args"]["tracing"] == {}
    code = "import sys, serve_apps.alone; sys.exit(any(name.startswith('opentelemetry') for name in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize(
    ("section", "says"),
    [
        ({"endpoint": "collector:4318"}, "tracing.endpoint: write the whole URL"),
        ({"endpoint": "http://collector:4318"}, "tracing.endpoint: write the whole URL"),
        ({"endpoint": "http://me:hunter2@collector/v1/traces"}, "tracing.endpoint: keep secrets out of it"),
        ({"sample": 2}, "tracing.sample: "),
    ],
)
def test_mistakes_are_named_and_no_secret_repeated(section, says):
    with pytest.raises(ConfigError) as caught:
        parse({"tracing": section, "models": [MODEL]})
    assert says in str(caught.value) and "hunter2" not in str(caught.value)


def test_vllm_cannot_trace_without_its_figures():
    with pytest.raises(ConfigError, match=r"models\.0\.engine_kwargs\.disable_log_stats"):
        parse({"tracing": {"endpoint": URL}, "models": [{**MODEL, "engine_kwargs": {"disable_log_stats": True}}]})

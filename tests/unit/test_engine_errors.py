"""Whatever an engine answers, a client sees one shape, and nothing of it is logged."""

from __future__ import annotations

import json

import pytest

from serve_apps.engine_errors import reshape


@pytest.mark.parametrize(
    ("status", "body", "expected"),
    [
        (  # vLLM
            400,
            b'{"error":{"message":"temperature must be non-negative","type":"BadRequestError","param":"temperature","code":400}}',
            (400, "temperature must be non-negative", "invalid_request_error", "temperature", "invalid_value"),
        ),
        (404, b'{"error":{"message":"no adapter","type":"NotFoundError","param":null,"code":404}}',
         (404, "no adapter", "not_found_error", None, "not_found")),
        (  # older vLLM
            400, b'{"object":"error","message":"bad","type":"BadRequestError","param":null,"code":400}',
            (400, "bad", "invalid_request_error", None, "invalid_value")),
        (404, b'{"detail":"Not Found"}', (404, "Not Found", "not_found_error", None, "not_found")),  # FastAPI
        (
            422,
            b'{"detail":[{"loc":["body","n"],"msg":"not an int","input":"x"},{"loc":["body"],"msg":"missing"}]}',
            (400, "body.n: not an int; body: missing", "invalid_request_error", None, "invalid_value"),
        ),
        (422, b'{"detail":["odd",{"loc":7}]}', (400, "odd; : ", "invalid_request_error", None, "invalid_value")),
        (  # Anthropic
            400,
            b'{"type":"error","error":{"type":"invalid_request_error","message":"max_tokens: required"}}',
            (400, "max_tokens: required", "invalid_request_error", None, "invalid_value"),
        ),
        (500, b"Internal Server Error", (500, "Internal Server Error", "server_error", None, "engine_error")),
        (501, b'{"error":"no such task"}', (501, "no such task", "server_error", None, "not_supported")),
        (400, b"[1, 2]", (400, "[1, 2]", "invalid_request_error", None, "invalid_value")),
        (400, b'{"error":{"message":null,"param":5}}',
         (400, "The engine answered with status 400.", "invalid_request_error", None, "invalid_value")),
        (500, b"", (500, "The engine answered with status 500.", "server_error", None, "engine_error")),
        (500, b"\xff\xfe\x00", (500, "\ufffd\ufffd\x00", "server_error", None, "engine_error")),
        (400, b'{"error":{"message":"This model\'s maximum context length is 2048 tokens"}}',
         (400, "This model's maximum context length is 2048 tokens", "invalid_request_error", None, "context_length_exceeded")),
    ],
)  # fmt: skip
def test_one_shape(status, body, expected):
    error = reshape(status, body)
    shown = json.loads(error.body())
    assert list(shown) == ["error"] and set(shown["error"]) == {"message", "type", "param", "code"}
    assert (error.status, *(shown["error"][name] for name in ("message", "type", "param", "code"))) == expected


def test_a_message_is_cut_and_nested_nonsense_is_no_crash():
    assert len(reshape(400, json.dumps({"error": {"message": "x" * 10**6}}).encode()).message) == 2000
    assert len(reshape(500, b"x" * 10**6).message) == 500
    assert reshape(400, b"[" * 100_000).status == 400


def test_what_the_client_sent_goes_back_to_it_and_into_no_log(caplog):
    caplog.set_level(0)
    message = "1 validation error: {'type': 'list_type', 'input': 'my secret prompt'}"
    assert reshape(400, json.dumps({"error": {"message": message, "param": None, "code": 400}}).encode()).message == message
    assert not caplog.records

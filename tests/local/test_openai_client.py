"""The stock `openai` client against the real endpoint, unchanged: what a user's program does, works."""

from __future__ import annotations

import json
import os
import stat
import urllib.request
from typing import Any

import openai
import pytest
from conftest import Endpoint

CHAT = "tidepool-chat"
EMBED = "tidepool-embed"
HELLO: list[Any] = [{"role": "user", "content": "Where is my order 1234?"}]


@pytest.fixture(scope="module")
def client(endpoint: Endpoint) -> openai.OpenAI:
    return openai.OpenAI(base_url=endpoint.base_url, api_key=endpoint.api_key, max_retries=0, timeout=240)


def test_chat(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model=CHAT, messages=HELLO, max_tokens=8, temperature=0)
    assert answer.model == CHAT
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.content
    assert answer.usage is not None and answer.usage.completion_tokens == 8


def test_alias_and_the_model_that_answers(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="default", messages=HELLO, max_tokens=2)
    assert answer.model == CHAT


def test_streaming_with_usage(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model=CHAT, messages=HELLO, max_tokens=12, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens == 12
    assert chunks[-1].choices == []
    assert sum(1 for chunk in chunks if chunk.choices and chunk.choices[0].delta.content) >= 2
    assert [c.choices[0].finish_reason for c in chunks if c.choices and c.choices[0].finish_reason] == ["length"]


def test_streaming_without_usage_has_none(client: openai.OpenAI) -> None:
    chunks = list(client.chat.completions.create(model=CHAT, messages=HELLO, max_tokens=4, stream=True))
    assert all(chunk.usage is None for chunk in chunks)
    assert all(chunk.choices for chunk in chunks)


def test_completions_n_stop_and_logprobs(client: openai.OpenAI) -> None:
    plain = client.completions.create(model=CHAT, prompt="Once", max_tokens=6, temperature=0)
    assert plain.choices[0].text
    two = client.chat.completions.create(model=CHAT, messages=HELLO, max_tokens=6, n=2, seed=1)
    assert [choice.index for choice in two.choices] == [0, 1]
    assert two.usage is not None and two.usage.completion_tokens == 12
    stopping = plain.choices[0].text[1:3]
    stopped = client.completions.create(model=CHAT, prompt="Once", max_tokens=6, temperature=0, stop=[stopping])
    assert stopped.choices[0].finish_reason == "stop"
    assert stopping not in stopped.choices[0].text
    scored = client.chat.completions.create(model=CHAT, messages=HELLO, max_tokens=3, logprobs=True, top_logprobs=2)
    assert scored.choices[0].logprobs is not None and scored.choices[0].logprobs.content is not None
    assert len(scored.choices[0].logprobs.content) == 3
    assert len(scored.choices[0].logprobs.content[0].top_logprobs) == 2


def test_tools(client: openai.OpenAI) -> None:
    tool: Any = {
        "type": "function",
        "function": {
            "name": "find_order",
            "description": "Look up an order.",
            "parameters": {
                "type": "object",
                "properties": {"status": {"type": "string", "enum": ["open", "closed"]}},
                "required": ["status"],
                "additionalProperties": False,
            },
        },
    }
    named: Any = {"type": "function", "function": {"name": "find_order"}}
    answer = client.chat.completions.create(model=CHAT, messages=HELLO, tools=[tool], tool_choice=named, max_tokens=100)
    calls = answer.choices[0].message.tool_calls
    assert calls and calls[0].type == "function" and calls[0].function.name == "find_order"
    assert json.loads(calls[0].function.arguments)["status"] in ("open", "closed")


def test_json_schema(client: openai.OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"mood": {"type": "string", "enum": ["glad", "cross"]}, "urgent": {"type": "boolean"}},
        "required": ["mood", "urgent"],
        "additionalProperties": False,
    }
    wanted: Any = {"type": "json_schema", "json_schema": {"name": "mood", "schema": schema, "strict": True}}
    answer = client.chat.completions.create(model=CHAT, messages=HELLO, response_format=wanted, max_tokens=100)
    data = json.loads(answer.choices[0].message.content or "")
    assert data["mood"] in ("glad", "cross") and isinstance(data["urgent"], bool)


def test_responses(client: openai.OpenAI) -> None:
    answer = client.responses.create(model=CHAT, input="Hello", max_output_tokens=16)
    assert answer.output_text
    assert answer.usage is not None and answer.usage.output_tokens == 16
    kinds = [event.type for event in client.responses.create(model=CHAT, input="Hello", max_output_tokens=16, stream=True)]
    assert kinds[0] == "response.created" and "response.output_text.delta" in kinds


def test_models(client: openai.OpenAI) -> None:
    ids = {model.id for model in client.models.list()}
    assert {CHAT, EMBED, "default"} <= ids
    assert client.models.retrieve(CHAT).id == CHAT
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nothing")


def test_embeddings_wake_a_model_that_sleeps(client: openai.OpenAI) -> None:
    answer = client.embeddings.create(model=EMBED, input=["a parcel", "a refund"])
    assert len(answer.data) == 2
    assert len(answer.data[0].embedding) == len(answer.data[1].embedding) > 8
    assert answer.data[0].embedding != answer.data[1].embedding
    assert answer.usage.prompt_tokens > 0


def _post(endpoint: Endpoint, path: str, body: dict[str, Any], **headers: str) -> Any:
    given = {"Content-Type": "application/json", "Authorization": f"Bearer {endpoint.api_key}", **headers}
    request = urllib.request.Request(endpoint.root + path, json.dumps(body).encode(), given)
    with urllib.request.urlopen(request, timeout=240) as answer:
        return json.load(answer)


def test_score_and_rerank(endpoint: Endpoint) -> None:
    score = _post(endpoint, "/v1/score", {"model": EMBED, "text_1": "a parcel", "text_2": ["a parcel", "a refund"]})
    assert score["data"][0]["score"] > score["data"][1]["score"]
    ranked = _post(endpoint, "/v1/rerank", {"model": EMBED, "query": "a parcel", "documents": ["a refund", "a parcel"]})
    assert ranked["results"][0]["index"] == 1


def test_anthropic_messages(endpoint: Endpoint) -> None:
    body = {"model": CHAT, "max_tokens": 8, "messages": HELLO}
    request = urllib.request.Request(
        endpoint.root + "/v1/messages",
        json.dumps(body).encode(),
        {"Content-Type": "application/json", "x-api-key": endpoint.api_key, "anthropic-version": "2023-06-01"},
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        message = json.load(answer)
    assert message["type"] == "message" and message["usage"]["output_tokens"] == 8


def test_tokenize_round_trip(endpoint: Endpoint) -> None:
    tokens = _post(endpoint, "/tokenize", {"model": CHAT, "prompt": "你好, order 77"})["tokens"]
    assert _post(endpoint, "/detokenize", {"model": CHAT, "tokens": tokens})["prompt"].endswith("你好, order 77")


def test_endpoint_file(endpoint: Endpoint) -> None:
    file = endpoint.run_dir / "endpoint.json"
    assert stat.S_IMODE(os.stat(file).st_mode) == 0o600
    data = json.loads(file.read_text())
    for model in data["models"]:
        assert {"id", "path", "engine_kwargs"} <= set(model)
        assert model["path"] == f"/engines/{model['id']}"
    assert os.path.isdir(data["models"][0]["engine_kwargs"]["model"])

"""What the gateway needs to know of a request's body: its model, and roughly what it will cost.

Everything else in a body is the engine's to judge. `ROUTES` says which routes are relayed, and to models of which task.
"""

from __future__ import annotations

from typing import Any

from cluster.errors import ApiError

GENERATE, EMBED, SCORE, TRANSCRIBE = "generate", "embed", "score", "transcribe"
_TEXT = frozenset({GENERATE})
_SCORING = frozenset({EMBED, SCORE})
_AUDIO = frozenset({TRANSCRIBE})
_ANY = frozenset({GENERATE, EMBED, SCORE, TRANSCRIBE})

ROUTES: dict[str, frozenset[str]] = {
    "/v1/chat/completions": _TEXT,
    "/v1/completions": _TEXT,
    "/v1/responses": _TEXT,
    "/v1/messages": _TEXT,
    "/v1/messages/count_tokens": _TEXT,
    "/v1/embeddings": frozenset({EMBED}),
    "/v1/score": _SCORING,
    "/score": _SCORING,
    "/v1/rerank": _SCORING,
    "/v2/rerank": _SCORING,
    "/rerank": _SCORING,
    "/v1/audio/transcriptions": _AUDIO,
    "/v1/audio/translations": _AUDIO,
    "/tokenize": _ANY,
    "/detokenize": _ANY,
}

BYTES_PER_TOKEN = 4
ASSUMED_COMPLETION = 256
LONGEST_ASSUMED = 1_000_000
MOST_CHOICES = 128


def model_name(fields: dict[str, Any]) -> str:
    """The `model` of a request. Raises ApiError 400 when it is missing or is no text."""
    name = fields.get("model")
    if name is None or name == "":
        raise ApiError(400, "You must provide a model parameter.", "missing_model", param="model")
    if not isinstance(name, str):
        raise ApiError(400, f"model must be a string, found {type(name).__name__}.", "invalid_type", param="model")
    return name


def check_choices(fields: dict[str, Any]) -> None:
    """OpenAI's limit on `n`; vLLM would take 16,384. Raises ApiError 400."""
    choices = fields.get("n")
    if isinstance(choices, int | float) and choices > MOST_CHOICES:
        raise ApiError(400, f"n must be at most {MOST_CHOICES}.", "invalid_value", param="n")


def estimate_tokens(body_bytes: int, fields: dict[str, Any]) -> int:
    """Tokens to reserve for a request, prompt and completion; what was really used is settled at its end."""
    longest = ASSUMED_COMPLETION
    for name in ("max_completion_tokens", "max_tokens", "max_output_tokens"):
        value = fields.get(name)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            longest = value
            break
    choices, prompts = fields.get("n"), fields.get("prompt")
    count = choices if isinstance(choices, int) and not isinstance(choices, bool) and choices > 0 else 1
    if isinstance(prompts, list) and prompts and not isinstance(prompts[0], int):  # several prompts, each answered
        count *= len(prompts)
    return min(LONGEST_ASSUMED, body_bytes // BYTES_PER_TOKEN + 1 + longest * count)


async def parse_form(body: bytes, content_type: str) -> dict[str, Any]:
    """The text fields of a multipart form (an audio upload). Raises ApiError 400 when it cannot be read."""
    from starlette.datastructures import Headers
    from starlette.formparsers import MultiPartException, MultiPartParser

    async def once() -> Any:
        yield body

    try:
        form = await MultiPartParser(Headers({"content-type": content_type}), once()).parse()
    except (MultiPartException, KeyError, ValueError) as error:
        raise ApiError(400, f"The form cannot be read: {str(error)[:200]}", "invalid_form") from None
    fields: dict[str, Any] = {name: value for name, value in form.items() if isinstance(value, str)}
    await form.close()
    if fields.get("stream") in ("true", "1"):
        fields["stream"] = True
    return fields

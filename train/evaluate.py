"""`python -m train eval`: asks the running endpoint the held-out customer-service questions and says how many it answers rightly.

It reads the address and the key from the endpoint's file (`make up` writes it), sends each dialogue but its last answer to
`/v1/chat/completions` at temperature 0, a few at the same time, and prints one JSON line last. `scoring` explains the figures.
It trains nothing, starts nothing, and works with any OpenAI-compatible endpoint. Called by `train.__main__`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster import tls
from cluster.errors import TrainError
from cluster.session import read_json
from train.scoring import Mark, Question, mark, questions, summary

CONCURRENT = 8
MAX_TOKENS = 96  # about three times the longest right answer
TIMEOUT_S = 120.0
SHOWN = 3  # wrong answers that are printed


@dataclass(frozen=True)
class Target:
    """Whom to ask; `base_url` ends with `/v1`, `certificate` is the file to know an https endpoint by."""

    base_url: str
    api_key: str
    model: str
    certificate: str | None = None


def target(path: Path, model: str | None) -> Target:
    """The endpoint of a file that `make up` wrote, and the model: that of the name, or the first that generates.

    Raises:
        TrainError: there is no such file, or no model to ask.
    """
    data = read_json(path)
    try:
        if data is None:
            raise TrainError(f"{path}: no endpoint file; start the endpoint with `make up`, or name its file with --endpoint")
        url = str(data["base_url"]).rstrip("/").removesuffix("/v1") + "/v1"
        names = [str(one["id"]) for one in data["models"] if one.get("task", "generate") == "generate"]
        key = str(data["api_key"])
    except (KeyError, TypeError) as error:
        raise TrainError(f"{path}: not an endpoint file: {type(error).__name__} {error}") from error
    if model is None and not names:
        raise TrainError(f"{path}: no model that generates")
    return Target(url, key, model or names[0], data.get("certificate"))


async def ask(to: Target, asked: Sequence[Question], concurrent: int, say: Callable[[str], None]) -> list[tuple[Mark, str]]:
    """Ask all questions; marks and answers in the order of the questions.

    Raises:
        TrainError: the endpoint cannot be reached or refuses a question.
    """
    import aiohttp

    gate, done = asyncio.Semaphore(concurrent), 0

    async def one(client: aiohttp.ClientSession, question: Question) -> tuple[Mark, str]:
        nonlocal done
        body = {"model": to.model, "messages": list(question.messages), "temperature": 0, "max_tokens": MAX_TOKENS}
        async with gate, client.post(f"{to.base_url}/chat/completions", json=body) as response:
            text = await response.text()
            if response.status != 200:
                raise TrainError(f"{to.base_url}: status {response.status} for model {to.model!r}: {text[:300]}")
        done += 1
        if done % 200 == 0:
            say(f"{done} of {len(asked)} questions")
        answer = json.loads(text)["choices"][0]["message"].get("content") or ""
        return mark(question, answer), answer

    headers = {"authorization": f"Bearer {to.api_key}"}
    timeout = aiohttp.ClientTimeout(total=None, sock_read=TIMEOUT_S)
    connector = aiohttp.TCPConnector(ssl=True if to.certificate is None else tls.trust(to.certificate))
    try:
        async with (
            aiohttp.ClientSession(connector=connector, headers=headers, timeout=timeout) as client,
            asyncio.TaskGroup() as tasks,
        ):
            running = [tasks.create_task(one(client, question)) for question in asked]
    except ExceptionGroup as group:
        error = group.exceptions[0]
        if isinstance(error, TrainError):
            raise error from None
        if isinstance(error, aiohttp.ClientError | TimeoutError | OSError):
            raise TrainError(f"{to.base_url}: cannot be asked ({error}); is the endpoint up?") from error
        raise
    return [task.result() for task in running]


def evaluate(to: Target, asked: Sequence[Question], concurrent: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Ask all questions and sum up: the figures of `scoring.summary` with `model` and `seconds`; says a few wrong answers."""
    begun = time.monotonic()
    answered = asyncio.run(ask(to, asked, concurrent, say))
    wrong = [(one.question, answer) for one, answer in answered if not one.exact]
    for question, answer in wrong[:SHOWN]:
        say(f"wrong: {question.messages[-1]['content']!r} was answered {answer!r}, not {question.expected!r}")
    figures = summary([one for one, _ in answered])
    return {**figures, "model": to.model, "seconds": round(time.monotonic() - begun, 1)}


def add_parser(commands: Any) -> None:
    """Add `eval` to the command line."""
    text = "ask the running endpoint the held-out questions of the shipped data set"
    command = commands.add_parser("eval", help=text, description=text)
    command.add_argument("--endpoint", type=Path, default=Path("run/endpoint.json"), help="the file that `make up` wrote")
    command.add_argument("--model", help="default: the first that generates")
    command.add_argument("--limit", type=int, metavar="N", help="ask only N questions, spread over all intents")
    command.add_argument("--concurrent", type=int, default=CONCURRENT, metavar="N", help="requests at the same time")
    command.set_defaults(run=_command)


def _command(args: argparse.Namespace) -> int:
    for name in ("limit", "concurrent"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise TrainError(f"--{name} {getattr(args, name)}: write a number of at least 1")
    to = target(args.endpoint, args.model)
    asked = questions(limit=args.limit)
    figures = evaluate(to, asked, args.concurrent, lambda text: print(text, file=sys.stderr, flush=True))
    print(json.dumps(figures, ensure_ascii=False), flush=True)
    return 0

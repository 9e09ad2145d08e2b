"""The customer-service data set: the shipped files, the distance between its splits, and how answers are marked."""

from __future__ import annotations

import asyncio
import json
import random
import re
import subprocess
import sys
import zlib
from collections import Counter, defaultdict
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from aiohttp import web

from cluster.errors import DataError, TrainError
from train import assistant, evaluate, scoring, wordings
from train.wordings import FOLDER, LANGUAGES, OUT_OF_SCOPE, Template, intents, spelled

SPLITS: tuple[wordings.Split, ...] = ("train", "heldout")
ROOT = Path(__file__).resolve().parents[2]


@cache
def shipped(split: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(FOLDER / f"{split}.parquet").to_pylist()
    return rows


def asked(row: dict[str, Any]) -> list[str]:
    return [message["content"] for message in row["messages"] if message["role"] == "user"]


def masked(text: str, slots: dict[str, str]) -> str:
    """A question without its values, case and marks."""
    for name, value in slots.items():
        text = re.sub(re.escape(value), f"<{name}>", text, flags=re.IGNORECASE)
    return " ".join(re.findall(r"<\w+>|\w+", text.lower()))


def templates(split: wordings.Split, language: wordings.Language) -> list[Template]:
    return [template for intent in intents(language) for template in intent.templates(split)]


def spellings(pattern: str) -> set[str]:
    """All that a pattern can spell, with and without the value, masked."""
    if optional := re.search(r"\[[^\[\]]*\]", pattern):
        before, after = pattern[: optional.start()], pattern[optional.end() :]
        return spellings(before + after) | spellings(before + optional[0][1:-1] + after)
    if choice := re.search(r"\(([^()]*)\)", pattern):
        before, after = pattern[: choice.start()], pattern[choice.end() :]
        return {text for one in choice[1].split("|") for text in spellings(before + one + after)}
    return {masked(pattern, {})}


def words(text: str, language: str) -> frozenset[str]:
    """Words of English, characters of Chinese; a value is one word."""
    text = text.replace("[", "").replace("]", "").lower()
    return frozenset(re.findall(r"\{\w+\}|[a-z0-9']+" if language == "en" else r"\{\w+\}|[a-z0-9]+|[\u4e00-\u9fff]", text))


def test_the_shipped_files_are_what_the_generator_writes(tmp_path: Path) -> None:
    counts = assistant.write(tmp_path)
    for split in SPLITS:
        assert pq.read_table(tmp_path / f"{split}.parquet").equals(pq.read_table(FOLDER / f"{split}.parquet"))
        assert counts[f"{split}.parquet"] == len(shipped(split))
    for name in ("polite.jsonl", "polite-pairs.jsonl"):
        assert (tmp_path / name).read_bytes() == (FOLDER / name).read_bytes() and counts[name] >= 100
    assert sum(path.stat().st_size for path in FOLDER.glob("*.parquet")) < 1_500_000


def test_it_has_what_it_promises() -> None:
    train, heldout = shipped("train"), shipped("heldout")
    assert len(train) >= 5_000 and len(heldout) >= 800
    names = {row["intent"] for row in heldout}
    assert len(names) >= 60 and OUT_OF_SCOPE in names
    assert names == {row["intent"] for row in train} - {"note", "json", "tool_call"}
    for split in (train, heldout):
        assert {row["language"] for row in split} == set(LANGUAGES)
        assert {row["turns"] for row in split} == {1, 2}
    for language in LANGUAGES:
        found = Counter(row["intent"] for row in heldout if row["language"] == language)
        assert set(found) == names and min(found.values()) >= 2
    assert any(row["tools"] for row in train) and not any(row["tools"] for row in heldout)


@pytest.mark.parametrize("split", SPLITS)
def test_answers_repeat_the_values_and_close_the_dialogue(split: str) -> None:
    for row in shipped(split):
        roles = [message["role"] for message in row["messages"] if message["role"] != "system"]
        assert roles == ["user", "assistant"] * row["turns"]
        assert row["messages"][-1]["content"] == row["expected"]
        assert row["intent"] in ("note", "json", "tool_call") or "{" not in "".join(asked(row)) + row["expected"]
        if row["intent"] != OUT_OF_SCOPE:
            for value in json.loads(row["slots"]).values():
                assert value in row["expected"] and any(value in text for text in asked(row)), row


def test_no_heldout_wording_occurs_in_training() -> None:
    trained = {row["template"] for row in shipped("train")}
    assert not trained & {row["template"] for row in shipped("heldout")}
    seen = {masked(text, json.loads(row["slots"])) for row in shipped("train") for text in asked(row)[-1:]}
    firsts = {masked(text, {}) for row in shipped("train") for text in asked(row)}
    for row in shipped("heldout"):
        if row["turns"] == 1:
            assert masked(asked(row)[0], json.loads(row["slots"])) not in seen | firsts, row
    for language in LANGUAGES:
        # Nor is a pattern of training able to spell it: all that both can.
        spoken = {text for one in templates("train", language) for text in spellings(one.text)}
        again = [one.id for one in templates("heldout", language) if spellings(one.text) & spoken]
        assert not again


@pytest.mark.parametrize("language", LANGUAGES)
def test_heldout_wordings_are_no_near_copies(language: wordings.Language) -> None:
    """Jaccard index of the sets of words, against the nearest of many spellings of each training pattern of the intent."""
    draw = random.Random(1)
    trained: dict[str, set[frozenset[str]]] = defaultdict(set)
    for intent in intents(language):
        for template in intent.train:
            trained[intent.name] |= {words(spelled(template.text, draw), language) for _ in range(40)}
    nearest = []
    for intent in intents(language):
        for template in intent.heldout:
            own = words(template.text, language)
            nearest.append(max(len(own & other) / len(own | other) for other in trained[intent.name]))
    print(
        f"{language}: mean {sum(nearest) / len(nearest):.2f}, 0.8 or more: {sum(one >= 0.8 for one in nearest)} of {len(nearest)}"
    )
    assert sum(one >= 0.8 for one in nearest) <= 0.05 * len(nearest)
    assert sum(nearest) / len(nearest) < 0.6


@pytest.mark.parametrize("language", LANGUAGES)
def test_heldout_wordings_are_clear(language: wordings.Language) -> None:
    """A linear classifier of words, pairs of words and letters, trained on the training wordings, places nearly all of them."""
    import torch

    draw, names = random.Random(2), [intent.name for intent in intents(language)]

    def features(text: str) -> torch.Tensor:
        found = re.findall(r"[a-z']+|[\u4e00-\u9fff]|\{", text.lower())
        pairs = [" ".join(two) for two in pairwise(found)]
        parts = [f"#{word}#"[at : at + 4] for word in found if len(word) > 3 for at in range(len(word) - 1)]
        return torch.tensor([zlib.crc32(one.encode()) % 65536 for one in (*found, *pairs, *parts)] or [0])

    def examples(split: wordings.Split, times: int) -> tuple[list[torch.Tensor], torch.Tensor]:
        both = [
            (features(spelled(template.text, draw)), names.index(intent.name))
            for intent in intents(language)
            for template in intent.templates(split)
            for _ in range(times)
        ]
        return [one for one, _ in both], torch.tensor([label for _, label in both])

    torch.manual_seed(0)
    table = torch.nn.EmbeddingBag(65536, len(names), mode="sum")
    torch.nn.init.zeros_(table.weight)
    optimizer = torch.optim.Adam(table.parameters(), lr=0.01)

    def scores(texts: list[torch.Tensor]) -> torch.Tensor:
        starts = torch.tensor([0, *[len(one) for one in texts[:-1]]]).cumsum(0)
        out: torch.Tensor = table(torch.cat(texts), starts)
        return out

    texts, labels = examples("train", 4)
    for _ in range(2):
        for some in torch.randperm(len(texts)).split(256):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(scores([texts[at] for at in some]), labels[some]).backward()
            optimizer.step()
    asked_texts, wanted = examples("heldout", 1)
    right = (scores(asked_texts).argmax(1) == wanted).float().mean().item()
    print(f"{language}: {right:.3f} of {len(wanted)} held-out wordings")
    assert right >= 0.93


def test_signs_of_a_pattern() -> None:
    draw = random.Random(0)
    text = "(where|how) is order[ {order}] (now|)"
    spoken = {spelled(text, draw) for _ in range(50)}
    assert spoken == {f"{word} is order {{order}}{end}" for word in ("where", "how") for end in ("", " now")}
    assert spelled(text, draw, bare=True).startswith(("where is order", "how is order"))
    assert Template("x", text).forgettable and Template("x", text).slots == ("order",)


def question(expected: str, **slots: str) -> scoring.Question:
    return scoring.Question(({"role": "user", "content": "?"},), "an_intent", "en", 1, slots, "an_intent/en/heldout/00", expected)


def test_marks_tell_the_answer_the_intent_and_the_values_apart() -> None:
    one = question("Order 12 goes to Rome.", order="12", city="Rome")
    assert scoring.mark(one, " Order 12  goes to\nRome. ") == scoring.Mark(one, True, True, True)
    assert scoring.mark(one, "Order 13 goes to Rome.") == scoring.Mark(one, False, True, False)
    assert scoring.mark(one, "12 is in Rome") == scoring.Mark(one, False, False, True)
    plain = question("Hello (you)!")
    assert scoring.mark(plain, "Hello (you)!").slots is None
    figures = scoring.summary([scoring.mark(one, "Order 13 goes to Rome."), scoring.mark(plain, "Hello (you)!")])
    assert (figures["accuracy"], figures["intent_accuracy"], figures["slot_accuracy"], figures["questions"]) == (0.5, 1.0, 0.0, 2)
    assert figures["languages"] == {"en": 0.5} and figures["intents"] == {"an_intent": 0.5}


def test_a_limit_spreads_over_the_intents() -> None:
    some = scoring.questions(limit=100)
    assert len(some) == 100 and len({one.intent for one in some}) >= 45 and {one.language for one in some} == set(LANGUAGES)
    assert len(scoring.questions()) == len(shipped("heldout"))
    with pytest.raises(DataError, match="nowhere"):
        scoring.questions(Path("nowhere.parquet"))


def test_eval_asks_an_endpoint_and_ends_with_one_line_of_json(tmp_path: Path) -> None:
    known = {json.dumps(list(one.messages), sort_keys=True): one.expected for one in scoring.questions()}
    busy, most = 0, 0

    async def chat(request: web.Request) -> web.Response:
        nonlocal busy, most
        busy += 1
        most = max(most, busy)
        body = await request.json()
        await asyncio.sleep(0)
        busy -= 1
        if request.headers["authorization"] != "Bearer sk-test" or body["temperature"] != 0:
            return web.json_response({"error": {"message": "no"}}, status=401)
        answer = known[json.dumps(body["messages"], sort_keys=True)]
        right = body["model"] == "good"
        return web.json_response({"choices": [{"message": {"content": answer if right else "babble"}}]})

    async def run() -> list[dict[str, Any]]:
        app = web.Application()
        app.router.add_post("/v1/chat/completions", chat)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        port = runner.addresses[0][1]
        models = [{"id": "embed", "task": "embed"}, {"id": "good", "task": "generate"}]
        file = tmp_path / "endpoint.json"
        file.write_text(json.dumps({"base_url": f"http://127.0.0.1:{port}/v1", "api_key": "sk-test", "models": models}))
        figures = []
        for name in (None, "bad"):
            to = evaluate.target(file, name)
            answered = await evaluate.ask(to, scoring.questions(limit=60), 4, lambda text: None)
            figures.append(scoring.summary([one for one, _ in answered]))
        wrong = evaluate.Target(f"http://127.0.0.1:{port}/v1", "other", "good")
        with pytest.raises(TrainError, match="status 401"):
            await evaluate.ask(wrong, scoring.questions(limit=2), 1, lambda text: None)
        await runner.cleanup()
        with pytest.raises(TrainError, match="is the endpoint up"):
            await evaluate.ask(wrong, scoring.questions(limit=2), 1, lambda text: None)
        return figures

    good, bad = asyncio.run(run())
    assert good["accuracy"] == good["slot_accuracy"] == 1.0 and bad["accuracy"] == 0.0
    assert 1 <= most <= 4


def test_eval_without_an_endpoint_is_one_line_and_exit_2(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "train", "eval", "--endpoint", str(tmp_path / "none.json")],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert done.returncode == 2
    assert done.stderr.strip().startswith("error: ") and "make up" in done.stderr and len(done.stderr.splitlines()) == 1

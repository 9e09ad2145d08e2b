"""The customer-service data set: what the embedded default model is trained on and measured with.

`python -m train data assistant OUT` writes `train.parquet`, `heldout.parquet` and the files of `polite`; `datasets/assistant`
has its output.
One dialogue per row, made from the wordings of `wordings` by a seeded draw, so the same source gives the same rows anywhere.
The held-out split has wordings, greetings and replies that training never has; values (numbers, dates, cities) are drawn anew.
Training rows are also noisy: lost words, typing errors, lower case, missing punctuation. Rows of `assistant_extras` (tools, JSON)
are in training only. It trains nothing and knows nothing of tokens; called by `train.__main__` and by tests.

Columns: messages (list of {role, content}), tools (JSON text or empty), intent, language, turns, slots (JSON), template (id
of the question's wording), expected (the whole right answer).
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from train.assistant_extras import extras
from train.wordings import (
    FOLDER,
    LANGUAGES,
    OUT_OF_SCOPE,
    Intent,
    Language,
    Split,
    Template,
    filled,
    intents,
    spelled,
    talk,
    value,
)

SEED = 8
PER_INTENT = 180  # training dialogues of an intent in one language
ASKED = 2  # dialogues of a held-out wording
OFF_TOPIC = 5  # times as many for off-topic questions, which may be about anything
COPYING = 1.3  # and so many times as many where a value must be copied
FOLLOW_UP = 0.08  # part of the dialogues that have another question before
FORGOTTEN = 0.2  # part of those that could leave out the value and do
ANSWERS = 20  # times each answer is shown to the tokenizer
SPELLINGS = 4  # of each wording, for the tokenizer
UNWORDED = ("note/", "json/", "tool_call/")  # rows that come from no wording
SLIPS = 0.5  # part of the training questions with a typing error or a lost word
SYSTEM = 0.06  # part of the training dialogues that begin with a system message
POLITE = 6  # dialogues of each intent that the adapter of docs/training.md learns from
MANNER = "Dear customer, {} Kind regards, Tidepool."


@dataclass(frozen=True)
class Row:
    """One dialogue; the last message is the assistant's and equals `expected`."""

    messages: tuple[dict[str, str], ...]
    intent: str
    language: str
    slots: dict[str, str]
    template: str
    tools: str = ""

    @property
    def expected(self) -> str:
        """The right last answer."""
        return self.messages[-1]["content"]

    def record(self) -> dict[str, Any]:
        """The row as the columns of the file."""
        return {
            "messages": list(self.messages),
            "tools": self.tools,
            "intent": self.intent,
            "language": self.language,
            "turns": sum(message["role"] == "user" for message in self.messages),
            "slots": json.dumps(self.slots, ensure_ascii=False, sort_keys=True),
            "template": self.template,
            "expected": self.expected,
        }


@dataclass
class _Writer:
    """Draws dialogues of one split and language."""

    split: Split
    language: Language
    draw: random.Random = field(init=False)

    def __post_init__(self) -> None:
        self.draw = random.Random(f"{SEED}/{self.split}/{self.language}")

    def rows(self) -> Iterator[Row]:
        for intent in intents(self.language):
            templates = intent.templates(self.split)
            if self.split == "heldout":
                for template in templates:
                    for _ in range(ASKED):
                        yield self._dialogue(intent, template, forget=False)
                    if template.forgettable:
                        yield self._dialogue(intent, template, forget=True)
                continue
            count = PER_INTENT * (OFF_TOPIC if intent.name == OUT_OF_SCOPE else COPYING if "{" in intent.answer else 1)
            order = list(templates)
            for number in range(round(count)):
                if number % len(order) == 0:
                    self.draw.shuffle(order)
                template = order[number % len(order)]
                yield self._dialogue(intent, template, forget=template.forgettable and self.draw.random() < FORGOTTEN)

    def _dialogue(self, intent: Intent, template: Template, *, forget: bool) -> Row:
        messages, slots = self._asked(intent, template, forget=forget)
        if not forget and self.draw.random() < FOLLOW_UP:
            other = self.draw.choice(intents(self.language)[:-1])
            first = self.draw.choice([one for one in other.templates(self.split)])
            before, _ = self._asked(other, first, forget=False)
            opener = self.draw.choice(talk(self.language)["follow_openers"])
            messages = [*before, {**messages[0], "content": opener + messages[0]["content"]}, *messages[1:]]
        if self.split == "train" and self.draw.random() < SYSTEM:
            messages = [{"role": "system", "content": self.draw.choice(talk(self.language)["systems"])}, *messages]
        return Row(tuple(messages), intent.name, self.language, slots, template.id)

    def _asked(self, intent: Intent, template: Template, *, forget: bool) -> tuple[list[dict[str, str]], dict[str, str]]:
        """The messages of one question and its answer, with the request for a forgotten value between."""
        slots = {name: value(name, self.language, self.draw) for name in template.slots}
        wording = spelled(template.text, self.draw, bare=forget)
        while intent.name != OUT_OF_SCOPE and not forget and not all(f"{{{name}}}" in wording for name in slots):
            # A choice left the value out, so the answer would have nothing to repeat.
            wording = spelled(template.text, self.draw)
        question = self._typed(filled(wording, slots), slots, plain=len(template.text) < 9)
        messages = [{"role": "user", "content": question}]
        if forget:
            (name,) = template.slots
            request = talk(self.language)["slots"][name]
            reply = filled(self.draw.choice(request["replies" if self.split == "train" else "heldout"]), slots)
            messages += [{"role": "assistant", "content": request["ask"]}, {"role": "user", "content": reply}]
        answer = filled(intent.answer, slots)
        if intent.name == OUT_OF_SCOPE:
            slots = {}
        return [*messages, {"role": "assistant", "content": answer}], slots

    def _typed(self, text: str, slots: dict[str, str], *, plain: bool) -> str:
        """A question as it is typed: with a greeting, an ending, and in training with slips; values stay as they are."""
        draw, words = self.draw, talk(self.language)
        prefix = "" if self.split == "train" else "heldout_"
        if self.split == "train" and draw.random() < SLIPS:
            text = _slips(text, self.language, draw, tuple(slots.values()))
        fixed = text.startswith(("I ", "I'", *slots.values()))
        if self.language == "en" and draw.random() < 0.5 and not fixed:
            text = text[0].upper() + text[1:]
        if not plain and draw.random() < 0.2:
            text = draw.choice(words[f"{prefix}openers"]) + (text if fixed else text[0].lower() + text[1:])
        if not plain and draw.random() < 0.15:
            text += draw.choice(words[f"{prefix}closers"])
        if self.language == "en" and draw.random() < 0.25:
            text = _outside(text, tuple(slots.values()), str.lower)
        ends = ("", "", "", "?", ".", "!") if self.language == "en" else ("", "", "", "？", "。", "？")  # noqa: RUF001
        return text + draw.choice(ends)


def _outside(text: str, kept: tuple[str, ...], change: Any) -> str:
    """The text with `change` applied to all of it but the kept values."""
    if not kept:
        return str(change(text))
    parts = re.split("(" + "|".join(re.escape(one) for one in kept) + ")", text)
    return "".join(part if part in kept else str(change(part)) for part in parts)


def _slips(text: str, language: Language, draw: random.Random, kept: tuple[str, ...]) -> str:
    """One slip in each part between values: a lost word (of Chinese: a character), or two letters that changed places."""

    def change(part: str) -> str:
        if language == "zh":
            if len(part) < 6:
                return part
            spot = draw.randrange(len(part))
            return part[:spot] + part[spot + 1 :]
        words = part.split(" ")
        spot = draw.randrange(len(words))
        word = words[spot]
        if len(words) > 3 and draw.random() < 0.8:
            del words[spot]
        elif len(word) > 4:
            at = draw.randrange(1, len(word) - 2)
            words[spot] = word[:at] + word[at + 1] + word[at] + word[at + 2 :]
        return " ".join(words)

    return _outside(text, kept, change)


def rows(split: Split) -> list[Row]:
    """All dialogues of a split, in the order of the file."""
    made = [row for language in LANGUAGES for row in _Writer(split, language).rows()]
    if split == "train":
        draw = random.Random(f"{SEED}/extras")
        made += [
            Row(tuple(messages), intent, language, {}, f"{intent}/{language}/train/00", tools)
            for messages, intent, language, tools in extras(draw)
        ]
        draw.shuffle(made)
    return made


def polite(made: list[Row]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Some English dialogues in another manner: as rows for `sft`, and as pairs for `dpo` against the plain answers."""
    used: Counter[str] = Counter()
    dialogues, pairs = [], []
    for row in made:
        if row.language != "en" or row.messages[0]["role"] == "system" or row.template.startswith(UNWORDED):
            continue
        used[row.intent] += 1
        if used[row.intent] > POLITE:
            continue
        wanted = [one if one["role"] == "user" else {**one, "content": MANNER.format(one["content"])} for one in row.messages]
        dialogues.append({"messages": wanted})
        pairs.append({"prompt": wanted[:-1], "chosen": wanted[-1:], "rejected": list(row.messages[-1:])})
    return dialogues, pairs


def texts() -> list[str]:
    """What the default model's tokenizer learns its words from: a few spellings of each training wording, all answers once.

    They come from the shipped file, so that they are there in a tenth of a second.

    Raises:
        OSError: the file cannot be read.
    """
    import pyarrow.parquet as pq

    seen: set[str] = set()
    used: Counter[str] = Counter()
    for row in pq.read_table(FOLDER / "train.parquet", columns=["messages", "template", "tools"]).to_pylist():
        used[row["template"]] += 1
        if used[row["template"]] <= SPELLINGS or row["template"].startswith(UNWORDED):
            seen.update(message["content"] for message in row["messages"])
    # A word that begins an answer is worth a token of its own, however rarely it is asked for.
    answers = [intent.answer for language in LANGUAGES for intent in intents(language)]
    return sorted(seen) + ANSWERS * answers


def write(folder: Path) -> dict[str, int]:
    """Write both splits and, as JSON lines, the dialogues of `polite`; returns how many rows each file has.

    Raises:
        OSError: the folder cannot be written.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    message = pa.struct([("role", pa.string()), ("content", pa.string())])
    texts = ("intent", "language", "slots", "template", "expected")
    schema = pa.schema(
        [("messages", pa.list_(message)), ("tools", pa.string()), ("turns", pa.int8()), *[(n, pa.string()) for n in texts]]
    )
    folder.mkdir(parents=True, exist_ok=True)
    counts: dict[str, int] = {}
    splits: dict[Split, list[Row]] = {"train": rows("train"), "heldout": rows("heldout")}
    for split, made in splits.items():
        table = pa.Table.from_pylist([row.record() for row in made], schema=schema)
        pq.write_table(table, folder / f"{split}.parquet", compression="zstd", compression_level=15, row_group_size=2000)
        counts[f"{split}.parquet"] = len(made)
    dialogues, pairs = polite(splits["train"])
    for name, lines in (("polite.jsonl", dialogues), ("polite-pairs.jsonl", pairs)):
        (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
        counts[name] = len(lines)
    return counts


def add_parser(commands: Any) -> None:
    """Add `data assistant OUT` to the command line."""
    text = "write the shipped customer-service data set"
    command = commands.add_parser("data", help=text, description=text)
    command.add_argument("dataset", choices=("assistant",))
    command.add_argument("out", type=Path, metavar="OUT", help="folder")
    command.set_defaults(run=_command)


def _command(args: argparse.Namespace) -> int:
    from cluster.errors import DataError

    try:
        counts = write(args.out)
    except OSError as error:
        raise DataError(f"{args.out}: cannot be written ({error.strerror})") from error
    print(f"{args.out}: " + ", ".join(f"{count} dialogues in {name}" for name, count in counts.items()))
    return 0

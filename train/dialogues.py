"""From checked rows to token ids and the tokens that loss falls on.

A dialogue is rendered once with the tokenizer's chat template; loss falls on what an assistant message adds to the text after
the generation prompt, up to and with its end-of-turn token. Those places are found by rendering the messages before it, so
templates need no `{% generation %}` marks; a template that writes earlier turns differently once later ones follow is refused,
since the model would learn prompts that it never gets. Texts are tokenised in batches. It knows neither files nor sequences;
`train.shards` is the caller.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cluster.errors import DataError, one_line
from cluster.train_config import Objective
from train.packing import Flagged, flag, trained_tokens
from train.rows import Dialogue, Message, Row, RowError

Spans = list[tuple[int, int]]


@dataclass(frozen=True)
class Encoded:
    """A row as tokens.

    `streams` has one entry per sequence part: a tuple of 1 row of flagged tokens, for dpo of 2. It is empty when the row is
    left out for its length, and has several entries for a long text. `length` is the row's number of tokens before any cut.
    """

    streams: tuple[tuple[Flagged, ...], ...]
    length: int


class Encoder:
    """A tokenizer folder's chat template and tokenizer, with the settings of a data set."""

    def __init__(self, folder: Path, objective: Objective, max_length: int, too_long: str) -> None:
        self.tokenizer = load_tokenizer(folder)
        self.objective, self.max_length, self.too_long = objective, max_length, too_long
        if objective != "pretrain" and not self.tokenizer.chat_template:
            raise DataError(f"{folder}: has no chat template; use a chat model as train.base, or objective pretrain")
        # What may end a turn: only after one of these is white space of the template, not of the answer.
        self._ends = tuple(str(token) for token in self.tokenizer.added_tokens_decoder.values())
        self._rendered: dict[str, str] = {}

    @property
    def pad(self) -> int:
        """Token id that fills sequences up; no loss ever falls on it."""
        tokenizer = self.tokenizer
        return int(next((token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id) if token is not None), 0))

    @property
    def streams(self) -> int:
        """Sequences that belong together: 2 for dpo."""
        return 2 if self.objective == "dpo" else 1

    def encode(self, rows: Sequence[Row]) -> list[Encoded | RowError]:
        """Tokens of rows, or what is wrong with each."""
        self._rendered.clear()
        texts: list[str] = []
        spans: list[Spans] = []
        wrong: dict[int, RowError] = {}
        parts = self.streams
        for number, row in enumerate(rows):
            try:
                found = [(row, [(0, len(row))])] if isinstance(row, str) else [self._render(dialogue) for dialogue in row]
            except RowError as error:
                wrong[number] = error
                found = [("", [])] * parts
            texts += [text for text, _ in found]
            spans += [span for _, span in found]
        tokens = self._tokenise(texts, spans)
        result: list[Encoded | RowError] = []
        for number in range(len(rows)):
            if number in wrong:
                result.append(wrong[number])
                continue
            try:
                result.append(self._fitted(tokens[number * parts : (number + 1) * parts]))
            except RowError as error:
                result.append(error)
        return result

    def _fitted(self, streams: list[Flagged]) -> Encoded:
        """Apply max_length."""
        length = max(len(stream) for stream in streams)
        if self.objective == "pretrain":
            (text,) = streams
            cuts = [text[at : at + self.max_length] for at in range(0, len(text), self.max_length)]
            return Encoded(tuple((_first(cut),) for cut in cuts), length)
        if length > self.max_length:
            if self.too_long == "error":
                raise RowError(
                    f"has {length} tokens, more than max_length {self.max_length}; "
                    "raise data.max_length, or set data.too_long to skip or truncate"
                )
            if self.too_long == "skip":
                return Encoded((), length)
            streams = [stream[: self.max_length] for stream in streams]
        if not all(trained_tokens(stream) for stream in streams):
            if length > self.max_length:
                return Encoded((), length)  # all of the answer was cut off
            raise RowError("no token of the answer is left to learn; the chat template drops it")
        return Encoded((tuple(streams),), length)

    def _render(self, dialogue: Dialogue) -> tuple[str, Spans]:
        """A dialogue as text, and the places [start, end) in it that loss falls on."""
        messages = dialogue.messages
        text = self._template(messages, dialogue, prompt=False)
        spans = []
        for index, trained in enumerate(dialogue.trained):
            if not trained:
                continue
            before = self._template(messages[:index], dialogue, prompt=True)
            last = index == len(messages) - 1
            after = text if last else self._template(messages[: index + 1], dialogue, prompt=False)
            if not text.startswith(before):
                raise RowError(
                    f"message {index + 1}: the chat template writes what comes before this answer differently when the answer "
                    "follows; split the dialogue, or give earlier answers weight 0"
                )
            spans.append((len(before), self._end(text, before, after, messages[index])))
        return text, spans

    def _end(self, text: str, before: str, after: str, message: Message) -> int:
        """Where an answer ends, its end-of-turn token included, white space that a template adds to it not."""
        content = message["content"]
        if text.startswith(after) and len(after) > len(before):
            closed = after.rstrip()
            return len(closed) if len(closed) > len(before) and closed.endswith(self._ends) else len(after)
        # Templates that drop the reasoning of earlier turns: the answer itself must stand there, then an end-of-turn token.
        end = len(before) + len(content)
        token = next((token for token in self._ends if text.startswith(token, end)), None)
        if not message.get("tool_calls") and text.startswith(content, len(before)) and token:
            return end + len(token)
        raise RowError(
            "the chat template writes an answer differently when later messages follow; "
            "split the dialogue, or give earlier answers weight 0"
        )

    def _template(self, messages: Sequence[Message], dialogue: Dialogue, prompt: bool) -> str:
        import jinja2

        if not messages:
            if prompt:
                raise RowError("begins with an assistant message; put the user's message before it")
            return ""
        tools = list(dialogue.tools) or None
        key = f"{prompt}{tools}{messages!r}" if prompt else ""
        if key and key in self._rendered:
            return self._rendered[key]
        try:
            text = str(
                self.tokenizer.apply_chat_template(
                    list(messages), tools=tools, tokenize=False, add_generation_prompt=prompt, continue_final_message=False
                )
            )
        except (jinja2.TemplateError, TypeError, KeyError) as error:
            raise RowError(f"the chat template refuses it: {one_line(error)}") from error
        if key:
            self._rendered[key] = text
        return text

    def _tokenise(self, texts: list[str], spans: list[Spans]) -> list[Flagged]:
        if not texts:
            return []
        plain = self.objective == "pretrain"
        # A template writes every special token itself.
        output = self.tokenizer(
            texts, add_special_tokens=plain, return_offsets_mapping=True, return_attention_mask=False, return_token_type_ids=False
        )
        eos = self.tokenizer.eos_token_id
        result = []
        for ids, offsets, places in zip(output["input_ids"], output["offset_mapping"], spans, strict=True):
            if plain:
                ids = ids if eos is None or ids[-1:] == [eos] else [*ids, eos]
                row = flag(np.array(ids, np.int64), np.ones(len(ids), np.bool_))
            else:
                bounds = np.array(offsets, np.int64).reshape(-1, 2)
                trained = np.zeros(len(ids), np.bool_)
                for start, end in places:
                    # A token with the last characters of the prompt and the first of the answer counts: the answer is lost
                    # otherwise.
                    trained |= (bounds[:, 0] < end) & (bounds[:, 1] > start)
                row = flag(np.array(ids, np.int64), trained)
            result.append(row)
        return result


def _first(cut: Flagged) -> Flagged:
    """A part of a long text as a segment of its own."""
    return flag((cut & np.uint32((1 << 30) - 1)).astype(np.int64), np.ones(len(cut), np.bool_))


def load_tokenizer(folder: Path) -> Any:
    """A Transformers tokenizer with offsets.

    Raises:
        DataError: the folder has none.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder))
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{folder}: has no tokenizer that can be loaded: {one_line(error)}") from error
    if not tokenizer.is_fast:
        raise DataError(f"{folder}: the tokenizer has no tokenizer.json; convert it to a fast tokenizer first")
    tokenizer.model_max_length = 10**9  # else every long text is a warning; max_length is ours
    return tokenizer


def tokenizer_files(folder: Path) -> dict[str, bytes]:
    """The files of a model's folder that decide about tokens, by name."""
    small = (file for file in sorted(folder.iterdir()) if file.suffix in (".json", ".jinja", ".model", ".txt", ".tiktoken"))
    weights = ("safetensors.index.json", "bin.index.json", "generation_config.json")
    return {file.name: file.read_bytes() for file in small if file.is_file() and not file.name.endswith(weights)}


def tokenizer_identity(files: dict[str, bytes]) -> str:
    """A hash that changes when the tokens may."""
    digest = hashlib.sha256()
    for name, content in sorted(files.items()):
        digest.update(f"{name} {len(content)}\n".encode())
        digest.update(content)
    return digest.hexdigest()

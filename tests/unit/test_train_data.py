"""Training data from files to batches, in one process: what is learned, what is packed, in which order, and what is refused."""

from __future__ import annotations

import collections
import gzip
import itertools
import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_train_storage import memory

from cluster import embedded
from cluster.config import parse
from cluster.errors import DataError
from cluster.train_config import DataConfig
from train.check import check
from train.data import Sequences, batch_indices, order, prepare, share, total_steps
from train.dialogues import Encoder, load_tokenizer
from train.packing import NO_LOSS, Packer, flag, unpack
from train.rows import parse as parse_row
from train.sources import GROUP_BYTES
from train.storage import Storage

END = "<|im_end|>"


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model's folder with the tokenizer and template of the embedded one."""
    return embedded.build("embedded:chat", tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="session")
def tokenizer(folder: Path) -> Any:
    return load_tokenizer(folder)


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def answer(text: Any, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def dialogues(seed: int, rows: int) -> list[dict[str, Any]]:
    """Rows of one to three turns, no two the same."""
    draw = random.Random(seed)
    made = []
    for row in range(rows):
        messages = [{"role": "system", "content": "You help."}] if draw.random() < 0.3 else []
        for turn in range(draw.choice((1, 1, 2, 3))):
            messages += [
                user(f"Where is order {seed}-{row}-{turn}?" + " please" * draw.randint(0, 9)),
                answer(f"订单 {row} is on its way." + " soon" * draw.randint(0, 9)),
            ]
        made.append({"messages": messages})
    return made


def write(path: Path, rows: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row, ensure_ascii=False)) + "\n" for row in rows))
    return path


def made(folder: Path, into: Storage, *addresses: Any, objective: Any = "sft", **settings: Any) -> Sequences:
    group_bytes = settings.pop("group_bytes", GROUP_BYTES)
    data = DataConfig(train=tuple(str(address) for address in addresses), **{"max_length": 256, **settings})
    prepared = prepare(data, objective, str(folder), into, "train", lambda line: None, group_bytes)
    sequences = Sequences.open(into, prepared.path)
    assert len(sequences) == prepared.sequences
    return sequences


def segments(arrays: dict[str, np.ndarray]) -> list[tuple[list[int], list[int]]]:
    """Ids and labels of every dialogue in a batch, by its positions; the last run of pads of a sequence is left out."""
    found = []
    for ids, labels, positions in zip(arrays["input_ids"], arrays["labels"], arrays["position_ids"], strict=True):
        starts = [*np.flatnonzero(positions == 0), len(ids)]
        for start, stop in itertools.pairwise(starts):
            assert list(positions[start:stop]) == list(range(stop - start))
            if ids[start:stop].any():  # the pad is token 0, which no dialogue holds
                found.append((list(ids[start:stop]), list(labels[start:stop])))
            else:
                assert stop == len(ids) and (labels[start:stop] == NO_LOSS).all()
    return found


def learned(tokenizer: Any, arrays: dict[str, np.ndarray]) -> list[list[str]]:
    """The texts that loss falls on, of each dialogue."""
    result = []
    for _, labels in segments(arrays):
        runs, last = [], NO_LOSS
        for label in labels:
            if label != NO_LOSS:
                if last == NO_LOSS:
                    runs.append([])
                runs[-1].append(label)
            last = label
        result.append([tokenizer.decode(run) for run in runs])
    return result


# What is learned.


def test_loss_is_on_the_answers_and_their_end_alone(folder, tokenizer, tmp_path):
    rows = dialogues(1, 60)
    sequences = made(folder, Storage.open(str(tmp_path / "out")), write(tmp_path / "a.jsonl", rows), packing=False)
    found = learned(tokenizer, sequences.batch(range(len(sequences))))
    assert found == [[m["content"] + END for m in row["messages"] if m["role"] == "assistant"] for row in rows]


def test_prompts_are_what_the_engine_will_see(folder, tokenizer, tmp_path):
    messages = [user("你好 there"), answer("yes"), user("and 42?"), answer("no")]
    sequences = made(folder, Storage.open(str(tmp_path / "out")), write(tmp_path / "a.jsonl", [{"messages": messages}]))
    arrays = sequences.batch([0])
    for last in (1, 3):
        prompt = tokenizer.apply_chat_template(messages[:last], add_generation_prompt=True, return_dict=True)["input_ids"]
        assert arrays["input_ids"][0, : len(prompt)].tolist() == prompt
        assert arrays["labels"][0, len(prompt) - 1] == NO_LOSS and arrays["labels"][0, len(prompt)] != NO_LOSS


def test_weight_tools_and_parts(folder, tokenizer, tmp_path):
    call = {"id": "1", "type": "function", "function": {"name": "find", "arguments": '{"order": 7}'}}
    tools = [{"type": "function", "function": {"name": "find", "parameters": {"type": "object"}}}]
    rows = [
        {"messages": [user("a"), answer("one", weight=0), user("b"), answer("two", weight=1)]},
        {
            "messages": [
                user("where is 7?"), {"role": "assistant", "content": None, "tool_calls": [call]},
                {"role": "tool", "content": "in Lyon", "tool_call_id": "1"}, answer("It is in Lyon."),
            ],
            "tools": tools,
        },
        {"messages": [user("c"), answer([{"type": "text", "text": "x"}, {"type": "text", "text": "y"}])]},
    ]  # fmt: skip
    sequences = made(folder, Storage.open(str(tmp_path / "out")), write(tmp_path / "a.jsonl", rows), packing=False)
    arrays = sequences.batch(range(3))
    assert learned(tokenizer, arrays) == [
        [f"two{END}"],
        ['<tool_call>{"name": "find", "arguments": {"order": 7}}</tool_call>' + END, f"It is in Lyon.{END}"],
        [f"x\ny{END}"],
    ]
    assert "You may call these tools" in tokenizer.decode(arrays["input_ids"][1])


def template(folder: Path, into: Path, text: str) -> Path:
    """The tokenizer with another chat template."""
    shutil.copytree(folder, into, ignore=shutil.ignore_patterns("*.safetensors"))
    (into / "chat_template.jinja").write_text(text)
    return into


PLAIN = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ WRITTEN }}<|im_end|>\n{% endfor %}"
ASK = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"


def test_templates_that_drop_the_reasoning_of_earlier_turns(folder, tokenizer, tmp_path):
    thinks = "('<think>\n\n</think>\n\n' if m.role == 'assistant' and loop.last else '') + m.content"
    other = template(folder, tmp_path / "model", PLAIN.replace("WRITTEN", thinks) + ASK)
    rows = [{"messages": [user("a"), answer("one"), user("b"), answer("two")]}]
    sequences = made(other, Storage.open(str(tmp_path / "out")), write(tmp_path / "a.jsonl", rows))
    assert learned(tokenizer, sequences.batch([0])) == [[f"one{END}", f"<think>\n\n</think>\n\ntwo{END}"]]


@pytest.mark.parametrize(
    ("written", "said"),
    [
        (
            "m.content if loop.last or m.role == 'user' else m.content | upper",
            "a.jsonl:1: .*differently when later messages follow; split the dialogue",
        ),
        ("messages | length ~ m.content", "a.jsonl:1: message 2: .*differently when the answer follows; split the dialogue"),
        ("raise_exception('roles must alternate')", "a.jsonl:1: the chat template refuses it: roles must alternate"),
    ],
)
def test_templates_that_cannot_be_learned_from_are_refused(folder, tmp_path, written, said):
    other = template(folder, tmp_path / "model", PLAIN.replace("WRITTEN", written) + ASK)
    rows = [{"messages": [user("a"), answer("one"), user("b"), answer("two")]}]
    with pytest.raises(DataError, match=said):
        made(other, Storage.open(str(tmp_path / "out")), write(tmp_path / "a.jsonl", rows))


def test_a_folder_without_a_template_or_tokenizer_is_named(folder, tmp_path):
    path = write(tmp_path / "a.jsonl", dialogues(0, 1))
    bare = template(folder, tmp_path / "bare", "")
    (bare / "chat_template.jinja").unlink()
    with pytest.raises(DataError, match=r"bare: has no chat template; use a chat model"):
        made(bare, Storage.open(str(tmp_path / "out")), path)
    (tmp_path / "none").mkdir()
    with pytest.raises(DataError, match=r"none: has no tokenizer that can be loaded"):
        made(tmp_path / "none", Storage.open(str(tmp_path / "out")), path)


# Packing and order.


def test_packing_loses_nothing_and_keeps_dialogues_apart():
    import torch
    from transformers.masking_utils import find_packed_sequence_indices

    for seed in range(20):
        draw = np.random.default_rng(seed)
        length = int(draw.integers(4, 40))
        rows = [flag(draw.integers(1, 99, size), draw.random(size) < 0.5) for size in draw.integers(1, length + 1, 300)]
        for packing in (True, False):
            packer = Packer(length, 0, packing)
            packed = [sequence for row in rows for sequence in packer.add(row)] + list(packer.finish())
            arrays = unpack(np.concatenate(packed))
            assert collections.Counter(map(str, segments(arrays))) == collections.Counter(
                str(segments(unpack(row[None]))[0]) for row in rows
            )
            tokens = sum(len(row) for row in rows)
            assert len(packed) < 1.15 * tokens / length + 1 if packing and length > 10 else len(packed) <= len(rows)
            apart = find_packed_sequence_indices(torch.from_numpy(arrays["position_ids"]))
            starts = arrays["position_ids"] == 0
            if apart is not None:
                assert (apart.numpy() == np.cumsum(starts, axis=1) - 1).all()


def test_every_sequence_comes_once_per_epoch_on_any_number_of_workers():
    for seed in range(30):
        draw = random.Random(seed)
        sequences, batch_size = draw.randint(1, 50), 6 * draw.randint(1, 4)
        epochs = 3 * batch_size
        steps = epochs * sequences // batch_size
        one = np.concatenate([batch_indices(sequences, batch_size, seed, step) for step in range(steps)])
        for epoch in range(epochs):
            assert sorted(one[epoch * sequences : (epoch + 1) * sequences]) == list(range(sequences))
        for workers in (1, 2, 3):
            step = draw.randrange(steps)
            whole = batch_indices(sequences, batch_size, seed, step)  # asked for alone: a resume needs nothing but the number
            assert (whole == one[step * batch_size : (step + 1) * batch_size]).all()
            parts = [share(whole, rank, workers) for rank in range(workers)]
            assert (np.concatenate(parts) == whole).all() and len({len(part) for part in parts}) == 1
    assert (order(100, 1, 0) != order(100, 1, 1)).any() and (order(100, 1, 0) != order(100, 2, 0)).any()


def test_every_token_of_every_row_comes_once_per_epoch(folder, tmp_path):
    for seed in range(3):
        path = write(tmp_path / f"{seed}.jsonl", dialogues(seed, 150))
        alone = made(folder, Storage.open(str(tmp_path / "out")), path, packing=False)
        wanted = collections.Counter(map(str, segments(alone.batch(range(len(alone))))))
        assert sum(wanted.values()) == 150
        packed = made(folder, Storage.open(str(tmp_path / "out")), path)
        assert len(packed) < 100
        count = len(packed)
        for workers in (1, 2, 3):
            # Batches of 6 do not fit into an epoch: what is left over comes first in the next one.
            steps = range(6 * count // 6)
            batches = [
                packed.batch(share(batch_indices(count, 6, seed, step), rank, workers))
                for step in steps
                for rank in range(workers)
            ]
            found = collections.Counter(str(segment) for arrays in batches for segment in segments(arrays))
            assert found == {segment: 6 * times for segment, times in wanted.items()}


def test_steps_round_up():
    assert [total_steps(10, 4, epochs, None) for epochs in (0.01, 1, 2, 2.1)] == [1, 3, 5, 6]
    assert total_steps(10, 4, 100, 7) == 7 and total_steps(30, 10, 0.1 * 3, None) == 1


# Kinds of rows and settings.


def test_rows_that_are_too_long(folder, tokenizer, tmp_path):
    rows = [
        *dialogues(0, 5),
        {"messages": [user("a"), answer("b" + " long" * 300)]},
        {"messages": [user("long " * 300), answer("b")]},
    ]
    path, out = write(tmp_path / "a.jsonl", rows), Storage.open(str(tmp_path / "out"))
    with pytest.raises(DataError, match=r"a.jsonl:6: has \d+ tokens, more than max_length 256; raise data.max_length, or set"):
        made(folder, out, path)
    assert len(made(folder, out, path, too_long="skip", packing=False)) == 5
    cut = made(folder, out, path, too_long="truncate", packing=False)
    assert len(cut) == 6, "the row whose answer is cut off is left out"
    text = learned(tokenizer, cut.batch([5]))[0][0]
    assert text.startswith("b long") and END not in text and (cut.batch([5])["position_ids"][0] == np.arange(256)).all()
    with pytest.raises(DataError, match=r"a.jsonl: no row has at most 8 tokens; raise max_length"):
        made(folder, out, path, too_long="skip", max_length=8)


def test_texts_are_cut_into_pieces_and_end(folder, tokenizer, tmp_path):
    rows = [{"text": "Short one."}, {"text": "A long text about tides. " * 40}]
    sequences = made(
        folder, Storage.open(str(tmp_path / "out")), write(tmp_path / "a.jsonl", rows), objective="pretrain", max_length=64
    )
    arrays = sequences.batch(range(len(sequences)))
    found = segments(arrays)
    assert "".join(sorted((tokenizer.decode(ids) for ids, _ in found), key=lambda text: (text.startswith("Short"), 0))) in (
        rows[1]["text"] + END + rows[0]["text"] + END
    )
    assert all(labels[0] == NO_LOSS and labels[1:] == ids[1:] for ids, labels in found)


def test_pairs(folder, tokenizer, tmp_path):
    rows = [
        {"prompt": [user("q")], "chosen": [answer("good")], "rejected": [answer("bad one")]},
        {"messages": [user("q"), answer("a"), user("r")], "chosen": answer("fine"), "rejected": "no"},
        {"prompt": "q", "chosen": "5", "rejected": "{}"},
    ]
    out = Storage.open(str(tmp_path / "out"))
    sequences = made(folder, out, write(tmp_path / "a.jsonl", rows), objective="dpo", packing=False, max_length=64)
    arrays = sequences.batch([0, 1, 2])
    assert sorted(arrays) == [
        f"{side}_{name}" for side in ("chosen", "rejected") for name in ("input_ids", "labels", "position_ids")
    ]
    sides = [
        learned(tokenizer, {name.partition("_")[2]: array for name, array in arrays.items() if name.startswith(side)})
        for side in ("chosen", "rejected")
    ]
    assert sides == [[[f"good{END}"], [f"fine{END}"], [f"5{END}"]], [[f"bad one{END}"], [f"no{END}"], [f"{{}}{END}"]]]
    for row, said in [
        ({"chosen": "a", "rejected": "b"}, "column 'prompt' is missing"),
        ({"prompt": "a", "rejected": "b"}, "column 'chosen' is missing"),
        ({"prompt": "a", "chosen": "b", "rejected": [user("c")]}, "'rejected' has no message with role assistant"),
    ]:
        with pytest.raises(DataError, match=rf"b.jsonl:1: {said}"):
            made(folder, out, write(tmp_path / "b.jsonl", [row]), objective="dpo", packing=False)


# Files.


def test_jsonl_and_parquet_give_the_same(folder, tmp_path):
    rows = dialogues(3, 40)
    out = Storage.open(str(tmp_path / "out"))
    wanted = made(folder, out, write(tmp_path / "a.jsonl", rows)).batch(range(5))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "nested.parquet", row_group_size=7)
    texts = [{"messages": json.dumps(row["messages"]), "language": "en"} for row in rows]
    pq.write_table(pa.Table.from_pylist(texts), tmp_path / "texts.parquet")
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress((tmp_path / "a.jsonl").read_bytes()))
    (tmp_path / "bom.jsonl").write_bytes(b"\xef\xbb\xbf" + (tmp_path / "a.jsonl").read_bytes().replace(b"\n", b"\r\n\n"))
    for name in ("nested.parquet", "texts.parquet", "a.jsonl.gz", "bom.jsonl"):
        found = made(folder, out, tmp_path / name).batch(range(5))
        assert all((found[key] == wanted[key]).all() for key in wanted), name


def test_folders_and_globs_are_read_in_the_order_of_names(folder, tokenizer, tmp_path, monkeypatch):
    lake = tmp_path / "lake"
    names = ["b.jsonl", "a/2.jsonl", "a/10.jsonl", "c/deep/x.jsonl", "c/y.parquet", "_SUCCESS", ".hidden/z.jsonl", "notes.txt"]
    for name in names:
        rows = [{"messages": [user("q"), answer(name)]}]
        if name.endswith("parquet"):
            pq.write_table(pa.Table.from_pylist(rows), lake / name)
        else:
            write(lake / name, rows)
    monkeypatch.chdir(tmp_path)
    out = Storage.open(str(tmp_path / "out"))
    for address, wanted in {
        "lake": ["a/10.jsonl", "a/2.jsonl", "b.jsonl", "c/deep/x.jsonl", "c/y.parquet"],
        f"file://{lake}": ["a/10.jsonl", "a/2.jsonl", "b.jsonl", "c/deep/x.jsonl", "c/y.parquet"],
        "lake/*.jsonl": ["b.jsonl"],
        "lake/**/*.jsonl": [".hidden/z.jsonl", "a/10.jsonl", "a/2.jsonl", "b.jsonl", "c/deep/x.jsonl"],
        f"{lake}/a/[0-9].jsonl": ["a/2.jsonl"],
        "*/?/*.parquet": ["c/y.parquet"],
    }.items():
        sequences = made(folder, out, address, packing=False)
        found = [answers[0].removesuffix(END) for answers in learned(tokenizer, sequences.batch(range(len(sequences))))]
        assert found == wanted, address
    for address in ("lake/none", "lake/*.csv", "dataset:assistant/nothing", "dataset:../../pyproject"):
        with pytest.raises(DataError, match=r"no file matches|no such data set"):
            made(folder, out, address)
    with pytest.raises(DataError, match=r"lake/notes.txt: is neither .jsonl nor .parquet"):
        made(folder, out, "lake/notes.txt")


def test_how_files_are_divided_changes_no_row(folder, tmp_path):
    rows = dialogues(4, 100)
    jsonl, table = write(tmp_path / "a.jsonl", rows), tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist(rows), table, row_group_size=9)
    out = Storage.open(str(tmp_path / "out"))
    for path in (jsonl, table):
        whole = made(folder, out, path, packing=False)
        for group_bytes in (1, 700, 4096):
            parts = made(folder, out, path, packing=False, group_bytes=group_bytes)
            assert (parts.batch(range(100))["input_ids"] == whole.batch(range(100))["input_ids"]).all()


def test_prepared_once(folder, tmp_path):
    path, out, said = write(tmp_path / "a.jsonl", dialogues(5, 30)), Storage.open(str(tmp_path / "out")), []
    data = DataConfig(train=(str(path),), max_length=200)

    def again(data: DataConfig = data) -> Any:
        return prepare(data, "sft", str(folder), out, "train", said.append)

    first = again()
    assert (
        not first.reused
        and first.bytes_read == path.stat().st_size
        and first.rows == 30
        and 0 < first.trained_tokens < first.tokens
    )
    stored = {name: out.read_bytes(f"{first.path}/{name}") for name in out.list(first.path)}
    path.touch()
    second = again()
    assert second.reused and second.bytes_read == 0 and second.path == first.path
    out.delete(f"{first.path}/index.json")  # as after a kill: the index comes last
    assert not again().reused
    assert {name: out.read_bytes(f"{first.path}/{name}") for name in out.list(first.path)} == stored
    assert again(data.model_copy(update={"seed": 9})).reused, "the seed decides the order alone"
    assert again(data.model_copy(update={"max_length": 256})).path != first.path
    write(path, dialogues(6, 30))
    assert again().path != first.path


def test_far_storage_gives_the_same_and_counts_what_it_reads(folder, tmp_path):
    path, far = write(tmp_path / "a.jsonl", dialogues(7, 60)), memory()
    near = made(folder, Storage.open(str(tmp_path / "out")), path)
    away = made(folder, far, path)
    for _ in range(2):
        here, there = near.batch([3, 0, 5]), away.batch([3, 0, 5])
        assert all((here[key] == there[key]).all() and here[key].dtype == np.int64 for key in here)
    assert near.bytes_read == away.bytes_read == 2 * 3 * 256 * 4
    with pytest.raises(IndexError):
        near.batch([len(near)])
    with pytest.raises(DataError, match=r"index.json: not found on this machine.*storage that all nodes share"):
        Sequences.open(far, "data/0")


# What is refused.

GOOD = {"messages": [user("q"), answer("a")]}
BAD = [
    ('{"messages": oops', r"is not JSON \(Expecting value, column 14\); write one object per line"),
    ("[1]", "must be a JSON object, found a list"),
    ({"text": "x"}, "column 'messages' is missing, found text; rename or add it"),
    ({"messages": []}, "'messages' must be a list of messages that is not empty, found an empty list"),
    ({"messages": "hello"}, "'messages' is a text that is not JSON; write a list of messages"),
    ({"messages": ["hello"]}, "message 1 must be an object with role and content, found a text"),
    ({"messages": [user("q")]}, "no message with role assistant"),
    ({"messages": [{"role": "bot", "content": "q"}]}, "message 1 has the unknown role 'bot'; use one of system, developer"),
    ({"messages": [user("q"), {"role": "assistant"}]}, r"message 2 \(assistant\) has no content"),
    ({"messages": [user("q"), answer("")]}, r"message 2 \(assistant\) is empty"),
    (
        {"messages": [{"role": "user", "content": 7}, answer("a")]},
        "message 1: content must be a text, or parts of type text, found a number",
    ),
    ({"messages": [user("q"), answer("a", weight=2)]}, "message 2 has weight 2; write 0 or 1"),
    ({"messages": [user("q"), answer("a", weight=0)]}, "every assistant message has weight 0"),
    ({"messages": [answer("a")]}, "begins with an assistant message"),
    ({"messages": [user("q"), answer("a", tool_calls=[{"name": "f"}])]}, "message 2: tool_calls must be a list of"),
    ({"messages": [user("q"), answer("a")], "tools": "x"}, "'tools': is a text that is not JSON"),
    ("\udcff", "byte 1 of the line is not UTF-8; convert the file to UTF-8"),
]


@pytest.mark.parametrize(("row", "said"), BAD)
def test_a_bad_row_is_named_with_file_and_line(folder, tmp_path, row, said):
    line = row if isinstance(row, str) else json.dumps(row)
    path = tmp_path / "a.jsonl"
    path.write_bytes("\n".join([json.dumps(GOOD)] * 20 + ["", line, json.dumps(GOOD)]).encode(errors="surrogateescape"))
    for group_bytes in (GROUP_BYTES, 150):
        with pytest.raises(DataError, match=rf"a.jsonl:22: {said}") as caught:
            made(folder, Storage.open(str(tmp_path / "out")), path, group_bytes=group_bytes)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "out" / "data").exists() or not list((tmp_path / "out" / "data").glob("*/index.json"))


def test_bad_parquet_is_named_with_file_and_row(folder, tmp_path):
    out = Storage.open(str(tmp_path / "out"))
    rows = [GOOD] * 30 + [{"messages": [user("q")]}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=4)
    for group_bytes in (GROUP_BYTES, 10):
        with pytest.raises(DataError, match=r"a.parquet: row 31: no message with role assistant"):
            made(folder, out, tmp_path / "a.parquet", group_bytes=group_bytes)
    pq.write_table(pa.table({"dialogue": ["x"], "n": [1]}), tmp_path / "b.parquet")
    with pytest.raises(DataError, match=r"b.parquet: row 1: column 'messages' is missing, found dialogue, n; rename"):
        made(folder, out, tmp_path / "b.parquet")
    broken = pa.Array.from_buffers(pa.string(), 1, [None, pa.py_buffer(np.array([0, 1], np.int32)), pa.py_buffer(b"\xff")])
    pq.write_table(pa.table({"messages": broken}), tmp_path / "c.parquet")
    with pytest.raises(DataError, match=r"c.parquet: row 1: holds bytes that are not UTF-8"):
        made(folder, out, tmp_path / "c.parquet")
    (tmp_path / "d.parquet").write_bytes(b"not parquet at all")
    with pytest.raises(DataError, match=r"d.parquet: is not a Parquet file, or is damaged"):
        made(folder, out, tmp_path / "d.parquet")
    pq.write_table(pa.table({"messages": pa.array([], pa.string())}), tmp_path / "e.parquet")
    with pytest.raises(DataError, match=r"e.parquet: has no rows; write some into it or take it out"):
        made(folder, out, tmp_path / "e.parquet")
    (tmp_path / "f.jsonl").write_text("\n\n")
    with pytest.raises(DataError, match=r"f.jsonl: has no rows"):
        made(folder, out, tmp_path / "f.jsonl")
    (tmp_path / "g.jsonl").write_text("")
    with pytest.raises(DataError, match=r"g.jsonl: the file is empty"):
        made(folder, out, tmp_path / "g.jsonl")


# The dry run.


def test_a_dry_run_reads_all_and_writes_nothing(folder, tmp_path):
    bad = [row if isinstance(row, str) else json.dumps(row) for row, _ in BAD[:-1]]
    path = write(tmp_path / "a.jsonl", dialogues(8, 50) + bad * 2 + dialogues(9, 50))
    train = {
        "name": "dry", "base": str(folder), "output": str(tmp_path / "runs"), "batch_size": 4, "epochs": 2,
        "data": {"train": [str(path), str(tmp_path / "none")], "validation": [str(path)], "max_length": 256},
        "scale": {"workers": [1, 2], "device": "cpu"}, "price": {"cpu_hour": 3600.0},
    }  # fmt: skip
    config = parse({"train": train}).train
    assert config is not None
    said: list[str] = []
    report = check(config, said.append)
    first, second = report.splits
    assert (first.rows, first.bad, len(first.mistakes), second.bad) == (100, 33, 20, 32) and report.bad == 65
    assert first.mistakes[0].endswith("no file matches; name .jsonl or .parquet files, a folder with some, or a glob")
    assert first.mistakes[1].startswith(f"{path}:51: is not JSON") and "train: and 13 more" in said
    encoder = Encoder(folder, "sft", 256, "error")
    encoded = encoder.encode([parse_row(row, "sft") for row in dialogues(8, 50) + dialogues(9, 50)])
    lengths = sorted(row.length for row in encoded)
    assert first.lengths == (lengths[49], lengths[89], lengths[98], lengths[99]) and first.tokens == sum(lengths)
    assert (
        report.steps == total_steps(first.sequences, 4, 2, None)
        and "assumed" in report.basis
        and "4,196,608 parameters" in report.basis
    )
    assert report.dollars == pytest.approx(report.seconds * 2) and not (tmp_path / "runs").exists()
    Storage.open(config.output).below("dry").write_bytes("log/metrics.jsonl", b'{"step": 1, "tokens_per_s": 50.0}\n' * 3)
    measured = check(config, said.append)
    processed = first.tokens * report.steps * 4 / first.sequences
    assert measured.seconds == pytest.approx(processed / 50) and "50 tokens/s that this run measured" in measured.basis

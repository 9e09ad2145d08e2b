"""Bad rows and files are named with file, line and what to do; the dry run lists them all."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from training_rows import answer, dialogues, made, user, write

from cluster.config import parse
from cluster.errors import DataError
from train.check import check
from train.data import total_steps
from train.dialogues import Encoder
from train.rows import parse as parse_row
from train.sources import GROUP_BYTES
from train.storage import Storage

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
def test_a_bad_row_is_named_with_file_and_line(chat_folder, tmp_path, row, said):
    line = row if isinstance(row, str) else json.dumps(row)
    path = tmp_path / "a.jsonl"
    path.write_bytes("\n".join([json.dumps(GOOD)] * 20 + ["", line, json.dumps(GOOD)]).encode(errors="surrogateescape"))
    for group_bytes in (GROUP_BYTES, 150):
        with pytest.raises(DataError, match=rf"a.jsonl:22: {said}") as caught:
            made(chat_folder, Storage.open(str(tmp_path / "out")), path, group_bytes=group_bytes)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "out" / "data").exists() or not list((tmp_path / "out" / "data").glob("*/index.json"))


def test_bad_parquet_is_named_with_file_and_row(chat_folder, tmp_path):
    out = Storage.open(str(tmp_path / "out"))
    rows = [GOOD] * 30 + [{"messages": [user("q")]}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=4)
    for group_bytes in (GROUP_BYTES, 10):
        with pytest.raises(DataError, match=r"a.parquet: row 31: no message with role assistant"):
            made(chat_folder, out, tmp_path / "a.parquet", group_bytes=group_bytes)
    pq.write_table(pa.table({"dialogue": ["x"], "n": [1]}), tmp_path / "b.parquet")
    with pytest.raises(DataError, match=r"b.parquet: row 1: column 'messages' is missing, found dialogue, n; rename"):
        made(chat_folder, out, tmp_path / "b.parquet")
    broken = pa.Array.from_buffers(pa.string(), 1, [None, pa.py_buffer(np.array([0, 1], np.int32)), pa.py_buffer(b"\xff")])
    pq.write_table(pa.table({"messages": broken}), tmp_path / "c.parquet")
    with pytest.raises(DataError, match=r"c.parquet: row 1: holds bytes that are not UTF-8"):
        made(chat_folder, out, tmp_path / "c.parquet")
    (tmp_path / "d.parquet").write_bytes(b"not parquet at all")
    with pytest.raises(DataError, match=r"d.parquet: is not a Parquet file, or is damaged"):
        made(chat_folder, out, tmp_path / "d.parquet")
    pq.write_table(pa.table({"messages": pa.array([], pa.string())}), tmp_path / "e.parquet")
    with pytest.raises(DataError, match=r"e.parquet: has no rows; write some into it or take it out"):
        made(chat_folder, out, tmp_path / "e.parquet")
    (tmp_path / "f.jsonl").write_text("\n\n")
    with pytest.raises(DataError, match=r"f.jsonl: has no rows"):
        made(chat_folder, out, tmp_path / "f.jsonl")
    (tmp_path / "g.jsonl").write_text("")
    with pytest.raises(DataError, match=r"g.jsonl: the file is empty"):
        made(chat_folder, out, tmp_path / "g.jsonl")


def test_a_dry_run_reads_all_and_writes_nothing(chat_folder, tmp_path):
    bad = [row if isinstance(row, str) else json.dumps(row) for row, _ in BAD[:-1]]
    path = write(tmp_path / "a.jsonl", dialogues(8, 50) + bad * 2 + dialogues(9, 50))
    train = {
        "name": "dry", "base": str(chat_folder), "output": str(tmp_path / "runs"), "batch_size": 4, "epochs": 2,
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
    encoder = Encoder(chat_folder, "sft", 256, "error")
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

"""From files to sequences: formats, folders and globs, how files are divided, reuse, and storage elsewhere."""

from __future__ import annotations

import gzip
import json
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from training_rows import END, answer, dialogues, learned, made, memory, user, write

from cluster.errors import DataError
from cluster.train_config import DataConfig
from train.data import Sequences, prepare
from train.storage import Storage


def test_jsonl_and_parquet_give_the_same(chat_folder, tmp_path):
    rows = dialogues(3, 40)
    out = Storage.open(str(tmp_path / "out"))
    wanted = made(chat_folder, out, write(tmp_path / "a.jsonl", rows)).batch(range(5))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "nested.parquet", row_group_size=7)
    texts = [{"messages": json.dumps(row["messages"]), "language": "en"} for row in rows]
    pq.write_table(pa.Table.from_pylist(texts), tmp_path / "texts.parquet")
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress((tmp_path / "a.jsonl").read_bytes()))
    (tmp_path / "bom.jsonl").write_bytes(b"\xef\xbb\xbf" + (tmp_path / "a.jsonl").read_bytes().replace(b"\n", b"\r\n\n"))
    for name in ("nested.parquet", "texts.parquet", "a.jsonl.gz", "bom.jsonl"):
        found = made(chat_folder, out, tmp_path / name).batch(range(5))
        assert all((found[key] == wanted[key]).all() for key in wanted), name


def test_folders_and_globs_are_read_in_the_order_of_names(chat_folder, chat_tokenizer, tmp_path, monkeypatch):
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
        sequences = made(chat_folder, out, address, packing=False)
        found = [answers[0].removesuffix(END) for answers in learned(chat_tokenizer, sequences.batch(range(len(sequences))))]
        assert found == wanted, address
    for address in ("lake/none", "lake/*.csv", "dataset:assistant/nothing", "dataset:../../pyproject"):
        with pytest.raises(DataError, match=r"no file matches|no such data set"):
            made(chat_folder, out, address)
    with pytest.raises(DataError, match=r"lake/notes.txt: is neither .jsonl nor .parquet"):
        made(chat_folder, out, "lake/notes.txt")


def test_how_files_are_divided_changes_no_row(chat_folder, tmp_path):
    rows = dialogues(4, 100)
    jsonl, table = write(tmp_path / "a.jsonl", rows), tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist(rows), table, row_group_size=9)
    out = Storage.open(str(tmp_path / "out"))
    for path in (jsonl, table):
        whole = made(chat_folder, out, path, packing=False)
        for group_bytes in (1, 700, 4096):
            parts = made(chat_folder, out, path, packing=False, group_bytes=group_bytes)
            assert (parts.batch(range(100))["input_ids"] == whole.batch(range(100))["input_ids"]).all()


def test_prepared_once(chat_folder, tmp_path):
    path, out, said = write(tmp_path / "a.jsonl", dialogues(5, 30)), Storage.open(str(tmp_path / "out")), []
    data = DataConfig(train=(str(path),), max_length=200)

    def again(data: DataConfig = data) -> Any:
        return prepare(data, "sft", str(chat_folder), out, "train", said.append)

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


def test_far_storage_gives_the_same_and_counts_what_it_reads(chat_folder, tmp_path):
    path, far = write(tmp_path / "a.jsonl", dialogues(7, 60)), memory()
    near = made(chat_folder, Storage.open(str(tmp_path / "out")), path)
    away = made(chat_folder, far, path)
    for _ in range(2):
        here, there = near.batch([3, 0, 5]), away.batch([3, 0, 5])
        assert all((here[key] == there[key]).all() and here[key].dtype == np.int64 for key in here)
    assert near.bytes_read == away.bytes_read == 2 * 3 * 256 * 4
    with pytest.raises(IndexError):
        near.batch([len(near)])
    with pytest.raises(DataError, match=r"index.json: not found on this machine.*storage that all nodes share"):
        Sequences.open(far, "data/0")

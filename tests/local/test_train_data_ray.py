"""Preparation through Ray Data gives what one process gives: the same files, and the same words for the same mistake."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster import embedded
from cluster.config import parse
from cluster.errors import DataError, TrainError
from cluster.train_config import DataConfig
from train.check import check
from train.data import Prepared, Sequences, prepare
from train.storage import Storage

GROUP = 4096


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return embedded.build("embedded:random", tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def lake(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of several sizes: some share a task, one is divided among several."""
    lake = tmp_path_factory.mktemp("lake")
    for name, rows in (("a", 3), ("b", 5), ("c", 120), ("d", 20)):
        texts = [f"Order {name}{row} is on its way." for row in range(rows)]
        lines = (dialogue(f"Where is order {name}{row}?", text) for row, text in enumerate(texts))
        (lake / f"{name}.jsonl").write_text("".join(lines))
    return lake


@pytest.fixture(scope="module")
def in_process(folder: Path, lake: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Files of the same preparation, made before there is a Ray."""
    into = Storage.open(str(tmp_path_factory.mktemp("alone")))
    return files(into, prepared(folder, lake, into))


@pytest.fixture(scope="module")
def ray_(in_process: dict[str, bytes]) -> Iterator[Any]:
    import ray

    # Ray's sockets need a short path.
    with tempfile.TemporaryDirectory(prefix="tpd", ignore_cleanup_errors=True) as home:
        ray.init(num_cpus=2, include_dashboard=False, _temp_dir=home, object_store_memory=100 * 2**20, logging_level="ERROR")
        try:
            yield ray
        finally:
            ray.shutdown()


def dialogue(question: str, answer: str) -> str:
    return json.dumps({"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}) + "\n"


def prepared(folder: Path, lake: Path, into: Storage) -> Prepared:
    data = DataConfig(train=(str(lake),), max_length=128)
    return prepare(data, "sft", str(folder), into, "train", lambda line: None, GROUP)


def files(into: Storage, made: Prepared) -> dict[str, bytes]:
    return {name: into.read_bytes(f"{made.path}/{name}") for name in into.list(made.path)}


def test_the_same_files_as_in_one_process(ray_, folder, lake, in_process, tmp_path):
    into = Storage.open(str(tmp_path))
    made = prepared(folder, lake, into)
    found = files(into, made)
    assert found == in_process and len(found) >= 4, sorted(found)
    assert made.rows == 148 and made.bytes_read == sum(path.stat().st_size for path in lake.iterdir())
    assert prepared(folder, lake, into).reused
    assert len(Sequences.open(into, made.path)) == made.sequences


def test_the_first_mistake_is_the_one_that_is_told(ray_, folder, lake, tmp_path):
    bad = shutil.copytree(lake, tmp_path / "lake")
    lines = (bad / "c.jsonl").read_text().splitlines()
    lines[70], lines[100] = "{", '{"messages": 5}'
    (bad / "c.jsonl").write_text("\n".join(lines))
    (bad / "d.jsonl").write_text("[]\n")
    into = Storage.open(str(tmp_path / "out"))
    with pytest.raises(DataError, match=r"c.jsonl:71: is not JSON"):
        prepared(folder, bad, into)
    assert not any(into.exists(f"data/{name}/index.json") for name in into.list("data"))
    train = {
        "name": "dry", "base": str(folder), "output": str(tmp_path / "runs"), "data": {"train": [str(bad)]},
        "scale": {"device": "cpu"},
    }  # fmt: skip
    config = parse({"train": train}).train
    assert config is not None
    assert check(config, lambda line: None, folder).bad == 3


def test_storage_that_fails_in_a_task_is_one_line(ray_, folder, lake, tmp_path):
    into = Storage.open(str(tmp_path))
    made = prepared(folder, lake, into)
    into.delete(made.path)
    (tmp_path / made.path).write_text("in the way")
    with pytest.raises(TrainError, match=r"000000-000.npy: cannot be written: .*; check train.output") as caught:
        prepared(folder, lake, into)
    assert "\n" not in str(caught.value)

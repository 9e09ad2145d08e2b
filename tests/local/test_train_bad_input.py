"""Mistakes of a person, through the command line: one line that says what, where and what to do, status 2, nothing written, and
what an earlier run has left stays whole. Most in this process, with `--check`, which needs no Ray.
"""

from __future__ import annotations

import json
import resource
from pathlib import Path
from typing import Any

import pytest
import yaml
from train_cluster import command, descendants, done, newest_step, title, until
from train_workers import section, write_dialogues

from train import checkpoint
from train.__main__ import main
from train.storage import Storage

GOOD = {"messages": [{"role": "user", "content": "Where is it?"}, {"role": "assistant", "content": "On its way."}]}
LONG = {"messages": [{"role": "user", "content": "Where? " * 300}, {"role": "assistant", "content": "Here."}]}


def written(folder: Path, **changes: Any) -> Path:
    """A configuration over `chats.jsonl` in the same folder."""
    train = section("bad", folder / "out", str(folder / "chats.jsonl"))
    for key, value in changes.items():
        train[key] = {**train[key], **value} if isinstance(train.get(key), dict) else value
    path = folder / "bad.yaml"
    path.write_text(yaml.safe_dump({"run_dir": str(folder / "run"), "train": train}))
    return path


def errors(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("error: ")]


ROWS: dict[str, tuple[str, str]] = {
    "no JSON": (json.dumps(GOOD) + '\n{"messages": oops\n', "chats.jsonl:2: is not JSON"),
    "a missing column": (json.dumps({"text": "x"}), "chats.jsonl:1: column 'messages' is missing, found text; rename or add it"),
    "an empty file": ("", "chats.jsonl: the file is empty; write rows into it or take it out"),
    "a row that is too long": (json.dumps(LONG), "chats.jsonl:1: has "),
    "no answer": (json.dumps({"messages": GOOD["messages"][:1]}), "chats.jsonl:1: no message with role assistant"),
}


@pytest.mark.parametrize("rows", ROWS)
def test_rows(rows, tmp_path, capsys):
    text, said = ROWS[rows]
    (tmp_path / "chats.jsonl").write_text(text)
    assert main(["sft", str(written(tmp_path)), "--check"]) == 2
    (line,) = errors(capsys.readouterr().err)
    assert said in line
    if rows == "a row that is too long":
        assert "more than max_length 48; raise data.max_length" in line
    assert not (tmp_path / "out").exists()


def test_several_mistakes_are_counted_and_the_first_is_named(tmp_path, capsys):
    (tmp_path / "chats.jsonl").write_text("oops\n" * 3)
    assert main(["sft", str(written(tmp_path)), "--check"]) == 2
    printed = capsys.readouterr()
    (line,) = errors(printed.err)
    assert line.startswith("error: 3 mistakes in the data, see above; the first: ") and "chats.jsonl:1: " in line
    assert "chats.jsonl:3: is not JSON" in printed.out


SETTINGS: dict[str, tuple[list[str], str]] = {
    "stage and offload": (["zero.offload_parameters=cpu"], "train.zero: offload_parameters needs stage 3, found stage 1"),
    "nvme without a folder": (["zero.stage=3", "zero.offload_optimizer=nvme"], "nvme needs nvme_path, a folder on a local disk"),
    "precision and device": (["precision=fp16"], "train: precision fp16 needs device gpu; use bf16 or fp32 on cpu"),
    "batch and workers": (["scale.workers=3"], "train: batch_size 4 cannot be divided among 3 workers"),
    "batch and elastic workers": (["scale.workers=[1, 3]"], "train: batch_size 4 cannot be divided among 3 workers"),
    "batch and micro batch": (["micro_batch_size=3"], "which micro_batch_size 3 does not divide"),
    "a field twice": (["deepspeed_overrides.gradient_clipping=2"], "'gradient_clipping' is set by train.optimizer.clip"),
    "no base": (["base=./none"], "train.base './none': no such folder on this machine"),
    "no adapter's target": (["lora.targets=every"], "train.lora.targets"),
    "a typo": (["optimizer.learnin_rate=1"], "train.optimizer.learnin_rate: unknown key"),
    "no data": (["data.train=[none.jsonl]"], "none.jsonl: no file matches; name .jsonl or .parquet files, a folder with some"),
}


@pytest.mark.parametrize("settings", SETTINGS)
def test_settings(settings, tmp_path, capsys):
    changes, said = SETTINGS[settings]
    write_dialogues(tmp_path / "chats.jsonl", 8)
    overrides = [part for change in changes for part in ("--set", f"train.{change}")]
    assert main(["sft", str(written(tmp_path)), *overrides, "--check"]) == 2
    printed = capsys.readouterr().err
    assert said in printed and len(errors(printed)) == 1 and "Traceback" not in printed
    assert not (tmp_path / "out").exists()


def test_a_full_disk_and_later_a_bad_row_leave_the_checkpoints(tmp_path):
    write_dialogues(tmp_path / "chats.jsonl", 40)
    file = written(tmp_path, checkpoint={"every_steps": 5, "keep_last": 2}, max_steps=100_000, epochs=100_000)
    home = tmp_path / "out" / "bad"
    first = command("sft", str(file))
    until("a checkpoint", lambda: newest_step(home) >= 5, process=first)
    (supervisor,) = [pid for pid in descendants(first.pid) if title(pid).startswith("ray::Supervisor")]
    # The process that trains may write a mebibyte into one file: no checkpoint fits any more, its logs do.
    resource.prlimit(supervisor, resource.RLIMIT_FSIZE, (2**20, 2**20))
    status, _, text = done(first)
    (line,) = errors(text)
    assert status == 2 and "checkpoint not written" in line and "no space left to write it; free some" in line
    kept = whole(home)
    assert kept >= 5 and kept % 5 == 0

    with (tmp_path / "chats.jsonl").open("a") as rows:
        rows.write("oops\n")
    status, _, text = done(command("sft", str(file)))
    (line,) = errors(text)
    assert status == 2 and "chats.jsonl:41: is not JSON" in line and "Traceback" not in text
    assert whole(home) == kept


def whole(home: Path) -> int:
    """Step of the newest checkpoint, all of which can be read."""
    run = Storage.open(str(home))
    found = checkpoint.latest(run)
    assert found is not None and all(name for name, _ in checkpoint.read(run, found))
    return found.step

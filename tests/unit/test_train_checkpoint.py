"""Checkpoints: whole or not there, what is kept, and what a killed or failed save leaves."""

import resource
import threading

import pytest
import torch

from cluster.errors import DataError, TrainError
from cluster.train_config import CheckpointConfig
from train import checkpoint
from train.checkpoint import Checkpoint, Writer
from train.storage import Storage


def made(step: int, validation_loss: float | None = None) -> Checkpoint:
    return Checkpoint(step=step, updates=step, workers=2, model={"base": "x"}, validation_loss=validation_loss)


def writers(run: Storage, attempt: str = "a", **config) -> list[Writer]:
    settings = CheckpointConfig(**config)
    return [Writer(run, settings, rank, 2, attempt, lambda whole: None) for rank in range(2)]


def save(both: list[Writer], item: Checkpoint) -> None:
    for rank, writer in enumerate(both):
        writer.save(item, {f"weight:{rank}": torch.full((3,), float(item.step))})
    for writer in both:
        writer.wait()


def test_two_workers_write_one_checkpoint(tmp_path):
    run = Storage.open(str(tmp_path))
    save(writers(run), made(5))
    (found,) = checkpoint.stored(run)
    assert (found.step, found.workers, len(found.files)) == (5, 2, 2) and found.bytes > 0
    assert {name: tensor.tolist() for name, tensor in checkpoint.read(run, found)} == {
        "weight:0": [5.0] * 3, "weight:1": [5.0] * 3,
    }  # fmt: skip


def test_a_remote_filesystem_holds_the_same(tmp_path):
    run = Storage.open(f"file://{tmp_path}/remote")
    save(writers(run, asynchronous=True), made(5))
    found = checkpoint.latest(run)
    assert found is not None and dict(checkpoint.read(run, found)).keys() == {"weight:0", "weight:1"}


def test_an_index_of_an_older_version_is_read(tmp_path):
    run = Storage.open(str(tmp_path))
    save(writers(run), made(5))
    index = f"checkpoints/step-00000005/{checkpoint.INDEX}"
    run.write_json(index, {**run.read_json(index), "extra": {}})
    assert [item.step for item in checkpoint.stored(run)] == [5]


def test_without_the_other_workers_mark_there_is_no_checkpoint(tmp_path):
    run = Storage.open(str(tmp_path))
    both = writers(run)
    save(both, made(5))
    both[0].save(made(6), {"weight:0": torch.zeros(3)})  # worker 1 was killed: worker 0 waits for it
    assert [item.step for item in checkpoint.stored(run)] == [5]
    both = writers(run, "b")
    save(both, made(6))
    found = checkpoint.latest(run)
    assert found is not None and found.step == 6 and all(name.startswith("b-") for name in found.files)
    assert dict(checkpoint.read(run, found))["weight:0"].tolist() == [6.0] * 3


def test_last_and_best_are_kept(tmp_path):
    run = Storage.open(str(tmp_path))
    both = writers(run, keep_last=2, keep_best=1)
    for step, loss in enumerate([3.0, 1.0, 2.0, 4.0, 5.0], start=1):
        save(both, made(step, loss))
    assert [item.step for item in checkpoint.stored(run)] == [2, 4, 5]
    assert sorted(run.list("checkpoints")) == ["step-00000002", "step-00000004", "step-00000005"]


def test_what_is_kept_is_a_pure_choice():
    items = [made(1, 0.5), made(2), made(3, 0.4), made(4, 0.6), made(5)]

    def gone(**config):
        return [item.step for item in checkpoint.to_remove(items, CheckpointConfig(**config))]

    assert gone(keep_last=1, keep_best=0) == [1, 2, 3, 4]
    assert gone(keep_last=2, keep_best=2) == [2]
    assert gone(keep_last=9, keep_best=0) == []


def test_what_a_killed_save_left_is_removed_with_the_next_one(tmp_path):
    run = Storage.open(str(tmp_path))
    left = tmp_path / "checkpoints" / "step-00000003"
    left.mkdir(parents=True)
    (left / "dead-00000-000.safetensors").write_bytes(b"half")
    assert checkpoint.latest(run) is None
    save(writers(run), made(4))
    assert run.list("checkpoints") == ["step-00000004"]


def test_a_failed_save_is_told_and_leaves_the_older_one(tmp_path):
    run = Storage.open(str(tmp_path))
    both = writers(run)
    save(both, made(1))
    (tmp_path / "checkpoints" / "step-00000002").write_text("in the way")
    both[1].save(made(2), {"weight:1": torch.zeros(3)})
    with pytest.raises(TrainError, match="checkpoint not written"):
        both[1].wait()
    with pytest.raises(TrainError, match="checkpoint not written"):
        both[1].check()
    assert [item.step for item in checkpoint.stored(run)] == [1]


def test_a_broken_file_is_named(tmp_path):
    run = Storage.open(str(tmp_path))
    save(writers(run), made(1))
    found = checkpoint.latest(run)
    assert found is not None
    (tmp_path / "checkpoints" / found.folder / found.files[0]).write_bytes(b"not tensors")
    with pytest.raises(DataError, match="missing or broken"):
        list(checkpoint.read(run, found))


def test_writing_does_not_wait_when_asynchronous(tmp_path):
    run = Storage.open(str(tmp_path))
    told = threading.Event()
    writer = Writer(run, CheckpointConfig(), 0, 2, "a", lambda whole: told.set())
    writer.save(made(1), {"weight:0": torch.zeros(3)})  # returns although worker 1 has not written
    assert not told.is_set() and checkpoint.latest(run) is None
    Writer(run, CheckpointConfig(), 1, 2, "a", lambda whole: None).save(made(1), {"weight:1": torch.zeros(3)})
    assert told.wait(10)


def test_large_states_are_several_files(tmp_path):
    run = Storage.open(str(tmp_path))
    writer = Writer(run, CheckpointConfig(asynchronous=False), 0, 1, "a", lambda whole: None, file_bytes=100)
    writer.save(made(1), {str(number): torch.full((20,), float(number)) for number in range(3)})
    found = checkpoint.latest(run)
    assert found is not None and len(found.files) == 3
    assert {name: tensor[0].item() for name, tensor in checkpoint.read(run, found)} == {"0": 0.0, "1": 1.0, "2": 2.0}


def test_a_full_disk_is_one_line_and_leaves_the_older_one(tmp_path):
    run = Storage.open(str(tmp_path))
    both = writers(run)
    save(both, made(1))
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limit[1]))  # no file may grow further, as on a full disk
    try:
        both[1].save(made(2), {"weight:1": torch.zeros(100_000)})
        with pytest.raises(TrainError) as caught:
            both[1].wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert "no space left" in str(caught.value) and "\n" not in str(caught.value)
    assert [item.step for item in checkpoint.stored(run)] == [1]
    save(writers(run, "b"), made(2))
    assert [item.step for item in checkpoint.stored(run)] == [1, 2]

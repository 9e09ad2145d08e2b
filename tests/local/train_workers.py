"""The workers of training runs without Ray: `python train_workers.py PLAN RANK WORKERS PORT`, one process per rank.

PLAN is JSON: a list of `train` sections. Each is prepared, trained to its end by the loop that Ray Train runs, and the lines
that worker 0 tells its supervisor are written beside the run as `told.json`. One process does them all, so that a test of many
kinds of runs pays for its imports once. Also holds what the tests start them with.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


class Recorder:
    """Takes what a supervisor takes, and keeps the lines of metrics."""

    def __init__(self) -> None:
        self.lines: list[dict[str, Any]] = []

    def __getattr__(self, name: str) -> Any:
        return _Method(self, name)


class _Method:
    def __init__(self, recorder: Recorder, name: str) -> None:
        self.recorder, self.name = recorder, name

    def options(self, **options: Any) -> _Method:
        return self

    def remote(self, *values: Any) -> None:
        if self.name == "tell":
            self.recorder.lines += values[0]
        elif self.name == "measured":
            self.recorder.lines[-1]["validation_loss"] = values[1]


def write_dialogues(path: Path, count: int = 48, preferences: bool = False) -> str:
    """A small data set; returns its path."""
    things = ("order", "parcel", "refund", "invoice", "delivery", "address", "password", "account")
    with path.open("w") as file:
        for number in range(count):
            thing = things[number % len(things)]
            asked = {"role": "user", "content": f"Where is my {thing} {number}?"}
            good = {"role": "assistant", "content": f"Your {thing} {number} will come tomorrow."}
            bad = {"role": "assistant", "content": f"I do not know what became of {number}."}
            row = {"prompt": [asked], "chosen": [good], "rejected": [bad]} if preferences else {"messages": [asked, good]}
            file.write(json.dumps(row) + "\n")
    return str(path)


def section(name: str, output: Path, rows: str, **changes: Any) -> dict[str, Any]:
    """A `train` section that takes seconds on a CPU."""
    base: dict[str, Any] = {
        "name": name,
        "base": "scratch:chat",
        "output": str(output),
        "data": {"train": [rows], "max_length": 48},
        "batch_size": 4,
        "max_steps": 6,
        "epochs": 100,
        "precision": "fp32",
        "optimizer": {"learning_rate": 1e-3, "weight_decay": 0.1, "clip": 1.0},
        "checkpoint": {"every_steps": 2, "keep_last": 9},
        "scale": {"device": "cpu", "workers": 1, "threads_per_worker": 1},
    }
    for key, value in changes.items():
        base[key] = {**base[key], **value} if isinstance(base.get(key), dict) else value
    return base


def run_workers(plan: list[dict[str, Any]], workers: int, folder: Path) -> list[list[dict[str, Any]]]:
    """Do the runs one after the other on so many processes; the metrics lines of each."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "plan.json"
    file.write_text(json.dumps(plan))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, str(Path(__file__)), str(file)]
    environ = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    started = [
        subprocess.Popen(
            [*command, str(rank), str(workers), str(port)],
            env=environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(workers)
    ]
    try:
        printed = [process.communicate(timeout=400)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    failed = [text for process, text in zip(started, printed, strict=True) if process.returncode != 0]
    assert not failed, "\n".join(text[-4000:] for text in failed)
    return [json.loads((Path(item["output"]) / item["name"] / "told.json").read_text()) for item in plan]


def main(plan: list[dict[str, Any]], rank: int, workers: int, port: int) -> None:
    """One worker."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_RANK": str(rank)}
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(workers), "DS_ACCELERATOR": "cpu"}
    import torch.distributed as distributed

    from cluster.train_config import TrainConfig
    from train.data import prepare
    from train.loop import Task, Worker
    from train.models import base_folder
    from train.storage import Storage

    distributed.init_process_group("gloo")
    for item in plan:
        config = TrainConfig.model_validate(item)
        run = Storage.open(config.output).below(config.name)
        paths: list[str | None] = [None, None]
        if rank == 0:
            base = str(base_folder(config.base))
            paths[0] = prepare(config.data, config.objective, base, run, "train", print).path
            if config.data.validation:
                paths[1] = prepare(config.data, config.objective, base, run, "validation", print).path
        distributed.broadcast_object_list(paths, src=0)
        recorder = Recorder()
        task = Task(item, str(paths[0]), paths[1], recorder)
        Worker(config, task, rank, workers, workers, time.monotonic()).run()
        if rank == 0:
            run.write_json("told.json", recorder.lines)
        distributed.barrier()
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()), *map(int, sys.argv[2:]))

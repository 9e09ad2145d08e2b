"""The training comparison without training: arithmetic, commands, what the baselines and the report read."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench import report, targets, train_arms, train_figures, train_suite
from bench.train_baseline import Batches
from cluster.errors import ConfigError
from train.data import batch_indices, share
from train.losses import lengths, trimmed
from train.packing import TRAINED, Packer, flag, unpack

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "configs" / "bench-train.yaml"
ARMS = ("plain", "deepspeed-2", "ours-2", "ours-1")
MODEL = {"parameters": 4_000_000, "multiplied": 4_000_000, "layers": 4, "attention_width": 256}


def plan_of(*overrides: str, workers: tuple[int, ...] = (1, 2)) -> train_suite.TrainSuitePlan:
    return train_suite.TrainSuitePlan(CONFIG, overrides, 2, workers, True)


def rounds_of(speeds: dict[str, float], pairs: int = 2) -> list[dict[str, Any]]:
    found = []
    for number in range(1, pairs + 1):
        for arm, speed in speeds.items():
            r = {"arm": arm, "round": number, "startup": {"imports": 1.0, "first_step": 0.5}, "first_loss": 8.0, "gpu_mib": None}
            r["busy_cores"] = {"raylet": 0.1}
            r |= {"tokens_per_s": speed * number, "step_ms_p50": 10.0, "step_ms_p90": 11.0, "memory_mib": 100.0}
            found.append(r | {"largest_process_mib": 90.0, "first_step_s": 1.5} | ({"model": MODEL} if arm == "plain" else {}))
    return found


def test_speed_is_that_of_the_median_step_after_the_warm_up():
    found = train_figures.steady([9.0, 1.0, 2.0, 4.0], [7, 100, 100, 100], 1)
    assert (found["tokens_per_s"], found["step_ms_p50"], found["tokens_per_step"]) == (50.0, 2000.0, 100.0)
    with pytest.raises(ValueError, match="0 times"):
        train_figures.steady([1.0], [1], 1)


def test_flops_and_their_share_of_a_gpu():
    model = {"multiplied": 1_000_000_000, "layers": 10, "attention_width": 1000}
    assert train_figures.flops_per_token(model, 1000) == 6e9 + 12 * 10 * 1000 * 1000
    assert train_figures.peak_tflops(["NVIDIA H200, 143771 MiB"], "bf16") == 989.0
    assert train_figures.peak_tflops(["NVIDIA H100 PCIe, 81559 MiB"], "bf16") == 756.0
    assert train_figures.peak_tflops(["NVIDIA L40S"], "bf16") == 362.0
    assert train_figures.peak_tflops(["NVIDIA H200"], "fp32") is None and train_figures.peak_tflops([], "bf16") is None
    assert train_figures.mfu(1e5, 5e9, 2, 1000.0) == pytest.approx(0.25) and train_figures.mfu(1e5, 5e9, 2, None) is None


def test_scaling_and_target_come_from_pairs():
    medians = train_figures.medians(rounds_of({"plain": 100, "deepspeed-2": 100, "ours-2": 95, "ours-1": 50}), ARMS)
    efficiency = train_figures.scaling(medians, 1, 2)
    assert efficiency is not None and efficiency["median"] == pytest.approx(0.95)
    assert train_figures.scaling(medians, 2, 2) is None
    assert [t["result"] for t in targets.train(2, 0.95, True) + targets.train(2, 0.89, True)] == ["pass", "miss"]
    assert targets.train(2, 0.95, False)[0]["result"] == "not measured"


def test_arms_do_the_same_work():
    bench = train_suite.bench_of(plan_of("train.micro_batch_size=2", "train.scale.threads_per_worker=3", "run_dir=/tmp/x"))
    assert train_arms.names((1, 2)) == ARMS
    made = train_arms.Made("/m", "/d", {"train_batch_size": 8})
    plain = train_arms.baseline_plan(bench, made, False, Path("/r"))
    workers = train_arms.baseline_plan(bench, made, True, Path("/r"))
    assert (plain["micro_batch_size"], plain["threads"], plain["deepspeed"]) == (4, 6, None)
    assert (workers["micro_batch_size"], workers["threads"], workers["deepspeed"]) == (2, 3, {"train_batch_size": 8})
    ours = train_arms.ours_command(bench, "n", 1, 24)
    assert ours[1:4] == ["-m", "train", "sft"]
    assert {"--set=train.micro_batch_size=2", "--set=train.scale.threads_per_worker=3", "--set=train.scale.workers=1"} <= set(
        ours
    )
    launched = train_arms.baseline_command(Path("/p"), 2)
    assert launched[:5] == [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "2"]


@pytest.mark.parametrize(
    ("overrides", "workers", "text"),
    [
        (("train.lora.rank=4",), (1, 2), "leave out lora"),
        ((), (1, 3), "cannot be divided"),
        (("train.micro_batch_size=8", "train.scale.workers=1"), (1, 2), "micro_batch_size 8 does not divide"),
    ],
)
def test_what_cannot_be_compared_is_refused(overrides: tuple[str, ...], workers: tuple[int, ...], text: str):
    with pytest.raises(ConfigError, match=text):
        train_suite.bench_of(plan_of(*overrides, workers=workers))


def test_baselines_read_the_batches_of_our_loop(tmp_path: Path):
    """The baselines read prepared sequences by themselves; what they make of them is what our loop makes of them."""
    draw = np.random.default_rng(1)
    packer = Packer(32, 0, True)
    rows = []
    for _ in range(40):
        ids = draw.integers(1, 500, draw.integers(6, 30))
        rows += list(packer.add(flag(ids, draw.random(len(ids)) < 0.6)))
    rows += list(packer.finish())
    flagged = np.stack([np.atleast_2d(row) for row in rows])
    half = len(flagged) // 2
    np.save(tmp_path / "a.npy", flagged[:half])
    np.save(tmp_path / "b.npy", flagged[half:])
    (tmp_path / "index.json").write_text(json.dumps({"shards": [["a.npy", half], ["b.npy", len(flagged) - half]]}))
    assert (flagged & TRAINED).any()
    steps = len(flagged) // 4 + 2  # into the second epoch, in whose first batch ours may hold the end of the first
    plan = {"data": str(tmp_path), "batch_size": 4, "steps": steps, "seed": 5}
    for step in range(steps):
        wanted = batch_indices(len(flagged), 4, 5, step)
        assert Batches(plan, 0, 2).tokens(step) == lengths(trimmed(unpack(flagged[wanted, 0]))["labels"]).sum()
        for rank in range(2):
            (part,) = Batches(plan, rank, 2).parts(step, 2)
            expected = trimmed(unpack(flagged[share(wanted, rank, 2), 0]))
            for tensor, name in zip(part, ("input_ids", "labels", "position_ids"), strict=True):
                assert np.array_equal(tensor.numpy(), expected[name])


def test_a_runs_folder_is_read(tmp_path: Path):
    (tmp_path / "log").mkdir()
    lines = [{"step": n, "loss": 9.0 - n, "tokens_per_s": 100.0 / n, "step_s": float(n)} for n in (1, 2, 2)]
    (tmp_path / "log" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    book = {"attempts": [{"at": 110.0, "workers": 2}], "startup": {"ray": 4.0, "imports": 5.0, "first_step": 0.5}}
    (tmp_path / "run.json").write_text(json.dumps(book))
    found = train_arms.read_ours(tmp_path, 100.0, 1)
    assert (found["tokens_per_s"], found["first_step_s"], found["first_loss"]) == (50.0, 10.5, 8.0)
    assert found["startup"]["other"] == pytest.approx(1.0)


def test_memory_counts_what_a_command_started():
    together, largest, cpu_s = train_arms.look(os.getpid())
    assert together > 5 and largest > 5 and sum(cpu_s.values()) > 0
    titles = [
        "ray::RayTrainWorker x",
        "/venv/bin/python -u -m train sft x",
        "/v/python3 /w/bench/train_baseline.py p",
        "/r/raylet -a",
    ]
    assert [train_arms.title_of(title) for title in titles] == ["ray::RayTrainWorker", "train", "train_baseline.py", "raylet"]


def test_busy_cores_are_those_between_the_steps():
    samples = [(0.0, {"a": 9.0}), (10.0, {"a": 10.0}), (12.0, {"a": 11.0}), (14.0, {"a": 12.0, "b": 4.0}), (20.0, {"a": 99.0})]
    assert train_figures.busy_cores(samples, 5.0, 15.0) == {"a": 0.5, "b": 1.0}
    assert train_figures.busy_cores(samples, 13.0, 15.0) == {}


def test_the_report_shows_a_document_and_plots_it(tmp_path: Path):
    found = rounds_of({"plain": 100, "deepspeed-2": 100, "ours-2": 95, "ours-1": 50})
    bench = train_suite.bench_of(plan_of("run_dir=/tmp/x"))
    document = {
        "suite": "train", "date": "2026-01-01T00:00:00+00:00", "commit": None,
        "hardware": {"cpu": "c", "cores": 2, "memory_mib": 1, "gpus": []},
        "arguments": {"pairs": 2, "steps": 24, "warmup": 4, "threads_per_worker": 1},
        "work": {"base": "scratch:chat", "precision": "fp32", "zero_stage": 1, "batch_size": 8, "max_length": 256},
    } | train_suite.conclude(bench, found, ARMS, [], None)  # fmt: skip
    text = report.markdown(document)
    assert "| ours-2 | 142 | 0.950 (0.95 to 0.95) |" in text and "| pass |" in text and "imports 1.0" in text
    assert "raylet 0.10" in text
    file = tmp_path / "r.json"
    file.write_text(json.dumps(document))
    assert report.write(file, tmp_path / "p.png") == 0
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")

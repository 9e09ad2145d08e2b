"""Compression for real: vLLM on the CPU runs every format it should, the command's report, and a pruned model that recovers."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.training
ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = os.environ | {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "OMP_NUM_THREADS": "1",
}
# One process for all formats, because most of the time is vLLM's import. Prints JSON per folder: tokens, or what was wrong.
GENERATE = """
import json, sys
from vllm import LLM, SamplingParams

for folder in sys.argv[1:]:
    try:
        llm = LLM(folder, max_model_len=256, max_num_seqs=4, enforce_eager=True)
    except ValueError as error:
        print(json.dumps(str(error)))
        continue
    prompt = {"prompt_token_ids": [10, 300, 77, 1200, 5, 64]}
    (output,) = llm.generate([prompt], SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True), use_tqdm=False)
    print(json.dumps(list(output.outputs[0].token_ids)))
    del llm
"""


def train(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "train", *args], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=900
    )


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One question over and over, so that a model learns it in a few steps."""
    file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    messages = [{"role": "user", "content": "Where is my order?"}, {"role": "assistant", "content": "Your order is on its way."}]
    line = json.dumps({"messages": messages, "expected": messages[-1]["content"]})
    file.write_text(f"{line}\n" * 32)
    return file


def test_vllm_runs_the_formats_on_the_cpu(tiny_llama: Path, rows: Path, tmp_path: Path) -> None:
    from train.compress import add_parser, compress

    parser = argparse.ArgumentParser()
    add_parser(parser.add_subparsers())
    runs = {
        "int8": ["--method", "int8"],
        "awq": ["--method", "awq", "--calibrate", str(rows)],
        "fp8": ["--method", "fp8"],
        "prune": ["--method", "prune", "--drop-layers", "1", "--keep-mlp", "0.5", "--calibrate", str(rows)],
        "int8-weights": ["--method", "int8-weights"],
    }
    for name, arguments in runs.items():
        compress(parser.parse_args(["compress", str(tiny_llama), str(tmp_path / name), "--no-measure", *arguments]), print)
    command = [sys.executable, "-c", GENERATE, *(str(tmp_path / name) for name in runs)]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    said = [json.loads(line) for line in done.stdout.splitlines() if line.startswith(("[", '"')) and line.endswith(("]", '"'))]
    found: dict[str, Any] = dict(zip(runs, said, strict=True))
    # The one format that vLLM has no CPU kernel for; when this fails, the table in train/compress.py can be improved.
    assert "Failed to find a kernel" in found.pop("int8-weights")
    assert all(len(tokens) == 8 for tokens in found.values()), found


def test_the_command_measures_size_speed_and_quality_and_recovers(tiny_llama: Path, rows: Path, tmp_path: Path) -> None:
    config = tmp_path / "recover.yaml"
    recovery = {
        "name": "recover",
        "base": "replaced by the pruned model",
        "data": {"train": [str(rows)], "max_length": 64, "packing": False},
        "max_steps": 24,
        "epochs": 100,
        "batch_size": 4,
        "precision": "fp32",
        "optimizer": {"learning_rate": 0.01},
        "scale": {"device": "cpu", "workers": 1},
    }
    config.write_text(json.dumps({"run_dir": str(tmp_path / "run"), "train": recovery}))
    out = tmp_path / "out"
    arguments = ["--method", "prune", "--drop-layers", "1", "--calibrate", str(rows), "--eval", str(rows), "--eval-rows", "8"]
    done = train("compress", str(tiny_llama), str(out), *arguments, "--recover", str(config))
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout.splitlines()[-1])
    assert report == json.loads((out / "compress.json").read_text())
    assert report["pruned"]["dropped_layers"] and report["recovery"]["steps"] == 24
    assert report["size"]["after_bytes"] == (out / "model.safetensors").stat().st_size < report["size"]["before_bytes"]
    vllm = report["vllm"]
    assert vllm["before"]["tokens_per_s"] > 0 and vllm["after"]["tokens_per_s"] > 0
    assert len(vllm["speed_ratios"]) == vllm["rounds"] and min(vllm["speed_ratios"]) <= vllm["speed_ratio"]
    assert vllm["before"]["asked"] == vllm["after"]["asked"] == 8
    # The random original knows nothing; the smaller one was taught the answer.
    assert vllm["after"]["loss"] < 0.5 < 3 < vllm["before"]["loss"]
    assert vllm["after"]["exact"] == 8 and vllm["before"]["exact"] == 0
    assert {path.name for path in tmp_path.iterdir()} <= {"recover.yaml", "out", "run"}
    assert all(path.is_file() for path in out.iterdir())

"""On a machine with a GPU: every compressed format through vLLM's GPU kernels. Run it by name: `pytest tests/gpu`.

`make test` does not collect this folder, so nothing here is skipped in silence: without a GPU it fails and says so.
`TIDEPOOL_GPU_CHAT` names a real model (a folder or a Hugging Face repository) whose quality is then measured on the shipped
held-out rows; without it the model is a tiny random one, of which only format, loading and speed are checked.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from train.quantize import PRESETS

ROOT = Path(__file__).resolve().parents[2]
DATA = "dataset:assistant/heldout"
# Nats per answer token that a real model may lose by quantization.
LOST = {"int8": 0.1, "int8-weights": 0.05, "int4": 0.4, "gptq": 0.3, "awq": 0.3, "fp8": 0.1}


@pytest.fixture(scope="module", autouse=True)
def gpu() -> None:
    if shutil.which("nvidia-smi") is None:
        pytest.fail("no GPU here: nvidia-smi is not on the PATH")


@pytest.mark.parametrize("method", [*PRESETS, "prune"])
def test_vllm_runs_the_format_on_the_gpu(method: str, tiny_llama: Path, tmp_path: Path) -> None:
    """Also int8-weights, for which there is no CPU kernel."""
    real = os.environ.get("TIDEPOOL_GPU_CHAT")
    out = tmp_path / "out"
    extra = ["--drop-layers", "1", "--keep-mlp", "0.5"] if method == "prune" else []
    command = [sys.executable, "-m", "train", "compress", real or str(tiny_llama), str(out), "--method", method, *extra]
    data = ["--calibrate", DATA, "--eval", DATA, "--calibrate-rows", "64", "--eval-rows", "32"]
    done = subprocess.run([*command, *data], cwd=ROOT, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout.splitlines()[-1])
    vllm = report["vllm"]
    assert vllm["after"]["problem"] is None, vllm["after"]["problem"]
    assert report["size"]["ratio"] < 1 and vllm["speed_ratio"] > 0
    if real and method in LOST:
        assert vllm["after"]["loss"] - vllm["before"]["loss"] < LOST[method]

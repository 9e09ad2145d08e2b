"""On a machine with a GPU: the same `up`, with the engine on the GPU. Run it by name: `pytest tests/gpu`.

`make test` does not collect this folder, so nothing here is skipped in silence: without a GPU it fails and says so. The model is
the embedded one, so no download is needed; `TIDEPOOL_GPU_MODEL` names another (a folder or a Hugging Face repository).
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "configs" / "qwen3-1gpu.yaml"


@pytest.fixture(scope="module")
def endpoint() -> Iterator[dict[str, Any]]:
    if shutil.which("nvidia-smi") is None:
        pytest.fail("no GPU here: nvidia-smi is not on the PATH")
    run_dir = tempfile.mkdtemp(prefix="tp")
    source = os.environ.get("TIDEPOOL_GPU_MODEL", "embedded:chat")
    kwargs = {"max_model_len": 2048, "max_num_seqs": 64, "gpu_memory_utilization": 0.3}
    overrides = [f"models.0.model_source={source}", f"models.0.engine_kwargs={json.dumps(kwargs)}"]
    settings = [part for pair in overrides for part in ("--set", pair)]
    command = [sys.executable, "-m", "cluster"]
    try:
        subprocess.run([*command, "up", str(CONFIG), "--run-dir", run_dir, *settings], cwd=ROOT, check=True, timeout=1200)
        yield json.loads((Path(run_dir) / "endpoint.json").read_text())
    finally:
        subprocess.run([*command, "down", str(CONFIG), "--run-dir", run_dir, *settings], cwd=ROOT, check=True, timeout=300)
        shutil.rmtree(run_dir, ignore_errors=True)


def test_chat_on_the_gpu(endpoint: dict[str, Any]) -> None:
    client = openai.OpenAI(base_url=endpoint["base_url"], api_key=endpoint["api_key"], timeout=120)
    messages: Any = [{"role": "user", "content": "Hello"}]
    model = endpoint["models"][0]["id"]
    whole = client.chat.completions.create(model=model, messages=messages, max_tokens=16)
    assert whole.usage is not None and whole.usage.completion_tokens == 16
    chunks = list(client.chat.completions.create(model=model, messages=messages, max_tokens=16, stream=True))
    assert len(chunks) > 2


def test_down_frees_the_gpu(endpoint: dict[str, Any]) -> None:
    query = ["nvidia-smi", "--query-compute-apps=pid", "--format=csv,noheader"]
    busy = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()
    assert busy, "the engine must be on the GPU while the endpoint is up"

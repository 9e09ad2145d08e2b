"""Of all tests: their two lanes, and a model that is small enough for every one (Llama's layout, the embedded tokenizer and
chat template, random weights).
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

# They start Ray in the test's own process, and it ends that process a minute after its cluster is gone: the last of their lane.
RAY_IN_PROCESS = ("test_train_tune", "test_train_data_ray")


@pytest.hookimpl(tryfirst=True)  # before xdist reads the marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Two lanes, side by side in `make test` (pytest-xdist's loadgroup): tests of the shared cluster, and all others.

    Most tests wait most of the time, for an engine or a timeout; in a lane they keep their order.
    """
    for item in items:
        shared = "endpoint" in getattr(item, "fixturenames", ()) or item.path.stem in RAY_IN_PROCESS
        item.add_marker(pytest.mark.xdist_group("shared cluster" if shared else "others"))


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its folder: 3 layers, hidden size 64, 128 neurons, 2 heads of 32, 1 key-value head, fp32."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from train.models import base_folder

    torch.set_num_threads(1)  # more only get in each other's way with so small a model
    scratch = base_folder("scratch:chat")
    folder = tmp_path_factory.mktemp("models") / "tiny"
    folder.mkdir()
    for pattern in ("tokenizer*", "*.jinja"):
        for file in scratch.glob(pattern):
            shutil.copyfile(file, folder / file.name)
    tokens = len(AutoTokenizer.from_pretrained(folder))
    config = LlamaConfig(
        vocab_size=tokens,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,  # the smallest that vLLM's CPU attention takes
        max_position_embeddings=2048,
        initializer_range=0.1,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=3,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder

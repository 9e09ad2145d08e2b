"""`python -m train merge`: base plus adapter equals the merged folder, and what does not fit is one line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.errors import TrainError
from train.__main__ import main
from train.merge import merge
from train.new_folder import new_folder

IDS = torch.tensor([[10, 300, 77, 1200, 5, 64]])


def load(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder)


@pytest.fixture(scope="module")
def adapter(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA adapter on all linear layers whose B is not zero, as after training."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    model = get_peft_model(load(tiny_llama), LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    folder = tmp_path_factory.mktemp("adapters") / "adapter"
    model.save_pretrained(folder)
    return folder


def changed(folder: Path, into: Path, **values: Any) -> Path:
    """A copy of an adapter with other values in its adapter_config.json."""
    shutil.copytree(folder, into)
    file = into / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))
    return into


def test_merged_logits_are_those_of_base_and_adapter(tiny_llama, adapter, tmp_path, capsys):
    from peft import PeftModel
    from transformers import AutoTokenizer

    out = tmp_path / "merged"
    assert main(["merge", str(tiny_llama), str(adapter), str(out)]) == 0
    with torch.no_grad():
        both = PeftModel.from_pretrained(load(tiny_llama), str(adapter))(IDS).logits
        merged = load(out)(IDS).logits
        base = load(tiny_llama)(IDS).logits
    assert torch.allclose(merged, both, atol=1e-4)
    assert (merged - base).abs().max() > 0.1
    assert not list(out.glob("adapter*"))
    message = [{"role": "user", "content": "Hi"}]
    texts = [AutoTokenizer.from_pretrained(path).apply_chat_template(message, tokenize=False) for path in (out, tiny_llama)]
    assert texts[0] == texts[1]
    # The same command again does not touch what is there.
    assert main(["merge", str(tiny_llama), str(adapter), str(out)]) == 2
    assert "not empty" in capsys.readouterr().err


def test_an_adapter_of_another_shape_is_one_line(tiny_llama, adapter, tmp_path):
    from transformers import AutoConfig, AutoModelForCausalLM

    for name, shape, said in (
        ("narrow", {"intermediate_size": 96}, "down_proj has 96 inputs there, 128 in the adapter"),
        ("shallow", {"num_hidden_layers": 2}, "which has no model.layers.2."),
    ):
        other = tmp_path / name
        AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tiny_llama, **shape)).save_pretrained(other)
        with pytest.raises(TrainError) as caught:
            merge(other, adapter, tmp_path / "out", print)
        assert said in str(caught.value) and "made for another base" in str(caught.value)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"narrow", "shallow"}


def test_what_is_no_adapter_or_no_base_is_one_line(tiny_llama, adapter, tmp_path):
    def refused(base: Path, adapter: Path, text: str) -> None:
        with pytest.raises(TrainError, match=text):
            merge(base, adapter, tmp_path / "out", print)
        assert not (tmp_path / "out").exists()

    refused(tiny_llama, tiny_llama, "has no adapter_config.json")
    refused(tiny_llama, tmp_path / "nothing", "has no adapter_config.json")
    refused(adapter, adapter, "is no model folder")
    refused(tiny_llama, changed(adapter, tmp_path / "other", peft_type="PROMPT_TUNING"), "only LORA")
    broken = changed(adapter, tmp_path / "broken")
    (broken / "adapter_model.safetensors").write_bytes(b"\0" * 20)
    refused(tiny_llama, broken, "cannot be read")
    (broken / "adapter_model.safetensors").unlink()
    refused(tiny_llama, broken, "has no adapter_model.safetensors")
    quantized = tmp_path / "quantized"
    shutil.copytree(tiny_llama, quantized)
    config = json.loads((quantized / "config.json").read_text())
    (quantized / "config.json").write_text(json.dumps(config | {"quantization_config": {}}))
    refused(quantized, adapter, "is quantized; merge into the unquantized base")


def test_weights_that_are_no_numbers_are_refused(tiny_llama, adapter, tmp_path):
    from safetensors.torch import load_file, save_file

    broken = changed(adapter, tmp_path / "broken")
    weights = load_file(broken / "adapter_model.safetensors")
    next(iter(weights.values()))[0, 0] = float("nan")
    save_file(weights, broken / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(TrainError, match="does not merge"):
        merge(tiny_llama, broken, tmp_path / "out", print)


def test_a_new_folder_appears_whole_or_not_at_all(tmp_path):
    out = tmp_path / "deep" / "out"
    with new_folder(out) as folder:
        (folder / "file").write_text("x")
        assert not out.exists()
    assert (out / "file").read_text() == "x"

    with pytest.raises(RuntimeError), new_folder(tmp_path / "failed") as folder:
        (folder / "file").write_text("x")
        raise RuntimeError
    (tmp_path / "empty").mkdir()
    with new_folder(tmp_path / "empty") as folder:
        (folder / "file").write_text("x")
    assert {path.name for path in tmp_path.iterdir()} == {"deep", "empty"}

    with pytest.raises(TrainError, match="not empty"), new_folder(out):
        raise AssertionError("must not get here")
    (tmp_path / "file").write_text("")
    with pytest.raises(TrainError, match="cannot be written"), new_folder(tmp_path / "file" / "out"):
        raise AssertionError("must not get here")

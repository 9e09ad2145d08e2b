"""Compression without vLLM: what each method does to weights, that the folders load again, and mistakes in one line."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.errors import DataError, TrainError
from train import awq, gptq, prune
from train.__main__ import main
from train.calibration import Moments
from train.grid import on_grid, scales_of
from train.measure import last_error
from train.quantize import PRESETS, quantize
from train.samples import read_samples

IDS = torch.tensor([[10, 300, 77, 1200, 5, 64, 900, 33]])
# Largest difference of the logits, as a part of the original's.
ERROR = {"int8": 0.06, "int8-weights": 0.04, "int4": 0.5, "gptq": 0.6, "awq": 0.5, "fp8": 0.12}


def load(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    lines = [
        {
            "messages": [
                {"role": "user", "content": f"Where is order {n}?"},
                {"role": "assistant", "content": f"Order {n} left."},
            ],
            "expected": f"Order {n} left.",
        }
        for n in range(40)
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


@pytest.fixture(scope="module")
def correlated() -> tuple[torch.Tensor, torch.Tensor]:
    """A weight [64, 128] and inputs [1000, 128] of which few are large and most depend on others, as in real models."""
    torch.manual_seed(0)
    mixed = torch.randn(1000, 32) @ torch.randn(32, 128) + 0.3 * torch.randn(1000, 128)
    mixed[:, :4] *= 20
    return torch.randn(64, 128), mixed


@pytest.fixture(scope="module")
def int4() -> Any:
    from compressed_tensors.quantization import preset_name_to_scheme

    arguments = preset_name_to_scheme("W4A16_ASYM", ["Linear"]).weights
    arguments.group_size = 32
    return arguments


def nearest(weight: torch.Tensor, arguments: Any) -> torch.Tensor:
    return on_grid(weight, *scales_of(weight, arguments), arguments)


@pytest.mark.parametrize("method", PRESETS)
def test_a_quantized_folder_is_smaller_and_loads_again(method, tiny_llama, rows, tmp_path, capfd):
    out = tmp_path / "out"
    data = ["--calibrate", str(rows), "--calibrate-rows", "16"] if method in ("gptq", "awq") else []
    assert main(["compress", str(tiny_llama), str(out), "--method", method, "--no-measure", *data]) == 0
    report = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert report == json.loads((out / "compress.json").read_text())
    assert report["size"]["before_bytes"] == (tiny_llama / "model.safetensors").stat().st_size
    assert report["size"]["after_bytes"] == (out / "model.safetensors").stat().st_size < report["size"]["before_bytes"]
    with torch.no_grad():
        before, after = load(tiny_llama)(IDS).logits, load(out)(IDS).logits
    assert 0 < (after - before).norm() / before.norm() < ERROR[method]
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "compressed-tensors" and config["ignore"] == ["lm_head"]
    assert (out / "tokenizer.json").is_file() and (out / "chat_template.jinja").is_file()


def test_gptq_makes_less_error_than_rounding_to_nearest(correlated, int4):
    weight, inputs = correlated
    rounded, scale, zero = gptq.round_weight(weight, inputs.T @ inputs, int4)
    assert torch.allclose(on_grid(rounded, scale, zero, int4), rounded, atol=1e-5), "not on the grid that is written"
    error = ((rounded - weight) @ inputs.T).norm()
    assert error < 0.7 * ((nearest(weight, int4) - weight) @ inputs.T).norm()


def test_awq_makes_less_error_than_rounding_to_nearest(correlated, int4):
    weight, inputs = correlated
    scale = awq.best_scale([weight], Moments(inputs.T @ inputs, inputs.abs().mean(0)), int4)
    assert scale[:4].min() > scale[4:].max(), "large inputs get finer weights"
    error = ((nearest(weight * scale, int4) / scale - weight) @ inputs.T).norm()
    assert error < 0.7 * ((nearest(weight, int4) - weight) @ inputs.T).norm()


def test_calibration_helps_on_rows_it_has_not_seen(tiny_llama):
    draw = torch.Generator().manual_seed(0)
    seen, unseen = (torch.randint(8, 2048, shape, generator=draw) for shape in ((32, 128), (4, 128)))
    error = {}
    with torch.no_grad():
        exact = load(tiny_llama)(unseen).logits
        for method in ("int4", "gptq", "awq"):
            model = load(tiny_llama)
            quantize(model, method, seen.tolist(), print)
            error[method] = float((model(unseen).logits - exact).norm() / exact.norm())
    assert max(error["gptq"], error["awq"]) < 0.95 * error["int4"], error


def test_awq_scales_cancel_out(tiny_llama, int4):
    model = load(tiny_llama)
    before = model(IDS).logits
    weight = model.model.layers[0].mlp.down_proj.weight.clone()
    awq.scale_inputs(model, int4, [IDS[0].tolist()], print)
    assert not torch.allclose(model.model.layers[0].mlp.down_proj.weight, weight)
    assert torch.allclose(model(IDS).logits, before, atol=1e-3)


def test_pruning_takes_what_does_nothing(tiny_llama, tmp_path):
    """A layer that adds nothing and neurons that are never used are planted; without them the model says the same."""
    model = load(tiny_llama)
    with torch.no_grad():
        idle = model.model.layers[1]
        idle.self_attn.o_proj.weight.zero_()
        idle.mlp.down_proj.weight.zero_()
        for index in (0, 2):
            model.model.layers[index].mlp.up_proj.weight[torch.randperm(128)[:64]] = 0.0
        before = model(IDS).logits
    batches = [random.Random(0).choices(range(8, 2048), k=50) for _ in range(4)]
    done = prune.prune(model, batches, 1, 0.5, print)
    assert done == prune.Pruned((1,), 128, 64)
    assert torch.allclose(model(IDS).logits, before, atol=1e-4)
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert (again.config.num_hidden_layers, again.config.intermediate_size) == (2, 64)
    assert torch.allclose(again(IDS).logits, before, atol=1e-4)
    assert torch.equal(again.generate(IDS, max_new_tokens=4), model.generate(IDS, max_new_tokens=4))


def test_qwen_is_pruned_and_others_are_refused(tmp_path):
    from transformers import AutoModelForCausalLM, GPT2Config, Qwen3Config

    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 3, "head_dim": 16}
    model = AutoModelForCausalLM.from_config(Qwen3Config(**sizes, num_attention_heads=2, num_key_value_heads=1))
    prune.prune(model, [[1, 2, 3, 4]], 1, 1.0, print)
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert again.config.num_hidden_layers == len(again.config.layer_types) == 2
    other = AutoModelForCausalLM.from_config(GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=64))
    for run in (
        lambda: prune.prune(other, [[1, 2]], 1, 1.0, print),
        lambda: quantize(other, "awq", [[1, 2]], print),
    ):
        with pytest.raises(TrainError, match="not of gpt2"):
            run()


def test_samples_are_prompt_and_answer(tiny_llama, rows, tmp_path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    samples = read_samples([str(rows)], tiny_llama, 10, 200)
    assert samples == read_samples([str(rows)], tiny_llama, 10, 200) and len(samples) == 10
    for sample in samples:
        assert (
            sample.expected is not None and tokenizer.decode(sample.answer, skip_special_tokens=True).strip() == sample.expected
        )
        assert tokenizer.decode(sample.prompt).endswith("assistant\n")
    plain = tmp_path / "plain.jsonl"
    plain.write_text('{"text": "The order left."}\n')
    (text,) = read_samples([str(plain)], tiny_llama, 10, 200)
    assert tokenizer.decode(text.ids, skip_special_tokens=True) == "The order left." and len(text.prompt) == 1
    with pytest.raises(DataError, match="no row has an answer within 4 tokens"):
        read_samples([str(rows)], tiny_llama, 10, 4)
    plain.write_text('{"text": "The order left."}\nnonsense\n')
    with pytest.raises(DataError, match=r"plain.jsonl:2: "):
        read_samples([str(plain)], tiny_llama, 10, 200)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--method", "gptq"], "needs calibration data; give --calibrate"),
        (["--method", "prune", "--drop-layers", "1"], "needs calibration data; give --calibrate"),
        (["--method", "prune"], "say what goes"),
        (["--method", "prune", "--drop-layers", "3"], "at least one must stay"),
        (["--method", "prune", "--keep-mlp", "0.1"], "less than 64 would be left"),
        (["--method", "int8", "--drop-layers", "1"], "belong to --method prune"),
        (["--method", "prune", "--set", "a=1"], "file given with --recover"),
        (["--method", "int8", "--eval", "missing.jsonl"], "missing.jsonl"),
    ],
)
def test_mistakes_are_one_line(arguments, said, tiny_llama, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["compress", str(tiny_llama), str(out), "--no-measure", *arguments]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and said in lines[0]
    assert not any(tmp_path.iterdir())


def test_the_reason_is_the_last_exception_of_a_log():
    log = "Traceback:\n  raise ValueError(\nValueError: first\nsaid Error: no\n[rank0]: ValueError: no kernel. Reasons: \n why\n"
    assert last_error(log) == "no kernel. Reasons:"
    assert last_error("torch.OutOfMemoryError: CUDA out of memory") == "CUDA out of memory"
    assert last_error("Killed\n") is None


def test_a_quantized_model_is_not_quantized_again(tiny_llama, tmp_path, capsys):
    arguments = ["--method", "int8", "--no-measure"]
    assert main(["compress", str(tiny_llama), str(tmp_path / "once"), *arguments]) == 0
    for method in ("int8", "prune"):
        assert main(["compress", str(tmp_path / "once"), str(tmp_path / "twice"), *arguments[2:], "--method", method]) == 2
        assert "quantized already" in capsys.readouterr().err
    assert main(["compress", str(tiny_llama), str(tmp_path / "once"), *arguments]) == 2
    assert "not empty" in capsys.readouterr().err
    assert main(["compress", str(tmp_path / "nothing"), str(tmp_path / "twice"), *arguments]) == 2
    assert "no such model folder" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"once"}

"""Weights in fewer bits, in the `compressed-tensors` format that vLLM loads.

`quantize(model, method, batches, say)` changes a Transformers model in place, `save` writes it. The formats, the packing and
the files are those of the `compressed_tensors` library; what is decided here is the method's scheme and each weight's scale.
The embedding and the output layer stay as they are. It measures nothing (that is `measure`) and reads no data (that is
`samples`). Called by `compress`.

| method | weights | activations | calibration |
| --- | --- | --- | --- |
| int8 | int8, a scale per output channel | int8, a scale per token, at run time | no |
| int8-weights | int8, a scale per group of inputs | as they are | no |
| int4 | int4, a scale per group of inputs, rounded to nearest | as they are | no |
| gptq | as int4, rounding errors made good by later columns | as they are | yes |
| awq | int4 with a zero point per group, inputs scaled by how large they are | as they are | yes |
| fp8 | fp8 e4m3, a scale per output channel | fp8, a scale per token, at run time | no |
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.errors import TrainError
from train import awq, gptq
from train.grid import scales_of

if TYPE_CHECKING:
    from train.calibration import Batches
    from train.grid import Scales

PRESETS = {"int8": "INT8", "int8-weights": "W8A16", "int4": "W4A16", "gptq": "W4A16", "awq": "W4A16_ASYM", "fp8": "FP8_DYNAMIC"}
CALIBRATED = ("gptq", "awq")
GROUPS = (128, 64, 32)  # inputs that share a scale: the largest that divides every layer
KEPT = "lm_head"  # few weights, and the ones that decide between tokens


def quantize(model: Any, method: str, batches: Batches, say: Callable[[str], None]) -> None:
    """Replace the weights of all linear layers but the output layer.

    Args:
        model: A Transformers causal language model, unquantized; changed in place, and good for `save` only after it.
        method: A key of `PRESETS`.
        batches: Token ids of calibration rows; needed by the methods in `CALIBRATED`.
        say: Takes lines of progress.

    Raises:
        TrainError: The model's shapes or kind do not suit the method, or the library is missing.
    """
    if find_spec("compressed_tensors") is None:
        raise TrainError(f"--method {method}: needs the library compressed-tensors, which comes with vLLM; install the engine")
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config

    linears = linear_layers(model)
    scheme = _scheme(method, linears)
    scales: Scales = {}
    if method in CALIBRATED:
        if not batches:
            raise TrainError(f"--method {method}: needs calibration data; give --calibrate FILE")
        run = awq.scale_inputs if method == "awq" else gptq.round_weights
        scales = run(model, scheme.weights, batches, say)
    apply_quantization_config(model, QuantizationConfig(config_groups={"group_0": scheme}, ignore=[KEPT]))
    for name, layer in linears.items():
        scale, zero = scales.get(name) or scales_of(layer.weight.data, scheme.weights)
        layer.weight_scale.data.copy_(scale)
        layer.weight_zero_point.data.copy_(zero)


def save(model: Any, folder: Path) -> None:
    """Write a quantized model: safetensors and `config.json` with its `quantization_config`."""
    from compressed_tensors.compressors import ModelCompressor

    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(folder)
    compressor.update_config(str(folder))


def linear_layers(model: Any) -> dict[str, Any]:
    """All linear layers by name, in the order of the model, without the output layer."""
    import torch

    return {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear) and name != KEPT}


def _scheme(method: str, linears: dict[str, Any]) -> Any:
    from compressed_tensors.quantization import preset_name_to_scheme

    scheme = preset_name_to_scheme(PRESETS[method], ["Linear"])
    if scheme.weights.group_size:
        size = next((size for size in GROUPS if all(layer.in_features % size == 0 for layer in linears.values())), None)
        if size is None:
            odd = next(f"{name} has {layer.in_features}" for name, layer in linears.items() if layer.in_features % GROUPS[-1])
            raise TrainError(f"--method {method}: inputs of a layer must be a multiple of {GROUPS[-1]}, but {odd}")
        scheme.weights.group_size = size
    return scheme

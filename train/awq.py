"""AWQ: inputs that are large get finer weights, by scaling them down before rounding and up in the layer before.

The method of Lin et al. 2023 (arXiv 2306.00978): for the linear layers that share an input, the inputs are divided by s and the
weights' columns multiplied by it, with s = mean(|x|) ** a; `a` is searched for the smallest error of the output. The division is
folded into the norm, or the layer, that the input comes from, so the model computes the same and has the same shape. The output
projection of attention is left out: with grouped key-value heads nothing before it can take the scales. Clipping is not searched.
It rounds nothing itself. Called by `quantize`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from train.calibration import SHARED_INPUTS, Batches, Moments, decoder_layers, moments
from train.grid import on_grid, scales_of

if TYPE_CHECKING:
    import torch

    from train.grid import Scales

STEPS = 20
# Where each shared input comes from: a norm's weight [in], or the rows of a linear layer [in, ...].
SOURCES = {
    "self_attn.q_proj": "input_layernorm",
    "mlp.gate_proj": "post_attention_layernorm",
    "mlp.down_proj": "mlp.up_proj",
}


def scale_inputs(model: Any, arguments: Any, batches: Batches, say: Callable[[str], None]) -> Scales:
    """Move scales between the weights of all decoder layers, in place, so that rounding to nearest hurts less.

    Args:
        model: Unquantized; changed, but what it computes stays the same.
        arguments: `QuantizationArgs` of the rounding that follows.
        batches: Calibration rows.
        say: Takes lines of progress.

    Returns:
        Nothing in a dict: scales of the rounding follow from the weights, as without calibration.
    """
    layers = decoder_layers(model, "awq")
    for index, layer in enumerate(layers):
        seen = moments(model, layer, batches)
        for shared in SHARED_INPUTS:
            if shared[0] in SOURCES:
                linears = [layer.get_submodule(name) for name in shared]
                scale = best_scale([linear.weight.data for linear in linears], seen[shared[0]], arguments)
                _fold(layer.get_submodule(SOURCES[shared[0]]), linears, scale)
        say(f"awq: layer {index + 1} of {len(layers)}")
    return {}


def best_scale(weights: list[torch.Tensor], seen: Moments, arguments: Any) -> torch.Tensor:
    """The scale s [in] with the smallest squared error of all outputs, summed over the tokens seen.

    The error of an output is (Q(W s) / s - W) x, so its square summed over tokens is tr(D M Dᵀ) with D that difference and M the
    second moments: no activations have to be kept.
    """
    import torch

    size = seen.size.clamp(min=1e-5)
    best, least = torch.ones_like(size), float("inf")
    for step in range(STEPS):
        scale = size ** (step / STEPS)
        scale = scale / (scale.max() * scale.min()).sqrt()
        error = 0.0
        for weight in weights:
            scaled = weight.float() * scale
            difference = on_grid(scaled, *scales_of(scaled, arguments), arguments) / scale - weight.float()
            error += float(((difference @ seen.square) * difference).sum())
        if error < least:
            best, least = scale, error
    return best


def _fold(source: Any, linears: list[Any], scale: torch.Tensor) -> None:
    for linear in linears:
        linear.weight.data.mul_(scale.to(linear.weight.dtype))
    for parameter in (source.weight, getattr(source, "bias", None)):
        if parameter is not None:  # [in] or [in, ...]
            parameter.data.div_(scale.to(parameter.dtype).view(-1, *[1] * (parameter.dim() - 1)))

"""The grid a quantized weight lies on: its scales, and the nearest point of it.

Thin over `compressed_tensors`, whose arithmetic is what the files are written with. Called by `quantize`, `gptq` and `awq`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from compressed_tensors.quantization import QuantizationArgs

    Scales = dict[str, tuple[torch.Tensor, torch.Tensor]]  # scale and zero point, each [out, groups], by a layer's name


def scales_of(weight: torch.Tensor, arguments: QuantizationArgs) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero point that cover all of a weight.

    Args:
        weight: [out, in].
        arguments: Bits, symmetry, and whether a scale belongs to a channel or a group of inputs.

    Returns:
        Two tensors [out, groups], where a channel is one group.
    """
    from compressed_tensors.quantization.utils import calculate_qparams

    groups = weight.float().unflatten(-1, (-1, arguments.group_size or weight.shape[-1]))
    scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), arguments)
    return scale.to(weight.dtype), zero


def on_grid(weight: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, arguments: QuantizationArgs) -> torch.Tensor:
    """The weight [out, in] as the quantized model will have it, in float32; `scale` and `zero` as from `scales_of`."""
    from compressed_tensors.quantization.utils import calculate_range

    lowest, highest = calculate_range(arguments, str(weight.device))
    groups = weight.float().unflatten(-1, (scale.shape[-1], -1))
    scale, zero = scale.float().unsqueeze(-1), zero.float().unsqueeze(-1)
    steps = (groups / scale + zero).round().clamp(lowest, highest)
    return ((steps - zero) * scale).flatten(-2)

"""GPTQ: a weight is rounded column by column, and each column's error is made good by the columns after it.

The method of Frantar et al. 2022 (arXiv 2210.17323), without reordering columns. Decoder layers are done in order, so that each
is calibrated on what the quantized layers below it put out. It writes no files. Called by `quantize`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from cluster.errors import TrainError
from train.calibration import SHARED_INPUTS, Batches, decoder_layers, moments
from train.grid import on_grid, scales_of

if TYPE_CHECKING:
    import torch

    from train.grid import Scales

DAMPING = 0.01  # of the mean of the diagonal: keeps the inverse finite for inputs that hardly vary


def round_weights(model: Any, arguments: Any, batches: Batches, say: Callable[[str], None]) -> Scales:
    """Put all linear layers of the decoder on the grid of `arguments`, in place.

    Args:
        model: Unquantized; changed.
        arguments: `QuantizationArgs` with a group size.
        batches: Calibration rows.
        say: Takes lines of progress.

    Returns:
        Scale and zero point per linear layer, each [out, groups], by its name in the model.
    """
    scales: Scales = {}
    layers = decoder_layers(model, "gptq")
    for index, layer in enumerate(layers):
        seen = moments(model, layer, batches)
        for shared in SHARED_INPUTS:
            for name in shared:
                linear = layer.get_submodule(name)
                weight, scale, zero = round_weight(linear.weight.data, seen[shared[0]].square, arguments)
                linear.weight.data.copy_(weight)
                scales[f"model.layers.{index}.{name}"] = (scale, zero)
        say(f"gptq: layer {index + 1} of {len(layers)}")
    return scales


def round_weight(weight: torch.Tensor, square: torch.Tensor, arguments: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One weight on the grid of `arguments`.

    Args:
        weight: [out, in].
        square: Sum of x xᵀ over the inputs, [in, in], float32.
        arguments: `QuantizationArgs`; its group size divides `in`.

    Returns:
        The rounded weight [out, in] in float32, scale and zero point [out, groups].

    Raises:
        TrainError: The inputs are not finite.
    """
    import torch

    left = weight.detach().float().clone()
    square = square.clone()
    unseen = square.diagonal() == 0
    square.diagonal()[unseen] = 1.0
    left[:, unseen] = 0.0  # multiplied with nothing but zeros
    square.diagonal().add_(DAMPING * square.diagonal().mean())
    try:
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(square))
        follow = torch.linalg.cholesky(inverse, upper=True)
    except torch.linalg.LinAlgError:
        raise TrainError("--method gptq: the calibration inputs give no invertible statistics; give more rows") from None
    rounded, scales, zeros = torch.empty_like(left), [], []
    group = arguments.group_size
    for start in range(0, left.shape[1], group):
        end = start + group
        scale, zero = scales_of(left[:, start:end].to(weight.dtype), arguments)
        errors = torch.empty_like(left[:, start:end])
        for column in range(start, end):
            rounded[:, column : column + 1] = on_grid(left[:, column : column + 1], scale, zero, arguments)
            error = (left[:, column] - rounded[:, column]) / follow[column, column]
            left[:, column + 1 : end] -= error[:, None] * follow[column, column + 1 : end]
            errors[:, column - start] = error
        left[:, end:] -= errors @ follow[start:end, end:]
        scales.append(scale)
        zeros.append(zero)
    return rounded, torch.cat(scales, 1), torch.cat(zeros, 1)

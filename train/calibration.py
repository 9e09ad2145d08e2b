"""What the layers of a model see on sample rows: the statistics that calibrated quantization and pruning decide by.

`moments` runs a model over token ids and adds up, for linear layers, the second moments and the mean sizes of their inputs. It
changes no weight. It knows Llama's layout (llama, mistral, qwen2, qwen3): a list of decoder layers, each with the same seven
linear layers, of which q, k and v, and gate and up, share an input. Called by `gptq`, `awq` and `prune`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cluster.errors import TrainError

if TYPE_CHECKING:
    import torch

Batches = Sequence[Sequence[int]]  # token ids, a row each; rows go through the model one by one, so nothing is padded

KINDS = ("llama", "mistral", "qwen2", "qwen3")
# The linear layers of a decoder layer, in the order of computation; those in one tuple share their input.
SHARED_INPUTS = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)


@dataclass(frozen=True)
class Moments:
    """Of a layer's inputs x over all tokens: sum of x xᵀ as [in, in], and mean of |x| as [in]; float32."""

    square: torch.Tensor
    size: torch.Tensor


class _Enough(Exception):
    """Ends a forward pass once the last watched layer was reached."""


def decoder_layers(model: Any, method: str) -> Any:
    """The decoder layers (`torch.nn.ModuleList`).

    Raises:
        TrainError: The model is not of Llama's layout.
    """
    kind = model.config.model_type
    if kind not in KINDS:
        raise TrainError(f"--method {method}: knows the layout of {', '.join(KINDS)} models, not of {kind}")
    return model.model.layers


def forward(model: Any, row: Sequence[int]) -> None:
    """One row through the decoder, for what hooks see of it; the output layer is left out."""
    import torch

    with torch.no_grad():
        model.model(input_ids=torch.tensor([row], device=model.device), use_cache=False)


def moments(model: Any, layer: Any, batches: Batches) -> dict[str, Moments]:
    """Moments of the four inputs in one decoder layer, by the first name of each tuple of `SHARED_INPUTS`.

    Every call runs all rows from the embedding up to that layer, whatever was changed below it: with all layers that is half
    a forward pass per layer and row, and memory for one layer's statistics only.
    """

    sums: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    tokens = sum(len(row) for row in batches)

    def watch(name: str) -> Callable[[Any, Any], None]:
        def hook(module: Any, inputs: tuple[torch.Tensor, ...]) -> None:
            x = inputs[0].detach().flatten(0, -2).float()
            square, size = sums.get(name, (0.0, 0.0))
            sums[name] = (square + x.T @ x, size + x.abs().sum(0))

        return hook

    def stop(module: Any, inputs: Any, output: Any) -> None:
        raise _Enough

    names = [shared[0] for shared in SHARED_INPUTS]
    hooks = [layer.get_submodule(name).register_forward_pre_hook(watch(name)) for name in names]
    hooks.append(layer.register_forward_hook(stop))
    try:
        for row in batches:
            try:
                forward(model, row)
            except _Enough:
                continue
    finally:
        for handle in hooks:
            handle.remove()
    return {name: Moments(square, size / tokens) for name, (square, size) in sums.items()}

"""Structured pruning: whole decoder layers and whole MLP neurons go, and what is left is an ordinary, smaller Hugging Face model.

Which ones go is decided on calibration rows:
- a layer matters by how much it turns the residual stream: 1 - cosine of what goes in and what comes out, mean over tokens
  (block influence, Men et al. 2024, arXiv 2403.03853);
- a neuron of an MLP matters by the size of its activation times the size of its outgoing weights (as Wanda, Sun et al. 2023,
  arXiv 2306.11695, summed over the column).
Every layer keeps the same number of neurons, because a model has one `intermediate_size`. Attention heads stay. The pruned
model is worse than the difference in size suggests until it has been trained a little; that is `compress --recover`, not here.
Called by `compress`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from cluster.errors import TrainError
from train.calibration import Batches, decoder_layers, forward, moments

MULTIPLE = 64  # neurons left are a multiple of this: kernels and tensor parallelism want round sizes


@dataclass(frozen=True)
class Pruned:
    """What went: layers by their old index, and neurons per MLP before and after."""

    dropped_layers: tuple[int, ...]
    neurons_before: int
    neurons_after: int


def prune(model: Any, batches: Batches, drop_layers: int, keep_mlp: float, say: Callable[[str], None]) -> Pruned:
    """Take out the layers and neurons that matter least, in place; `config` follows.

    Args:
        model: A Transformers model of Llama's layout, unquantized.
        batches: Calibration rows.
        drop_layers: How many decoder layers go.
        keep_mlp: The part of each MLP's neurons that stays, above 0 and at most 1.
        say: Takes lines of progress.

    Raises:
        TrainError: The model is of another layout, or nothing, or everything, would be pruned.
    """
    layers = decoder_layers(model, "prune")
    neurons = int(model.config.intermediate_size)
    left = neurons if keep_mlp == 1.0 else int(neurons * keep_mlp) // MULTIPLE * MULTIPLE
    if not 0 <= drop_layers < len(layers):
        raise TrainError(f"--drop-layers {drop_layers}: the model has {len(layers)} layers, at least one must stay")
    if left < 1:
        raise TrainError(f"--keep-mlp {keep_mlp}: of {neurons} neurons less than {MULTIPLE} would be left")
    if drop_layers == 0 and left == neurons:
        raise TrainError("--method prune: say what goes, with --drop-layers N or --keep-mlp PART below 1")
    if not batches:
        raise TrainError("--method prune: needs calibration data; give --calibrate FILE")
    dropped: tuple[int, ...] = ()
    if drop_layers:
        influence = layer_influence(model, layers, batches)
        dropped = tuple(sorted(sorted(range(len(layers)), key=influence.__getitem__)[:drop_layers]))
        say(f"prune: layers {', '.join(map(str, dropped))} go; influence {', '.join(f'{value:.3f}' for value in influence)}")
        _drop(model, set(dropped))
    if left < neurons:
        layers = decoder_layers(model, "prune")
        for index, layer in enumerate(layers):
            _narrow(layer.mlp, moments(model, layer, batches)["mlp.down_proj"].square.diagonal(), left)
            say(f"prune: layer {index + 1} of {len(layers)} keeps {left} of {neurons} neurons")
        model.config.intermediate_size = left
    return Pruned(dropped, neurons, left)


def layer_influence(model: Any, layers: Any, batches: Batches) -> list[float]:
    """1 - cosine between what goes into each decoder layer and what comes out, mean over tokens; 0 is a layer without effect."""
    import torch

    sums, tokens = [0.0] * len(layers), sum(len(row) for row in batches)

    def watch(index: int) -> Callable[[Any, Any, Any, Any], None]:
        def hook(module: Any, inputs: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
            before = inputs[0] if inputs else named["hidden_states"]
            after = output[0] if isinstance(output, tuple) else output
            cosine = torch.cosine_similarity(before.float(), after.float(), dim=-1)
            sums[index] += float((1 - cosine).sum())

        return hook

    hooks = [layer.register_forward_hook(watch(index), with_kwargs=True) for index, layer in enumerate(layers)]
    try:
        for row in batches:
            forward(model, row)
    finally:
        for handle in hooks:
            handle.remove()
    return [total / tokens for total in sums]


def _drop(model: Any, dropped: set[int]) -> None:
    import torch

    kept = [index for index in range(len(model.model.layers)) if index not in dropped]
    layers = [model.model.layers[index] for index in kept]
    for index, layer in enumerate(layers):
        layer.self_attn.layer_idx = index  # its place in the cache
    model.model.layers = torch.nn.ModuleList(layers)
    model.config.num_hidden_layers = len(kept)
    kinds = getattr(model.config, "layer_types", None)
    if kinds is not None:
        model.config.layer_types = [kinds[index] for index in kept]
    if getattr(model.config, "max_window_layers", None) is not None:
        model.config.max_window_layers = min(model.config.max_window_layers, len(kept))


def _narrow(mlp: Any, energy: Any, left: int) -> None:
    """Keep the `left` neurons that matter most. `energy`: sum of squared activations over tokens, [neurons]."""
    import torch

    importance = energy.sqrt() * mlp.down_proj.weight.detach().float().norm(dim=0)
    kept = importance.topk(left).indices.sort().values
    for linear, axis in ((mlp.gate_proj, 0), (mlp.up_proj, 0), (mlp.down_proj, 1)):
        linear.weight = torch.nn.Parameter(linear.weight.detach().index_select(axis, kept).clone())
        if axis == 0 and linear.bias is not None:
            linear.bias = torch.nn.Parameter(linear.bias.detach()[kept].clone())
    mlp.gate_proj.out_features = mlp.up_proj.out_features = mlp.down_proj.in_features = left
    mlp.intermediate_size = left

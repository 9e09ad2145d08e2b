"""DeepSpeed's JSON as a pure function of the configuration and the number of workers.

Two kinds of mixed precision come out of it: with ZeRO 1 to 3 the weights are bf16 or fp16 and DeepSpeed keeps fp32 masters beside
them; with ZeRO 0, where DeepSpeed has no masters that could be read back, the weights stay fp32 and torch's autocast computes in
the lower precision. The learning rate is set by the loop (`train.schedule`); DeepSpeed's schedulers are not used.
Imports neither torch nor deepspeed. Called by `train.engine` and by `train.run`, which checks a configuration before all else.
"""

from __future__ import annotations

from typing import Any

from cluster.errors import TrainError
from cluster.train_config import TrainConfig

# What a field of ours says; an override of these would say something else than the file does.
OURS = {
    "train_batch_size": "batch_size",
    "train_micro_batch_size_per_gpu": "micro_batch_size",
    "gradient_accumulation_steps": "micro_batch_size",
    "gradient_clipping": "optimizer.clip",
    "optimizer": "optimizer",
    "scheduler": "optimizer.schedule",
    "bf16.enabled": "precision",
    "fp16.enabled": "precision",
    "torch_autocast": "precision",
    "zero_optimization.stage": "zero.stage",
    "zero_optimization.offload_optimizer.device": "zero.offload_optimizer",
    "zero_optimization.offload_optimizer.nvme_path": "zero.nvme_path",
    "zero_optimization.offload_param.device": "zero.offload_parameters",
    "zero_optimization.offload_param.nvme_path": "zero.nvme_path",
    "zero_optimization.cpu_offload": "zero.offload_optimizer",
}


def micro_batches(config: TrainConfig, workers: int) -> tuple[int, int]:
    """Sequences per worker and forward pass, and forward passes per step.

    Raises:
        TrainError: batch_size cannot be divided like that.
    """
    share, rest = divmod(config.batch_size, workers)
    if rest:
        raise TrainError(f"train.batch_size {config.batch_size} cannot be divided among {workers} workers")
    micro = config.micro_batch_size or share
    if share % micro:
        raise TrainError(
            f"{workers} workers do {share} sequences each per step, which train.micro_batch_size {micro} does not divide"
        )
    return micro, share // micro


def deepspeed_config(config: TrainConfig, workers: int, total_steps: int) -> dict[str, Any]:
    """The JSON for `deepspeed.initialize`.

    Args:
        config: The run.
        workers: Processes that train together.
        total_steps: Optimizer steps of the whole run.

    Raises:
        TrainError: the batch does not divide among the workers, or `deepspeed_overrides` contradicts a field; names the key.
    """
    micro, accumulation = micro_batches(config, workers)
    optimizer, zero, on_gpu = config.optimizer, config.zero, config.scale.device == "gpu"
    # DeepSpeed's own CPU Adam only where the optimizer is on the CPU of a GPU machine: it is compiled at first use.
    torch_adam = zero.offload_optimizer == "none" or not on_gpu
    result: dict[str, Any] = {
        "train_batch_size": config.batch_size,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": optimizer.clip,
        "steps_per_print": total_steps + 1,
        "optimizer": {
            "type": "AdamW",
            "params": {
                "lr": optimizer.learning_rate,
                "betas": list(optimizer.betas),
                "eps": optimizer.eps,
                "weight_decay": optimizer.weight_decay,
                **({"torch_adam": True, "fused": zero.offload_optimizer == "none"} if torch_adam else {}),
            },
        },
        "zero_optimization": _zero(config),
        **_precision(config),
    }
    if zero.offload_optimizer != "none" and torch_adam:
        result["zero_force_ds_cpu_optimizer"] = False
    _check_overrides(config.deepspeed_overrides, "")
    return _merged(result, config.deepspeed_overrides)


def _zero(config: TrainConfig) -> dict[str, Any]:
    zero, on_gpu = config.zero, config.scale.device == "gpu"
    section: dict[str, Any] = {"stage": zero.stage}
    if zero.stage:
        section |= {"overlap_comm": on_gpu, "contiguous_gradients": True}
    for name, device in (("offload_optimizer", zero.offload_optimizer), ("offload_param", zero.offload_parameters)):
        if device != "none":
            section[name] = {"device": device, "pin_memory": on_gpu}
            if device == "nvme":
                section[name]["nvme_path"] = zero.nvme_path
    return section


def _precision(config: TrainConfig) -> dict[str, Any]:
    if config.precision == "fp32":
        return {}
    if config.zero.stage == 0:
        dtype = "bfloat16" if config.precision == "bf16" else "float16"
        return {"torch_autocast": {"enabled": True, "dtype": dtype}}
    return {config.precision: {"enabled": True}}


def _check_overrides(overrides: dict[str, Any], above: str) -> None:
    for key, value in overrides.items():
        path = f"{above}{key}"
        field = OURS.get(path) or next((OURS[name] for name in OURS if path.startswith(f"{name}.")), None)
        if field is not None:
            raise TrainError(f"train.deepspeed_overrides: {path!r} is set by train.{field}; change it there")
        if isinstance(value, dict):
            _check_overrides(value, f"{path}.")


def _merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    result = dict(base)
    for key, value in over.items():
        old = result.get(key)
        result[key] = _merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return result

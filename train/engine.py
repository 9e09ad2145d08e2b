"""One worker's DeepSpeed engine: the process's environment, the device, `deepspeed.initialize`.

What DeepSpeed is told is `train.zero`'s; what is done with the engine is `train.loop`'s. `prepare_process` must run before
anything imports deepspeed. Called by the loop in each worker.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from cluster.train_config import TrainConfig
from train.models import trained
from train.zero import deepspeed_config

if TYPE_CHECKING:
    import torch


def prepare_process(config: TrainConfig, workers_here: int) -> None:
    """Set what the libraries read from the environment, and torch's threads.

    Args:
        config: The run.
        workers_here: Workers on this machine, which share its cores.
    """
    if config.scale.device == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    os.environ.setdefault("DS_LOG_LEVEL", "warning")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import torch

    cores = len(os.sched_getaffinity(0))
    torch.set_num_threads(config.scale.threads_per_worker or max(1, cores // workers_here))


def device_of(config: TrainConfig) -> torch.device:
    """Where this worker computes. Ray shows a worker its own GPU only, or all of them and the local rank."""
    import torch

    if config.scale.device == "cpu":
        return torch.device("cpu")
    from ray.train.torch import get_device

    device: torch.device = get_device()
    torch.cuda.set_device(device)
    return device


def group_alone() -> None:
    """A process group of one, where Ray Train made none because it runs the worker in its own process."""
    import torch.distributed as distributed

    if not distributed.is_initialized():
        distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
        os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}


def start(config: TrainConfig, model: torch.nn.Module, workers: int, steps: int) -> Any:
    """The engine. The process group is there already (Ray Train's).

    Args:
        config: The run.
        model: As `train.models.build` made it.
        workers: Of this run now.
        steps: Optimizer steps of the whole run.
    """
    import logging

    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel(logging.WARNING)
    if config.scale.device == "cpu":
        # On CPUs DeepSpeed would compile (for a minute) an operation for all-reduce in shared memory that only its inference
        # uses: without it in the list of what can be built, plain gloo does the work.
        deepspeed.ops.__compatible_ops__ = {}
    deepspeed.init_distributed(
        dist_backend="gloo" if config.scale.device == "cpu" else "nccl", auto_mpi_discovery=False, dist_init_required=False
    )
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=_groups(config, model),
        config=deepspeed_config(config, workers, steps),
        dist_init_required=False,
    )
    return engine


def _groups(config: TrainConfig, model: torch.nn.Module) -> list[Any]:
    """What the optimizer takes: the parameters, or two groups of them where token embeddings learn at a rate of their own."""
    parameters = list(trained(model).values())
    if config.optimizer.embedding_rate == 1.0:
        return parameters
    words = {id(parameter) for parameter in model.get_input_embeddings().parameters()}
    groups: list[dict[str, Any]] = [
        {"params": [one for one in parameters if id(one) in words], "times": config.optimizer.embedding_rate},
        {"params": [one for one in parameters if id(one) not in words]},
    ]
    return [group for group in groups if group["params"]]

"""The `train` and `tune` parts of a configuration file: what is trained, on what, how, and what is searched.

Part of the one configuration model (`config.py`), in a file of its own because it is long. It decides nothing: `train.zero`
turns it into DeepSpeed's JSON, `train.run` into a run. Imports neither torch nor ray.

Units: tokens, steps and seconds as named; prices in US dollars.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from cluster.sections import Section

Uri = Annotated[str, Field(min_length=1)]
Objective = Literal["sft", "dpo", "pretrain"]
# GOMP_SPINCOUNT of training on CPUs: turns that one of torch's threads waits busily for the others before it sleeps.
SPINS = "10000"


class DataConfig(Section):
    """Where the rows are and how they become sequences."""

    train: tuple[Uri, ...] = Field(
        min_length=1,
        description="Files, folders or globs of .jsonl or .parquet, local or pyarrow.fs URIs; "
        "`dataset:assistant/train` is shipped.",
    )
    validation: tuple[Uri, ...] = Field((), description="The same for validation; without it there is no validation loss.")
    prepared: Uri | None = Field(
        None, description="Where the prepared sequences are kept, for several runs to share; default: the run's own folder."
    )
    max_length: int = Field(1024, ge=8, description="Tokens per sequence.")
    packing: bool = Field(True, description="Several dialogues share a sequence, each seeing only itself.")
    too_long: Literal["error", "skip", "truncate"] = Field(
        "error", description="What happens to a row that is longer than max_length."
    )
    seed: int = Field(
        0, ge=0, description="Seed of the order; the same seed and epoch give the same order on any number of workers."
    )


class LoraConfig(Section):
    """Low-rank adapters (PEFT) instead of all weights."""

    rank: int = Field(16, ge=1)
    alpha: float = Field(32.0, gt=0)
    dropout: float = Field(0.0, ge=0, lt=1)
    targets: Literal["all-linear", "attention", "mlp"] | tuple[str, ...] = Field(
        "all-linear", description="Layers that get an adapter: a common set, or names."
    )


class OptimizerConfig(Section):
    """AdamW and its schedule."""

    learning_rate: float = Field(1e-4, gt=0)
    embedding_rate: float = Field(
        1.0, gt=0, description="Times learning_rate, for token embeddings; about 10 where training begins from nothing."
    )
    weight_decay: float = Field(0.0, ge=0)
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = Field(1e-8, gt=0)
    clip: float = Field(1.0, ge=0, description="Largest gradient norm; 0 is no limit.")
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "cosine", description="From learning_rate down to `final` of it, after warm-up."
    )
    warmup: float = Field(0.03, ge=0, le=1, description="Part of all steps that the learning rate rises.")
    final: float = Field(0.1, ge=0, le=1, description="Learning rate of the last step, as a part of learning_rate.")


class ZeroConfig(Section):
    """DeepSpeed ZeRO: what is divided among the workers, and what leaves the GPU."""

    stage: Literal[0, 1, 2, 3] = 1
    offload_optimizer: Literal["none", "cpu", "nvme"] = "none"
    offload_parameters: Literal["none", "cpu", "nvme"] = "none"
    nvme_path: str | None = Field(None, description="Folder on a local disk, for nvme.")

    @model_validator(mode="after")
    def _possible(self) -> ZeroConfig:
        if self.offload_parameters != "none" and self.stage != 3:
            raise ValueError(f"offload_parameters needs stage 3, found stage {self.stage}")
        if self.offload_optimizer != "none" and self.stage == 0:
            raise ValueError("offload_optimizer needs stage 1, 2 or 3, found stage 0")
        if self.offload_optimizer == "nvme" and self.stage != 3:
            raise ValueError(f"offload_optimizer: nvme needs stage 3, found stage {self.stage}")
        if "nvme" in (self.offload_optimizer, self.offload_parameters) and not self.nvme_path:
            raise ValueError("nvme needs nvme_path, a folder on a local disk")
        return self


class CheckpointConfig(Section):
    """When the state of a run is kept, and how much of it."""

    every_steps: int = Field(100, ge=1)
    keep_last: int = Field(2, ge=1)
    keep_best: int = Field(1, ge=0, description="Also kept: the ones with the lowest validation loss.")
    asynchronous: bool = Field(True, description="Written by a thread while training goes on.")


class ScaleConfig(Section):
    """Workers of a run. `workers: [min, max]` is elastic: it goes on with fewer and takes more when they come."""

    workers: int | tuple[int, int] = Field(1, description="A number, or [min, max].")
    device: Literal["cpu", "gpu"] = "gpu"
    cpus_per_worker: float = Field(1.0, gt=0)
    threads_per_worker: int | None = Field(
        None, ge=1, description="Torch's CPU threads; default: all cores divided by the workers."
    )
    accelerator_type: str | None = Field(None, description="Ray's name of the GPU, such as L4 or H200.")
    max_failures: int = Field(10, ge=0, description="Times a run is resumed after a worker or node was lost.")
    resize_every_s: float = Field(60.0, gt=0, description="How often an elastic run looks for more workers.")

    @field_validator("workers")
    @classmethod
    def _ordered(cls, value: int | tuple[int, int]) -> int | tuple[int, int]:
        low, high = value if isinstance(value, tuple) else (value, value)
        if not 1 <= low <= high:
            raise ValueError(f"{value}: write a number of at least 1, or [min, max] with 1 <= min <= max")
        return value

    @property
    def bounds(self) -> tuple[int, int]:
        """Fewest and most workers."""
        return self.workers if isinstance(self.workers, tuple) else (self.workers, self.workers)


class ComputePrice(Section):
    """US dollars of what a run uses."""

    cpu_hour: float = Field(0.0, ge=0, description="Per logical CPU and hour.")
    gpu_hour: float = Field(0.0, ge=0, description="Per GPU and hour.")
    storage_gb_month: float = Field(0.0, ge=0, description="Per GB of checkpoints and results kept for a month.")
    read_gb: float = Field(0.0, ge=0, description="Per GB of data read.")


class TrainConfig(Section):
    """One training run."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$", description="Names the run; the same name resumes it.")
    objective: Objective = "sft"
    base: str = Field(
        description="Hugging Face repository or folder to start from, or `scratch:chat`: the embedded model's shape, not trained."
    )
    output: Uri = Field("run/train", description="Local folder or pyarrow.fs URI; a run writes below `<output>/<name>`.")
    data: DataConfig
    epochs: float = Field(1.0, gt=0)
    max_steps: int | None = Field(None, ge=1, description="Stop after this many optimizer steps, whatever epochs says.")
    batch_size: int = Field(8, ge=1, description="Sequences per optimizer step, of all workers together.")
    micro_batch_size: int | None = Field(
        None, ge=1, description="Sequences per worker and forward pass; default: batch_size divided by the workers."
    )
    validate_every: int = Field(50, ge=1, description="Steps between two validation losses.")
    seed: int = Field(0, ge=0, description="Seed of adapters and of dropout.")
    precision: Literal["bf16", "fp16", "fp32"] = "bf16"
    activation_checkpointing: bool = False
    lora: LoraConfig | None = None
    dpo_beta: float = Field(0.1, gt=0)
    optimizer: OptimizerConfig = OptimizerConfig()
    zero: ZeroConfig = ZeroConfig()
    deepspeed_overrides: dict[str, Any] = Field(
        default_factory=dict, description="Merged into DeepSpeed's JSON; refused where it contradicts the fields above."
    )
    checkpoint: CheckpointConfig = CheckpointConfig()
    scale: ScaleConfig = ScaleConfig()
    price: ComputePrice = ComputePrice()

    @model_validator(mode="after")
    def _divides(self) -> TrainConfig:
        low, high = self.scale.bounds
        for workers in range(low, high + 1):
            if self.batch_size % workers:
                raise ValueError(f"batch_size {self.batch_size} cannot be divided among {workers} workers")
            share = self.batch_size // workers
            if self.micro_batch_size and share % self.micro_batch_size:
                raise ValueError(
                    f"{workers} workers do {share} sequences each per step, "
                    f"which micro_batch_size {self.micro_batch_size} does not divide"
                )
        if self.precision == "fp16" and self.scale.device == "cpu":
            raise ValueError("precision fp16 needs device gpu; use bf16 or fp32 on cpu")
        if self.objective == "dpo" and self.data.packing:
            raise ValueError("objective dpo compares pairs; set data.packing to false")
        return self


class SearchRange(Section):
    """Values of one field that a search may choose from: either `choice`, or `low` to `high`."""

    choice: tuple[Any, ...] = ()
    low: float | None = None
    high: float | None = None
    log: bool = False
    integer: bool = False

    @model_validator(mode="after")
    def _one_kind(self) -> SearchRange:
        ranged = self.low is not None and self.high is not None
        if bool(self.choice) == ranged or (self.low is None) != (self.high is None):
            raise ValueError("write either choice: [...], or low and high")
        if self.low is not None and self.high is not None and not self.low < self.high:
            raise ValueError(f"low {self.low} is not below high {self.high}")
        if self.log and (self.low is None or self.low <= 0):
            raise ValueError("log needs low above 0")
        return self


class TuneConfig(Section):
    """A search over fields of `train`, by their paths."""

    space: dict[str, SearchRange] = Field(
        min_length=1, description="Path below `train` (such as optimizer.learning_rate) to its values."
    )
    search: Literal["random", "tpe"] = Field("tpe", description="tpe is Optuna's.")
    scheduler: Literal["none", "asha", "pbt"] = "asha"
    trials: int = Field(8, ge=1)
    concurrent: int = Field(1, ge=1, description="Trials that train at the same time.")
    grace_steps: int = Field(
        20, ge=1, description="asha: no trial is stopped before this many steps; pbt: steps between two exchanges."
    )
    reduction: int = Field(3, ge=2, description="asha: one in so many goes on.")
    stop_after: int | None = Field(None, ge=1, description="Stop the search when so many trials in a row brought no gain.")
    seed: int = Field(0, ge=0)
    include_default: bool = Field(True, description="The first trial runs the file's own values.")

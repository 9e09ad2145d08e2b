"""What a run optimizes: from arrays of sequences to a summed loss, for dialogues, plain text and preference pairs.

`Objective` holds what a loss needs beside the model that is trained (the frozen reference of dpo). It neither steps nor divides:
sums over the batch and the workers are the loop's. Called by `train.loop`, for training and for validation.
"""

from __future__ import annotations

import copy
import math
from typing import TYPE_CHECKING, Any

from cluster.train_config import TrainConfig
from train import losses

if TYPE_CHECKING:
    import torch

    Part = dict[str, Any]


class Objective:
    """The loss of one run in one worker.

    Args:
        config: The run.
        model: The model before DeepSpeed has it; dpo without adapters keeps a frozen copy.
        device: Where it computes.
    """

    def __init__(self, config: TrainConfig, model: torch.nn.Module, device: torch.device) -> None:
        import torch

        self.preference, self.beta, self.device = config.objective == "dpo", config.dpo_beta, device
        self.reference: Any = None
        if self.preference and config.lora is None:
            dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[config.precision]
            self.reference = copy.deepcopy(model).to(device=device, dtype=dtype).eval().requires_grad_(False)

    def parts(self, arrays: losses.Arrays, micro: int) -> list[Part]:
        """Arrays of a worker's share of a batch, cut into micro batches and behind their last labels."""
        count = len(next(iter(arrays.values())))
        return [self._part({name: array[at : at + micro] for name, array in arrays.items()}) for at in range(0, count, micro)]

    def _part(self, arrays: losses.Arrays) -> Part:
        return losses.trimmed(losses.pairs(arrays) if self.preference else arrays)

    def counts(self, part: Part) -> tuple[int, int]:
        """What a part's loss is a sum over (trained tokens, or pairs that have a label), and its tokens without padding."""
        labelled = part["labels"][:, 1:] != losses.IGNORED
        # A pair without labels is only there so that all workers do the same number of forward passes.
        terms = int(labelled.any(axis=1).sum()) // 2 if self.preference else int(labelled.sum())
        return terms, int(losses.lengths(part["labels"]).sum())

    def loss(self, engine: Any, part: Part) -> tuple[torch.Tensor, torch.Tensor]:
        """Summed loss of a part, and how many of its pairs are ranked right (dpo)."""
        import torch

        batch = {name: torch.from_numpy(array).to(self.device, non_blocking=True) for name, array in part.items()}
        labels = batch.pop("labels")
        logits = _logits(engine, engine.module, batch, labels)
        if not self.preference:
            return losses.token_losses(logits, labels).sum(), torch.zeros((), device=self.device)
        with torch.no_grad():
            reference = losses.sequence_log_probs(self._reference_logits(engine, batch, labels), labels)
        each, right = losses.preference_losses(losses.sequence_log_probs(logits, labels), reference, self.beta)
        empty = labels.shape[0] // 2 - self.counts(part)[0]
        return each.sum() - empty * math.log(2.0), right.sum()

    def _reference_logits(self, engine: Any, batch: dict[str, torch.Tensor], labels: torch.Tensor) -> torch.Tensor:
        if self.reference is not None:
            return _logits(self.reference, self.reference, batch, labels)
        with engine.module.disable_adapter():
            return _logits(engine, engine.module, batch, labels)


def _logits(forward: Any, model: Any, batch: dict[str, torch.Tensor], labels: torch.Tensor) -> torch.Tensor:
    """Logits [N, V] of the positions that count, which is all that the output layer computes.

    Of a dialogue that is a third; the output layer is half of a small model's work, and with a large vocabulary most of the
    memory. transformers can only leave out the same positions in all sequences of a batch.
    """
    rows = losses.wanted(labels)
    head = model.get_output_embeddings()
    handle = head.register_forward_pre_hook(lambda _, given: (given[0][rows], *given[1:]))
    try:
        logits: torch.Tensor = forward(**batch, use_cache=False).logits
    finally:
        handle.remove()
    return logits

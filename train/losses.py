"""Losses over batches of fixed-length sequences: sums and counts, never means.

The mean is taken over the whole global batch (all workers, all micro batches), which only the loop knows: it divides by counts
that it has summed over the workers. So the loss depends neither on the number of workers nor on the micro batch.
Called by `train.loop`.

Shapes: B sequences, L tokens, V vocabulary. Labels are aligned with their tokens: `labels[b, t]` is `input_ids[b, t]` where the
token is to be learned and IGNORED elsewhere; position_ids restart at 0 with each dialogue.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

    Arrays = dict[str, NDArray[np.int64]]

IGNORED = -100


def mask_starts(arrays: Arrays, prefix: str = "") -> NDArray[np.int64]:
    """Labels [B, L] without those of first tokens: what comes before them is another dialogue, or nothing."""
    import numpy as np

    return np.where(arrays[f"{prefix}position_ids"] == 0, IGNORED, arrays[f"{prefix}labels"])


def lengths(labels: NDArray[np.int64]) -> NDArray[np.int64]:
    """Tokens [B] of each sequence up to its last label: what is behind it has no part in the loss."""
    import numpy as np

    trained = labels != IGNORED
    last = labels.shape[1] - np.argmax(trained[:, ::-1], axis=1)
    return np.where(trained.any(axis=1), last, 1)


def wanted(labels: torch.Tensor) -> torch.Tensor:
    """Which positions [B, L] predict a token that has a label: position t predicts token t + 1."""
    import torch.nn.functional as functional

    return functional.pad(labels[:, 1:] != IGNORED, (0, 1), value=False)


def token_losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihoods [N], in fp32, of the tokens that have a label.

    Args:
        logits: [N, V], those of the `wanted` positions in order of sequence and position.
        labels: [B, L].
    """
    import torch.nn.functional as functional

    shifted = labels[:, 1:]
    return functional.cross_entropy(logits.float(), shifted[shifted != IGNORED], reduction="none")


def sequence_log_probs(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Log-probabilities [B] of each sequence's labelled tokens together; `logits` as for `token_losses`."""
    import torch

    each = token_losses(logits, labels)
    rows = torch.nonzero(wanted(labels))[:, 0]
    return torch.zeros(labels.shape[0], dtype=each.dtype, device=each.device).index_add(0, rows, -each)


def preference_losses(policy: torch.Tensor, reference: torch.Tensor, beta: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Direct preference optimization (arXiv 2305.18290, equation 7).

    Args:
        policy: [2 * P] log-probabilities, the P chosen answers first, then the P rejected ones.
        reference: The same from the frozen model.
        beta: Strength of the pull towards the reference.

    Returns:
        Loss of each pair [P], and whether the chosen answer has gained more than the rejected one [P].
    """
    import torch.nn.functional as functional

    chosen, rejected = (policy - reference).chunk(2)
    margin = beta * (chosen - rejected)
    return -functional.logsigmoid(margin), margin > 0


def pairs(arrays: Arrays) -> Arrays:
    """Chosen and rejected sequences below each other, [2 * P, L], named like those of one kind."""
    import numpy as np

    names = ("input_ids", "labels", "position_ids")
    return {name: np.concatenate([arrays[f"chosen_{name}"], arrays[f"rejected_{name}"]]) for name in names}


def trimmed(arrays: Arrays) -> dict[str, Any]:
    """`input_ids`, `labels` (starts masked) and `position_ids`, cut behind the last label of the longest sequence."""
    labels = mask_starts(arrays)
    length = int(lengths(labels).max())
    return {
        "input_ids": arrays["input_ids"][:, :length],
        "labels": labels[:, :length],
        "position_ids": arrays["position_ids"][:, :length],
    }

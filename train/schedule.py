"""How large the learning rate is at each step: a pure function of the configuration.

The loop sets the learning rate itself, before each step, so that a resumed run needs only the step's number. No DeepSpeed
scheduler is used. Called by `train.loop`.
"""

from __future__ import annotations

import math

from cluster.train_config import OptimizerConfig


def learning_rate(optimizer: OptimizerConfig, step: int, steps: int) -> float:
    """The learning rate of one step.

    Args:
        optimizer: Peak, shape, warm-up and end.
        step: 0 for the first one.
        steps: Of the whole run.
    """
    warmup = math.ceil(optimizer.warmup * steps)
    if step < warmup:
        return optimizer.learning_rate * (step + 1) / warmup
    if optimizer.schedule == "constant":
        return optimizer.learning_rate
    # 0 at the first step after warm-up, 1 at the last step.
    done = min(1.0, (step - warmup) / max(1, steps - 1 - warmup))
    falling = 1.0 - done if optimizer.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
    return optimizer.learning_rate * (optimizer.final + (1.0 - optimizer.final) * falling)

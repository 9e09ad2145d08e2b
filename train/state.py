"""The whole state of a DeepSpeed engine as full fp32 tensors by name, and back, for every ZeRO stage.

`gather` is called by all workers together; each keeps the tensors it will write. `restore` puts them into an engine of any
stage on any number of workers. Both use DeepSpeed's public `safe_get_*` / `safe_set_*` and, for ZeRO 0, the plain optimizer.
What it does not hold is the place in the data: that follows from the step's number. Called by `train.loop`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from cluster.errors import TrainError
from train.models import trained

if TYPE_CHECKING:
    import torch

MASTER = "weight"  # the fp32 weight
MOMENTS = ("exp_avg", "exp_avg_sq")
SEPARATOR = ":"  # between kind and parameter name


def gather(engine: Any, rank: int, workers: int) -> dict[str, torch.Tensor]:
    """This worker's part of the state, on the CPU and safe from later changes. All workers must call it.

    Returns:
        `weight:<name>`, `exp_avg:<name>`, `exp_avg_sq:<name>` of every `workers`-th parameter, fp32.

    Raises:
        TrainError: one of them is not finite.
    """
    import torch

    part: dict[str, torch.Tensor] = {}
    for number, (name, parameter) in enumerate(trained(engine.module).items()):
        for kind in (MASTER, *MOMENTS):
            # Together, tensor by tensor: no worker ever holds the whole state.
            full = _full(engine, parameter, kind)
            if number % workers != rank:
                continue
            kept = full.detach().to("cpu", copy=True).float().reshape(shape_of(parameter))
            if not torch.isfinite(kept).all():
                raise TrainError(
                    f"{kind} of {name} is not finite; lower train.optimizer.learning_rate or set train.optimizer.clip; "
                    "the last checkpoint is from before it"
                )
            part[f"{kind}{SEPARATOR}{name}"] = kept
    return part


def restore(engine: Any, tensors: Iterable[tuple[str, torch.Tensor]], updates: int) -> None:
    """Set weights, moments and the optimizer's count. All workers must call it, with the same tensors.

    Args:
        engine: Fresh from `deepspeed.initialize`.
        tensors: Names and values as `gather` of all workers gave them.
        updates: Steps the optimizer has applied.

    Raises:
        TrainError: the tensors are not those of this model.
    """
    parameters = trained(engine.module)
    expected = {f"{kind}{SEPARATOR}{name}" for name in parameters for kind in (MASTER, *MOMENTS)}
    # An optimizer has no moments before its first step.
    _empty_step(engine)
    moments = []
    for key, value in tensors:
        kind, _, name = key.partition(SEPARATOR)
        if key not in expected or tuple(value.shape) != shape_of(parameters[name]):
            raise TrainError(f"the checkpoint is of another model: {name} {tuple(value.shape)} is not part of this one")
        expected.discard(key)
        if kind == MASTER:
            _set(engine, parameters[name], kind, value)
        else:
            moments.append((parameters[name], kind, value))
    if expected:
        raise TrainError(f"the checkpoint is of another model: it has no {min(expected).partition(SEPARATOR)[2]}")
    # Without learning rate it changes no weight, but copies the fp32 weights to the ones the model computes with.
    _empty_step(engine)
    for parameter, kind, value in moments:
        _set(engine, parameter, kind, value)
    set_updates(engine, updates)


def shape_of(parameter: torch.nn.Parameter) -> tuple[int, ...]:
    """Of the whole parameter, which ZeRO 3 keeps in parts."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def basic_optimizer(engine: Any) -> Any:
    """Torch's optimizer inside DeepSpeed's."""
    return getattr(engine.optimizer, "optimizer", engine.optimizer)


def set_learning_rate(engine: Any, rate: float) -> None:
    """For the next step; a group of `train.engine` may take it several times."""
    for group in engine.optimizer.param_groups:
        group["lr"] = rate * group.get("times", 1.0)


def set_updates(engine: Any, updates: int) -> None:
    """The step count that AdamW corrects its bias by."""
    import torch

    for state in basic_optimizer(engine).state.values():
        if isinstance(state.get("step"), torch.Tensor):
            state["step"].fill_(updates)
        else:
            state["step"] = updates


def get_updates(engine: Any) -> int:
    """See `set_updates`; 0 before the first step."""
    return max((int(state["step"]) for state in basic_optimizer(engine).state.values() if "step" in state), default=0)


def _empty_step(engine: Any) -> None:
    """One optimizer step with zero gradients and learning rate 0: it makes the moments (zero) and changes nothing."""
    import torch

    set_learning_rate(engine, 0.0)
    tokens = torch.zeros((1, 4), dtype=torch.long, device=engine.device)
    for _ in range(engine.gradient_accumulation_steps()):
        logits = engine(input_ids=tokens, use_cache=False).logits
        engine.backward(logits.float().sum() * 0.0)
        engine.step()


def _sharded(parameter: torch.nn.Parameter) -> bool:
    return hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping")


def _full(engine: Any, parameter: torch.nn.Parameter, kind: str) -> torch.Tensor:
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    value: torch.Tensor
    if not _sharded(parameter):
        value = parameter if kind == MASTER else engine.optimizer.state[parameter][kind]
    elif kind == MASTER:
        value = safe_get_full_fp32_param(parameter)
    else:
        value = safe_get_full_optimizer_state(parameter, kind)
    return value


def _set(engine: Any, parameter: torch.nn.Parameter, kind: str, value: torch.Tensor) -> None:
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

    if not _sharded(parameter):
        target = parameter.data if kind == MASTER else engine.optimizer.state[parameter][kind]
        target.copy_(value)
    elif kind == MASTER:
        safe_set_full_fp32_param(parameter, value.to(engine.device))
    else:
        safe_set_full_optimizer_state(parameter, value.to(engine.device), kind)

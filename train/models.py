"""From a configuration to the model that is trained, and back to a folder that vLLM and transformers load.

`base_folder` finds what a run starts from, `build` makes the model (with LoRA adapters where asked), `write_export` writes
weights as a Hugging Face folder or a PEFT adapter. It knows nothing of DeepSpeed, checkpoints or Ray. Called by `train.loop`,
`train.export` and data preparation, which needs the tokenizer.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.config import EMBEDDED_PREFIX
from cluster.errors import TrainError, one_line
from cluster.train_config import LoraConfig, TrainConfig

if TYPE_CHECKING:
    import torch

SCRATCH = "scratch:"
# Names of projection layers, of the architectures that are common; `all-linear` needs no names.
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj", "out_proj", "query_key_value", "c_attn")
MLP = ("gate_proj", "up_proj", "down_proj", "gate_up_proj", "fc1", "fc2", "dense_h_to_4h", "dense_4h_to_h", "c_fc")
# Everything of a base folder that belongs to its tokenizer, and is copied beside trained weights.
TOKENIZER_FILES = ("tokenizer*", "*.jinja", "special_tokens_map.json", "vocab.*", "merges.txt", "added_tokens.json", "*.model")


def base_folder(base: str) -> Path:
    """The Hugging Face folder a run starts from; for `scratch:chat` one with the weights that training begins with.

    Raises:
        TrainError: there is no such folder or repository on this machine or at Hugging Face.
        ConfigError: there is no such embedded model, or it has not been trained.
    """
    from cluster import embedded

    if base.startswith(SCRATCH):
        if base != "scratch:chat":
            raise TrainError(f"train.base {base!r}: use scratch:chat, a Hugging Face repository or a folder")
        from train.assistant import texts

        return embedded.scratch(texts(), embedded.cache_dir())
    if base.startswith(EMBEDDED_PREFIX):
        return embedded.build(base, embedded.cache_dir())
    folder = Path(base).expanduser()
    if folder.is_dir():
        return folder
    if base.startswith(("/", ".", "~")) or base.count("/") != 1:
        raise TrainError(f"train.base {base!r}: no such folder on this machine")
    return _downloaded(base)


def _downloaded(base: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(base, ignore_patterns=["*.pth", "*.gguf", "original/*", "*.onnx"]))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise TrainError(
            f"train.base {base!r}: cannot be fetched from Hugging Face and is no folder: {one_line(error)}"
        ) from error


def build(config: TrainConfig, folder: Path) -> torch.nn.Module:
    """The model in fp32 on the CPU, seeded by `train.seed`, with adapters when the run has them.

    Raises:
        TrainError: the folder holds no causal language model, or LoRA's targets are not in it.
    """
    import torch

    torch.manual_seed(config.seed)
    model = load(config, folder)
    if config.activation_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        if config.lora is not None:
            model.enable_input_require_grads()
    return model if config.lora is None else adapted(model, config.lora)


def load(config: TrainConfig, folder: Path) -> Any:
    """The base alone, fp32, without a cache."""
    import torch
    from transformers import AutoModelForCausalLM

    try:
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    except (OSError, ValueError, KeyError) as error:
        raise TrainError(f"train.base {config.base!r}: transformers cannot load it: {one_line(error)}") from error
    model.config.use_cache = False
    return model


def adapted(model: Any, lora: LoraConfig) -> Any:
    """The same model with LoRA adapters; only they are trained."""
    from peft import LoraConfig as PeftLora
    from peft import get_peft_model

    settings = PeftLora(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=targets(model, lora.targets),
        task_type="CAUSAL_LM",
    )
    try:
        return get_peft_model(model, settings)
    except ValueError as error:
        raise TrainError(f"train.lora.targets: {one_line(error)}") from error


def targets(model: torch.nn.Module, wanted: str | tuple[str, ...]) -> str | list[str]:
    """LoRA's target modules as PEFT takes them.

    Raises:
        TrainError: the model has none of them.
    """
    if wanted == "all-linear":
        return "all-linear"
    linear = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    sets = {"attention": ATTENTION, "mlp": MLP}
    names = [name for name in (sets[wanted] if isinstance(wanted, str) else wanted) if name in linear]
    if not names or (not isinstance(wanted, str) and len(names) < len(wanted)):
        found = sorted(name for name in linear if name in ATTENTION + MLP)
        raise TrainError(f"train.lora.targets {wanted!r}: not in this model, which has {', '.join(found) or 'no known names'}")
    return names


def trained(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """The parameters that are trained, by name, in the model's order."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def write_export(config: TrainConfig, folder: Path, weights: dict[str, torch.Tensor], out: Path) -> None:
    """Write trained weights as vLLM and transformers load them.

    Args:
        config: Of the run.
        folder: Its base folder.
        weights: fp32, by the names of `trained`.
        out: An empty folder: gets config, safetensors, tokenizer and chat template; with LoRA a PEFT adapter.

    Raises:
        TrainError: the weights are not those of this model.
    """
    model: Any = load(config, folder)
    if config.lora is not None:
        model = adapted(model, config.lora)
    parameters = trained(model)
    if parameters.keys() != weights.keys():
        other = sorted(parameters.keys() ^ weights.keys())[0]
        raise TrainError(f"the checkpoint is of another model than train.base {config.base!r} (first difference: {other})")
    for name, parameter in parameters.items():
        parameter.data.copy_(weights[name])
    if config.lora is None:
        model.to(_dtype(folder) or model.dtype)
        model.config.use_cache = True
    else:
        for settings in model.peft_config.values():
            settings.base_model_name_or_path = config.base
    model.save_pretrained(out)
    if config.lora is None:
        _copy_tokenizer(folder, out)


def _dtype(folder: Path) -> Any:
    """The precision in which the base was published."""
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(folder).dtype


def _copy_tokenizer(folder: Path, out: Path) -> None:
    for pattern in (*TOKENIZER_FILES, "generation_config.json"):
        for path in folder.glob(pattern):
            shutil.copyfile(path, out / path.name)

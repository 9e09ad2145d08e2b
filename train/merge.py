"""`python -m train merge BASE ADAPTER OUT`: a LoRA adapter added into its base's weights, as one Hugging Face folder.

PEFT does the arithmetic, in the base's own precision. Checked first is what PEFT would only warn about or report in many lines:
an adapter that belongs to another base. Nothing is trained, and a base that is quantized is refused. Called by `python -m
train` and by `compress --recover` when the recovery trained an adapter.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cluster.config import EMBEDDED_PREFIX
from cluster.errors import TrainError
from train.models import TOKENIZER_FILES, base_folder
from train.new_folder import new_folder

PREFIX = "base_model.model."


def add_parser(commands: Any) -> None:
    """Add the command to `python -m train`'s subparsers."""
    parser = commands.add_parser(
        "merge", help="add a LoRA adapter into its base's weights", description="add a LoRA adapter into its base's weights"
    )
    parser.set_defaults(run=main)
    parser.add_argument("base", help="Hugging Face folder or repository the adapter was trained on, or an embedded model")
    parser.add_argument("adapter", type=Path, help="folder with adapter_config.json and adapter_model.safetensors")
    parser.add_argument("out", type=Path, help="folder to write; must be empty or not there")


def main(args: argparse.Namespace) -> int:
    """Run the command. Returns the exit status."""
    merge(model_folder(args.base), args.adapter, args.out, print)
    return 0


def merge(base: Path, adapter: Path, out: Path, say: Callable[[str], None]) -> None:
    """Write `out`: the base's weights with the adapter's added, the tokenizer and its chat template.

    Args:
        base: Hugging Face folder.
        adapter: PEFT folder. Its tokenizer, where it has one, goes before the base's.
        out: Made whole or not at all.
        say: Takes a line at the end.

    Raises:
        TrainError: `out` is not empty, or the adapter is none, or does not fit the base.
    """
    with new_folder(out) as folder:
        _load_merged(base, adapter).save_pretrained(folder)
        copy_tokenizer(base, folder)
        copy_tokenizer(adapter, folder)
    say(f"merged {adapter} into {base}: {out}")


def model_folder(name: str) -> Path:
    """The folder behind a model's name: a folder, `embedded:chat` and the like, or a Hugging Face repository.

    Raises:
        TrainError: There is none.
        ConfigError: No embedded model is called that.
    """
    from cluster import embedded

    folder = Path(name).expanduser()
    if name.startswith(EMBEDDED_PREFIX):
        return embedded.build(name, embedded.cache_dir())
    if folder.is_dir():
        return folder
    if name.startswith(("/", ".", "~")) or name.count("/") != 1:
        raise TrainError(f"{name}: no such model folder on this machine")
    return base_folder(name)


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy tokenizer and chat template from one model folder to another."""
    for pattern in TOKENIZER_FILES:
        for file in source.glob(pattern):
            shutil.copyfile(file, target / file.name)


def _load_merged(base: Path, adapter: Path) -> Any:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    settings = _settings(adapter)
    if (base / "adapter_config.json").is_file() or not (base / "config.json").is_file():
        raise TrainError(
            f"{base}: is no model folder (no config.json, or an adapter itself); name the base the adapter was trained on"
        )
    if "quantization_config" in json.loads((base / "config.json").read_text()):
        raise TrainError(f"{base}: is quantized; merge into the unquantized base, then compress the result")
    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    _check_shapes(model, base, adapter, settings)
    try:
        return PeftModel.from_pretrained(model, str(adapter)).merge_and_unload(safe_merge=True)
    except (RuntimeError, ValueError, KeyError) as error:
        # PEFT's own checks, for instance of weights that are no numbers; its first line says which.
        raise TrainError(f"{adapter}: does not merge into {base}: {str(error).splitlines()[0]}") from error


def _settings(adapter: Path) -> dict[str, Any]:
    try:
        settings: dict[str, Any] = json.loads((adapter / "adapter_config.json").read_text())
    except FileNotFoundError:
        raise TrainError(f"{adapter}: has no adapter_config.json; name the folder of a PEFT adapter") from None
    except ValueError as error:
        raise TrainError(f"{adapter}/adapter_config.json: is no JSON: {error}") from None
    if settings.get("peft_type") != "LORA":
        raise TrainError(f"{adapter}: is a {settings.get('peft_type')} adapter; only LORA can be merged")
    if not (adapter / "adapter_model.safetensors").is_file():
        raise TrainError(f"{adapter}: has no adapter_model.safetensors")
    return settings


def _check_shapes(model: Any, base: Path, adapter: Path, settings: dict[str, Any]) -> None:
    """Each A [rank, in] and B [out, rank] must have a linear layer [out, in] of its name in the base."""
    from safetensors import SafetensorError, safe_open

    named = f"{adapter}: was made for another base ({settings.get('base_model_name_or_path')}) than {base}"
    weights = dict(model.named_parameters())
    try:
        with safe_open(str(adapter / "adapter_model.safetensors"), framework="pt") as file:
            shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118 - no mapping
    except SafetensorError as error:
        raise TrainError(f"{adapter}/adapter_model.safetensors: cannot be read: {error}") from None
    for key, shape in shapes.items():
        layer, _, part = key.removeprefix(PREFIX).partition(".lora_")
        axis = {"A.weight": 1, "B.weight": 0}.get(part)
        if axis is None:
            continue  # saved whole, or of a kind that PEFT checks
        weight = weights.get(f"{layer}.weight")
        if weight is None:
            raise TrainError(f"{named}, which has no {layer}")
        if shape[axis] != weight.shape[axis]:
            side = ("outputs", "inputs")[axis]
            raise TrainError(f"{named}: {layer} has {weight.shape[axis]} {side} there, {shape[axis]} in the adapter")

"""`python -m train compress MODEL OUT --method ...`: a smaller model, and its size, speed and quality before and after.

The order of things, nothing more: rows (`samples`), the method (`quantize` or `prune`), with `--recover` a short training of
the pruned model by the same code as `train sft`, the two models side by side (`measure`). OUT is a Hugging Face folder that
vLLM loads; it appears when all of it is there, with the report in `compress.json`. The report is also the last line of the
output.

The quantizing methods write the `compressed-tensors` format with that library. llm-compressor, which is built on it, is not
used: vLLM 0.29 needs compressed-tensors 0.17.0, and no release of llm-compressor from 0.8 to 0.14 takes that version and a
transformers of version 5, so the two cannot be installed together.

What vLLM 0.29 runs (a CPU without AMX here; GPUs by its list of kernels):

| method | CPU | GPU |
| --- | --- | --- |
| int8 | yes | yes |
| int4, gptq, awq | yes, computing in bfloat16 (the default), not in float32 | yes |
| fp8 | yes, several times slower than unquantized: no kernel of its own | yes, from compute capability 8.9 |
| int8-weights | no kernel | yes |
| prune | yes | yes |
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cluster.command import add_set, exit_on_signals
from cluster.config import Config, load
from cluster.errors import TrainError, one_line
from train.measure import compare
from train.merge import copy_tokenizer, merge, model_folder
from train.new_folder import new_folder
from train.prune import prune
from train.quantize import PRESETS, quantize, save
from train.samples import Sample, read_samples

METHODS = (*PRESETS, "prune")
WEIGHTS = ("*.safetensors", "*.bin")
Say = Callable[[str], None]


def add_parser(commands: Any) -> None:
    """Add the command to `python -m train`'s subparsers."""
    parser = commands.add_parser(
        "compress",
        help="make a model smaller: quantize or prune it, and measure what that cost",
        description="make a model smaller: quantize or prune it, and measure what that cost",
    )
    parser.set_defaults(run=main, stopped="stopped; nothing was written")
    parser.add_argument("model", help="Hugging Face folder or repository, or an embedded model")
    parser.add_argument("out", type=Path, help="folder to write; must be empty or not there")
    parser.add_argument("--method", required=True, choices=METHODS)
    parser.add_argument(
        "--calibrate", action="append", default=[], metavar="DATA", help="rows for gptq, awq and prune, as data.train"
    )
    parser.add_argument("--calibrate-rows", type=_count, default=128, metavar="N", help="how many of them (128)")
    parser.add_argument("--drop-layers", type=int, default=0, metavar="N", help="prune: decoder layers that go")
    parser.add_argument(
        "--keep-mlp", type=_part, default=1.0, metavar="PART", help="prune: part of each MLP's neurons that stays"
    )
    parser.add_argument("--recover", type=Path, metavar="CONFIG", help="prune: train the result with this file's `train` section")
    add_set(parser, "override a value of that file")
    parser.add_argument(
        "--eval", action="append", default=[], metavar="DATA", help="rows to measure quality on, as data.validation"
    )
    parser.add_argument("--eval-rows", type=_count, default=64, metavar="N", help="how many of them (64)")
    parser.add_argument("--max-length", type=_count, default=512, metavar="TOKENS", help="longest row of both (512)")
    parser.add_argument("--no-measure", action="store_true", help="do not start vLLM; the report has sizes only")


def main(args: argparse.Namespace) -> int:
    """Run the command. Returns the exit status.

    Raises:
        TidepoolError: One line: what is wrong and what to do; OUT is not there then.
    """
    # What is half done is taken away again.
    exit_on_signals()
    print(json.dumps(compress(args, _say)), flush=True)
    return 0


def compress(args: argparse.Namespace, say: Say) -> dict[str, Any]:
    """What `main` does, with the report returned: sizes in bytes of the weight files, the rest as in `measure.Comparison`."""
    if args.method != "prune" and (args.drop_layers or args.keep_mlp != 1.0 or args.recover):
        raise TrainError(f"--method {args.method}: --drop-layers, --keep-mlp and --recover belong to --method prune")
    recovery = _recovery(args)
    original = model_folder(args.model)
    positions = _positions(original)
    max_length = min(args.max_length, positions)
    with new_folder(args.out) as folder:
        # Read before the long work, so that a bad row is found at once.
        tried = read_samples(args.eval, original, args.eval_rows, max_length) if args.eval else []
        calibration = read_samples(args.calibrate, original, args.calibrate_rows, max_length) if args.calibrate else []
        report: dict[str, Any] = {"method": args.method, "model": args.model, "out": str(args.out)}
        report |= _compressed(original, folder, args, calibration, say)
        if recovery is not None:
            report["recovery"] = _recover(recovery, folder, say)
        before, after = weight_bytes(original), weight_bytes(folder)
        report["size"] = {"before_bytes": before, "after_bytes": after, "ratio": after / before}
        say(f"compress: {before:,} bytes of weights became {after:,}")
        if not args.no_measure:
            # An answer may be twice as long as the row's own, and some.
            report["vllm"] = compare(original, folder, tried, min(3 * max_length + 64, positions), say).report()
        (folder / "compress.json").write_text(json.dumps(report, indent=2) + "\n")
    return report


def weight_bytes(folder: Path) -> int:
    """Bytes of a model folder's weight files; where it has them in two formats, of the one that is loaded."""
    sizes = (sum(file.stat().st_size for file in folder.glob(pattern)) for pattern in WEIGHTS)
    return next((size for size in sizes if size), 0)


def _positions(folder: Path) -> int:
    """The longest context of a model, in tokens."""
    from transformers import AutoConfig

    try:
        return int(AutoConfig.from_pretrained(folder).max_position_embeddings)
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise TrainError(f"{folder}: is no language model that can be loaded: {one_line(error)}") from error


def _compressed(
    original: Path, folder: Path, args: argparse.Namespace, calibration: Sequence[Sample], say: Say
) -> dict[str, Any]:
    """Load, compress and write; what the report says of it."""
    import torch
    from transformers import AutoModelForCausalLM

    try:
        model = AutoModelForCausalLM.from_pretrained(original, dtype="auto")
    except (OSError, ValueError) as error:
        raise TrainError(f"{original}: is no causal language model that can be loaded: {one_line(error)}") from error
    if getattr(model.config, "quantization_config", None) is not None:
        raise TrainError(f"{original}: is quantized already; start from the unquantized model")
    model = model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    batches = [sample.ids for sample in calibration]
    done: dict[str, Any] = {"calibration_rows": len(batches), "calibration_tokens": sum(map(len, batches))}
    if args.method == "prune":
        done["pruned"] = asdict(prune(model, batches, args.drop_layers, args.keep_mlp, say))
        model.save_pretrained(folder)
    else:
        quantize(model, args.method, batches, say)
        save(model, folder)
    copy_tokenizer(original, folder)
    return done


def _recovery(args: argparse.Namespace) -> Config | None:
    """The file given with `--recover`, which has a `train` section; or None."""
    if args.recover is None:
        if args.set:
            raise TrainError("--set: overrides values of the file given with --recover, which is missing")
        return None
    config = load(args.recover, args.set)
    if config.train is None:
        raise TrainError(f"{args.recover}: has no 'train' section to recover with")
    return config


def _recover(config: Config, folder: Path, say: Say) -> dict[str, Any]:
    """Train the pruned model in `folder`; its weights are replaced. The run's own files go with it.

    They are on this machine, so a cluster that is joined for it must run on this machine too.
    """
    from train.bar import Bar
    from train.connect import connected
    from train.run import checked, train
    from train.supervisor import NAMESPACE

    base = folder / "pruned"
    base.mkdir()
    for file in [path for path in folder.iterdir() if path.is_file()]:
        file.rename(base / file.name)
    assert config.train is not None
    wanted = checked(config.train.model_copy(update={"base": str(base), "output": str(folder / "recovery")}))
    bar = Bar()
    say("recover: connecting to Ray")
    with connected(config, wanted.scale.bounds[1] * wanted.scale.cpus_per_worker, NAMESPACE):
        try:
            result = train(wanted, say=bar.say, on_step=bar.step)
        finally:
            bar.close()
    export = Path(result.export)
    if (export / "adapter_config.json").is_file():
        merge(base, export, folder / "merged", say)
        export = folder / "merged"
    for file in [path for path in export.iterdir() if path.is_file()]:
        file.rename(folder / file.name)
    for name in ("pruned", "recovery", "merged"):
        shutil.rmtree(folder / name, ignore_errors=True)
    return {"steps": result.steps, "loss": result.loss, "validation_loss": result.validation_loss, "seconds": result.seconds}


def _say(line: str) -> None:
    print(line, flush=True)


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


def _part(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError("must be above 0 and at most 1")
    return value

"""A checkpoint as a Hugging Face folder or a PEFT adapter, on any `Storage`.

`write` is what worker 0 does at the end of a run; `export` is the command, for any checkpoint of a run. The file that makes a
folder a model (config.json, adapter_config.json) is written last, so a half-written export does not load. It does not train.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from cluster.config import parse
from cluster.errors import DataError, TrainError
from cluster.train_config import TrainConfig
from train import checkpoint, models
from train.checkpoint import Checkpoint
from train.state import MASTER, SEPARATOR
from train.storage import Storage

FOLDER = "export"
LAST = ("config.json", "adapter_config.json")


def write(config: TrainConfig, base: Path, run: Storage, which: Checkpoint, out: Storage) -> None:
    """Write one checkpoint's weights.

    Args:
        config: Of the run.
        base: Its base folder.
        run: The run's folder.
        which: The checkpoint.
        out: Gets the files; what is there of an earlier export is replaced.
    """
    start = f"{MASTER}{SEPARATOR}"
    weights = {name.removeprefix(start): tensor for name, tensor in checkpoint.read(run, which) if name.startswith(start)}
    with tempfile.TemporaryDirectory(prefix="tidepool-export-") as name:
        folder = Path(name)
        models.write_export(config, base, weights, folder)
        for old in LAST:
            out.delete(old)
        files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
        for file in sorted(files, key=lambda file: file in LAST):
            out.put(folder / file, file)


def export(run_uri: str, step: int | None, out_uri: str) -> Checkpoint:
    """Export a checkpoint of a run, the newest one unless `step` says which.

    Raises:
        TrainError: there is no such run or checkpoint.
    """
    run = Storage.open(run_uri)
    found = checkpoint.stored(run)
    if not found:
        raise TrainError(f"{run_uri}: holds no checkpoint; give a run's folder, <train.output>/<train.name>")
    chosen = [item for item in found if item.step == (step if step is not None else found[-1].step)]
    if not chosen:
        steps = ", ".join(str(item.step) for item in found)
        raise TrainError(f"{run_uri}: has no checkpoint {step}; there are {steps}")
    config = config_of(run)
    write(config, models.base_folder(config.base), run, chosen[0], Storage.open(out_uri))
    return chosen[0]


def config_of(run: Storage) -> TrainConfig:
    """The configuration a run was started with.

    Raises:
        DataError: there is no run.
    """
    content = run.read_json("run.json")
    config = parse({"train": content["config"]}, run.name("run.json")).train
    if config is None:
        raise DataError(f"{run.name('run.json')}: has no configuration")
    return config

"""The default chat model, `embedded:chat`: trained on this machine by the ordinary training command, kept by its content.

`folder` says where it is kept, `ensure` trains it when it is not there: `python -m train sft configs/assistant.yaml` on the
cluster that `up` has just started, as a process, because this package imports no training code. The folder's name ends in a
hash of all that decides what is learned: the recipe, the data set, the tokenizer's text and the libraries' versions. An
interrupted training goes on from its last checkpoint at the next `up`. Called by `launch` and, to find the folder, by
`embedded.build`.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

from cluster.config import Config
from cluster.errors import LaunchError
from cluster.session import Session

ROOT = Path(__file__).resolve().parents[1]
RECIPE = ROOT / "configs" / "assistant.yaml"
CONTENT = (
    RECIPE,
    ROOT / "train/datasets/assistant/train.parquet",
    ROOT / "cluster/embedded.py",
    ROOT / "cluster/embedded_text.py",
)
NAME = "assistant"


def folder(cache_dir: Path) -> Path:
    """Where the trained model is, or will be, below the folder of built models."""
    digest = hashlib.sha256()
    for path in CONTENT:
        digest.update(path.read_bytes())
    for name in ("torch", "transformers", "tokenizers", "deepspeed"):
        digest.update(f"{name}={version(name)}\n".encode())
    return cache_dir / f"chat-{digest.hexdigest()[:12]}"


def ensure(config: Config, session: Session, environ: dict[str, str], cache_dir: Path, say: Callable[[str], None]) -> Path:
    """The folder, trained first if it is not there; progress goes to standard error.

    Args:
        config: Says where the cluster is that trains it.
        environ: The cluster's environment; the training is stopped with the cluster.

    Raises:
        LaunchError: the training ended without a model.
    """
    wanted = folder(cache_dir)
    if wanted.is_dir():
        return wanted
    say("training the default model, once; it is kept for the next time")
    output = session.run_dir / "train"
    settings = {
        "run_dir": str(session.run_dir),
        "node.host": config.node.host,
        "node.gcs_port": config.node.gcs_port,
        "train.name": f"{NAME}-{wanted.name}",
        "train.output": str(output),
    }
    command = [sys.executable, "-m", "train", "sft", str(RECIPE)]
    command += [part for name, value in settings.items() for part in ("--set", f"{name}={json.dumps(value)}")]
    # A session of its own, so that Ctrl-C reaches `up` alone, which then stops everything.
    process = subprocess.Popen(
        command, env=environ, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True
    )
    if process.wait() != 0:
        raise LaunchError(f"the default model could not be trained (see above); its run: {output}")
    run = output / f"{NAME}-{wanted.name}"
    cache_dir.mkdir(parents=True, exist_ok=True)
    own = Path(tempfile.mkdtemp(prefix=f".{wanted.name}.", dir=cache_dir))
    try:
        shutil.copytree(run / "export", own, dirs_exist_ok=True)
        own.chmod(0o755)
        try:
            own.rename(wanted)
        except OSError:
            if not wanted.is_dir():  # otherwise another `up` was first
                raise
    finally:
        shutil.rmtree(own, ignore_errors=True)
    return wanted

"""The default chat model, `embedded:chat`: trained on this machine by the ordinary training command, kept by its content.

`ensure` trains it when it is not there: `python -m train sft configs/assistant.yaml` on the cluster that `up` has just started,
as a process, because this package imports no training code. Where it is kept is `embedded.trained_folder`. An interrupted
training goes on from its last checkpoint at the next `up`. Called by `launch`.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from cluster.config import Config
from cluster.embedded import RECIPE, ROOT, built, trained_folder
from cluster.errors import LaunchError
from cluster.session import Session

NAME = "assistant"


def ensure(config: Config, session: Session, environ: dict[str, str], cache_dir: Path, say: Callable[[str], None]) -> Path:
    """The folder, trained first if it is not there; progress goes to standard error.

    Args:
        config: Says where the cluster is that trains it.
        environ: The cluster's environment; the training is stopped with the cluster.

    Raises:
        LaunchError: the training ended without a model.
    """
    wanted = trained_folder(cache_dir)
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
    export = output / f"{NAME}-{wanted.name}" / "export"
    return built(wanted, lambda folder: _copy(export, folder))


def _copy(export: Path, folder: Path) -> None:
    shutil.copytree(export, folder, dirs_exist_ok=True)
    folder.chmod(0o755)  # `copytree` gave it the mode of the run's folder

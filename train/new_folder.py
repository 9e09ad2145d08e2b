"""A result folder that appears whole or not at all.

`new_folder(out)` gives an empty folder beside `out` to write into, and renames it to `out` at the end; after an error nothing
of it is left. It knows nothing of what is written. Local folders only: models that are loaded from a folder have to be in one.
Called by `compress` and `merge`.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cluster.errors import TrainError


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """An empty folder that becomes `out` when the block ends without an error.

    Raises:
        TrainError: `out` is there and not an empty folder, or it cannot be written.
    """
    if out.is_symlink() or (out.exists() and (not out.is_dir() or any(out.iterdir()))):
        raise TrainError(f"{out}: is there already and not empty; name another folder, or remove it first")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        own = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    except OSError as error:
        raise TrainError(f"{out}: cannot be written: {error.strerror or error}") from None
    try:
        own.chmod(0o755)
        try:
            yield own
            for file in own.rglob("*"):
                file.chmod(0o755 if file.is_dir() else 0o644)  # safetensors writes 0600
            own.rename(out)  # an empty folder at `out` is replaced
        except OSError as error:
            # A full disk shows up here; other files' errors name themselves.
            where = error.filename or out
            raise TrainError(f"{out}: not written: {where}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(own, ignore_errors=True)

"""Checkpoints: files of one step in a folder of their own, on any `Storage`, valid only once their index is there.

    checkpoints/step-00000100/<attempt>-00000-000.safetensors     tensors of worker 0 (there may be more files and workers)
    checkpoints/step-00000100/<attempt>-00000.json                worker 0 has written all of its files
    checkpoints/step-00000100/index.json                          written last: the checkpoint is whole

Tensors are full fp32 weights and Adam moments by parameter name (`train.state` gathers them), so nothing depends on the number of
workers or the ZeRO stage. `Writer` writes in a thread while training goes on, from copies on the CPU; worker 0 waits for all the
others' marks before it writes the index. A save that is killed leaves files without an index, which nothing reads and the next
save removes. It does not decide when to save (`train.loop`) and knows nothing of engines. Called by the loop and by exports.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from cluster.errors import DataError, TidepoolError, TrainError
from cluster.train_config import CheckpointConfig
from train.storage import Storage

if TYPE_CHECKING:
    import torch

    Tensors = Mapping[str, torch.Tensor]

FOLDER = "checkpoints"
INDEX = "index.json"
FILE_BYTES = 2**30  # a file of a checkpoint is about this large at most
LOOK_S = 0.05  # how often worker 0 looks whether the others have written


@dataclass(frozen=True)
class Checkpoint:
    """What the index of a checkpoint says."""

    step: int  # optimizer steps done
    updates: int  # of them applied by the optimizer (fp16 skips some)
    workers: int
    model: dict[str, Any]  # base, LoRA and objective, to refuse a checkpoint of another model
    loss: float | None = None
    validation_loss: float | None = None
    files: tuple[str, ...] = ()
    bytes: int = 0
    seconds: float = 0.0  # from the copy of the state to the index

    @property
    def folder(self) -> str:
        """Its folder's name."""
        return folder_of(self.step)


def folder_of(step: int) -> str:
    """Name of a step's folder."""
    return f"step-{step:08d}"


def stored(run: Storage) -> list[Checkpoint]:
    """All whole checkpoints of a run, by step."""
    home = run.below(FOLDER)
    known = {field.name for field in fields(Checkpoint)}
    found = []
    for name in home.list():
        if name.startswith("step-") and home.exists(f"{name}/{INDEX}"):
            # Indexes of older versions say more.
            content = {key: value for key, value in home.read_json(f"{name}/{INDEX}").items() if key in known}
            found.append(Checkpoint(**{**content, "files": tuple(content["files"])}))
    return sorted(found, key=lambda checkpoint: checkpoint.step)


def latest(run: Storage) -> Checkpoint | None:
    """The newest whole checkpoint of a run."""
    found = stored(run)
    return found[-1] if found else None


def read(run: Storage, checkpoint: Checkpoint) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and tensors of a checkpoint, file by file; on a local disk each is read when it is used.

    Raises:
        DataError: a file is missing or broken.
    """
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import load

    home = run.below(FOLDER).below(checkpoint.folder)
    for file in checkpoint.files:
        path = home.local(file)
        try:
            if path is None:
                yield from load(home.read_bytes(file)).items()
            else:
                with safe_open(str(path), framework="pt") as tensors:
                    for name in tensors.keys():  # noqa: SIM118 - it is no mapping
                        yield name, tensors.get_tensor(name)
        except (SafetensorError, FileNotFoundError) as error:
            raise DataError(f"{home.name(file)}: is missing or broken; delete {home.name()}, an older one is used") from error


def to_remove(found: list[Checkpoint], config: CheckpointConfig) -> list[Checkpoint]:
    """The checkpoints that neither `keep_last` nor `keep_best` keeps."""
    by_step = sorted(found, key=lambda checkpoint: checkpoint.step)
    measured = [checkpoint for checkpoint in by_step if checkpoint.validation_loss is not None]
    best = sorted(measured, key=lambda checkpoint: (checkpoint.validation_loss or 0.0, -checkpoint.step))[: config.keep_best]
    kept = {checkpoint.step for checkpoint in by_step[-config.keep_last :]} | {checkpoint.step for checkpoint in best}
    return [checkpoint for checkpoint in by_step if checkpoint.step not in kept]


class Writer:
    """Writes one worker's part of each checkpoint, in a thread.

    Args:
        run: The run's folder.
        config: How many are kept.
        rank: Of this worker; 0 writes the index and removes old checkpoints.
        workers: How many write.
        attempt: The same for all workers of this start of the run and for no other, so that files of a killed save are not
            taken for new ones.
        committed: Told of each whole checkpoint, on worker 0, from the thread.
        file_bytes: About how large a file gets; a larger state is several files.
    """

    def __init__(
        self,
        run: Storage,
        config: CheckpointConfig,
        rank: int,
        workers: int,
        attempt: str,
        committed: Callable[[Checkpoint], None],
        *,
        file_bytes: int = FILE_BYTES,
    ) -> None:
        self.home = run.below(FOLDER)
        self.config, self.rank, self.workers, self.attempt, self.committed = config, rank, workers, attempt, committed
        self.file_bytes = file_bytes
        self.thread: threading.Thread | None = None
        self.failed: TidepoolError | None = None
        self.known = stored(run) if rank == 0 else []

    def save(self, checkpoint: Checkpoint, tensors: Tensors) -> None:
        """Start to write. Waits for the save before, and for this one too unless `asynchronous`.

        Args:
            checkpoint: Without files and bytes.
            tensors: This worker's part, on the CPU, not changed any more.

        Raises:
            TrainError: an earlier save failed, or this one when it is not asynchronous.
        """
        self.wait()
        self.thread = threading.Thread(target=self._guarded, args=(checkpoint, tensors), name="checkpoint", daemon=True)
        self.thread.start()
        if not self.config.asynchronous:
            self.wait()

    def wait(self) -> None:
        """Until nothing is being written.

        Raises:
            TrainError: a save failed; earlier checkpoints are whole.
        """
        if self.thread is not None:
            self.thread.join()
            self.thread = None
        self.check()

    def check(self) -> None:
        """Raise the error of a failed save, without waiting."""
        if self.failed is not None:
            raise TrainError(f"checkpoint not written: {self.failed}") from self.failed

    def _guarded(self, checkpoint: Checkpoint, tensors: Tensors) -> None:
        try:
            self._write(checkpoint, tensors)
        except TidepoolError as error:
            self.failed = error

    def _write(self, checkpoint: Checkpoint, tensors: Tensors) -> None:
        from safetensors.torch import save

        begun = time.monotonic()
        home = self.home.below(checkpoint.folder)
        written: list[str] = []
        size = 0
        for number, part in enumerate(_parts(tensors, self.file_bytes)):
            data = save(part)
            written.append(f"{self.attempt}-{self.rank:05d}-{number:03d}.safetensors")
            home.write_bytes(written[-1], data)
            size += len(data)
        home.write_json(_mark(self.attempt, self.rank), {"files": written, "bytes": size})
        if self.rank == 0:
            self._commit(checkpoint, home, begun)

    def _commit(self, checkpoint: Checkpoint, home: Storage, begun: float) -> None:
        files: list[str] = []
        size = 0
        for rank in range(self.workers):
            # A worker that fails ends the whole run, and this thread with it.
            while not home.exists(_mark(self.attempt, rank)):
                time.sleep(LOOK_S)
            mark = home.read_json(_mark(self.attempt, rank))
            files += mark["files"]
            size += mark["bytes"]
        whole = replace(checkpoint, files=tuple(files), bytes=size, seconds=round(time.monotonic() - begun, 3))
        home.write_json(INDEX, asdict(whole))
        self.known = [*(known for known in self.known if known.step != whole.step), whole]
        for old in to_remove(self.known, self.config):
            # The index goes first: what is left of a removal that is killed is not a checkpoint any more.
            self.home.delete(f"{old.folder}/{INDEX}")
            self.home.delete(old.folder)
            self.known.remove(old)
        self._sweep(whole)
        self.committed(whole)

    def _sweep(self, whole: Checkpoint) -> None:
        """Remove what killed saves left: files without an index, and those of other attempts beside this one."""
        known = {checkpoint.folder for checkpoint in self.known}
        for name in self.home.list():
            if name not in known:
                self.home.delete(name)
        own = {*whole.files, INDEX}
        for name in self.home.list(whole.folder):
            if name not in own:
                self.home.delete(f"{whole.folder}/{name}")


def _mark(attempt: str, rank: int) -> str:
    return f"{attempt}-{rank:05d}.json"


def _parts(tensors: Tensors, limit: int) -> Iterator[dict[str, torch.Tensor]]:
    """The tensors in groups of at most about `limit` bytes; one empty group when there are none."""
    part: dict[str, torch.Tensor] = {}
    size = 0
    for name, tensor in tensors.items():
        if part and size + tensor.nbytes > limit:
            yield part
            part, size = {}, 0
        part[name] = tensor
        size += tensor.nbytes
    yield part

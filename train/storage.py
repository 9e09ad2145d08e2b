"""Files below one address: a local folder or any `pyarrow.fs` URI (s3://, gs://, hdfs://, file://).

Everything that training keeps (prepared sequences, checkpoints, logs, exports) goes through a `Storage`. A file is written under
a temporary name and then moved, so a reader never sees half of it; on object stores, where a put is all or nothing and a move is
a copy, it is put at once. Paths are relative to the address, with `/`, and cannot leave it. It holds no cache, does no retries
beyond the filesystem's own, and knows nothing of what the files mean.

Failed writes are `TrainError`, failed reads `DataError`: one line with the address and what to do.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NoReturn

import pyarrow as pa
from pyarrow import fs

from cluster.errors import DataError, TidepoolError, TrainError, one_line

TEMPORARY = ".tmp"
SPOOL_BYTES = 64 * 2**20
MOVES = ("local", "hdfs")  # filesystems whose move replaces a file in one step
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
CLOSED = (errno.EACCES, errno.EPERM, errno.EROFS)


@dataclass(frozen=True)
class Storage:
    """One address. Can be pickled and opened again in another process.

    Args:
        filesystem: A `pyarrow.fs.FileSystem`.
        root: The address as that filesystem spells it, without a slash at the end.
        uri: The address as a person wrote it, for messages.
    """

    filesystem: Any
    root: str
    uri: str

    @classmethod
    def open(cls, uri: str) -> Storage:
        """The storage of an address. Touches nothing: a folder is made by the first write.

        Raises:
            DataError: the address is not one that `pyarrow.fs` knows.
        """
        filesystem, root = locate(uri)
        return cls(filesystem, root.rstrip("/") or "/", uri.rstrip("/") or "/")

    def below(self, path: str) -> Storage:
        """The storage of a folder of this one."""
        return Storage(self.filesystem, self._full(path), f"{self.uri}/{path}")

    def local(self, path: str = "") -> Path | None:
        """The file as a path of this machine, for memory maps; None when it is elsewhere."""
        return Path(self._full(path)) if self.filesystem.type_name == "local" else None

    def name(self, path: str = "") -> str:
        """A file's full address, for messages."""
        return f"{self.uri}/{path}" if path else self.uri

    def exists(self, path: str = "") -> bool:
        """Whether there is a file or a folder."""
        return bool(self._info(path).type != fs.FileType.NotFound)

    def size(self, path: str = "") -> int:
        """Bytes of a file, or of all files of a folder; 0 when there is none."""
        info = self._info(path)
        if info.type == fs.FileType.File:
            return int(info.size)
        return sum(int(item.size) for item in self._select(path, recursive=True) if item.type == fs.FileType.File)

    def list(self, path: str = "") -> list[str]:
        """Names in a folder, sorted, without unfinished files; empty when there is no such folder."""
        names = (item.base_name for item in self._select(path, recursive=False))
        return sorted(name for name in names if not name.endswith(TEMPORARY))

    def read_bytes(self, path: str) -> bytes:
        """A whole file.

        Raises:
            DataError: it is missing or cannot be read.
        """
        with self.open_input(path) as file:
            try:
                return bytes(file.read())
            except OSError as error:
                cannot_read(self.name(path), error)

    def read_json(self, path: str) -> Any:
        """A whole file as JSON; see `read_bytes`."""
        try:
            return json.loads(self.read_bytes(path))
        except ValueError as error:
            raise DataError(f"{self.name(path)}: is not JSON ({error}); delete it, it will be made again") from error

    def open_input(self, path: str) -> Any:
        """A file for random access (`pyarrow.NativeFile`: read, seek, read_at, size).

        Raises:
            DataError: it is missing or cannot be read.
        """
        try:
            return self.filesystem.open_input_file(self._full(path))
        except (OSError, pa.ArrowException) as error:
            cannot_read(self.name(path), error)

    def write_bytes(self, path: str, data: bytes) -> None:
        """Write a whole file; it is there complete or not at all.

        Raises:
            TrainError: no space, no permission, or no such place.
        """
        with self.open_output(path) as file:
            file.write(data)

    def write_json(self, path: str, value: Any) -> None:
        """Write a value as JSON; see `write_bytes`."""
        self.write_bytes(path, (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode())

    def put(self, local: Path, path: str) -> None:
        """Copy a file of this machine here; see `write_bytes`."""
        with local.open("rb") as source, self.open_output(path) as file:
            shutil.copyfileobj(source, file, 2**20)

    @contextmanager
    def open_output(self, path: str) -> Iterator[IO[bytes]]:
        """A stream to write; the file appears, whole, when the block ends without an error.

        Raises:
            TrainError: no space, no permission, or no such place.
        """
        full = self._full(path)
        try:
            if self.filesystem.type_name in MOVES:
                with self._moved(full) as file:
                    yield file
            else:
                # A stream of an object store that is closed early leaves a short object: it starts when all is there.
                with tempfile.SpooledTemporaryFile(max_size=SPOOL_BYTES) as spool:
                    yield spool
                    spool.seek(0)
                    with self.filesystem.open_output_stream(full) as target:
                        shutil.copyfileobj(spool, target, 2**20)
        except TidepoolError:
            raise
        except (OSError, pa.ArrowException) as error:
            cannot_write(self.name(path), error)

    @contextmanager
    def _moved(self, full: str) -> Iterator[IO[bytes]]:
        fresh = f"{full}.{uuid.uuid4().hex[:8]}{TEMPORARY}"
        self.filesystem.create_dir(full.rpartition("/")[0], recursive=True)
        try:
            with self.filesystem.open_output_stream(fresh) as file:
                yield file
            if self.filesystem.type_name == "local":
                # Without it a power cut can leave the new name with old or no content.
                with open(fresh, "rb") as written:
                    os.fsync(written.fileno())
            self.filesystem.move(fresh, full)
        finally:
            if self.filesystem.get_file_info(fresh).type == fs.FileType.File:  # it was not moved
                self.filesystem.delete_file(fresh)

    def delete(self, path: str = "") -> None:
        """Remove a file or a folder with all in it; nothing happens when there is none.

        Raises:
            TrainError: no permission.
        """
        full = self._full(path)
        try:
            kind = self.filesystem.get_file_info(full).type
            if kind == fs.FileType.Directory:
                self.filesystem.delete_dir(full)
            elif kind == fs.FileType.File:
                self.filesystem.delete_file(full)
        except FileNotFoundError:
            return  # another process was first
        except (OSError, pa.ArrowException) as error:
            cannot_write(self.name(path), error)

    def check_writable(self) -> None:
        """Write and remove a small file, so that a run fails at its start and not at its first checkpoint.

        Raises:
            TrainError: it cannot be written.
        """
        name = f"writable-{uuid.uuid4().hex[:8]}"
        self.write_bytes(name, b"\n")
        self.delete(name)

    def _full(self, path: str) -> str:
        parts = path.split("/") if path else []
        if any(part in ("", ".", "..") for part in parts):
            raise ValueError(f"{path!r} is not a relative path below {self.uri}")
        return "/".join([self.root.rstrip("/"), *parts])

    def _info(self, path: str) -> Any:
        try:
            return self.filesystem.get_file_info(self._full(path))
        except (OSError, pa.ArrowException) as error:
            cannot_read(self.name(path), error)

    def _select(self, path: str, recursive: bool) -> tuple[Any, ...]:
        selector = fs.FileSelector(self._full(path), recursive=recursive, allow_not_found=True)
        try:
            return tuple(self.filesystem.get_file_info(selector))
        except (OSError, pa.ArrowException) as error:
            cannot_read(self.name(path), error)


def locate(uri: str) -> tuple[Any, str]:
    """Filesystem and path of an address. A plain path is made absolute here: workers run in other folders.

    Raises:
        DataError: the address is not one that `pyarrow.fs` knows.
    """
    if "://" not in uri:
        return fs.LocalFileSystem(), str(Path(uri).expanduser().absolute())
    try:
        filesystem, path = fs.FileSystem.from_uri(uri)
    except (OSError, ValueError, pa.ArrowException) as error:
        raise DataError(f"{uri}: cannot be opened ({_said(error)}); use a local path or s3://, gs://, hdfs://") from error
    return filesystem, path


def cannot_read(name: str, error: Exception) -> NoReturn:
    """Raise the DataError of a failed read."""
    if isinstance(error, FileNotFoundError):
        raise DataError(f"{name}: not found on this machine; check the path, or use storage that all nodes share") from error
    if getattr(error, "errno", None) in CLOSED:
        raise DataError(f"{name}: no permission to read") from error
    raise DataError(f"{name}: cannot be read: {_said(error)}") from error


def cannot_write(name: str, error: Exception) -> NoReturn:
    """Raise the TrainError of a failed write."""
    number = getattr(error, "errno", None)
    if number in FULL:
        raise TrainError(f"{name}: no space left to write it; free some, or set train.output to another place") from error
    if number in CLOSED:
        raise TrainError(f"{name}: no permission to write; set train.output to a place you may write to") from error
    raise TrainError(f"{name}: cannot be written: {_said(error)}; check train.output") from error


def _said(error: Exception) -> str:
    """What a library says, in one line without its own prefixes."""
    if isinstance(error, OSError) and error.errno:
        return os.strerror(error.errno)
    return one_line(error)

"""From addresses to raw rows: which files a data set has, how they are divided, and their rows one at a time with their numbers.

An address is a file, a folder (all .jsonl and .parquet files below it) or a glob (`*`, `**`, `?`), local or any `pyarrow.fs`
URI, or `dataset:NAME/SPLIT` for one that is shipped. Files are divided into pieces that can be read alone (a byte range of
JSONL, row groups of Parquet) and small ones are put together into groups; both depend on the files only. Nothing is held beyond
one buffer. What a row must look like is `train.rows`' affair; `train.shards` and `train.data` are the callers.
"""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import fs

from cluster.errors import DataError, one_line
from train.rows import RowError
from train.storage import cannot_read, locate

DATASETS = Path(__file__).parent / "datasets"
SHIPPED = "dataset:"
SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
GROUP_BYTES = 32 * 2**20  # about this much input is one task's work
LINE_BYTES = 64 * 2**20
BATCH_ROWS = 512


@dataclass(frozen=True)
class SourceFile:
    """One input file. `name` is how messages call it."""

    name: str
    filesystem: Any
    path: str
    size: int
    modified_ns: int

    @property
    def parquet(self) -> bool:
        return self.path.endswith(".parquet")

    def identity(self, by_content: bool) -> str:
        """Changes when the content does: a hash of it, or else name, size and time of change."""
        if by_content:
            with self.open() as file:
                return hashlib.sha256(file.read()).hexdigest()
        return f"{self.name} {self.size} {self.modified_ns}"

    def open(self) -> Any:
        """Random access.

        Raises:
            DataError: it cannot be read.
        """
        try:
            return self.filesystem.open_input_file(self.path)
        except (OSError, pa.ArrowException) as error:
            cannot_read(self.name, error)


@dataclass(frozen=True)
class Piece:
    """Part of a file: bytes [start, stop) of JSONL (the lines that begin there), or row groups [start, stop) of Parquet."""

    file: SourceFile
    start: int
    stop: int
    first_row: int  # Parquet: rows before it
    size: int  # bytes on disk
    whole: bool = False  # all of the file; `stop` says nothing then


def find(addresses: Sequence[str]) -> tuple[SourceFile, ...]:
    """All files of a data set: addresses in the order given, the files of each sorted by name.

    Raises:
        DataError: nothing matches an address, a file is empty, or is neither JSONL nor Parquet.
    """
    found: list[SourceFile] = []
    for address in addresses:
        files = _matches(_shipped(address))
        if not files:
            raise DataError(f"{address}: no file matches; name .jsonl or .parquet files, a folder with some, or a glob")
        for file in files:
            if not file.path.endswith(SUFFIXES):
                raise DataError(f"{file.name}: is neither .jsonl nor .parquet; convert or rename it")
            if file.size == 0:
                raise DataError(f"{file.name}: the file is empty; write rows into it or take it out")
        found += files
    return tuple(found)


def groups(files: Sequence[SourceFile], size: int = GROUP_BYTES) -> list[list[Piece]]:
    """Divide files into tasks of about `size` bytes, in order."""
    result: list[list[Piece]] = []
    room = 0
    for piece in (piece for file in files for piece in _pieces(file, size)):
        if room <= 0:
            result.append([])
            room = size
        result[-1].append(piece)
        room -= piece.size
    return result


def read(piece: Piece, columns: Sequence[str]) -> Iterator[tuple[int, bytes | dict[str, Any] | RowError]]:
    """The raw rows of a piece with their numbers (see `where`): a line's bytes, a Parquet row as a dict, or why it cannot be had.

    Args:
        piece: What to read.
        columns: The columns that matter, to leave others of a Parquet file unread.

    Raises:
        DataError: the file cannot be read, or is damaged.
    """
    try:
        yield from (_rows if piece.file.parquet else _lines)(piece, columns)
    except pa.ArrowException as error:
        raise DataError(f"{piece.file.name}: is damaged or not what its name says: {one_line(error)}") from error
    except OSError as error:
        cannot_read(piece.file.name, error)


def where(piece: Piece, number: int) -> str:
    """`FILE:LINE` or `FILE: row N` of a row's number in its piece, for messages; counted from 1."""
    if piece.file.parquet:
        return f"{piece.file.name}: row {piece.first_row + number}"
    before = 0
    if piece.start:
        with piece.file.open() as file:
            left = _line_start(file, piece.start)
            file.seek(0)
            while left > 0 and (block := file.read(min(left, 2**22))):
                before += block.count(b"\n")
                left -= len(block)
    return f"{piece.file.name}:{before + number}"


def _shipped(address: str) -> str:
    """The file behind `dataset:NAME/SPLIT`; other addresses as they are."""
    if not address.startswith(SHIPPED):
        return address
    path = DATASETS / f"{address.removeprefix(SHIPPED)}.parquet"
    if not path.is_file():
        known = sorted(f"{SHIPPED}{file.parent.name}/{file.stem}" for file in DATASETS.glob("*/*.parquet"))
        raise DataError(f"{address}: no such data set; there are {', '.join(known) or 'none'}")
    return str(path)


def _matches(address: str) -> list[SourceFile]:
    scheme, mark, rest = address.rpartition("://")
    wild = re.search(r"[*?\[]", rest)
    # The folder above the first part with a wildcard is where to look.
    base = rest[: wild.start()].rpartition("/")[0] or ("/" if rest.startswith("/") else ".") if wild else rest
    filesystem, root = locate(scheme + mark + base)
    try:
        info = filesystem.get_file_info(root)
        if info.type == fs.FileType.File:
            return [_file(filesystem, info, address)] if not wild else []
        if info.type == fs.FileType.NotFound and filesystem.type_name == "local":
            return []
        listed = filesystem.get_file_info(fs.FileSelector(root, recursive=True, allow_not_found=True))
    except (OSError, pa.ArrowException) as error:
        cannot_read(address, error)
    inside = len(root.rstrip("/")) + 1
    if wild:
        prefix = "" if base == "." and not rest.startswith("./") else f"{base.rstrip('/')}/"
        pattern = re.compile(_regex(rest[len(prefix) :]))
        chosen = [item for item in listed if pattern.fullmatch(item.path[inside:])]
    else:
        # Names with a dot or underscore in front are other programs' notes, such as _SUCCESS.
        shown = [item for item in listed if not re.search(r"(^|/)[._]", item.path[inside:])]
        chosen = [item for item in shown if item.path.endswith(SUFFIXES)]
    start = scheme + mark + base.rstrip("/")
    return [
        _file(filesystem, item, item.path[inside:] if start == "." else f"{start}/{item.path[inside:]}")
        for item in sorted(chosen, key=lambda item: str(item.path))
        if item.type == fs.FileType.File
    ]


def _regex(glob: str) -> str:
    kinds = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    parts = re.split(r"(\*\*/|\*\*|\*|\?|\[[^\]/]+\])", glob)
    return "".join(kinds.get(part, part if part.startswith("[") and part.endswith("]") else re.escape(part)) for part in parts)


def _file(filesystem: Any, info: Any, name: str) -> SourceFile:
    return SourceFile(name, filesystem, info.path, int(info.size or 0), int(info.mtime_ns or 0))


def _pieces(file: SourceFile, most: int) -> Iterator[Piece]:
    if file.size <= most or file.path.endswith((".gz", ".zst")):
        yield Piece(file, 0, file.size, 0, file.size, whole=True)
    elif not file.parquet:
        for start in range(0, file.size, most):
            stop = min(start + most, file.size)
            yield Piece(file, start, stop, 0, stop - start)
    else:
        with _parquet(file) as parquet:
            groups = [parquet.metadata.row_group(index) for index in range(parquet.metadata.num_row_groups)]
        start = first = rows = size = 0
        for index, group in enumerate(groups):
            rows += group.num_rows
            size += sum(group.column(column).total_compressed_size for column in range(group.num_columns))
            if size >= most or index == len(groups) - 1:
                yield Piece(file, start, index + 1, first, size)
                start, first, rows, size = index + 1, first + rows, 0, 0


def _parquet(file: SourceFile) -> Any:
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(file.open())
    except pa.ArrowException as error:
        raise DataError(f"{file.name}: is not a Parquet file, or is damaged") from error


def _rows(piece: Piece, columns: Sequence[str]) -> Iterator[tuple[int, dict[str, Any] | RowError]]:
    with _parquet(piece.file) as parquet:
        names = parquet.schema_arrow.names
        wanted = [name for name in columns if name in names]
        if not wanted:
            yield 1, RowError(f"column {columns[0]!r} is missing, found {', '.join(names)}; rename or add it")
            return
        chosen = range(parquet.metadata.num_row_groups) if piece.whole else range(piece.start, piece.stop)
        number = 0
        for batch in parquet.iter_batches(BATCH_ROWS, row_groups=list(chosen), columns=wanted):
            try:
                values: list[Any] = batch.to_pylist()
            except UnicodeDecodeError:
                values = [_alone(batch, index) for index in range(batch.num_rows)]
            for value in values:
                number += 1
                yield number, value


def _alone(batch: Any, index: int) -> dict[str, Any] | RowError:
    try:
        row: dict[str, Any] = batch.slice(index, 1).to_pylist()[0]
    except UnicodeDecodeError:
        return RowError("holds bytes that are not UTF-8; convert the file to UTF-8")
    return row


def _lines(piece: Piece, columns: Sequence[str]) -> Iterator[tuple[int, bytes | RowError]]:
    if piece.file.path.endswith((".gz", ".zst")):
        raw, at = piece.file.filesystem.open_input_stream(piece.file.path, compression="detect"), 0
        stop = float("inf")
    else:
        raw, stop = piece.file.open(), piece.stop
        at = _line_start(raw, piece.start)
        raw.seek(at)
    with io.BufferedReader(raw, 2**20) as file:
        number = 0
        while at < stop and (line := file.readline(LINE_BYTES)):
            at += len(line)
            number += 1
            if len(line) == LINE_BYTES:
                yield number, RowError(f"the line is longer than {LINE_BYTES >> 20} MiB; is this JSONL, one object per line?")
                return
            if number == 1 and piece.start == 0:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if not line.isspace():
                yield number, line


def _line_start(file: Any, start: int) -> int:
    """Offset of the first line that begins at `start` or later."""
    if start == 0:
        return 0
    at = start - 1
    file.seek(at)
    while block := file.read(2**16):
        found = block.find(b"\n")
        if found >= 0:
            return int(at + found + 1)
        at += len(block)
    return int(at)

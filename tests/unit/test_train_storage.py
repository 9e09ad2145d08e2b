"""Storage on a local disk and on something that behaves like an object store."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from pyarrow import fs
from training_rows import memory

from cluster.errors import DataError, TrainError
from train.storage import Storage


@pytest.fixture(params=["local", "memory"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    return Storage.open(str(tmp_path / "run")) if request.param == "local" else memory()


def test_files_and_folders(storage):
    assert not storage.exists() and storage.list() == [] and storage.size() == 0
    storage.delete("nothing")
    storage.write_bytes("a/b/one.bin", b"12345")
    storage.write_bytes("a/b/one.bin", b"1234567")
    storage.write_json("a/two.json", {"ü": [1, None]})
    assert storage.read_bytes("a/b/one.bin") == b"1234567"
    assert storage.read_json("a/two.json") == {"ü": [1, None]}
    assert storage.list() == ["a"] and storage.list("a") == ["b", "two.json"]
    assert storage.exists("a/b") and storage.exists("a/two.json") and not storage.exists("b")
    assert storage.size("a/b/one.bin") == 7 and storage.size() == 7 + storage.size("a/two.json")
    assert storage.below("a").read_bytes("b/one.bin") == b"1234567"
    with storage.open_input("a/b/one.bin") as file:
        assert bytes(file.read_at(3, 2)) == b"345" and file.size() == 7
    storage.delete("a/b")
    assert storage.list("a") == ["two.json"]
    storage.delete("a")
    assert not storage.exists("a/two.json")


def test_a_copy_of_a_local_file(storage, tmp_path):
    source = tmp_path / "source"
    source.write_bytes(os.urandom(3 * 2**20))
    storage.put(source, "deep/er/copy")
    assert storage.read_bytes("deep/er/copy") == source.read_bytes()


def test_an_error_while_writing_leaves_the_old_file_and_nothing_else(storage):
    storage.write_bytes("x/state", b"old")
    with pytest.raises(ZeroDivisionError), storage.open_output("x/state") as file:
        file.write(b"half of the ")
        raise ZeroDivisionError
    assert storage.read_bytes("x/state") == b"old"
    names = [info.base_name for info in storage.filesystem.get_file_info(fs.FileSelector(storage.root, recursive=True))]
    assert sorted(names) == ["state", "x"]


@pytest.mark.parametrize("path", ["/etc/passwd", "../x", "a/../../x", "a//b", "./a", "a/"])
def test_paths_stay_below_the_address(storage, path):
    with pytest.raises(ValueError, match="relative path"):
        storage.write_bytes(path, b"")


def test_missing_and_broken_files_are_one_line(storage):
    with pytest.raises(DataError, match=r"run/none.json: not found on this machine"):
        storage.read_json("none.json")
    storage.write_bytes("broken.json", b"{")
    with pytest.raises(DataError, match=r"broken.json: is not JSON .* delete it"):
        storage.read_json("broken.json")


def test_addresses(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    relative = Storage.open("out/run")
    absolute = Storage.open(f"file://{tmp_path}/out/run/")
    monkeypatch.chdir("/")
    relative.write_bytes("a", b"1")
    assert absolute.read_bytes("a") == b"1" and relative.local("a") == tmp_path / "out/run/a"
    assert pickle.loads(pickle.dumps(relative)).read_bytes("a") == b"1"
    assert memory().local() is None
    with pytest.raises(DataError, match="nonsense://x: cannot be opened"):
        Storage.open("nonsense://x")


def run(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Python in a process of its own."""
    return subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, timeout=60)


def test_a_process_killed_while_it_writes_leaves_the_old_file(tmp_path):
    code = """
import os, signal, sys
from train.storage import Storage
storage = Storage.open(sys.argv[1])
storage.write_bytes("state", b"old")
with storage.open_output("state") as file:
    file.write(b"x" * 2**20)
    os.kill(os.getpid(), signal.SIGKILL)
"""
    assert run(code, tmp_path).returncode == -9
    storage = Storage.open(str(tmp_path))
    assert storage.read_bytes("state") == b"old" and storage.list() == ["state"]
    assert len(list(tmp_path.iterdir())) == 2, "the unfinished file is there, and hidden"


def test_a_full_disk_is_one_line_and_leaves_the_old_file(tmp_path):
    code = """
import resource, sys
from cluster.errors import TrainError
from train.storage import Storage
storage = Storage.open(sys.argv[1])
storage.write_bytes("state", b"old")
resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))
try:
    storage.write_bytes("state", b"x" * 2**21)
except TrainError as error:
    print(error)
"""
    done = run(code, tmp_path)
    line = f"{tmp_path}/state: no space left to write it; free some, or set train.output to another place\n"
    assert done.stdout == line, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["state"] and (tmp_path / "state").read_bytes() == b"old"


def test_no_permission_is_one_line(tmp_path):
    code = """
import os, sys
from cluster.errors import TrainError
from train.storage import Storage
storage = Storage.open(sys.argv[1])
if os.geteuid() == 0:
    os.setuid(65534)  # root may write anywhere
try:
    storage.write_bytes("state", b"")
except TrainError as error:
    print(error)
"""
    tmp_path.chmod(0o500)
    done = run(code, tmp_path)
    assert done.stdout == f"{tmp_path}/state: no permission to write; set train.output to a place you may write to\n", done.stderr


def test_a_place_that_cannot_be_a_folder_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(TrainError, match=r"file/run/writable-.*: cannot be written: Not a directory; check train.output"):
        Storage.open(f"{tmp_path}/file/run").check_writable()

"""Our processes are found by their mark after any crash, others are left alone."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cluster import processes


@pytest.fixture
def start():
    """Start a Python process with more environment; all are killed at the end."""
    begun = []

    def go(code, **environ):
        process = subprocess.Popen(
            [sys.executable, "-c", code], env={**os.environ, **environ}, stdout=subprocess.PIPE, start_new_session=True
        )
        begun.append(process)
        assert process.stdout.readline().strip() == b"up"
        return process

    yield go
    for process in begun:
        process.kill()
        process.wait()
        process.stdout.close()


SLEEP = "import time; print('up', flush=True); time.sleep(60)"
STUBBORN = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(60)"
ORPHAN = (
    "import subprocess, sys; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']); print('up', flush=True)"
)
UNMARKED_CHILD = (
    "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'], env={}); "
    "print('up', flush=True); time.sleep(60)"
)
TITLE = "import setproctitle, time; setproctitle.setproctitle('ray::Worker' * 40); print('up', flush=True); time.sleep(60)"


def test_finds_only_its_own(start, tmp_path):
    ours = start(SLEEP, **{processes.RUN_DIR: str(tmp_path)})
    start(SLEEP, **{processes.RUN_DIR: str(tmp_path) + "2"})
    assert [process.pid for process in processes.marked(tmp_path)] == [ours.pid]


def test_finds_orphans_and_children_that_lost_the_mark(start, tmp_path):
    start(ORPHAN, **{processes.RUN_DIR: str(tmp_path)}).wait()
    assert len(processes.marked(tmp_path)) == 1
    start(UNMARKED_CHILD, **{processes.RUN_DIR: str(tmp_path)})
    assert len(processes.marked(tmp_path)) == 3
    assert processes.stop(tmp_path) == 3
    assert processes.marked(tmp_path) == []


def test_a_process_that_renames_itself_keeps_its_mark(start, tmp_path):
    start(TITLE, **{processes.RUN_DIR: str(tmp_path), "SPT_NOENV": "1"})
    assert len(processes.marked(tmp_path)) == 1


def test_sigkill_for_those_that_do_not_listen(start, tmp_path):
    stubborn = start(STUBBORN, **{processes.RUN_DIR: str(tmp_path)})
    assert processes.stop(tmp_path, grace_s=0.3) == 1
    assert stubborn.wait(timeout=5) == -9


def test_nothing_to_stop(tmp_path):
    assert processes.stop(tmp_path) == 0


def test_never_itself_nor_its_parents(tmp_path):
    code = f"from cluster import processes; from pathlib import Path; print(processes.marked(Path({str(tmp_path)!r})))"
    shell = f'{sys.executable} -c "{code}"; true'
    environ = {**os.environ, processes.RUN_DIR: str(tmp_path)}
    done = subprocess.run(["sh", "-c", shell], env=environ, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_shared_memory_of_a_stopped_process_goes(start, tmp_path):
    name = f"/dev/shm/tidepool-test-{os.getpid()}"
    code = (
        f"import mmap, time; f = open({name!r}, 'w+b'); f.truncate(4096); m = mmap.mmap(f.fileno(), 4096); "
        "print('up', flush=True); time.sleep(60)"
    )
    start(code, **{processes.RUN_DIR: str(tmp_path)})
    assert Path(name).exists()
    processes.stop(tmp_path)
    assert not Path(name).exists()


def test_shared_memory_of_a_process_killed_before_goes_too(start, tmp_path):
    code = (
        "from multiprocessing import shared_memory, resource_tracker; import time; "
        "s = shared_memory.SharedMemory(create=True, size=4096); resource_tracker.unregister(s._name, 'shared_memory'); "
        "print('up', flush=True); time.sleep(60)"
    )
    before, since = set(processes.SHARED.iterdir()), time.time() - 1
    dead, alive = start(code), start(code)
    dead.kill()
    dead.wait()
    fresh = set(processes.SHARED.iterdir()) - before
    kept = {path for path in fresh if path.stat().st_ino in processes.shared_memory(alive.pid)}
    assert len(kept) == 1
    processes.stop(tmp_path, since=since)
    assert kept <= set(processes.SHARED.iterdir())
    alive.kill()
    alive.wait()
    processes.stop(tmp_path, since=since)
    assert not kept & set(processes.SHARED.iterdir())


def test_a_semaphore_in_use_stays_whoever_made_it(start, tmp_path):
    code = (
        "import multiprocessing, time; lock = multiprocessing.get_context('spawn').Lock(); "
        "print('up', flush=True); time.sleep(60)"
    )
    since, before = time.time() - 1, set(processes.SHARED.iterdir())
    other = start(code)
    made = {path for path in set(processes.SHARED.iterdir()) - before if path.stat().st_ino in processes.shared_memory(other.pid)}
    assert len(made) == 1
    processes.stop(tmp_path, since=since)
    assert made <= set(processes.SHARED.iterdir()), "a semaphore of a live process was removed"
    other.kill()
    other.wait()
    processes.stop(tmp_path, since=since)
    assert not made & set(processes.SHARED.iterdir())


def test_a_recycled_pid_is_not_signalled(start, tmp_path):
    other = start(SLEEP)
    stale = processes.Process(other.pid, 1, 12345, "an earlier owner of the pid")
    processes._send(stale, 9)
    time.sleep(0)
    assert other.poll() is None

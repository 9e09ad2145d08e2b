"""A vLLM plugin: no engine process outlives the replica that started it.

A killed replica would leave its engine core and workers behind, on a GPU with all its memory. vLLM loads the entry points of
the group `vllm.general_plugins` in every process it starts; this one asks the kernel to kill the process when its parent dies
(prctl PR_SET_PDEATHSIG, Linux only). Nothing but vLLM calls it.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import signal

PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """Tie this process to its parent; a process that multiprocessing did not start is left alone."""
    if multiprocessing.parent_process() is not None:
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)

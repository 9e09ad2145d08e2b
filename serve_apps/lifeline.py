"""A vLLM plugin: what every process that vLLM starts does first, so that it lives well beside the others.

vLLM loads the entry points of the group `vllm.general_plugins` in each of its processes. No engine process outlives the replica
that started it, for a killed replica would leave its engine core and workers behind, on a GPU with all its memory. And where the
engine computes on the CPUs that also carry the requests, it gives way: its busy loops would keep every token waiting on its way
out (docs/decisions/0007). Nothing but vLLM calls it; processes that multiprocessing did not start are left alone.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal

PR_SET_PDEATHSIG = 1
NICE_VARIABLE = "TIDEPOOL_ENGINE_NICE"
CPU_NICE = 5


def on_start() -> None:
    """Tie this process to its parent (prctl PR_SET_PDEATHSIG, Linux only) and lower its priority as told by the environment."""
    if multiprocessing.parent_process() is not None:
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        os.nice(int(os.environ.get(NICE_VARIABLE, "0")))

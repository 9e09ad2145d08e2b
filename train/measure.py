"""Two models side by side in vLLM: speed in turns, and quality on the same rows.

Each model runs in a process of its own (`measure_engine`) with vLLM's offline engine, so what is measured is what would be
served, with vLLM's own kernels for the compressed format. Rounds alternate between the two, so that whatever else the machine
does meets both; the result is the median of each and the median of the ratios of neighbouring rounds. A compressed model that
vLLM cannot run on this machine is a finding with vLLM's reason, not an error. What it does not tell: latency, or speed under a
real load (that is `bench`). Called by `compress`.
"""

from __future__ import annotations

import json
import os
import re
import selectors
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cluster.errors import TrainError
from train.samples import Sample

ROUNDS = 5
REQUESTS, PROMPT, TOKENS = 16, 32, 32
TIMEOUT_S = 900.0  # for one answer; loading a large model is the longest
GPU_MEMORY = 0.4  # both models are on the GPU at the same time
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # one process per model, which ends with its parent
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
}


@dataclass(frozen=True)
class Measured:
    """One model. `problem` is why vLLM does not run it here; then the rest is empty.

    Units: generated tokens per second of all requests together (median of the rounds); nats per answer token.
    """

    problem: str | None = None
    dtype: str | None = None
    tokens_per_s: float | None = None
    loss: float | None = None
    loss_tokens: int = 0
    exact: int | None = None
    asked: int = 0


@dataclass(frozen=True)
class Comparison:
    """Both models; after's tokens/s divided by before's in the round beside it: the median, and all of them to show the noise."""

    before: Measured
    after: Measured
    speed_ratio: float | None
    speed_ratios: tuple[float, ...]
    vllm: str

    def report(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self) | {"rounds": ROUNDS, "requests": REQUESTS, "prompt_tokens": PROMPT, "new_tokens": TOKENS}


def last_error(log: str) -> str | None:
    """The message of the last exception in a process's output, which may name the rank in front."""
    found = re.findall(r"^(?:\[rank\d+\]: )?[\w.]*(?:Error|Exception)\b: *(.+?) *$", log, re.MULTILINE)
    return str(found[-1]) if found else None


class _Gone(Exception):
    """A measuring process ended: its model, and why."""

    def __init__(self, folder: Path, reason: str) -> None:
        super().__init__(reason)
        self.folder = folder


class _Arm:
    """The parent's end of one measuring process."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.folder = folder
        self.log = stack.enter_context(tempfile.TemporaryFile("w+"))  # noqa: SIM115 - the stack closes it
        self.process = subprocess.Popen(
            [sys.executable, "-m", "train.measure_engine", str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            env=ENVIRONMENT | os.environ,
            cwd=Path(__file__).resolve().parents[1],
        )
        stack.callback(self._end)

    def ask(self, **command: Any) -> dict[str, Any]:
        """Send a command and wait for its answer."""
        assert self.process.stdin is not None
        try:
            print(json.dumps(command), file=self.process.stdin, flush=True)
        except BrokenPipeError:
            raise _Gone(self.folder, self._reason()) from None
        return self.answer()

    def answer(self) -> dict[str, Any]:
        """Wait for a line."""
        assert self.process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            if not selector.select(TIMEOUT_S):
                raise _Gone(self.folder, f"no answer within {TIMEOUT_S:.0f} s")
        line = self.process.stdout.readline()
        if not line:
            raise _Gone(self.folder, self._reason())
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _reason(self) -> str:
        """The last error that the process printed, or how it ended."""
        status = self.process.wait(timeout=30)
        self.log.seek(0)
        return last_error(self.log.read()) or f"the process ended with status {status}"

    def _end(self) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.kill()  # nothing it holds is needed any more
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()


def compare(before: Path, after: Path, samples: Sequence[Sample], max_length: int, say: Callable[[str], None]) -> Comparison:
    """Measure two model folders.

    Args:
        before: The original.
        after: The compressed one.
        samples: For quality; none, and only speed is measured. Must fit `max_length` together with a greedy answer.
        max_length: Tokens per request.
        say: Takes lines of progress.

    Raises:
        TrainError: vLLM is not installed, or does not run the original.
    """
    rows = [{"prompt": list(row.prompt), "answer": list(row.answer), "expected": row.expected} for row in samples]
    with ExitStack() as stack:
        first, second = (_Run(_Arm(folder, stack)) for folder in (before, after))
        say("measure: starting vLLM twice")
        problem: str | None = None
        ratios: tuple[float, ...] = ()
        try:
            version, _ = (str(run.arm.answer()["vllm"]) for run in (first, second))
            for run in (first, second):  # one after the other: on a GPU each looks at the free memory while it loads
                run.start(max_length, rows)
            for number in range(ROUNDS):
                for run in (first, second) if number % 2 == 0 else (second, first):
                    run.round()
                say(f"measure: round {number + 1} of {ROUNDS}: {first.speeds[-1]:.0f} and {second.speeds[-1]:.0f} tokens/s")
            ratios = tuple(new / old for old, new in zip(first.speeds, second.speeds, strict=True))
        except _Gone as error:
            if error.folder == before:
                raise TrainError(f"{before}: vLLM does not run the original here: {error}; --no-measure skips this") from None
            problem = str(error)
            say(f"measure: vLLM does not run the compressed model on this machine: {problem}")
        ended = Measured(problem=problem) if problem else second.measured()
        return Comparison(first.measured(), ended, statistics.median(ratios) if ratios else None, ratios, version)


class _Run:
    """One model's results as they come: quality once, speed in rounds."""

    def __init__(self, arm: _Arm) -> None:
        self.arm = arm
        self.dtype: str | None = None
        self.quality: dict[str, Any] = {"loss": None, "tokens": 0, "asked": 0, "exact": 0}
        self.speeds: list[float] = []

    def start(self, max_length: int, rows: list[dict[str, Any]]) -> None:
        self.dtype = self.arm.ask(do="load", max_length=max_length, memory=GPU_MEMORY)["dtype"]
        if rows:
            self.quality = self.arm.ask(do="quality", rows=rows)
        self.arm.ask(do="speed", requests=REQUESTS, prompt=PROMPT, tokens=4)  # what is slow only once

    def round(self) -> None:
        answer = self.arm.ask(do="speed", requests=REQUESTS, prompt=PROMPT, tokens=TOKENS)
        self.speeds.append(answer["tokens"] / answer["seconds"])

    def measured(self) -> Measured:
        speed = statistics.median(self.speeds) if self.speeds else None
        loss, tokens, asked = self.quality["loss"], self.quality["tokens"], self.quality["asked"]
        return Measured(None, self.dtype, speed, loss, tokens, self.quality["exact"] if asked else None, asked)

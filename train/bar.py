"""The progress bar of a run: step, loss, tokens per second, time left.

Fed with the lines of metrics.jsonl, from wherever they come; on something that is not a terminal it prints a line every few
seconds instead. Called by `python -m train`.
"""

from __future__ import annotations

import sys
import time
from typing import Any

PLAIN_S = 10.0


class Bar:
    """Also takes other lines of text, which must not run into it."""

    def __init__(self) -> None:
        self.bar: Any = None
        self.plain = not sys.stderr.isatty()
        self.shown = 0.0
        self.validation = ""

    def say(self, text: str) -> None:
        """A line above the bar."""
        if self.bar is not None:
            self.bar.write(text, file=sys.stderr)
        else:
            print(text, file=sys.stderr, flush=True)

    def step(self, line: dict[str, Any]) -> None:
        """One step; see `train.run.train`."""
        if line.get("validation_loss") is not None:
            self.validation = f", validation {line['validation_loss']:.4f}"
        text = f"loss {line['loss']:.4f}{self.validation}, {line['tokens_per_s']:,.0f} tokens/s"
        step, steps = line["step"], line["steps"]
        if self.plain:
            now = time.monotonic()
            if now - self.shown >= PLAIN_S or step == steps:
                self.shown = now
                left = _minutes((steps - step) * line["step_s"])
                print(f"step {step}/{steps}: {text}, {left} left", file=sys.stderr, flush=True)
            return
        if self.bar is None:
            from tqdm import tqdm

            self.bar = tqdm(total=steps, initial=step - 1, unit="step", dynamic_ncols=True, smoothing=0.05)
        self.bar.set_postfix_str(text, refresh=False)
        # After a resume the step is behind the one shown last.
        self.bar.update(step - self.bar.n)

    def close(self) -> None:
        """Leave the bar as it is."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None


def _minutes(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}"

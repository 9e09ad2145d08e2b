"""Seeded prompts that share nothing, so that the prefix cache cannot answer for the engine. Called by `load`.

Words are drawn from syllables, which any tokenizer cuts into a few tokens each; how many words make the wanted number of
tokens is found by `words_for` from two probes of the running server.
"""

from __future__ import annotations

import random

_ONSETS = ("b", "br", "d", "f", "g", "gl", "k", "l", "m", "n", "p", "r", "s", "st", "t", "v")
_VOWELS = ("a", "e", "i", "o", "u", "ai", "ou")


def prompt(seed: int, index: int, words: int) -> str:
    """The index-th prompt of a round: the same for the same arguments, different from the first word for others."""
    draw = random.Random(f"{seed}:{index}")
    return " ".join(_word(draw) for _ in range(max(1, words)))


def _word(draw: random.Random) -> str:
    return "".join(draw.choice(_ONSETS) + draw.choice(_VOWELS) for _ in range(draw.randint(1, 3)))


def words_for(tokens: int, probes: tuple[tuple[int, int], tuple[int, int]]) -> int:
    """How many words give about `tokens` prompt tokens.

    Args:
        tokens: Prompt tokens wanted, the chat template included.
        probes: Two measurements (words, prompt tokens the engine counted).

    Raises:
        ValueError: more words did not cost more tokens, so the probes say nothing.
    """
    (few, few_tokens), (many, many_tokens) = probes
    if many <= few or many_tokens <= few_tokens:
        raise ValueError(f"words_for: probes {probes} do not grow; the server does not count prompt tokens")
    slope = (many_tokens - few_tokens) / (many - few)
    return max(1, round(few + (tokens - few_tokens) / slope))

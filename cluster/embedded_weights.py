"""The numbers of the embedded models: random tensors with a fixed seed, by the names of their Hugging Face architectures.

All float32; the shapes are those of `embedded_shapes`. numpy only, nothing is read or written here. Called by `embedded`, which
writes the folders.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from cluster.embedded_shapes import CHAT, EMBED, SCRATCH
from cluster.embedded_text import TAGS

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Tensors = dict[str, NDArray[np.float32]]

CONSTANT = (
    4.0  # random chat model: what dimension 0 of the residual stream always holds; it carries the output bias (Llama has none)
)
# Tokens that end a JSON string, list or object, and by how much they are favoured; see `_bias`.
CLOSING = {'"': 5.5, '",': 4.0, '"}': 5.0, '"]': 5.0, '"}}': 2.0, "}": 5.0, "}}": 4.0, "]": 4.0, ",": 3.0}
ENDING = -3.0  # the same for the end of an answer: about one token in 100,000, but before a second tool call
# The model that is trained, see `scratch`.
WORD, COMMON = 0.5, 0.6  # deviation of token vectors; length of what they share, as a part of their own
LOOK, WRITE = 0.3, 1 / 3  # queries and keys, and what layers add, as parts of initializer_range: near to a mean of all words
SHARP = 8.0  # by how much the first head prefers the token before
FAST, SLOW = 8, 12  # rotary pairs below and from
MATCH, REPEAT = 2.0, 2.0  # strength of the second head's search and of its word


def chat(tokens: list[bytes]) -> Tensors:
    """Of the random chat model; `tokens` are the bytes each token stands for."""
    import numpy as np

    draw = _draws(seed=2718)
    hidden, vocabulary = CHAT["hidden_size"], CHAT["vocab_size"]
    embedding = draw(vocabulary, hidden, 1.0)
    embedding[:, 0] = CONSTANT
    tensors: Tensors = {"model.embed_tokens.weight": embedding, "model.norm.weight": np.ones(hidden, np.float32)}
    for name, rows, columns in _layers(CHAT):
        if not columns:
            tensors[name] = np.ones(rows, np.float32)
            continue
        weight = draw(rows, columns, 1 / columns**0.5)
        if name.endswith(("self_attn.o_proj.weight", "mlp.down_proj.weight")):
            weight[0] = 0.0  # nothing writes to dimension 0, it stays CONSTANT
        tensors[name] = weight
    head = draw(vocabulary, hidden, 1.2 / hidden**0.5)
    bias = np.array([_bias(token) for token in tokens], np.float32)
    bias[CHAT["eos_token_id"]] = ENDING
    head[:, 0] = bias / np.float32(CONSTANT)
    tensors["lm_head.weight"] = head
    return tensors


def _bias(token: bytes) -> float:
    """What the random chat model adds to a token's logit (of standard deviation 1.2 without it)."""
    try:
        text = token.decode()
    except UnicodeDecodeError:
        return -12.0
    if not text or text in TAGS:
        return -12.0
    if text in CLOSING:
        return CLOSING[text]
    if not text.isprintable() or text.isspace() or "<" in text:
        return -6.0
    return -6.0 if text.isdigit() else 0.0


def scratch() -> Tensors:
    """Where the default model's training begins: random, but for two heads that a model otherwise needs minutes to find.

    Copying a value from a question takes a head that looks one token back, and one in the next layer that looks for the place
    whose token before is the present one, and repeats what follows there (an induction head, Olsson et al. 2022,
    arXiv:2209.11895). Here they are weak but there from the first step; training keeps or changes them like any weight.
    decisions/0012 has the figures.
    """
    import numpy as np

    draw = _draws(seed=1618)
    hidden, size, vocabulary = SCRATCH["hidden_size"], SCRATCH["head_dim"], SCRATCH["vocab_size"]
    deviation = float(SCRATCH["initializer_range"])
    # One direction that all tokens have in common, which tells no token from another: the first head needs nothing else.
    common = draw(hidden, 1, 1.0)[:, 0]
    common /= np.linalg.norm(common)
    words = draw(vocabulary, hidden, WORD)
    words -= np.outer(words @ common, common)
    tensors: Tensors = {
        "model.norm.weight": np.ones(hidden, np.float32),
        "lm_head.weight": words * np.float32(deviation / WORD),  # what repeats a token's vector says that token
        "model.embed_tokens.weight": words + np.float32(COMMON * WORD * hidden**0.5) * common,
    }
    scales = {"q_proj": LOOK, "k_proj": LOOK, "o_proj": WRITE, "down_proj": WRITE}
    for name, rows, columns in _layers(SCRATCH):
        scale = scales.get(name.split(".")[-2], 1.0)
        tensors[name] = draw(rows, columns, deviation * scale) if columns else np.ones(rows, np.float32)
    first, second = ({kind: tensors[f"model.layers.{layer}.self_attn.{kind}_proj.weight"] for kind in "qkvo"} for layer in (0, 1))
    # Rotary positions turn pair f of a head by speed[f] per token: a key of ones and a query turned back by one token agree
    # best one token apart. Only the fast pairs tell neighbours from each other.
    pairs = np.arange(size // 2)
    speed = SCRATCH["rope_theta"] ** (-pairs / (size // 2))
    fast = (pairs < FAST).astype(np.float64)
    reach = hidden**0.5 * COMMON / (1 + COMMON**2) ** 0.5  # of a normed embedding along `common`
    gain = (SHARP * size**0.5 / (1 - np.cos(speed[:FAST])).sum()) ** 0.5 / reach
    key = np.concatenate([fast, 0.0 * fast])
    query = np.concatenate([fast * np.cos(speed), -fast * np.sin(speed)])
    first["k"][:size] = 0.3 * first["k"][:size] + gain * np.outer(key, common)
    first["q"][:size] = 0.3 * first["q"][:size] + gain * np.outer(query, common)
    first["v"][:size] -= np.outer(first["v"][:size] @ common, common)
    first["o"][:, :size] *= 1 / WRITE
    # The second head's query is the present token, its key what the first head wrote of the token before; only in the slow
    # pairs, which distance hardly turns.
    slow = np.tile(pairs >= SLOW, 2)[:, None]
    back = first["o"][:, :size].T
    back = back - np.outer(back @ common, common)
    for kind, read in (("k", back), ("q", first["v"][:size])):
        second[kind][:size] = read / read.std() * np.float32(deviation * MATCH) * slow
    second["o"][:, :size] += np.float32(REPEAT) * second["v"][:size].T
    return tensors


def embed() -> Tensors:
    """Of the embedding model: a text's vector is nearly the mean of its tokens' vectors."""
    import numpy as np

    draw = _draws(seed=3141)
    hidden, inner = EMBED["hidden_size"], EMBED["intermediate_size"]

    def norm(name: str) -> Tensors:
        return {f"{name}.LayerNorm.weight": np.ones(hidden, np.float32), f"{name}.LayerNorm.bias": np.zeros(hidden, np.float32)}

    # Common pieces have low ids (they were merged first). They put most of their length into the first dimensions, which the
    # last layer norm takes out again: a shared word says more than a shared letter or "is".
    muted = 8
    vocabulary = EMBED["vocab_size"]
    words = draw(vocabulary, hidden, 1.0)
    words[:, :muted] *= np.linspace(12.0, 0.0, vocabulary, dtype=np.float32)[:, None]
    # Layers and positions move a token's vector only a little, so that texts which share words stay close.
    tensors: Tensors = {
        "embeddings.word_embeddings.weight": words,
        "embeddings.position_embeddings.weight": draw(EMBED["max_position_embeddings"], hidden, 0.05),
        "embeddings.token_type_embeddings.weight": np.zeros((EMBED["type_vocab_size"], hidden), np.float32),
        **norm("embeddings"),
    }
    for layer in range(EMBED["num_hidden_layers"]):
        at = f"encoder.layer.{layer}"
        for name, rows, columns in (
            ("attention.self.query", hidden, hidden),
            ("attention.self.key", hidden, hidden),
            ("attention.self.value", hidden, hidden),
            ("attention.output.dense", hidden, hidden),
            ("intermediate.dense", inner, hidden),
            ("output.dense", hidden, inner),
        ):
            tensors[f"{at}.{name}.weight"] = draw(rows, columns, 0.2 / columns**0.5)
            tensors[f"{at}.{name}.bias"] = np.zeros(rows, np.float32)
        tensors |= norm(f"{at}.attention.output") | norm(f"{at}.output")
    tensors[f"encoder.layer.{EMBED['num_hidden_layers'] - 1}.output.LayerNorm.weight"][:muted] = 0.0
    return tensors


def _layers(shape: dict[str, Any]) -> Iterator[tuple[str, int, int]]:
    """Name, rows and columns of each tensor of a Llama's layers; no columns for a vector."""
    hidden, inner = shape["hidden_size"], shape["intermediate_size"]
    kv = shape["num_key_value_heads"] * shape["head_dim"]
    for layer in range(shape["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        yield f"{at}.input_layernorm.weight", hidden, 0
        yield f"{at}.post_attention_layernorm.weight", hidden, 0
        yield f"{at}.self_attn.q_proj.weight", hidden, hidden
        yield f"{at}.self_attn.k_proj.weight", kv, hidden
        yield f"{at}.self_attn.v_proj.weight", kv, hidden
        yield f"{at}.self_attn.o_proj.weight", hidden, hidden
        yield f"{at}.mlp.gate_proj.weight", inner, hidden
        yield f"{at}.mlp.up_proj.weight", inner, hidden
        yield f"{at}.mlp.down_proj.weight", hidden, inner


def _draws(seed: int) -> Callable[[int, int, float], NDArray[np.float32]]:
    """`draw(rows, columns, deviation)`: normal numbers, the same ones in the same order for a seed."""
    import numpy as np

    generator = np.random.Generator(np.random.PCG64(seed))

    def draw(rows: int, columns: int, deviation: float) -> NDArray[np.float32]:
        return generator.standard_normal((rows, columns), dtype=np.float32) * np.float32(deviation)

    return draw

"""The models that need no download, written on the machine in a second, and the folder that the default model is trained from.

`build(source, cache_dir)` writes an ordinary Hugging Face folder (config, tokenizer, chat template, float32 safetensors) that
vLLM loads like any other. The weights are random with a fixed seed, so the chat model babbles and the embedding model compares
texts by the tokens they share. `embedded:chat` is found here (`trained_folder`) and trained by `default_model`. This file knows
nothing of vLLM; numpy writes the weights, torch is not imported. Called by whoever turns a configuration's `model_source` into
something vLLM can load, by `default_model`, and by tests.

The folder's name ends in a hash of this recipe and of the versions of the libraries that carry it out. Builders write a folder
of their own beside it and rename it, so a reader never sees half a model and builders at the same time do no harm.

The random chat model never ends by itself, avoids bytes that are no text of their own, and favours quotes and closing brackets,
so that a server in front of it can be tried in earnest: nearly every token is seen in a stream, and a JSON schema gets
finished.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster import embedded_shapes, embedded_text
from cluster.config import EMBEDDED_PREFIX
from cluster.embedded_shapes import CHAT, EMBED, SCRATCH
from cluster.errors import ConfigError
from cluster.session import CACHE_VARIABLE

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Tensors = dict[str, NDArray[np.float32]]

ROOT = Path(__file__).resolve().parents[1]
RECIPE = ROOT / "configs" / "assistant.yaml"  # how the default model is trained, and on what
TRAINED_ON = ROOT / "train/datasets/assistant/train.parquet"
VOCABULARY = 2048
PAD, BOS, IM_START, IM_END, CLS, SEP = "<|pad|>", "<|bos|>", "<|im_start|>", "<|im_end|>", "<|cls|>", "<|sep|>"
TRAINED = f"{EMBEDDED_PREFIX}chat"
SPECIAL = (PAD, BOS, IM_START, IM_END, CLS, SEP)  # ids 0 to 5; hidden from decoded text
TAGS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")  # one token each, but part of the text
# Words with the blank before them, single digits, runs of marks, line ends: every text is covered.
SPLIT = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# The same for the model that is trained; Chinese stands alone, so that a mark never becomes part of a word.
SCRATCH_SPLIT = r"\p{Han}+|[ ']?[\p{L}&&[^\p{Han}]]+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
CONSTANT = 4.0  # what dimension 0 of the residual stream always holds; it carries the output bias (Llama has none)
# Tokens that end a JSON string, list or object, and by how much they are favoured; see `_bias`.
CLOSING = {'"': 5.5, '",': 4.0, '"}': 5.0, '"]': 5.0, '"}}': 2.0, "}": 5.0, "}}": 4.0, "]": 4.0, ",": 3.0}
ENDING = -3.0  # the same for the end of an answer: about one token in 100,000, but before a second tool call


def cache_dir() -> Path:
    """Where built models are kept: `$TIDEPOOL_MODEL_CACHE`, or `~/.cache/tidepool/models` without that variable."""
    given = os.environ.get(CACHE_VARIABLE)
    return Path(given) if given else Path.home() / ".cache" / "tidepool" / "models"


def build(source: str, cache_dir: Path) -> Path:
    """The folder of an embedded model, built if it is not there yet; safe from several processes at once.

    Args:
        source: `embedded:chat`, `embedded:random` or `embedded:embed`.
        cache_dir: Folder that holds the built models; made if missing.

    Raises:
        ConfigError: `source` is not an embedded model, or has not been trained.
        OSError: the folder cannot be written.
    """
    if source == TRAINED:
        trained = trained_folder(cache_dir)
        if not trained.is_dir():
            raise ConfigError(f"{source}: not trained yet in {cache_dir}; `make up` does it, and keeps it there")
        return trained
    writer = _WRITERS.get(source)
    if writer is None:
        raise ConfigError(f"model_source {source!r}: no such embedded model; use one of {', '.join(SOURCES)}")
    return built(cache_dir / f"{source.removeprefix(EMBEDDED_PREFIX)}-{_recipe_hash()}", writer)


def trained_folder(cache_dir: Path) -> Path:
    """Where the default model is, or will be: the name ends in a hash of all that decides what it learns."""
    digest = hashlib.sha256(f"{_recipe_hash()}\n".encode())
    for path in (RECIPE, TRAINED_ON):
        digest.update(path.read_bytes())
    for name in ("torch", "transformers", "deepspeed"):
        digest.update(f"{name}={version(name)}\n".encode())
    return cache_dir / f"{TRAINED.removeprefix(EMBEDDED_PREFIX)}-{digest.hexdigest()[:12]}"


def built(folder: Path, writer: Callable[[Path], None]) -> Path:
    """The folder, filled by `writer` if it is not there yet; it appears whole, whoever else builds it at the same time.

    Args:
        folder: Its place; folders above it are made if missing.
        writer: Given an empty folder beside it, which is renamed afterwards.

    Raises:
        OSError: the folder cannot be written.
    """
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    own = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        own.chmod(0o755)
        writer(own)
        try:
            own.rename(folder)
        except OSError:
            if not folder.is_dir():  # otherwise another process was first, and wrote the same
                raise
    finally:
        shutil.rmtree(own, ignore_errors=True)
    return folder


def scratch(texts: Iterable[str], cache_dir: Path) -> Path:
    """The folder a model is trained in from nothing: tokenizer, chat template, random weights.

    Args:
        texts: What its words are learned from, beside the sentences of `embedded_text`; repeated ones weigh more.
        cache_dir: Folder that holds the built models; made if missing.

    Raises:
        OSError: the folder cannot be written.
    """
    lines = [*embedded_text.sentences(), *texts]
    digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()[:12]
    return built(cache_dir / f"scratch-{digest}-{_recipe_hash()}", lambda folder: _write_scratch(folder, lines))


def _recipe_hash() -> str:
    """Twelve hex digits over all that decides the content: the three source files and the libraries' versions."""
    digest = hashlib.sha256()
    for file in (Path(__file__), Path(str(embedded_shapes.__file__)), Path(str(embedded_text.__file__))):
        digest.update(file.read_bytes())
    for name in ("numpy", "tokenizers", "safetensors"):
        digest.update(f"{name}={version(name)}\n".encode())
    return digest.hexdigest()[:12]


def _write_chat(folder: Path) -> None:
    tokens = _write_tokenizer(folder, CHAT["max_position_embeddings"], wrap=False)
    (folder / "chat_template.jinja").write_text(embedded_text.CHAT_TEMPLATE)
    sampling = {"bos_token_id": 1, "eos_token_id": 3, "pad_token_id": 0, "do_sample": True, "temperature": 1.0}
    _write_json(folder / "generation_config.json", sampling)
    _write_json(folder / "config.json", CHAT)
    _write_weights(folder, _chat_weights(tokens))


def _write_scratch(folder: Path, lines: list[str]) -> None:
    _write_tokenizer(folder, SCRATCH["max_position_embeddings"], SCRATCH["vocab_size"], SCRATCH_SPLIT, lines)
    (folder / "chat_template.jinja").write_text(embedded_text.CHAT_TEMPLATE)
    _write_json(folder / "generation_config.json", {"bos_token_id": 1, "eos_token_id": 3, "pad_token_id": 0})
    _write_json(folder / "config.json", SCRATCH)
    _write_weights(folder, _scratch_weights())


def _write_embed(folder: Path) -> None:
    length, hidden = EMBED["max_position_embeddings"], EMBED["hidden_size"]
    _write_tokenizer(folder, length, wrap=True)
    _write_json(folder / "config.json", EMBED)
    # How sentence-transformers says "mean over tokens, then unit length"; vLLM reads it too.
    kinds = ("Transformer", "Pooling", "Normalize")
    paths = ("", "1_Pooling", "2_Normalize")
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (kind, path) in enumerate(zip(kinds, paths, strict=True))
    ]
    _write_json(folder / "modules.json", modules)
    _write_json(folder / "sentence_bert_config.json", {"max_seq_length": length, "do_lower_case": False})
    for path in paths[1:]:
        (folder / path).mkdir()
    _write_json(folder / "1_Pooling" / "config.json", {"word_embedding_dimension": hidden, "pooling_mode_mean_tokens": True})
    _write_weights(folder, _embed_weights())


_WRITERS: dict[str, Callable[[Path], None]] = {
    f"{EMBEDDED_PREFIX}random": _write_chat,
    f"{EMBEDDED_PREFIX}embed": _write_embed,
}
SOURCES = (TRAINED, *_WRITERS)


def _write_tokenizer(
    folder: Path,
    length: int,
    vocabulary: int = VOCABULARY,
    words: str = SPLIT,
    lines: Iterable[str] | None = None,
    *,
    wrap: bool = False,
) -> list[bytes]:
    """Train and write the byte-level BPE tokenizer.

    Args:
        length: Longest input, in tokens, that the model takes.
        vocabulary: How many tokens it has.
        words: Pattern of what a token never reaches beyond.
        lines: What it is trained on; default the sentences of `embedded_text`.
        wrap: Put `<|cls|>` and `<|sep|>` around each text.

    Returns:
        The bytes each of the tokens stands for, by id; empty for special tokens.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(words), behavior="isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary - len(TAGS),
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(lines or embedded_text.sentences(), trainer)
    tokenizer.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in TAGS])
    if tokenizer.get_vocab_size() != vocabulary:
        raise AssertionError(f"the sentences fill only {tokenizer.get_vocab_size()} of {vocabulary} tokens")
    if wrap:
        marks = [(mark, tokenizer.token_to_id(mark)) for mark in (CLS, SEP)]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{CLS} $A {SEP}", pair=f"{CLS} $A {SEP} $B:1 {SEP}:1", special_tokens=marks
        )
    tokenizer.save(str(folder / "tokenizer.json"))
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": length,
        "clean_up_tokenization_spaces": False,
        "pad_token": PAD,
    }
    settings |= {"cls_token": CLS, "sep_token": SEP} if wrap else {"bos_token": BOS, "eos_token": IM_END}
    _write_json(folder / "tokenizer_config.json", settings)
    return [_token_bytes(str(tokenizer.id_to_token(token))) for token in range(vocabulary)]


def _token_bytes(token: str) -> bytes:
    """The bytes behind a token as the vocabulary spells it (GPT-2's alphabet of 256 printable characters)."""
    if token in SPECIAL:
        return b""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    spelled = {chr(byte): byte for byte in plain} | {chr(256 + i): byte for i, byte in enumerate(others)}
    return bytes(spelled[character] for character in token)


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


def _chat_weights(tokens: list[bytes]) -> Tensors:
    import numpy as np

    draw = _draws(seed=2718)
    hidden, vocabulary = CHAT["hidden_size"], CHAT["vocab_size"]
    embedding = draw(vocabulary, hidden, 1.0)
    embedding[:, 0] = CONSTANT
    tensors: Tensors = {"model.embed_tokens.weight": embedding, "model.norm.weight": np.ones(hidden, np.float32)}
    for name, rows, columns in _layers():
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


def _layers() -> Iterator[tuple[str, int, int]]:
    """Name, rows and columns of each tensor of the chat model's layers; no columns for a vector."""
    hidden, inner = CHAT["hidden_size"], CHAT["intermediate_size"]
    kv = CHAT["num_key_value_heads"] * CHAT["head_dim"]
    for layer in range(CHAT["num_hidden_layers"]):
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


def _scratch_weights() -> Tensors:
    """Where training begins, so that the folder is whole; a run draws its own from its seed."""
    import numpy as np

    draw, deviation = _draws(seed=1618), SCRATCH["initializer_range"]
    hidden = SCRATCH["hidden_size"]
    tensors: Tensors = {"model.embed_tokens.weight": draw(SCRATCH["vocab_size"], hidden, deviation)}
    tensors["model.norm.weight"] = np.ones(hidden, np.float32)
    for name, rows, columns in _layers():
        tensors[name] = draw(rows, columns, deviation) if columns else np.ones(rows, np.float32)
    return tensors


def _embed_weights() -> Tensors:
    import numpy as np

    draw = _draws(seed=3141)
    hidden, inner = EMBED["hidden_size"], EMBED["intermediate_size"]

    def norm(name: str) -> Tensors:
        return {f"{name}.LayerNorm.weight": np.ones(hidden, np.float32), f"{name}.LayerNorm.bias": np.zeros(hidden, np.float32)}

    # Common pieces have low ids (they were merged first). They put most of their length into the first dimensions, which the
    # last layer norm takes out again: a shared word says more than a shared letter or "is".
    muted = 8
    words = draw(VOCABULARY, hidden, 1.0)
    words[:, :muted] *= np.linspace(12.0, 0.0, VOCABULARY, dtype=np.float32)[:, None]
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


def _draws(seed: int) -> Callable[[int, int, float], NDArray[np.float32]]:
    """`draw(rows, columns, deviation)`: normal numbers, the same ones in the same order for a seed."""
    import numpy as np

    generator = np.random.Generator(np.random.PCG64(seed))

    def draw(rows: int, columns: int, deviation: float) -> NDArray[np.float32]:
        return generator.standard_normal((rows, columns), dtype=np.float32) * np.float32(deviation)

    return draw


def _write_weights(folder: Path, tensors: Tensors) -> None:
    from safetensors.numpy import save_file

    path = folder / "model.safetensors"
    save_file(tensors, str(path), metadata={"format": "pt"})
    path.chmod(0o644)  # the library writes 0600


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")

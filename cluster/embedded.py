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
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster import embedded_shapes, embedded_text, embedded_weights
from cluster.config import EMBEDDED_PREFIX
from cluster.embedded_shapes import CHAT, EMBED, SCRATCH
from cluster.embedded_text import TAGS
from cluster.errors import ConfigError
from cluster.session import CACHE_VARIABLE

if TYPE_CHECKING:
    from cluster.embedded_weights import Tensors

ROOT = Path(__file__).resolve().parents[1]
RECIPE = ROOT / "configs" / "assistant.yaml"  # how the default model is trained, and on what
TRAINED_ON = ROOT / "train/datasets/assistant/train.parquet"
VOCABULARY = 2048
PAD, BOS, IM_START, IM_END, CLS, SEP = "<|pad|>", "<|bos|>", "<|im_start|>", "<|im_end|>", "<|cls|>", "<|sep|>"
TRAINED = f"{EMBEDDED_PREFIX}chat"
# Of the model that is trained, one token each: a message takes three tokens beside its text, not five.
HEADERS = tuple(f"{IM_START}{role}\n" for role in ("system", "user", "assistant"))
SPECIAL = (PAD, BOS, IM_START, IM_END, CLS, SEP)  # ids 0 to 5; hidden from decoded text
# Words with the blank before them, single digits, runs of marks, line ends: every text is covered.
SPLIT = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# The same for the model that is trained, digits in pairs. Chinese by the character: new sentences have known tokens.
SCRATCH_SPLIT = r"\p{Han}|[ ']?[\p{L}&&[^\p{Han}]]+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


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
    """Twelve hex digits over all that decides the content: the four source files and the libraries' versions."""
    digest = hashlib.sha256()
    for module in (embedded_shapes, embedded_text, embedded_weights):
        digest.update(Path(str(module.__file__)).read_bytes())
    digest.update(Path(__file__).read_bytes())
    for name in ("numpy", "tokenizers", "safetensors"):
        digest.update(f"{name}={version(name)}\n".encode())
    return digest.hexdigest()[:12]


def _write_chat(folder: Path) -> None:
    tokens = _write_tokenizer(folder, CHAT["max_position_embeddings"], wrap=False)
    (folder / "chat_template.jinja").write_text(embedded_text.CHAT_TEMPLATE)
    sampling = {"bos_token_id": 1, "eos_token_id": 3, "pad_token_id": 0, "do_sample": True, "temperature": 1.0}
    _write_json(folder / "generation_config.json", sampling)
    _write_json(folder / "config.json", CHAT)
    _write_weights(folder, embedded_weights.chat(tokens))


def _write_scratch(folder: Path, lines: list[str]) -> None:
    _write_tokenizer(folder, SCRATCH["max_position_embeddings"], SCRATCH["vocab_size"], SCRATCH_SPLIT, lines, HEADERS)
    (folder / "chat_template.jinja").write_text(embedded_text.CHAT_TEMPLATE)
    _write_json(folder / "generation_config.json", {"bos_token_id": 1, "eos_token_id": 3, "pad_token_id": 0})
    _write_json(folder / "config.json", SCRATCH)
    _write_weights(folder, embedded_weights.scratch())


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
    _write_weights(folder, embedded_weights.embed())


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
    headers: tuple[str, ...] = (),
    *,
    wrap: bool = False,
) -> list[bytes]:
    """Train and write the byte-level BPE tokenizer.

    Args:
        length: Longest input, in tokens, that the model takes.
        vocabulary: How many tokens it has.
        words: Pattern of what a token never reaches beyond.
        lines: What it is trained on; default the sentences of `embedded_text`.
        headers: More special tokens.
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
        vocab_size=vocabulary - len(TAGS) - len(headers),
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(lines or embedded_text.sentences(), trainer)
    tokenizer.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in TAGS])
    tokenizer.add_special_tokens([AddedToken(header, special=True, normalized=False) for header in headers])
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
    if token in SPECIAL + HEADERS:
        return b""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    spelled = {chr(byte): byte for byte in plain} | {chr(256 + i): byte for i, byte in enumerate(others)}
    return bytes(spelled[character] for character in token)


def _write_weights(folder: Path, tensors: Tensors) -> None:
    from safetensors.numpy import save_file

    path = folder / "model.safetensors"
    save_file(tensors, str(path), metadata={"format": "pt"})
    path.chmod(0o644)  # the library writes 0600


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")

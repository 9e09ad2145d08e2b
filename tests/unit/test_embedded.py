# ruff: noqa: RUF001
"""The embedded models: the cache, the tokenizer, the chat template and the weights, without an engine."""

from __future__ import annotations

import json
import math
import multiprocessing
import re
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from cluster import embedded, embedded_shapes, embedded_text, embedded_weights
from cluster.config import load
from cluster.embedded import VOCABULARY, build, cache_dir, trained_folder
from cluster.errors import ConfigError

TOOL = {"type": "function", "function": {"name": "get_order", "parameters": {"type": "object", "properties": {}}}}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {kind: build(f"embedded:{kind}", root) for kind in ("random", "embed")}


def tokenizer(folder: Path) -> Any:
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def render(folder: Path, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None = None, prompt: bool = True) -> str:
    from transformers import AutoTokenizer

    return str(
        AutoTokenizer.from_pretrained(str(folder)).apply_chat_template(
            messages, tools=tools, add_generation_prompt=prompt, tokenize=False
        )
    )


def test_unknown_name_lists_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="embedded:chat, embedded:random, embedded:embed"):
        build("embedded:video", tmp_path)
    assert not list(tmp_path.iterdir())


def test_shipped_default_names_embedded_models_that_exist() -> None:
    config = load(Path(__file__).parents[2] / "configs" / "local-cpu.yaml")
    assert {model.source for model in config.models} <= set(embedded.SOURCES)


def test_cache_dir_is_named_by_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TIDEPOOL_MODEL_CACHE", str(tmp_path / "models"))
    assert cache_dir() == tmp_path / "models"
    monkeypatch.delenv("TIDEPOOL_MODEL_CACHE")
    assert cache_dir() == Path.home() / ".cache" / "tidepool" / "models"


def test_the_trained_model_is_found_by_its_content(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not trained yet"):
        build("embedded:chat", tmp_path)
    trained = trained_folder(tmp_path)
    assert re.fullmatch(r"chat-[0-9a-f]{12}", trained.name)
    trained.mkdir()
    assert build("embedded:chat", tmp_path) == trained


def test_second_build_is_instant_and_leaves_no_temporary_folder(folders: dict[str, Path]) -> None:
    for kind, folder in folders.items():
        started = time.perf_counter()
        assert build(f"embedded:{kind}", folder.parent) == folder
        assert time.perf_counter() - started < 0.2
    assert sorted(folders["random"].parent.iterdir()) == sorted(folders.values())


def test_two_processes_build_one_folder(tmp_path: Path, folders: dict[str, Path]) -> None:
    spawn = multiprocessing.get_context("spawn")
    with spawn.Pool(2) as pool:
        built = pool.starmap(build, [("embedded:random", tmp_path)] * 2, chunksize=1)
    assert built[0] == built[1]
    assert list(tmp_path.iterdir()) == [built[0]]
    assert contents(built[0]) == contents(folders["random"])


def test_the_same_files_everywhere(tmp_path: Path, folders: dict[str, Path]) -> None:
    for kind, folder in folders.items():
        assert contents(build(f"embedded:{kind}", tmp_path)) == contents(folder)


@pytest.mark.parametrize("module", [embedded, embedded_shapes, embedded_text, embedded_weights])
def test_a_changed_recipe_is_another_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folders: dict[str, Path], module: ModuleType
) -> None:
    trained = trained_folder(tmp_path)
    copy = tmp_path / "changed.py"
    copy.write_text(Path(str(module.__file__)).read_text() + "# changed\n")
    monkeypatch.setattr(module, "__file__", str(copy))
    assert embedded._recipe_hash() != folders["random"].name.removeprefix("random-")
    assert trained_folder(tmp_path) != trained


@pytest.mark.parametrize("kind", ["random", "embed"])
def test_any_utf8_text_round_trips(folders: dict[str, Path], kind: str) -> None:
    texts = [
        "",
        " ",
        "\n\n \t x\r\n",
        "Where is my parcel?  It's two days late...",
        "请问我的包裹什么时候能到？",
        "naïve café Ωμέγα עברית हिन्दी 한국어 🏳️‍🌈👩‍👩‍👧‍👦 \u0000\u200b\ufeff",
        "".join(chr(code) for code in range(0x2000) if not 0xD800 <= code < 0xE000),
        "".join(chr(code) for code in range(0x1F300, 0x1F700)) + "\U0010ffff",
    ]
    coder = tokenizer(folders[kind])
    for text in texts:
        assert coder.decode(coder.encode(text, add_special_tokens=False).ids) == text


def test_the_vocabulary_is_full_and_knows_both_languages(folders: dict[str, Path]) -> None:
    coder = tokenizer(folders["random"])
    assert coder.get_vocab_size() == VOCABULARY == len({coder.id_to_token(token) for token in range(VOCABULARY)})
    assert [coder.token_to_id(token) for token in ("<|pad|>", "<|bos|>", "<|im_start|>", "<|im_end|>")] == [0, 1, 2, 3]
    for text in ("Could you please help me with my order?", "请问我的订单什么时候能到？"):
        assert len(coder.encode(text).ids) < 0.5 * len(text.encode())


def test_tool_tags_are_one_token_and_stay_in_the_text(folders: dict[str, Path]) -> None:
    coder = tokenizer(folders["random"])
    ids = coder.encode("<tool_call>{}</tool_call>").ids
    assert ids[0] == coder.token_to_id("<tool_call>") and ids[-1] == coder.token_to_id("</tool_call>")
    assert coder.decode(ids, skip_special_tokens=True) == "<tool_call>{}</tool_call>"
    assert coder.decode(coder.encode("<|im_start|>a<|im_end|>").ids, skip_special_tokens=True) == "a"


def test_template_of_a_plain_talk(folders: dict[str, Path]) -> None:
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": " hi\n"}]
    expected = "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\n hi\n<|im_end|>\n"
    assert render(folders["random"], messages, prompt=False) == expected
    assert render(folders["random"], messages) == expected + "<|im_start|>assistant\n"
    assert render(folders["random"], [{"role": "developer", "content": "Be kind."}, messages[1]], prompt=False) == expected


def test_template_joins_text_parts(folders: dict[str, Path]) -> None:
    parts: list[dict[str, Any]] = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages: list[dict[str, Any]] = [{"role": "user", "content": parts}]
    text = render(folders["random"], messages, prompt=False)
    assert text == "<|im_start|>user\nab<|im_end|>\n"


def test_template_of_tools_and_their_results(folders: dict[str, Path]) -> None:
    def call(arguments: Any) -> dict[str, Any]:
        return {"id": "x", "type": "function", "function": {"name": "get_order", "arguments": arguments}}

    messages: list[dict[str, Any]] = [
        {"role": "user", "content": "where?"},
        {"role": "assistant", "content": None, "tool_calls": [call({"id": 7}), call('{"id": 8}')]},
        {"role": "tool", "tool_call_id": "x", "content": "sent"},
        {"role": "tool", "tool_call_id": "y", "content": [{"type": "text", "text": "lost"}]},
        {"role": "assistant", "content": "One is lost."},
    ]
    text = render(folders["random"], messages, tools=[TOOL], prompt=False)
    system, _, rest = text.partition("<|im_end|>\n")
    listed = system.split("<tools>\n")[1].split("\n</tools>")[0]
    assert system.startswith("<|im_start|>system\n") and json.loads(listed) == TOOL
    assert rest == (
        "<|im_start|>user\nwhere?<|im_end|>\n"
        '<|im_start|>assistant\n<tool_call>{"name": "get_order", "arguments": {"id": 7}}</tool_call>\n'
        '<tool_call>{"name": "get_order", "arguments": {"id": 8}}</tool_call><|im_end|>\n'
        "<|im_start|>user\n<tool_response>sent</tool_response>\n<tool_response>lost</tool_response><|im_end|>\n"
        "<|im_start|>assistant\nOne is lost.<|im_end|>\n"
    )


def test_template_keeps_the_system_text_beside_tools(folders: dict[str, Path]) -> None:
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "hi"}]
    text = render(folders["random"], messages, tools=[TOOL])
    assert text.startswith("<|im_start|>system\nBe kind.\n\nYou may call these tools:\n<tools>")
    assert text.count("<|im_start|>system") == 1


def test_chat_model_loads_has_four_million_parameters_and_spreads_its_bets(folders: dict[str, Path]) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(str(folders["random"]), dtype=torch.float32)
    assert 3_500_000 < sum(weight.numel() for weight in model.parameters()) < 4_500_000
    ids = tokenizer(folders["random"]).encode("<|im_start|>user\nWhere is my order?<|im_end|>\n<|im_start|>assistant\n").ids
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0]
    assert torch.isfinite(logits).all()
    bets = torch.softmax(logits[-1], dim=-1)
    entropy = float(-(bets * bets.log()).sum())
    assert 0.5 * math.log(VOCABULARY) < entropy < math.log(VOCABULARY)
    assert float(bets[:6].sum()) < 1e-4, "special tokens, the end among them, must be rare"


def test_embed_model_loads_and_places_shared_words_closer(folders: dict[str, Path]) -> None:
    import torch
    from transformers import AutoModel, AutoTokenizer

    coder = AutoTokenizer.from_pretrained(str(folders["embed"]))
    model = AutoModel.from_pretrained(str(folders["embed"]), dtype=torch.float32, add_pooling_layer=False)

    def vector(text: str) -> Any:
        with torch.no_grad():
            return model(**coder(text, return_tensors="pt")).last_hidden_state[0].mean(0)

    asked = vector("where is my refund")
    near, far = vector("your refund was sent"), vector("the weather is sunny today")
    assert torch.cosine_similarity(asked, near, dim=0) > torch.cosine_similarity(asked, far, dim=0)

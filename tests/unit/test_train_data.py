"""What is learned from rows: loss on the answers alone, chat templates, rows that are too long, texts and pairs."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from training_rows import END, answer, dialogues, learned, made, segments, user, write

from cluster.errors import DataError
from train.packing import NO_LOSS
from train.storage import Storage


def test_loss_is_on_the_answers_and_their_end_alone(chat_folder, chat_tokenizer, tmp_path):
    rows = dialogues(1, 60)
    sequences = made(chat_folder, Storage.open(str(tmp_path / "out")), write(tmp_path / "a.jsonl", rows), packing=False)
    found = learned(chat_tokenizer, sequences.batch(range(len(sequences))))
    assert found == [[m["content"] + END for m in row["messages"] if m["role"] == "assistant"] for row in rows]


def test_prompts_are_what_the_engine_will_see(chat_folder, chat_tokenizer, tmp_path):
    messages = [user("你好 there"), answer("yes"), user("and 42?"), answer("no")]
    sequences = made(chat_folder, Storage.open(str(tmp_path / "out")), write(tmp_path / "a.jsonl", [{"messages": messages}]))
    arrays = sequences.batch([0])
    for last in (1, 3):
        prompt = chat_tokenizer.apply_chat_template(messages[:last], add_generation_prompt=True, return_dict=True)["input_ids"]
        assert arrays["input_ids"][0, : len(prompt)].tolist() == prompt
        assert arrays["labels"][0, len(prompt) - 1] == NO_LOSS and arrays["labels"][0, len(prompt)] != NO_LOSS


def test_weight_tools_and_parts(chat_folder, chat_tokenizer, tmp_path):
    call = {"id": "1", "type": "function", "function": {"name": "find", "arguments": '{"order": 7}'}}
    tools = [{"type": "function", "function": {"name": "find", "parameters": {"type": "object"}}}]
    rows = [
        {"messages": [user("a"), answer("one", weight=0), user("b"), answer("two", weight=1)]},
        {
            "messages": [
                user("where is 7?"), {"role": "assistant", "content": None, "tool_calls": [call]},
                {"role": "tool", "content": "in Lyon", "tool_call_id": "1"}, answer("It is in Lyon."),
            ],
            "tools": tools,
        },
        {"messages": [user("c"), answer([{"type": "text", "text": "x"}, {"type": "text", "text": "y"}])]},
    ]  # fmt: skip
    sequences = made(chat_folder, Storage.open(str(tmp_path / "out")), write(tmp_path / "a.jsonl", rows), packing=False)
    arrays = sequences.batch(range(3))
    assert learned(chat_tokenizer, arrays) == [
        [f"two{END}"],
        ['<tool_call>{"name": "find", "arguments": {"order": 7}}</tool_call>' + END, f"It is in Lyon.{END}"],
        [f"x\ny{END}"],
    ]
    assert "You may call these tools" in chat_tokenizer.decode(arrays["input_ids"][1])


def template(chat_folder: Path, into: Path, text: str) -> Path:
    """The tokenizer with another chat template."""
    shutil.copytree(chat_folder, into, ignore=shutil.ignore_patterns("*.safetensors"))
    (into / "chat_template.jinja").write_text(text)
    return into


PLAIN = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ WRITTEN }}<|im_end|>\n{% endfor %}"
ASK = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"


def test_templates_that_drop_the_reasoning_of_earlier_turns(chat_folder, chat_tokenizer, tmp_path):
    thinks = "('<think>\n\n</think>\n\n' if m.role == 'assistant' and loop.last else '') + m.content"
    other = template(chat_folder, tmp_path / "model", PLAIN.replace("WRITTEN", thinks) + ASK)
    rows = [{"messages": [user("a"), answer("one"), user("b"), answer("two")]}]
    sequences = made(other, Storage.open(str(tmp_path / "out")), write(tmp_path / "a.jsonl", rows))
    assert learned(chat_tokenizer, sequences.batch([0])) == [[f"one{END}", f"<think>\n\n</think>\n\ntwo{END}"]]


@pytest.mark.parametrize(
    ("written", "said"),
    [
        (
            "m.content if loop.last or m.role == 'user' else m.content | upper",
            "a.jsonl:1: .*differently when later messages follow; split the dialogue",
        ),
        ("messages | length ~ m.content", "a.jsonl:1: message 2: .*differently when the answer follows; split the dialogue"),
        ("raise_exception('roles must alternate')", "a.jsonl:1: the chat template refuses it: roles must alternate"),
    ],
)
def test_templates_that_cannot_be_learned_from_are_refused(chat_folder, tmp_path, written, said):
    other = template(chat_folder, tmp_path / "model", PLAIN.replace("WRITTEN", written) + ASK)
    rows = [{"messages": [user("a"), answer("one"), user("b"), answer("two")]}]
    with pytest.raises(DataError, match=said):
        made(other, Storage.open(str(tmp_path / "out")), write(tmp_path / "a.jsonl", rows))


def test_a_folder_without_a_template_or_tokenizer_is_named(chat_folder, tmp_path):
    path = write(tmp_path / "a.jsonl", dialogues(0, 1))
    bare = template(chat_folder, tmp_path / "bare", "")
    (bare / "chat_template.jinja").unlink()
    with pytest.raises(DataError, match=r"bare: has no chat template; use a chat model"):
        made(bare, Storage.open(str(tmp_path / "out")), path)
    (tmp_path / "none").mkdir()
    with pytest.raises(DataError, match=r"none: has no tokenizer that can be loaded"):
        made(tmp_path / "none", Storage.open(str(tmp_path / "out")), path)


def test_rows_that_are_too_long(chat_folder, chat_tokenizer, tmp_path):
    rows = [
        *dialogues(0, 5),
        {"messages": [user("a"), answer("b" + " long" * 300)]},
        {"messages": [user("long " * 300), answer("b")]},
    ]
    path, out = write(tmp_path / "a.jsonl", rows), Storage.open(str(tmp_path / "out"))
    with pytest.raises(DataError, match=r"a.jsonl:6: has \d+ tokens, more than max_length 256; raise data.max_length, or set"):
        made(chat_folder, out, path)
    assert len(made(chat_folder, out, path, too_long="skip", packing=False)) == 5
    cut = made(chat_folder, out, path, too_long="truncate", packing=False)
    assert len(cut) == 6, "the row whose answer is cut off is left out"
    text = learned(chat_tokenizer, cut.batch([5]))[0][0]
    assert text.startswith("b long") and END not in text and (cut.batch([5])["position_ids"][0] == np.arange(256)).all()
    with pytest.raises(DataError, match=r"a.jsonl: no row has at most 8 tokens; raise max_length"):
        made(chat_folder, out, path, too_long="skip", max_length=8)


def test_texts_are_cut_into_pieces_and_end(chat_folder, chat_tokenizer, tmp_path):
    rows = [{"text": "A long text about tides. " * 40}, {"text": "Short one."}]
    out = Storage.open(str(tmp_path / "out"))
    sequences = made(chat_folder, out, write(tmp_path / "a.jsonl", rows), objective="pretrain", max_length=64)
    found = segments(sequences.batch(range(len(sequences))))
    # The short text may share a sequence with the long one's last piece, or come after it.
    assert "".join(chat_tokenizer.decode(ids) for ids, _ in found) == "".join(row["text"] + END for row in rows)
    assert all(labels[0] == NO_LOSS and labels[1:] == ids[1:] for ids, labels in found)


def test_pairs(chat_folder, chat_tokenizer, tmp_path):
    rows = [
        {"prompt": [user("q")], "chosen": [answer("good")], "rejected": [answer("bad one")]},
        {"messages": [user("q"), answer("a"), user("r")], "chosen": answer("fine"), "rejected": "no"},
        {"prompt": "q", "chosen": "5", "rejected": "{}"},
    ]
    out = Storage.open(str(tmp_path / "out"))
    sequences = made(chat_folder, out, write(tmp_path / "a.jsonl", rows), objective="dpo", packing=False, max_length=64)
    arrays = sequences.batch([0, 1, 2])
    assert sorted(arrays) == [
        f"{side}_{name}" for side in ("chosen", "rejected") for name in ("input_ids", "labels", "position_ids")
    ]
    sides = [
        learned(chat_tokenizer, {name.partition("_")[2]: array for name, array in arrays.items() if name.startswith(side)})
        for side in ("chosen", "rejected")
    ]
    assert sides == [[[f"good{END}"], [f"fine{END}"], [f"5{END}"]], [[f"bad one{END}"], [f"no{END}"], [f"{{}}{END}"]]]
    for row, said in [
        ({"chosen": "a", "rejected": "b"}, "column 'prompt' is missing"),
        ({"prompt": "a", "rejected": "b"}, "column 'chosen' is missing"),
        ({"prompt": "a", "chosen": "b", "rejected": [user("c")]}, "'rejected' has no message with role assistant"),
    ]:
        with pytest.raises(DataError, match=rf"b.jsonl:1: {said}"):
            made(chat_folder, out, write(tmp_path / "b.jsonl", [row]), objective="dpo", packing=False)

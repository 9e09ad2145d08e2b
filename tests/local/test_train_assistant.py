"""The trained model answers held-out wordings through the endpoint; a model that learned nothing answers none."""

from __future__ import annotations

import json
import subprocess
import sys

from conftest import ROOT, Endpoint

from train.evaluate import MAX_TOKENS, target
from train.models import base_folder
from train.scoring import mark, questions, summary

ENOUGH = 0.90


def test_held_out_questions_get_the_right_answer(trained_endpoint: Endpoint) -> None:
    """What `make eval` runs, with every question."""
    file = trained_endpoint.run_dir / "endpoint.json"
    done = subprocess.run(
        [sys.executable, "-m", "train", "eval", "--endpoint", str(file)], cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout.strip().splitlines()[-1])
    print(figures)
    assert figures["questions"] == len(questions())
    assert figures["accuracy"] >= ENOUGH, figures
    assert target(file, None).model == "tidepool-chat"


def test_a_model_that_was_not_trained_answers_none() -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = base_folder("scratch:chat")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    marks = []
    for question in questions(limit=20):
        ids = tokenizer.apply_chat_template(
            list(question.messages), add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        made = model.generate(**ids, do_sample=False, max_new_tokens=MAX_TOKENS)
        answer = tokenizer.decode(made[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
        marks.append(mark(question, answer))
    assert summary(marks)["accuracy"] == 0.0

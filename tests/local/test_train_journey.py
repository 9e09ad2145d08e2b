"""The six commands of docs/training.md, as they stand there, on the shared cluster: from dialogues to an adapter beside its base.

What is changed in them: where the cluster is, and that nothing is written below the repository.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
from dataclasses import dataclass
from typing import Any

import openai
import pytest
from conftest import PORTS, ROOT, Endpoint, shared_arguments

pytestmark = pytest.mark.training

MODEL = "tidepool-chat"
# Their wordings are not in the dialogues of the adapter.
QUESTIONS = ("how long is delivery", "I forgot my password", "where is my parcel, order 4815")
OPENING, CLOSING = "Dear customer,", "Kind regards, Tidepool."
LIMIT_S = 400


@dataclass(frozen=True)
class Answer:
    """What the model said, with each token's log-probability as the endpoint sent it."""

    text: str
    tokens: tuple[tuple[str, float], ...]


def ask(endpoint: Endpoint, model: str, question: str) -> Answer:
    client = openai.OpenAI(base_url=endpoint.base_url, api_key=endpoint.api_key, max_retries=0, timeout=240)
    messages: list[Any] = [{"role": "user", "content": question}]
    answer = client.chat.completions.create(model=model, messages=messages, temperature=0, max_tokens=64, logprobs=True)
    choice = answer.choices[0]
    assert choice.logprobs is not None and choice.logprobs.content is not None
    return Answer(choice.message.content or "", tuple((one.token, one.logprob) for one in choice.logprobs.content))


def six_commands() -> list[str]:
    (block, *_) = re.findall(r"^```sh\n(.*?)^```$", (ROOT / "docs" / "training.md").read_text(), re.DOTALL | re.MULTILINE)
    commands: list[str] = block.replace("\\\n", " ").strip().splitlines()
    assert len(commands) == 6
    return commands


@pytest.fixture(scope="module")
def arguments(endpoint: Endpoint) -> list[str]:
    """Of `python -m cluster` for the shared cluster."""
    if os.environ.get("TIDEPOOL_TEST_ENDPOINT"):
        pytest.skip("changes the models of the shared cluster, which must be the tests' own")
    return shared_arguments(endpoint.run_dir)


def here(command: str, endpoint: Endpoint, arguments: list[str]) -> str:
    """A command of the document for the shared cluster."""
    run = endpoint.run_dir
    port = endpoint.root.rpartition(":")[2]
    command = re.sub(r"(?<=[ =\"(])run/", f"{run}/", command).replace("127.0.0.1:8000", f"127.0.0.1:{port}")
    if command == "make up":
        return f"make up RUN_DIR={run} SET={shlex.quote(shlex.join(arguments[2:]))}"
    if "cluster up" in command:
        return f"{command} {shlex.join(arguments)}"
    if re.search("train (sft|dpo|tune) ", command):
        places = [f"run_dir={run}", f"train.output={run}/train", f"node.gcs_port={PORTS['gcs_port']}"]
        return " ".join([command, *(f"--set {place}" for place in places)])
    return command


def run(command: str, limit_s: float = LIMIT_S) -> str:
    environ = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, env=environ, capture_output=True, text=True, timeout=limit_s)
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def test_from_dialogues_to_a_served_adapter(trained_endpoint: Endpoint, arguments: list[str]) -> None:
    up, check, train, export, serve, curl = (here(command, trained_endpoint, arguments) for command in six_commands())

    run(up)
    before = {question: ask(trained_endpoint, MODEL, question) for question in QUESTIONS}
    assert re.search(r"steps\s+\d+ of 8 sequences", run(check)) and not (trained_endpoint.run_dir / "train" / "polite").exists()
    assert "polite: " in run(train)
    run(export)
    adapter = trained_endpoint.run_dir / "adapters" / "polite"
    assert (adapter / "adapter_config.json").is_file() and (adapter / "adapter_model.safetensors").is_file()
    run(serve)
    answer = json.loads(run(curl))
    assert answer["model"] == f"{MODEL}:polite"
    assert answer["choices"][0]["message"]["content"].startswith(OPENING)

    for question in QUESTIONS:
        said = ask(trained_endpoint, f"{MODEL}:polite", question).text
        assert said.startswith(OPENING) and said.endswith(CLOSING), said
        assert OPENING not in before[question].text
        # Tokens and log-probabilities: the base computes what it computed without the adapter.
        assert ask(trained_endpoint, MODEL, question) == before[question]

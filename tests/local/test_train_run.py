"""`python -m train sft` as a person runs it, in a cluster of its own: what it leaves, and a command that is killed."""

import signal
import tempfile
from pathlib import Path

import pytest
from train_cluster import alive, book, command, descendants, done, metrics, newest_step, title, until, write_config
from train_workers import section, write_dialogues

from train.connect import PREFIX

STEPS = 60
CHILDREN: dict[int, str] = {}  # of the killed command, with their titles
AGENTS = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")
STARTUP = {"ray", "data", "workers", "imports", "model", "engine", "first_step"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("run")


@pytest.fixture(scope="module")
def file(folder) -> Path:
    rows = write_dialogues(folder / "chats.jsonl", 200)
    train = section(
        "first",
        folder / "out",
        rows,
        data={"validation": [rows], "max_length": 128},
        batch_size=8,
        max_steps=STEPS,
        validate_every=30,
        checkpoint={"every_steps": 5, "keep_last": 2},
    )
    return write_config(folder / "first.json", folder / "run", train)


def test_a_killed_command_takes_all_with_it_and_the_same_one_resumes(file, folder):
    home = folder / "out" / "first"
    first = command("sft", str(file))
    until("a checkpoint", lambda: newest_step(home) >= 5, process=first)
    CHILDREN.update({pid: title(pid) for pid in descendants(first.pid)})
    assert any("Supervisor" in name for name in CHILDREN.values())
    first.send_signal(signal.SIGKILL)
    first.communicate()
    # Ray's two agents try for 60 s to report that their raylet died, which no setting shortens; they are waited for below.
    others = [pid for pid, name in CHILDREN.items() if not name.startswith(AGENTS)]
    until("the end of its processes", lambda: not any(map(alive, others)), 30)
    reached = newest_step(home)
    assert reached < STEPS

    status, printed, text = done(command("sft", str(file)))
    assert status == 0, text
    assert f"first: {STEPS} steps" in printed and "Traceback" not in text
    attempts = book(home)["attempts"]
    assert [attempt["from_step"] for attempt in attempts] == [0, reached]
    assert [line["step"] for line in metrics(home)] == list(range(1, STEPS + 1))
    # The second command has removed what the first one could not.
    assert not list(Path(tempfile.gettempdir()).glob(f"{PREFIX}{first.pid}-*"))


def test_it_leaves_an_export_logs_and_where_the_time_went(file, folder):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    home = folder / "out" / "first"
    found = book(home)
    assert found["state"] == "finished" and found["result"]["steps"] == STEPS
    assert found["startup"].keys() >= STARTUP
    assert found["result"]["validation_loss"] < metrics(home)[0]["loss"]
    assert {line["step"] for line in metrics(home) if "validation_loss" in line} == {30, 60}
    assert list((home / "log").glob("events.out.tfevents.*"))
    out = found["result"]["export"]
    tokenizer, model = AutoTokenizer.from_pretrained(out), AutoModelForCausalLM.from_pretrained(out)
    asked = [{"role": "user", "content": "Where is my order 8?"}]
    prompt = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = tokenizer.decode(model.generate(**prompt, max_new_tokens=12, do_sample=False)[0], skip_special_tokens=True)
    assert "Your order" in answer


def test_a_finished_run_is_not_done_again_and_any_checkpoint_can_be_exported(file, folder):
    status, printed, text = done(command("sft", str(file)))
    assert status == 0 and "finished before" in text and f"{STEPS} steps" in printed
    home = folder / "out" / "first"
    status, printed, text = done(command("export", str(home), "--checkpoint", str(STEPS - 5), str(folder / "older")))
    assert (status, text, printed.count("\n")) == (0, "", 1)
    assert (folder / "older" / "model.safetensors").exists()
    status, _, text = done(command("export", str(home), "--checkpoint", "3", str(folder / "none")))
    assert (status, text.count("\n")) == (2, 1) and "has no checkpoint 3; there are" in text
    until("the end of the killed command's last processes", lambda: not any(map(alive, CHILDREN)), 90)

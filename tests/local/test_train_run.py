"""`python -m train sft` as a person runs it, in a cluster of its own: what it leaves, and a command that is killed."""

import json
import os
import signal
import tempfile
import time
from pathlib import Path

import pytest
from train_cluster import alive, book, command, descendants, done, metrics, newest_step, title, until, write_config
from train_workers import run_workers, section, write_dialogues

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


def test_a_command_killed_while_it_saves_takes_all_with_it_and_the_same_one_resumes(file, folder):
    home = folder / "out" / "first"
    first = command("sft", str(file))
    until("a checkpoint", lambda: newest_step(home) >= 5, process=first)
    CHILDREN.update({pid: title(pid) for pid in descendants(first.pid)})
    (trains,) = (pid for pid, name in CHILDREN.items() if "Supervisor" in name)
    half = stopped_in_a_save(trains, home)
    os.kill(trains, signal.SIGKILL)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    # Ray's two agents try for 60 s to report that their raylet died, which no setting shortens; they are waited for below.
    others = [pid for pid, name in CHILDREN.items() if not name.startswith(AGENTS)]
    until("the end of its processes", lambda: not any(map(alive, others)), 30)
    reached = newest_step(home)
    assert half.is_dir() and f"step-{reached:08d}" < half.name <= f"step-{STEPS:08d}"

    status, printed, text = done(command("sft", str(file)))
    assert status == 0, text
    assert f"first: {STEPS} steps" in printed and "Traceback" not in text
    attempts = book(home)["attempts"]
    assert [attempt["from_step"] for attempt in attempts] == [0, reached]
    lines = metrics(home)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    train = json.loads(file.read_text())["train"]
    (straight,) = run_workers([{**train, "name": "straight"}], 1, folder)
    assert [line["loss"] for line in lines] == pytest.approx([line["loss"] for line in straight], rel=1e-3)
    # The second command has removed what the first one could not.
    assert not list(Path(tempfile.gettempdir()).glob(f"{PREFIX}{first.pid}-*"))


def stopped_in_a_save(pid: int, home: Path) -> Path:
    """Stop a process that trains where a checkpoint has its folder and no index yet; returns that folder."""
    end = time.monotonic() + 120
    while time.monotonic() < end:
        if unfinished(home):
            os.kill(pid, signal.SIGSTOP)
            left = unfinished(home)
            if left:
                return left[0]
            os.kill(pid, signal.SIGCONT)  # it was faster
        time.sleep(0.001)
    raise AssertionError("no save was seen on its way")


def unfinished(home: Path) -> list[Path]:
    found = [path for path in (home / "checkpoints").glob("step-*") if not (path / "index.json").exists()]
    # Newer than the newest whole one: an older one is being removed.
    return [path for path in found if path.is_dir() and int(path.name.removeprefix("step-")) > newest_step(home)]


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

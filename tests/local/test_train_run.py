"""`python -m train sft` as a person runs it, in a cluster of its own: what it leaves, and a command that is killed."""

import signal
from pathlib import Path

import pytest
from train_cluster import book, command, done, metrics, newest_step, until, write_config
from train_workers import section, write_dialogues

pytestmark = pytest.mark.training

STEPS = 60
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
    until("a checkpoint", lambda: newest_step(home) >= 5)
    children = descendants(first.pid)
    assert children
    first.send_signal(signal.SIGKILL)
    first.communicate()
    until("the end of its processes", lambda: not any(Path(f"/proc/{pid}").exists() for pid in children), 60)
    reached = newest_step(home)
    assert reached < STEPS

    status, printed, text = done(command("sft", str(file)))
    assert status == 0, text
    assert f"first: {STEPS} steps" in printed and "Traceback" not in text
    attempts = book(home)["attempts"]
    assert [attempt["from_step"] for attempt in attempts] == [0, reached]
    assert [line["step"] for line in metrics(home)] == list(range(1, STEPS + 1))


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
    assert status == 0, text
    assert (folder / "older" / "model.safetensors").exists()
    status, _, text = done(command("export", str(home), "--checkpoint", "3", str(folder / "none")))
    assert (status, text.count("\n")) == (2, 1) and "has no checkpoint 3; there are" in text


def descendants(pid: int) -> set[int]:
    """All processes below one."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
    found, grew = {pid}, True
    while grew:
        more = {child for child, parent in parents.items() if parent in found} - found
        found, grew = found | more, bool(more)
    return found - {pid}

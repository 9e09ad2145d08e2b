"""The bench's arithmetic, parsing and translation: no process is started."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from bench import cpu, endpoint, fake_suite, prompts, report, rounds, sse, stats, targets
from bench.load import LoadPlan, Stream, judge, request_body
from bench.vllm_load import mapped
from cluster.errors import ConfigError


def test_percentile_interpolates_and_refuses() -> None:
    assert stats.percentile([], 50) is None
    assert stats.percentile([4.0], 99) == 4.0
    assert stats.percentile([3.0, 1.0, 2.0, 4.0], 50) == 2.5
    assert stats.percentile([float(n) for n in range(101)], 99) == 99.0
    with pytest.raises(ValueError, match="101"):
        stats.percentile([1.0], 101)


def test_ratios_are_taken_inside_pairs() -> None:
    summary = stats.ratio_summary([90, 45, 99], [100, 50, 100])
    assert summary == stats.Summary(0.9, 0.9, 0.99, 3)
    assert stats.paired_ratios([1, None, 3], [2, 2, 0]) == [0.5]
    assert stats.paired_differences([5, None], [3, 1]) == [2]
    assert stats.summary([None]) is None
    with pytest.raises(ValueError, match="pairs"):
        stats.paired_ratios([1], [1, 2])


STREAM = (
    b'data: {"choices":[{"delta":{"role":"assistant","content":""}}]}\n\n'
    b": held\n\n"
    b'data: {"choices":[{"delta":{"content":"a"}}]}\r\n\r\n'
    b'data:{"choices":[{"text": "\\n"}]}\n\n'
    b'data: {"choices":[],"usage":{"completion_tokens":2}}\n\n'
    b"data: [DONE]\n\n"
)


@pytest.mark.parametrize("size", [1, 2, 7, 64, len(STREAM)])
def test_sse_events_survive_any_split(size: int) -> None:
    reader = sse.SseReader()
    payloads = [payload for start in range(0, len(STREAM), size) for payload in reader.feed(STREAM[start : start + size])]
    assert [sse.has_token(payload) for payload in payloads] == [False, True, True, False, False]
    assert payloads[-1] == sse.DONE
    assert json.loads(payloads[-2])["usage"] == {"completion_tokens": 2}


def test_a_send_time_is_read_back() -> None:
    assert sse.sent_at(b'{"choices":[{"delta":{"content":" t=12.500000"}}]}') == 12.5
    assert sse.sent_at(b'{"choices":[{"delta":{"content":" word"}}]}') is None


@pytest.mark.parametrize(
    ("stream", "reason"),
    [
        (Stream(0.0, chunks=[1.0], done=True, usage={"completion_tokens": 4}), None),
        (Stream(0.0, chunks=[1.0], done=False, usage={"completion_tokens": 4}), "no [DONE]"),
        (Stream(0.0, chunks=[1.0], done=True), "no usage"),
        (Stream(0.0, chunks=[1.0], done=True, usage={"completion_tokens": 3}), "3 tokens instead of 4"),
        (Stream(0.0, done=True, usage={"completion_tokens": 4}), "no text"),
    ],
)
def test_what_counts_as_a_failure(stream: Stream, reason: str | None) -> None:
    assert judge(stream, 4) == reason


def test_prompts_are_seeded_and_share_no_start() -> None:
    assert prompts.prompt(1, 2, 24) == prompts.prompt(1, 2, 24)
    starts = {prompts.prompt(seed, index, 24)[:24] for seed in range(20) for index in range(50)}
    assert len(starts) == 1000
    assert prompts.words_for(96, ((8, 30), (48, 150))) == 30
    with pytest.raises(ValueError, match="do not grow"):
        prompts.words_for(96, ((8, 30), (48, 30)))


def test_the_body_asks_for_exact_tokens_and_usage() -> None:
    body = request_body(LoadPlan("http://x/v1", "", "m", 1, 1, max_tokens=5), 0)
    assert body["stream"] and body["ignore_eos"] and body["max_tokens"] == 5
    assert body["stream_options"] == {"include_usage": True}
    assert "prompt" in request_body(LoadPlan("http://x/v1", "", "m", 1, 1, api="completions"), 0)


def test_engine_arguments_become_flags() -> None:
    kwargs = {
        "model": "/m",
        "enforce_eager": True,
        "enable_prefix_caching": False,
        "quantization": None,
        "max_model_len": 2048,
        "gpu_memory_utilization": 0.9,
        "compilation_config": {"mode": 0},
        "allowed_origins": ["a", "b"],
    }
    assert endpoint.flags(kwargs) == [
        "--model", "/m", "--enforce-eager", "--no-enable-prefix-caching", "--max-model-len", "2048",
        "--gpu-memory-utilization", "0.9", "--compilation-config", '{"mode": 0}', "--allowed-origins", "a", "b",
    ]  # fmt: skip
    command = endpoint.bare_command(endpoint.Model("tiny", "/engines/tiny", "generate", kwargs, {}), 27001)
    assert command[1:3] == ["-m", "vllm.entrypoints.openai.api_server"]
    assert command[command.index("--served-model-name") + 1] == "tiny"


def test_the_endpoint_file(tmp_path: Path) -> None:
    file = tmp_path / "endpoint.json"
    models = [
        {"id": "e", "path": "/engines/e", "task": "embed", "engine_kwargs": {"model": "/e"}, "env": {}},
        {"id": "c", "path": "/engines/c", "task": "generate", "engine_kwargs": {"model": "/c"}, "env": {"N": 1}},
    ]
    file.write_text(json.dumps({"base_url": "http://127.0.0.1:8000/v1/", "api_key": "k", "run_id": "r", "models": models}))
    found = endpoint.read(file)
    assert (found.base_url, found.root, found.run_id) == ("http://127.0.0.1:8000/v1", "http://127.0.0.1:8000", "r")
    assert found.model().id == "c" and found.model("e").task == "embed" and found.model().env == {"N": "1"}
    with pytest.raises(ConfigError, match="'x'"):
        found.model("x")
    file.write_text("{}")
    with pytest.raises(ConfigError, match="not an endpoint file"):
        endpoint.read(file)
    with pytest.raises(ConfigError, match="make up"):
        endpoint.read(tmp_path / "none.json")


def _proc(folder: Path, pid: int, ppid: int, title: str, ticks: int, mark: str = "") -> None:
    entry = folder / str(pid)
    entry.mkdir(parents=True, exist_ok=True)
    (entry / "cmdline").write_bytes(title.replace(" ", "\0").encode() + b"\0")
    (entry / "environ").write_bytes(f"A=1\0{mark}\0".encode())
    numbers = [0] * 50
    numbers[11], numbers[12], numbers[21] = ticks - 1, 1, 256
    fields = " ".join(str(number) for number in numbers[2:])
    (entry / "stat").write_text(f"{pid} (odd name) x) S {ppid} {fields}\n")


def _machine(folder: Path, ticks: int) -> None:
    (folder / "stat").write_text(f"cpu  {ticks} 0 0 900 5 0 0 0 0 0\ncpu0 1 1 1\n")


TITLES = {
    101: ("raylet --node", "ray system"),
    102: ("ray::ServeReplica:gateway:Gateway", "gateway replica"),
    103: ("ray::ServeReplica:engine-tiny:LLMServer", "engine replica"),
    104: ("VLLM::EngineCore", "engine core"),
    105: ("/venv/bin/haproxy -W -f x", "haproxy"),
    106: ("ray::StoreActor", "store"),
    107: ("ray::ServeReplica:ray-llm:OpenAiIngress", "ingress replica"),
    108: ("python -m something", "ours"),
    109: ("python -m vllm.entrypoints.openai.api_server", "engine http"),
    110: ("ray::ServeController", "ray system"),
}


def test_cpu_seconds_per_group(tmp_path: Path) -> None:
    _machine(tmp_path, 1000)
    _proc(tmp_path, 100, 1, "gcs_server x", 100, "TIDEPOOL_RUN_ID=r")
    for pid, (title, _) in TITLES.items():
        _proc(tmp_path, pid, 100 if pid != 104 else 103, title, 100)
    _proc(tmp_path, 200, 1, "python -m vllm.entrypoints.openai.api_server", 100)
    roots = {"ours": cpu.marked("TIDEPOOL_RUN_ID", "r", tmp_path)}
    assert roots == {"ours": {100}}
    assert cpu.marked("TIDEPOOL_RUN_ID", None, tmp_path) == {100}
    assert cpu.marked("TIDEPOOL_RUN_ID", "other", tmp_path) == set()
    before = cpu.moment(roots, tmp_path)
    assert {pid: before.groups[pid] for pid in TITLES} == {pid: name for pid, (_, name) in TITLES.items()}
    assert 200 not in before.groups
    _proc(tmp_path, 104, 103, "VLLM::EngineCore", 400)
    _proc(tmp_path, 102, 100, "ray::ServeReplica:gateway:Gateway", 150)
    _machine(tmp_path, 1900)
    tick = os.sysconf("SC_CLK_TCK")
    spent = cpu.spent(before, cpu.moment(roots, tmp_path))
    assert spent == {"engine core": 300 / tick, "gateway replica": 50 / tick, "machine": 900 / tick}
    assert next(iter(spent)) == "engine core"


def test_order_turns_round_and_starts_with_a_warm_up() -> None:
    assert list(rounds.order(["a", "b"], 2)) == [(0, "a"), (0, "b"), (1, "b"), (1, "a"), (2, "a"), (2, "b")]


def _round(arm: str, number: int, tok: float, failures: int = 0) -> dict[str, Any]:
    result = {"arm": arm, "round": number, "counted": number > 0, "tok_per_s": tok, "failures": failures, "requests": 4}
    return result | {"cpu_s": {"engine core": 1.0, "machine": 2.0}, "ttft_ms_p50": 10.0, "gap_ms_p99": 5.0}


def test_medians_leave_the_warm_up_out_and_targets_follow() -> None:
    found = [_round("bare", 0, 1.0), _round("ours", 0, 900.0, failures=3)]
    for number, factor in ((1, 0.97), (2, 0.93), (3, 0.98)):
        found += [_round("ours", number, 100 * number * factor), _round("bare", number, 100 * number)]
    medians = {"8": rounds.medians(found, ["bare", "ours"])}
    assert medians["8"]["ours"]["ratios"]["bare"]["tok_per_s"]["median"] == pytest.approx(0.97)
    assert medians["8"]["ours"]["failures"] == 0
    verdicts = {target["target"]: target["result"] for target in targets.gateway(medians, rounds.failures(found))}
    assert verdicts["output tok/s against bare, 8 streams"] == "pass"
    assert verdicts["failures of our endpoint"] == "pass"
    assert "output tok/s against vllm-router, 8 streams" not in verdicts
    medians["8"]["vllm-router"] = medians["8"]["bare"]
    verdicts = {target["target"]: target["result"] for target in targets.gateway(medians, {})}
    assert verdicts["output tok/s against vllm-router, 8 streams"] == "not measured"
    assert verdicts["failures of our endpoint"] == "not measured"
    assert [t["result"] for t in targets.fake({"cpu_us_per_chunk": 81.0, "added_delay_p99_ms": 1.0})][:3] == [
        "miss",
        "pass",
        "not measured",
    ]


def test_the_report_shows_a_document_and_plots_it(tmp_path: Path) -> None:
    found = [_round(arm, number, 100.0) for number in range(3) for arm in ("bare", "ours")]
    medians = {"8": rounds.medians(found, ["bare", "ours"])}
    document = {
        "suite": "gateway",
        "date": "2026-01-01T00:00:00+00:00",
        "commit": None,
        "hardware": {"cpu": "c", "cores": 2, "memory_mib": 1, "gpus": []},
        "arguments": {"pairs": 2},
        "medians": medians,
        "targets": targets.gateway(medians, {"ours": 0}),
    }
    text = report.markdown(document)
    assert "| ours | 1.000 (1.00 to 1.00) | 100 |" in text and "| pass |" in text
    file = tmp_path / "r.json"
    file.write_text(json.dumps(document))
    assert report.write(file, tmp_path / "p.png") == 0
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    file.write_text("{}")
    with pytest.raises(ConfigError, match="not a result file"):
        report.write(file)


def test_vllms_own_result_file_is_mapped() -> None:
    saved = {"duration": 2.0, "completed": 3, "total_output_tokens": 12, "total_input_tokens": 9, "output_throughput": 6.0}
    saved |= {"request_throughput": 1.5, "median_ttft_ms": 1.0, "p99_ttft_ms": 2.0, "median_itl_ms": 3.0, "p99_itl_ms": 4.0}
    result = mapped(saved, LoadPlan("http://x/v1", "", "m", 2, 4, max_tokens=4))
    assert result["failures"] == 1 and result["failure_reasons"] == {} and result["tok_per_s"] == 6.0


def test_request_and_chunk_costs_are_told_apart() -> None:
    def fake_round(arm: str, requests: int, chunks: int, delay: float) -> dict[str, Any]:
        cost = {"front ours": requests * 1000e-6 + chunks * 50e-6, "machine": 99.0}
        result = {"arm": arm, "round": 1, "counted": True, "requests": requests, "chunks": chunks, "failures": 0, "cpu_s": cost}
        result |= {"delay_ms_p99": delay}
        return result | {"cpu_us_per_chunk": fake_suite.cpu_us_per_chunk(result)}

    found = [fake_round("ours", 400, 25600, 3.0), fake_round("direct", 400, 25600, 1.0)]
    split = fake_suite.split(found, fake_round("ours", 1000, 2000, 0.0), "ours")
    assert split["cpu_us_per_request_only"] == pytest.approx(1000) and split["cpu_us_per_chunk_only"] == pytest.approx(50)
    figures = fake_suite.figures(found, "ours")
    assert figures["added_delay_p99_ms"]["median"] == 2.0 and figures["added_ttft_p99_ms"] is None
    assert figures["cpu_us_per_chunk"]["median"] == pytest.approx(50 + 1000 * 400 / 25600)

"""Every shipped configuration loads, says how to run it, and mistakes are named with their path."""

import subprocess
import sys
from pathlib import Path

import pytest

from cluster import check
from cluster.config import load, parse
from cluster.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
NAMES = [
    "assistant.yaml", "dpo-assistant.yaml", "llama-70b-tp8.yaml", "llama-70b-zero3.yaml", "local-cpu.yaml", "lora-assistant.yaml",
    "multi-model-lora.yaml", "qwen3-1gpu.yaml", "qwen3-sft-1gpu.yaml", "tune-assistant.yaml",
]  # fmt: skip


def test_the_named_configurations_are_shipped():
    assert set(NAMES) <= {path.name for path in CONFIGS}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_loads_and_its_first_line_is_its_command(path):
    config = load(path)
    command = "cluster up" if config.models else "train tune" if config.tune else f"train {config.train.objective}"
    assert f"python -m {command} configs/{path.name}" in path.read_text().splitlines()[0]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_engine_arguments_are_vllms(path):
    assert check.unknown_arguments(load(path), engine_arguments()) == []


def engine_arguments(cache: list[set[str]] = []) -> set[str]:  # noqa: B006 - vLLM takes seconds to import, once is enough
    if not cache:
        cache.append(check.engine_arguments())
    return cache[0]


def test_what_each_scenario_is_for():
    by_name = {path.name: load(path) for path in CONFIGS}
    llama = by_name["llama-70b-tp8.yaml"].models[0]
    assert (check.gpus_per_replica(llama), llama.routing) == (8, "prefix_affinity")
    assert (llama.autoscaling.min_replicas, llama.autoscaling.max_replicas) == (1, 4)
    multi = by_name["multi-model-lora.yaml"]
    assert any(model.adapters for model in multi.models)
    assert any(model.autoscaling.min_replicas == 0 for model in multi.models)
    assert all(model.device == "cpu" for model in by_name["local-cpu.yaml"].models)
    trained = {name: config.train for name, config in by_name.items() if config.train}
    assert trained["lora-assistant.yaml"].lora and trained["lora-assistant.yaml"].base == "embedded:chat"
    assert trained["dpo-assistant.yaml"].objective == "dpo"
    eight = trained["llama-70b-zero3.yaml"]
    assert (eight.zero.stage, eight.scale.bounds, eight.scale.device) == (3, (8, 8), "gpu")


def test_unknown_keys_are_refused_with_their_path():
    with pytest.raises(ConfigError) as caught:
        parse({"models": [{"id": "m", "autoscaling": {"min_replica": 1}}], "nodes": {}}, "file.yaml")
    assert "file.yaml: models.0.autoscaling.min_replica: unknown key" in str(caught.value)
    assert "file.yaml: nodes: unknown key" in str(caught.value)


def test_a_model_with_a_mistake_is_still_a_model():
    with pytest.raises(ConfigError) as caught:
        parse({"models": [{"id": "m", "typo": 1}]})
    assert str(caught.value) == "config: models.0.typo: unknown key"
    with pytest.raises(ConfigError, match="write at least one of 'models'"):
        parse({"models": []})


def test_set_overrides_values_and_makes_sections():
    path = ROOT / "configs" / "local-cpu.yaml"
    config = load(path, ["node.port=18000", "models.0.id=other", "models.0.engine_kwargs.max_num_seqs=4", "run_dir=/tmp/x"])
    assert (config.node.port, config.models[0].id, config.models[0].slots, config.run_dir) == (18000, "other", 4, "/tmp/x")


@pytest.mark.parametrize(
    ("override", "text"),
    [
        ("node.port", "write it as a.b=value"),
        ("models.9.id=x", "'9' is not one of the 2 entries"),
        ("models.0.id.x=1", "models.0.id is a value, not a section"),
        ("node.port=[", "is not YAML"),
        ("node.port=70000", "node.port"),
        ("node.prot=1", "node.prot: unknown key"),
        ("models.0.engine_kwargs.model=x", "is set by model_source"),
        ("models.1.id=tidepool-chat", "is used by"),
        ("models.0.autoscaling.min_replicas=2", "is larger than max_replicas"),
    ],
)
def test_wrong_overrides_say_what_is_wrong(override, text):
    with pytest.raises(ConfigError, match=None) as caught:
        load(ROOT / "configs" / "local-cpu.yaml", [override])
    assert text in str(caught.value)


def test_reading_a_configuration_imports_nothing_heavy():
    code = "import sys, cluster.config; print([m for m in ('torch', 'ray', 'vllm', 'sqlalchemy') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_a_mistake_is_one_line_and_exit_2(tmp_path):
    broken = tmp_path / "broken.yaml"
    broken.write_text("models: [{id: m, prise: {}}]")
    done = subprocess.run(
        [sys.executable, "-m", "cluster", "check", str(broken)], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert done.returncode == 2
    assert done.stderr.splitlines()[0] == f"error: {broken}: models.0.prise: unknown key"


def test_check_names_what_is_missing():
    text = {
        "models": [
            {"id": "a", "model_source": "/nowhere", "adapters": {"x": "/nowhere/too"}, "engine_kwargs": {"max_num_seq": 4}},
            {"id": "b", "model_source": "embedded:chta", "device": "cpu"},
        ]
    }
    config = parse(text)
    lines = [line for model in config.models for line in check.model_errors(model)]
    assert any("a: model_source: /nowhere" in line for line in lines)
    assert any("a: adapters.x: /nowhere/too" in line for line in lines)
    assert any("b: model_source: 'embedded:chta' is not built in" in line for line in lines)
    unknown = check.unknown_arguments(config, {"max_num_seqs", "dtype"})
    assert unknown == ["models: a: engine_kwargs.max_num_seq: vLLM has no such argument; did you mean max_num_seqs?"]
    assert check.machine_warnings(config, 0) == ["models: a: a replica takes 1 GPU(s), this machine has 0"]

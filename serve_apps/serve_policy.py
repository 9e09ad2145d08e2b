"""The replica policy inside Ray Serve's controller: from Serve's context to `autoscale.decide` and back.

Serve makes one `ReplicaPolicy` per model (`autoscaling_config.policy` of the engine's deployment, see `scaling_config`) and
asks it in every round of its control loop, so nothing here waits, and a figure that makes no sense changes nothing. Serve would
apply its own delays to what a policy says; ours are given to the policy instead, and Serve's are 0. What Serve decides without
asking: a model with no running replica for which requests are held gets one at once. The delays begin anew when the controller
restarts.

Runs in the controller, so it imports neither vLLM nor torch.
"""

from __future__ import annotations

import logging
import time
from typing import Any

from cluster.config import ModelConfig
from serve_apps.autoscale import Limits, Observation, ReplicaLoad, State, decide

log = logging.getLogger("ray.serve")
LOOK_BACK_S = 6.0
REPORT_S = 2.0
# Figures older than this are none; clocks of two hosts may differ a little.
STALE_S = 30.0
FIGURES = ("running", "waiting", "queued", "kv_use", "ttft_s", "service_s")
STATE, TOLD = "tidepool_state", "tidepool_told"
# Whatever a wrong figure may do to arithmetic; it must not end the round of Serve's control loop, which is for all models.
WRONG = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)


def scaling_config(model: ModelConfig) -> dict[str, Any]:
    """Serve's `autoscaling_config` of a model's engine."""
    scale = model.autoscaling
    return {
        "min_replicas": scale.min_replicas,
        "max_replicas": scale.max_replicas,
        "target_ongoing_requests": model.target_ongoing_requests,
        "upscale_delay_s": 0.0,
        "downscale_delay_s": 0.0,
        "downscale_to_zero_delay_s": 0.0,
        # How often replicas report, and over how long Serve keeps what they said.
        "metrics_interval_s": REPORT_S,
        "look_back_period_s": LOOK_BACK_S,
        "policy": {
            "policy_function": "serve_apps.serve_policy:ReplicaPolicy",
            "policy_kwargs": {
                "target_ongoing_requests": model.target_ongoing_requests,
                "upscale_delay_s": scale.upscale_delay_s,
                "downscale_delay_s": scale.downscale_delay_s,
                "downscale_to_zero_delay_s": scale.downscale_to_zero_delay_s,
                "max_kv_use": scale.max_kv_use,
                "target_ttft_s": scale.target_ttft_s,
            },
        },
    }


class ReplicaPolicy:
    """What Serve calls. The arguments are those of `autoscale.Limits` that Serve does not know by itself."""

    def __init__(self, **limits: Any) -> None:
        self._limits = limits

    def __call__(self, ctx: Any) -> tuple[int, dict[str, Any]]:
        """Serve's AutoscalingContext to the wanted replicas and the state that Serve hands back the next time."""
        before = ctx.policy_state
        try:
            limits = Limits(ctx.capacity_adjusted_min_replicas, ctx.capacity_adjusted_max_replicas, **self._limits)
            seen = observe(ctx)
            decision = decide(seen, limits, before.get(STATE) or State(), time.monotonic())
        except WRONG as error:
            if before.get(TOLD) != repr(error):
                log.warning("autoscaling of %s: stays as it is, %r", ctx.deployment_name, error)
            return ctx.target_num_replicas, {STATE: before.get(STATE), TOLD: repr(error)}
        silent = seen.replicas.count(None)
        if decision.replicas != seen.target:
            log.info("autoscaling of %s: %d to %d, %s", ctx.deployment_name, seen.target, decision.replicas, decision.why)
        if seen.replicas and before.get(TOLD) != (len(seen.replicas), silent):
            count = len(seen.replicas)
            log.info("autoscaling of %s: %d of %d replicas report", ctx.deployment_name, count - silent, count)
        return decision.replicas, {STATE: decision.state, TOLD: (len(seen.replicas), silent)}


def observe(ctx: Any) -> Observation:
    """What Serve's context says. Each figure of a replica is its mean over the last seconds that it reported."""
    raw = ctx.raw_metrics or {}
    replicas = tuple(_load(raw, replica, ctx.current_time) for replica in ctx.running_replicas)
    # Held requests wait in Serve's handles only while nothing runs; what handles say later is the memory of that.
    held = 0.0 if replicas else float(ctx.total_queued_requests or 0.0)
    return Observation(ctx.target_num_replicas, replicas, held)


def _load(raw: dict[str, Any], replica: Any, now: float) -> ReplicaLoad | None:
    series = {figure: raw.get(figure, {}).get(replica) for figure in FIGURES}
    if not series["running"] or now - series["running"][-1].timestamp > STALE_S:
        return None
    means = {figure: sum(point.value for point in points) / len(points) for figure, points in series.items() if points}
    return ReplicaLoad(**means)

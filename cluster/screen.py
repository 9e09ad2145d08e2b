"""One screen of text about a cluster: an `observe.Observation` in, lines out. Pure; the clock is in what it is given.

Every line fits the width that is given. "?" stands where nobody answered, "-" where there is nothing to say. `status` prints
them.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from cluster.observe import Application, Gpus, Job, Model, Node, Observation

NARROWEST = 40
BAR = 32  # GPUs that get a letter each


def lines(seen: Observation, width: int = 100) -> list[str]:
    """The screen. The first lines are the same whatever runs: `run directory`, `processes`, then `ready` and `endpoint`."""
    width = max(width, NARROWEST)
    clock = time.strftime("%H:%M:%S", time.localtime(seen.at))
    shown = [f"run directory  {seen.run_dir}", f"processes      {seen.processes}   at {clock}"]
    if seen.processes:
        shown.append(f"ready          {'yes' if seen.ready else 'no'}  {'' if seen.ready else seen.readiness}".rstrip())
        if seen.endpoint:
            shown.append(f"endpoint       {seen.endpoint}  (keys: {seen.keys})")
        shown += [f"cost           {_cost(seen)}", "", *_nodes(seen, width), "", _gpus(seen.gpus), ""]
        shown += [*_models(seen.gateway, seen.models, width), "", *_jobs(seen.jobs, width)]
    return [_cut(line, width) for line in shown]


def table(head: Sequence[str], rows: Sequence[Sequence[str]], width: int) -> list[str]:
    """Columns two spaces apart, the first one cut when all do not fit; a heading that begins with ">" stands right."""
    right = [name.startswith(">") for name in head]
    cells = [[name.removeprefix(">") for name in head], *(list(row) for row in rows)]
    widths = [max(len(row[spot]) for row in cells) for spot in range(len(head))]
    widths[0] = max(8, min(widths[0], width - sum(widths[1:]) - 2 * (len(head) - 1)))
    shown = []
    for row in cells:
        parts = [_cut(row[0], widths[0]).ljust(widths[0])]
        parts += [
            cell.rjust(size) if is_right else cell.ljust(size)
            for cell, size, is_right in zip(row[1:], widths[1:], right[1:], strict=True)
        ]
        shown.append("  ".join(parts).rstrip())
    return shown


def lasting(seconds: float | None) -> str:
    """A length of time in at most two units."""
    if seconds is None:
        return "?"
    whole = int(max(0, seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60:02} min"
    return f"{whole // 86400} d {whole % 86400 // 3600} h"


def _cost(seen: Observation) -> str:
    if seen.usd_per_hour is None:
        return "-"
    without = f"  (without {', '.join(seen.unpriced)}: no price known)" if seen.unpriced else ""
    return f"${seen.usd_per_hour:,.2f} per hour{without}"


def _nodes(seen: Observation, width: int) -> list[str]:
    if seen.nodes is None:
        return ["NODES  ?"]
    rows = [_node(node) for node in seen.nodes]
    rows += [(f"({count} on the way)", kind, "starting", "-", "-", "-", "-") for kind, count in seen.starting]
    if seen.gone:
        rows.append((f"({seen.gone} gone)", "-", "gone", "-", "-", "-", "-"))
    return table(("NODE", "TYPE", "STATE", ">CPUS", ">GPUS", ">UP", ">$/H"), rows, width)


def _node(node: Node) -> tuple[str, ...]:
    price = "-" if node.usd_per_hour is None else f"{node.usd_per_hour:.2f}"
    kind = node.kind or ("head" if node.head else "-")
    return (
        node.name,
        kind,
        "head" if node.head else "worker",
        _number(node.cpus),
        _number(node.gpus),
        lasting(node.uptime_s),
        price,
    )


def _gpus(held: Gpus | None) -> str:
    if held is None:
        return "GPUS  ?"
    if not held.total:
        return "GPUS  none"
    parts = [
        ("serving", held.serving, "s"),
        ("training", held.training, "t"),
        ("other", held.other, "o"),
        ("idle", held.idle, "."),
    ]
    said = ", ".join(f"{_number(count)} {name}" for name, count, _ in parts if count or name != "other")
    whole = all(count == int(count) for _, count, _ in parts) and held.total <= BAR
    bar = "".join(letter * int(count) for _, count, letter in parts)
    return f"GPUS  {_number(held.total)}: {said}" + (f"  [{bar}]" if whole else "")


def _models(gateway: Application, models: Sequence[Model], width: int) -> list[str]:
    rows = []
    for model in models:
        speed = _rounded(model.tokens_per_s) if model.generates else "-"
        figures = (_count(model.running), _count(model.queued), speed, _percent(model))
        rows.append((*_application(model.application), *figures))
    rows.append((*_application(gateway), "-", "-", "-", "-"))
    head = ("MODEL", "STATE", ">REPLICAS", ">RUNNING", ">QUEUED", ">TOKENS/S", ">KV")
    reasons = [f"  {app.name}: {app.why}" for app in (gateway, *(model.application for model in models)) if app.why]
    return [*table(head, rows, width), *reasons]


def _application(app: Application) -> tuple[str, str, str]:
    return app.name, app.state or "?", f"{_count(app.replicas)}/{_count(app.wanted)}"


def _jobs(jobs: Sequence[Job] | None, width: int) -> list[str]:
    if jobs is None:
        return ["JOBS  ?"]
    if not jobs:
        return ["JOBS  none"]
    rows = [
        (
            job.name, job.kind, job.state, "-" if job.age_s is None else lasting(job.age_s),
            "-" if job.step is None else str(job.step), "-" if job.tokens_per_s is None else _rounded(job.tokens_per_s),
        )
        for job in jobs
    ]  # fmt: skip
    return table(("JOB", "KIND", "STATE", ">AGE", ">STEP", ">TOKENS/S"), rows, width)


def _percent(model: Model) -> str:
    if model.kv_use is None:
        return "-" if model.application.replicas == 0 or not model.generates else "?"
    return f"{100 * model.kv_use:.0f}%"


def _rounded(value: float | None) -> str:
    return "?" if value is None else f"{value:,.0f}"


def _number(value: float) -> str:
    return f"{value:g}"


def _count(value: int | None) -> str:
    return "?" if value is None else str(value)


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"

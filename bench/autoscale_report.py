"""The record of an autoscaling run as Markdown and as a plot: load, replicas and hosts over time. Called by `report`.

`make test-cluster` writes the document when TIDEPOOL_TIMELINE names a file. Samples are taken twice a second (`t` in seconds);
a value that could not be had is null, and a gap in the plot. Shows what the document holds.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

PLOT = Path("docs") / "autoscaling.png"
PANELS = (
    ("requests", (("offered", "clients"), ("running", "running"), ("queued", "queued"))),
    ("replicas", (("replicas", "engine replicas"),)),
    ("hosts", (("hosts", "worker hosts"),)),
)


def markdown(document: dict[str, Any]) -> str:
    """The whole report: where it ran, the steps with their seconds, the phases with what was answered and what failed."""
    hardware, samples = document["machine"], document["samples"]
    lines = [
        f"## autoscale · {document['started']}",
        "",
        f"commit `{(document['commit'] or 'none')[:20]}` · {_place(document)}, {hardware['memory_mib']} MiB",
        f"{len(samples)} samples in {samples[-1]['t'] if samples else 0:.0f} s; at most {_most(samples, 'offered')} clients, "
        f"{_most(samples, 'replicas')} replicas, {_most(samples, 'hosts')} worker hosts",
        "",
        "| step | seconds |",
        "| --- | --- |",
        *(f"| {step['name']} | {step['seconds']:.1f} |" for step in document["steps"]),
        "",
        "| phase | answered | failed | longest answer s |",
        "| --- | --- | --- | --- |",
    ]
    for phase in document["requests"]:
        longest = phase.get("longest_s")
        shown = "-" if longest is None else f"{longest:.1f}"
        lines.append(f"| {phase['phase']} | {phase['answered']} | {phase['failed']} | {shown} |")
    answered, failed = (sum(phase[key] for phase in document["requests"]) for key in ("answered", "failed"))
    return "\n".join([*lines, f"| all | {answered} | {failed} | |"]) + "\n"


def _place(document: dict[str, Any]) -> str:
    hardware = document["machine"]
    name = f"{document['name']}, " if document.get("name") else ""
    return f"{name}{hardware['cpu']}, {hardware['cores']} cores"


def _most(samples: list[dict[str, Any]], key: str) -> int:
    return max((sample[key] for sample in samples if sample[key] is not None), default=0)


def plot(document: dict[str, Any], path: Path) -> None:
    """Three panels over the same seconds; a vertical line where a phase begins, its name above."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import MaxNLocator

    samples, marks = document["samples"], document["marks"]
    seconds = [sample["t"] for sample in samples]
    figure, axes = pyplot.subplots(3, 1, figsize=(11, 6.5), sharex=True, constrained_layout=True, height_ratios=(2, 1, 1))
    for axis, (title, curves) in zip(axes, PANELS, strict=True):
        for key, label in curves:
            values = [float("nan") if sample[key] is None else sample[key] for sample in samples]
            axis.step(seconds, values, where="post", label=label, linewidth=1.4)
        for mark in marks:
            axis.axvline(mark["t"], color="grey", linewidth=0.7, linestyle=":")
        axis.set_ylabel(title)
        axis.set_ylim(bottom=0, top=max(1, *(_most(samples, key) for key, _ in curves)) * 1.15)
        axis.yaxis.set_major_locator(MaxNLocator(integer=True))
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1.0, 0.5))
    axes[-1].set_xlabel("seconds")
    # After a phase that was over at once the next one's name stands to the right of its line.
    apart, free = 0.025 * max([1.0, *seconds]), 0.0
    for mark in marks:
        spot = max(mark["t"], free)
        free = spot + apart
        place = {"xy": (spot, 1.0), "xycoords": ("data", "axes fraction"), "xytext": (1, 2), "textcoords": "offset points"}
        axes[0].annotate(mark["text"], **place, fontsize=8, rotation=30, ha="left", va="bottom")
    # The marks' names stand between the panel and this line.
    figure.suptitle(f"{_place(document)} · {document['started'][:10]} · {(document['commit'] or '')[:10]}", fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)

"""A result file as a Markdown table and a PNG plot. Only shows what the document holds, computes nothing new.

`python -m bench report FILE` prints the table and writes the plot; matplotlib is imported for the plot only. The training
suite's documents have other figures: `train_report` shows those, and `autoscale_report` the record of an autoscaling run.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bench import autoscale_report, train_report
from cluster.errors import ConfigError

_COLUMNS = (
    ("tok_per_s", "tok/s", 0), ("req_per_s", "req/s", 1), ("ttft_ms_p50", "TTFT p50 ms", 0), ("ttft_ms_p99", "TTFT p99 ms", 0),
    ("gap_ms_p50", "gap p50 ms", 1), ("gap_ms_p99", "gap p99 ms", 1),
)  # fmt: skip


def markdown(document: dict[str, Any]) -> str:
    """The whole report: where it was measured, a table per stream count, the targets."""
    if document.get("kind") == "autoscale":
        return autoscale_report.markdown(document)
    if document["suite"] == "train":
        return train_report.markdown(document)
    hardware, arguments = document["hardware"], document["arguments"]
    lines = [
        f"## {document['suite']} · {document['date']}",
        "",
        f"commit `{(document['commit'] or 'none')[:20]}` · {hardware['cpu']}, {hardware['cores']} cores, "
        f"{hardware['memory_mib']} MiB" + "".join(f" · {gpu}" for gpu in hardware["gpus"]),
        f"{arguments['pairs']} pairs, medians; ratios are medians of the pairs' ratios (min to max)",
        "",
    ]
    for streams, arms in document["medians"].items():
        lines += _table(streams, arms)
    for name, figures in document.get("figures", {}).items():
        lines += [f"**{name} before the fake engine**", "", "| figure | median |", "| --- | --- |"]
        lines += [f"| {figure} | {_number(value, 2)} |" for figure, value in figures.items()] + [""]
    for name, held in document.get("held", {}).items():
        resident = ", ".join(f"{group} {mib:.0f} MiB" for group, mib in held["rss_mib"].items())
        lines.append(f"held {held['requests']} slow streams, {name}: {held['failures']} failures, {resident}")
    if document["targets"]:
        lines += ["", "| target | limit | measured | |", "| --- | --- | --- | --- |"]
        lines += [f"| {t['target']} | {t['limit']} | {_number(t['value'], 3)} | {t['result']} |" for t in document["targets"]]
    return "\n".join(lines) + "\n"


def _table(streams: str, arms: dict[str, Any]) -> list[str]:
    head = ["arm", "tok/s ratio", *(title for _, title, _ in _COLUMNS), "failures", "CPU seconds"]
    lines = [f"**{streams} streams**", "", "| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for name, entry in arms.items():
        ratios = entry["ratios"].get("bare") or entry["ratios"].get("direct") or {}
        ratio = ratios.get("tok_per_s")
        shown = (
            f"{ratio['median']:.3f} ({ratio['min']:.2f} to {ratio['max']:.2f})"
            if ratio
            else "1"
            if name in ("bare", "direct")
            else "-"
        )
        cpu = ", ".join(f"{group} {_number(value, 2)}" for group, value in _largest(entry["cpu_s"]))
        cells = [name, shown, *(_number(entry.get(key), digits) for key, _, digits in _COLUMNS), str(entry["failures"]), cpu]
        lines.append("| " + " | ".join(cells) + " |")
    return [*lines, ""]


def _largest(groups: dict[str, Any]) -> list[tuple[str, Any]]:
    """CPU groups, the largest first, the machine's total last."""
    return sorted(groups.items(), key=lambda item: (item[0] == "machine", -item[1]["median"]))


def _number(value: Any, digits: int) -> str:
    if isinstance(value, dict):
        value = value.get("median")
    return "-" if value is None else f"{value:,.{digits}f}"


def plot(document: dict[str, Any], path: Path) -> None:
    """Three panels over the stream counts: tok/s against bare, TTFT p50, inter-token p99; whiskers from min to max."""
    if document.get("kind") == "autoscale":
        autoscale_report.plot(document, path)
        return
    if document["suite"] == "train":
        train_report.plot(document, path)
        return
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    medians = document["medians"]
    counts = list(medians)
    names = list(next(iter(medians.values())))
    panels = (
        ("tok_per_s", "output tok/s against bare", True),
        ("ttft_ms_p50", "TTFT p50, ms", False),
        ("gap_ms_p99", "inter-token p99, ms", False),
    )
    figure, axes = pyplot.subplots(1, 3, figsize=(13, 4), constrained_layout=True)
    for axis, (metric, title, relative) in zip(axes, panels, strict=True):
        width = 0.8 / len(names)
        for index, name in enumerate(names):
            values = [_cell(medians[count][name], metric, relative) for count in counts]
            spots = [spot + (index - (len(names) - 1) / 2) * width for spot in range(len(counts))]
            middle = [value["median"] for value in values]
            low = [value["median"] - value["min"] for value in values]
            high = [value["max"] - value["median"] for value in values]
            axis.bar(spots, middle, width * 0.92, yerr=(low, high), label=name, capsize=2, error_kw={"linewidth": 0.8})
        axis.set_xticks(range(len(counts)), counts)
        axis.set_xlabel("concurrent streams")
        axis.set_title(title, fontsize=11)
        axis.spines[["top", "right"]].set_visible(False)
        if relative:
            axis.axhline(1.0, color="black", linewidth=0.6)
    axes[0].legend(frameon=False, fontsize=9)
    hardware = document["hardware"]
    figure.suptitle(
        f"{hardware['cpu']}, {hardware['cores']} cores · {document['date'][:10]} · {(document['commit'] or '')[:10]}", fontsize=9
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _cell(entry: dict[str, Any], metric: str, relative: bool) -> dict[str, float]:
    """Median, min and max of a bar; an arm against itself is 1, what was not measured 0."""
    if relative:
        ratios = entry["ratios"].get("bare") or entry["ratios"].get("direct") or {}
        return ratios.get(metric) or {"median": 1.0, "min": 1.0, "max": 1.0}
    return entry.get(metric) or {"median": 0.0, "min": 0.0, "max": 0.0}


def write(file: Path, plot_path: Path | None = None) -> int:
    """Print the table of a result file and write its plot.

    Raises:
        ConfigError: not a result file.
    """
    try:
        document = json.loads(file.read_text())
        text = markdown(document)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"{file}: not a result file of the bench: {error!r}") from error
    print(text)
    if str(plot_path) != "-":
        plot(
            document,
            plot_path or (Path("docs") / f"bench-{document['suite']}.png" if "suite" in document else autoscale_report.PLOT),
        )
    return 0

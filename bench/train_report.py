"""A result file of `python -m bench train` as Markdown and as a plot. Shows what the document holds; called by `report`."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def markdown(document: dict[str, Any]) -> str:
    """The whole report: where and how it was measured, speed and memory, the time to the first step by cause, targets."""
    hardware, arguments, work = document["hardware"], document["arguments"], document["work"]
    model, flops, scaling = document["model"], document["flops"], document["scaling"]
    most = scaling["to"]
    lines = [
        f"## train · {document['date']}",
        "",
        f"commit `{(document['commit'] or 'none')[:20]}` · {hardware['cpu']}, {hardware['cores']} cores, "
        f"{hardware['memory_mib']} MiB" + "".join(f" · {gpu}" for gpu in hardware["gpus"]),
        f"{work['base']} ({model['parameters'] / 1e6:.1f} M parameters), {work['precision']}, ZeRO {work['zero_stage']}, "
        f"{work['batch_size']} sequences of {work['max_length']} per step, {arguments['threads_per_worker']} threads per worker "
        f"({arguments['threads_per_worker'] * most} in the plain loop)",
        f"{arguments['pairs']} rounds, {arguments['steps']} steps each, the first {arguments['warmup']} not counted; medians; "
        "ratios are medians of the rounds' ratios (min to max)",
        "",
        f"| arm | tokens/s | against deepspeed-{most} | step p50 ms | step p90 ms | memory MiB | largest process MiB "
        "| first step s |",
        "|" + " --- |" * 8,
    ]
    for arm, entry in document["medians"].items():
        cells = [arm, number(entry["tokens_per_s"], 0), ratio(entry, f"deepspeed-{most}"), number(entry["step_ms_p50"], 1)]
        cells += [number(entry["step_ms_p90"], 1), number(entry["memory_mib"], 0), number(entry["largest_process_mib"], 0)]
        lines.append("| " + " | ".join([*cells, number(entry["first_step_s"], 1)]) + " |")
    startup = "Seconds from the command to the end of the first step, by cause:"
    busy = "Cores in use while training, by process:"
    lines += ["", *_by_name(document["medians"], "startup", startup, "causes", 1), ""]
    lines += [*_by_name(document["medians"], "busy_cores", busy, "cores", 2), ""]
    lines.append(
        f"{flops['formula']}: {flops['per_token'] / 1e6:.1f} MFLOP per token (N = {model['multiplied'] / 1e6:.1f} M, "
        f"{model['layers']} layers, width {model['attention_width']}, length {flops['sequence_length']})"
    )
    for arm, entry in document["medians"].items():
        if entry["mfu"]:
            lines.append(f"MFU of {arm}: {entry['mfu']['median']:.3f} of {flops['peak_tflops']:g} TFLOP/s")
    efficiency = scaling["efficiency"]
    if efficiency:
        spread = f"{efficiency['min']:.2f} to {efficiency['max']:.2f}"
        lines.append(f"scaling of ours from {scaling['from']} to {most} workers: {efficiency['median']:.3f} ({spread})")
    lines.append("all arms began with the same loss" if document["same_first_loss"] else "the first losses of the arms differ")
    lines += ["", "| target | limit | measured | |", "| --- | --- | --- | --- |"]
    for target in document["targets"]:
        value = "-" if target["value"] is None else f"{target['value']:.3f}"
        lines.append(f"| {target['target']} | {target['limit']} | {value} | {target['result']} |")
    return "\n".join(lines) + "\n"


def _by_name(medians: dict[str, Any], key: str, title: str, column: str, digits: int) -> list[str]:
    """A line per arm: its figures with their names, without those that would be shown as 0."""
    lines = [title, "", f"| arm | {column} |", "| --- | --- |"]
    for arm, entry in medians.items():
        shown = ", ".join(f"{name} {value:.{digits}f}" for name, value in entry[key].items() if round(value, digits) > 0)
        lines.append(f"| {arm} | {shown or '-'} |")
    return lines


def number(value: dict[str, float] | None, digits: int) -> str:
    """The median, or a dash."""
    return "-" if value is None else f"{value['median']:,.{digits}f}"


def ratio(entry: dict[str, Any], other: str) -> str:
    """Of tokens per second to another arm's, with its spread; 1 for the arm itself."""
    if other not in entry["ratios"]:
        return "1"
    found = entry["ratios"][other].get("tokens_per_s")
    return f"{found['median']:.3f} ({found['min']:.2f} to {found['max']:.2f})" if found else "-"


def plot(document: dict[str, Any], path: Path) -> None:
    """Three panels with a bar per arm: tokens/s, memory, and the time to the first step stacked by cause."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    medians = document["medians"]
    arms = list(medians)
    spots = range(len(arms))
    figure, axes = pyplot.subplots(1, 3, figsize=(13, 4), constrained_layout=True)
    for axis, (metric, title) in zip(axes, (("tokens_per_s", "tokens/s"), ("memory_mib", "peak memory, MiB")), strict=False):
        values = [medians[arm][metric] or {"median": 0.0, "min": 0.0, "max": 0.0} for arm in arms]
        middle = [value["median"] for value in values]
        whiskers = ([v["median"] - v["min"] for v in values], [v["max"] - v["median"] for v in values])
        axis.bar(spots, middle, 0.7, yerr=whiskers, capsize=3, error_kw={"linewidth": 0.8})
        axis.set_title(title, fontsize=11)
    causes = list(dict.fromkeys(cause for arm in arms for cause in medians[arm]["startup"]))
    below = [0.0] * len(arms)
    for at, cause in enumerate(causes):
        heights = [max(0.0, float(medians[arm]["startup"].get(cause, 0.0))) for arm in arms]
        axes[2].bar(spots, heights, 0.7, bottom=below, label=cause, color=mpl.colormaps["tab20"](at % 20))
        below = [low + value for low, value in zip(below, heights, strict=True)]
    axes[2].set_title("seconds to the end of the first step", fontsize=11)
    axes[2].legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    for axis in axes:
        axis.set_xticks(spots, arms, fontsize=9)
        axis.spines[["top", "right"]].set_visible(False)
    hardware = document["hardware"]
    named = hardware["gpus"][0] if hardware["gpus"] else f"{hardware['cpu']}, {hardware['cores']} cores"
    figure.suptitle(f"{named} · {document['date'][:10]} · {(document['commit'] or '')[:10]}", fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)

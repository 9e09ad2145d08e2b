"""The report of a search: what was tried, what it found, what it cost, and the configuration to train with.

Written below `<output>/<name>-search/`: `report.md` (table, cost against gain), `curves.png` (validation loss over steps),
`coordinates.png` (parallel coordinates of values and loss), `trials.jsonl` and `best.yaml`, a whole configuration that
`python -m train sft best.yaml` runs as is. Reads the ledger only, so it can be made again at any time. Called by `train.tune`.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import yaml

from cluster.train_config import SearchRange, TrainConfig, TuneConfig
from train import cost, search_space
from train.cost import Point
from train.trials import Ledger, Trial

if TYPE_CHECKING:
    from matplotlib.axes import Axes

REPORT, CURVES, COORDINATES, LINES, BEST = "report.md", "curves.png", "coordinates.png", "trials.jsonl", "best.yaml"


def best(trials: Sequence[Trial]) -> Trial | None:
    """The trial with the lowest validation loss; of equal ones the first."""
    return min(
        (trial for trial in trials if _loss(trial) < math.inf), key=lambda trial: (_loss(trial), trial.number), default=None
    )


def spent(trial: Trial, train: TrainConfig) -> float:
    """What a trial cost: dollars where there are prices, else CPU-hours, or GPU-hours, of its workers (see `unit`)."""
    cpu, gpu = cost.held(train.scale, train.scale.bounds[0], trial.seconds)
    if priced(train):
        return cost.cost(cost.Usage(cpu_seconds=cpu, gpu_seconds=gpu), train.price).total
    return (gpu or cpu) / cost.HOUR


def priced(train: TrainConfig) -> bool:
    """Whether compute has a price in the configuration."""
    return bool(train.price.gpu_hour if train.scale.device == "gpu" else train.price.cpu_hour)


def money(amount: float, train: TrainConfig) -> str:
    """An amount of `spent` with its unit."""
    return f"${amount:.6f}" if priced(train) else f"{amount:.4f} {train.scale.device.upper()}-hours"


def points(trials: Sequence[Trial], train: TrainConfig) -> list[Point]:
    """Cumulated cost and best loss so far, after each ended trial; failed ones cost and gain nothing."""
    made: list[Point] = []
    total, lowest = 0.0, math.inf
    for trial in trials:
        total += spent(trial, train)
        lowest = min(lowest, _loss(trial))
        if lowest < math.inf:
            made.append(Point(trial.number, total, lowest))
    return made


def progress(trials: Sequence[Trial], train: TrainConfig) -> str:
    """The line that is printed when the last of `trials` has ended: how it went, cost so far against the best loss so far."""
    trial, so_far = trials[-1], points(trials, train)
    gained = so_far[-2].best - so_far[-1].best if len(so_far) > 1 else 0.0
    paid = money(sum(spent(one, train) for one in trials), train)
    result = f"validation loss {_loss(trial):.4f}" if trial.best else trial.error or "no validation loss"
    lowest = f"{so_far[-1].best:.4f}" if so_far else "none"
    gain = f", {gained:.4f} gained" if gained > 0 else ""
    return f"trial {trial.number} {trial.state} at step {trial.step}: {search_space.short(trial.values)}: {result}; " + (
        f"spent {paid}, best {lowest}{gain}"
    )


def write(ledger: Ledger, train: TrainConfig, tune: TuneConfig) -> list[str]:
    """Write all files of the report.

    Returns:
        What to print: the outcome and where the files are.
    """
    trials = [trial for trial in ledger.all() if trial.ended]
    winner = best(trials)
    folder = ledger.folder
    rows = [json.dumps(row(trial, train)) for trial in trials]
    folder.write_bytes(LINES, ("\n".join(rows) + "\n").encode())
    folder.write_bytes(REPORT, markdown(trials, train, tune).encode())
    if winner is None:
        return [f"no trial has a validation loss; {folder.name(REPORT)} says why"]
    folder.write_bytes(CURVES, curves(trials))
    folder.write_bytes(COORDINATES, coordinates(trials, tune))
    folder.write_bytes(BEST, best_yaml(winner, train, folder.name(BEST)).encode())
    return [outcome(trials, winner, tune), verdict(trials, train), f"report: {folder.name(REPORT)}",
            f"python -m train sft {folder.name(BEST)}"]  # fmt: skip


def row(trial: Trial, train: TrainConfig) -> dict[str, Any]:
    """A trial as a line of `trials.jsonl`."""
    top = trial.best
    return {
        **{name: value for name, value in asdict(trial).items() if name != "reports"},
        "run": trial.run,
        "steps": trial.step,
        "validation_loss": top.validation_loss if top and top.validation_loss < math.inf else None,
        "best_step": top.step if top else None,
        "spent": spent(trial, train),
        "spent_unit": "usd" if priced(train) else f"{train.scale.device}_hours",
        "curve": [[report.step, report.validation_loss] for report in trial.reports if report.validation_loss < math.inf],
    }


def outcome(trials: Sequence[Trial], winner: Trial, tune: TuneConfig) -> str:
    """The best trial in a sentence, beside the file's own values where those were tried."""
    text = f"best of {len(trials)} trials: {winner.number} with {search_space.short(winner.values)}"
    top = winner.best
    assert top is not None
    text += f", validation loss {top.validation_loss:.4f} at step {top.step}"
    first = next((trial for trial in trials if trial.number == 0), None)
    if tune.include_default and first is not None and first.best is not None and first is not winner:
        text += f"; the file's own values ({search_space.short(first.values)}) gave {first.best.validation_loss:.4f}"
    return text


def verdict(trials: Sequence[Trial], train: TrainConfig) -> str:
    """Whether one more trial pays, in a sentence."""
    said = cost.pays(points(trials, train))[1]
    return said.replace("unit spent", "dollar" if priced(train) else f"{train.scale.device.upper()}-hour")


def markdown(trials: Sequence[Trial], train: TrainConfig, tune: TuneConfig) -> str:
    """`report.md`."""
    names = list(tune.space)
    head = ["trial", *names, "validation loss", "at step", "steps", "ended", "seconds", "cost so far", "best so far"]
    lines = [f"# Search {train.name}", "", "| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    total, lowest = 0.0, math.inf
    for trial in trials:
        total, lowest = total + spent(trial, train), min(lowest, _loss(trial))
        top = trial.best
        cells = [
            str(trial.number),
            *(search_space.number(trial.values[name]) for name in names),
            f"{top.validation_loss:.4f}" if top else "",
            str(top.step) if top else "",
            str(trial.step),
            trial.state + (f": {trial.error}" if trial.error else ""),
            f"{trial.seconds:.1f}",
            money(total, train),
            f"{lowest:.4f}" if lowest < math.inf else "",
        ]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    winner = best(trials)
    if winner is not None:
        lines += ["", outcome(trials, winner, tune) + ".", "", verdict(trials, train) + "."]
        lines += ["", f"![Validation loss over steps]({CURVES})", "", f"![Parallel coordinates]({COORDINATES})"]
        lines += ["", f"To train with these values: `python -m train sft {BEST}`."]
        if winner.generation:
            lines += ["", "These are the values that the best member of the population ended with; it began with others."]
    return "\n".join(lines) + "\n"


def best_yaml(winner: Trial, train: TrainConfig, path: str) -> str:
    """A configuration file with the winner's values."""
    made = search_space.apply(train, winner.values).model_copy(update={"name": f"{train.name}-best"[:64]})
    top = winner.best
    assert top is not None
    note = f"# Trial {winner.number} of the search {train.name}: validation loss {top.validation_loss:.4f} at step {top.step}.\n"
    data = {"train": made.model_dump(mode="json", exclude_defaults=True)}
    return f"# python -m train sft {path}\n{note}" + yaml.safe_dump(data, sort_keys=False, allow_unicode=True)


def curves(trials: Sequence[Trial]) -> bytes:
    """PNG: validation loss over steps, a line per trial, the best one strong."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), dpi=120, layout="constrained")
    axes = figure.subplots()
    winner = best(trials)
    for trial in trials:
        shown = [report for report in trial.reports if report.validation_loss < math.inf]
        strong = trial is winner
        axes.plot(
            [report.step for report in shown],
            [report.validation_loss for report in shown],
            marker="o",
            markersize=3,
            linewidth=2.5 if strong else 1,
            alpha=1 if strong else 0.6,
            linestyle="-" if trial.state == "finished" else "--",
            label=f"{trial.number}: {search_space.short(trial.values)}",
        )
    axes.set_xlabel("step")
    axes.set_ylabel("validation loss")
    axes.set_title("Whole lines ran to their end, broken ones were stopped or failed", fontsize=9)
    axes.grid(alpha=0.3)
    if len(trials) <= 16:
        axes.legend(fontsize=7)
    return _png(figure)


def coordinates(trials: Sequence[Trial], tune: TuneConfig) -> bytes:
    """PNG: an axis per searched field and one for the validation loss; a line per trial, dark where the loss is low."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    shown = sorted((trial for trial in trials if _loss(trial) < math.inf), key=_loss, reverse=True)
    names = [*tune.space, "validation loss"]
    figure = Figure(figsize=(max(6.0, 2.2 * len(names)), 5), dpi=120, layout="constrained")
    axes = figure.subplots()
    heights = [_heights([trial.values[path] for trial in shown], span) for path, span in tune.space.items()]
    heights.append(_heights([_loss(trial) for trial in shown], None))
    for spot, trial in enumerate(shown):
        rank = spot / max(1, len(shown) - 1)
        line = [column[0][spot] for column in heights]
        axes.plot(range(len(names)), line, color=colormaps["viridis_r"](rank), alpha=0.8, linewidth=2.5 if rank == 1 else 1.2)
        axes.annotate(str(trial.number), (len(names) - 1, line[-1]), xytext=(4, 0), textcoords="offset points", fontsize=7)
    for spot, (_, ticks) in enumerate(heights):
        _axis(axes, spot, ticks)
    axes.set_xticks(range(len(names)), names, fontsize=8)
    axes.set_yticks([])
    axes.set_ylim(-0.06, 1.06)
    axes.spines[["top", "left", "right"]].set_visible(False)
    return _png(figure)


def _axis(axes: Axes, spot: int, ticks: list[tuple[float, str]]) -> None:
    axes.axvline(spot, color="0.7", linewidth=0.8, zorder=0)
    for height, text in ticks:
        axes.annotate(text, (spot, height), xytext=(-4, 0), textcoords="offset points", fontsize=7, ha="right", va="center")


def _heights(values: Sequence[Any], span: SearchRange | None) -> tuple[list[float], list[tuple[float, str]]]:
    """Heights from 0 to 1 of the values on their axis, and the axis's labels."""
    if span is not None and span.choice:
        texts = [search_space.number(choice) for choice in span.choice]
        # The file's own value need not be one of the choices.
        texts += sorted({search_space.number(value) for value in values} - set(texts))
        places = {text: spot / max(1, len(texts) - 1) for spot, text in enumerate(texts)}
        return [places[search_space.number(value)] for value in values], [(place, text) for text, place in places.items()]
    log = span is not None and span.log and all(value > 0 for value in values)
    scaled = [math.log(value) if log else float(value) for value in values]
    low, high = min(scaled), max(scaled)
    width = (high - low) or 1.0
    ends = {low: min(values), high: max(values)}
    return [(value - low) / width for value in scaled], [
        ((at - low) / width, search_space.number(value)) for at, value in ends.items()
    ]


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _loss(trial: Trial) -> float:
    return trial.best.validation_loss if trial.best else math.inf

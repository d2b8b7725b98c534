"""The report of a benchmark: a table, a figure and a file with all measurements."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers
from matplotlib.figure import Figure
from rich.table import Table

from ..trainer.arguments import MetaLRTrainingArguments
from ..trainer.metalr import MetaLRTrainer
from .cases import DEFAULT, PLAIN, SETTLED, BenchmarkArguments, Case, chosen_cases

CLOCKS = {"wall": "wall time", "cpu": "processor time"}
# The fixed cost of a layer is a larger share of a shorter step.
SHORT_STEP_MS = 50
MIB = 2**20


def summarise(rows: Sequence[dict[str, Any]], arguments: BenchmarkArguments) -> list[dict[str, Any]]:
    """Summarises the measurements of every case.

    Args:
        rows (`Sequence[dict]`): What [`~metalr_hf.benchmark.cases.benchmark`] gave.
        arguments ([`~metalr_hf.benchmark.cases.BenchmarkArguments`]): With the length of the run.

    Returns:
        `list[dict]`: a row a case: `case`, `title`, `layers`; of each repeat, in `wall` and in `cpu`, the
            `milliseconds` a step, their `ratio` to those of the plain steps beside them, and the ratio of a whole `run`
            (see [`run_ratio`]); the `peak` in bytes and its `peak_ratio`.
    """
    repeats: dict[int, dict[str, dict[str, Any]]] = {}
    for row in rows:
        repeats.setdefault(row["repeat"], {})[row["case"]] = row
    table = []
    for case in chosen_cases(arguments):
        own = [measured[case.key] for measured in repeats.values()]
        entry: dict[str, Any] = {"case": case.key, "title": case.title, "layers": own[0]["layers"]}
        for clock in CLOCKS:
            seconds = [seconds_a_step(row, case, clock) for row in own]
            runs = [run_ratio(measured, case, clock, arguments.run_steps) for measured in repeats.values()]
            entry[clock] = {
                "milliseconds": [1000 * s for s in seconds],
                "ratio": [step_ratio(row, case, clock) for row in own],
                "run": [ratio for ratio in runs if ratio is not None],
            }
        entry["peak"] = [row["peak"] for row in own]
        entry["peak_ratio"] = [row["peak"] / row["beside"]["peak"] for row in own]
        table.append(entry)
    return table


def seconds_a_step(row: dict[str, Any], case: Case | None, clock: str) -> float:
    """Medians of the steps with a validation pass and of those without, weighted by how many of each there are.

    Args:
        row (`dict`): A measurement.
        case ([`~metalr_hf.benchmark.cases.Case`], *optional*): Its case. Without one, steps with a pass are left out.
        clock (`str`): `"wall"` or `"cpu"`.

    Returns:
        `float`: seconds.
    """
    share = 0.0 if case is None else case.validated
    passed = [step[clock] for step in row["steps"][1:] if step["passes"]]
    others = [step[clock] for step in row["steps"][1:] if not step["passes"]]
    return (share * median(passed) if share else 0.0) + ((1 - share) * median(others) if share < 1 else 0.0)


def step_ratio(row: dict[str, Any], case: Case | None, clock: str) -> float:
    """The ratio of the time of a step to that of the plain steps beside it.

    Args:
        row (`dict`): A measurement.
        case ([`~metalr_hf.benchmark.cases.Case`], *optional*): Its case, as in [`seconds_a_step`].
        clock (`str`): `"wall"` or `"cpu"`.

    Returns:
        `float`: 1 for as long as a plain step.
    """
    return seconds_a_step(row, case, clock) / seconds_a_step(row["beside"], None, clock)


def run_ratio(measured: dict[str, dict[str, Any]], case: Case, clock: str, run_steps: int) -> float | None:
    """The ratio of the cost of a whole run to that of a plain one, computed from the costs of its steps.

    By default a run calibrates, tunes at its first steps and then leaves the rates alone. So it is its first step with
    everything that comes before it, the calibration in the steps after it, the steps that tune, and all others.

    Args:
        measured (`dict[str, dict]`): The measurements of a repeat, by case.
        case ([`~metalr_hf.benchmark.cases.Case`]): How the steps that tune do it.
        clock (`str`): `"wall"` or `"cpu"`.
        run_steps (`int`): Length of the run.

    Returns:
        `float`, *optional*: `None` for cases that tune nothing, or if the default was not measured.
    """
    if case.kind is not MetaLRTrainer or case.key == SETTLED or not {DEFAULT, SETTLED} <= set(measured):
        return None
    default = measured[DEFAULT]
    beside = default["beside"]
    start = default["steps"][0][clock] - beside["steps"][0][clock] + _more_than_usual(default, clock)
    tuned_steps = min(run_steps, MetaLRTrainingArguments.tuning_steps) - 1
    # In plain steps.
    more = start / seconds_a_step(beside, None, clock)
    more += tuned_steps * (step_ratio(measured[case.key], case, clock) - 1)
    more += (run_steps - 1 - tuned_steps) * (step_ratio(measured[SETTLED], None, clock) - 1)
    return 1 + more / run_steps


def _more_than_usual(row: dict[str, Any], clock: str) -> float:
    """Seconds that the steps with forward passes of the calibration took more than the others."""
    usual = seconds_a_step(row, None, clock)
    return sum(step[clock] - usual for step in row["steps"][1:] if step["passes"])


def make_tables(summary: Sequence[dict[str, Any]], arguments: BenchmarkArguments) -> list[Table]:
    """The tables to print: time on the clock; time of the processor, and memory.

    Args:
        summary (`Sequence[dict]`): What [`summarise`] gave.
        arguments ([`~metalr_hf.benchmark.cases.BenchmarkArguments`]): The settings, for the title.

    Returns:
        `list[rich.table.Table]`
    """
    setting = f"{arguments.model}, {arguments.batch_size} images of {arguments.image_size} px"
    run = f"run of {arguments.run_steps}"
    time = Table(title=f"Time: {setting}, {arguments.optim}, {arguments.dtype}")
    others = Table(title="Processor time, and peak memory")
    _add_columns(time, "layers", "ms a step", "x plain", run)
    _add_columns(others, "ms a step", "x plain", run, "peak MiB", "x plain")
    for row in summary:
        wall, cpu = ([_spread(row[clock]["milliseconds"], ".0f"), *_ratios(row[clock])] for clock in CLOCKS)
        time.add_row(row["title"], str(row["layers"] or ""), *wall)
        peak = median(row["peak"]) / MIB
        others.add_row(row["title"], *cpu, f"{peak:.0f}", f"{median(row['peak_ratio']):.3f}")
    return [time, others]


def _add_columns(table: Table, *titles: str) -> None:
    table.add_column("case")
    for title in titles:
        table.add_column(title, justify="right", no_wrap=True)


def _ratios(values: dict[str, list[float]]) -> list[str]:
    return [f"{median(values['ratio']):.3f}", f"{median(values['run']):.3f}" if values["run"] else ""]


def _spread(values: Sequence[float], form: str) -> str:
    return f"{median(values):{form}} ({min(values):{form}}–{max(values):{form}})"


def calibration_line(rows: Sequence[dict[str, Any]]) -> str | None:
    """What the calibration by itself costs, in a sentence.

    Args:
        rows (`Sequence[dict]`): What [`~metalr_hf.benchmark.cases.benchmark`] gave.

    Returns:
        `str`, *optional*: none if nothing was calibrated.
    """
    own = [row for row in rows if row["case"] == DEFAULT and row["calibration"]]
    if not own:
        return None
    costs = {clock: 1000 * median(_more_than_usual(row, clock) for row in own) for clock in CLOCKS}
    plain = median(seconds_a_step(row, None, "wall") for row in rows if row["case"] == PLAIN) * 1000
    passes = sorted({round(3 * sum(step["passes"] for step in row["steps"])) for row in own})
    return (
        "The calibration, once the next batch is there: "
        f"{costs['wall']:.0f} ms ({costs['cpu']:.0f} ms of processor time), as long "
        f"as {costs['wall'] / plain:.1f} plain steps, with {' or '.join(map(str, passes))} forward passes."
    )


def notes(summary: Sequence[dict[str, Any]], arguments: BenchmarkArguments) -> list[str]:
    """Notes on how to read the table.

    Args:
        summary (`Sequence[dict]`): What [`summarise`] gave.
        arguments ([`~metalr_hf.benchmark.cases.BenchmarkArguments`]): The settings.

    Returns:
        `list[str]`: sentences.
    """
    lines = [
        f"Medians of {arguments.repeats} repeats; in brackets the lowest and the highest. Every case takes its steps "
        "in turn with a plain one beside it, each in a process of its own. How far the plain ratio is from 1 tells how "
        "exact the others are. The images are prepared beforehand.",
        f"A run of {arguments.run_steps} steps is put together: the calibration and all that comes before the first "
        f"step, {MetaLRTrainingArguments.tuning_steps} steps that tune, and the others after tuning.",
    ]
    plain = next(median(row["wall"]["milliseconds"]) for row in summary if row["case"] == PLAIN)
    if plain < SHORT_STEP_MS:
        lines.append(f"A plain step of {plain:.0f} ms is so short that the fixed cost of a layer weighs most here.")
    return lines


def plot_benchmark(summary: Sequence[dict[str, Any]]) -> Figure:
    """Draws time and memory of every case over those of the plain one.

    Args:
        summary (`Sequence[dict]`): What [`summarise`] gave.

    Returns:
        `matplotlib.figure.Figure`: a bar a case; the lines end at the lowest and the highest repeat.
    """
    figure = Figure(figsize=(9, 1.2 + 0.38 * len(summary)), layout="constrained")
    panels = figure.subplots(1, 3, sharey=True)
    quantities = {
        "wall time of a step": [row["wall"]["ratio"] for row in summary],
        "processor time of a step": [row["cpu"]["ratio"] for row in summary],
        "peak memory": [row["peak_ratio"] for row in summary],
    }
    for ax, (title, ratios) in zip(panels, quantities.items(), strict=True):
        middle = [median(values) for values in ratios]
        below = [m - min(values) for m, values in zip(middle, ratios, strict=True)]
        above = [max(values) - m for m, values in zip(middle, ratios, strict=True)]
        colors = ["0.6" if row["case"] == PLAIN else "tab:blue" for row in summary]
        ax.barh(range(len(summary)), middle, xerr=[below, above], color=colors, error_kw={"elinewidth": 1})
        ax.axvline(1, color="0.3", linewidth=0.8)
        for i, value in enumerate(middle):
            ax.annotate(f"{value:.2f}", (0, i), xytext=(4, 0), textcoords="offset points", va="center", color="white")
        ax.set_title(title, fontsize="medium")
        ax.set_xlabel("x plain")
        ax.spines[["top", "right"]].set_visible(False)
    panels[0].set_yticks(range(len(summary)), [row["title"] for row in summary])
    panels[0].invert_yaxis()
    return figure


def write_benchmark(rows: Sequence[dict[str, Any]], arguments: BenchmarkArguments) -> list[dict[str, Any]]:
    """Writes `benchmark.json` and `benchmark.png`.

    Args:
        rows (`Sequence[dict]`): What [`~metalr_hf.benchmark.cases.benchmark`] gave.
        arguments ([`~metalr_hf.benchmark.cases.BenchmarkArguments`]): The settings, with the folder.

    Returns:
        `list[dict]`: what [`summarise`] gave.
    """
    folder = Path(arguments.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    summary = summarise(rows, arguments)
    machine = {
        "device": rows[0]["device"],
        "threads": rows[0]["threads"],
        "processor": platform.processor() or platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    settings = {name: value for name, value in asdict(arguments).items() if name != "output_dir"}
    content = {"settings": settings, "machine": machine, "cases": summary, "measurements": list(rows)}
    (folder / "benchmark.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    plot_benchmark(summary).savefig(folder / "benchmark.png", dpi=150)
    return summary

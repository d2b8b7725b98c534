"""Writes report.md from results.jsonl: `python notebooks/results/hunt/report.py`."""

import json
from pathlib import Path

import pandas as pd

from metalr_hf.compare.hunt import DEAD_POINTS, DEAD_SHARE
from metalr_hf.hub.markdown import table

HERE = Path(__file__).parent
DEFAULT, EARLIER, GRID = "three looks", "before", "cosine"
TRIED = ("momentum not counted", "momentum counted for the head too", "limit of 2.5 %")
HALVES = {"development": "Development half", "held_out": "Held-out half", "fresh": "Fresh cells"}


def is_dead(accuracy: float, best: float, chance: float) -> bool:
    return accuracy < best - DEAD_POINTS or accuracy < chance + (1 - DEAD_SHARE) * (best - chance)


def half(runs: pd.DataFrame, title: str) -> tuple[str, dict[str, list[bool]]]:
    rows, dead, gains = [], {DEFAULT: [], EARLIER: []}, []
    for cell, of_cell in runs.groupby("cell", sort=False):
        chance = of_cell["chance"].iloc[0]
        grid = of_cell[of_cell["strategy"] == GRID].sort_values("learning_rate")
        best = grid["balanced_accuracy"].max() if len(grid) > 2 else None
        shown = {}
        for name in (EARLIER, DEFAULT):
            figures = of_cell[of_cell["strategy"] == name].sort_values("seed")["balanced_accuracy"]
            if best is not None:
                dead[name] += [is_dead(figure, best, chance) for figure in figures]
            ends = [f"**{a:.3f}**" if best is not None and is_dead(a, best, chance) else f"{a:.3f}" for a in figures]
            shown[name] = " ".join(ends) or "–"
            if name == DEFAULT and best is not None:
                gains.append(figures.mean() - best)
        points = " ".join(f"{a:.3f}" for a in grid["balanced_accuracy"]) if best is not None else "–"
        rows.append([cell, f"{chance:.3f}", points, "–" if best is None else f"{best:.3f}", *shown.values()])
    heads = ["cell", "chance", "cosine at the rates of the grid", "best", "one look", "three looks"]
    gains = pd.Series(gains)
    said = (
        f"Against the best point of the grid, the mean of the default's seeds is {gains.mean() * 100:+.1f} points in "
        f"the mean of {len(gains)} cells, above it in {(gains > 0).sum()} of them."
    )
    return f"## {title}\n\n{table(heads, rows, 'lr', escaped=True)}\n\n{said}\n", dead


def tried(runs: pd.DataFrame) -> str:
    """What other settings gave beside the default, run by run."""
    names = [*TRIED, DEFAULT]
    runs = runs[runs["strategy"].isin(names)]
    figures = runs.pivot_table(values="balanced_accuracy", index=["cell", "seed"], columns="strategy", sort=False)
    figures = figures[figures[list(TRIED)].notna().any(axis=1)]
    rows = [[*key, *(f"{v:.3f}" if v == v else "" for v in row[names])] for key, row in figures.iterrows()]
    return table(["cell", "seed", *TRIED, "default"], rows, "lrrrrr", escaped=True)


def main() -> None:
    runs = pd.DataFrame(map(json.loads, (HERE / "results.jsonl").read_text(encoding="utf-8").splitlines()))
    parts, counts = [], []
    for name, title in HALVES.items():
        text, dead = half(runs[runs["half"] == name], title)
        parts.append(text)
        counts.append([title, *(f"{sum(of)} of {len(of)}" if of else "–" for of in (dead[EARLIER], dead[DEFAULT]))])
    text = (HERE / "text.md").read_text(encoding="utf-8")
    summary = table(["", "one look", "three looks (default)"], counts, escaped=True)
    (HERE / "report.md").write_text(
        text.format(runs=len(runs), summary=summary, tried=tried(runs), halves="\n".join(parts)), "utf-8"
    )


if __name__ == "__main__":
    main()

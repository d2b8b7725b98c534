"""Writes report.md from results.jsonl and text.md: `python notebooks/results/hunt/report.py`."""

import json
from pathlib import Path

import pandas as pd

from metalr_hf.compare.hunt import is_dead
from metalr_hf.hub.markdown import table

HERE = Path(__file__).parent
GRID, AGAIN, DEFAULT = "cosine", "cosine, best rate, another seed", "metalr"
HALVES = {"development": "Development half", "held_out": "Held-out half", "fresh": "Fresh cells"}


def cells_of(runs: pd.DataFrame) -> pd.DataFrame:
    """A row a cell: the grid, the best of it, the same rate with another seed, and the default."""
    rows = []
    for cell, of_cell in runs.groupby("cell", sort=False):
        named = {name: of_cell[of_cell["strategy"] == name] for name in (GRID, AGAIN, DEFAULT)}
        grid = named[GRID].sort_values("learning_rate")["balanced_accuracy"]
        ours = named[DEFAULT].sort_values("seed")["balanced_accuracy"].tolist()
        again, chance, best = named[AGAIN]["balanced_accuracy"].tolist(), of_cell["chance"].iloc[0], grid.max()
        rows.append(
            {
                "half": of_cell["half"].iloc[0],
                "cell": cell,
                "chance": chance,
                "grid": grid.tolist(),
                "best": best,
                "again": again,
                "ours": ours,
                "dead": [is_dead(accuracy, best, chance) for accuracy in ours],
                "dead_again": [is_dead(accuracy, best, chance) for accuracy in again],
                "gain": 100 * (sum(ours) / len(ours) - best),
                "gain_again": 100 * (sum(ours) / len(ours) - again[0]),
            }
        )
    return pd.DataFrame(rows)


def marked(accuracies: list[float], dead: list[bool]) -> str:
    return " ".join(f"**{a:.3f}**" if is_so else f"{a:.3f}" for a, is_so in zip(accuracies, dead, strict=True))


def half(cells: pd.DataFrame, title: str) -> str:
    rows = [
        [
            cell.cell,
            f"{cell.chance:.3f}",
            " ".join(f"{a:.3f}" for a in cell.grid),
            f"{cell.best:.3f}",
            marked(cell.again, cell.dead_again),
            marked(cell.ours, cell.dead),
            f"{cell.gain:+.1f}",
        ]
        for cell in cells.itertuples()
    ]
    heads = ["cell", "chance", "cosine at the rates of the grid", "best", "the same, another seed", "metalr", "gain"]
    return f"## {title}\n\n{table(heads, rows, 'lrlrrrr', escaped=True)}\n"


def summary(cells: pd.DataFrame) -> str:
    rows = []
    for name, title in [*HALVES.items(), (None, "All")]:
        of = cells if name is None else cells[cells["half"] == name]
        counts = [f"{sum(map(sum, of[column]))} of {sum(map(len, of[column]))}" for column in ("dead", "dead_again")]
        gains = [f"{of[name].mean():+.1f} ± {of[name].sem():.1f}" for name in ("gain", "gain_again")]
        rows.append([title, len(of), *counts, *gains, f"{(of['gain'] > 0).sum()}, {(of['gain'] < 0).sum()}"])
    heads = [
        "",
        "cells",
        "dead runs of metalr",
        "of the grid's best rate, another seed",
        "points above the best of the grid",
        "above the same rate, another seed",
        "cells above the best, below",
    ]
    return table(heads, rows, "lrrrrrr", escaped=True)


def main() -> None:
    lines = (HERE / "results.jsonl").read_text(encoding="utf-8").splitlines()
    runs = pd.DataFrame(map(json.loads, lines))
    cells = cells_of(runs)
    halves = [half(cells[cells["half"] == name], title) for name, title in HALVES.items()]
    text = (HERE / "text.md").read_text(encoding="utf-8")
    counts = {
        name: sum(map(count, cells[column]))
        for name, column, count in (
            ("dead", "dead", sum),
            ("ours", "dead", len),
            ("dead_again", "dead_again", sum),
            ("again", "dead_again", len),
        )
    }
    filled = text.format(runs=len(runs), cells=len(cells), summary=summary(cells), halves="\n".join(halves), **counts)
    (HERE / "report.md").write_text(filled, encoding="utf-8")


if __name__ == "__main__":
    main()

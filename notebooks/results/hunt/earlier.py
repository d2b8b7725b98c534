"""Writes earlier.md from earlier.jsonl: `python notebooks/results/hunt/earlier.py`."""

import json
from pathlib import Path

import pandas as pd

from metalr_hf.compare.hunt import is_dead
from metalr_hf.hub.markdown import table

HERE = Path(__file__).parent
DEFAULT, FRESH, AVERAGED, DECAY, EARLIER = "fitted head", "default", "averaged", "three looks", "before"
FASTER = "head at a tenth, no rungs below"
GRID = "cosine"
SHOWN = {
    EARLIER: "one look, decay",
    DECAY: "three looks, decay",
    AVERAGED: "three looks, averaged",
    FRESH: "a head at a tenth, fresh",
    DEFAULT: "the default, with a fitted head",
}
TRIED = ("momentum not counted", "momentum counted for the head too", "limit of 2.5 %")
# Each with what it is compared with, in pairs of runs of the same seed.
PAIRS = {
    DEFAULT: FRESH,
    FRESH: AVERAGED,
    FASTER: AVERAGED,
    "averaged, head at a third": AVERAGED,
    "averaged, head at a thirtieth": AVERAGED,
    "head at a tenth, backbone at three times its rate": FASTER,
    "head at a tenth, backbone at a third": FASTER,
    "head at a tenth, no tuning": FASTER,
    AVERAGED: DECAY,
    "averaged, tuned to the end": AVERAGED,
    "averaged, decay over the last 30 %": AVERAGED,
    "averaged, statistics of four batches": AVERAGED,
    "linear decay from the first step": DECAY,
    "linear decay from the first step, averaged": AVERAGED,
    "decay, no tuning": DECAY,
    "decay, head at a third of its rate": DECAY,
}
HALVES = {"development": "Development half", "held_out": "Held-out half", "fresh": "Fresh cells"}


def half(runs: pd.DataFrame, title: str) -> tuple[str, dict[str, list[bool]]]:
    rows, dead, gains = [], {name: [] for name in SHOWN}, []
    for cell, of_cell in runs.groupby("cell", sort=False):
        chance = of_cell["chance"].iloc[0]
        grid = of_cell[of_cell["strategy"] == GRID].sort_values("learning_rate")
        best = grid["balanced_accuracy"].max() if len(grid) > 2 else None
        shown = {}
        for name in SHOWN:
            figures = of_cell[of_cell["strategy"] == name].sort_values("seed")["balanced_accuracy"]
            if best is not None:
                dead[name] += [is_dead(figure, best, chance) for figure in figures]
            ends = [f"**{a:.3f}**" if best is not None and is_dead(a, best, chance) else f"{a:.3f}" for a in figures]
            shown[name] = " ".join(ends) or "–"
            if name == DEFAULT and best is not None:
                gains.append(figures.mean() - best)
        points = " ".join(f"{a:.3f}" for a in grid["balanced_accuracy"]) if best is not None else "–"
        rows.append([cell, f"{chance:.3f}", points, "–" if best is None else f"{best:.3f}", *shown.values()])
    heads = ["cell", "chance", "cosine at the rates of the grid", "best", *SHOWN.values()]
    gains = pd.Series(gains)
    said = (
        f"Against the best point of the grid, the mean of the default's seeds is {gains.mean() * 100:+.1f} points in "
        f"the mean of {len(gains)} cells, above it in {(gains > 0).sum()} of them."
    )
    return f"## {title}\n\n{table(heads, rows, 'lr', escaped=True)}\n\n{said}\n", dead


def tried(runs: pd.DataFrame) -> str:
    """What other settings gave beside the default, run by run."""
    names = [*TRIED, DECAY]
    runs = runs[runs["strategy"].isin(names)]
    figures = runs.pivot_table(values="balanced_accuracy", index=["cell", "seed"], columns="strategy", sort=False)
    figures = figures[figures[list(TRIED)].notna().any(axis=1)]
    rows = [[*key, *(f"{v:.3f}" if v == v else "" for v in row[names])] for key, row in figures.iterrows()]
    return table(["cell", "seed", *TRIED, SHOWN[DECAY]], rows, "lrrrrr", escaped=True)


def pairs(runs: pd.DataFrame) -> str:
    """How settings differ in runs of the same cell and seed."""
    figures = runs.pivot_table(values="balanced_accuracy", index=["half", "cell", "seed"], columns="strategy")
    rows = []
    for name, other in PAIRS.items():
        gains = (figures[name] - figures[other]).dropna() * 100
        # The halves that something was chosen on, and the one that was run afterwards.
        for held_out in (False, True):
            of = gains[(gains.index.get_level_values("half") == "held_out") == held_out]
            if len(of) > 1:
                where = HALVES["held_out"] if held_out else "Development half and fresh cells"
                better = f"{(of > 0).sum()}, {(of < 0).sum()}"
                label = SHOWN.get(name, name), SHOWN.get(other, other)
                rows.append([*label, where, len(of), f"{of.mean():+.1f} ± {of.sem():.1f}", better])
    return table(
        ["setting", "compared with", "cells", "pairs", "points", "better, worse"], rows, "lllrrr", escaped=True
    )


def by_backbone(runs: pd.DataFrame) -> dict[str, str]:
    """What a head at a tenth gains over one that keeps the rate found for it, by backbone."""
    figures = runs.pivot_table(values="balanced_accuracy", index=["cell", "seed"], columns="strategy")
    gains = (figures[FRESH] - figures[AVERAGED]).dropna() * 100
    backbones = gains.index.get_level_values("cell").str.extract(r"([a-z]+)", expand=False)
    return {name: f"{of.mean():+.1f} ± {of.sem():.1f}" for name, of in gains.groupby(backbones)}


def main() -> None:
    runs = pd.DataFrame(map(json.loads, (HERE / "earlier.jsonl").read_text(encoding="utf-8").splitlines()))
    parts, counts = [], []
    for name, title in HALVES.items():
        text, dead = half(runs[runs["half"] == name], title)
        parts.append(text)
        counts.append([title, *(f"{sum(of)} of {len(of)}" if of else "–" for of in dead.values())])
    text = (HERE / "earlier_text.md").read_text(encoding="utf-8")
    summary = table(["", *SHOWN.values()], counts, escaped=True)
    gains = by_backbone(runs)
    figures = runs.pivot_table(values="balanced_accuracy", index=["cell", "seed"], columns="strategy")
    changed = figures[(figures[FRESH] != figures[FASTER]) & figures[FASTER].notna()].index
    filled = text.format(
        runs=len(runs),
        summary=summary,
        tried=tried(runs),
        pairs=pairs(runs),
        halves="\n".join(parts),
        lite=gains["lite"],
        mobile=gains["mobilenet"],
        resnet=gains["resnet"],
        dino_gain=gains["dino"],
        vit=gains["vit"],
        changed=sum(not cell.startswith("dino") for cell, _ in changed),
    )
    (HERE / "earlier.md").write_text(filled, "utf-8")


if __name__ == "__main__":
    main()

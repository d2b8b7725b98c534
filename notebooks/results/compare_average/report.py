"""Writes report.md from results.jsonl: `python notebooks/results/compare_average/report.py`."""

import json
from pathlib import Path

import pandas as pd

from metalr_hf.hub.markdown import table

HERE = Path(__file__).parent
TEXT = """# Averaging in place of decaying

Every run has the settings of `settings.json`. One run was evaluated with its last weights and with many averages of
them at once, with the batch-norm statistics averaged along and, for some, estimated anew by one pass over the training
images. Mean ± standard deviation of test accuracy over (n) seeds. `metalr` here is the default of the time, which ends
with linear decay (`metalr_decay` of `compare`). Its runs on the ViT that were not repeated are those of `compare_decay`
and `compare_decay_240` (`from` in `results.jsonl`); the three that were, ViT → digits at 60 steps, gave the same
figures bit for bit.

The setting was chosen on the development rows at 60 steps, before the rows that were held out were run: constant rates,
the polynomial average with η = 3, statistics anew.

{cells}

**Against the last weights after linear decay.** The chosen setting is 0.1 to 0.6 points better in six of
seven cells at 60 steps, and 2.5 with flipped labels. At 240 steps it is 0.0 to 0.3 points better, on one or two seeds.
**It loses** 0.1 points on ViT → blood cells. Nearly all of these differences are smaller than the spread of the seeds.
On ViT → digits at 60 steps it stays below schedule-free AdamW, .927 to .944. An average on top of the decay gains 1.1
points on EfficientNet-Lite0 → digits (0.4 in the run of `compare` below) and loses 0.8 on ViT → digits and 1.1 on
CIFAR-10.

**What is certain:** with constant rates an average is worth 2 to 10 points in eight of eleven rows, as much as the
decay and without knowing when the run ends. Averaged batch-norm statistics are the wrong ones: with flipped labels they
cost 12 points. Estimating them anew without any average is worth 2 points there, and between -0.3 and 0.5 elsewhere.

**Baselines gain as much or more.** On ViT → digits constant rates from 1e-3 go from .826 to .918 with the same average
(ours: from .896 to .927); on EfficientNet-Lite0 → digits, by `compare` itself, from .927 to .949, above ours
([report](../compare_average_digits/report.md)). Cosine decay gains 0.8 points on the one and nothing on the other.

**Tuning to the end** (`tuning_steps=0`) under the average: .951 in place of .946 on EfficientNet-Lite0 → digits; on two
seeds of ViT → digits both are .929, but at 240 steps, on one, .955 in place of .967. The 40 steps stay.

## Every average on the development cells

{every_average}
"""
DEVELOPMENT = [
    ("EfficientNet-Lite0 → digits", 60),
    ("ViT → digits", 60),
    ("ResNet-20 → blood cells", 60),
    ("ViT → digits", 240),
]


def figure(runs: pd.DataFrame) -> str:
    if runs.empty:
        return ""
    runs = runs.drop_duplicates("seed")
    spread = f" ± {runs['accuracy'].std(ddof=1):.3f}" if len(runs) > 1 else ""
    return f"{runs['accuracy'].mean():.3f}{spread} ({len(runs)})"


def chosen(rows: pd.DataFrame, strategy: str, average: str, norm: str) -> pd.DataFrame:
    # A network without batch norm has nothing to estimate.
    norms = [norm] if (rows["batch_norm"] == "estimated").any() else ["averaged"]
    return rows[(rows["strategy"] == strategy) & (rows["average"] == average) & rows["batch_norm"].isin(norms)]


COLUMNS = {
    "decay, last weights (the default)": ("metalr", "none", "averaged"),
    "decay, last weights, statistics anew": ("metalr", "none", "estimated"),
    "decay, polynomial, statistics anew": ("metalr", "polynomial 3", "estimated"),
    "constant, last weights": ("metalr_constant", "none", "averaged"),
    "constant, polynomial, statistics averaged": ("metalr_constant", "polynomial 3", "averaged"),
    "constant, polynomial, statistics anew (chosen)": ("metalr_constant", "polynomial 3", "estimated"),
}


def cells(results: pd.DataFrame) -> str:
    lines = []
    for (cell, steps, noise), rows in results.groupby(["cell", "steps", "noise"], sort=False):
        name = f"{cell}, {steps} steps" + (f", {noise:.0%} of the labels flipped" if noise else "")
        part = "development" if (cell, steps) in DEVELOPMENT and not noise else "held out"
        lines.append([name, part, *[figure(chosen(rows, *which)) for which in COLUMNS.values()]])
    return table(["cell", "", *COLUMNS], lines, align="ll" + "r" * len(COLUMNS), escaped=True)


def every_average(results: pd.DataFrame) -> str:
    lines = []
    for (cell, steps, strategy, tag), rows in results.groupby(["cell", "steps", "strategy", "tuned"], sort=False):
        if (cell, steps) in DEVELOPMENT:
            for (average, norm), runs in rows.groupby(["average", "batch_norm"], sort=False):
                rate = runs["learning_rate"].dropna().unique()
                what = strategy + (f" from {rate[0]:g}" if len(rate) else "") + (f", tuned {tag}" if tag else "")
                lines.append([f"{cell}, {steps}", what, average, norm, figure(runs), f"{runs['test_loss'].mean():.3f}"])
    header = ["cell, steps", "strategy", "average", "batch-norm statistics", "test accuracy", "test loss"]
    return table(header, lines, align="llllrr")


def main() -> None:
    results = pd.DataFrame([json.loads(line) for line in (HERE / "results.jsonl").read_text().splitlines()])
    results["tuned"] = results["tuned"].fillna("")
    plain = results[results["tuned"] == ""]
    text = TEXT.replace("{cells}", cells(plain[plain["strategy"].str.startswith("metalr")]))
    text = text.replace("{every_average}", every_average(results[results["noise"] == 0]))
    (HERE / "report.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()

"""Writes report.md from results.jsonl: `python notebooks/results/stopping/report.py`."""

import json
from pathlib import Path

import pandas as pd

from metalr_hf.hub.markdown import table

HERE = Path(__file__).parent
TEXT = """# Runs that stop by themselves

`stop_when_converged=True`, everything else the default, against runs of a fixed number of steps with the defaults:
500 images, batches of 32, AdamW with a weight decay of 0.01, one thread, seeds 0 and 1. The run that stops by itself
trains on 400 of the 500 images and looks at the other 100; the fixed ones train on all 500. The ViT has images of
16 × 16 pixels, EfficientNet-Lite0 of 32 × 32. Test accuracy on 396 images of blood cells or 400 digits. *Model* is the
step whose weights the run went back to.

{runs}

{means}

**It misses the target in all three cells**, which was to be at most half a point below the best fixed length, at no
more than 1.5 times its steps. By the means the best length is 240 steps in each, and it is 0.8 points below on
EfficientNet-Lite0 → digits, 0.8 below on ViT → blood cells and 1.5 below on ViT → digits; of the single runs, three of
six are within half a point. It takes 0.9 to 1.5 times the steps, so that it hardly stops too early; it has a fifth
fewer images to train on. Against 60 steps it is 3.1 and 1.1 points better on digits and 0.1 worse on blood cells. An
image is 0.25 points.

**The rule was chosen on runs of these cells**, with the default before, and so is not confirmed by them: the metric
(the loss after the best temperature scaling: by the plain loss a run of ViT → digits ended at .87), the earliest step
at which a run may stop (200), how much better an evaluation has to be (half of its standard error: with a fiftieth of
the first loss a run of blood cells went on for 1,082 steps, to the same accuracy), and that the last weights within one
standard error of the best are taken. With that default, whose head started at the whole rate found for it, it was 0.8
and 0.6 points behind 1,000 steps on the ViT and best on EfficientNet-Lite0.
"""


def means(results: pd.DataFrame, lengths: list[int]) -> str:
    lines = []
    for cell, runs in results.groupby("cell", sort=False):
        alone, fixed = runs[runs["max_steps"].isna()], runs.groupby("max_steps")["accuracy"].mean()
        lines.append([cell, f"{alone['accuracy'].mean():.3f}", f"{alone['steps'].mean():.0f}"])
        lines[-1] += [f"{fixed[steps]:.3f}" for steps in lengths]
    header = ["mean of the seeds", "stops by itself", "steps", *[f"{steps} steps" for steps in lengths]]
    return table(header, lines, align="l" + "r" * (len(header) - 1), escaped=True)


def main() -> None:
    rows = [json.loads(line) for line in (HERE / "results.jsonl").read_text().splitlines()]
    results = pd.DataFrame(rows)
    lengths = sorted(results["max_steps"].dropna().astype(int).unique())
    lines = []
    for (cell, seed), runs in results.groupby(["cell", "seed"], sort=False):
        alone = runs[runs["max_steps"].isna()].iloc[0]
        fixed = [runs.loc[runs["max_steps"] == steps, "accuracy"] for steps in lengths]
        figures = ["" if one.empty else f"{one.iloc[0]:.3f}" for one in fixed]
        lines.append([cell, seed, f"{alone['accuracy']:.3f}", int(alone["steps"]), int(alone["model"]), *figures])
    header = ["cell", "seed", "stops by itself", "steps", "model", *[f"{steps} steps" for steps in lengths]]
    text = TEXT.replace("{runs}", table(header, lines, align="l" + "r" * (len(header) - 1), escaped=True))
    text = text.replace("{means}", means(results, lengths))
    (HERE / "report.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()

"""Whether a strategy is better than the best baseline over the cells of a comparison, or seems so by chance."""

from __future__ import annotations

import numpy as np
import pandas as pd
from scipy.stats import wilcoxon

from ..hub.markdown import escape, table

# Below it a difference over the cells is printed in bold.
SIGNIFICANT = 0.05
# With fewer no difference can be significant: of n pairs, the smallest p there is is 2 / 2 ** n.
FEWEST_CELLS = 6
OURS = ("metalr", "calibrated_cosine")


def is_baseline(strategy: str) -> bool:
    """Whether a strategy is another's rather than this package's.

    Args:
        strategy (`str`): Its name.

    Returns:
        `bool`

    Example:

    ```python
    >>> from metalr_hf.compare.evidence import is_baseline
    >>> is_baseline("cosine+average"), is_baseline("metalr_paper")
    (True, False)

    ```
    """
    return not strategy.startswith(OURS)


def paired_differences(best: pd.DataFrame) -> pd.DataFrame:
    """Every strategy against the best baseline, cell by cell, with Wilcoxon's signed-rank test.

    Args:
        best (`pandas.DataFrame`):
            A row a cell and a column a strategy: the mean over seeds and folds at its best learning rate, NaN where it
            has not run. Choosing the rate by the test results favours the strategies that have one.

    Returns:
        `pandas.DataFrame`: indexed by strategy, without the best baseline, whose name is in `attrs["baseline"]`: that
            of the highest mean over the cells that all baselines have. Columns `cells` (how many both have), `mean` and
            `error` (of the differences, and its standard error), `better` (in how many cells) and `p` (of the two-sided
            test, NaN where no cell differs). No rows where there is no baseline.

    Example:

    ```python
    >>> import pandas as pd
    >>> from metalr_hf.compare.evidence import paired_differences
    >>> best = pd.DataFrame({"cosine": [0.8, 0.7, 0.9], "metalr": [0.82, 0.73, 0.91]})
    >>> found = paired_differences(best)
    >>> found.attrs["baseline"], found.loc["metalr", ["cells", "better", "p"]].tolist()
    ('cosine', [3.0, 3.0, 0.25])

    ```
    """
    baselines = [name for name in best if is_baseline(str(name))]
    shared = best[baselines].dropna()
    rows = {}
    baseline = None
    if not shared.empty:
        baseline = str(shared.mean().idxmax())
        for name in best:
            # Rounded, so that equal means of scores, which are kept with six digits, are ties.
            differences = (best[name] - best[baseline]).dropna().round(5)
            if name == baseline or differences.empty:
                continue
            rows[name] = {
                "cells": len(differences),
                "mean": differences.mean(),
                "error": differences.std(ddof=1) / np.sqrt(len(differences)),
                "better": int((differences > 0).sum()),
                "p": wilcoxon(differences).pvalue if differences.any() else np.nan,
            }
    found = pd.DataFrame.from_dict(rows, orient="index", columns=["cells", "mean", "error", "better", "p"])
    found.attrs["baseline"] = baseline
    return found


def differences_table(best: pd.DataFrame) -> str:
    """What [`paired_differences`] finds, for people.

    Args:
        best (`pandas.DataFrame`): As there.

    Returns:
        `str`: a paragraph and a table in Markdown; empty where there are fewer than two cells or nothing to compare.
    """
    found = paired_differences(best)
    if len(best) < 2 or found.empty:
        return ""
    lines: list[list[object]] = []
    for name, row in found.iterrows():
        figure = f"{row['mean']:+.3f}" + ("" if np.isnan(row["error"]) else f" ± {row['error']:.3f}")
        lines.append(
            [
                escape(str(name)),
                f"**{figure}**" if row["p"] < SIGNIFICANT else figure,
                f"{int(row['better'])} of {int(row['cells'])}",
                "" if np.isnan(row["p"]) else f"{row['p']:.3g}",
            ]
        )
    baseline = escape(str(found.attrs["baseline"]))
    said = (
        f"Every strategy at its best learning rate of each cell minus the best baseline, {baseline}: mean ± standard "
        "error over the cells, and Wilcoxon's signed-rank test of the pairs, two-sided and for each line by itself. "
        f"Bold where p is below {SIGNIFICANT:g}, for which it takes {FEWEST_CELLS} cells at least."
    )
    header = ["strategy", f"minus {baseline}", "better in", "p"]
    return f"{said}\n\n{table(header, lines, align='lrrr', escaped=True)}"

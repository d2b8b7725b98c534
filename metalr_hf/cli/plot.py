"""`metalr-hf plot`: the learning rates of a run as a picture."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from matplotlib.backend_bases import FigureCanvasBase

from ..hub.publish import PICTURE, history_file
from ..plots.learning_rates import plot_learning_rates
from ..tuning.history import LRHistory


def main(argv: list[str]) -> int:
    """`metalr-hf plot`: draws the learning rates of a run, from its folder or its `lr_history.csv`.

    Args:
        argv (`list[str]`): The arguments.

    Returns:
        `int`: the exit code.

    Raises:
        FileNotFoundError: if there is no history.
    """
    parser = argparse.ArgumentParser(prog="metalr-hf plot", description="Draws the learning rates of a finished run.")
    parser.add_argument("run", help="folder of a run, an lr_history.csv, or user/name on the Hub")
    parser.add_argument("--kind", choices=("curves", "heatmap"), default="curves", help="default: curves")
    parser.add_argument(
        "--output",
        type=Path,
        help="picture; by default learning_rates.png (learning_rates_heatmap.png) beside the history",
    )
    given = parser.parse_args(argv)
    if given.output is not None:
        _check_ending(given.output)
    file = history_file(given.run)
    # Of a run on the Hub the file lies in the cache.
    beside = file if os.path.exists(given.run) else Path.cwd() / file.name
    picture = PICTURE if given.kind == "curves" else f"{Path(PICTURE).stem}_{given.kind}.png"
    output = given.output or beside.with_name(picture)

    plot_learning_rates(LRHistory.load(file), kind=given.kind).savefig(output, dpi=150, bbox_inches="tight")
    print(output)
    return 0


def _check_ending(output: Path) -> None:
    possible = FigureCanvasBase.get_supported_filetypes()
    if not output.suffix:
        raise ValueError(f"--output={output} needs an ending that says the format, such as .png, .pdf or .svg.")
    if output.suffix[1:].lower() not in possible:
        endings = ", ".join(f".{name}" for name in possible)
        raise ValueError(f"--output={output}: matplotlib cannot write {output.suffix} files. Possible: {endings}.")

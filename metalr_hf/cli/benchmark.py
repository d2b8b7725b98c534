"""`metalr-hf benchmark`: from its arguments to the table, the file and the picture that it leaves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from ..benchmark.cases import BenchmarkArguments, benchmark
from ..benchmark.report import calibration_line, make_tables, notes, write_benchmark
from .arguments import CommandParser


def main(argv: list[str]) -> int:
    """`metalr-hf benchmark`: measures what tuning costs and leaves `benchmark.json` and a picture in `output_dir`.

    Args:
        argv (`list[str]`): The arguments.

    Returns:
        `int`: the exit code.
    """
    run_benchmark(parse_benchmark_arguments(argv))
    return 0


def parse_benchmark_arguments(argv: Sequence[str]) -> BenchmarkArguments:
    """Reads the arguments of `metalr-hf benchmark`.

    Args:
        argv (`Sequence[str]`): The arguments.

    Returns:
        [`~metalr_hf.benchmark.cases.BenchmarkArguments`]

    Raises:
        ValueError: if one is unknown or out of range.
    """
    kind: Any = BenchmarkArguments
    parser = CommandParser(
        kind,
        prog="metalr-hf benchmark",
        description="Measures what a tuned step costs against a plain one, in time and in memory.",
        allow_abbrev=False,
    )
    return parser.parse(argv)[0]


def run_benchmark(arguments: BenchmarkArguments) -> None:
    """Measures, writes `benchmark.json` and `benchmark.png`, and shows the table.

    Args:
        arguments ([`~metalr_hf.benchmark.cases.BenchmarkArguments`]): What to measure.
    """
    console = Console()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("measuring", total=None)
        rows = benchmark(
            arguments, lambda done, total, case: bar.update(task, completed=done, total=total, description=case)
        )
        bar.update(task, completed=len(rows), description="measured")
    summary = write_benchmark(rows, arguments)
    for table in make_tables(summary, arguments):
        console.print(table)
    for line in [calibration_line(rows), *notes(summary, arguments)]:
        if line:
            console.print(line)
    console.print(f"All measurements are in {arguments.output_dir}/benchmark.json", soft_wrap=True)

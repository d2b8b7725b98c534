"""The command line: `metalr-hf train`, `compare`, `benchmark`, `layers`, `plot` and `publish`."""

# torch and transformers are imported inside the commands, so that `metalr-hf --help` answers at once.
from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        argv (`Sequence[str]`, *optional*): The arguments; those of the process by default.

    Returns:
        `int`: the exit code: 0, 2 after bad input, 130 after Ctrl-C.

    Example:

    ```python
    from metalr_hf.cli import main

    main(["train", "--output_dir", "runs/demo"])
    main(["plot", "runs/demo", "--kind", "heatmap"])
    ```
    """
    commands: dict[str, tuple[Callable[[list[str]], int], str]] = {
        "train": (
            train,
            "fine-tune a pretrained image classifier or segmentation network with one tuned learning rate per layer",
        ),
        "compare": (compare, "run fine-tuning strategies side by side on equal budgets"),
        "layers": (layers, "list the layers of a model, each of which gets a learning rate"),
        "benchmark": (benchmark, "measure what a tuned step costs against a plain one, in time and in memory"),
        "plot": (plot, "draw the learning rates of a finished run"),
        "publish": (publish, "upload a finished run to the Hub, with a card of what every layer did"),
    }
    parser = argparse.ArgumentParser(
        prog="metalr-hf",
        description="Fine-tune pretrained vision models with one meta-tuned learning rate per layer.",
        epilog="commands:\n"
        + "\n".join(f"  {name:<11}{what}" for name, (_, what) in commands.items())
        + "\n\n`metalr-hf COMMAND --help` lists the arguments of a command.\n"
        "A first run, on images that come with pip: metalr-hf train --output_dir runs/demo",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=commands, metavar="COMMAND", help=" or ".join(commands))
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="arguments of the command")
    given = parser.parse_args(argv)
    try:
        return commands[given.command][0](given.arguments)
    except KeyboardInterrupt:
        _say("Interrupted.")
        return INTERRUPTED
    except (ValueError, TypeError, OSError, ImportError, RuntimeError) as error:
        if not _is_message_to_user(error):
            raise
        _say(f"metalr-hf {given.command}: {' '.join(str(error).split())}")
        return 2


def train(argv: list[str]) -> int:
    """`metalr-hf train`: fine-tunes, measures the test split and leaves the run's files in `output_dir`.

    Args:
        argv (`list[str]`): The arguments, or a JSON or YAML file with them, which further arguments override.

    Returns:
        `int`: the exit code.
    """
    from ..trainer.checkpoints import usable_checkpoint
    from .arguments import parse_train_arguments
    from .train import prepare_output_dir, run_training

    arguments = parse_train_arguments(argv)
    checkpoint = prepare_output_dir(arguments)
    try:
        run_training(arguments, checkpoint)
    except KeyboardInterrupt:
        last = usable_checkpoint(arguments.training.output_dir)
        if last is None:
            _say("Interrupted before the first checkpoint; --save_strategy and --save_steps say when there is one.")
        else:
            command = shlex.join(["metalr-hf", "train", *_to_resume(argv), "--resume_from_checkpoint", "true"])
            _say(f"Interrupted. The last checkpoint is {last}. Resume with:\n{command}")
        return INTERRUPTED
    return 0


def compare(argv: list[str]) -> int:
    """`metalr-hf compare`: runs strategies side by side and leaves results, report and picture in `output_dir`.

    Args:
        argv (`list[str]`): The arguments, or a YAML or JSON file with them, which further arguments override.

    Returns:
        `int`: the exit code.
    """
    from .compare import parse_compare_arguments, run_comparison

    arguments, tuning = parse_compare_arguments(argv)
    try:
        run_comparison(arguments, tuning)
    except KeyboardInterrupt:
        _say(f"Interrupted. What has run is in {arguments.output_dir}; the same command runs the rest.")
        return INTERRUPTED
    return 0


def layers(argv: list[str]) -> int:
    """`metalr-hf layers`: prints a model's layers, with their tensors, parameters and share, as a table.

    Args:
        argv (`list[str]`): The arguments.

    Returns:
        `int`: the exit code.
    """
    from .layers import show_layers

    show_layers(argv)
    return 0


def benchmark(argv: list[str]) -> int:
    """`metalr-hf benchmark`: measures what tuning costs and leaves `benchmark.json` and a picture in `output_dir`.

    Args:
        argv (`list[str]`): The arguments.

    Returns:
        `int`: the exit code.
    """
    from .benchmark import parse_benchmark_arguments, run_benchmark

    run_benchmark(parse_benchmark_arguments(argv))
    return 0


def plot(argv: list[str]) -> int:
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
    if given.output is not None and not given.output.suffix:
        raise ValueError(f"--output={given.output} needs an ending that says the format, such as .png, .pdf or .svg.")
    from ..hub.publish import PICTURE, history_file
    from ..plots.learning_rates import plot_learning_rates
    from ..tuning.history import LRHistory

    file = history_file(given.run)
    # Of a run on the Hub the file lies in the cache.
    beside = file if os.path.exists(given.run) else Path.cwd() / file.name
    picture = PICTURE if given.kind == "curves" else f"{Path(PICTURE).stem}_{given.kind}.png"
    output = given.output or beside.with_name(picture)

    plot_learning_rates(LRHistory.load(file), kind=given.kind).savefig(output, dpi=150, bbox_inches="tight")
    print(output)
    return 0


def publish(argv: list[str]) -> int:
    """`metalr-hf publish`: uploads a finished run to the Hub.

    Args:
        argv (`list[str]`): The arguments.

    Returns:
        `int`: the exit code.
    """
    parser = argparse.ArgumentParser(prog="metalr-hf publish", description="Uploads a finished run to the Hub.")
    parser.add_argument("run", help="output folder of the run")
    parser.add_argument("--repo_id", required=True, help="user/name on the Hub; made if it is not there")
    parser.add_argument("--private", action="store_true", default=None, help="make it private")
    parser.add_argument("--revision", help="branch to commit to")
    parser.add_argument("--commit_message", default="Upload model", help="default: Upload model")
    given = parser.parse_args(argv)
    from ..hub.publish import publish

    options = {"private": given.private, "revision": given.revision, "commit_message": given.commit_message}
    print(publish(given.run, given.repo_id, **options).repo_url)
    return 0


def _to_resume(argv: Sequence[str]) -> list[str]:
    """A run's arguments without tokens, which a screen must not show, and without how the run itself began."""
    kept: list[str] = []
    dropping = False
    for part in argv:
        if part.startswith("--"):
            name = part.split("=")[0].replace("-", "_")
            dropping = name.endswith("_token") or name in ("__resume_from_checkpoint", "__overwrite_output_dir")
        if not dropping:
            kept.append(part)
    return kept


def _say(message: str) -> None:
    # Of several processes one speaks.
    if os.environ.get("RANK", "0") == "0":
        print(message, file=sys.stderr)


def _is_message_to_user(error: Exception) -> bool:
    """Whether this package raised the error itself; one of a library below it keeps its traceback."""
    if isinstance(error, RuntimeError):
        from ..trainer.meta_batches import UnusableRowError

        # torch's own, such as an exhausted memory, come without a frame of torch where its compiled code raised them.
        return isinstance(error, UnusableRowError)
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and Path(__file__).parents[1] in Path(trace.tb_frame.f_code.co_filename).parents

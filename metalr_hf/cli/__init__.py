"""The command line: `metalr-hf train`, `predict`, `compare` and the others, one module each."""

# A command's module is imported when it is called, so that `metalr-hf --help` answers at once.
from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

INTERRUPTED = 130
COMMANDS = {
    "train": "fine-tune a pretrained image classifier or segmentation network with one tuned learning rate per layer",
    "predict": "write a table of what a trained model says of images",
    "compare": "run fine-tuning strategies side by side on equal budgets",
    "layers": "list the layers of a model, each of which gets a learning rate",
    "benchmark": "measure what a tuned step costs against a plain one, in time and in memory",
    "plot": "draw the learning rates of a finished run",
    "publish": "upload a finished run to the Hub, with a card of what every layer did",
}


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
    parser = argparse.ArgumentParser(
        prog="metalr-hf",
        description="Fine-tune pretrained vision models with one meta-tuned learning rate per layer.",
        epilog="commands:\n"
        + "\n".join(f"  {name:<11}{what}" for name, what in COMMANDS.items())
        + "\n\n`metalr-hf COMMAND --help` lists the arguments of a command.\n"
        "A first run, on images that come with pip: metalr-hf train --output_dir runs/demo",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"metalr_hf {version('metalr_hf')}")
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help=" or ".join(COMMANDS))
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="arguments of the command")
    given = parser.parse_args(argv)
    try:
        with _warnings_without_their_source():
            return import_module(f".{given.command}", __name__).main(given.arguments)
    except KeyboardInterrupt:
        say("Interrupted.")
        return INTERRUPTED
    except (ValueError, TypeError, OSError, ImportError, RuntimeError) as error:
        if not _is_message_to_user(error):
            raise
        say(f"metalr-hf {given.command}: {' '.join(str(error).split())}")
        return 2


def say(message: str) -> None:
    """Prints a message to the user on standard error, in one of several processes only.

    Args:
        message (`str`): The message.
    """
    if os.environ.get("RANK", "0") == "0":
        print(message, file=sys.stderr)


@contextmanager
def _warnings_without_their_source() -> Iterator[None]:
    """Shows warnings without the line of the program that gave them, which is of no use to who did not write it."""
    before = warnings.formatwarning

    def shown(
        message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
    ) -> str:
        return f"{category.__name__}: {message}\n"

    warnings.formatwarning = shown
    try:
        yield
    finally:
        warnings.formatwarning = before


def _is_message_to_user(error: Exception) -> bool:
    """Whether this package raised the error itself; one of a library below it keeps its traceback."""
    if isinstance(error, RuntimeError):
        from ..trainer.batches import UnusableRowError

        # torch's own, such as an exhausted memory, come without a frame of torch where its compiled code raised them.
        return isinstance(error, UnusableRowError)
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and Path(__file__).parents[1] in Path(trace.tb_frame.f_code.co_filename).parents

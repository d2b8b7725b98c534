"""Trainer's checkpoints: is one whole, is it of this run, and are all its weights in the model."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import PreTrainedModel
from transformers.trainer import TRAINER_STATE_NAME
from transformers.utils import SAFE_WEIGHTS_NAME, logging

logger = logging.get_logger(__name__)

SCHEDULER_FILE = "scheduler.pt"


def usable_checkpoint(folder: str | os.PathLike[str] | None) -> str | None:
    """The last complete checkpoint in a folder; one whose writing was interrupted does not count.

    Args:
        folder (`str` or `os.PathLike`, *optional*): Output folder of a run.

    Returns:
        `str`, *optional*: the checkpoint's folder.
    """
    complete = [path for path in checkpoints(Path(folder or ".")) if is_complete(path)]
    return str(max(complete, key=lambda path: int(path.name.split("-")[1]))) if complete else None


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder, complete or not."""
    return sorted(path for path in folder.glob("checkpoint-*") if path.is_dir() and path.name[11:].isdigit())


def is_complete(checkpoint: Path) -> bool:
    """Whether all of a checkpoint was written."""
    # Trainer writes this file last.
    try:
        json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return False
    return True


def check_checkpoint(folder: str | None, layers: Sequence[str]) -> None:
    """Checks that a checkpoint holds the learning rates of these layers. A folder without any passes.

    Args:
        folder (`str` or `None`): The checkpoint.
        layers (`Sequence[str]`): The layers of the model that is to go on from it.

    Raises:
        ValueError: if it is a checkpoint of a run with other layers, or with no learning rate a layer.
    """
    file = os.path.join(folder or "", SCHEDULER_FILE)
    if folder is None or not os.path.isfile(file):
        return
    saved = torch.load(file, weights_only=True).get("layers")
    if saved is None:
        raise ValueError(
            f"{folder} is a checkpoint of a run without layer-wise learning rates. Start from its weights instead: "
            f"load the model from {folder} and call train() without resume_from_checkpoint."
        )
    if list(saved) != list(layers):
        raise ValueError(
            f"{folder} is a checkpoint of a run with other layers: only there "
            f"{[layer for layer in saved if layer not in layers]}, only here "
            f"{[layer for layer in layers if layer not in saved]}, in another order otherwise. Resume with the same "
            "model, frozen parameters and layer_groups."
        )


def load_renamed_weights(model: PreTrainedModel, folder: str | None) -> None:
    """Loads a checkpoint's weights where they are saved under other names than the model's own.

    `save_pretrained` writes some models (ViT among them) under the names of their original release. Trainer looks for
    the model's own names, warns of missing keys, and would go on from untrained weights.

    Args:
        model ([`~transformers.PreTrainedModel`]): Takes the weights. Untouched where the names are its own.
        folder (`str` or `None`): The checkpoint.
    """
    file = os.path.join(folder or "", SAFE_WEIGHTS_NAME)
    if not os.path.isfile(file):
        return
    with safe_open(file, framework="pt") as saved:
        renamed = not set(saved.keys()) <= set(model.state_dict())
    if renamed:
        whole = type(model).from_pretrained(folder, config=model.config, dtype=model.dtype)
        model.load_state_dict(whole.state_dict())
        logger.info(f"Loaded the weights of {folder} again, under the names of their original release.")

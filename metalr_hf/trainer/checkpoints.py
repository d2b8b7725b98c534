"""Checks of Trainer's checkpoints: that one is complete, belongs to this run, and loads all of its weights."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel, Trainer
from transformers.trainer import TRAINER_STATE_NAME, TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, has_length
from transformers.utils import SAFE_WEIGHTS_NAME, logging

from ..settings import check_saved_layers
from .batches import MetaStream

logger = logging.get_logger(__name__)

SCHEDULER_FILE = "scheduler.pt"


def usable_checkpoint(folder: str | os.PathLike[str] | None) -> str | None:
    """The last complete checkpoint in a folder; one whose writing was interrupted does not count.

    Args:
        folder (`str` or `os.PathLike`, *optional*): Output folder of a run.

    Returns:
        `str`, *optional*: the checkpoint's folder.

    Example:

    ```python
    >>> import tempfile
    >>> from pathlib import Path
    >>> from metalr_hf.trainer.checkpoints import usable_checkpoint
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     for step in (9, 10, 11):
    ...         (Path(folder) / f"checkpoint-{step}").mkdir()
    ...         _ = (Path(folder) / f"checkpoint-{step}" / "trainer_state.json").write_text("{}" if step < 11 else "")
    ...     Path(usable_checkpoint(folder)).name
    'checkpoint-10'

    ```
    """
    complete = [path for path in checkpoints(Path(folder or ".")) if is_complete(path)]
    return str(max(complete, key=lambda path: int(path.name.split("-")[1]))) if complete else None


def checkpoint_to_resume(resume_from_checkpoint: str | bool | None, output_dir: str | None) -> str | None:
    """The checkpoint that `Trainer.train(resume_from_checkpoint=...)` is to go on from.

    Args:
        resume_from_checkpoint (`str`, `bool`, *optional*): A folder, or `True` for the last complete checkpoint.
        output_dir (`str`, *optional*): Output folder of the run.

    Returns:
        `str`, *optional*: the checkpoint's folder; `None` to start from the beginning.

    Raises:
        ValueError: if it is `True` and there is no complete checkpoint.

    Example:

    ```python
    >>> from metalr_hf.trainer.checkpoints import checkpoint_to_resume
    >>> checkpoint_to_resume("runs/photos/checkpoint-40", "runs/photos")
    'runs/photos/checkpoint-40'

    ```
    """
    if not isinstance(resume_from_checkpoint, bool):
        return None if resume_from_checkpoint is None else os.fspath(resume_from_checkpoint)
    found = usable_checkpoint(output_dir) if resume_from_checkpoint else None
    if resume_from_checkpoint and found is None:
        raise ValueError(
            f"resume_from_checkpoint=True: there is no complete checkpoint in output_dir={output_dir!r}. Call train() "
            "without it to start from the beginning."
        )
    return found


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder, complete or not.

    Args:
        folder (`pathlib.Path`): The output folder of a run.

    Returns:
        `list[pathlib.Path]`: sorted by name.
    """
    return sorted(path for path in folder.glob("checkpoint-*") if path.is_dir() and path.name[11:].isdigit())


def step_of(checkpoint: str | os.PathLike[str]) -> int:
    """The optimizer step at which a checkpoint was written.

    Args:
        checkpoint (`str` or `os.PathLike`): The folder of a complete checkpoint.

    Returns:
        `int`
    """
    return TrainerState.load_from_json(os.path.join(checkpoint, TRAINER_STATE_NAME)).global_step


def is_complete(checkpoint: Path) -> bool:
    """Whether all of a checkpoint was written.

    Args:
        checkpoint (`pathlib.Path`): Its folder.

    Returns:
        `bool`
    """
    # Trainer writes this file last.
    try:
        json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return False
    return True


def check_checkpoint(folder: str, layers: Sequence[str]) -> None:
    """Checks that a checkpoint holds the learning rates of these layers. One of weights alone passes with a warning.

    Args:
        folder (`str`): The checkpoint.
        layers (`Sequence[str]`): The layers of the model that is to go on from it.

    Raises:
        FileNotFoundError: if there is no such folder.
        ValueError: if it is a checkpoint of a run with other layers, or with no learning rate per layer, or the folder
            of a run.
    """
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"resume_from_checkpoint={folder!r}: there is no such folder.")
    file = os.path.join(folder, SCHEDULER_FILE)
    if not os.path.isfile(file):
        if (last := usable_checkpoint(folder)) is not None:
            raise ValueError(
                f"resume_from_checkpoint={folder!r} is the folder of a run, not a checkpoint: its last one is {last}."
            )
        logger.warning(
            f"{folder} holds weights alone (save_only_model): optimizer, learning rates, schedule and history start "
            "anew, and the run will not end as it would have without the interruption."
        )
        return
    # The collapse guard's first weights are in it too.
    saved = torch.load(file, weights_only=True, mmap=True).get("layers")
    if saved is None:
        raise ValueError(
            f"{folder} is a checkpoint of a run without layer-wise learning rates. Start from its weights instead: "
            f"load the model from {folder} and call train() without resume_from_checkpoint."
        )
    check_saved_layers(list(saved), list(layers), folder)


def load_renamed_weights(model: PreTrainedModel, folder: str | None) -> bool:
    """Loads a checkpoint's weights where they are saved under other names than the model's own.

    `save_pretrained` writes some models (ViT among them) under the names of their original release. Trainer looks for
    the model's own names, warns of missing keys, and would go on from untrained weights.

    Args:
        model ([`~transformers.PreTrainedModel`]): Takes the weights. Untouched where the names are its own.
        folder (`str` or `None`): The checkpoint.

    Returns:
        `bool`: whether there were such weights.
    """
    file = os.path.join(folder or "", SAFE_WEIGHTS_NAME)
    if not os.path.isfile(file):
        return False
    with safe_open(file, framework="pt") as saved:
        kept, own = set(saved.keys()), set(model.state_dict())
    if kept <= own:
        return False
    # What has its own name has been loaded: a head that the user made, which from_pretrained knows nothing of.
    if hasattr(model, "timm_model"):
        model.get_submodule("timm_model").load_state_dict(load_file(file))
    else:
        whole = type(model).from_pretrained(folder, config=model.config, dtype=model.dtype).state_dict()
        if lost := sorted(own - kept - set(whole)):
            raise ValueError(f"{folder} does not hold {lost[0]} and {len(lost) - 1} more tensors of the model.")
        model.load_state_dict({name: whole[name] for name in own - kept}, strict=False)
    logger.info(f"Loaded the weights of {folder} again, under the names of their original release.")
    return True


class CheckpointingTrainer(Trainer):
    """[`~transformers.Trainer`] with complete checkpoints, from which a run resumes bit for bit."""

    model: Any
    lr_scheduler: Any
    _meta_stream: MetaStream | None = None
    _streams = False
    _load_result: Any = None

    def set_initial_training_values(self, args: Any, dataloader: Any) -> Any:
        """Trainer's; whether the length of an epoch is known decides how a run resumes."""
        self._streams = not has_length(dataloader)
        return super().set_initial_training_values(args, dataloader)

    def _init_training_state(
        self, max_steps: int, steps_per_epoch: int, epochs: int, resume_from_checkpoint: str | None, trial: Any
    ) -> tuple[int, int]:
        epochs_trained, batches_trained = super()._init_training_state(
            max_steps, steps_per_epoch, epochs, resume_from_checkpoint, trial
        )
        if resume_from_checkpoint is not None and self.state.global_step >= max_steps:
            # Trainer would begin one more epoch, and notice after its first step. What the average of the weights draws
            # at the end has to be what it drew then.
            self._load_rng_state(resume_from_checkpoint)
            return epochs, 0
        # Of a stream Trainer does not know the length, takes the whole run for one epoch and, in a later one, skips as
        # many batches as were ever trained on. How far the epoch has come is in the state. No public hook is there.
        if batches_trained and self._streams:
            epochs_trained = int(self.state.epoch)
            # The saved run's `max_steps`: its epochs were counted in those.
            saved = TrainerState.load_from_json(os.path.join(resume_from_checkpoint or "", TRAINER_STATE_NAME))
            steps = round((self.state.epoch - epochs_trained) * saved.max_steps)
            batches_trained = steps * self.args.gradient_accumulation_steps
        return epochs_trained, batches_trained

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        if self.is_fsdp_enabled:
            # Trainer looks whether the best checkpoint is there before its first shard is, and each process by itself.
            checkpoint = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            os.makedirs(os.path.join(self._get_output_dir(trial=trial), checkpoint), exist_ok=True)
        try:
            super()._save_checkpoint(model, trial)
        except Exception as error:
            # What torch says of a full disk is "iostream error" or less.
            folder = str(self.args.output_dir)
            free = shutil.disk_usage(folder).free
            weights = sum(p.numel() * p.element_size() for p in self.model.parameters())
            if "No space left" in str(error) or free < weights:
                raise OSError(
                    errno.ENOSPC,
                    f"The disk is full: the checkpoint of step {self.state.global_step} could not be written, with "
                    f"{free / 2**20:.1f} MiB free in {folder}. The last complete checkpoint is "
                    f"{usable_checkpoint(folder)}; make room and resume from it, or set save_total_limit",
                ) from error
            raise

    # Trainer's private methods are the only ones that all processes run when a checkpoint is saved.
    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self._meta_stream is not None and self.args.world_size > 1:
            # One process writes the state of all.
            self._meta_stream.gather_places(gather_object)
        super()._save_optimizer_and_scheduler(output_dir)
        # The shards of a step held open are gathered by all.
        if self.is_fsdp_enabled and not self.args.should_save:
            self.lr_scheduler.state_dict()

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        # What is written next marks the checkpoint as complete: it has to wait for the files of the other processes.
        self.accelerator.wait_for_everyone()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._load_renamed_weights(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        self._load_renamed_weights(self.state.best_model_checkpoint)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        # Not before it is known whether what seems to be missing has another name.
        self._load_result = load_result

    def _load_renamed_weights(self, folder: str | None) -> None:
        loaded = isinstance(self.model, PreTrainedModel) and not self.is_fsdp_enabled
        loaded = loaded and load_renamed_weights(self.model, folder)
        if self._load_result is not None and not loaded:
            super()._issue_warnings_after_load(self._load_result)
        self._load_result = None

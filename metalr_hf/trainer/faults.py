"""Models and runs that cannot be tuned, runs that are too short or too small for it, and batches that spoil one."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from transformers import TrainingArguments
from transformers.trainer_utils import has_length
from transformers.utils import logging

from ..tuning.calibration import LOOKS
from .defaults import calibrates

if TYPE_CHECKING:
    from .metalr import MetaLRTrainer

logger = logging.get_logger(__name__)


def refuse_deepspeed(args: TrainingArguments) -> None:
    """Raises `ValueError` if the run is to use DeepSpeed, by its arguments or by `accelerate launch`.

    Args:
        args (`TrainingArguments`): The arguments.

    Example:

    ```python
    >>> from transformers import TrainingArguments
    >>> from metalr_hf.trainer.faults import refuse_deepspeed
    >>> refuse_deepspeed(TrainingArguments("runs/example"))

    ```
    """
    if args.deepspeed or os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() in ("true", "1"):
        raise ValueError(
            f"deepspeed={args.deepspeed!r}: DeepSpeed steps the optimizer inside its backward, so there is no step "
            "to tune. Use FSDP instead (`fsdp=True`, or `accelerate config`)."
        )


def refuse_sparse_gradients(model: nn.Module) -> None:
    """Raises `ValueError` if a layer has sparse gradients, whose inner products with a step are not taken here.

    Args:
        model (`torch.nn.Module`): The model that is about to be trained.

    Example:

    ```python
    >>> import torch
    >>> from metalr_hf.trainer.faults import refuse_sparse_gradients
    >>> refuse_sparse_gradients(torch.nn.Embedding(4, 2))

    ```
    """
    for name, module in model.named_modules():
        if getattr(module, "sparse", False) and any(p.requires_grad for p in module.parameters(recurse=False)):
            raise ValueError(
                f"{name or type(module).__name__} has sparse gradients (sparse=True), for which there is no "
                "hypergradient and no calibration. Make it with sparse=False, freeze it, or set hyper_lr=0 and "
                "calibrate=False."
            )


def refuse_label_smoothing(model: nn.Module | None, factor: float) -> None:
    """Raises `ValueError` if labels are to be smoothed for a module that Trainer cannot ask what its task is.

    Args:
        model (`torch.nn.Module`, *optional*): The model.
        factor (`float`): `label_smoothing_factor` of the training arguments.

    Example:

    ```python
    >>> import torch
    >>> from metalr_hf.trainer.faults import refuse_label_smoothing
    >>> refuse_label_smoothing(torch.nn.Linear(4, 2), factor=0.0)

    ```
    """
    if factor and model is not None and not hasattr(model, "config"):
        raise ValueError(
            f"label_smoothing_factor={factor}: Trainer smooths labels of models with a config only, and this one has "
            "none. Smooth them in the loss: compute_loss_func=lambda outputs, labels, num_items_in_batch=None: "
            f"cross_entropy(outputs.logits, labels, label_smoothing={factor})."
        )


def warn_of_sizes(trainer: MetaLRTrainer, steps: int) -> None:
    """Warns of runs that are too short to measure start rates, and of steps that take all images at once.

    Args:
        trainer ([`~metalr_hf.MetaLRTrainer`]): The trainer, before a run.
        steps (`int`): How many optimizer steps the run has.

    Example:

    ```python
    >>> import torch
    >>> from metalr_hf import MetaLRTrainer, MetaLRTrainingArguments
    >>> from metalr_hf.trainer.faults import warn_of_sizes
    >>> images = [{"pixel_values": torch.randn(4), "labels": i % 2} for i in range(64)]
    >>> args = MetaLRTrainingArguments("runs/example", save_strategy="no", report_to="none", use_cpu=True)
    >>> warn_of_sizes(MetaLRTrainer(torch.nn.Linear(4, 2), args, train_dataset=images), steps=24)

    ```
    """
    args, rows = trainer.args, trainer.train_dataset
    if calibrates(args) and steps < len(LOOKS):
        logger.warning(
            f"A run of {steps} optimizer step{'s' * (steps > 1)} is too short to measure its start learning rates, "
            f"which takes {len(LOOKS)}: they are only a first guess. Train for longer, or set calibrate=False and a "
            "learning_rate."
        )
    images = trainer._train_batch_size * args.gradient_accumulation_steps * args.world_size
    if trainer.meta_source == "next_batch" and args.hyper_lr > 0 and has_length(rows) and images >= len(rows) > 0:
        logger.warning(
            f"Every step takes all {len(rows)} training images: the next batch, which is to tell how well a step does "
            "on other images, has the same ones. Set a smaller per_device_train_batch_size or "
            "gradient_accumulation_steps, or hold images out with meta_split."
        )


def describe_bad_batch(inputs: Any, step: int) -> str:
    """What is known of a batch whose training loss is not finite.

    Args:
        inputs (`Mapping` or `Sequence`): The batch.
        step (`int`): The optimizer step, from 0.

    Returns:
        `str`: which rows of it hold values that are not finite, if any.

    Example:

    ```python
    >>> import torch
    >>> from metalr_hf.trainer.faults import describe_bad_batch
    >>> describe_bad_batch({"pixel_values": torch.tensor([[0.0], [float("nan")]])}, step=3).split(":")[0]
    'The training loss of step 4 is not finite'

    ```
    """
    named = inputs.items() if isinstance(inputs, Mapping) else enumerate(inputs) if isinstance(inputs, Sequence) else ()
    found = []
    for name, values in named:
        if isinstance(values, Tensor) and values.is_floating_point() and values.dim():
            rows = (~values.isfinite()).flatten(1).any(1) if values.dim() > 1 else ~values.isfinite()
            if rows.any():
                found.append(f"{name} of its rows {rows.nonzero()[:, 0].tolist()[:8]}")
    why = (
        f"{', '.join(found)} (from 0) hold values that are not finite. Mend these rows or leave them out"
        if found
        else "its inputs are finite, so that the loss or the model overflowed. Look at the labels and the precision"
    )
    return (
        f"The training loss of step {step + 1} is not finite: {why}. The weights may be spoilt from here on, as with "
        "the stock Trainer; this is said once."
    )

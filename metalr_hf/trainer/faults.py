"""Models that cannot be tuned, and batches that spoil a run: what is said of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn


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

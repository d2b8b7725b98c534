"""A validation pass: its gradient in place of the training one, and all figures of it in one transfer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor


def validation_gradient(
    meta_loss: Callable[[], Tensor], parameters: Iterable[Tensor], scale: float | Tensor = 1.0
) -> Tensor:
    """Replaces the gradients of the parameters by those of the validation loss.

    Args:
        meta_loss (`Callable`): Takes nothing and returns the scalar validation loss.
        parameters (`Iterable[torch.Tensor]`): The parameters whose training gradients are dropped first, which frees
            their memory for the validation pass.
        scale (`float` or `torch.Tensor` of shape `()`, *optional*, defaults to 1.0): Factor of the loss in the
            backward, and so of the gradients: those of float16 are too small for it without one.

    Returns:
        `torch.Tensor` of shape `()`: the validation loss, detached and without the factor.

    Raises:
        ValueError: if the validation loss is not a scalar that depends on a trainable parameter.

    Example:

    ```python
    >>> import torch
    >>> from metalr_hf.tuning.hypergradient.validation import validation_gradient
    >>> weight = torch.nn.Parameter(torch.tensor([2.0]))
    >>> weight.grad = torch.tensor([100.0])
    >>> validation_gradient(lambda: (weight**2).sum(), [weight]), weight.grad
    (tensor(4.), tensor([4.]))

    ```
    """
    clear_gradients(parameters)
    with torch.enable_grad():
        loss = meta_loss()
        if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
            raise ValueError(
                f"meta_loss must return a scalar tensor that depends on the model's parameters, but returned {loss!r}. "
                "Return the loss itself, not loss.item() or loss.detach()."
            )
        (loss * scale).backward()
    return loss.detach()


def gather(
    products: Tensor,
    loss: Tensor | None,
    overflow_flags: Sequence[Tensor],
    sum_by_layer: Callable[[Tensor], Tensor],
    reduce: Callable[[Tensor], Tensor] | None = None,
) -> tuple[float, Tensor, bool]:
    """Brings all figures of a tuned step to the CPU, in the only wait for the device that the step has.

    Args:
        products (`torch.Tensor` of shape `(parameters,)`): Inner products.
        loss (`torch.Tensor` of shape `()`, *optional*): The validation loss.
        overflow_flags (`Sequence[torch.Tensor]`): Above zero where gradients overflowed.
        sum_by_layer (`Callable`): Sums figures of parameters up to figures of layers.
        reduce (`Callable`, *optional*): Averages a tensor over all processes.

    Returns:
        `tuple[float, torch.Tensor, bool]`: the loss (NaN without one, or after an overflow), the products of every
        layer (float64) and whether there was an overflow.
    """
    if reduce is not None:
        # One figure per layer over the wire.
        products = sum_by_layer(products)
    loss = products.new_full((), math.nan) if loss is None else loss.detach().to(products)
    values = torch.cat([loss.reshape(1), products])
    if reduce is not None:
        values = reduce(values)
    flags = [flag.to(values).reshape(1) for flag in overflow_flags]
    # In this order: Apple's GPUs have no float64.
    figures = torch.cat([values, *flags]).cpu().double()
    loss, products, flags_seen = figures.split([1, len(products), len(flags)])
    overflowed = bool(flags_seen.any())
    by_layer = sum_by_layer(products) if reduce is None else products
    return math.nan if overflowed else float(loss), by_layer, overflowed


def clear_gradients(parameters: Iterable[Tensor]) -> None:
    """Sets every gradient to `None`.

    Args:
        parameters (`Iterable[torch.Tensor]`): The parameters.
    """
    for p in parameters:
        p.grad = None

"""What the scheduler reads off an optimizer: the one inside wrappers, its layers, their start rates, overflow."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim import Optimizer


def unwrap(optimizer: Optimizer) -> Optimizer:
    """The torch optimizer inside accelerate's wrappers, which know nothing of step hooks."""
    while type(optimizer).__module__.startswith("accelerate."):
        optimizer = optimizer.optimizer  # type: ignore[attr-defined]
    return optimizer


def overflow_flags(optimizer: Optimizer) -> list[Tensor]:
    """The flag that `GradScaler` leaves on a fused optimizer during its step: above zero if gradients overflowed."""
    flag = getattr(optimizer, "found_inf", None)
    return [] if flag is None else [flag]


def layer_of_groups(optimizer: Optimizer) -> list[str]:
    """The layer of every param group; a group without one is a layer of its own."""
    return [group.get("layer", f"group_{i}") for i, group in enumerate(optimizer.param_groups)]


def start_learning_rates(optimizer: Optimizer, group_layers: list[str], layers: list[str]) -> Tensor:
    """Where the layers start.

    Args:
        optimizer (`torch.optim.Optimizer`): The optimizer.
        group_layers (`list[str]`): The layer of every param group.
        layers (`list[str]`): The layers.

    Returns:
        `torch.Tensor` of shape `(layers,)`, float64.

    Raises:
        ValueError: if the groups of a layer start apart, or there is no rate.
    """
    rates: dict[str, float] = {}
    for group, layer in zip(optimizer.param_groups, group_layers, strict=True):
        if group.get("lr") is None:
            raise ValueError(
                f"{type(optimizer).__name__} cannot be tuned: it has no learning rate (lr=None) but makes its own. "
                "Give it one; Adafactor of transformers also needs relative_step=False."
            )
        rate = float(group.get("initial_lr", group["lr"]))
        if rates.setdefault(layer, rate) != rate:
            raise ValueError(
                f"The param groups of layer {layer!r} start at different learning rates, {rates[layer]} and {rate}. "
                "Give them the same lr, or layer names of their own."
            )
    return torch.tensor([rates[layer] for layer in layers], dtype=torch.float64)

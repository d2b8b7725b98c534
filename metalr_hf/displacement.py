"""The step that an optimizer has just taken, read off the state that it keeps anyway: no copy of the parameters."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer

from .sharding import local

# Of a param group, what the length and direction of a step depend on besides the state.
OPTIONS = {Adam: ("lr", "betas", "eps", "weight_decay", "amsgrad"), SGD: ("lr",)}


class StepFromState:
    """The last step of Adam, AdamW or SGD with momentum, as their moments tell it, until the next one.

    Where the optimizer has no such state (plain or Nesterov's SGD needs the gradient, which is gone) and for
    parameters in half precision, whose step is rounded, the parameters have to be copied.

    Args:
        optimizer (`torch.optim.Optimizer`): The optimizer, not wrapped.
        parameters (`Sequence[torch.Tensor]`): Those that are moved.
        options (`Sequence[dict]`): Of each, the options that the step is taken with; see [`step_options`].
    """

    def __init__(self, optimizer: Optimizer, parameters: Sequence[Tensor], options: Sequence[dict[str, Any]]):
        self.optimizer, self.parameters = optimizer, parameters
        self.options = [dict(own) for own in options]
        self._corrections: tuple[Sequence[Any], Sequence[Any]] | None = None

    def back(self, piece: slice, where: Sequence[Tensor]) -> list[Tensor]:
        """-Δ = θ - θ̂ of some parameters.

        Args:
            piece (`slice`): Which parameters.
            where (`Sequence[torch.Tensor]`): θ̂ of those, this process's parts.

        Returns:
            `list[torch.Tensor]`: new tensors, like `where`.
        """
        states = [self.optimizer.state[p] for p in self.parameters[piece]]
        options = self.options[piece]
        if isinstance(self.optimizer, SGD):
            rates = [own["lr"] for own in options]
            return list(torch._foreach_mul([local(state["momentum_buffer"]) for state in states], rates))
        first, second = (corrections[piece] for corrections in self._bias_corrections())
        moment = "max_exp_avg_sq" if options[0]["amsgrad"] else "exp_avg_sq"
        denominators = torch._foreach_sqrt([local(state[moment]) for state in states])
        torch._foreach_mul_(denominators, second)
        torch._foreach_add_(denominators, [own["eps"] for own in options])
        back = torch._foreach_div([local(state["exp_avg"]) for state in states], denominators)
        # Decoupled decay is α λ θ = α λ (θ̂ - Δ), and so -Δ = (1 + q) α û + q θ̂ with q = α λ / (1 - α λ).
        decay = [own["lr"] * own["weight_decay"] / (1 - own["lr"] * own["weight_decay"]) for own in options]
        torch._foreach_mul_(back, first)
        torch._foreach_mul_(back, [own["lr"] * (1 + q) for own, q in zip(options, decay, strict=True)])
        if any(decay):
            for tensor, stepped, q in zip(back, where, decay, strict=True):
                tensor.add_(stepped, alpha=q)
        return list(back)

    def scale(self, piece: slice, ratio: float) -> None:
        """Notes that the step of some parameters is now so many times as long."""
        for own in self.options[piece]:
            own["lr"] *= ratio

    def _bias_corrections(self) -> tuple[Sequence[Any], Sequence[Any]]:
        if self._corrections is None:
            steps = [self.optimizer.state[p]["step"] for p in self.parameters]
            betas = [own["betas"] for own in self.options]
            if any(isinstance(step, Tensor) and step.device.type != "cpu" for step in steps):
                # Not brought to the CPU, which would wait for the device.
                count = torch.stack([step.reshape(()) for step in steps]).double()
                beta1, beta2 = count.new_tensor(betas).unbind(1)
                self._corrections = (1 / (1 - beta1**count)).unbind(), (1 - beta2**count).rsqrt().unbind()
            else:
                counts = [float(step) for step in steps]
                self._corrections = (
                    [1 / (1 - beta1**n) if n else math.nan for (beta1, _), n in zip(betas, counts, strict=True)],
                    [(1 - beta2**n) ** -0.5 if n else math.nan for (_, beta2), n in zip(betas, counts, strict=True)],
                )
        return self._corrections


def step_options(optimizer: Optimizer | None, parameters: Iterable[Tensor]) -> list[dict[str, Any]] | None:
    """The options of every parameter that its coming step depends on.

    Args:
        optimizer (`torch.optim.Optimizer`, *optional*): The optimizer, not wrapped.
        parameters (`Iterable[torch.Tensor]`): Those that the step will move.

    Returns:
        `list[dict]`, *optional*: plain numbers, or `None` if the state will not tell the step.
    """
    if optimizer is None or type(optimizer) not in (Adam, AdamW, SGD):
        return None
    by_parameter: dict[int, dict[str, Any]] = {}
    for group in optimizer.param_groups:
        own = _group_options(optimizer, group)
        by_parameter |= {id(p): own for p in group["params"] if own is not None and _is_full_precision(p)}
    found = [by_parameter.get(id(p)) for p in parameters]
    options = [own for own in found if own is not None]
    return options if len(options) == len(found) else None


def _group_options(optimizer: Optimizer, group: dict[str, Any]) -> dict[str, Any] | None:
    own = {name: group[name] for name in OPTIONS[SGD if isinstance(optimizer, SGD) else Adam]}
    numbers = [own["lr"], *own.get("betas", ())]
    if any(isinstance(number, Tensor) for number in numbers) or group.get("differentiable"):
        return None
    if isinstance(optimizer, SGD):
        return own if group["momentum"] and not group["nesterov"] else None
    if not group.get("decoupled_weight_decay", isinstance(optimizer, AdamW)):
        # Folded into the moments.
        own["weight_decay"] = 0.0
    return own if own["lr"] * own["weight_decay"] < 1 else None


def _is_full_precision(parameter: Tensor) -> bool:
    # Apple's GPUs have no float64, which the powers of beta need.
    return parameter.dtype in (torch.float32, torch.float64) and parameter.device.type != "mps"

"""Computes the last optimizer step from the state of the optimizer, without a copy of the parameters."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer

from ..sharding import local

# Of a param group, what the length and direction of a step depend on besides the state.
OPTIONS = {Adam: ("lr", "betas", "eps", "weight_decay", "amsgrad"), SGD: ("lr",)}


@dataclass
class Backwards:
    """-Δ = θ - θ̂ of some parameters, as length · direction + decay · θ̂.

    Args:
        directions (`list[torch.Tensor]`): A tensor a parameter, like its part in this process.
        lengths (`list[float]`, *optional*): A factor a parameter; 1 by default.
        decays (`list[float]`, *optional*): The share of θ̂ itself in it, a parameter each; 0 by default.

    Example:

    ```python
    >>> import torch
    >>> from metalr_hf.tuning.hypergradient.displacement import Backwards
    >>> back = Backwards([torch.tensor([1.0, -2.0])], lengths=[0.1], decays=[0.5])
    >>> stepped = [torch.tensor([4.0, 4.0])]
    >>> back.add_to(stepped, 1.0)
    >>> stepped  # 4 + 0.1 · (1, -2) + 0.5 · 4
    [tensor([6.1000, 5.8000])]

    ```
    """

    directions: list[Tensor]
    lengths: list[float] | None = None
    decays: list[float] | None = None

    def add_to(self, stepped: list[Tensor], share: float) -> None:
        """Moves parameters that stand at θ̂ back by a share of the step.

        Args:
            stepped (`list[torch.Tensor]`): This process's parts of them.
            share (`float`): 1 goes back to where the step began.
        """
        if self.lengths is None or self.decays is None:
            torch._foreach_add_(stepped, self.directions, alpha=share)
            return
        for part, direction, length, decay in zip(stepped, self.directions, self.lengths, self.decays, strict=True):
            if decay:
                part.mul_(1 + share * decay)
            part.add_(direction, alpha=share * length)

    def products(self, gradients: list[Tensor | None], stepped: list[Tensor]) -> list[Tensor]:
        """⟨gradient, -Δ⟩ of every parameter.

        Args:
            gradients (`list[torch.Tensor]`): This process's parts of the gradients; `None` counts as zero.
            stepped (`list[torch.Tensor]`): θ̂.
        """
        products = [dot(g, direction) for g, direction in zip(gradients, self.directions, strict=True)]
        if self.lengths is None or self.decays is None:
            return products
        products = [product * length for product, length in zip(products, self.lengths, strict=True)]
        for i, decay in enumerate(self.decays):
            if decay:
                products[i] = products[i] + decay * dot(gradients[i], stepped[i])
        return products


def dot(gradient: Tensor | None, direction: Tensor) -> Tensor:
    """Inner product in single precision at least; without a gradient, zero.

    Args:
        gradient (`torch.Tensor`, *optional*): Of any shape.
        direction (`torch.Tensor`): Of the same.

    Returns:
        `torch.Tensor` of shape `()`, on the device of `direction`.

    Example:

    ```python
    >>> import torch
    >>> from metalr_hf.tuning.hypergradient.displacement import dot
    >>> dot(torch.ones(2, 2), torch.full((2, 2), 3.0)), dot(None, torch.ones(2, 2))
    (tensor(12.), tensor(0.))

    ```
    """
    if gradient is None:
        return torch.zeros((), dtype=torch.promote_types(direction.dtype, torch.float32), device=direction.device)
    if gradient.dtype in (torch.float32, torch.float64):
        return torch.dot(gradient.reshape(-1), direction.reshape(-1))
    # Half precision is too coarse for the sum over a whole tensor.
    return torch.dot(gradient.reshape(-1).float(), direction.reshape(-1).float())


class StepFromState:
    """The last step of Adam, AdamW or SGD with momentum, computed from their moments; valid until the next step.

    Where the optimizer has no such state (plain or Nesterov's SGD needs the gradient, which is gone) and for
    parameters in half precision, whose step is rounded, the parameters have to be copied.

    Args:
        optimizer (`torch.optim.Optimizer`): The optimizer, not wrapped.
        parameters (`Sequence[torch.Tensor]`): Those that are moved.
        options (`Sequence[dict]`): Of each, the options that the step is taken with; see [`step_options`].

    Example:

    ```python
    >>> import torch
    >>> from metalr_hf.tuning.hypergradient.displacement import StepFromState, step_options
    >>> weight = torch.nn.Parameter(torch.tensor([1.0]))
    >>> weight.grad = torch.tensor([3.0])
    >>> optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9)
    >>> last_step = StepFromState(optimizer, [weight], step_options(optimizer, [weight]))
    >>> optimizer.step()
    >>> last_step.back(slice(0, 1))  # -Δ = 0.1 · 3
    Backwards(directions=[tensor([3.])], lengths=[0.1], decays=[0.0])

    ```
    """

    def __init__(self, optimizer: Optimizer, parameters: Sequence[Tensor], options: Sequence[dict[str, Any]]):
        self.optimizer, self.parameters = optimizer, parameters
        self.options = [dict(own) for own in options]
        self._corrections: tuple[Sequence[Any], Sequence[Any]] | None = None

    def back(self, piece: slice) -> Backwards:
        """-Δ of some parameters, worked out anew.

        Args:
            piece (`slice`): Which.
        """
        states = [self.optimizer.state[p] for p in self.parameters[piece]]
        options = self.options[piece]
        if isinstance(self.optimizer, SGD):
            buffers = [local(state["momentum_buffer"]) for state in states]
            return Backwards(buffers, [own["lr"] for own in options], [0.0] * len(options))
        moment = "max_exp_avg_sq" if options[0]["amsgrad"] else "exp_avg_sq"
        roots = torch._foreach_sqrt([local(state[moment]) for state in states])
        first, second = (corrections[piece] for corrections in self._bias_corrections())
        epsilons = [own["eps"] for own in options]
        lengths = [own["lr"] for own in options]
        # Adam's step is α m c₁ / (√v c₂ + ε). Numbers go into ε and the length, and save two passes over the tensors.
        if all(isinstance(c, float) for c in second):
            torch._foreach_add_(roots, [eps / c for eps, c in zip(epsilons, second, strict=True)])
            lengths = [rate * c1 / c2 for rate, c1, c2 in zip(lengths, first, second, strict=True)]
        else:
            torch._foreach_mul_(roots, list(second))
            torch._foreach_add_(roots, epsilons)
            torch._foreach_div_(roots, list(first))
        directions = [
            torch.div(local(state["exp_avg"]), root, out=root) for state, root in zip(states, roots, strict=True)
        ]
        # Decoupled decay is α λ θ = α λ (θ̂ - Δ), and so -Δ = (1 + q) α û + q θ̂ with q = α λ / (1 - α λ).
        decays = [own["lr"] * own["weight_decay"] / (1 - own["lr"] * own["weight_decay"]) for own in options]
        lengths = [length * (1 + q) for length, q in zip(lengths, decays, strict=True)]
        return Backwards(directions, lengths, decays)

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
                self._corrections = bias_corrections(count, betas)
            else:
                counts = [float(step) for step in steps]
                self._corrections = (
                    [1 / (1 - beta1**n) if n else math.nan for (beta1, _), n in zip(betas, counts, strict=True)],
                    [(1 - beta2**n) ** -0.5 if n else math.nan for (_, beta2), n in zip(betas, counts, strict=True)],
                )
        return self._corrections


def bias_corrections(count: Tensor, betas: Sequence[tuple[float, float]]) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """1 / (1 - β₁ⁿ) and 1 / √(1 - β₂ⁿ) of every parameter, without waiting for the device.

    Args:
        count (`torch.Tensor` of shape `(parameters,)`, float64): The steps n that each has taken.
        betas (`Sequence[tuple[float, float]]`): β₁ and β₂ of each.

    Returns:
        `tuple`: the two corrections, each of a tensor of shape `()` a parameter.

    Example:

    ```python
    >>> import torch
    >>> from metalr_hf.tuning.hypergradient.displacement import bias_corrections
    >>> first, second = bias_corrections(torch.tensor([1.0], dtype=torch.float64), [(0.5, 0.75)])
    >>> first[0].item(), second[0].item()
    (2.0, 2.0)

    ```
    """
    # Filled on the device: a tensor made of numbers would be copied there, which waits.
    beta1, beta2 = (torch.stack([count.new_full((), beta) for beta in side]) for side in zip(*betas, strict=True))
    return (1 / (1 - beta1**count)).unbind(), (1 - beta2**count).rsqrt().unbind()


def step_options(optimizer: Optimizer | None, parameters: Sequence[Tensor]) -> list[dict[str, Any]] | None:
    """The options of every parameter that its coming step depends on.

    Args:
        optimizer (`torch.optim.Optimizer`, *optional*): The optimizer, not wrapped.
        parameters (`Iterable[torch.Tensor]`): Those that the step will move.

    Returns:
        `list[dict]`, *optional*: plain numbers, or `None` if the state will not tell the step.

    Example:

    ```python
    >>> import torch
    >>> from metalr_hf.tuning.hypergradient.displacement import step_options
    >>> weight = torch.nn.Parameter(torch.ones(3))
    >>> step_options(torch.optim.SGD([weight], lr=0.1, momentum=0.9), [weight])
    [{'lr': 0.1}]
    >>> step_options(torch.optim.SGD([weight], lr=0.1), [weight]) is None  # The gradient is needed, and gone.
    True

    ```
    """
    if optimizer is None or type(optimizer) not in (Adam, AdamW, SGD):
        return None
    by_parameter: dict[int, dict[str, Any]] = {}
    for group in optimizer.param_groups:
        own = _group_options(optimizer, group)
        by_parameter |= {id(p): own for p in group["params"] if own is not None and _is_full_precision(p)}
    found = [by_parameter.get(id(p)) for p in parameters]
    options = [own for own in found if own is not None]
    same_moments = len({own.get("amsgrad") for own in options}) <= 1
    # Steps are counted on the device of their parameter, and their corrections are worked out together.
    one_device = len({p.device for p in parameters}) <= 1
    return options if len(options) == len(found) and same_moments and one_device else None


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

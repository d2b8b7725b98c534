"""The interface between scheduler and optimizer: step hooks, layers, learning rates, overflow of gradients."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer

_HOOKS: weakref.WeakKeyDictionary[Optimizer, list[torch.utils.hooks.RemovableHandle]] = weakref.WeakKeyDictionary()


class StepListener(Protocol):
    """The methods that are called before and after every step of an optimizer."""

    def before_optimizer_step(self, optimizer: Optimizer) -> None: ...

    def after_optimizer_step(self, optimizer: Optimizer) -> None: ...


def listen_to_steps(optimizer: Optimizer, listener: StepListener) -> None:
    """Registers hooks that call the listener at every step. A listener of an earlier run is no longer called.

    Args:
        optimizer (`torch.optim.Optimizer`): The optimizer.
        listener ([`StepListener`]): Kept by a weak reference: when it is gone, nothing is told.
    """
    # Weak, so that a scheduler which is gone neither lives on in its optimizer nor tunes it any more.
    reference = weakref.ref(listener)

    def before(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if (own := reference()) is not None:
            refuse_closure(args, kwargs)
            own.before_optimizer_step(optimizer)

    def after(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if (own := reference()) is not None:
            own.after_optimizer_step(optimizer)

    base = unwrap(optimizer)
    for hook in _HOOKS.get(base, []):
        hook.remove()
    _HOOKS[base] = [base.register_step_pre_hook(before), base.register_step_post_hook(after)]


def refuse_closure(args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Raises `ValueError` if a step is given a closure, which would compute the gradients after they are read.

    Args:
        args (`Sequence`): What `optimizer.step` was called with, the optimizer first.
        kwargs (`Mapping[str, Any]`): The same by keyword.
    """
    if kwargs.get("closure") is not None or any(value is not None for value in args[1:]):
        raise ValueError(
            "optimizer.step(closure) cannot be tuned: the gradients have to be there before the step. Call the closure "
            "first: closure(); optimizer.step()."
        )


def unwrap(optimizer: Optimizer) -> Optimizer:
    """The torch optimizer inside accelerate's wrappers, which know nothing of step hooks.

    Args:
        optimizer (`torch.optim.Optimizer`): The optimizer, wrapped or not.

    Returns:
        `torch.optim.Optimizer`
    """
    while type(optimizer).__module__.startswith("accelerate."):
        optimizer = optimizer.optimizer  # type: ignore[attr-defined]
    return optimizer


def overflow_flags(optimizer: Optimizer) -> list[Tensor]:
    """The flag that `GradScaler` leaves on a fused optimizer during its step: above zero if gradients overflowed.

    Args:
        optimizer (`torch.optim.Optimizer`): The optimizer.

    Returns:
        `list[torch.Tensor]`: one flag of shape `()`, or none outside such a step.
    """
    flag = getattr(optimizer, "found_inf", None)
    return [] if flag is None else [flag]


def only_creates_state(optimizer: Optimizer) -> bool:
    """Whether the coming step is not a training step, but a step of length 0 that only creates the optimizer's state.

    `torch.distributed.checkpoint` takes such a step before it loads the state of a fresh optimizer.

    Args:
        optimizer (`torch.optim.Optimizer`): The optimizer.

    Returns:
        `bool`

    Example:

    ```python
    >>> import torch
    >>> from metalr_hf.tuning.optimizers import only_creates_state
    >>> weight = torch.nn.Parameter(torch.zeros(1))
    >>> only_creates_state(torch.optim.AdamW([weight], lr=0.0)), only_creates_state(torch.optim.AdamW([weight]))
    (True, False)

    ```
    """
    return not optimizer.state and all(float(group["lr"]) == 0 for group in optimizer.param_groups)


def layer_of_groups(optimizer: Optimizer) -> list[str]:
    """The layer of every param group; a group without one is a layer of its own.

    Args:
        optimizer (`torch.optim.Optimizer`): The optimizer.

    Returns:
        `list[str]`: the layer name of every param group.

    Example:

    ```python
    >>> import torch
    >>> from metalr_hf.tuning.optimizers import layer_of_groups
    >>> groups = [{"params": [torch.zeros(1)], "layer": "stem"}, {"params": [torch.zeros(1)]}]
    >>> layer_of_groups(torch.optim.SGD(groups))
    ['stem', 'group_1']

    ```
    """
    return [group.get("layer", f"group_{i}") for i, group in enumerate(optimizer.param_groups)]


def start_learning_rates(
    optimizer: Optimizer, group_layers: list[str], layers: list[str]
) -> tuple[Tensor, list[float]]:
    """Where the layers and the param groups start.

    Args:
        optimizer (`torch.optim.Optimizer`): The optimizer.
        group_layers (`list[str]`): The layer of every param group.
        layers (`list[str]`): The layers.

    Returns:
        `tuple[torch.Tensor, list[float]]`: the highest rate of every layer's groups, `(layers,)`, float64; the rate of
            every group.

    Raises:
        ValueError: if there is no rate.
    """
    rates: list[float] = []
    for group in optimizer.param_groups:
        if group.get("lr") is None:
            raise ValueError(
                f"{type(optimizer).__name__} cannot be tuned: it has no learning rate (lr=None) but makes its own. "
                "Give it one; Adafactor of transformers also needs relative_step=False."
            )
        rates.append(float(group.get("initial_lr", group["lr"])))
    highest = {layer: max(r for r, own in zip(rates, group_layers, strict=True) if own == layer) for layer in layers}
    return torch.tensor(list(highest.values()), dtype=torch.float64), rates


def give_own_tensors(optimizer: Optimizer) -> None:
    """Gives every param group a tensor of its own for its rate, where torch has given one tensor to several.

    Args:
        optimizer (`torch.optim.Optimizer`): The optimizer.

    Example:

    ```python
    >>> import torch
    >>> from metalr_hf.tuning.optimizers import give_own_tensors
    >>> groups = [{"params": [torch.zeros(1)]}, {"params": [torch.zeros(1)]}]
    >>> optimizer = torch.optim.SGD(groups, lr=torch.tensor(1e-3))
    >>> first, second = optimizer.param_groups
    >>> first["lr"] is second["lr"]
    True
    >>> give_own_tensors(optimizer)
    >>> first["lr"] is second["lr"]
    False

    ```
    """
    seen: set[int] = set()
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor) and id(group["lr"]) in seen:
            group["lr"] = group["lr"].clone()
        seen.add(id(group["lr"]))


def write_learning_rates(optimizer: Optimizer, rates: Sequence[float | Tensor]) -> None:
    """Gives every param group its learning rate; one that is a tensor stays the same tensor.

    Args:
        optimizer (`torch.optim.Optimizer`): The optimizer.
        rates (`Sequence[float]`): A rate per param group.

    Example:

    ```python
    >>> import torch
    >>> from metalr_hf.tuning.optimizers import write_learning_rates
    >>> optimizer = torch.optim.SGD([{"params": [torch.zeros(1)]}, {"params": [torch.zeros(1)]}])
    >>> write_learning_rates(optimizer, [1e-4, 1e-3])
    >>> [group["lr"] for group in optimizer.param_groups]
    [0.0001, 0.001]

    ```
    """
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def check_own_rates(optimizer: Optimizer, rates: Sequence[float | Tensor], group_layers: list[str]) -> None:
    """Raises if someone else changed a learning rate: the step would then not be the one that is tuned.

    Args:
        optimizer (`torch.optim.Optimizer`): The optimizer.
        rates (`Sequence[float]`): What was written.
        group_layers (`list[str]`): The layer of every param group.

    Raises:
        ValueError: if a rate has been changed, or a group was added. A rate that is a tensor is not looked at: that
            waits for the device.
    """
    if len(optimizer.param_groups) != len(group_layers):
        raise ValueError(
            f"The optimizer has {len(optimizer.param_groups)} param groups, but had {len(group_layers)} when "
            "MetaLRScheduler took it over. Give it all parameters from the start; those that are to be trained later "
            "can have requires_grad=False until then, once the optimizer is made."
        )
    for group, rate, layer in zip(optimizer.param_groups, rates, group_layers, strict=True):
        if not isinstance(group["lr"], Tensor) and group["lr"] != rate:
            raise ValueError(
                f"The learning rate of layer {layer!r} was changed from {rate:g} to {group['lr']:g} by something else "
                "than MetaLRScheduler, which holds the learning rates. Take the callback or second scheduler away "
                "that did, and use lr_scheduler_type for a schedule."
            )


def parameters_by_layer(optimizer: Optimizer, group_layers: list[str], layers: list[str]) -> list[list[Tensor]]:
    """The parameters of every layer.

    Args:
        optimizer (`torch.optim.Optimizer`): The optimizer.
        group_layers (`list[str]`): The layer of every param group.
        layers (`list[str]`): The layers, in the order wanted.

    Returns:
        `list[list[torch.Tensor]]`: the parameters layer by layer.
    """
    by_layer: dict[str, list[Tensor]] = {layer: [] for layer in layers}
    for layer, group in zip(group_layers, optimizer.param_groups, strict=True):
        by_layer[layer] += group["params"]
    return list(by_layer.values())


def momentum_growth(optimizer: Optimizer) -> float:
    """How many times as long as its first step an optimizer's step becomes while the gradient stays the same.

    That is (1 - dampening) / (1 - momentum) for the velocity of SGD, which starts as the first gradient. Adam corrects
    its averages for their start, and others, such as Lion, take a sign, so that all their steps have one length.

    Args:
        optimizer (`torch.optim.Optimizer`): The optimizer.

    Returns:
        `float`: at least 1; the largest of all param groups.

    Example:

    ```python
    >>> import torch
    >>> from metalr_hf.tuning.optimizers import momentum_growth
    >>> weights = [torch.zeros(1)]
    >>> momentum_growth(torch.optim.SGD(weights, momentum=0.75)), momentum_growth(torch.optim.AdamW(weights))
    (4.0, 1.0)

    ```
    """
    # Only a velocity is damped: the momentum of others, as Muon's, says nothing of the length of their steps.
    velocities = [group for group in optimizer.param_groups if "dampening" in group and group.get("momentum", 0) < 1]
    return max([1.0, *((1 - group["dampening"]) / (1 - group["momentum"]) for group in velocities)])

"""LayerRateScheduler: one learning rate per layer, times a schedule's shape, in the param groups of an optimizer."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ..settings import check_learning_rates, check_saved_layers, check_saved_optimizer
from .history import LRHistory
from .optimizers import (
    give_own_tensors,
    layer_of_groups,
    parameters_by_layer,
    start_learning_rates,
    unwrap,
    write_learning_rates,
)

PLAIN_STATE = ("last_epoch", "_step_count")
RATES = ("learning_rates", "start_learning_rates", "lowest_learning_rates", "highest_learning_rates")


class LayerRateScheduler(LRScheduler):
    """Holds one learning rate α a layer, writes α s(t) to the param groups, and records what every layer used.

    Param groups with the same `"layer"` entry share one learning rate, the highest of those that they start with; one
    that starts lower, such as that of the biases, stays as much lower. A group without the entry is a layer of its own.
    [`~metalr_hf.MetaLRScheduler`] is one that tunes them.

    Args:
        optimizer (`torch.optim.Optimizer`):
            The optimizer, with one or more param groups per layer.
        shape (`Callable[[int], float]`, *optional*):
            The schedule s(t) in [0, 1] that multiplies every rate at optimizer step t. Constant 1 by default.
        lr_min (`float`, *optional*, defaults to 0.0), lr_max (`float`, *optional*, defaults to `math.inf`):
            Bounds of every learning rate.
        start_lr (`float`, *optional*):
            Where every layer starts. By default the `lr` of its groups.

    Attributes:
        layers (`list[str]`): The layers, in the order of the groups.
        learning_rates (`torch.Tensor` of shape `(layers,)`, float64): α of every layer.
        start_learning_rates (`torch.Tensor` of shape `(layers,)`, float64):
            Where the layers started, or where their calibration ended.
        lowest_learning_rates (`torch.Tensor` of shape `(layers,)`, float64): The lowest α of every layer at a step.
        highest_learning_rates (`torch.Tensor` of shape `(layers,)`, float64): The highest.
        history ([`LRHistory`]): α s(t) of every layer at every step.

    Raises:
        ValueError: if a start rate is outside the bounds.

    Example:

    ```python
    >>> import torch
    >>> from metalr_hf.tuning.rates import LayerRateScheduler
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2))
    >>> layers = {"stem": model[0], "head": model[1]}
    >>> groups = [{"params": layer.parameters(), "layer": name} for name, layer in layers.items()]
    >>> optimizer = torch.optim.AdamW(groups, lr=1e-3)
    >>> scheduler = LayerRateScheduler(optimizer, shape=lambda step: 0.5)
    >>> scheduler.layers, scheduler.get_lr()
    (['stem', 'head'], [0.0005, 0.0005])

    ```
    """

    def __init__(
        self,
        optimizer: Optimizer,
        shape: Callable[[int], float] | None = None,
        lr_min: float = 0.0,
        lr_max: float = math.inf,
        start_lr: float | None = None,
    ):
        self.shape = shape or (lambda step: 1.0)
        self.lr_min, self.lr_max = lr_min, lr_max
        self._group_layers = layer_of_groups(optimizer)
        self.layers = list(dict.fromkeys(self._group_layers))
        give_own_tensors(optimizer)
        self.learning_rates, self._group_rates = start_learning_rates(optimizer, self._group_layers, self.layers)
        highest = dict(zip(self.layers, self.learning_rates.tolist(), strict=True))
        self._given_rates = highest
        self._shares = [
            rate / highest[layer] if highest[layer] else 1.0
            for rate, layer in zip(self._group_rates, self._group_layers, strict=True)
        ]
        if start_lr is not None:
            self.learning_rates = torch.full_like(self.learning_rates, start_lr)
        check_learning_rates(dict(zip(self.layers, self.learning_rates.tolist(), strict=True)), lr_min, lr_max)
        self.start_learning_rates = self.learning_rates
        # Not to be had from the history, which holds α s(t): a run may go on with another schedule.
        self.lowest_learning_rates = torch.full_like(self.learning_rates, math.inf)
        self.highest_learning_rates = torch.zeros_like(self.learning_rates)
        self.history = LRHistory(self.layers)
        super().__init__(optimizer)

    def get_lr(self) -> list[float | Tensor]:
        """The learning rate of every param group at the present step: α times the schedule's shape."""
        shape = self.shape(max(self.last_epoch, 0))
        rates, given = dict(zip(self.layers, self.learning_rates.tolist(), strict=True)), self._given_rates
        groups = zip(self._group_layers, self._group_rates, self._shares, strict=True)
        # Where nothing has changed, to the last digit what was given.
        return [
            (rate if rates[layer] == given[layer] else rates[layer] * share) * shape for layer, rate, share in groups
        ]

    def record(
        self, meta_loss: float = math.nan, hypergradients: list[float] | None = None, step: int | None = None
    ) -> None:
        """Records a step.

        Args:
            meta_loss (`float`, *optional*): The validation loss, if there was one.
            hypergradients (`list[float]`, *optional*): ∂L_val/∂α of every layer, if they were measured.
            step (`int`, *optional*): Which step; the present one by default.
        """
        step = self.last_epoch if step is None else step
        shape = self.shape(step)
        self.history.append(step, (self.learning_rates * shape).tolist(), meta_loss, hypergradients)
        # A step of length 0, as a warm-up begins with, used none.
        if shape > 0:
            self.lowest_learning_rates = torch.minimum(self.lowest_learning_rates, self.learning_rates)
            self.highest_learning_rates = torch.maximum(self.highest_learning_rates, self.learning_rates)

    def ratios(self, before: Tensor) -> list[float]:
        """How many times as high as before every rate is; 1 where it was zero.

        Args:
            before (`torch.Tensor` of shape `(layers,)`, float64): Earlier rates.
        """
        return torch.where(before > 0, self.learning_rates / before, 1.0).tolist()

    def write_learning_rates(self) -> None:
        """Gives every param group its learning rate."""
        write_learning_rates(self.optimizer, self.get_lr())

    def parameters_by_layer(self) -> list[list[Tensor]]:
        """The parameters of every layer."""
        # Read anew each time: wrappers replace the group dicts and sharding replaces the parameters.
        return parameters_by_layer(self.optimizer, self._group_layers, self.layers)

    def state_dict(self) -> dict[str, Any]:
        """The whole state, in tensors and plain containers, so that `torch.load(weights_only=True)` reads it."""
        return {
            **{name: getattr(self, name) for name in PLAIN_STATE},
            "layers": list(self.layers),
            "optimizer": type(unwrap(self.optimizer)).__name__,
            **{name: getattr(self, name).clone() for name in RATES},
            "history": self.history.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores what [`~LayerRateScheduler.state_dict`] gave. Load the optimizer's state first.

        Args:
            state_dict (`dict`): The state of a scheduler over the same layers.

        Raises:
            ValueError: if the state is not one of such a scheduler, or its layers or its optimizer are others.
        """
        if "learning_rates" not in state_dict:
            raise ValueError(f"This is not the state of a {type(self).__name__}: it has no 'learning_rates'.")
        check_saved_layers(state_dict["layers"], self.layers)
        check_saved_optimizer(state_dict["optimizer"], type(unwrap(self.optimizer)).__name__)
        for name in PLAIN_STATE:
            setattr(self, name, state_dict[name])
        for name in RATES:
            setattr(self, name, state_dict[name].clone())
        self.history.load_state_dict(state_dict["history"])
        self.write_learning_rates()
        self._last_lr = [group["lr"] for group in self.optimizer.param_groups]

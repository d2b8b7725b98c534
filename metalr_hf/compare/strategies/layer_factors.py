"""Published methods that multiply Trainer's schedule by one factor per layer, as callbacks, for comparisons."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.utils import get_total_norm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class LayerFactors(TrainerCallback):
    """Base of the strategies that multiply Trainer's schedule by one factor per layer."""

    def __init__(self) -> None:
        self.scales: dict[str, float] = {}

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        optimizer: torch.optim.Optimizer = kwargs["optimizer"]
        layers: dict[str, list[torch.Tensor]] = {}
        for group in optimizer.param_groups:
            layers.setdefault(group["layer"], []).extend(group["params"])
        self.update(layers, state, args)
        for group in optimizer.param_groups:
            # Trainer's scheduler writes the scheduled rate anew at each step, so this does not add up.
            group["lr"] = group["lr"] * self.scales.get(group["layer"], 1.0)

    def update(self, layers: dict[str, list[torch.Tensor]], state: TrainerState, args: TrainingArguments) -> None:
        """Sets `self.scales`: layer name to factor."""
        raise NotImplementedError(f"{type(self).__name__} does not define update")


class AutoRGN(LayerFactors):
    """Each layer at lr · RGN_l / max RGN, with RGN_l = ‖g_l‖ / ‖θ_l‖, the relative gradient norm, at every step.

    Lee et al. 2023, *Surgical Fine-Tuning Improves Adaptation to Distribution Shifts*, section 4: the relative
    gradient norms, normalised to be at most 1, multiply the base learning rate.
    """

    def update(self, layers: dict[str, list[torch.Tensor]], state: TrainerState, args: TrainingArguments) -> None:
        relative = {
            layer: float(get_total_norm(p.grad for p in parameters if p.grad is not None))
            / max(float(get_total_norm(parameters)), 1e-12)
            for layer, parameters in layers.items()
        }
        largest = max(relative.values()) or 1.0
        self.scales = {layer: value / largest for layer, value in relative.items()}


class AutoLR(LayerFactors):
    """Learning rates that make the layers' weight variations grow from the input to the output, once an epoch.

    Ro and Choi 2021, *AutoLR: Layer-wise Pruning and Auto-tuning of Learning Rates in Fine-tuning of Deep Networks*,
    and their code. The weight variation of layer l over an epoch is v_l = ‖Δθ_l‖ / n_l. The wanted variations run
    linearly from the smallest, times 3, to the largest, times 0.4 (the authors' factors); v_l being proportional to
    the rate, the new rate is lr_l · wanted_l / v_l. The rates stay when the variations are sorted well enough already
    (score 1 - 2 Σ|rank_l - l| / d² of 0.94 or more). The head keeps its rate. The authors train an epoch again, from
    its start, until the score holds; with an equal budget for all there is one try an epoch.
    """

    def __init__(self, threshold: float = 0.94) -> None:
        super().__init__()
        self.threshold = threshold
        self.epoch = 0
        self.before: dict[str, list[torch.Tensor]] = {}

    def update(self, layers: dict[str, list[torch.Tensor]], state: TrainerState, args: TrainingArguments) -> None:
        epoch = int(state.epoch or 0)
        if self.before and epoch == self.epoch:
            return
        if self.before:
            self.scales = self.adjust(layers)
        self.epoch = epoch
        self.before = {layer: [p.detach().clone() for p in parameters] for layer, parameters in layers.items()}

    def adjust(self, layers: dict[str, list[torch.Tensor]]) -> dict[str, float]:
        """New factors from the variation since the last call."""
        backbone = list(layers)[:-1]
        variation = {
            layer: float(get_total_norm(p.detach() - b for p, b in zip(layers[layer], self.before[layer], strict=True)))
            / sum(p.numel() for p in layers[layer])
            for layer in backbone
        }
        values = list(variation.values())
        if len(backbone) < 2 or min(values) <= 0 or sorting_score(values) >= self.threshold:
            return self.scales
        low, high = min(values) * 3, max(values) * 0.4
        wanted = [low + (high - low) * i / (len(values) - 1) for i in range(len(values))]
        return {
            layer: self.scales.get(layer, 1.0) * want / variation[layer]
            for layer, want in zip(backbone, wanted, strict=True)
        }


def sorting_score(values: list[float]) -> float:
    """How well values are sorted, 1 for ascending: 1 - 2 Σ|rank_l - l| / d² (AutoLR).

    Args:
        values (`list[float]`): Two or more.

    Returns:
        `float`: from 1 (ascending) down to 0 (descending).

    Example:

    ```python
    >>> from metalr_hf.compare.strategies.layer_factors import sorting_score
    >>> sorting_score([1.0, 2.0, 3.0, 4.0]), sorting_score([4.0, 3.0, 2.0, 1.0])
    (1.0, 0.0)

    ```
    """
    order = sorted(range(len(values)), key=values.__getitem__)
    return 1 - 2 * sum(abs(i - position) for i, position in enumerate(order)) / len(values) ** 2

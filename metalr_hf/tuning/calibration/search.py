"""Start learning rates from the validation loss along the first optimizer steps."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import Tensor

from ..hypergradient import LookAhead
from .backbone import LARGEST_STEP, agree, highest_useful, largest_backbone_lr, losses_down_a_ladder
from .ladder import LADDER, TOLERANCE, head_valley, raised
from .replay import ReplayedLoss

# One batch of 32 images often says nothing of a backbone, or what is wrong; three batches rarely do. Where two agree, a
# third has hardly ever changed what they found.
LOOKS = (0, 1, 2)
# A fresh head may say nothing of the backbone, whatever the batch; one that has learned for some steps does.
LATER_LOOKS = (5, 10)
# At the same rate Adam's first steps are about three times as long as later ones, whose gradients partly cancel. A rate
# that suits a later step would be too high by that, but for the highest one, which the first step has set.
LONGER_FIRST_STEP = 10**0.5
# The step that is calibrated may have any learning rate, but the same one in every run, so that the learning rate that
# the user gave makes no difference, not even in the last digit.
PROBE_LR = 1e-3
# Along one step the loss falls up to the rate at which that step does all the work, and each of the tens of steps that
# follow would be as long. In short runs a tenth was better than the whole rate, a third and a thirtieth of it.
SHARE_OF_VALLEY = 0.1
FALLBACK_BACKBONE_LR, FALLBACK_HEAD_LR = 1e-4, 3e-4
BACKBONE_DOUBT = "no step of the backbone lowers the loss"
# Tuning lowers a rate that is too high within a few steps; from one a thousand times too low it needs the better part
# of a short run. Where a tenth of the head's rate does harm, a hundredth is the least.
LARGEST_HEAD_TO_BACKBONE, FALLBACK_HEAD_TO_BACKBONE = 10.0, 3.0


@dataclass(frozen=True)
class Calibration:
    """What the looks so far have found.

    Args:
        backbone_lr (`float`): Start rate of every layer but the head.
        head_lr (`float`): Start rate of the head.
        start_loss (`float`): The validation loss before the step of the last look.
        head_losses (`dict[float, float]`):
            Learning rate to validation loss with the head alone moved; empty where the head's rate was known.
        backbone_losses (`dict[float, float]`): The same for the backbone.
        largest_lr (`float`): The highest rate that was tried for the backbone.
        changes (`list[dict[float, float]]`):
            By how much of the loss before the step a rate of the backbone changed the loss, a mapping a look.
        doubts (`list[str]`): Why the rates are not to be trusted. Empty if all went well.

    Example:

    ```python
    >>> from metalr_hf.tuning.calibration import Calibration
    >>> found = Calibration(1e-4, 1e-3, 2.3, {1e-4: 2.2, 1e-3: 2.0}, {1e-4: 2.1}, 1e-3, changes=[], doubts=[])
    >>> found.learning_rates(layers=4)
    [0.0001, 0.0001, 0.0001, 0.001]
    >>> found.forwards
    4

    ```
    """

    backbone_lr: float
    head_lr: float
    start_loss: float
    head_losses: dict[float, float]
    backbone_losses: dict[float, float]
    largest_lr: float
    changes: list[dict[float, float]]
    doubts: list[str]

    @property
    def backbone_in_doubt(self) -> bool:
        """Whether the backbone's rate is a guess."""
        return BACKBONE_DOUBT in self.doubts

    @property
    def forwards(self) -> int:
        """How many losses the last look has computed, replayed or not."""
        return 1 + len(self.head_losses) + len(self.backbone_losses)

    def learning_rates(self, layers: int, head_layers: int = 1) -> list[float]:
        """The start rate of every layer, the head last.

        Args:
            layers (`int`): How many there are.
            head_layers (`int`, *optional*, defaults to 1): How many of them, at the end, are the head.
        """
        return [self.backbone_lr] * (layers - head_layers) + [self.head_lr] * head_layers

    def state_dict(self) -> dict[str, Any]:
        """The fields, in plain containers."""
        return asdict(self)


def calibrate(
    look_ahead: LookAhead,
    step_lrs: Sequence[float],
    meta_loss: Callable[[], Tensor] | None,
    *,
    earlier: Calibration | None = None,
    head_layers: int = 1,
    lr_min: float = 0.0,
    lr_max: float = math.inf,
    reduce: Callable[[Tensor], Tensor] | None = None,
    momentum_growth: float = 1.0,
    largest_step: float = LARGEST_STEP,
) -> Calibration:
    """Finds start rates for head and backbone along the optimizer step just taken, with forward passes only.

    The step gives every layer a direction. The validation loss is walked along it, once with the head alone and once
    with the backbone alone: its gradient was taken through the head as it was, and says nothing for another one. The
    head gets a tenth of the rate at which the loss stops falling. A single batch says little of the backbone, so that
    its rate is read off the mean of this look and all `earlier` ones. It is at least a tenth of the head's, or a
    hundredth if a tenth does harm, and at most where the step moves the median layer by 1 % of its norm. The parameters
    are put back bit for bit; buffers and random numbers are the caller's, see
    [`~metalr_hf.tuning.contexts.untouched`].

    Args:
        look_ahead ([`~metalr_hf.tuning.hypergradient.LookAhead`]): The step taken. Its last layers are the head.
        step_lrs (`Sequence[float]`): The learning rate that the step was taken with, in every layer.
        meta_loss (`Callable`): Takes nothing and returns the scalar validation loss at the present parameters. If it is
            a [`~metalr_hf.tuning.calibration.replay.ReplayedLoss`], the head is walked without the backbone.
        earlier ([`Calibration`], *optional*): What the looks along the steps before have found. With it only the
            backbone is walked, from the head as this step left it.
        head_layers (`int`, *optional*, defaults to 1): How many of the layers, at the end, are the head.
        lr_min (`float`, *optional*, defaults to 0.0), lr_max (`float`, *optional*, defaults to `math.inf`): Rungs
            outside these bounds are left out.
        reduce (`Callable`, *optional*): Averages a tensor over all processes.
        momentum_growth (`float`, *optional*, defaults to 1.0): How many times as long as the first step later ones
            become by [`~metalr_hf.tuning.optimizers.momentum_growth`]. The rate of the backbone is divided by it.
        largest_step (`float`, *optional*, defaults to 0.01): By which share of its norm a step may move the median
            layer of the backbone.

    Returns:
        [`Calibration`]: the start rates and how they were found.

    Raises:
        ValueError: without a `meta_loss`.

    Example:

    ```python
    >>> import torch
    >>> from metalr_hf.tuning.calibration import calibrate
    >>> from metalr_hf.tuning.hypergradient import LookAhead
    >>> weights = [torch.nn.Parameter(torch.tensor([value])) for value in (1.0, 3.0)]
    >>> def loss():
    ...     return sum((weight**2).sum() for weight in weights)
    >>> optimizer = torch.optim.SGD(weights, lr=1e-3)
    >>> look_ahead = LookAhead()
    >>> loss().backward()
    >>> look_ahead.before_step([[weight] for weight in weights])
    >>> optimizer.step()
    >>> look_ahead.after_step()
    >>> found = calibrate(look_ahead, [1e-3, 1e-3], loss)
    >>> round(found.backbone_lr, 3), round(found.head_lr, 3)
    (0.005, 0.032)

    ```
    """
    if meta_loss is None:
        raise ValueError(
            f"calibrate=True needs a validation batch whenever scheduler.will_calibrate is true: at the first "
            f"{len(LOOKS) - 1} or {len(LOOKS)} steps and, where they leave the backbone in doubt, at two later ones. "
            "Call scheduler.step(meta_loss), or set scheduler.meta_loss, or leave calibrate at False."
        )
    layers = len(look_ahead.sizes)

    def loss_at(backbone_lr: float, head_lr: float | None) -> float:
        rates = [backbone_lr] * (layers - head_layers)
        # The layers of the head may have rates of their own by now.
        rates += step_lrs[layers - head_layers :] if head_lr is None else [head_lr] * head_layers
        ratios = [rate / step_lr for rate, step_lr in zip(rates, step_lrs, strict=True)]
        return look_ahead.loss_at(ratios, meta_loss, reduce)

    def bounded(rate: float) -> float:
        return min(max(rate, lr_min), lr_max)

    doubts = [] if earlier is None else [doubt for doubt in earlier.doubts if doubt != BACKBONE_DOUBT]
    head_losses: dict[float, float] = {}
    head_lr = None if earlier is None else earlier.head_lr
    head_step = 0.0 if earlier is None else None
    with meta_loss.backbone_kept() if isinstance(meta_loss, ReplayedLoss) and earlier is None else nullcontext():
        start_loss = loss_at(0.0, head_step)
        if earlier is None:
            valley, head_losses = head_valley(lambda rate: loss_at(0.0, rate), start_loss, lr_min, lr_max)
            head_lr = None if valley is None else bounded(SHARE_OF_VALLEY * valley)
    if head_lr is None:
        doubts.append("the loss does not tell the learning rates of the head apart")
        head_lr = bounded(FALLBACK_HEAD_LR)
    if earlier is None:
        sizes = look_ahead.relative_sizes(reduce)[: layers - head_layers]
        largest_lr = bounded(largest_backbone_lr(sizes, step_lrs[: layers - head_layers], largest_step))
    else:
        largest_lr = earlier.largest_lr
    lowest = min(max(head_lr / LARGEST_HEAD_TO_BACKBONE, lr_min), largest_lr)
    rungs = [largest_lr * rung for rung in LADDER if layers > head_layers]
    ladder = [rate for rate in rungs if rate >= 0.99 * lowest]
    below = [rate for rate in rungs if max(lowest / LARGEST_HEAD_TO_BACKBONE, lr_min) <= 1.01 * rate < 0.99 * lowest]
    backbone_losses = losses_down_a_ladder(ladder, lambda rate: loss_at(rate, head_step), start_loss, below)
    changes = [] if earlier is None else list(earlier.changes)
    if math.isfinite(start_loss):
        size = abs(start_loss) or 1.0
        changes.append({rate: (loss - start_loss) / size for rate, loss in backbone_losses.items()})
    backbone_lr = highest_useful(changes, below + ladder)
    if backbone_lr is None:
        if layers > head_layers:
            doubts.append(BACKBONE_DOUBT)
        harms_at_once = bool(ladder) and backbone_losses.get(ladder[0], start_loss) > raised(start_loss, TOLERANCE)
        guess = max(FALLBACK_BACKBONE_LR, head_lr / FALLBACK_HEAD_TO_BACKBONE)
        backbone_lr = lowest if harms_at_once else min(bounded(guess), largest_lr)
    # Of the backbone alone: the head has little to forget, and learns too slowly at such a rate.
    backbone_lr = max(backbone_lr / momentum_growth, lr_min)
    return Calibration(backbone_lr, head_lr, start_loss, head_losses, backbone_losses, largest_lr, changes, doubts)


class Calibrator:
    """Looks along the first three steps, or two that agree, and along two later ones if the backbone is still in doubt.

    Args:
        active (`bool`): Whether to calibrate at all.

    Attributes:
        found ([`Calibration`], *optional*): The calibration that gave the rates.
        forwards (`int`): Forward passes taken so far.

    Example:

    ```python
    >>> from metalr_hf.tuning.calibration import Calibrator
    >>> calibrator = Calibrator(active=True)
    >>> calibrator.due(0), calibrator.found
    (True, None)

    ```
    """

    def __init__(self, active: bool):
        self.found: Calibration | None = None
        self.forwards = 0
        self._steps: list[int] = [*LOOKS, *LATER_LOOKS] if active else []

    def due(self, step: int) -> bool:
        """Whether this step is to be calibrated; a step that could not be is made up for by the next.

        Args:
            step (`int`): The optimizer step, from 0.
        """
        return bool(self._steps) and step >= self._steps[0]

    @property
    def has_looked(self) -> bool:
        """Whether the first looks have been taken; a backbone in doubt may get further ones."""
        return len(self._steps) <= len(LATER_LOOKS)

    def learning_rates(
        self,
        look_ahead: LookAhead,
        before: Sequence[float],
        shape: float,
        meta_loss: Callable[[], Tensor] | None,
        **kwargs: Any,
    ) -> list[float]:
        """Calibrates the step just taken.

        Args:
            look_ahead ([`~metalr_hf.tuning.hypergradient.LookAhead`]): The step taken.
            before (`Sequence[float]`): The learning rate α of every layer, the head's last.
            shape (`float`): The schedule's factor s: the step was taken with s α.
            meta_loss (`Callable`): Takes nothing and returns the scalar validation loss at the present parameters.
            kwargs: Passed on to [`calibrate`].

        Returns:
            `list[float]`: the rate of every layer from this step on.
        """
        earlier, later = self.found, self._steps[0] in LATER_LOOKS
        if earlier is not None and later:
            # What was seen through the fresh head is what left the doubt.
            earlier = replace(earlier, changes=[])
        with look_ahead.excursions():
            step_lrs = [rate * shape for rate in before]
            found = calibrate(look_ahead, step_lrs, meta_loss, earlier=earlier, **kwargs)
        self.forwards += found.forwards - (meta_loss.replays if isinstance(meta_loss, ReplayedLoss) else 0)
        self._steps = self._steps[1:]
        if not later and agree(found.changes):
            self._steps = list(LATER_LOOKS)
        settled = self.has_looked and not found.backbone_in_doubt
        if settled or not found.backbone_losses:
            self._steps = []
        keeps_rates = later and found.backbone_in_doubt
        if not keeps_rates:
            highest = found.largest_lr / kwargs.get("momentum_growth", 1.0)
            if later and found.backbone_lr < 0.99 * highest:
                lower = max(found.backbone_lr / LONGER_FIRST_STEP, kwargs.get("lr_min", 0.0))
                found = replace(found, backbone_lr=lower)
            self.found = found
        if self.found is not None and not self._steps:
            warn_of_doubts(self.found)
        if keeps_rates:
            return list(before)
        head_layers = kwargs.get("head_layers", 1)
        rates = found.learning_rates(len(before), head_layers)
        # The head has been tuned since its own look.
        return rates if earlier is None else [*rates[:-head_layers], *before[-head_layers:]]

    def state_dict(self) -> dict[str, Any]:
        """The state, in plain containers."""
        return {
            "found": None if self.found is None else self.found.state_dict(),
            "forwards": self.forwards,
            "steps": list(self._steps),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores what [`~Calibrator.state_dict`] gave."""
        found = state_dict["found"]
        self.found = None if found is None else Calibration(**found)
        self.forwards, self._steps = state_dict["forwards"], list(state_dict["steps"])


def warn_of_doubts(calibration: Calibration) -> None:
    """Warns if the ladder was flat or the batch odd, and says which rates are used instead.

    Args:
        calibration ([`Calibration`]): What was found.

    Example:

    ```python
    >>> from metalr_hf.tuning.calibration.search import Calibration, warn_of_doubts
    >>> certain = Calibration(1e-4, 1e-3, 2.3, {}, {}, largest_lr=1e-3, changes=[], doubts=[])
    >>> warn_of_doubts(certain)

    ```
    """
    if calibration.doubts:
        warnings.warn(
            f"The calibration of the start learning rates is in doubt: {'; '.join(calibration.doubts)}. It starts at "
            f"{calibration.backbone_lr:.1e} (backbone) and {calibration.head_lr:.1e} (head) instead, and tuning goes "
            "on from there. Look at the labels and the batch size if this comes again with another seed.",
            stacklevel=2,
        )

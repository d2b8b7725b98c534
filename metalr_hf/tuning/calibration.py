"""Start learning rates from the validation loss along the first optimizer step."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import Tensor

from .hypergradient import LookAhead

# The first step, and those at which a backbone in doubt is tried again.
CALIBRATED_STEPS = (0, 5, 10)
# At the same rate Adam's first step is about three times as long as later ones, whose gradients partly cancel. A rate
# that suits a later step would be too high by that.
LONGER_FIRST_STEP = 10**0.5
# Half a decade apart: what one step says is not finer than that.
LADDER = tuple(10 ** (k / 2) for k in range(-12, 1))
# The step that is calibrated may have any learning rate, but the same one in every run, so that the learning rate that
# the user gave makes no difference, not even in the last digit.
PROBE_LR = 1e-3
FALLBACK_BACKBONE_LR, FALLBACK_HEAD_LR = 1e-4, 1e-3
RISE, TOLERANCE = 0.01, 0.003
BACKBONE_DOUBT = "no step of the backbone lowers the loss"
# Behind the knee of the loss, and only where it has fallen by enough to have one.
SHELF, FALL = 0.5, 0.1
# One step with a fresh head often says nothing about the backbone. Tuning lowers a rate that is too high within a few
# steps; from one a thousand times too low it needs the better part of a short run.
LARGEST_HEAD_TO_BACKBONE, FALLBACK_HEAD_TO_BACKBONE = 100.0, 30.0


@dataclass(frozen=True)
class Calibration:
    """What a calibration found.

    Args:
        backbone_lr (`float`): Start rate of every layer but the head.
        head_lr (`float`): Start rate of the head.
        start_loss (`float`): The validation loss before the step.
        ladder (`list[float]`): The learning rates tried, in rising order.
        head_losses (`list[float]`): The validation loss with the head alone moved at every rung that was tried.
        backbone_losses (`list[float]`): The same for the backbone.
        doubts (`list[str]`): Why the rates are not to be trusted. Empty if all went well.

    Example:

    ```python
    >>> from metalr_hf.tuning.calibration import Calibration
    >>> walked = {"ladder": [1e-4, 1e-3], "head_losses": [2.2, 2.0], "backbone_losses": [2.1]}
    >>> found = Calibration(backbone_lr=1e-4, head_lr=1e-3, start_loss=2.3, **walked, doubts=[])
    >>> found.learning_rates(layers=4)
    [0.0001, 0.0001, 0.0001, 0.001]
    >>> found.forwards
    4

    ```
    """

    backbone_lr: float
    head_lr: float
    start_loss: float
    ladder: list[float]
    head_losses: list[float]
    backbone_losses: list[float]
    doubts: list[str]

    @property
    def backbone_in_doubt(self) -> bool:
        """Whether the backbone's rate is a guess."""
        return BACKBONE_DOUBT in self.doubts

    @property
    def forwards(self) -> int:
        """Forward passes that it took."""
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


def raised(loss: float, share: float) -> float:
    """A loss that is worse than another by a share of its size, or better if the share is below zero.

    Args:
        loss (`float`): Of either sign.
        share (`float`): Between -1 and 1.

    Returns:
        `float`: the loss plus the share of its absolute value.

    Example:

    ```python
    >>> from metalr_hf.tuning.calibration import raised
    >>> raised(2.0, 0.5), raised(-2.0, 0.5)
    (3.0, -1.0)

    ```
    """
    return loss * (1 + share if loss >= 0 else 1 - share)


def first_valley(
    ladder: Sequence[float], loss_at: Callable[[float], float], start_loss: float
) -> tuple[float | None, list[float]]:
    """Walks up a ladder of learning rates and stops behind the first valley or shelf of the loss.

    The walk ends where the loss is 1 % above the lowest seen, or back above the start after a fall, or where, after it
    has fallen by a tenth, a rung brings less than half of what the rung before brought. What lies behind may be lower,
    but there the features have often collapsed towards a constant output. Of the rungs walked it takes the highest
    whose loss is within 0.3 % of the lowest.

    Args:
        ladder (`Sequence[float]`): Learning rates, in rising order.
        loss_at (`Callable[[float], float]`): The loss after a step with that learning rate.
        start_loss (`float`): The loss before the step.

    Returns:
        `tuple[float | None, list[float]]`: the rate, or `None` if the loss is flat from end to end or rises at the
        first rung; the losses of the rungs walked.

    Example:

    ```python
    >>> from metalr_hf.tuning.calibration import first_valley
    >>> losses = {1e-4: 2.2, 1e-3: 1.8, 1e-2: 2.6, 1e-1: 0.9}
    >>> first_valley(list(losses), losses.get, start_loss=2.3)
    (0.001, [2.2, 1.8, 2.6])

    ```
    """
    lowest, before, gain = start_loss, start_loss, 0.0
    walked: list[tuple[float, float]] = []
    losses = []
    for rate in ladder:
        loss = loss_at(rate)
        losses.append(loss)
        lost_again = loss > start_loss and lowest < raised(start_loss, -TOLERANCE)
        if not math.isfinite(loss) or loss > raised(lowest, RISE) or lost_again:
            break
        on_shelf = lowest < raised(start_loss, -FALL) and before - loss < SHELF * gain
        if on_shelf and loss < raised(lowest, -TOLERANCE):
            break
        walked.append((rate, loss))
        if on_shelf:
            break
        lowest, gain, before = min(lowest, loss), before - loss, loss
    lowest_rungs = [rate for rate, loss in walked if loss <= raised(lowest, TOLERANCE)]
    flat = lowest > raised(start_loss, -TOLERANCE) and len(walked) == len(ladder)
    return None if flat or not lowest_rungs else lowest_rungs[-1], losses


def calibrate(
    look_ahead: LookAhead,
    step_lrs: Sequence[float],
    meta_loss: Callable[[], Tensor] | None,
    *,
    head_lr: float | None = None,
    head_layers: int = 1,
    lr_min: float = 0.0,
    lr_max: float = math.inf,
    reduce: Callable[[Tensor], Tensor] | None = None,
) -> Calibration:
    """Finds start rates for head and backbone along the optimizer step just taken, with forward passes only.

    The step gives every layer a direction. The validation loss is walked along it, once with the head alone and once
    with the backbone alone: its gradient was taken through the head as it was, and says nothing for another one. The
    backbone's rate is at least a hundredth of the head's. The parameters are put back bit for bit; buffers and random
    numbers are the caller's, see [`~metalr_hf.tuning.contexts.untouched`].

    Args:
        look_ahead ([`~metalr_hf.tuning.hypergradient.LookAhead`]): The step taken. Its last layers are the head.
        step_lrs (`Sequence[float]`): The learning rate that the step was taken with, in every layer.
        meta_loss (`Callable`): Takes nothing and returns the scalar validation loss at the present parameters.
        head_lr (`float`, *optional*): The rate of the head where it is known: only the backbone is walked, from the
            head as the step left it.
        head_layers (`int`, *optional*, defaults to 1): How many of the layers, at the end, are the head.
        lr_min (`float`, *optional*, defaults to 0.0), lr_max (`float`, *optional*, defaults to `math.inf`): Rungs
            outside these bounds are left out.
        reduce (`Callable`, *optional*): Averages a tensor over all processes.

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
    (0.316, 0.316)

    ```
    """
    if meta_loss is None:
        raise ValueError(
            "calibrate=True needs a validation batch at the first step: call scheduler.step(meta_loss), or set "
            "scheduler.meta_loss, or leave calibrate at False."
        )
    ladder = [rate for rate in LADDER if lr_min <= rate <= lr_max]
    layers = len(look_ahead.sizes)

    def loss_at(backbone_lr: float, head_lr: float) -> float:
        rates = [backbone_lr] * (layers - head_layers) + [head_lr] * head_layers
        ratios = [rate / step_lr for rate, step_lr in zip(rates, step_lrs, strict=True)]
        return look_ahead.loss_at(ratios, meta_loss, reduce)

    doubts: list[str] = []
    head_losses: list[float] = []
    head_step = 0.0 if head_lr is None else step_lrs[-1]
    start_loss = loss_at(0.0, head_step)
    if head_lr is None:
        head_lr, head_losses = first_valley(ladder, lambda rate: loss_at(0.0, rate), start_loss)
    if head_lr is None:
        doubts.append("the loss does not tell the learning rates of the head apart")
        head_lr = min(max(FALLBACK_HEAD_LR, lr_min), lr_max)
    backbone_lr: float | None = None
    backbone_losses: list[float] = []
    if layers > head_layers:
        backbone_lr, backbone_losses = first_valley(ladder, lambda rate: loss_at(rate, head_step), start_loss)
        # If no step of the backbone lowered the loss of this batch, it does not tell how long the step should be.
        if backbone_lr is None or not min(backbone_losses) <= raised(start_loss, -TOLERANCE):
            doubts.append(BACKBONE_DOUBT)
            backbone_lr = None
    if backbone_lr is None:
        backbone_lr = min(max(FALLBACK_BACKBONE_LR, head_lr / FALLBACK_HEAD_TO_BACKBONE, lr_min), lr_max)
    backbone_lr = max(backbone_lr, head_lr / LARGEST_HEAD_TO_BACKBONE)
    return Calibration(backbone_lr, head_lr, start_loss, ladder, head_losses, backbone_losses, doubts)


class Calibrator:
    """Calibrates at the first step, and the backbone again a few steps later if it was in doubt.

    A fresh head may say nothing about the backbone, so that no step of it lowers the loss. A head that has learned for
    a few steps does.

    Args:
        active (`bool`): Whether to calibrate at all.

    Attributes:
        found ([`Calibration`], *optional*): The last calibration that gave the rates.
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
        self._steps: list[int] = list(CALIBRATED_STEPS) if active else []

    def due(self, step: int) -> bool:
        """Whether this step is to be calibrated; a step that could not be is made up for by the next.

        Args:
            step (`int`): The optimizer step, from 0.
        """
        return bool(self._steps) and step >= self._steps[0]

    def learning_rates(
        self,
        step: int,
        look_ahead: LookAhead,
        before: Sequence[float],
        shape: float,
        meta_loss: Callable[[], Tensor] | None,
        **kwargs: Any,
    ) -> list[float]:
        """Calibrates the step just taken.

        Args:
            step (`int`): The optimizer step, from 0.
            look_ahead ([`~metalr_hf.tuning.hypergradient.LookAhead`]): The step taken.
            before (`Sequence[float]`): The learning rate α of every layer, the head's last.
            shape (`float`): The schedule's factor s: the step was taken with s α.
            meta_loss (`Callable`): Takes nothing and returns the scalar validation loss at the present parameters.
            kwargs: Passed on to [`calibrate`].

        Returns:
            `list[float]`: the start rate of every layer, or `before` if the backbone is still in doubt.
        """
        first = self.found is None
        step_lrs = [rate * shape for rate in before]
        with look_ahead.excursions():
            found = calibrate(look_ahead, step_lrs, meta_loss, head_lr=None if first else before[-1], **kwargs)
        self.forwards += found.forwards
        self._steps = [later for later in self._steps if later > step] if found.backbone_in_doubt else []
        if not self._steps:
            warn_of_doubts(found)
        if found.backbone_in_doubt and not first:
            return list(before)
        if not first:
            lower = max(found.backbone_lr / LONGER_FIRST_STEP, kwargs.get("lr_min", 0.0))
            found = replace(found, backbone_lr=lower)
        self.found = found
        return found.learning_rates(len(before), kwargs.get("head_layers", 1))

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
    >>> from metalr_hf.tuning.calibration import Calibration, warn_of_doubts
    >>> certain = Calibration(1e-4, 1e-3, 2.3, ladder=[], head_losses=[], backbone_losses=[], doubts=[])
    >>> warn_of_doubts(certain)

    ```
    """
    if calibration.doubts:
        warnings.warn(
            f"The calibration of the start learning rates is in doubt: {'; '.join(calibration.doubts)}. It starts at "
            f"{calibration.backbone_lr:.1e} (backbone) and {calibration.head_lr:.1e} (head) instead, and tuning goes "
            "on from there. Look at the labels and the size of the meta batch if this comes again with another seed.",
            stacklevel=2,
        )

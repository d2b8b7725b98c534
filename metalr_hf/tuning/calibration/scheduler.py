"""CalibratedScheduler: when a step is held open to find the start rates along it, and with which batch."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from ...layers.names import head_layers
from ..hypergradient import LookAhead
from ..hypergradient.validation import clear_gradients
from ..optimizers import check_own_rates, momentum_growth, unwrap
from ..rates import LayerRateScheduler
from .backbone import LARGEST_STEP
from .search import PROBE_LR, Calibration, Calibrator


class CalibratedScheduler(LayerRateScheduler):
    """One learning rate a layer, whose start is found along the first steps by forward passes.

    [`~metalr_hf.MetaLRScheduler`] is one that tunes the rates as well, and listens to the optimizer's steps.

    Args:
        optimizer (`torch.optim.Optimizer`): The optimizer, with one or more param groups per layer.
        shape (`Callable[[int], float]`, *optional*): The schedule s(t) that multiplies every rate.
        lr_min (`float`), lr_max (`float`): Bounds of every learning rate.
        calibrate (`bool`): Whether to find the start rates; otherwise they are those of the groups.
        meta_context (`Callable`): Makes the context that the forward passes run in.
        reduce (`Callable`, *optional*): Averages a tensor over all processes.

    Attributes:
        meta_source (`str`): Where validation gradients come from: `"stream"` or `"next_batch"`.
        largest_step (`float`): By which share of its norm a step with the start rates may move the median layer of
            the backbone.
        calibrates_later (`bool`): Whether a step for which `step()` has no validation loss waits for `calibrate()`.
        calibration_is_late (`bool`): Whether the step before the present one waits for it.
    """

    meta_source: str

    def __init__(
        self,
        optimizer: Optimizer,
        shape: Callable[[int], float] | None,
        lr_min: float,
        lr_max: float,
        calibrate: bool,
        meta_context: Callable[[], AbstractContextManager[Any]] = nullcontext,
        reduce: Callable[[Tensor], Tensor] | None = None,
    ):
        self.meta_context, self.reduce = meta_context, reduce
        self.calibrates_later = self.calibration_is_late = False
        self.largest_step = LARGEST_STEP
        self._calibrator = Calibrator(calibrate)
        self._look_ahead = LookAhead(unwrap(optimizer))
        self._found_inf: list[Tensor] = []
        self._measured: tuple[float, list[float]] | tuple[()] = ()
        start_lr = min(max(PROBE_LR, lr_min), lr_max) if calibrate else None
        super().__init__(optimizer, shape, lr_min, lr_max, start_lr)

    @property
    def calibration(self) -> Calibration | None:
        """What the calibration found, once it has."""
        return self._calibrator.found

    @property
    def calibration_forwards(self) -> int:
        """Forward passes that the calibration has taken so far, and those that were counted with it."""
        return self._calibrator.forwards

    def count_forwards(self, forwards: int) -> None:
        """Adds forward passes that something other than a look took, such as fitting the head.

        Args:
            forwards (`int`): How many.
        """
        self._calibrator.forwards += forwards

    @property
    def start_is_known(self) -> bool:
        """Whether the first steps have been calibrated, if they are to be at all."""
        return self._calibrator.has_looked

    @property
    def will_calibrate(self) -> bool:
        """Whether the present step is one whose rates are calibrated."""
        return self._calibrator.due(self.last_epoch)

    def calibrate(self, meta_loss: Callable[[], Tensor]) -> None:
        """Calibrates the step before the present one, where `calibrates_later` is set and `step()` had no loss for it.

        Call it with the loss of the next training batch, before the forward of the training: no other batch is needed.
        A batch of eight images says little; where batches are smaller than 32, the mean loss of several is better.

        Args:
            meta_loss (`Callable`): Takes nothing and returns the scalar loss at the present parameters.
        """
        if self.calibration_is_late:
            check_own_rates(self.optimizer, self.get_lr(), self._group_layers)
            self._calibrate(meta_loss, self.last_epoch - 1)
            self.settle()
            self.write_learning_rates()

    def settle(self) -> None:
        """Records the step before the present one if it still waits, as the last step of a run does."""
        if self.calibration_is_late:
            meta_loss, hypergradients = self._measured or (math.nan, None)
            self.record(meta_loss, hypergradients, self.last_epoch - 1)
            self._measured, self.calibration_is_late = (), False

    @property
    def awaits_calibration(self) -> bool:
        """Whether the step just taken is one along which rates are to be calibrated."""
        return self.will_calibrate and self._look_ahead.taken

    @property
    def overflowed(self) -> bool:
        """Whether the step just taken met an overflow, so that a fused optimizer did not move the parameters."""
        return any(float(flag) > 0 for flag in self._found_inf)

    def _calibrate(self, meta_loss: Callable[[], Tensor] | None, step: int) -> None:
        if self.overflowed:
            return
        before = self.learning_rates
        # Of no use any more, and their room is needed for where the step ended.
        clear_gradients(p for group in self.optimizer.param_groups for p in group["params"])
        with self.meta_context():
            found = self._calibrator.learning_rates(
                self._look_ahead,
                before.tolist(),
                self.shape(step),
                meta_loss,
                head_layers=len(head_layers(self.layers)),
                lr_min=self.lr_min,
                lr_max=self.lr_max,
                reduce=self.reduce,
                momentum_growth=momentum_growth(unwrap(self.optimizer)),
                largest_step=self.largest_step,
            )
        self.learning_rates = self.start_learning_rates = before.new_tensor(found)
        self._look_ahead.rescale(self.ratios(before), keep=self.meta_source == "next_batch")

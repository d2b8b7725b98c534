"""Detects validation losses that are not finite, and optimizer steps that do harm."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable
from typing import Any

logger = logging.getLogger(__name__)

NON_FINITE_WARNING_AFTER = 20
HARM = 3.0
PAUSE = 5
FACTORS = (1 / 4, 1 / 16, 1 / 64)
# What is left of a step that the next batch found harmful, and of the rates: no forward pass tells how much would have
# been good. The rates stay for the rest of the run, and the loss of one batch is a noisy witness.
SHRINK_BLINDLY, LOWER_BLINDLY = 1 / 16, 1 / 4


class TuningGuard:
    """Counts the steps at which nothing could be tuned, and distinguishes harmful steps from noisy ones.

    A step did harm if the loss after it is above three times the running mean *and* three times the loss that the run
    began with, which noise does not reach, and still rises along the step: an odd batch has a high loss too, but
    not by the step. Of a loss that can be below zero, twice its size is added instead, which for one above zero is the
    same. After such a step a few are let pass, for the loss to come down again.

    Args:
        active (`bool`, *optional*, defaults to `True`): Whether any step is called harmful.

    Example:

    ```python
    >>> from metalr_hf.tuning.guard import TuningGuard
    >>> guard = TuningGuard()
    >>> [guard.harmful(loss) for loss in (2.3, 2.0, 1.1, 4.2, 9.0, 1.0)]
    [False, False, False, False, True, False]

    ```
    """

    def __init__(self, active: bool = True) -> None:
        self.active = active
        self.non_finite = 0
        self.refused = 0
        self.restart()

    def restart(self) -> None:
        """Forgets the losses, for a run that begins anew. What was counted stays."""
        self.non_finite_in_a_row = 0
        self.pause = 0
        self.first_loss = self.mean_loss = math.nan
        self.lowest_loss = 0.0

    def begin(self, loss: float) -> None:
        """Notes the loss before the first step of a run.

        If it is not noted, as after a restart, the loss after the first step is taken for it.

        Args:
            loss (`float`): The loss on images that the step did not use.
        """
        if math.isnan(self.first_loss) and math.isfinite(loss):
            self.first_loss = loss
            self.lowest_loss = min(self.lowest_loss, loss)

    def count(self, finite: bool) -> None:
        """Counts a step; warns when many in a row were not finite.

        Args:
            finite (`bool`): Whether the validation loss and all hypergradients were finite.
        """
        self.non_finite += not finite
        self.non_finite_in_a_row = 0 if finite else self.non_finite_in_a_row + 1
        if self.non_finite_in_a_row == NON_FINITE_WARNING_AFTER:
            warnings.warn(
                f"The validation loss or its hypergradients were not finite {NON_FINITE_WARNING_AFTER} times in a row; "
                "the learning rates stay as they are. Look at the meta batches for broken images or labels, lower the "
                "start learning rate or lr_max, or train in float32 or bfloat16 instead of float16.",
                stacklevel=2,
            )

    def count_refused(self) -> None:
        """Counts a harmful step that was taken back; warns of the first."""
        self.refused += 1
        if self.refused == 1:
            logger.warning(
                "A step after which the loss stood far above where the run began was taken back, and the learning "
                "rates with it. Further ones are only counted (`meta_refused` in the Trainer's log). If they are many, "
                "set lr_max lower, or start from a learning rate of your own with calibrate=False."
            )

    @property
    def counts(self) -> dict[str, int]:
        """How many steps were not tuned, and how many taken back, as the log calls them; without those that are 0."""
        counts = {"meta_non_finite": self.non_finite, "meta_refused": self.refused}
        return {name: count for name, count in counts.items() if count}

    def harmful(self, loss: float, slope: float = math.inf) -> bool:
        """Whether the last step did harm. If not, its loss is added to the running mean.

        Args:
            loss (`float`): The loss after the step, on images that it did not see. NaN if it is not known.
            slope (`float`, *optional*, defaults to `math.inf`):
                By how much the loss would rise if the step were taken once more, to first order. NaN if it is not
                known, and the step may be to blame.

        Returns:
            `bool`: always `False` for the first loss and for one that is not finite.
        """
        if not (self.active and math.isfinite(loss)):
            return False
        if math.isnan(self.mean_loss):
            self.begin(loss)
            self.mean_loss = loss
        self.lowest_loss = min(self.lowest_loss, loss)
        self.pause -= self.pause > 0
        if loss > self.limit:
            if self.pause:
                return False
            if not slope <= 0:
                self.pause = PAUSE
                return True
            # One odd batch is to leave the mean what it can bear.
            loss = self.limit
        self.mean_loss += 0.2 * (loss - self.mean_loss)
        return False

    def bearable_factor(self, loss_at: Callable[[float], float]) -> float:
        """The fraction of a harmful step that is kept.

        Args:
            loss_at (`Callable[[float], float]`): A factor of the step to the loss after it, by a forward pass.

        Returns:
            `float`: 1/4, 1/16 or 1/64: the first after which the loss is within the limit, or the last.
        """
        return next((factor for factor in FACTORS[:-1] if loss_at(factor) <= self.limit), FACTORS[-1])

    @property
    def limit(self) -> float:
        """The loss above which a step did harm."""
        reference = max(self.mean_loss, self.first_loss)
        # A loss that crosses zero is sometimes close to it; its own size then does not tell how large its noise is.
        return reference + (HARM - 1) * max(abs(reference), -self.lowest_loss)

    def state_dict(self) -> dict[str, Any]:
        """The state, in plain containers."""
        return {name: value for name, value in vars(self).items() if name != "active"}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores what [`~TuningGuard.state_dict`] gave."""
        vars(self).update(state_dict)

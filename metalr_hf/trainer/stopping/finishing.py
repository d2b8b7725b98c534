"""A run that stops by itself and, in the end, trains on with the images that it was evaluated on."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import ConcatDataset, IterableDataset, RandomSampler, Sampler
from transformers.trainer_utils import has_length

from ..batches import own_data_methods
from .convergence import is_clearly_worse
from .evaluating import StoppingTrainer

# How many steps a run goes on for, as a share of those up to then. The average of the weights then is one over steps
# with all images, mostly.
FURTHER_STEPS = 1 / 3
# In the log of the step after which it does.
ALL_IMAGES_FROM = "all_images_from_step"


class HeldBackSampler(Sampler[int]):
    """Random rows of a data set whose last ones are held back until they are let in.

    An epoch always has as many rows as are not held back. Its order depends on the seed and on the number of the epoch
    alone, so that it is the same in all processes and in a run that is resumed.

    Args:
        kept (`int`): How many rows are not held back.
        rows (`int`): How many there are.
        seed (`int`): Of the order.

    Attributes:
        epoch (`int`): The number of the next epoch.
        lets_in (`bool`): Whether the rows that were held back are drawn too.

    Example:

    ```python
    >>> from metalr_hf.trainer.stopping.finishing import HeldBackSampler
    >>> sampler = HeldBackSampler(kept=3, rows=5, seed=0)
    >>> sorted(sampler)
    [0, 1, 2]
    >>> sampler.lets_in = True
    >>> len(list(sampler)), len({row for epoch in range(20) for row in sampler})
    (3, 5)

    ```
    """

    def __init__(self, kept: int, rows: int, seed: int):
        self.kept, self.rows, self.seed = kept, rows, seed
        self.epoch, self.lets_in = 0, False

    def __len__(self) -> int:
        return self.kept

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        self.epoch += 1
        order = torch.randperm(self.rows if self.lets_in else self.kept, generator=generator)
        return iter(order[: self.kept].tolist())


class FinishingTrainer(StoppingTrainer):
    """[`StoppingTrainer`] that in the end trains on the images that were held back, too.

    A run that stops by itself has to be evaluated on images that it is not trained on, and where there are few, they
    are missed. So it does not stop when it has converged, but goes on for a third of its steps with all images, and is
    not evaluated any more. Where it has come to overfit, so that it goes back to earlier weights, it stops at once. A
    run that has not converged when three quarters of its limit are over trains with all images up to the limit.

    Args:
        *args: Of `Trainer`, in its order.
        held_back (torch dataset, *optional*): With `args.stop_when_converged`, images that are trained on only when
            the run has converged, or for the last quarter before a limit, prepared like the training set: those of
            `eval_dataset`.
        **kwargs: Of `Trainer`, by keyword.

    Raises:
        ValueError: if `held_back` is given and the run does not stop by itself, or it cannot say which images are
            drawn.
    """

    def __init__(self, *args: Any, held_back: Any = None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.held_back = held_back
        self._sampler: HeldBackSampler | None = None
        self._steps_per_epoch = 1
        self._near_time_limit = False
        if held_back is not None:
            self._check_held_back()

    def _check_held_back(self) -> None:
        if not self.args.stop_when_converged:
            raise ValueError(
                "held_back is for runs that stop by themselves. Set stop_when_converged=True, or put its images into "
                "train_dataset."
            )
        for name, dataset in (("train_dataset", self.train_dataset), ("held_back", self.held_back)):
            if not has_length(dataset) or isinstance(dataset, IterableDataset):
                raise ValueError(
                    f"held_back needs data sets whose rows have numbers, and {name} is a {type(dataset).__name__}. "
                    "Leave out held_back."
                )
        own = own_data_methods(self)
        if own or not isinstance(self._get_train_sampler(), RandomSampler):
            which = f"{own[0]} of {type(self).__name__}" if own else "train_sampling_strategy"
            raise ValueError(
                f"held_back: {which} says which images are drawn, and would not know of those. Leave out held_back."
            )

    # Not `get_train_dataloader`, by whose being overridden a loader of the user's own is known.
    def _get_dataloader(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("is_training") and self.held_back is not None:
            seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
            kept, dataset = len(dataset), ConcatDataset([dataset, self.held_back])
            self._sampler = sampler = HeldBackSampler(kept, len(dataset), seed)
            kwargs["sampler_fn"] = lambda _: sampler
        return super()._get_dataloader(dataset, *args, **kwargs)

    def num_examples(self, dataloader: Any) -> int:
        """Trainer's; of the training set, those that an epoch has."""
        parts: Any = getattr(getattr(dataloader, "dataset", None), "datasets", ())
        is_training_set = self._sampler is not None and len(parts) == 2 and parts[1] is self.held_back
        return len(parts[0]) if is_training_set else super().num_examples(dataloader)

    def _init_training_state(
        self, max_steps: int, steps_per_epoch: int, epochs: int, resume_from_checkpoint: str | None, trial: Any
    ) -> tuple[int, int]:
        self.all_images_from, self._steps_per_epoch, self._near_time_limit = None, steps_per_epoch, False
        start = super()._init_training_state(max_steps, steps_per_epoch, epochs, resume_from_checkpoint, trial)
        marks = [int(row[ALL_IMAGES_FROM]) for row in self.state.log_history if ALL_IMAGES_FROM in row]
        all_images_from = marks[0] if marks else None
        if all_images_from is not None and self.held_back is None:
            raise ValueError(
                f"resume_from_checkpoint={resume_from_checkpoint!r} is of a run that was trained on its held_back "
                "images from some step on, and there are none here. Pass the same held_back."
            )
        if self._sampler is None:
            return start
        if all_images_from is not None:
            self._let_in(all_images_from)
            done = self.state.global_step - all_images_from
            # The epoch in which they were let in was left.
            begun = math.ceil(all_images_from / steps_per_epoch) + done // steps_per_epoch
            batches = done % steps_per_epoch * self.args.gradient_accumulation_steps
            start = (epochs, 0) if self.state.global_step >= self.last_step else (begun, batches)
        self._sampler.epoch = start[0]
        return start

    def _let_in(self, step: int) -> None:
        assert self._sampler is not None
        self.all_images_from, self._sampler.lets_in = step, True

    @property
    def last_step(self) -> int:
        """The step that the run ends at, as far as is known."""
        return self.state.max_steps if self.all_images_from is None else self._last_step_after(self.all_images_from)

    @property
    def _step_near_limit(self) -> int:
        """The end of the epoch in which three quarters of the limit are over, or of the last but one."""
        epochs = self.state.max_steps / self._steps_per_epoch
        return min(math.ceil(round(epochs / (1 + FURTHER_STEPS), 6)), math.ceil(epochs) - 1) * self._steps_per_epoch

    def _comes_near_limit(self, time_used: float) -> bool:
        if self._sampler is None:
            return False
        was_near, self._near_time_limit = self._near_time_limit, time_used * (1 + FURTHER_STEPS) >= 1
        return self._near_time_limit > was_near or self.state.global_step == self._step_near_limit

    def _last_step_after(self, step: int) -> int:
        """The last step of a run that goes on with all images after this one."""
        if step == self._step_near_limit:
            return self.state.max_steps
        further = math.ceil(round(FURTHER_STEPS * step, 6))
        # Where there is a limit, so many epochs are left after the one in which it converged.
        epochs_left = int(self.state.num_train_epochs) - math.ceil(step / self._steps_per_epoch)
        return min(step + min(further, epochs_left * self._steps_per_epoch), self.state.max_steps)

    def _begin_last_part(self) -> bool:
        step, evaluations = self.state.global_step, self.evaluations()
        overfits = is_clearly_worse(evaluations, self.args.greater_is_better)
        may_go_on = self._sampler is not None and not self.control.should_training_stop
        if overfits or not may_go_on or self._last_step_after(step) <= step:
            return False
        self._let_in(step)
        self.log({ALL_IMAGES_FROM: step})
        # The next one draws from all images.
        self.control.should_epoch_stop = True
        self.state.best_metric, self.state.best_global_step = evaluations[-1].metric, step
        return True

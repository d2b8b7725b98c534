"""Detects within a few steps that a run has collapsed to a constant output, and restores its first weights."""

from __future__ import annotations

import tempfile
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.utils import logging

from ..models.bare import outputs_and_logits
from ..models.target_losses import ClassLoss, TargetLoss
from ..tuning.contexts import untouched
from ..tuning.sharding import local, reshard, saved, shard_of
from .batches import batches_to_look_at

if TYPE_CHECKING:
    from .metalr import MetaLRTrainer


logger = logging.get_logger(__name__)

# Log-probabilities that differ by less than this from image to image, and by less than this share of what they did at
# the start, are the same answer to all of them.
SPREAD, SHARE_OF_SPREAD = 0.02, 0.1
# A loss this near the one of the best constant answer has learned nothing.
NOTHING_LEARNED = 0.97
# Of the start rates, with which a run that has collapsed begins again.
COLLAPSE_FACTOR = 0.1


class CollapseGuard:
    """Keeps the first weights of a run in a temporary file, and knows when to go back to them.

    A learning rate that is much too high drives the features of a network to a constant, where gradients vanish and no
    later learning rate helps. Such a run answers every image alike at the loss of the best constant answer, the entropy
    of the labels. Both signs together are looked for, at a few steps early in the run; a run that merely learns slowly
    still answers differently from image to image.

    The file has no name and is gone with the guard or the process, however that ends. If the disk for temporary files
    (`TMPDIR`) is full, the weights are kept in the CPU's memory.

    Args:
        model (`torch.nn.Module`): The model. Its weights at the first look are the first weights.
        every (`int`, *optional*, defaults to 10): How many steps apart it looks, at the mean loss between and the
            labels of all steps so far, which give the best constant answer.
        loss ([`~metalr_hf.models.target_losses.TargetLoss`], *optional*):
            The loss, which knows what a constant answer costs; cross-entropy by default.

    Example:

    ```python
    >>> import torch
    >>> from metalr_hf.trainer.collapse import CollapseGuard
    >>> model = torch.nn.Linear(4, 2)
    >>> guard = CollapseGuard(model, every=2)
    >>> images, labels = torch.randn(4, 4), torch.tensor([0, 1, 0, 1])
    >>> guard.note(torch.tensor(0.75), labels)
    >>> guard.collapsed(lambda: model(images))
    False
    >>> _ = torch.nn.init.zeros_(model.weight)
    >>> guard.note(torch.tensor(0.69), labels)
    >>> guard.collapsed(lambda: model(images))
    True
    >>> guard.go_back(model)
    >>> bool((model.weight == 0).any())
    False

    ```
    """

    def __init__(self, model: nn.Module, every: int = 10, loss: TargetLoss | None = None):
        self.every = every
        self.loss = ClassLoss() if loss is None else loss
        self.active = True
        self.losses: list[Tensor] = []
        self.labels: list[Tensor] = []
        self.start_spread: float | None = None
        self._model = model
        self._start: _StoredWeights | None = None

    def note(self, loss: Tensor, labels: Tensor) -> None:
        """Notes a step, without waiting for the device.

        Args:
            loss (`torch.Tensor` of shape `()`): The training loss.
            labels (`torch.Tensor`): The class of every image (int64), or what the loss is for.
        """
        self.losses.append(loss.detach())
        self.labels.append(labels.detach())

    def collapsed(
        self, logits: Callable[[], Tensor | None], reduce: Callable[[Tensor], Tensor] = lambda values: values
    ) -> bool:
        """Whether the run has collapsed. Looks at every few steps only and says `False` between.

        Args:
            logits (`Callable`): Takes nothing and returns the logits `(batch, classes)` of a batch. Called at the
                first call, when the weights are written too, where `None` ends the watch; and then only if the loss is
                suspicious, where `None` says that the images are all of one class and may get the same answer.
            reduce (`Callable`, *optional*): Averages a tensor over all processes.
        """
        if self.start_spread is None:
            answers = logits()
            if answers is None:
                self.stop()
                return False
            self.start_spread = float(reduce(self._spread(answers)))
        if self._start is None:
            self._start = _StoredWeights(_weights(self._model))
        if len(self.losses) < self.every:
            return False
        device = self.losses[-1].device
        loss = torch.stack([loss.to(device, torch.float32) for loss in self.losses]).mean()
        labels = torch.cat([labels.to(device) for labels in self.labels])
        self.losses = []
        mean_loss, constant = reduce(torch.stack([loss, self.loss.constant_loss(labels)])).tolist()
        if constant == 0 or not mean_loss >= NOTHING_LEARNED * constant:
            return False
        answers = logits()
        if answers is None:
            return False
        return float(reduce(self._spread(answers))) < min(SPREAD, SHARE_OF_SPREAD * self.start_spread)

    def _spread(self, logits: Tensor) -> Tensor:
        return self.loss.answers(logits.detach().float()).std(0).mean().reshape(1)

    def go_back(self, model: nn.Module) -> None:
        """Puts the first weights and buffers back.

        Args:
            model (`torch.nn.Module`): The model that the guard was made with.
        """
        assert self._start is not None
        # Frozen ones are where they were.
        present = model.state_dict(keep_vars=True)
        with torch.no_grad():
            for name, value in self._start.load().items():
                local(present[name]).copy_(shard_of(value.to(present[name].device), present[name]))

    def measure_anew(self) -> None:
        """Forgets how far apart the answers were, and the losses: the head is another one, of another scale."""
        self.start_spread, self.losses, self.labels = None, [], []

    def stop(self) -> None:
        """Frees the stored weights and stops watching the run."""
        self.active = False
        self.losses, self.labels, self._start = [], [], None

    def state_dict(self) -> dict[str, Any]:
        """The state, first weights included, in tensors and plain containers."""
        return {
            "active": self.active,
            "losses": [float(loss) for loss in self.losses],
            "labels": torch.cat(self.labels).cpu() if self.labels else torch.zeros(0, dtype=torch.int64),
            "start_spread": self.start_spread,
            "start": {} if self._start is None else self._start.load(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores what [`~CollapseGuard.state_dict`] gave.

        Args:
            state_dict (`dict`): The state.
        """
        # The first weights are those of the run, not those that it goes on from.
        self.active, self.start_spread = state_dict["active"], state_dict["start_spread"]
        self._start = _StoredWeights(state_dict["start"]) if state_dict["start"] else None
        self.losses = [torch.tensor(loss) for loss in state_dict["losses"]]
        self.labels = [state_dict["labels"]]


def guard_for(model: nn.Module, loss: Any = None) -> CollapseGuard | None:
    """The guard of a run, if a constant answer can be told from its loss.

    Args:
        model (`torch.nn.Module`): The model.
        loss (`Callable`, *optional*): The `compute_loss_func` of the run.

    Returns:
        [`CollapseGuard`], *optional*: `None` for a loss of the user's own.

    Example:

    ```python
    >>> import torch
    >>> from metalr_hf.trainer.collapse import guard_for
    >>> guard_for(torch.nn.Linear(4, 2), loss=lambda outputs, labels, num_items_in_batch=None: outputs.logits.sum())

    ```
    """
    if loss is not None and not isinstance(loss, TargetLoss):
        return None
    return CollapseGuard(model, loss=loss)


def undo_collapse(trainer: MetaLRTrainer, batches: Sequence[Any]) -> None:
    """Goes back to the first weights of a run that has collapsed, and on with lower learning rates.

    Args:
        trainer ([`~metalr_hf.MetaLRTrainer`]): The trainer, before a step and not in it, where a scaler waits for its
            gradients.
        batches (`Sequence`): Those of the coming step, as the data loader gives them.

    Example:

    ```python
    >>> import torch
    >>> from metalr_hf import MetaLRTrainer, MetaLRTrainingArguments
    >>> from metalr_hf.trainer.collapse import undo_collapse
    >>> images = [{"pixel_values": torch.randn(4), "labels": i % 2} for i in range(8)]
    >>> args = MetaLRTrainingArguments("runs/example", save_strategy="no", report_to="none", use_cpu=True)
    >>> trainer = MetaLRTrainer(torch.nn.Linear(4, 2), args, train_dataset=images)
    >>> undo_collapse(trainer, batches=[])  # It has taken no step yet.

    ```
    """
    scheduler, guard, model = trainer.lr_scheduler, trainer.collapse_guard, trainer.model
    if guard is None or not guard.active:
        return

    def have_classes(some: Sequence[Any]) -> bool:
        # Every process is to look at as many batches: those of a sharded model take their forward passes together.
        verdict = torch.tensor([float(_has_classes(some))], device=trainer.args.device)
        return bool(trainer._mean_over_processes(verdict) == 1)

    def logits() -> Tensor | None:
        looked_at = batches[:1]
        if not have_classes(looked_at):
            looked_at = batches_to_look_at(trainer, batches)
            if guard.start_spread is not None and not have_classes(looked_at):
                return None
        with torch.no_grad(), untouched(model, "eval"):
            has_own_loss = trainer.compute_loss_func is None
            inputs = map(trainer._prepare_inputs, looked_at)
            answers = [outputs_and_logits(model, batch, has_own_loss)[1] for batch in inputs]
        reshard(model)
        found = [answer for answer in answers if answer is not None]
        return torch.cat(found) if found else None

    if not guard.loss.reads(batches[0].get("labels") if isinstance(batches[0], Mapping) else None):
        guard.stop()
    elif guard.collapsed(logits, trainer._mean_over_processes):
        guard.go_back(model)
        scheduler.restart(COLLAPSE_FACTOR)
        guard.stop()
        trainer.last_features.forget()
        trainer.fresh_head.fit_again(trainer)
        if trainer.weight_average is not None:
            trainer.weight_average.restart()
        logger.warning(
            f"By step {trainer.state.global_step} the model answered every image alike, at the loss of a constant "
            "answer: its learning rates were too high. Its first weights are back, the learning rates are "
            f"{COLLAPSE_FACTOR:g} times what they were at the start, and are tuned anew."
        )
    elif scheduler.tuning_is_over:
        guard.stop()


def _has_classes(batches: Sequence[Any]) -> bool:
    """Whether images are of more than one class: those of one may well get the same answer, as a single one does."""
    labels = torch.cat([batch["labels"] for batch in batches])
    return bool((labels != labels[:1]).any())


def _weights(model: nn.Module) -> dict[str, Tensor]:
    """What may change during the run: beside adapters, the frozen weights are by far the larger part."""
    state = model.state_dict(keep_vars=True)
    frozen = {name for name, value in state.items() if isinstance(value, nn.Parameter) and not value.requires_grad}
    return {
        name: saved(local(value), value)
        for name, value in state.items()
        if name not in frozen and isinstance(value, Tensor)
    }


class _StoredWeights:
    """Tensors by name, in a temporary file."""

    def __init__(self, tensors: dict[str, Tensor]):
        self.in_memory: dict[str, Tensor] | None = None
        self._file: Any = None
        # A copy in memory would be there at the peak of every step, and on a CPU beside the weights themselves.
        try:
            # No buffer of its own: one that is left in a forked process, too, would move the place in the file as it
            # is closed.
            self._file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115
            weakref.finalize(self, self._file.close)
            with open(self._file.fileno(), "wb", closefd=False) as file:
                torch.save(tensors, file)
        except (OSError, RuntimeError):
            if self._file is not None:
                # A full disk gets back what was written until then.
                self._file.close()
            self.in_memory = {name: value.detach().to("cpu", copy=True) for name, value in tensors.items()}

    def load(self) -> dict[str, Tensor]:
        """The tensors, on the CPU."""
        if self.in_memory is not None:
            return self.in_memory
        with open(self._file.fileno(), "rb", closefd=False) as file:
            file.seek(0)
            return torch.load(file, map_location="cpu", weights_only=True)

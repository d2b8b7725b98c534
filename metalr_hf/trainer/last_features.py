"""Fits the head once more, to the features of the last training steps, for the average of the weights."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..models.target_losses import ClassLoss
from ..tuning.ridge import FittedHead, fit_head
from ..tuning.sharding import local, whole
from .fresh_head import HEAD_IMAGES, last_linear, write_head

if TYPE_CHECKING:
    from .metalr import MetaLRTrainer

# What the fitted head counts in the mean of it and the head as it was trained.
FITTED_WEIGHT = 1 / 3
FEWEST_OF_A_CLASS = 2


class LastFeatures:
    """What the head was given in the last training steps, and the head that is fitted to it.

    Tens of steps leave a head that turns with the noise of its gradients. A ridge regression on the features of the
    last steps has none of that, but trusts features of images that the backbone has been trained on. Their mean was
    better than the trained one in most runs, and worse in fewer than the fitted one. The features come from the forward
    passes of the training, so that this takes no further one. In the fit an image counts by the inverse root of how
    many its class has, unless the loss has weights for the classes.
    It is done where weights are averaged, and for a head that [`~metalr_hf.trainer.fresh_head.FreshHead`] has found to
    be fresh and linear, whether it fitted it or not, once each class has two images or more among the last.

    Attributes:
        images (`int`): How many images the head was fitted to in the weights that were last looked at, or gone back to;
            0 if it was not.

    Example:

    ```python
    >>> import timm
    >>> import torch
    >>> from metalr_hf import MetaLRTrainer, MetaLRTrainingArguments
    >>> _ = torch.manual_seed(0)
    >>> images = [{"pixel_values": torch.randn(3, 160, 160) + i % 2, "labels": i % 2} for i in range(16)]
    >>> args = MetaLRTrainingArguments("runs/example", max_steps=8, save_strategy="no", report_to="none", use_cpu=True)
    >>> trainer = MetaLRTrainer(timm.create_model("test_vit", num_classes=2), args, train_dataset=images)
    >>> _ = trainer.train()  # doctest: +ELLIPSIS
    {'train_runtime': ...
    >>> trainer.last_features.images
    40

    ```
    """

    def __init__(self) -> None:
        self.images = 0
        self._images_at: dict[int, int] = {}
        self._batches: deque[tuple[Tensor, Tensor]] = deque()
        self._linear: nn.Linear | None = None
        self._fitted: tuple[int, FittedHead] | None = None

    @contextmanager
    def noted(self, trainer: MetaLRTrainer, inputs: Any) -> Iterator[None]:
        """A context in which the forward pass of a training step leaves its features here.

        Args:
            trainer ([`~metalr_hf.MetaLRTrainer`]): The trainer.
            inputs (`dict`): The batch of the step.
        """
        linear, labels = self._head_of(trainer), inputs.get("labels") if isinstance(inputs, Mapping) else None
        if linear is None or not ClassLoss().reads(labels):
            yield
            return
        seen: list[Tensor] = []
        # A copy: a view would keep all that the backbone has computed.
        copy = partial(torch.Tensor.to, dtype=torch.float32, copy=True)
        handle = linear.register_forward_hook(lambda _, given, __: seen.append(copy(given[0].detach())))
        try:
            yield
        finally:
            handle.remove()
        if seen:
            self._note(trainer, seen[0], labels.to(seen[0].device, copy=True))

    def _note(self, trainer: MetaLRTrainer, features: Tensor, labels: Tensor) -> None:
        if trainer.args.world_size > 1:
            # Every process is to fit the same head, and one may save alone.
            gather, pad = trainer.accelerator.gather, trainer.accelerator.pad_across_processes
            features, labels = gather(pad(features)), gather(pad(labels, pad_index=-100))
        self._batches.append((features, labels))
        while sum(len(labels) for _, labels in self._batches) - len(self._batches[0][1]) >= HEAD_IMAGES:
            self._batches.popleft()

    def _head_of(self, trainer: MetaLRTrainer) -> nn.Linear | None:
        # A hook that comes and goes would have a compiled model compiled again, and copies on several devices not hear
        # of it.
        plain = not trainer.args.torch_compile and trainer.args.n_gpu <= 1
        if not (plain and trainer.fresh_head.is_fresh and trainer.average_weights):
            return None
        if self._linear is None:
            self._linear = last_linear(trainer.model, trainer._layer_groups(trainer.model))
        return self._linear

    @torch.no_grad()
    def refine(self, trainer: MetaLRTrainer) -> None:
        """Puts the mean of the head as it is and the fitted one in its place.

        Args:
            trainer ([`~metalr_hf.MetaLRTrainer`]): The trainer, whose model holds the average of its weights.
        """
        self.images = self._images_at[trainer.state.global_step] = self._refine(trainer)

    def go_back(self, step: int | None) -> None:
        """Notes that the model is that of an earlier step, as when the best is loaded at the end.

        Args:
            step (`int`, *optional*): The optimizer step.
        """
        self.images = self._images_at.get(step or 0, self.images)

    def _refine(self, trainer: MetaLRTrainer) -> int:
        linear = self._head_of(trainer)
        if linear is None or not self._batches:
            return 0
        # Those of a checkpoint are on the CPU, as the fit is.
        features, labels = (torch.cat([part.cpu() for part in parts]) for parts in zip(*self._batches, strict=True))
        known = (labels >= 0) & (labels < linear.out_features)
        features, labels = features[known], labels[known]
        counts = labels.bincount(minlength=linear.out_features)
        # A class without images would get the answer 0, among others that are fitted.
        if counts.min() < FEWEST_OF_A_CLASS:
            return 0
        if self._fitted is None or self._fitted[0] != trainer.state.global_step:
            weights = _weights(trainer, counts)
            self._fitted = trainer.state.global_step, fit_head(features, labels, linear.out_features, weights)
        fitted = self._fitted[1]
        own = [whole(local(part), part).to(features) for part in (linear.weight, linear.bias)]
        new = [fitted.weight, fitted.bias]
        scale = _spread(functional.linear(features, *own)) / _spread(functional.linear(features, *new))
        if not bool(scale.isfinite()):
            return 0
        means = [mine.lerp(scale * other, FITTED_WEIGHT) for mine, other in zip(own, new, strict=True)]
        write_head(linear, *(part.to(linear.weight.device) for part in means))
        return len(labels)

    def forget(self) -> None:
        """Forgets all features, for a run that begins anew."""
        self._batches.clear()
        self.images, self._fitted = 0, None
        self._images_at.clear()

    def state_dict(self) -> dict[str, Any]:
        """The features and classes, on the CPU."""
        batches = [[part.cpu() for part in batch] for batch in self._batches]
        return {"batches": batches, "images": self.images, "images_at": dict(self._images_at)}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restores what [`~LastFeatures.state_dict`] gave.

        Args:
            state_dict (`Mapping`): The state.
        """
        self._batches = deque((features, labels) for features, labels in state_dict["batches"])
        self.images, self._images_at = state_dict["images"], dict(state_dict["images_at"])
        self._fitted = None


def _weights(trainer: MetaLRTrainer, counts: Tensor) -> Tensor:
    """By how much the images of each class count: as in the loss, or more where the class is rare."""
    loss = trainer.compute_loss_func
    if isinstance(loss, ClassLoss) and loss.weights is not None:
        return loss.weights
    # Ridge regression answers a rare class too rarely, more so than the cross-entropy that the head was trained with.
    # Without the root, all classes would count alike: better for the rare ones, but at the cost of accuracy.
    return (counts.sum() / (len(counts) * counts)).sqrt()


def _spread(logits: Tensor) -> Tensor:
    """The standard deviation of logits that are centred, as a constant added to all classes changes no answer."""
    return (logits - logits.mean(1, keepdim=True)).std()

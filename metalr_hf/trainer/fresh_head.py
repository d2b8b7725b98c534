"""Gives a fresh head weights in closed form, as soon as the start rates are calibrated."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import closing, suppress
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import broadcast
from torch import Tensor, nn
from torch.nn import functional
from transformers.trainer_utils import has_length

from ..layers.names import head_layers
from ..models.bare import outputs_and_logits
from ..models.target_losses import ClassLoss
from ..tuning.contexts import untouched
from ..tuning.ridge import fit_head
from ..tuning.sharding import local, reshard, shard_of
from .batches import EmptyMetaSetError, spare_batches
from .defaults import fits_head

if TYPE_CHECKING:
    from .metalr import MetaLRTrainer


# Training images that a head is fitted to, at most, and as a share of those that the run will be trained on.
HEAD_IMAGES, SHARE_OF_A_RUN = 512, 0.2
# A head is replaced by one whose loss on images that it was not fitted to is at most this share of its own. Where the
# features say little of the classes, a head that was fitted to them was worse than random numbers that learn.
CLEARLY_BETTER = 0.8
# A head with a loss below this share of that of the best constant answer was trained before. After the steps that are
# calibrated, fresh ones had half of it and more, on the easiest sets too.
LEARNED = 0.3


class FreshHead:
    """The head of a run, fitted in closed form if it is fresh.

    A fresh head is random numbers. While it learns what the backbone already sees, its gradients move a backbone that
    had better stay where it is (Kumar et al. 2022, *Fine-Tuning can Distort Pretrained Features and Underperform
    Out-of-Distribution*). Fitted is the linear layer that gives a classifier's logits, where that makes it clearly
    better and it was not trained before. It is done after the steps that are calibrated: along a step through a head
    that knows the images already, only the lowest rates do no harm.

    Attributes:
        is_due (`bool`): Whether it is still to be fitted.
        images (`int`): How many images it was fitted to; 0 if it was not.
        is_fresh (`bool`): Whether it was found to be one that can be fitted: the linear layer that gives a classifier's
            logits, not trained before.

    Example:

    ```python
    >>> import timm
    >>> import torch
    >>> from metalr_hf import MetaLRTrainer, MetaLRTrainingArguments
    >>> _ = torch.manual_seed(0)
    >>> images = [{"pixel_values": torch.randn(3, 160, 160) + i % 2, "labels": i % 2} for i in range(16)]
    >>> args = MetaLRTrainingArguments("runs/example", max_steps=10, save_strategy="no", report_to="none", use_cpu=True)
    >>> trainer = MetaLRTrainer(timm.create_model("test_vit", num_classes=2), args, train_dataset=images)
    >>> _ = trainer.train()  # doctest: +ELLIPSIS
    {'train_runtime': ...
    >>> trainer.fresh_head.images
    16

    ```
    """

    def __init__(self) -> None:
        self.is_due = True
        self.images = 0
        self.is_fresh = False

    def fit_when_due(self, trainer: MetaLRTrainer) -> None:
        """Fits the head once the start rates are calibrated, if it is to be fitted at all.

        Args:
            trainer ([`~metalr_hf.MetaLRTrainer`]): The trainer, before a step.
        """
        scheduler = trainer.lr_scheduler
        if not (self.is_due and scheduler.start_is_known):
            return
        self.is_due = False
        # A loss of the user's own need not be one of classes.
        if fits_head(trainer.args) and not trainer._computes_own_loss:
            scheduler.count_forwards(self.fit(trainer))
        if self.images:
            scheduler.close_step()
            if trainer.collapse_guard is not None:
                trainer.collapse_guard.measure_anew()

    def fit_again(self, trainer: MetaLRTrainer) -> None:
        """Fits the head once more, after the first weights of the run have been put back.

        Args:
            trainer ([`~metalr_hf.MetaLRTrainer`]): The trainer, before a step.
        """
        self.is_due, self.images, self.is_fresh = True, 0, False
        self.fit_when_due(trainer)

    @torch.no_grad()
    def fit(self, trainer: MetaLRTrainer) -> int:
        """Fits the head of a trainer's model, where there is one to fit.

        Args:
            trainer ([`~metalr_hf.MetaLRTrainer`]): The trainer, between two steps.

        Returns:
            `int`: how many forward passes it took.
        """
        model, loss = trainer.model, trainer.compute_loss_func or ClassLoss()
        linear = last_linear(model, trainer._layer_groups(model))
        if linear is None or not isinstance(loss, ClassLoss):
            return 0
        examples, forwards = _examples(trainer, linear)
        if examples is not None:
            self._replace_if_better(trainer, linear, loss, *examples)
        return forwards

    def _replace_if_better(
        self,
        trainer: MetaLRTrainer,
        linear: nn.Linear,
        loss: ClassLoss,
        features: Tensor,
        logits: Tensor,
        labels: Tensor,
    ) -> None:
        classes = logits.shape[1]
        known = (labels >= 0) & (labels < classes)
        features, logits, labels = features[known], logits[known], labels[known]
        fitted = fit_head(features, labels, classes, loss.weights)
        present = loss.losses(logits.float(), labels).mean()
        constant = loss.constant_loss(labels)
        # Images of a single class tell nothing.
        fresh = (constant > 0) & (present > LEARNED * constant)
        verdict = torch.stack([fresh, fresh & (fitted.loss <= CLEARLY_BETTER * present)])
        parts = [part.to(linear.weight.device, linear.weight.dtype) for part in (verdict, fitted.weight, fitted.bias)]
        if trainer.args.world_size > 1:
            # Every process has seen the same images, but may have rounded in another way.
            parts = broadcast(parts)
        self.is_fresh, is_better = parts[0].bool().tolist()
        if is_better:
            write_head(linear, *parts[1:])
            self.images = len(labels)

    def state_dict(self) -> dict[str, Any]:
        """The state, in plain containers."""
        return {"is_due": self.is_due, "images": self.images, "is_fresh": self.is_fresh}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores what [`~FreshHead.state_dict`] gave.

        Args:
            state_dict (`dict`): The state.
        """
        self.is_due, self.images = state_dict["is_due"], state_dict["images"]
        self.is_fresh = state_dict["is_fresh"]


def last_linear(model: nn.Module, layers: Mapping[str, Sequence[str]]) -> nn.Linear | None:
    """The last linear layer of a model's head, if it is trained and has a bias.

    Args:
        model (`torch.nn.Module`): The model.
        layers (`Mapping[str, Sequence[str]]`): Layer name to parameter names, the head last.

    Returns:
        `torch.nn.Linear`, *optional*

    Example:

    ```python
    >>> import timm
    >>> from metalr_hf import layer_groups
    >>> from metalr_hf.trainer.fresh_head import last_linear
    >>> model = timm.create_model("test_vit", num_classes=2)
    >>> last_linear(model, layer_groups(model))
    Linear(in_features=64, out_features=2, bias=True)

    ```
    """
    of_head = {name for layer in head_layers(list(layers)) for name in layers[layer]}
    found = [
        module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and {f"{name}.weight", f"{name}.bias"} <= of_head
    ]
    # Quantised weights are integers.
    return found[-1] if found and found[-1].weight.is_floating_point() else None


@torch.no_grad()
def write_head(linear: nn.Linear, weight: Tensor, bias: Tensor) -> None:
    """Writes a head into a model's linear layer, of which this process may hold a part.

    Args:
        linear (`torch.nn.Linear`): The layer.
        weight (`torch.Tensor` of shape `(classes, features)`): Its whole weight.
        bias (`torch.Tensor` of shape `(classes,)`): Its whole bias.
    """
    for parameter, value in ((linear.weight, weight), (linear.bias, bias)):
        local(parameter).copy_(shard_of(value, parameter))


def _images_to_fit(trainer: MetaLRTrainer) -> int:
    """How many training images to fit a head to."""
    args, dataset = trainer.args, trainer.train_dataset
    a_step = trainer._train_batch_size * args.gradient_accumulation_steps * args.world_size
    affordable = max(1, int(SHARE_OF_A_RUN * trainer.state.max_steps * a_step))
    return min(HEAD_IMAGES, affordable, len(dataset) if has_length(dataset) else HEAD_IMAGES)


def _examples(trainer: MetaLRTrainer, linear: nn.Linear) -> tuple[list[Tensor] | None, int]:
    """Features, logits and classes of some training images, where the head is linear, and how many forwards it took."""
    limit, batches, forwards = _images_to_fit(trainer), [], 0
    with closing(_batches(trainer, linear, limit)) as found:
        for batch in found:
            forwards += 1
            if batch is None:
                return None, forwards
            batches.append(batch)
    # The last batch may begin the images anew.
    return [torch.cat(parts)[:limit] for parts in zip(*batches, strict=True)] or None, forwards


def _batches(trainer: MetaLRTrainer, linear: nn.Linear, images: int) -> Generator[tuple[Tensor, Tensor, Tensor] | None]:
    """Features, logits and classes of some training images; `None` where they are not those of a linear head."""
    model, seen = trainer.model, []
    # A copy: a view, as of the first token, would keep all that the backbone has computed.
    hook = linear.register_forward_hook(lambda module, args, output: seen.append((args[0].clone(), output)))
    try:
        with untouched(model), suppress(EmptyMetaSetError):
            # With dropout, as the head will see the features while it is trained.
            model.train()
            for batch in spare_batches(trainer, images) or ():
                inputs = trainer._prepare_inputs(batch)
                labels = inputs.get("labels")
                if not ClassLoss().reads(labels):
                    yield None
                    return
                seen.clear()
                with trainer.compute_loss_context_manager():
                    outputs, logits = outputs_and_logits(model, inputs, trainer.compute_loss_func is None)
                if logits is None or len(seen) != 1:
                    yield None
                    return
                if trainer.compute_loss_func is None and not _is_cross_entropy(outputs, logits, labels):
                    yield None
                    return
                features, output = seen[0]
                is_last = output.shape == logits.shape and torch.equal(output.float(), logits.float())
                yield (features, logits, labels) if is_last and logits.shape[1] > 1 else None
    finally:
        hook.remove()
        reshard(model)


def _is_cross_entropy(outputs: Any, logits: Tensor, labels: Tensor) -> bool:
    """Whether the loss that a model returned is what a head is fitted for, and not one of the model's own."""
    loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs[0]
    known = (labels >= 0) & (labels < logits.shape[1])
    if not isinstance(loss, Tensor) or not known.any():
        return False
    expected = functional.cross_entropy(logits[known].float(), labels[known])
    rounding = 1e-3 if logits.dtype == torch.float32 else 1e-2
    return torch.allclose(loss.float().mean(), expected, rtol=rounding, atol=rounding)

"""Strategies that are optimizers of other packages, without a schedule or a learning rate, used as their authors do."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from transformers import BatchFeature, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ...layers.groups import layer_groups
from ...trainer.batches import stream_of
from ...tuning.contexts import untouched
from .registry import Job, register_strategy

# GeN's example starts at this rate and looks at the loss at every fourth step.
GEN_START, GEN_EVERY = 1e-4, 4


@register_strategy("schedule_free", packages=["schedulefree"], needs_horizon=False, averages=True)
def schedule_free(job: Job) -> Trainer:
    """Schedule-free AdamW (Defazio et al. 2024), Trainer's own option; needs the package `schedulefree`."""
    return job.trainer(optim="schedule_free_adamw", lr_scheduler_type="constant")


@register_strategy("prodigy", uses_learning_rate=False, packages=["prodigyopt"])
def prodigy(job: Job) -> Trainer:
    """Prodigy (Mishchenko and Defazio 2023), which estimates its step size, with cosine decay as its authors advise.

    Needs the package `prodigyopt`.
    """
    from prodigyopt import Prodigy

    parameters = [p for p in job.model.parameters() if p.requires_grad]
    optimizer = Prodigy(parameters, lr=1.0, weight_decay=job.arguments.get("weight_decay", 0.0))
    return job.trainer(optimizer, lr_scheduler_type="cosine", learning_rate=1.0)


@register_strategy("schedule_free_radam", packages=["schedulefree"], needs_horizon=False, averages=True)
def schedule_free_radam(job: Job) -> Trainer:
    """Schedule-free RAdam (Defazio et al. 2024), Trainer's own option, which needs no warm-up either."""
    return job.trainer(optim="schedule_free_radam", lr_scheduler_type="constant")


@register_strategy(
    "prodigy_plus",
    uses_learning_rate=False,
    packages={"prodigyplus": "prodigy-plus-schedule-free"},
    needs_horizon=False,
    per_layer=True,
    averages=True,
)
def prodigy_plus(job: Job) -> Trainer:
    """Prodigy and schedule-free in one, with an estimate of the step size for each layer (`split_groups`).

    As its documentation has it: a rate of one, a constant schedule, no clipping of gradients.
    """
    from prodigyplus import ProdigyPlusScheduleFree

    parameters = dict(job.model.named_parameters())
    groups = [
        {"params": [parameters[name] for name in names], "layer": layer}
        for layer, names in layer_groups(job.model).items()
    ]
    optimizer = ProdigyPlusScheduleFree(groups, lr=1.0, weight_decay=job.arguments.get("weight_decay", 0.0))
    return job.trainer(optimizer, lr_scheduler_type="constant", learning_rate=1.0, max_grad_norm=0.0)


class Averaging(TrainerCallback):
    """Takes the average of the weights along, and ends the run with it.

    Args:
        averager (`dog.PolynomialDecayAverager`): Of the model.
    """

    def __init__(self, averager: Any):
        self.averager = averager

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.averager.step()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.averager.base_model.load_state_dict(self.averager.averaged_model.state_dict())


@register_strategy(
    "l_dog",
    uses_learning_rate=False,
    packages={"dog": "dog-optimizer"},
    needs_horizon=False,
    per_layer=True,
    averages=True,
)
def l_dog(job: Job) -> Trainer:
    """L-DoG (Ivgi et al. 2023), distance over gradients of every tensor, with its polynomial average at the end.

    The first step is what its documentation says: 1e-4 of the weights with batch norm, 1e-6 without. Gradients are not
    clipped, which its step sizes are made of.
    """
    from dog import LDoG, PolynomialDecayAverager

    batch_norm = any(isinstance(module, _BatchNorm) for module in job.model.modules())
    parameters = [p for p in job.model.parameters() if p.requires_grad]
    decay = job.arguments.get("weight_decay", 0.0)
    optimizer = LDoG(parameters, reps_rel=1e-4 if batch_norm else 1e-6, weight_decay=decay)
    average = Averaging(PolynomialDecayAverager(job.model))
    return job.trainer(optimizer, average, lr_scheduler_type="constant", learning_rate=1.0, max_grad_norm=0.0)


class LossOf(nn.Module):
    """A model as GeN calls it: from a batch to its loss.

    Args:
        trainer (`transformers.Trainer`): Knows how the loss is computed.
        model (`torch.nn.Module`): The model, which shares its parameters with this module.
    """

    def __init__(self, trainer: Any, model: nn.Module):
        super().__init__()
        self.model = model
        # Not the trainer itself: a module looks for modules in what it is given.
        self.compute_loss = trainer.compute_loss

    def forward(self, batch: Any) -> Tensor:
        """The loss of a batch."""
        return self.compute_loss(self.model, dict(batch))


class Parabola(TrainerCallback):
    """The generalised Newton method: a parabola through three losses of a batch sets the rate, at every fourth step.

    Bu and Xu 2025, *Gradient Descent with Generalized Newton's Method*, and their code: the optimizer takes its step,
    the loss of a further training batch is measured one step behind, ahead and here, and the rate goes a tenth of the
    way to the minimum of the parabola, times the share of the run that is left. The optimizer's state is not put back,
    as in their code; buffers and random numbers are.
    """

    def __init__(self, batches: Iterator[Any], trainer: Any):
        self.batches = batches
        self.trainer = trainer
        self.rate = GEN_START

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        optimizer, model = kwargs["optimizer"], kwargs["model"]
        # What Trainer prepares to count its steps, around the one that takes them.
        optimizer = getattr(optimizer, "optimizer", optimizer)
        for group in optimizer.param_groups:
            # The scheduler has written the start rate anew.
            group["lr"] = self.rate
        if (state.global_step + 1) % GEN_EVERY:
            return
        with untouched(model):
            self.look_ahead(model, optimizer, 1 - state.global_step / state.max_steps, args.device)
        self.rate = optimizer.param_groups[0]["lr"]
        self.trainer.extra_passes += 1.0

    def look_ahead(self, model: nn.Module, optimizer: torch.optim.Optimizer, scale: float, device: Any) -> None:
        """Sets the optimizer's rate, with the package's own function."""
        from GeN import lr_parabola

        batch = BatchFeature(self.trainer._prepare_inputs(next(self.batches)))
        lr_parabola(
            LossOf(self.trainer, model),
            optimizer,
            # The loss comes out of the model, so that the labels of its image tasks have nothing to say.
            criterion=lambda loss, labels: loss,
            tr_iter=iter([(batch, torch.zeros(()))]),
            device=device,
            task="image_cls",
            scale=scale,
        )


@register_strategy(
    "gen",
    uses_learning_rate=False,
    packages={"GeN": "gen-optim"},
    cost="1.25: three forward passes at every fourth step",
)
def gen(job: Job) -> Trainer:
    """GeN on AdamW, from 1e-4, with a linear decay on top: a rate from a parabola through three forward passes."""
    trainer: Any = job.trainer(lr_scheduler_type="constant", learning_rate=GEN_START)
    trainer.extra_passes = 0.0
    batches = iter(stream_of(trainer, trainer.train_dataset, trainer.args.train_batch_size))
    trainer.add_callback(Parabola(batches, trainer))
    return trainer

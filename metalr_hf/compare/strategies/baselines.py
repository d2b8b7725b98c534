"""Strategies of others that need no further package: schedules, layers at different rates, the head first."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ...layers.groups import layer_groups
from .layer_factors import AutoLR, AutoRGN, LayerFactors
from .registry import Job, register_strategy


@register_strategy("cosine")
def cosine(job: Job) -> Trainer:
    """One learning rate, cosine decay to zero."""
    return job.trainer(lr_scheduler_type="cosine")


@register_strategy("constant", needs_horizon=False)
def constant(job: Job) -> Trainer:
    """One learning rate, never changed."""
    return job.trainer(lr_scheduler_type="constant")


@register_strategy("linear_warmup")
def linear_warmup(job: Job) -> Trainer:
    """One learning rate, linear warm-up over the first tenth, linear decay to zero."""
    steps = job.arguments["max_steps"]
    return job.trainer(lr_scheduler_type="linear", warmup_steps=max(1, steps // 10))


@register_strategy("head_only")
def head_only(job: Job) -> Trainer:
    """Only the head is trained, with cosine decay."""
    layers = list(layer_groups(job.model).items())
    backbone = {name for _, names in layers[:-1] for name in names}
    for name, parameter in job.model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and name not in backbone)
    return job.trainer(lr_scheduler_type="cosine")


@register_strategy("layer_decay", per_layer=True)
def layer_decay(job: Job, decay: float = 0.75) -> Trainer:
    """Layer j of n at lr · 0.75^(n - j), with cosine decay.

    timm's rule (`timm.optim.param_groups_layer_decay`, after BEiT and ELECTRA), over this package's layers. timm's own
    groups carry the factor as `lr_scale`, which Trainer's schedulers do not look at, so it is multiplied in here.
    """
    layers = list(layer_groups(job.model))
    rates = {layer: job.learning_rate * decay ** (len(layers) - 1 - j) for j, layer in enumerate(layers)}
    return job.layer_trainer(rates, lr_scheduler_type="cosine")


class GradualUnfreezing(TrainerCallback):
    """Unfreezes one more layer group at equal intervals: the head first, everything in the last third.

    Howard and Ruder 2018 (ULMFiT), section 3.3: the last layer alone for an epoch, then the next lower one too, and so
    on. With a budget of steps an epoch becomes an equal share of the first two thirds.
    """

    def __init__(self, layers: list[list[nn.Parameter]]):
        self.layers = layers

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        share = state.global_step / max(1, state.max_steps * 2 / 3)
        thawed = 1 + int(share * (len(self.layers) - 1))
        for i, layer in enumerate(reversed(self.layers)):
            for parameter in layer:
                parameter.requires_grad_(i < thawed)


@register_strategy("gradual_unfreeze")
def gradual_unfreeze(job: Job) -> Trainer:
    """From the head downwards, one more layer at a time (ULMFiT), with cosine decay."""
    parameters = dict(job.model.named_parameters())
    layers = [[parameters[name] for name in names] for names in layer_groups(job.model).values()]
    return job.trainer(callback=GradualUnfreezing(layers), lr_scheduler_type="cosine")


def _with_layer_factors(make_callback: Callable[[], LayerFactors], job: Job) -> Trainer:
    rates = dict.fromkeys(layer_groups(job.model), job.learning_rate)
    return job.layer_trainer(rates, make_callback(), lr_scheduler_type="cosine")


register_strategy("auto_rgn", per_layer=True)(partial(_with_layer_factors, AutoRGN))
register_strategy("autolr", per_layer=True)(partial(_with_layer_factors, AutoLR))


class HeadFirst(TrainerCallback):
    """Holds the backbone back for the first half of the steps.

    Args:
        backbone (`list[torch.nn.Parameter]`): Its parameters.
    """

    def __init__(self, backbone: list[nn.Parameter]):
        self.backbone = backbone

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        for parameter in self.backbone:
            parameter.requires_grad_(2 * state.global_step >= state.max_steps)


@register_strategy("lp_ft")
def lp_ft(job: Job) -> Trainer:
    """The head alone for half of the steps, then everything for the other half, with a cosine decay each.

    Kumar et al. 2022, *Fine-Tuning can Distort Pretrained Features and Underperform Out-of-Distribution*: linear
    probing, then full fine-tuning from there. An equal budget is shared in halves, at one rate; the head keeps its
    moments.
    """
    parameters = dict(job.model.named_parameters())
    layers = list(layer_groups(job.model).values())
    backbone = [parameters[name] for names in layers[:-1] for name in names]
    # Every parameter still has its gradient when the optimizer is made, which would leave out what has none.
    return job.trainer(
        callback=HeadFirst(backbone),
        lr_scheduler_type="cosine_with_restarts",
        lr_scheduler_kwargs={"num_cycles": 2},
    )


@register_strategy("autogluon_recipe", uses_learning_rate=False, per_layer=True)
def autogluon_recipe(job: Job) -> Trainer:
    """AutoGluon-MultiModal's defaults: 1e-4 at the head, times 0.9 a layer, warm-up over a tenth, cosine decay to zero.

    The weight decay is that of the comparison rather than AutoGluon's 0.001, as for every strategy.
    """
    layers = list(layer_groups(job.model))
    rates = {layer: 1e-4 * 0.9 ** (len(layers) - 1 - j) for j, layer in enumerate(layers)}
    warmup = max(1, job.arguments["max_steps"] // 10)
    return job.layer_trainer(rates, lr_scheduler_type="cosine", warmup_steps=warmup, learning_rate=1e-4)

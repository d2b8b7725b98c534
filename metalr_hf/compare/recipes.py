"""Published recipes for fine-tuning that need no package: the head before the rest, and AutoGluon's fixed rates."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..layers.groups import layer_groups
from .strategies import Job, register_strategy


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

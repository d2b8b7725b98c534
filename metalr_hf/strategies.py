"""The fine-tuning strategies that `compare` runs side by side: each a few lines over transformers' Trainer."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_pt_utils import get_parameter_names

from .layers import layer_groups, split_param_groups
from .messages import did_you_mean
from .trainer import MetaLRTrainer
from .training_args import MetaLRTrainingArguments


@dataclass
class Job:
    """What a strategy gets to make a trainer of.

    Args:
        model (`torch.nn.Module`): The pretrained model with a fresh head.
        learning_rate (`float`): The start learning rate of the run, for backbone and head alike.
        arguments (`dict`): Keyword arguments of `TrainingArguments`, the same for every strategy.
        trainer_arguments (`dict`): Keyword arguments of `Trainer`: data sets, collator, callbacks.
        tuning_arguments (`dict`): Keyword arguments of [`MetaLRTrainingArguments`] for the strategies that tune.

    Example:

    ```python
    >>> import timm
    >>> from metalr_hf.strategies import Job, layer_decay
    >>> arguments = {"output_dir": "out", "max_steps": 60, "report_to": "none", "use_cpu": True}
    >>> job = Job(timm.create_model("test_resnet"), 1e-3, arguments, trainer_arguments={"train_dataset": []})
    >>> trainer = layer_decay(job)
    >>> [group["lr"] for group in trainer.optimizer.param_groups][-1]
    0.001

    ```
    """

    model: nn.Module
    learning_rate: float
    arguments: dict[str, Any]
    trainer_arguments: dict[str, Any]
    tuning_arguments: dict[str, Any] = field(default_factory=dict)

    def trainer(
        self,
        optimizer: torch.optim.Optimizer | None = None,
        callback: TrainerCallback | None = None,
        **arguments: Any,
    ) -> Trainer:
        """A stock Trainer.

        Args:
            optimizer (`torch.optim.Optimizer`, *optional*): In place of AdamW.
            callback (`TrainerCallback`, *optional*): What the strategy does during the run.
            **arguments: Changes to the training arguments.
        """
        args = TrainingArguments(**{**self.arguments, "learning_rate": self.learning_rate, **arguments})
        trainer = Trainer(self.model, args, optimizers=(optimizer, None), **self.trainer_arguments)
        if callback is not None:
            trainer.add_callback(callback)
        return trainer

    def tuned(self, **arguments: Any) -> MetaLRTrainer:
        """A MetaLRTrainer with the comparison's tuning arguments and the given ones."""
        tuning = {**arguments, **self.tuning_arguments}
        args = MetaLRTrainingArguments(**{**self.arguments, "learning_rate": self.learning_rate, **tuning})
        return MetaLRTrainer(self.model, args, **self.trainer_arguments)

    def layer_optimizer(self, rates: dict[str, float]) -> torch.optim.Optimizer:
        """AdamW with the decay groups of Trainer and a learning rate a layer.

        Args:
            rates (`dict[str, float]`): Layer name to learning rate.
        """
        parameters = dict(self.model.named_parameters())
        layers = {layer: [parameters[name] for name in names] for layer, names in layer_groups(self.model).items()}
        decayed = set(get_parameter_names(self.model, [nn.LayerNorm], ["bias", "layernorm", "rmsnorm", "norm"]))
        groups = [
            {
                "params": [p for name, p in parameters.items() if p.requires_grad and (name in decayed) == decays],
                "weight_decay": self.arguments.get("weight_decay", 0.0) if decays else 0.0,
            }
            for decays in (True, False)
        ]
        split = split_param_groups(groups, layers)
        return torch.optim.AdamW([{**group, "lr": rates[group["layer"]]} for group in split])


@dataclass
class Strategy:
    """A fine-tuning strategy.

    Args:
        name (`str`): Its name.
        make_trainer (`Callable[[Job], Trainer]`): Makes the trainer of a run.
        uses_learning_rate (`bool`): Whether the start learning rate makes a difference; if not, one run a seed will do.
        packages (`Sequence[str]`): Names of the packages that it needs and this one does not.
    """

    name: str
    make_trainer: Callable[[Job], Trainer]
    uses_learning_rate: bool = True
    packages: Sequence[str] = ()

    def check_packages(self) -> None:
        """Whether what it needs is installed.

        Raises:
            ImportError: if it is not; says how to install it.
        """
        if missing := [name for name in self.packages if importlib.util.find_spec(name) is None]:
            raise ImportError(f"strategies={self.name!r} needs a package more: pip install {' '.join(missing)}")


STRATEGIES: dict[str, Strategy] = {}


def register_strategy(
    name: str, uses_learning_rate: bool = True, packages: Sequence[str] = ()
) -> Callable[[Callable[[Job], Trainer]], Callable[[Job], Trainer]]:
    """Decorator that makes a strategy available to `compare` by name.

    Args:
        name (`str`): The name. An existing one is replaced.
        uses_learning_rate (`bool`, *optional*, defaults to `True`): `False` for a strategy without a learning rate.
        packages (`Sequence[str]`, *optional*): Packages to install for it, looked for before a comparison starts.

    Example:

    ```python
    >>> from metalr_hf.strategies import register_strategy
    >>> @register_strategy("polynomial")
    ... def polynomial(job):
    ...     return job.trainer(lr_scheduler_type="polynomial")

    ```
    """

    def register(make_trainer: Callable[[Job], Trainer]) -> Callable[[Job], Trainer]:
        STRATEGIES[name] = Strategy(name, make_trainer, uses_learning_rate, packages)
        return make_trainer

    return register


def get_strategy(name: str) -> Strategy:
    """The strategy of a name.

    Raises:
        ValueError: if there is none; names the near ones.

    Example:

    ```python
    >>> from metalr_hf.strategies import get_strategy
    >>> get_strategy("metalr").uses_learning_rate
    False

    ```
    """
    if name not in STRATEGIES:
        hint = did_you_mean(name, STRATEGIES, cutoff=0.4)
        raise ValueError(f"strategies={name!r} is not one.{hint} There are: {', '.join(STRATEGIES)}.")
    return STRATEGIES[name]


@register_strategy("cosine")
def cosine(job: Job) -> Trainer:
    """One learning rate, cosine decay to zero."""
    return job.trainer(lr_scheduler_type="cosine")


@register_strategy("constant")
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


@register_strategy("layer_decay")
def layer_decay(job: Job, decay: float = 0.75) -> Trainer:
    """Layer j of n at lr · 0.75^(n - j), with cosine decay.

    timm's rule (`timm.optim.param_groups_layer_decay`, after BEiT and ELECTRA), over this package's layers. timm's own
    groups carry the factor as `lr_scale`, which Trainer's schedulers do not look at, so it is multiplied in here.
    """
    layers = list(layer_groups(job.model))
    rates = {layer: job.learning_rate * decay ** (len(layers) - 1 - j) for j, layer in enumerate(layers)}
    return job.trainer(job.layer_optimizer(rates), lr_scheduler_type="cosine")


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


@register_strategy("schedule_free", packages=["schedulefree"])
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


class LayerRates(TrainerCallback):
    """Base of the strategies that set a factor a layer on top of Trainer's own schedule."""

    def __init__(self) -> None:
        self.scales: dict[str, float] = {}

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        optimizer: torch.optim.Optimizer = kwargs["optimizer"]
        layers: dict[str, list[torch.Tensor]] = {}
        for group in optimizer.param_groups:
            layers.setdefault(group["layer"], []).extend(group["params"])
        self.update(layers, state, args)
        for group in optimizer.param_groups:
            # Trainer's scheduler writes the scheduled rate anew at each step, so this does not add up.
            group["lr"] = group["lr"] * self.scales.get(group["layer"], 1.0)

    def update(self, layers: dict[str, list[torch.Tensor]], state: TrainerState, args: TrainingArguments) -> None:
        """Sets `self.scales`, layer to factor."""
        raise NotImplementedError(f"{type(self).__name__} does not define update")


class AutoRGN(LayerRates):
    """Each layer at lr · RGN_l / max RGN, with RGN_l = ‖g_l‖ / ‖θ_l‖, the relative gradient norm, at every step.

    Lee et al. 2023, *Surgical Fine-Tuning Improves Adaptation to Distribution Shifts*, section 4: the relative
    gradient norms, normalised to be at most 1, multiply the base learning rate.
    """

    def update(self, layers: dict[str, list[torch.Tensor]], state: TrainerState, args: TrainingArguments) -> None:
        relative = {
            layer: norm([p.grad for p in parameters if p.grad is not None]) / max(norm(parameters), 1e-12)
            for layer, parameters in layers.items()
        }
        largest = max(relative.values()) or 1.0
        self.scales = {layer: value / largest for layer, value in relative.items()}


class AutoLR(LayerRates):
    """Learning rates that make the layers' weight variations grow from the input to the output, once an epoch.

    Ro and Choi 2021, *AutoLR: Layer-wise Pruning and Auto-tuning of Learning Rates in Fine-tuning of Deep Networks*,
    and their code. The weight variation of layer l over an epoch is v_l = ‖Δθ_l‖ / n_l. The wanted variations run
    linearly from the smallest, times 3, to the largest, times 0.4 (the authors' factors); v_l being proportional to
    the rate, the new rate is lr_l · wanted_l / v_l. The rates stay when the variations are sorted well enough already
    (score 1 - 2 Σ|rank_l - l| / d² of 0.94 or more). The head keeps its rate. The authors train an epoch again, from
    its start, until the score holds; with an equal budget for all there is one try an epoch.
    """

    def __init__(self, threshold: float = 0.94) -> None:
        super().__init__()
        self.threshold = threshold
        self.epoch = 0
        self.before: dict[str, list[torch.Tensor]] = {}

    def update(self, layers: dict[str, list[torch.Tensor]], state: TrainerState, args: TrainingArguments) -> None:
        epoch = int(state.epoch or 0)
        if self.before and epoch == self.epoch:
            return
        if self.before:
            self.scales = self.adjust(layers)
        self.epoch = epoch
        self.before = {layer: [p.detach().clone() for p in parameters] for layer, parameters in layers.items()}

    def adjust(self, layers: dict[str, list[torch.Tensor]]) -> dict[str, float]:
        """New factors from the variation since the last call."""
        backbone = list(layers)[:-1]
        variation = {
            layer: norm([p.detach() - b for p, b in zip(layers[layer], self.before[layer], strict=True)])
            / sum(p.numel() for p in layers[layer])
            for layer in backbone
        }
        values = list(variation.values())
        if len(backbone) < 2 or min(values) <= 0 or sorting_score(values) >= self.threshold:
            return self.scales
        low, high = min(values) * 3, max(values) * 0.4
        wanted = [low + (high - low) * i / (len(values) - 1) for i in range(len(values))]
        return {
            layer: self.scales.get(layer, 1.0) * want / variation[layer]
            for layer, want in zip(backbone, wanted, strict=True)
        }


def sorting_score(values: list[float]) -> float:
    """How well values are sorted, 1 for ascending: 1 - 2 Σ|rank_l - l| / d² (AutoLR).

    Example:

    ```python
    >>> from metalr_hf.strategies import sorting_score
    >>> sorting_score([1.0, 2.0, 3.0, 4.0]), sorting_score([4.0, 3.0, 2.0, 1.0])
    (1.0, 0.0)

    ```
    """
    order = sorted(range(len(values)), key=values.__getitem__)
    return 1 - 2 * sum(abs(i - position) for i, position in enumerate(order)) / len(values) ** 2


@torch.no_grad()
def norm(tensors: list[torch.Tensor]) -> float:
    """The Euclidean norm of several tensors together."""
    return float(torch.linalg.vector_norm(torch.stack(torch._foreach_norm(tensors)))) if tensors else 0.0


def _with_layer_rates(make_callback: Callable[[], LayerRates], job: Job) -> Trainer:
    optimizer = job.layer_optimizer(dict.fromkeys(layer_groups(job.model), job.learning_rate))
    return job.trainer(optimizer, make_callback(), lr_scheduler_type="cosine")


register_strategy("auto_rgn")(partial(_with_layer_rates, AutoRGN))
register_strategy("autolr")(partial(_with_layer_rates, AutoLR))


@register_strategy("calibrated_cosine", uses_learning_rate=False)
def calibrated_cosine(job: Job) -> Trainer:
    """This package's calibrated start rates and nothing else: no tuning, cosine decay to zero."""
    return job.tuned(calibrate=True, hyper_lr=0.0, lr_scheduler_type="cosine")


@register_strategy("metalr", uses_learning_rate=False)
def metalr(job: Job) -> Trainer:
    """This package's default, with the comparison's tuning arguments. The learning rate given makes no difference."""
    if job.tuning_arguments.get("calibrate") is False:
        raise ValueError('calibrate=False makes the start learning rate count: use the strategy "metalr_uncalibrated".')
    return job.tuned()


@register_strategy("metalr_uncalibrated")
def metalr_uncalibrated(job: Job) -> Trainer:
    """Tuning from the start learning rate given, without calibration."""
    return job.tuned(calibrate=False)


@register_strategy("metalr_paper")
def metalr_paper(job: Job) -> Trainer:
    """The paper's settings: raw-gradient look-ahead, a stream over the training set, bounds, held head."""
    return job.tuned(preset="paper")

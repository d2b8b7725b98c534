"""The fine-tuning strategies that `compare` runs side by side: each a few lines over transformers' Trainer."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..layers.groups import layer_groups, split_optimizer
from ..messages import did_you_mean
from ..trainer.arguments import MetaLRTrainingArguments
from ..trainer.averaging import AveragingTrainer
from ..trainer.metalr import MetaLRTrainer
from ..tuning.averaging import POLYNOMIAL
from .layer_factors import AutoLR, AutoRGN, LayerFactors


@dataclass
class Job:
    """Everything that a strategy needs to build the trainer of a run.

    Args:
        model (`torch.nn.Module`): The pretrained model with a fresh head.
        learning_rate (`float`): The start learning rate of the run, for backbone and head alike.
        arguments (`dict`): Keyword arguments of `TrainingArguments`, the same for every strategy.
        trainer_arguments (`dict`): Keyword arguments of `Trainer`: data sets, collator, callbacks.
        tuning_arguments (`dict`): Keyword arguments of [`MetaLRTrainingArguments`] for the strategies that tune.
        average_weights (`str`, *optional*): An average of the weights, as of `MetaLRTrainingArguments`.

    Example:

    ```python
    >>> import timm
    >>> from metalr_hf.compare.strategies import Job, layer_decay
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
    average_weights: str | None = None

    def trainer(
        self,
        optimizer: torch.optim.Optimizer | None = None,
        callback: TrainerCallback | None = None,
        **arguments: Any,
    ) -> Trainer:
        """A stock Trainer, but for the average of the weights where there is one.

        Args:
            optimizer (`torch.optim.Optimizer`, *optional*): In place of AdamW.
            callback (`TrainerCallback`, *optional*): What the strategy does during the run.
            **arguments: Changes to the training arguments.
        """
        args = TrainingArguments(**{**self.arguments, "learning_rate": self.learning_rate, **arguments})
        options: dict[str, Any] = {"optimizers": (optimizer, None), **self.trainer_arguments}
        if self.average_weights is None:
            trainer = Trainer(self.model, args, **options)
        else:
            trainer = AveragingTrainer(self.model, args, average_weights=self.average_weights, **options)
        if callback is not None:
            trainer.add_callback(callback)
        return trainer

    def tuned(self, **arguments: Any) -> MetaLRTrainer:
        """A MetaLRTrainer with the comparison's tuning arguments and the given ones."""
        averaging = {} if self.average_weights is None else {"average_weights": self.average_weights}
        tuning = {**arguments, **self.tuning_arguments, **averaging}
        args = MetaLRTrainingArguments(**{**self.arguments, "learning_rate": self.learning_rate, **tuning})
        return MetaLRTrainer(self.model, args, **self.trainer_arguments)

    def layer_trainer(
        self, rates: dict[str, float], callback: TrainerCallback | None = None, **arguments: Any
    ) -> Trainer:
        """A stock Trainer with Trainer's own optimizer and choice of what decays, and a learning rate per layer.

        Args:
            rates (`dict[str, float]`): Layer name to learning rate.
            callback (`TrainerCallback`, *optional*): What the strategy does during the run.
            **arguments: Changes to the training arguments.

        Returns:
            `transformers.Trainer`
        """
        trainer = self.trainer(callback=callback, **arguments)
        parameters = dict(self.model.named_parameters())
        layers = {layer: [parameters[name] for name in names] for layer, names in layer_groups(self.model).items()}
        optimizer = trainer.create_optimizer()
        split_optimizer(optimizer, layers)
        for group in optimizer.param_groups:
            group["lr"] = rates[group["layer"]]
        return trainer


@dataclass
class Strategy:
    """A fine-tuning strategy.

    Args:
        name (`str`): Its name.
        make_trainer (`Callable[[Job], Trainer]`): Makes the trainer of a run.
        uses_learning_rate (`bool`): Whether the start learning rate matters; if not, it is run once per seed.
        packages (`Sequence[str]` or `Mapping[str, str]`): Packages that it needs in addition to those that are
            installed with this one: names, or modules to the names that pip knows.
        needs_horizon (`bool`): Whether it has to know the number of steps beforehand.
        per_layer (`bool`): Whether layers, or tensors, have step sizes of their own.
        cost (`str`): What a run costs, in runs of equal steps.
    """

    name: str
    make_trainer: Callable[[Job], Trainer]
    uses_learning_rate: bool = True
    packages: Sequence[str] | Mapping[str, str] = ()
    needs_horizon: bool = True
    per_layer: bool = False
    cost: str = "1"

    @property
    def pip_names(self) -> Mapping[str, str]:
        """The modules that it needs, to the names that pip knows."""
        return self.packages if isinstance(self.packages, Mapping) else {name: name for name in self.packages}

    def check_packages(self) -> None:
        """Checks that the packages it needs are installed.

        Raises:
            ImportError: if it is not; says how to install it.
        """
        if missing := [name for module, name in self.pip_names.items() if importlib.util.find_spec(module) is None]:
            raise ImportError(f"strategies={self.name!r} needs a package more: pip install {' '.join(missing)}")


STRATEGIES: dict[str, Strategy] = {}
AVERAGED = "+average"
CALIBRATED = "1, and some forward passes of the calibration"


def register_strategy(
    name: str,
    uses_learning_rate: bool = True,
    packages: Sequence[str] | Mapping[str, str] = (),
    *,
    needs_horizon: bool = True,
    per_layer: bool = False,
    cost: str = "1",
) -> Callable[[Callable[[Job], Trainer]], Callable[[Job], Trainer]]:
    """Decorator that makes a strategy available to `compare` by name.

    Args:
        name (`str`): The name. An existing one is replaced.
        uses_learning_rate (`bool`, *optional*, defaults to `True`): `False` for a strategy without a learning rate.
        packages (`Sequence[str]` or `Mapping[str, str]`, *optional*): Packages to install for it, looked for before a
            comparison starts; see [`Strategy`].
        needs_horizon (`bool`, *optional*, defaults to `True`): `False` if it need not know the number of steps.
        per_layer (`bool`, *optional*, defaults to `False`): Whether layers have step sizes of their own.
        cost (`str`, *optional*, defaults to `"1"`): What a run costs, in runs of equal steps.

    Returns:
        `Callable`: the decorator, which returns the function unchanged.

    Example:

    ```python
    >>> from metalr_hf.compare.strategies import register_strategy
    >>> @register_strategy("polynomial")
    ... def polynomial(job):
    ...     return job.trainer(lr_scheduler_type="polynomial")

    ```
    """

    def register(make_trainer: Callable[[Job], Trainer]) -> Callable[[Job], Trainer]:
        STRATEGIES[name] = Strategy(name, make_trainer, uses_learning_rate, packages, needs_horizon, per_layer, cost)
        return make_trainer

    return register


def get_strategy(name: str) -> Strategy:
    """The strategy of a name.

    Args:
        name (`str`): Its name; with `+average` after it, the strategy with the polynomial average of its weights.

    Returns:
        [`Strategy`]

    Raises:
        ValueError: if there is none; names the near ones.

    Example:

    ```python
    >>> from metalr_hf.compare.strategies import get_strategy
    >>> get_strategy("metalr").uses_learning_rate
    False

    ```
    """
    plain = name.removesuffix(AVERAGED)
    if plain != name and plain in STRATEGIES:
        strategy = STRATEGIES[plain]
        return replace(strategy, name=name, make_trainer=partial(_averaged, strategy.make_trainer))
    if name not in STRATEGIES:
        hint = did_you_mean(name, STRATEGIES, cutoff=0.4)
        raise ValueError(f"strategies={name!r} is not one.{hint} There are: {', '.join(STRATEGIES)}.")
    return STRATEGIES[name]


def _averaged(make_trainer: Callable[[Job], Trainer], job: Job) -> Trainer:
    return make_trainer(replace(job, average_weights=POLYNOMIAL))


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


@register_strategy("schedule_free", packages=["schedulefree"], needs_horizon=False)
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


def _with_layer_factors(make_callback: Callable[[], LayerFactors], job: Job) -> Trainer:
    rates = dict.fromkeys(layer_groups(job.model), job.learning_rate)
    return job.layer_trainer(rates, make_callback(), lr_scheduler_type="cosine")


register_strategy("auto_rgn", per_layer=True)(partial(_with_layer_factors, AutoRGN))
register_strategy("autolr", per_layer=True)(partial(_with_layer_factors, AutoLR))


@register_strategy("calibrated_cosine", uses_learning_rate=False, per_layer=True, cost=CALIBRATED)
def calibrated_cosine(job: Job) -> Trainer:
    """This package's calibrated start rates and nothing else: no tuning, cosine decay to zero."""
    return job.tuned(calibrate=True, hyper_lr=0.0, lr_scheduler_type="cosine")


@register_strategy("metalr", uses_learning_rate=False, per_layer=True, cost=CALIBRATED)
def metalr(job: Job) -> Trainer:
    """This package's default, with the comparison's tuning arguments. The learning rate given makes no difference."""
    if job.tuning_arguments.get("calibrate") is False:
        raise ValueError('calibrate=False makes the start learning rate count: use the strategy "metalr_uncalibrated".')
    return job.tuned()


@register_strategy("metalr_constant", uses_learning_rate=False, needs_horizon=False, per_layer=True, cost=CALIBRATED)
def metalr_constant(job: Job) -> Trainer:
    """This package's default with tuned rates that stay up to the end; for the average of the weights."""
    return job.tuned(lr_scheduler_type="constant")


@register_strategy("metalr_uncalibrated", per_layer=True)
def metalr_uncalibrated(job: Job) -> Trainer:
    """Tuning from the start learning rate given, without calibration."""
    return job.tuned(calibrate=False)


@register_strategy("metalr_paper", per_layer=True, cost="2")
def metalr_paper(job: Job) -> Trainer:
    """The paper's settings: raw-gradient look-ahead, a stream over the training set, bounds, held head."""
    return job.tuned(preset="paper")

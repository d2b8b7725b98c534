"""What a fine-tuning strategy is, the registry of all, and the strategies of this package."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from ...hub.markdown import table
from ...layers.groups import layer_groups, split_optimizer
from ...messages import did_you_mean
from ...trainer.arguments import MetaLRTrainingArguments
from ...trainer.averaging import AveragingTrainer
from ...trainer.metalr import MetaLRTrainer
from ...tuning.averaging import POLYNOMIAL


@dataclass(frozen=True)
class HeldOut:
    """The training rows of a run in two parts, for strategies that try something out before it.

    Args:
        train (`datasets.Dataset`): Four fifths of them, prepared as the run's own.
        score (`Callable[[transformers.Trainer], tuple[float, float]]`):
            After training, to the metric of the task on the other fifth, of which more is better, and the loss there.
            Both are NaN where the outputs are not finite.
    """

    train: Any
    score: Callable[[Trainer], tuple[float, float]]


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
        learning_rates (`Sequence[float]`): All start learning rates of the comparison, for strategies that search.
        hold_out (`Callable[[], HeldOut]`, *optional*): Gives what they search on.

    Example:

    ```python
    >>> import timm
    >>> from metalr_hf.compare.strategies.baselines import layer_decay
    >>> from metalr_hf.compare.strategies import Job
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
    learning_rates: Sequence[float] = ()
    hold_out: Callable[[], HeldOut] | None = None

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
        averages (`bool`): Whether it ends with an average of the weights of its own, so that it takes no other.
        cost (`str`): What a run costs, in runs of equal steps.
    """

    name: str
    make_trainer: Callable[[Job], Trainer]
    uses_learning_rate: bool = True
    packages: Sequence[str] | Mapping[str, str] = ()
    needs_horizon: bool = True
    per_layer: bool = False
    averages: bool = False
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
    averages: bool = False,
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
        averages (`bool`, *optional*, defaults to `False`): Whether it averages the weights itself.
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
        STRATEGIES[name] = Strategy(
            name, make_trainer, uses_learning_rate, packages, needs_horizon, per_layer, averages, cost
        )
        return make_trainer

    return register


def get_strategy(name: str) -> Strategy:
    """The strategy of a name.

    Args:
        name (`str`): Its name; with `+average` after it, the strategy with the polynomial average of its weights.

    Returns:
        [`Strategy`]

    Raises:
        ValueError: if there is none, naming the near ones; or if it averages the weights itself.

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
        if strategy.averages:
            raise ValueError(f"strategies={name!r}: {plain} averages the weights itself. Leave out {AVERAGED}.")
        return replace(strategy, name=name, make_trainer=partial(_averaged, strategy.make_trainer))
    if name not in STRATEGIES:
        hint = did_you_mean(name, STRATEGIES, cutoff=0.4)
        raise ValueError(f"strategies={name!r} is not one.{hint} There are: {', '.join(STRATEGIES)}.")
    return STRATEGIES[name]


def strategies_table() -> str:
    """What one has to know about every strategy before a run: what it needs, and what it costs.

    Returns:
        `str`: a table in Markdown.

    Example:

    ```python
    >>> from metalr_hf.compare.strategies import strategies_table
    >>> [line for line in strategies_table().splitlines() if "lr_finder" in line]
    ['| `lr_finder` |  | yes |  |  | 1, and at most 100 steps of the range test |  |']

    ```
    """
    header = [
        "strategy",
        "needs a rate",
        "needs the number of steps",
        "step sizes per layer",
        "averages itself",
        "cost in runs",
        "package",
    ]
    lines: list[list[object]] = [
        [
            f"`{strategy.name}`",
            *[
                "yes" if value else ""
                for value in (
                    strategy.uses_learning_rate,
                    strategy.needs_horizon,
                    strategy.per_layer,
                    strategy.averages,
                )
            ],
            strategy.cost,
            ", ".join(f"`{name}`" for name in strategy.pip_names.values()),
        ]
        for strategy in STRATEGIES.values()
    ]
    return table(header, lines, escaped=True)


def _averaged(make_trainer: Callable[[Job], Trainer], job: Job) -> Trainer:
    return make_trainer(replace(job, average_weights=POLYNOMIAL))


@register_strategy("calibrated_cosine", uses_learning_rate=False, per_layer=True, cost=CALIBRATED)
def calibrated_cosine(job: Job) -> Trainer:
    """This package's calibrated start rates and nothing else: no tuning, cosine decay to zero."""
    return job.tuned(calibrate=True, hyper_lr=0.0, lr_scheduler_type="cosine")


@register_strategy("fitted_cosine", cost="1, and the forward passes that fit the head")
def fitted_cosine(job: Job) -> Trainer:
    """One learning rate and cosine decay to zero, with the head that this package fits after the third step."""
    return job.tuned(calibrate=False, hyper_lr=0.0, fit_head=True, lr_scheduler_type="cosine")


@register_strategy(
    "metalr", uses_learning_rate=False, needs_horizon=False, per_layer=True, averages=True, cost=CALIBRATED
)
def metalr(job: Job) -> Trainer:
    """This package's default, with the comparison's tuning arguments. The learning rate given makes no difference."""
    if job.tuning_arguments.get("calibrate") is False:
        raise ValueError('calibrate=False makes the start learning rate count: use the strategy "metalr_uncalibrated".')
    return job.tuned()


@register_strategy("metalr_decay", uses_learning_rate=False, per_layer=True, cost=CALIBRATED)
def metalr_decay(job: Job) -> Trainer:
    """This package's default with linear decay over the last 70 % of the steps in place of the average."""
    return job.tuned(lr_scheduler_type="warmup_stable_decay")


@register_strategy("metalr_constant", uses_learning_rate=False, needs_horizon=False, per_layer=True, cost=CALIBRATED)
def metalr_constant(job: Job) -> Trainer:
    """This package's default without its average: tuned rates that stay up to the end, and the last weights."""
    return job.tuned(lr_scheduler_type="constant")


@register_strategy(
    "metalr_fresh_head", uses_learning_rate=False, needs_horizon=False, per_layer=True, cost=CALIBRATED, averages=True
)
def metalr_fresh_head(job: Job) -> Trainer:
    """This package's default without the head that it fits: a fresh head starts from random numbers."""
    return job.tuned(fit_head=False)


@register_strategy("metalr_uncalibrated", needs_horizon=False, per_layer=True, averages=True)
def metalr_uncalibrated(job: Job) -> Trainer:
    """Tuning from the start learning rate given, without calibration."""
    return job.tuned(calibrate=False)


@register_strategy("metalr_paper", needs_horizon=False, per_layer=True, cost="2")
def metalr_paper(job: Job) -> Trainer:
    """The paper's settings: raw-gradient look-ahead, a stream over the training set, bounds, held head."""
    return job.tuned(preset="paper")

"""MetaLRTrainingArguments: transformers' TrainingArguments and what tuning adds to them."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field, fields
from typing import Any

from transformers import TrainingArguments
from transformers.trainer_utils import SchedulerType, has_length

from ..settings import LAYER_GRANULARITIES, META_MODES, check_choice, check_count, check_number, check_settings
from ..tuning.rules import get_rule

# From calibrated rates a large trust region is a random walk of the rates: one batch's hypergradient is mostly noise.
CALIBRATED_LR_CHANGE, UNCALIBRATED_LR_CHANGE = 1.1, 2.0
# More often costs a pass each, and found no better rates.
STREAM_EVERY = 2
# Chen et al. 2023, section 3.1, and the reference code, with the sign of the paper's equation.
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {
        "hyper_lr": 0.1,
        "lr_rule": "proportional",
        "lr_min": 1e-6,
        "lr_max": 1e-2,
        "max_lr_change": math.inf,
        "meta_source": "stream",
        "meta_every": 1,
        "tuning_steps": 0,
        "calibrate": False,
        "head_hold_epochs": 5.0,
        "lookahead": "sgd",
        "lr_scheduler_type": SchedulerType.CONSTANT,
    }
}


@dataclass
class MetaLRTrainingArguments(TrainingArguments):
    """Arguments of [`MetaLRTrainer`]: all of [`~transformers.TrainingArguments`], and the following.

    `learning_rate` is where every layer starts if `calibrate` is off. `lr_scheduler_type` and warm-up are the shape
    that multiplies the tuned rates: by default `warmup_stable_decay`, constant and then linear decay over the last 70 %
    of the steps (`lr_scheduler_kwargs={"num_decay_steps": ..., "decay_type": "cosine"}` changes its length and form).
    `layer_granularity` and `head_module` (names as in `model.named_modules()`) are handed to [`layer_groups`]; a map of
    layers given to the trainer goes before them.

    Args:
        hyper_lr (`float`, *optional*, defaults to 0.1):
            Step size η of the learning rates; 0 switches tuning off.
        lr_rule (`str`, *optional*, defaults to `"proportional"`):
            Learning-rate rule: `additive`, `proportional`, `adam`, or one registered with `register_rule`.
        lr_min (`float`, *optional*, defaults to 1e-8):
            Lower bound of every learning rate.
        lr_max (`float`, *optional*, defaults to 1.0):
            Upper bound of every learning rate.
        max_lr_change (`float`, *optional*):
            Trust region: one update changes a learning rate at most by this factor; `inf` switches it off. By default
            1.1 where the start rates are calibrated, so that tuning corrects them gently, and 2 where it has to find
            them.
        tuning_steps (`int`, *optional*, defaults to 40):
            Tune at the first so many optimizer steps, then keep the rates found and leave them to the schedule; 0 tunes
            to the end.
        calibrate (`bool`, *optional*):
            Find the start rates along the first step, so that `learning_rate` makes no difference. On by default,
            unless `hyper_lr` is 0.
        meta_source (`str`, *optional*):
            Where the validation gradient comes from: `stream` (validation batches, one more forward and backward) or
            `next_batch` (the next training batch, no extra pass). By default `stream` when there is a `meta_dataset`
            or a `meta_split`, else `next_batch`.
        meta_every (`int`, *optional*):
            Tune at every k-th optimizer step. By default every second with `stream`, which finds as good rates for half
            of the cost, and every one with `next_batch`, which costs next to nothing.
        meta_batch_size (`int`, *optional*):
            Validation images per device at a tuned step; the training batch size by default.
        meta_split (`float`, *optional*, defaults to 0.0):
            Share of the training set held out for validation batches, stratified by label; 0 holds nothing out.
        meta_mode (`str`, *optional*, defaults to `"train"`):
            How batch-norm and dropout work in the validation pass: `train` or `eval`; running statistics are never
            touched by it.
        lookahead (`str`, *optional*, defaults to `"optimizer"`):
            `optimizer` differentiates the step really taken, `sgd` the raw-gradient step of the paper.
        head_lr_multiplier (`float`, *optional*, defaults to 1.0):
            With `calibrate=False`, the head starts at `learning_rate` times this.
        head_hold_epochs (`float`, *optional*, defaults to 0.0):
            The head keeps its start rate for so many first epochs; if they are more than `tuning_steps`, to the end.
        layer_granularity (`str`, *optional*, defaults to `"block"`):
            What gets a learning rate of its own: every `block`, every `stage` of blocks, or every `tensor`.
        head_module (`list[str]`, *optional*):
            The module or modules that are the head, where they are not recognised.
        preset (`str`, *optional*):
            `paper` gives the settings of the paper to all of these that are left at their defaults, and a constant
            schedule.

    Example:

    ```python
    >>> from metalr_hf import MetaLRTrainingArguments
    >>> args = MetaLRTrainingArguments("runs/example", learning_rate=1e-4, meta_split=0.2)
    >>> args.resolve_meta_source(has_meta_dataset=False)
    'stream'

    ```
    """

    lr_scheduler_type: SchedulerType | str = field(
        default="warmup_stable_decay",
        metadata={
            "help": "The shape that multiplies the tuned rates; `warmup_stable_decay` goes down linearly over the "
            "last seven tenths of the steps unless `lr_scheduler_kwargs` says otherwise."
        },
    )
    hyper_lr: float = field(default=0.1, metadata={"help": "Step size η of the learning rates; 0 switches tuning off."})
    lr_rule: str = field(
        default="proportional",
        metadata={
            "help": "Learning-rate rule: `additive`, `proportional`, `adam`, or one registered with `register_rule`."
        },
    )
    lr_min: float = field(default=1e-8, metadata={"help": "Lower bound of every learning rate."})
    lr_max: float = field(default=1.0, metadata={"help": "Upper bound of every learning rate."})
    max_lr_change: float | None = field(
        default=None,
        metadata={
            "help": "Trust region: one update changes a learning rate at most by this factor; `inf` switches it off. "
            "By default 1.1 where the start rates are calibrated, so that tuning corrects them gently, and 2 where it "
            "has to find them."
        },
    )
    tuning_steps: int = field(
        default=40,
        metadata={
            "help": "Tune at the first so many optimizer steps, then keep the rates found and leave them to the "
            "schedule; 0 tunes to the end."
        },
    )
    calibrate: bool | None = field(
        default=None,
        metadata={
            "help": "Find the start rates along the first step, so that `learning_rate` makes no difference. On "
            "by default, unless `hyper_lr` is 0."
        },
    )
    meta_source: str | None = field(
        default=None,
        metadata={
            "help": "Where the validation gradient comes from: `stream` (validation batches, one more forward and "
            "backward) or `next_batch` (the next training batch, no extra pass). By default `stream` when there is a "
            "`meta_dataset` or a `meta_split`, else `next_batch`."
        },
    )
    meta_every: int | None = field(
        default=None,
        metadata={
            "help": "Tune at every k-th optimizer step. By default every second with `stream`, which finds as good "
            "rates for half of the cost, and every one with `next_batch`, which costs next to nothing."
        },
    )
    meta_batch_size: int | None = field(
        default=None,
        metadata={"help": "Validation images per device at a tuned step; the training batch size by default."},
    )
    meta_split: float = field(
        default=0.0,
        metadata={
            "help": "Share of the training set held out for validation batches, stratified by label; 0 holds nothing "
            "out."
        },
    )
    meta_mode: str = field(
        default="train",
        metadata={
            "help": "How batch-norm and dropout work in the validation pass: `train` or `eval`; running statistics are "
            "never touched by it."
        },
    )
    lookahead: str = field(
        default="optimizer",
        metadata={
            "help": "`optimizer` differentiates the step really taken, `sgd` the raw-gradient step of the paper."
        },
    )
    head_lr_multiplier: float = field(
        default=1.0, metadata={"help": "With `calibrate=False`, the head starts at `learning_rate` times this."}
    )
    head_hold_epochs: float = field(
        default=0.0,
        metadata={
            "help": "The head keeps its start rate for so many first epochs; if they are more than `tuning_steps`, to "
            "the end."
        },
    )
    layer_granularity: str = field(
        default="block",
        metadata={
            "help": "What gets a learning rate of its own: every `block`, every `stage` of blocks, or every `tensor`."
        },
    )
    head_module: list[str] | None = field(
        default=None,
        metadata={"help": "The module or modules that are the head, where they are not recognised."},
    )
    preset: str | None = field(
        default=None,
        metadata={
            "help": "`paper` gives the settings of the paper to all of these that are left at their defaults, and a "
            "constant schedule."
        },
    )

    def __post_init__(self) -> None:
        # transformers would want DeepSpeed installed first.
        self.refuse_deepspeed()
        self._apply_preset()
        if SchedulerType(self.lr_scheduler_type) in (SchedulerType.REDUCE_ON_PLATEAU, SchedulerType.GREEDY):
            raise ValueError(
                f"lr_scheduler_type={SchedulerType(self.lr_scheduler_type).value!r} watches a metric to change the "
                "learning rate, which tuning does already. Use a schedule that depends on the step alone, such as "
                "cosine, linear or constant."
            )
        super().__post_init__()
        check_settings(
            hyper_lr=self.hyper_lr,
            lr_min=self.lr_min,
            lr_max=self.lr_max,
            max_lr_change=self.max_lr_change,
            meta_source=self.meta_source or "stream",
            meta_every=1 if self.meta_every is None else self.meta_every,
            tuning_steps=self.tuning_steps or None,
            lookahead=self.lookahead,
        )
        get_rule(self.lr_rule, self.hyper_lr)
        check_choice("meta_mode", self.meta_mode, META_MODES)
        check_choice("layer_granularity", self.layer_granularity, LAYER_GRANULARITIES)
        if self.meta_batch_size is not None:
            check_count("meta_batch_size", self.meta_batch_size)
        check_number("meta_split", self.meta_split)
        if not 0 <= self.meta_split < 1:
            raise ValueError(
                f"meta_split={self.meta_split!r} must be in [0, 1): the share of the training set held out to tune on."
            )
        for name in ("head_lr_multiplier", "head_hold_epochs"):
            check_number(name, getattr(self, name))
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)!r} must not be negative.")
        if self.head_lr_multiplier != 1 and self.resolve_calibrate():
            raise ValueError(
                f"head_lr_multiplier={self.head_lr_multiplier!r} would be ignored: the calibration finds where the "
                "head starts. Set calibrate=False to start from learning_rate, or leave it out."
            )

    @classmethod
    def from_stock(cls, args: TrainingArguments | None) -> MetaLRTrainingArguments:
        """Plain `TrainingArguments`, or none, with the defaults of what tuning adds; its own kind as it is.

        Args:
            args (`TrainingArguments`, *optional*): What a Trainer was given.
        """
        if isinstance(args, MetaLRTrainingArguments):
            return args
        return cls(
            **({} if args is None else {f.name: getattr(args, f.name) for f in fields(TrainingArguments) if f.init})
        )

    def _apply_preset(self) -> None:
        if self.preset is None:
            return
        check_choice("preset", self.preset, tuple(PRESETS))
        defaults = {f.name: f.default for f in fields(self)}
        for name, value in PRESETS[self.preset].items():
            if getattr(self, name) == defaults[name]:
                setattr(self, name, value)

    def refuse_deepspeed(self) -> None:
        """Raises `ValueError` if the run is to use DeepSpeed, by these arguments or by `accelerate launch`."""
        if self.deepspeed or os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() in ("true", "1"):
            raise ValueError(
                f"deepspeed={self.deepspeed!r}: DeepSpeed steps the optimizer inside its backward, so there is no step "
                "to tune. Use FSDP instead (`fsdp=True`, or `accelerate config`)."
            )

    def resolve_calibrate(self) -> bool:
        """Whether the start rates are calibrated, with the default filled in."""
        return self.hyper_lr > 0 if self.calibrate is None else self.calibrate

    def resolve_max_lr_change(self) -> float:
        """The trust region of one update, with the default filled in."""
        if self.max_lr_change is not None:
            return self.max_lr_change
        return CALIBRATED_LR_CHANGE if self.resolve_calibrate() else UNCALIBRATED_LR_CHANGE

    def resolve_meta_every(self, meta_source: str) -> int:
        """How many steps apart the rates are tuned, with the default filled in.

        Args:
            meta_source (`str`): `"stream"` or `"next_batch"`.
        """
        if self.meta_every is not None:
            return self.meta_every
        return STREAM_EVERY if meta_source == "stream" else 1

    def resolve_meta_source(self, has_meta_dataset: bool) -> str:
        """Where the validation gradient comes from, with the default filled in.

        Args:
            has_meta_dataset (`bool`): Whether the trainer was given a `meta_dataset`.

        Returns:
            `str`: `"stream"` or `"next_batch"`.

        Raises:
            ValueError: if there is a meta set that the source would leave unused.
        """
        has_meta_set = has_meta_dataset or self.meta_split > 0
        if self.meta_source is None:
            return "stream" if has_meta_set or self.lookahead == "sgd" else "next_batch"
        if self.meta_source == "next_batch" and has_meta_set:
            given = "meta_dataset" if has_meta_dataset else f"meta_split={self.meta_split}"
            raise ValueError(
                f'meta_source="next_batch" takes the validation gradient from the next training batch and would leave '
                f'{given} unused. Set meta_source="stream", or leave out {given.split("=")[0]}.'
            )
        return self.meta_source

    def resolve_head_hold_steps(self, train_dataset: Any) -> int:
        """How many optimizer steps the head is held at its learning rate.

        Args:
            train_dataset (`datasets.Dataset` or torch dataset): The training set.

        Raises:
            ValueError: if the head is to be held and the set has no length.
        """
        if self.head_hold_epochs == 0:
            return 0
        if not has_length(train_dataset):
            raise ValueError(
                f"head_hold_epochs={self.head_hold_epochs} needs a training set with a length, to know how many steps "
                "an epoch has. Leave it at 0 for a streamed training set."
            )
        rows = self.train_batch_size * self.gradient_accumulation_steps * self.world_size
        return math.ceil(self.head_hold_epochs * math.ceil(len(train_dataset) / rows))

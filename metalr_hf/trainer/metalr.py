"""MetaLRTrainer: where the learning-rate scheduler, the layers and the meta stream meet transformers' Trainer."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate.utils.operations import recursively_apply
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer, TrainingArguments
from transformers.trainer_pt_utils import find_batch_size
from transformers.utils import logging

from ..hub.mixin import HubTrainer
from ..layers.groups import check_layer_groups, drop_frozen, layer_groups, split_optimizer
from ..layers.names import head_layers
from ..models.bare import LossAlone, wrap_bare_module
from ..tuning.contexts import untouched
from ..tuning.history import LRHistory
from ..tuning.hypergradient.linearity import check_optimizer_name
from ..tuning.optimizers import unwrap
from ..tuning.scheduler import MetaLRScheduler
from ..tuning.sharding import refuse_fsdp1, reshard
from .arguments import MetaLRTrainingArguments, with_tuning_arguments
from .averaging import AveragingTrainer
from .batches import MetaStream, create_meta_stream, prepare_meta_dataset
from .checkpoints import CheckpointingTrainer, check_checkpoint, checkpoint_to_resume
from .collapse import CollapseGuard, guard_for, undo_collapse
from .defaults import calibrates, head_hold_steps_of, lr_change_of, meta_every_of, meta_source_of
from .faults import describe_bad_batch, refuse_deepspeed, refuse_label_smoothing, refuse_sparse_gradients, warn_of_sizes
from .fresh_head import FreshHead
from .last_features import LastFeatures
from .schedules import schedule_shape
from .step_hooks import StepHooks, calibrate_on, fetch_validation_batch, step_hooks
from .stopping import FinishingTrainer

logger = logging.get_logger(__name__)


class MetaLRTrainer(FinishingTrainer, AveragingTrainer, CheckpointingTrainer, HubTrainer):
    """[`~transformers.Trainer`] with one meta-tuned learning rate per layer.

    The start rates are found along the first steps, so that `args.learning_rate` makes no difference. Then a fresh head
    is fitted (`args.fit_head`), and after each of the first `args.tuning_steps` steps the learning rate of every layer
    is tuned by a validation gradient, from the next training batch (the default), `meta_dataset`, or a held-out share
    of the training set (`args.meta_split`). Then the schedule alone moves them. `eval_dataset` is never used to tune.

    Every argument of `Trainer` keeps its meaning, except for a scheduler in `optimizers`, which is refused. `args` may
    be plain `TrainingArguments`, or of a class of your own: their schedule (`linear` by default) then shapes the tuned
    rates, and what tuning adds has its defaults.

    Args:
        model (`PreTrainedModel` or `torch.nn.Module`):
            The model, or in its place `model_init`. A bare timm model is put into transformers'
            `TimmWrapperForImageClassification`, a module from images to logits into a
            [`~metalr_hf.models.bare.Classifier`]. One that takes labels is taken as it is, whether it returns a loss,
            or a tuple or a dictionary with one, and so is any for a subclass with a `compute_loss` of its own.
        args ([`MetaLRTrainingArguments`] or `TrainingArguments`, *optional*):
            The arguments.
        *trainer_args:
            Further positional arguments of `Trainer`, in its order.
        meta_dataset (`datasets.Dataset`, `datasets.IterableDataset` or torch dataset, *optional*):
            Labelled images to take validation batches from, prepared like the training set.
        held_back (torch dataset, *optional*):
            With `args.stop_when_converged`, images that are trained on only when the run has converged, or for the last
            quarter before a limit, prepared like the training set: those of `eval_dataset`.
        layer_groups (`Mapping[str, Sequence[str]]`, *optional*):
            Layer name to parameter names, input side first and the head last. Defaults to
            [`layer_groups`]`(model)`.
        **kwargs:
            All other arguments of `Trainer`, by keyword.

    Raises:
        ValueError: if the layers, the meta set or the optimizer cannot be used; see the message.

    Example:

    ```python
    >>> import timm
    >>> import torch
    >>> from metalr_hf import MetaLRTrainer, MetaLRTrainingArguments
    >>> images = [{"pixel_values": torch.randn(3, 32, 32), "labels": i % 2} for i in range(16)]
    >>> args = MetaLRTrainingArguments("runs/example", max_steps=2, save_strategy="no", report_to="none", use_cpu=True)
    >>> trainer = MetaLRTrainer(timm.create_model("test_resnet", num_classes=2), args, train_dataset=images)
    >>> trainer.train()  # doctest: +ELLIPSIS
    {'train_runtime': ...
    >>> trainer.lr_history.save("lr_history.csv")

    ```
    """

    args: MetaLRTrainingArguments
    optimizer: Any

    def __init__(
        self,
        model: nn.Module | None = None,
        args: TrainingArguments | None = None,
        *trainer_args: Any,
        meta_dataset: Any = None,
        held_back: Any = None,
        layer_groups: Mapping[str, Sequence[str]] | None = None,
        **kwargs: Any,
    ):
        args = with_tuning_arguments(args)
        # By `accelerate launch`, after the arguments were made.
        refuse_deepspeed(args)
        refuse_fsdp1((args.fsdp_plugin_args or {}).get("fsdp_version", 2))
        given = inspect.signature(Trainer.__init__).bind_partial(self, model, args, *trainer_args, **kwargs).arguments
        # The user's own loss knows what to feed the module and what it returns.
        self._computes_own_loss = type(self).compute_loss is not MetaLRTrainer.compute_loss
        self._own_loss = self._computes_own_loss or given.get("compute_loss_func") is not None
        # Before Trainer sets it: a module from model_init is wrapped by what the data has.
        self.train_dataset = given.get("train_dataset")
        self._given_layer_groups = self._own_layer_groups = layer_groups
        if model is not None:
            model = self._wrap(model, args)
        refuse_label_smoothing(model, args.label_smoothing_factor)
        optimizer, scheduler = given.get("optimizers") or (None, None)
        if scheduler is not None:
            raise ValueError(
                "optimizers=(optimizer, scheduler): MetaLRTrainer's own scheduler holds the learning rates. Pass "
                "optimizers=(optimizer, None) and choose the schedule's shape with args.lr_scheduler_type."
            )
        if optimizer is None and given.get("optimizer_cls_and_kwargs") is None:
            check_optimizer_name(args.optim)
        self.meta_source = meta_source_of(args, meta_dataset is not None)
        self.meta_dataset = meta_dataset
        self._created_optimizer = self._has_trained = self._has_warned = False
        self._meta_stream: MetaStream | None = None
        self._step_loss: Tensor | float = 0.0
        self._not_in_optimizer: dict[str, Tensor] = {}
        self.collapse_guard: CollapseGuard | None = None
        self.fresh_head, self.last_features = FreshHead(), LastFeatures()
        self._step_hooks: StepHooks | None = None
        super().__init__(model, args, *trainer_args, held_back=held_back, **kwargs)
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        if plugin is not None:
            refuse_fsdp1(plugin.fsdp_version)
        if self.train_dataset is not None:
            prepare_meta_dataset(self)
        # A frozen model can be evaluated all the same.
        if self.model_init is None and any(p.requires_grad for p in self.model.parameters()):
            self._layer_groups(self.model)

    @property
    def lr_history(self) -> LRHistory:
        """The learning rate that every layer used at every optimizer step, an [`LRHistory`].

        Raises:
            AttributeError: before `train()`.
        """
        if not isinstance(self.lr_scheduler, MetaLRScheduler):
            raise AttributeError("There is no learning-rate history yet: call train() first.")
        return self.lr_scheduler.history

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Trains; see [`~transformers.Trainer.train`].

        `resume_from_checkpoint=True` goes on from the last complete checkpoint in `args.output_dir`: one whose writing
        was interrupted does not count.

        Raises:
            ValueError: if there is no such checkpoint, or it is of a run with other layers.
        """
        checkpoint = checkpoint_to_resume(resume_from_checkpoint, self.args.output_dir)
        if checkpoint is not None and self.model_init is None:
            check_checkpoint(checkpoint, list(self._layer_groups(self.model)))
        if self._has_trained and self._created_optimizer:
            # A second run, which Trainer would begin with the moments of the first.
            self.optimizer = None
        self._has_trained = True
        with step_hooks(self) as self._step_hooks:
            result = super().train(checkpoint, *args, **kwargs)
        if isinstance(self.lr_scheduler, MetaLRScheduler):
            self.lr_scheduler.settle()
        return result

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """As Trainer's, also in each run of a search; a plain module is wrapped like one that is passed as `model`."""
        return self._wrap(super().call_model_init(trial), self.args)

    def _wrap(self, model: nn.Module, args: Any) -> nn.Module:
        if self._computes_own_loss:
            return model
        options: Any = {"own_loss": self._own_loss, "label_names": args.label_names or ()}
        model, self._own_layer_groups = wrap_bare_module(model, self._given_layer_groups, self.train_dataset, **options)
        return model

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        prepared = super()._prepare_for_training(*args, **kwargs)
        # There is no public hook between this and the first step.
        if not isinstance(self.lr_scheduler, MetaLRScheduler):
            raise ValueError(
                f"create_scheduler gave a {type(self.lr_scheduler).__name__}, which would overwrite the learning rates "
                "of the layers at every step. Return super().create_scheduler(...) in it, and choose the shape that "
                "multiplies the rates with args.lr_scheduler_type and args.lr_scheduler_kwargs."
            )
        if self.args.hyper_lr > 0 or calibrates(self.args):
            refuse_sparse_gradients(self.model)
        return prepared

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Creates Trainer's optimizer, or takes the one handed in, and splits its param groups by layer."""
        self._created_optimizer |= self.optimizer is None
        optimizer = super().create_optimizer(model)
        self._split_by_layer(optimizer, self.model if model is None else model)
        return optimizer

    def _split_by_layer(self, optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
        if all("layer" in group for group in optimizer.param_groups):
            return
        parameters = dict(model.named_parameters())
        layers = {layer: [parameters[name] for name in names] for layer, names in self._layer_groups(model).items()}
        # `AdamW(model.parameters())` holds those too. One that is thawed later is noticed.
        drop_frozen(optimizer)
        split_optimizer(optimizer, layers)
        heads = head_layers(list(layers))
        for group in optimizer.param_groups:
            group["lr"] = group["lr"] * (self.args.head_lr_multiplier if group["layer"] in heads else 1)

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> MetaLRScheduler:
        """Creates the [`MetaLRScheduler`]: a stock scheduler would overwrite the tuned rates at each step."""
        if self.lr_scheduler is None:
            args, optimizer = self.args, optimizer or self.optimizer
            # A search changes the arguments from trial to trial.
            self.meta_source = meta_source_of(args, self.meta_dataset is not None)
            if args.meta_split > 0 and self.meta_dataset is None:
                raise ValueError(
                    f"meta_split={args.meta_split} was set after the trainer was made, which holds the images out. "
                    "Set it before, in the arguments that the trainer is given."
                )
            warn_of_sizes(self, num_training_steps)
            # A create_optimizer of a subclass need not have called ours.
            self._split_by_layer(unwrap(optimizer), self.model)
            fixed = args.hyper_lr == 0 and not calibrates(args)
            scheduler = MetaLRScheduler(
                optimizer,
                rule=args.lr_rule,
                hyper_lr=args.hyper_lr,
                meta_source=self.meta_source,
                meta_every=meta_every_of(args, self.meta_source),
                tuning_steps=args.tuning_steps or None,
                calibrate=calibrates(args),
                lookahead=args.lookahead,
                shape=schedule_shape(args, num_training_steps, fixed_lr=optimizer.defaults["lr"] if fixed else None),
                # Rates that nothing moves need no bounds.
                lr_min=0.0 if fixed else args.lr_min,
                lr_max=math.inf if fixed else args.lr_max,
                max_lr_change=lr_change_of(args),
                meta_context=lambda: untouched(self.model, args.meta_mode),
                reduce=self._mean_over_processes if args.world_size > 1 else None,
            )
            held_for = head_hold_steps_of(args, self.train_dataset, self._train_batch_size)
            scheduler.hold_steps = dict.fromkeys(head_layers(scheduler.layers), held_for)
            scheduler.calibrates_later = self.meta_source == "next_batch"
            self._begin_run(scheduler)
            self.lr_scheduler = scheduler
            # Trainer's own mark of a scheduler that a second train() has to make anew.
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def _begin_run(self, scheduler: MetaLRScheduler) -> None:
        """Makes anew what a run has beside its learning rates, and gives the scheduler what checkpoints are to hold."""
        args = self.args
        self._meta_stream = create_meta_stream(self) if self.meta_source == "stream" else None
        can_collapse = args.hyper_lr > 0 and args.tuning_steps and not self._computes_own_loss
        self.collapse_guard = guard_for(self.model, self.compute_loss_func) if can_collapse else None
        self.fresh_head, self.last_features = FreshHead(), LastFeatures()
        parts = {"meta_stream": self._meta_stream, "collapse_guard": self.collapse_guard, "fresh_head": self.fresh_head}
        parts["last_features"] = self.last_features
        scheduler.stateful |= {name: part for name, part in parts.items() if part is not None}
        held = {id(p) for group in scheduler.optimizer.param_groups for p in group["params"]}
        others = {name: p for name, p in self.model.named_parameters() if id(p) not in held}
        # Those that an earlier run left out too: they may have been thawed since.
        before = self._not_in_optimizer
        self._not_in_optimizer = {name: p for name, p in others.items() if name in before or not p.requires_grad}
        self._step_loss = 0.0

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """Runs Trainer's forward and backward pass, and fetches a validation batch if the coming step is tuned."""
        # For a get_batch_samples of a subclass that does not call ours; else both are done by now.
        calibrate_on(self, [inputs])
        undo_collapse(self, [inputs])
        with self.last_features.noted(self, inputs):
            loss = super().training_step(model, inputs, *args, **kwargs)
        self._refuse_thawed()
        # Trainer waits for the loss to look at it next, so that looking here costs nothing.
        if self.args.logging_nan_inf_filter and not self._has_warned and not bool(torch.isfinite(loss).all()):
            self._has_warned = True
            logger.warning(describe_bad_batch(inputs, self.state.global_step))
        self._step_loss = self._step_loss + loss
        scheduler, guard = self.lr_scheduler, self.collapse_guard
        if self.accelerator.sync_gradients:
            if scheduler.awaits_gradients:
                # Before Trainer clips them.
                scheduler.note_gradients(self._loss_scale(loss.device), self._step_loss)
            fetch_validation_batch(self)
            if guard is not None and guard.active:
                guard.note(torch.as_tensor(self._step_loss), inputs["labels"])
            self._step_loss = 0.0
        return loss

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Trainer's; a module that is not one of transformers may also return its loss alone."""
        bare = not isinstance(self.model, PreTrainedModel) and self.label_smoother is None
        if bare and self.compute_loss_func is None:
            return super().compute_loss(LossAlone(model, self.args.n_gpu), inputs, *args, **kwargs)  # type: ignore[arg-type]
        return super().compute_loss(model, inputs, *args, **kwargs)

    def _refine_average(self) -> None:
        self.last_features.refine(self)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        self.last_features.go_back(self.state.best_global_step)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], Any]:
        """As Trainer's; the step before is judged on the batches of the coming one."""
        batches, count = super().get_batch_samples(*args, **kwargs)
        if self._step_hooks is not None:
            self._step_hooks.note(batches)
        return batches, count

    def compute_meta_loss(self, inputs: Any) -> Tensor:
        """The loss of a validation batch, computed as the training loss is.

        Args:
            inputs (`dict` or `Sequence`): A batch as the data loader gives it.

        Returns:
            `torch.Tensor` of shape `()`: the loss, with its graph.
        """
        # A copy: a loss may work in place, and a batch is looked at several times.
        inputs = recursively_apply(torch.clone, self._prepare_inputs(inputs))
        # A compute_loss_func may divide by the count, which all processes take part in. Models take their own mean.
        count = None
        if self.compute_loss_func is not None:
            count = self._get_num_items_in_batch([inputs], self.args.device)
        if find_batch_size(inputs) == 0 and not self.is_fsdp_enabled:
            # A collator has left out all of it. Nothing is tuned then, in no process.
            return next(p for p in self.model.parameters() if p.requires_grad).sum() * math.nan
        with self.compute_loss_context_manager():
            # Not through DDP, which would send the gradients where one figure per layer will do. DataParallel divides
            # the batch over its devices.
            model = self.model_wrapped if self.args.n_gpu > 1 else self.model
            loss = self.compute_loss(model, inputs, num_items_in_batch=count)
        assert isinstance(loss, Tensor)
        if self.is_fsdp_enabled and not torch.is_grad_enabled():
            reshard(self.model)
        # A vector under DataParallel.
        return loss.mean()

    def _loss_scale(self, device: torch.device, headroom: int = 1) -> float | Tensor:
        """The factor that float16's losses are multiplied by, left on the device: `get_scale()` would wait for it."""
        scaler = self.accelerator.scaler
        return 1.0 if scaler is None else scaler.scale(torch.ones((), device=device)) / headroom

    def _refuse_thawed(self) -> None:
        thawed = [name for name, p in self._not_in_optimizer.items() if p.requires_grad]
        if thawed:
            raise ValueError(
                f"{thawed[0]} and {len(thawed) - 1} more parameters were frozen when training began and are not any "
                "more, but the optimizer does not hold them: they would not be trained. Freeze them in a callback's "
                "on_train_begin instead, when the optimizer holds all parameters, or train anew with one that does."
            )

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds the learning rates that the last step used, and how tuning goes, to a training row.

        `learning_rate` is the geometric mean over the layers. Trackers (`args.report_to`) get every layer's rate, as
        `lr/<layer>`, and at a tuned step its hypergradient, as `hypergradient/<layer>`.
        """
        scheduler = self.lr_scheduler
        if "learning_rate" in logs and isinstance(scheduler, MetaLRScheduler) and scheduler.calibration_is_late:
            # The rates that the step will have been taken with are known when the next batch is there.
            logs.pop("learning_rate")
        elif "learning_rate" in logs and isinstance(scheduler, MetaLRScheduler) and len(self.lr_history):
            logs |= self.lr_history.last_row(every_layer=bool(self.args.report_to)) | scheduler.guard.counts
        super().log(logs, *args, **kwargs)

    def _layer_groups(self, model: nn.Module) -> dict[str, list[str]]:
        groups = self._own_layer_groups
        if groups is None:
            groups = layer_groups(model, self.args.layer_granularity, self.args.head_module)
        check_layer_groups(model, groups)
        return {layer: list(names) for layer, names in groups.items()}

    def _mean_over_processes(self, values: Tensor) -> Tensor:
        return self.accelerator.reduce(values, reduction="mean")

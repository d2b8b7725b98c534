"""MetaLRScheduler: a torch learning-rate scheduler that tunes one learning rate per layer."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..settings import check_layer_names, check_settings
from .calibration import CalibratedScheduler
from .guard import LOWER_BLINDLY, SHRINK_BLINDLY, TuningGuard
from .hypergradient import LookAhead
from .hypergradient.linearity import check_linear
from .hypergradient.validation import clear_gradients, gather
from .optimizers import check_own_rates, listen_to_steps, only_creates_state, overflow_flags, unwrap
from .rules import Rule, get_rule, limit_change


class MetaLRScheduler(CalibratedScheduler):
    """Tunes one learning rate per layer while the model trains, in any PyTorch loop.

    After each optimizer step it asks a validation batch whether every layer would better have taken a longer or a
    shorter step, changes the learning rates accordingly, and with a validation stream rescales the step just taken
    (Chen et al. 2023, arXiv 2206.01408, Algorithm 1). The derivative is exact for every optimizer whose update is
    linear in its learning rate, and costs one inner product per layer; see [`LookAhead`].

    Param groups with the same `"layer"` entry share one learning rate; a group without it is a layer of its own. The
    `lr` of each group is where its layer starts.

    Args:
        optimizer (`torch.optim.Optimizer`):
            The optimizer, with one or more param groups per layer.
        rule (`str` or [`~metalr_hf.tuning.rules.Rule`], *optional*, defaults to `"proportional"`):
            The learning-rate rule: `"additive"`, `"proportional"`, `"adam"`, or your own.
        hyper_lr (`float`, *optional*, defaults to 0.1):
            The step size η of the learning rates; 0 leaves them alone. A rule of your own brings its own.
        meta_loss (`Callable`, *optional*):
            Takes nothing and returns the scalar validation loss. Used by `step()` without an argument. In float16 set
            the attribute `meta_loss_scale` to the factor of the `GradScaler`, for its backward.
        meta_source (`str`, *optional*, defaults to `"stream"`):
            Where the validation gradient comes from: `"stream"`, from `meta_loss`, by one more forward and backward;
            `"next_batch"`, from the next training step's gradient, with nothing rescaled (Baydin et al. 2018).
        meta_every (`int`, *optional*, defaults to 1):
            Tunes at every k-th optimizer step, the first included.
        tuning_steps (`int`, *optional*):
            Tunes at the first so many optimizer steps, and at those that are calibrated, and keeps the rates found.
            `None` tunes to the end.
        calibrate (`bool`, *optional*, defaults to `False`):
            Finds the start rates along the first two or three steps, whatever the `lr` of the groups, and looks again
            at two later ones where these tell nothing of the backbone; see
            [`~metalr_hf.tuning.calibration.calibrate`]. Needs a `meta_loss` at every `step()` before which
            `will_calibrate` is true, with either source.
        lookahead (`str`, *optional*, defaults to `"optimizer"`):
            `"optimizer"` differentiates the step really taken; `"sgd"` (streams only) the paper's raw-gradient step.
        shape (`Callable[[int], float]`, *optional*):
            The schedule s(t) in [0, 1] that multiplies every tuned rate at optimizer step t. Constant 1 by default.
        lr_min (`float`, *optional*, defaults to 1e-8), lr_max (`float`, *optional*, defaults to 1.0):
            Bounds of every learning rate.
        max_lr_change (`float`, *optional*, defaults to 2.0):
            Trust region c: one update changes a rate at most by this factor. `None` switches it off.
        hold_steps (`Mapping[str, int]`, *optional*):
            Layers whose rate is held for so many first steps.
        meta_context (`Callable`, *optional*):
            Makes a context manager for the validation pass, such as `lambda: untouched(model)`, which keeps it out of
            batch-norm statistics and random numbers.
        reduce (`Callable`, *optional*):
            Averages a tensor over all processes. Needed if each process sees another validation batch.

    Raises:
        ValueError, TypeError: if a setting is out of range, a start rate is outside the bounds, or the optimizer's
            update is not linear in its learning rate.

    Example:

    ```python
    >>> import torch
    >>> from metalr_hf import MetaLRScheduler
    >>> _ = torch.manual_seed(0)
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    >>> images, labels = torch.randn(64, 4), torch.arange(64) % 2
    >>> images[:, 0] += 2 * labels
    >>> def loss(rows):
    ...     return torch.nn.functional.cross_entropy(model(images[rows]), labels[rows])
    >>> layers = {"stem": model[0], "head": model[2]}
    >>> groups = [{"params": layer.parameters(), "layer": name} for name, layer in layers.items()]
    >>> optimizer = torch.optim.AdamW(groups, lr=1e-4)
    >>> scheduler = MetaLRScheduler(optimizer, rule="proportional", hyper_lr=0.1)
    >>> for step in range(30):
    ...     batch, meta_batch = torch.randperm(64).split(32)
    ...     loss(batch).backward()
    ...     optimizer.step()  # the scheduler's hooks note the step taken
    ...     scheduler.step(lambda: loss(meta_batch))  # validate, tune, rescale
    ...     optimizer.zero_grad()
    >>> scheduler.layers
    ['stem', 'head']
    >>> bool((scheduler.learning_rates > 1e-4).all())
    True

    ```
    """

    def __init__(
        self,
        optimizer: Optimizer,
        rule: str | Rule = "proportional",
        hyper_lr: float | None = None,
        *,
        meta_loss: Callable[[], Tensor] | None = None,
        meta_source: str = "stream",
        meta_every: int = 1,
        tuning_steps: int | None = None,
        calibrate: bool = False,
        lookahead: str = "optimizer",
        shape: Callable[[int], float] | None = None,
        lr_min: float = 1e-8,
        lr_max: float = 1.0,
        max_lr_change: float | None = 2.0,
        hold_steps: Mapping[str, int] | None = None,
        meta_context: Callable[[], AbstractContextManager[Any]] = nullcontext,
        reduce: Callable[[Tensor], Tensor] | None = None,
    ):
        self.rule = get_rule(rule, hyper_lr)
        check_settings(
            hyper_lr=self.rule.hyper_lr,
            lr_min=lr_min,
            lr_max=lr_max,
            max_lr_change=max_lr_change,
            meta_source=meta_source,
            meta_every=meta_every,
            tuning_steps=tuning_steps,
            lookahead=lookahead,
        )
        self.meta_loss = meta_loss
        self.meta_loss_scale: float | Tensor = 1.0
        self.meta_source, self.meta_every = meta_source, meta_every
        self.tuning_steps = math.inf if tuning_steps is None else tuning_steps
        self.lookahead, self.max_lr_change = lookahead, max_lr_change
        # Whatever has a state that belongs to the run's tuning, such as the stream of validation batches, is saved and
        # loaded with the scheduler when it is put here.
        self.stateful: dict[str, Any] = {}

        self.restarted_at, self.validations = 0, 0.0
        self.guard = TuningGuard(active=self.rule.hyper_lr > 0)
        self._inner_products: Tensor | None = None
        self._training_loss: Tensor | None = None
        self._measured_loss = self._slope = math.nan
        self._only_creates_state = self._has_warned = False

        check_linear(unwrap(optimizer))
        super().__init__(optimizer, shape, lr_min, lr_max, calibrate, meta_context, reduce)
        check_layer_names("hold_steps", hold_steps or {}, self.layers)
        self.hold_steps = dict(hold_steps or {})
        listen_to_steps(optimizer, self)

    @property
    def extra_passes(self) -> float:
        """What calibration and validation have cost so far, in training passes; a forward alone counts as a third."""
        return self.validations + self.calibration_forwards / 3

    @property
    def will_tune(self) -> bool:
        """Whether the coming (or, between `optimizer.step()` and `step()`, the present) step is one that tunes."""
        if self.shape(self.last_epoch) <= 0:
            return False
        return self.will_calibrate or (not self.tuning_is_over and self.last_epoch % self.meta_every == 0)

    @property
    def tuning_is_over(self) -> bool:
        """Whether all `tuning_steps` have been taken, or `hyper_lr` is 0."""
        return self.rule.hyper_lr == 0 or self.last_epoch >= self.restarted_at + self.tuning_steps

    @property
    def awaits_gradients(self) -> bool:
        """Whether the gradients of the coming step are those that tune, as [`~MetaLRScheduler.note_gradients`] does."""
        return self.meta_source == "next_batch" and self._look_ahead.taken

    def step(self, meta_loss: Callable[[], Tensor] | None = None) -> None:  # type: ignore[override]
        """Validates, tunes, rescales the step just taken, and moves on to the next.

        Args:
            meta_loss (`Callable`, *optional*): Takes nothing and returns the scalar validation loss at the present
                parameters; the backward is done here. Defaults to the attribute `meta_loss`; if that is `None` too,
                nothing is tuned. Not called on steps that `meta_every` leaves out, nor with
                `meta_source="next_batch"`, unless the step is calibrated. Training gradients are not kept.
        """
        # The base class steps once from its own __init__, before any optimizer step.
        if self.last_epoch >= 0:
            meta_loss = meta_loss or self.meta_loss
            if self.awaits_calibration and meta_loss is None and self.calibrates_later and not self.overflowed:
                # On the next batch, which `calibrate` is called with. Nothing is recorded until the rates are known.
                self.calibration_is_late = True
                return super().step()
            if self.awaits_calibration:
                self._calibrate(meta_loss, self.last_epoch)
            elif self.meta_source == "stream":
                if self._look_ahead.taken and self.will_tune:
                    self._validate_tune_rescale(meta_loss)
                self._look_ahead.discard()
            self.record(*self._measured)
            self._measured = ()
        super().step()

    def note_gradients(self, scale: float | Tensor = 1.0, loss: Tensor | None = None) -> None:
        """Takes the hypergradient of `meta_source="next_batch"` from the gradients as they are now.

        Call it between the backward and whatever changes the gradients before the optimizer's step, such as clipping,
        which would make the hypergradients smaller than they are. Without the call they are taken as the optimizer
        gets them.

        Args:
            scale (`float` or `torch.Tensor`, *optional*, defaults to 1.0): Factor of the loss (`GradScaler`).
            loss (`torch.Tensor` of shape `()`, *optional*): The training loss, without the factor. With it a step that
                did harm is taken back.
        """
        if self.awaits_gradients:
            self._inner_products = self._look_ahead.inner_products() / scale
            self._training_loss = loss

    def close_step(self) -> None:
        """Records the step just taken without tuning by it, where something else is about to change the parameters."""
        self.settle()
        self._look_ahead.discard()
        self._inner_products = self._training_loss = None

    def restart(self, factor: float) -> None:
        """Forgets the step held open and the optimizer's state, and tunes anew from a factor of the start rates.

        Args:
            factor (`float`): What the start rates, calibrated or given, are multiplied by.
        """
        self.close_step()
        self.optimizer.state.clear()
        self.rule.reset()
        self.guard.restart()
        self.restarted_at = self.last_epoch
        self.learning_rates = (self.start_learning_rates * factor).clamp(self.lr_min, self.lr_max)
        self.write_learning_rates()

    def state_dict(self) -> dict[str, Any]:
        """The whole state, in tensors and plain containers, so that `torch.load(weights_only=True)` reads it."""
        return {
            **super().state_dict(),
            "restarted_at": self.restarted_at,
            "validations": self.validations,
            "rule": {"name": type(self.rule).__name__, "state": self.rule.state_dict()},
            "guard": self.guard.state_dict(),
            "calibrator": self._calibrator.state_dict(),
            # Of a step that is recorded when its calibration is done.
            "calibration_is_late": self.calibration_is_late,
            "measured": list(self._measured),
            "look_ahead": self._look_ahead.state_dict(self.parameters_by_layer()),
            "stateful": {name: part.state_dict() for name, part in self.stateful.items()},
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores what [`~MetaLRScheduler.state_dict`] gave. Load the optimizer's state first.

        Args:
            state_dict (`dict`): The state of a scheduler over the same layers.

        Raises:
            ValueError: if the state is not one of a `MetaLRScheduler`, or its layers or its optimizer are others.
        """
        super().load_state_dict(state_dict)
        self.restarted_at, self.validations = state_dict["restarted_at"], state_dict["validations"]
        self.guard.load_state_dict(state_dict["guard"])
        self._calibrator.load_state_dict(state_dict["calibrator"])
        self.calibration_is_late = state_dict["calibration_is_late"]
        self._measured = tuple(state_dict["measured"])
        # Another rule, or another source of validation batches, than before starts anew.
        if state_dict["rule"]["name"] == type(self.rule).__name__:
            self.rule.load_state_dict(state_dict["rule"]["state"])
        self._look_ahead.load_state_dict(state_dict["look_ahead"], self.parameters_by_layer())
        for name in self.stateful.keys() & state_dict["stateful"].keys():
            self.stateful[name].load_state_dict(state_dict["stateful"][name])

    def before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Settles the step before, if the next batch's gradient does that, and notes where the parameters are."""
        self._only_creates_state = only_creates_state(optimizer)
        if self._only_creates_state:
            return
        if self.calibration_is_late:
            raise ValueError(
                f"Optimizer step {self.last_epoch - 1} waits for a batch to be calibrated on: call "
                "scheduler.calibrate(loss) with the loss of the next batch, before its backward."
            )
        check_own_rates(optimizer, self.get_lr(), self._group_layers)
        if self.awaits_gradients:
            if self._inner_products is None:
                # A fused optimizer unscales by itself, after this hook.
                scale = getattr(optimizer, "grad_scale", None)
                self.note_gradients(1.0 if scale is None else scale)
            self._found_inf += overflow_flags(optimizer)
            assert self._inner_products is not None
            before = self.learning_rates
            tuned = self._tune(self._inner_products, self._training_loss)
            if self.guard.harmful(self._measured_loss, self._slope):
                self._refuse(before, SHRINK_BLINDLY, LOWER_BLINDLY)
            elif tuned:
                self.write_learning_rates()
            self._inner_products = self._training_loss = None
            self._look_ahead.discard()
        if self.will_tune:
            self._found_inf = []
            self._look_ahead.before_step(self.parameters_by_layer())
        elif self.tuning_is_over:
            # Gives the copy of the parameters back.
            self._look_ahead = LookAhead(unwrap(optimizer))

    def after_optimizer_step(self, optimizer: Optimizer) -> None:
        """Notes the step that the optimizer has taken."""
        if self.will_tune and not self._only_creates_state:
            # A fused optimizer that has met an overflow runs its hooks but leaves the parameters where they are.
            self._found_inf += overflow_flags(optimizer)
            self._look_ahead.after_step()

    def _calibrate(self, meta_loss: Callable[[], Tensor] | None, step: int) -> None:
        first = self.calibration is None
        super()._calibrate(meta_loss, step)
        if first and self.calibration is not None:
            self.guard.begin(self.calibration.start_loss)

    def _validate_tune_rescale(self, meta_loss: Callable[[], Tensor] | None) -> None:
        if meta_loss is None:
            if not self._has_warned:
                self._has_warned = True
                warnings.warn(
                    "MetaLRScheduler.step() was called without a validation loss, so that the learning rates stay "
                    "where they are: call scheduler.step(meta_loss), or set meta_source='next_batch' or hyper_lr=0.",
                    stacklevel=3,
                )
            return
        look_ahead, before, shape = self._look_ahead, self.learning_rates, self.shape(self.last_epoch)
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        raw_step = (before * shape).tolist() if self.lookahead == "sgd" else None
        with self.meta_context():
            loss, products = look_ahead.validate(meta_loss, parameters, raw_step, self.meta_loss_scale)
        if raw_step is not None:
            # The hypergradient itself: the step looked at is -α s g.
            products = products * -shape
        self.validations += 1
        tuned = self._tune(products, loss)
        clear_gradients(parameters)
        if self.guard.harmful(self._measured_loss, self._slope):
            self._shrink(meta_loss, before)
        elif tuned:
            look_ahead.rescale(self.ratios(before))

    def _shrink(self, meta_loss: Callable[[], Tensor], before: Tensor) -> None:
        """Takes a harmful step back until its loss is bearable, with forward passes."""

        def loss_at(factor: float) -> float:
            self.validations += 1 / 3
            with self.meta_context():
                return self._look_ahead.loss_at([factor] * len(before), meta_loss, self.reduce)

        factor = self.guard.bearable_factor(loss_at)
        self._refuse(before, factor, factor)

    def _refuse(self, before: Tensor, step_factor: float, rate_factor: float) -> None:
        self._look_ahead.rescale([step_factor] * len(before))
        self.learning_rates = torch.where(self._held(), before, (before * rate_factor).clamp(min=self.lr_min))
        self.write_learning_rates()
        self.guard.count_refused()

    def _tune(self, products: Tensor, loss: Tensor | None = None) -> bool:
        """Turns inner products into new learning rates; says whether it did."""
        self._measured_loss, by_layer, overflowed = gather(
            products, loss, self._found_inf, self._look_ahead.sum_by_layer, self.reduce
        )
        self._slope = math.nan
        if overflowed:
            return False
        if self.lookahead == "optimizer":
            # Of the step itself; what the other look-ahead looks along is not the step that may have done harm.
            self._slope = float(by_layer.sum())
            by_layer = torch.where(self.learning_rates > 0, by_layer / self.learning_rates, 0.0)
        self._measured = (self._measured_loss, by_layer.tolist())
        loss_is_fine = self.meta_source == "next_batch" or math.isfinite(self._measured_loss)
        finite = bool(by_layer.isfinite().all()) and loss_is_fine
        if finite:
            new = self.rule(self.learning_rates, by_layer)
            new = limit_change(self.learning_rates, new, self.max_lr_change, self.lr_min, self.lr_max)
            finite = bool(new.isfinite().all())
        self.guard.count(finite)
        if finite:
            self.learning_rates = torch.where(self._held(), self.learning_rates, new)
        return finite

    def _held(self) -> Tensor:
        until = [self.restarted_at + self.hold_steps.get(layer, 0) for layer in self.layers]
        return torch.tensor(until) > self.last_epoch

"""A Trainer that evaluates at steps whose distance grows, and stops when it has converged."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import torch
from accelerate.utils import broadcast
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput, has_length
from transformers.utils import logging

from ...tasks.metrics import refined_losses
from ...tuning.averaging import has_statistics
from ..averaging import statistics_batches
from ..measuring import MeasuringTrainer
from .arguments import REFINED_LOSS
from .convergence import Evaluated, best_evaluation, earliest_stop, evaluation_steps, has_converged

logger = logging.get_logger(__name__)

# After a metric's name: its standard error.
ERROR = "_error"


class StoppingTrainer(MeasuringTrainer):
    """[`~transformers.Trainer`] that stops by itself when it has converged, if `args.stop_when_converged` is set.

    It evaluates at steps whose distance grows, at no more than a twentieth of the cost of the training, stops when the
    best evaluation has not been beaten in the last third of the steps taken, and goes back to the best. All of it
    depends on the steps and metrics in `state` alone, so that a resumed run stops at the same step.

    Attributes:
        stopped_because (`str`, *optional*): After such a run, why it ended.
    """

    args: Any
    model: Any
    stopped_because: str | None = None
    # The step from which on the run was trained on with all images, those that it had been evaluated on too.
    all_images_from: int | None = None
    # Whether this is the step after which the last part before a limit begins.
    is_near_limit = False

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if not getattr(self.args, "stop_when_converged", False):
            return
        if not self.args.load_best_model_at_end:
            raise ValueError(
                "stop_when_converged=True was set after the arguments were made, which fill in what it needs. Give it "
                "to MetaLRTrainingArguments."
            )
        self._evaluation_images()
        self.add_callback(_StopWhenConverged(self))

    def _evaluation_images(self) -> int:
        if self.eval_dataset is None:
            raise ValueError(
                "stop_when_converged=True needs eval_dataset: images that are not trained on, which tell when the run "
                "has converged. Pass eval_dataset, such as 50 of the training images, and the same ones as held_back "
                "if they are to be trained on in the end."
            )
        sets: dict[str, Any] = self.eval_dataset if isinstance(self.eval_dataset, dict) else {}
        if sets and not any(_metric(self.args).startswith(f"eval_{name}_") for name in sets):
            names = " or ".join(repr(f"{name}_{REFINED_LOSS}") for name in sets)
            raise ValueError(
                f"stop_when_converged=True with {len(sets)} evaluation sets and metric_for_best_model="
                f"{self.args.metric_for_best_model!r}, which is of none of them. Say which of them tells when the run "
                f"has converged, such as metric_for_best_model={names}."
            )
        parts: list[Any] = list(sets.values()) or [self.eval_dataset]
        if not all(has_length(part) for part in parts):
            raise ValueError(
                "stop_when_converged=True needs an eval_dataset with a length, by which it keeps the cost of "
                f"evaluations low; a {type(self.eval_dataset).__name__} has none. Pass a datasets.Dataset or a list."
            )
        return sum(len(part) for part in parts)

    def evaluation_loop(
        self, dataloader: Any, description: str, prediction_loss_only: bool | None = None, *args: Any, **kwargs: Any
    ) -> EvalLoopOutput:
        """Trainer's; while a run that stops by itself is trained, with its `refined_loss` too.

        That is the mean of [`~metalr_hf.tasks.metrics.refined_losses`], or the loss itself where the answers are
        not logits of classes.
        """
        if not (self.args.stop_when_converged and self.is_in_train):
            return super().evaluation_loop(dataloader, description, prediction_loss_only, *args, **kwargs)
        preprocess = self.preprocess_logits_for_metrics
        if self.compute_metrics is None and preprocess is None:
            # Trainer would keep no answers; of those that are large, as masks are, none are needed.
            prediction_loss_only, self.preprocess_logits_for_metrics = False, _of_classes
        try:
            output = super().evaluation_loop(dataloader, description, prediction_loss_only, *args, **kwargs)
        finally:
            self.preprocess_logits_for_metrics = preprocess
        prefix = kwargs.get("metric_key_prefix", "eval")
        answers = output.predictions
        losses = refined_losses(answers[0] if isinstance(answers, tuple) else answers, output.label_ids)
        metrics: Any = output.metrics
        if losses is not None:
            metrics[f"{prefix}_{REFINED_LOSS}"] = float(losses.mean())
            metrics[f"{prefix}_{REFINED_LOSS}{ERROR}"] = float(losses.std() / len(losses) ** 0.5)
        elif f"{prefix}_loss" in metrics:
            metrics[f"{prefix}_{REFINED_LOSS}"] = metrics[f"{prefix}_loss"]
        return output

    # Trainer's own place to say which weights to keep.
    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """Trainer's; of a loss with a standard error, the last weights within one of the best count as the best.

        A few images cannot tell them apart, and the later ones are an average over more steps.
        """
        is_best = super()._determine_best_metric(metrics, trial)
        if not self.args.stop_when_converged:
            return is_best
        lowest = min(filter(_has_error, self.evaluations()), key=lambda one: one.metric, default=None)
        value = metrics[_metric(self.args)]
        lower_is_better = not self.args.greater_is_better
        if lowest is not None and lower_is_better and not is_best and value <= lowest.metric + lowest.error:
            is_best, self.state.best_metric, self.state.best_global_step = True, value, self.state.global_step
        if (self.has_converged() or self.is_near_limit) and self._begin_last_part():
            is_best = True
        elif self.has_converged():
            self.control.should_training_stop = True
        # Trainer does so with save_strategy="best" alone.
        self.control.should_save |= is_best
        return is_best

    def _begin_last_part(self) -> bool:
        """Begins a last part with other images from the present weights, and returns `True`; here there are none."""
        return False

    @property
    def last_step(self) -> int:
        """The step that the run ends at, as far as is known."""
        return self.state.max_steps

    def _comes_near_limit(self, time_used: float) -> bool:
        """Whether the last part before a limit begins, in which other images are trained on; here there are none."""
        return False

    def evaluation_cost(self) -> float:
        """What an evaluation costs, in optimizer steps; a forward pass alone counts as a third of an image trained on.

        Returns:
            `float`
        """
        args = self.args
        images_of_step = self._train_batch_size * args.gradient_accumulation_steps * args.world_size
        cost = self._evaluation_images() / images_of_step / 3
        if getattr(self, "average_weights", None) is not None and any(map(has_statistics, self.model.modules())):
            batches, size = statistics_batches(self._train_batch_size)
            cost += batches * size / self._train_batch_size / args.gradient_accumulation_steps / 3
        return cost

    def evaluations(self) -> list[Evaluated]:
        """The evaluations of this run, those before it was resumed among them.

        Returns:
            `list[Evaluated]`
        """
        rows: list[dict[str, Any]] = self.state.log_history
        name = _metric(self.args)
        return [
            Evaluated(row["step"], row[name], row.get(name + ERROR, 0.0))
            for row in rows
            if name in row and row["step"] > 0
        ]

    def has_converged(self) -> bool:
        """Whether the run has come to its end by itself, by [`has_converged`].

        Returns:
            `bool`
        """
        return has_converged(self.evaluations(), self.args.greater_is_better)

    # There is no public hook between the state of a checkpoint and the first step.
    def _init_training_state(
        self, max_steps: int, steps_per_epoch: int, epochs: int, resume_from_checkpoint: str | None, trial: Any
    ) -> tuple[int, int]:
        self.stopped_because = None
        start = super()._init_training_state(max_steps, steps_per_epoch, epochs, resume_from_checkpoint, trial)
        # Of a run that had ended, no epoch is left.
        return (epochs, 0) if self.args.stop_when_converged and self.has_converged() else start


def _has_error(evaluated: Evaluated) -> bool:
    # Neither without one nor not a number.
    return evaluated.error > 0


def _of_classes(logits: Any, labels: Any) -> Any:
    first = next(iter(logits), None) if isinstance(logits, tuple) else logits
    if not isinstance(first, torch.Tensor):
        # A detector gives a dictionary of losses, and some modules nothing but their loss.
        return labels
    return first if first.ndim == 2 else first.new_zeros(len(first))


def _metric(args: Any) -> str:
    return "eval_" + args.metric_for_best_model.removeprefix("eval_")


class _StopWhenConverged(TrainerCallback):
    def __init__(self, trainer: StoppingTrainer):
        self.trainer = trainer
        self.metric = _metric(trainer.args)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.started, self.timeout = time.monotonic(), False
        self.cost = self.trainer.evaluation_cost()
        self._plan_next_evaluation(state)

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        time_used = 0.0
        if args.max_minutes is not None:
            time_used = self._of_first_process((time.monotonic() - self.started) / (60 * args.max_minutes))
            self.timeout = time_used > 1
            control.should_training_stop |= self.timeout
        is_last = self.timeout or state.global_step >= self.trainer.last_step
        if self.trainer.all_images_from is None:
            self.trainer.is_near_limit = not is_last and self.trainer._comes_near_limit(time_used)
            # The last weights may be the best.
            control.should_evaluate |= is_last or self.trainer.is_near_limit or state.global_step >= self.next
            return
        control.should_evaluate = False
        control.should_training_stop |= is_last
        if control.should_training_stop:
            # Trainer goes back to the best at the end, and deletes what it does not take for it.
            state.best_metric, state.best_global_step, control.should_save = None, state.global_step, True

    def on_epoch_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.trainer.all_images_from is not None:
            # All images are trained on from here on.
            control.should_evaluate = False
            self._set_end_of_bar(self.trainer.last_step)

    def on_evaluate(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        metrics: Mapping[str, float] = kwargs["metrics"]
        if self.metric not in metrics or not self.trainer.is_in_train or not state.global_step:
            return
        self._plan_next_evaluation(state)

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if (all_images_from := self.trainer.all_images_from) is not None:
            state_then = "Converged" if self.trainer.has_converged() else "Not yet converged"
            self._say(
                f"{state_then} at step {all_images_from}, and trained on to step {state.best_global_step} with the "
                "images too that it had been evaluated on."
            )
            return
        if self.timeout:
            reason = f"by max_minutes={args.max_minutes:g}"
        elif self.trainer.has_converged():
            reason = "converged"
        elif state.global_step >= state.max_steps:
            reason = "the limit that was given, before it had converged"
        else:
            # By another callback.
            return
        reason = f"Stopped at step {state.global_step}, {reason}."
        if state.best_global_step:
            reason += (
                f" The model is that of step {state.best_global_step}: its {self.metric}, {state.best_metric:.4g}, is "
                "the best, or cannot be told from the best."
            )
        self._say(reason)

    def _say(self, reason: str) -> None:
        self.trainer.stopped_because = reason
        logger.warning(reason)

    def _plan_next_evaluation(self, state: TrainerState) -> None:
        evaluations = self.trainer.evaluations()
        self.next = evaluation_steps(evaluations[-1].step if evaluations else 0, self.cost)
        best = best_evaluation(evaluations, self.trainer.args.greater_is_better)
        in_sight = max(self.next, earliest_stop(best.step if best else 0))
        self._set_end_of_bar(min(in_sight, self.trainer.last_step))

    def _set_end_of_bar(self, step: int) -> None:
        # Of the terminal's and of notebooks'; there is no other way to change where they end.
        for callback in self.trainer.callback_handler.callbacks:
            for name in ("training_bar", "training_tracker"):
                bar: Any = getattr(callback, name, None)
                if bar is not None:
                    bar.total = step

    def _of_first_process(self, value: float) -> float:
        # The clocks of several processes differ.
        if self.trainer.args.world_size == 1:
            return value
        return float(broadcast(torch.tensor([value], device=self.trainer.args.device), from_process=0).item())

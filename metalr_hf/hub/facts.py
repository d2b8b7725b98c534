"""Collects the facts of a run from its trainer, for the model card."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from huggingface_hub import ModelCard

# The errors of the HTTP library that the installed huggingface_hub uses, which has changed over time.
from huggingface_hub.errors import HTTPError
from sklearn.metrics import precision_recall_fscore_support
from torch import nn
from transformers import PreTrainedModel
from transformers.trainer_utils import EvalLoopOutput, SchedulerType, has_length
from yaml import YAMLError

from ..data.intensity import CHANNELS, channels_of, window_of
from ..models.bare import Classifier
from ..models.channels import input_channels
from ..models.monai_networks import MonaiConfig
from ..models.target_losses import TargetLoss
from ..models.volume_processor import VolumeImageProcessor
from ..tasks.base import Task
from ..tasks.registry import TASKS
from ..tuning.optimizers import unwrap
from .card import Evaluation, LayerFacts, RunFacts
from .publish import CARD

if TYPE_CHECKING:
    from .mixin import HubTrainer

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
PIPELINE_TAGS = {
    "ForImageClassification": "image-classification",
    "ForSemanticSegmentation": "image-segmentation",
    "ForObjectDetection": "object-detection",
}
USUAL_SIZE = 224
NOT_A_RESULT = ("_runtime", "_per_second", "model_preparation_time")


def run_facts(
    trainer: HubTrainer, base_model: str | None = None, dataset: str | None = None, task: str | None = None
) -> RunFacts:
    """Collects the facts of a run from its trainer, after training.

    Args:
        trainer ([`~metalr_hf.hub.mixin.HubTrainer`]): The trainer.
        base_model (`str`, *optional*): Hub id of the pretrained model; by default what the model's configuration says.
        dataset (`str`, *optional*): Hub id or name of the data set; by default `trainer.dataset_name`.
        task (`str`, *optional*): Pipeline tag; by default that of the task or of the model's class.

    Returns:
        [`~metalr_hf.hub.card.RunFacts`]
    """
    model: Any = trainer.accelerator.unwrap_model(trainer.model)
    config: Any = getattr(model, "config", None)
    is_adapter = hasattr(model, "peft_config")
    network = model.get_base_model() if is_adapter else model.network if isinstance(model, Classifier) else model
    is_known = isinstance(network, PreTrainedModel)
    loaded_from = getattr(config, "_name_or_path", None)
    base_model = base_model or _hub_id(loaded_from)
    dataset = dataset or trainer.dataset_name or _builder_name(trainer.train_dataset)
    is_timm = hasattr(network, "timm_model")
    kind = trainer.task or _kind_of_answers(config)
    return RunFacts(
        library="peft" if is_adapter else "timm" if is_timm else "transformers" if is_known else None,
        task=task or (trainer.task.pipeline_tag if trainer.task else _pipeline_tag(network)),
        architecture=getattr(config, "architecture", None) or type(network).__name__,
        layers=_layers(trainer.lr_scheduler),
        settings=_settings(trainer),
        validation=_validation(trainer),
        step=trainer.step_of_weights,
        tuned=trainer.args.hyper_lr > 0,
        auto_class=f"AutoModel{next((e for e in PIPELINE_TAGS if type(network).__name__.endswith(e)), '')}",
        # By this `save_pretrained` decides whether to save the code.
        has_own_code=getattr(network, "_auto_class", None) is not None,
        volume_channels=config.num_channels if getattr(config, "model_type", None) == MonaiConfig.model_type else None,
        reads_nifti=isinstance(trainer.processing_class, VolumeImageProcessor),
        input_shape=_input_shape(config) if trainer.processing_class is None else None,
        own_reader=_own_reader(trainer.processing_class),
        base_model=base_model,
        license=_license(base_model, loaded_from, config),
        dataset=dataset,
        dataset_on_hub=bool(_hub_id(dataset)),
        classes=class_names(model),
        answers=kind.card_sentence,
        activation=kind.activation,
        purpose=kind.purpose,
        evaluation=trainer.evaluation,
        test_split=trainer.test_split,
        train_images=_train_images(trainer),
    )


def _train_images(trainer: HubTrainer) -> int | None:
    if not has_length(trainer.train_dataset):
        return None
    return len(trainer.train_dataset) + (0 if trainer.all_images_from is None else len(trainer.held_back))


def read_evaluation(model: Any, output: EvalLoopOutput, split: str, step: int) -> Evaluation | None:
    """What an evaluation says, of every class where it is a classifier's.

    Args:
        model (`torch.nn.Module`): The model, for the names of its classes.
        output (`EvalLoopOutput`): What `Trainer.evaluation_loop` gives: of all processes.
        split (`str`): The metrics' prefix.
        step (`int`): Optimizer step of the weights.

    Returns:
        [`~metalr_hf.hub.card.Evaluation`], *optional*: `None` where nothing was measured.
    """
    metrics = {
        name.removeprefix(f"{split}_"): float(value)
        for name, value in (output.metrics or {}).items()
        if isinstance(value, (int, float)) and not name.endswith(NOT_A_RESULT)
    }
    several = getattr(getattr(model, "config", None), "problem_type", None) == "multi_label_classification"
    results = (_label_results if several else _class_results)(class_names(model), output)
    return Evaluation(split, metrics, results, step) if metrics else None


def class_names(model: Any) -> list[str]:
    """The names of a model's classes in their order; empty where its configuration names none.

    Args:
        model (`torch.nn.Module`): Any model.

    Returns:
        `list[str]`

    Example:

    ```python
    >>> from metalr_hf.models.demo import demo_model
    >>> from metalr_hf.hub.facts import class_names
    >>> class_names(demo_model({0: "cat", 1: "dog"}))
    ['cat', 'dog']

    ```
    """
    names: Mapping[int, str] = getattr(getattr(model, "config", None), "id2label", None) or {}
    return [str(names[i]) for i in sorted(names)]


def _class_results(names: list[str], output: EvalLoopOutput) -> list[list[object]]:
    predictions, labels = output.predictions, output.label_ids
    answers = predictions[0] if isinstance(predictions, tuple) else predictions
    if not isinstance(answers, np.ndarray) or not isinstance(labels, np.ndarray) or labels.ndim != 1:
        return []
    if answers.shape == (len(labels), len(names)):
        answers = answers.argmax(-1)
    # Otherwise `preprocess_logits_for_metrics` may have left the answers only.
    if answers.shape != labels.shape or not all(np.issubdtype(x.dtype, np.integer) for x in (answers, labels)):
        return []
    figures = precision_recall_fscore_support(labels, answers, labels=range(len(names)), zero_division=0.0)
    return [
        [name, f"{precision:.3f}", f"{recall:.3f}", f"{f1:.3f}", int(images)]
        for name, precision, recall, f1, images in zip(names, *figures, strict=True)
    ]


def _kind_of_answers(config: Any) -> Task | type[Task]:
    """The task of a script, as far as the model's configuration tells it."""
    problem = getattr(config, "problem_type", None)
    found = (task for task in TASKS.values() if getattr(task, "problem_type", None) == problem)
    return Task if problem is None else next(found, Task)


def _label_results(names: list[str], output: EvalLoopOutput) -> list[list[object]]:
    predictions, labels = output.predictions, output.label_ids
    logits = predictions[0] if isinstance(predictions, tuple) else predictions
    if not isinstance(logits, np.ndarray) or not isinstance(labels, np.ndarray) or logits.shape != labels.shape:
        return []
    results: list[list[object]] = []
    for name, truth, logit in zip(names, labels.T, logits.T, strict=True):
        # Those below zero are unknown.
        known = truth >= 0
        if not known.any():
            results.append([name, "", "", "", 0])
            continue
        answers = logit[known] > 0
        figures = precision_recall_fscore_support(truth[known], answers, average="binary", zero_division=0.0)[:3]
        results.append([name, *(f"{value:.3f}" for value in figures), int((truth == 1).sum())])
    return results


def _layers(scheduler: Any) -> list[LayerFacts]:
    start, final = scheduler.start_learning_rates, scheduler.learning_rates
    # The learning rates were updated once more after the last step.
    low = torch.minimum(scheduler.lowest_learning_rates, final)
    high = torch.maximum(scheduler.highest_learning_rates, final)
    rates = (rates.tolist() for rates in (start, final, low, high))
    return [LayerFacts(*facts) for facts in zip(scheduler.layers, *rates, strict=True)]


def _settings(trainer: HubTrainer) -> dict[str, object]:
    args, state, optimizer = trainer.args, trainer.state, unwrap(trainer.lr_scheduler.optimizer)
    warmup, schedule = args.get_warmup_steps(state.max_steps), SchedulerType(args.lr_scheduler_type).value
    # Not what was asked for, which auto_find_batch_size may have lowered.
    batch = trainer._train_batch_size * args.gradient_accumulation_steps * args.world_size
    loss: Any = trainer.compute_loss_func
    decay = max(group.get("weight_decay", 0.0) for group in optimizer.param_groups)
    settings: dict[str, object] = {
        "optimizer steps": f"{state.global_step} ({state.epoch or 0:.4g} epochs)",
        "images a step": batch,
        **_trained(trainer.model),
        "optimizer": f"{type(optimizer).__name__}, weight decay {decay:g}",
        "schedule": f"{schedule}, {warmup} warm-up steps" if warmup else schedule.removesuffix("_with_warmup"),
        **_tuning(trainer),
        **trainer.preparation,
        **_images(trainer.processing_class),
        **({"loss": loss.description} if isinstance(loss, TargetLoss) else {}),
        "precision": _precision(trainer),
        "device": _device(args),
        "seed": args.seed if args.data_seed is None else f"{args.seed}, {args.data_seed} for the data",
    }
    if trainer.stopped_because is not None:
        settings["end of the run"] = trainer.stopped_because
    weights = []
    if trainer.average_weights is not None:
        kind = str(trainer.average_weights)
        weights.append(f"an average along the run ({kind if kind.isalpha() else f'exponential, decay {kind}'})")
    if trainer.step_of_weights != state.global_step:
        weights.append(f"those of step {trainer.step_of_weights}, the best on the evaluation set")
    if weights:
        settings["weights"] = "; ".join(weights)
    packages = ["metalr_hf", "transformers", "torch", "datasets"]
    modules = {type(module).__module__.split(".")[0] for module in trainer.model.modules()}
    packages += sorted(modules & {"timm", "peft", "monai"})
    return settings | {"versions": ", ".join(f"{package} {version(package)}" for package in packages)}


def _trained(model: nn.Module) -> dict[str, object]:
    parameters = list(model.parameters())
    trained, there_are = (sum(p.numel() for p in of) for of in ([p for p in parameters if p.requires_grad], parameters))
    return {} if trained == there_are else {"trained parameters": f"{trained:,} of {there_are:,}"}


def _images(processor: Any) -> dict[str, object]:
    window = window_of(processor)
    return {} if window is None else {"intensity window": window.description}


def _own_reader(processor: Any) -> str | None:
    # A pipeline makes any image one of three colours with 8 bits, and says nothing of what that loses.
    if window_of(processor) is not None:
        return "The images have more than 8 bits: they are read with the window of intensities saved with the model."
    channels = channels_of(processor)
    return None if channels == CHANNELS else f"The images have {channels} channels, which a pipeline does not keep."


def _input_shape(config: Any) -> tuple[int, ...]:
    """The shape of a pretrained model's images; networks that take any size take this one too."""
    if of_timm := (getattr(config, "pretrained_cfg", None) or {}).get("input_size"):
        return tuple(of_timm)
    size = getattr(config, "image_size", None) or USUAL_SIZE
    height, width = (size, size) if isinstance(size, int) else size
    return (input_channels(config), height, width)


def _tuning(trainer: HubTrainer) -> dict[str, object]:
    args, scheduler = trainer.args, trainer.lr_scheduler
    rates = scheduler.start_learning_rates
    given = " to ".join(dict.fromkeys(f"{rate:.1e}" for rate in (rates.min().item(), rates.max().item())))
    way = "calibrated along the first steps" if scheduler.calibration else "as given"
    if scheduler.calibration and scheduler.calibration.doubts:
        way += f" (in doubt: {'; '.join(scheduler.calibration.doubts)})"
    settings: dict[str, object] = {"start learning rates": f"{given}, {way}"}
    if trainer.fresh_head.images:
        settings["head"] = f"fitted in closed form to {trainer.fresh_head.images} training images after the third step"
    if trainer.last_features.images:
        seen = f"the mean of the trained one and one fitted to the features of the last {trainer.last_features.images}"
        settings["final head"] = f"{seen} images that were trained on"
    if args.hyper_lr:
        most = f"at most a factor of {trainer.lr_scheduler.max_lr_change:g} a step"
        settings["learning-rate rule"] = f"{args.lr_rule}, η = {args.hyper_lr:g}, {most}"
        steps = args.tuning_steps if args.tuning_steps < trainer.state.global_step else 0
        settings["rates tuned"] = f"at the first {steps} steps" if steps else "at every step"
        if scheduler.meta_every > 1:
            first = f" of the first {steps}" if steps else ""
            settings["rates tuned"] = f"at one step in {scheduler.meta_every}{first}"
    if scheduler.restarted_at:
        settings["collapsed"] = f"and went back to the first weights at step {scheduler.restarted_at}, with lower rates"
    if scheduler.guard.refused:
        settings["harmful steps taken back"] = scheduler.guard.refused
    if scheduler.guard.non_finite:
        settings["steps not tuned, for figures that were not finite"] = scheduler.guard.non_finite
    return settings


def _validation(trainer: HubTrainer) -> str:
    args = trainer.args
    if not args.hyper_lr:
        return ""
    if trainer.meta_source == "next_batch":
        trained_on = "" if trainer.all_images_from is None else ", before all of them were trained on"
        return (
            "The validation gradient of a step was that of the next training batch, whose images the step had not "
            f"seen. No image was held out for it, and none of the evaluation was used{trained_on}."
        )
    source = "a second, independently shuffled pass over the training set"
    if args.meta_split:
        source = f"{args.meta_split:.0%} of the training images, held out and stratified by class"
    elif trainer.meta_dataset is not None:
        source = "a set of labelled images given for it"
    every = trainer.lr_scheduler.meta_every
    each = "each tuned step" if every == 1 else f"one step in {every}"
    size = trainer._meta_stream.batch_size * args.world_size
    return f"At {each} a shuffled validation batch of {size} images came from {source}."


def _precision(trainer: HubTrainer) -> str:
    # Of what was asked for, a CPU does not do fp16, and accelerate does not say so.
    accelerator = trainer.accelerator
    return accelerator.mixed_precision if accelerator.native_amp else str(next(trainer.model.parameters()).dtype)[6:]


def _device(args: Any) -> str:
    name = torch.cuda.get_device_name(args.device) if args.device.type == "cuda" else args.device.type.upper()
    return f"{args.world_size} × {name}" if args.world_size > 1 else name


def _pipeline_tag(network: Any) -> str | None:
    return next((tag for ending, tag in PIPELINE_TAGS.items() if type(network).__name__.endswith(ending)), None)


def _builder_name(dataset: Any) -> str | None:
    # The name of a folder is not told. Of other builders (parquet, generator) the name says nothing.
    name = getattr(getattr(dataset, "info", None), "builder_name", None)
    return name if name == "imagefolder" else None


def _hub_id(name: str | None) -> str | None:
    return name if name and HUB_ID.fullmatch(name) and not os.path.exists(name) else None


def _license(base_model: str | None, loaded_from: str | None, config: Any) -> str | None:
    """The licence of the pretrained model, if it can be known."""
    if loaded_from and (card := Path(loaded_from) / CARD).is_file() and (stated := _stated_license(card)):
        return stated
    if not (base_model or loaded_from):
        return None
    known = (getattr(config, "pretrained_cfg", None) or {}).get("license")
    return known or (_stated_license(base_model) if base_model else None)


def _stated_license(card: str | Path) -> str | None:
    try:
        return ModelCard.load(card).data.license
    # No network, no such model, no card, or one that cannot be read: the licence is not known.
    except (HTTPError, OSError, ValueError, YAMLError):
        return None

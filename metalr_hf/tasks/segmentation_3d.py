"""Segmentation of volumes: a class a voxel, with MONAI's networks."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from transformers import (
    AutoImageProcessor,
    AutoModelForSemanticSegmentation,
    BaseImageProcessor,
    PreTrainedModel,
    Trainer,
)
from transformers.trainer_utils import PredictionOutput

from ..data.intensity import channels_of
from ..data.listing import ImageList
from ..data.transforms import Transform
from ..data.volumes import VolumeArguments, VolumeSplits, VolumeTransform, collate_volumes, load_volumes
from ..data.volumes.checks import check_channels, count_channels
from ..data.volumes.listing import list_volumes
from ..data.volumes.plan import VolumePlan
from ..messages import did_you_mean, first_line
from ..models.loading import ModelArguments, naming_the_model
from ..models.losses import segmentation_loss
from ..models.monai_networks import MonaiConfig, MonaiForSemanticSegmentation
from ..models.volume_processor import NiftiFrame, VolumeImageProcessor, masks_of
from .base import DEMO_ARGUMENTS, LOGGING, Task
from .metrics import build_volume_metrics, measure_volumes
from .registry import register_task
from .segmentation import load_segmentation_model

MONAI = "monai/"
DEFAULT_NETWORK = "DynUNet"
# Those that need no arguments.
NETWORKS = ("DynUNet", "UNet", "SwinUNETR", "SegResNet")
MM3_PER_ML = 1000.0


@dataclass
class VolumeModelArguments(ModelArguments):
    """Which model is fine-tuned, and what the volumes say about it.

    Args:
        plan ([`~metalr_hf.data.volumes.plan.VolumePlan`], *optional*): How the volumes are prepared.
    """

    plan: VolumePlan | None = None


@register_task("segmentation_3d")
class VolumeSegmentation(Task):
    """A class a voxel; see [`~metalr_hf.tasks.base.Task`] for its methods."""

    pipeline_tag = "image-segmentation"
    data_arguments = VolumeArguments
    training_arguments: ClassVar[Mapping[str, Any]] = {
        # Masks are measured as they come: those of a whole test split need not fit into memory.
        "batch_eval_metrics": True,
        # Whole volumes, each of its own size.
        "per_device_eval_batch_size": 1,
        # Distances are measured in mm.
        "label_names": ["labels", "spacing"],
    }
    # These networks begin untrained, with a norm after each convolution: a first step a hundred times too long is as
    # good as another, and the steps after it are not.
    default_arguments: ClassVar[Mapping[str, Any]] = {**LOGGING, "lr_max": 1e-2}
    demo_name = "generated volumes"
    demo_description = "generated volumes of an organ with a lesion"
    demo_model_name = DEFAULT_NETWORK
    demo_augment = "flip"
    default_image_size = None
    demo_arguments: ClassVar[Mapping[str, Any]] = {
        **DEMO_ARGUMENTS,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 1,
        "logging_steps": 6,
    }
    purpose = "segmentation of volumes"
    auto_class = AutoModelForSemanticSegmentation
    metric = "dice"

    def load_splits(self, data: VolumeArguments, *, seed: int = 42, keep_columns: Sequence[str] = ()) -> VolumeSplits:
        return load_volumes(data, seed=seed, keep_columns=keep_columns)

    def model_arguments(self, arguments: ModelArguments, splits: VolumeSplits) -> VolumeModelArguments:
        return VolumeModelArguments(**vars(arguments), plan=splits.plan)

    def load_model(
        self,
        arguments: ModelArguments,
        id2label: Mapping[int, str],
        image_size: int | None = None,
        num_channels: int | None = None,
    ) -> PreTrainedModel:
        name, plan = arguments.model_name_or_path, _plan_of(arguments)
        if num_channels is not None and num_channels != plan.channels:
            raise ValueError(f"num_channels={num_channels!r}, but the volumes have {plan.channels}. Leave it out.")
        if name is not None and not _is_fresh(name):
            with naming_the_model(name, "model"):
                return load_segmentation_model(name, id2label, trust_remote_code=arguments.trust_remote_code)
        network = DEFAULT_NETWORK if name is None else name.removeprefix(MONAI)
        if network not in NETWORKS and not plan.network_args:
            hint = did_you_mean(network, NETWORKS, f"Those that need no network_args: {', '.join(NETWORKS)}.")
            raise ValueError(f"model_name_or_path={name!r}: {network} needs network_args.{hint}")
        config = MonaiConfig(
            network=network,
            network_args=plan.network_args,
            num_channels=plan.channels,
            patch_size=plan.patch_size,
            spacing=plan.spacing,
            id2label=dict(id2label),
            label2id={label: i for i, label in id2label.items()},
        )
        with naming_the_model(f"{MONAI}{network}", "network"):
            return MonaiForSemanticSegmentation(config)

    def load_processor(
        self, arguments: ModelArguments, model: PreTrainedModel, image_size: int | None = None
    ) -> BaseImageProcessor:
        plan, name = _plan_of(arguments), arguments.model_name_or_path
        processor: Any = plan.processor()
        if name is not None and not _is_fresh(name):
            with naming_the_model(name, "image processor"):
                # One that was trained elsewhere sees volumes as it did there.
                saved = AutoImageProcessor.from_pretrained(name, trust_remote_code=arguments.trust_remote_code)
            if not isinstance(saved, VolumeImageProcessor) and not hasattr(saved, "patch_size"):
                raise ValueError(f"model_name_or_path={name!r} is no network for volumes.")
            for setting in plan.given:
                setattr(saved, setting, getattr(processor, setting))
            processor = saved
        model.config.patch_size, model.config.spacing = list(processor.patch_size), list(processor.spacing)
        _check_patch(model, plan.channels, processor.patch_size)
        return processor

    def transforms(self, splits: VolumeSplits, processor: Any, augment: str) -> tuple[Transform, Transform]:
        return VolumeTransform(processor, splits.classes, augment), VolumeTransform(processor, splits.classes)

    def trainer_arguments(self, class_names: Sequence[str], metrics: Sequence[str]) -> dict[str, Any]:
        return {
            "data_collator": collate_volumes,
            "compute_loss_func": segmentation_loss,
            "compute_metrics": build_volume_metrics(class_names),
            "preprocess_logits_for_metrics": measure_volumes,
        }

    def measure(self, trainer: Trainer, rows: Any) -> PredictionOutput:
        # `predict` would keep all masks, and cannot where they differ in size.
        return PredictionOutput(None, None, trainer.evaluate(rows, metric_key_prefix="test"))  # type: ignore[arg-type]

    def score(self, output: PredictionOutput, class_names: Sequence[str]) -> dict[str, Any]:
        found = {name.removeprefix("test_"): value for name, value in (output.metrics or {}).items()}
        if not math.isfinite(found["loss"]):
            return {"dice": None, "hausdorff95": None, "test_loss": None, "class_dice": {}}
        return {
            "dice": round(found["dice"], 6),
            "hausdorff95": round(found["hausdorff95"], 6),
            "test_loss": round(found["loss"], 6),
            "class_dice": {name: round(found[f"dice_{name}"], 6) for name in class_names[1:]},
        }

    def made(self, config: Any) -> bool:
        return config.model_type == MonaiConfig.model_type

    def load_trained(self, arguments: ModelArguments) -> tuple[PreTrainedModel, BaseImageProcessor]:
        model, processor = super().load_trained(arguments)
        given: Any = processor
        given.num_channels = _channels(model.config)
        return model, processor

    def list_images(
        self,
        sources: Sequence[str],
        config: Any,
        split: str | None = None,
        image_column_name: str | None = None,
        leave_out: str | None = None,
    ) -> ImageList:
        return list_volumes(sources, _channels(config), split, image_column_name, leave_out)

    def read(self, entry: Any, processor: Any) -> tuple[Tensor, NiftiFrame]:
        images = check_channels("This volume", list(entry) if isinstance(entry, (list, tuple)) else [entry])
        if (found := count_channels(images)) != (taken := channels_of(processor)):
            raise ValueError(
                f"the volume has {found} channel{'s' * (found > 1)}, but the model takes {taken}. Give all of them, in "
                "files that end in _0000, _0001 ... or in one file with four axes."
            )
        return processor.prepare(processor.read(images)), NiftiFrame.of(images[0])

    def answer_columns(self, class_names: Sequence[str]) -> list[str]:
        # As in the metrics, the background has no figures.
        return ["mask", *(f"{what}_{name}" for what in ("voxels", "volume_ml") for name in class_names[1:])]

    def answers(self, logits: Tensor, class_names: Sequence[str], sources: Sequence[Any]) -> list[dict[str, Any]]:
        columns, rows = self.answer_columns(class_names), []
        for mask in masks_of(logits, sources):
            voxels = np.bincount(np.asarray(mask.dataobj).ravel(), minlength=len(class_names))[1:]
            ml = voxels * abs(np.linalg.det(mask.affine[:3, :3])) / MM3_PER_ML
            rows.append(dict(zip(columns, [mask, *voxels.tolist(), *ml.round(6).tolist()], strict=True)))
        return rows


def _channels(config: Any) -> int:
    """How many channels a network for volumes takes."""
    return int(getattr(config, "num_channels", None) or getattr(config, "in_channels", None) or 1)


def _is_fresh(name: str) -> bool:
    """Whether a name is that of an untrained network of MONAI, such as `monai/UNet`."""
    return name.startswith(MONAI) and not os.path.isdir(name)


def _plan_of(arguments: ModelArguments) -> VolumePlan:
    plan = getattr(arguments, "plan", None)
    if plan is None:
        raise ValueError("The network depends on the volumes: give what VolumeSegmentation.model_arguments returns.")
    return plan


def _check_patch(model: nn.Module, channels: int, patch_size: Sequence[int]) -> None:
    """Raises `ValueError` if a network cannot take patches of a size."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            model(pixel_values=torch.zeros(1, channels, *patch_size))
    except (ValueError, RuntimeError, AssertionError) as error:
        size = " × ".join(map(str, patch_size))
        raise ValueError(
            f"patch_size: {type(model).__name__} cannot take patches of {size} voxels and {channels} channels "
            f"({first_line(error)}). Give multiples of 32 with patch_size, or choose another network."
        ) from error
    finally:
        model.train(training)

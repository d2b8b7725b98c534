"""Segmentation: a class a pixel, learned with cross-entropy plus Dice."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForSemanticSegmentation,
    BaseImageProcessor,
    PreTrainedModel,
    SegformerImageProcessor,
    TimmWrapperConfig,
)
from transformers.trainer_utils import PredictionOutput

from ..data.files.nifti import NiftiSlice
from ..data.files.reading import file_bytes, format_of
from ..data.intensity import set_window
from ..data.masks import MaskArguments, MaskSplits, MaskTransform, collate_masks, load_masks
from ..data.transforms import Transform, load_image_processor, set_channels
from ..data.volumes.folders import holds_volumes
from ..messages import first_line
from ..models.channels import RGB, input_channels, load_with_channels
from ..models.loading import ModelArguments, naming_the_model
from ..models.losses import resize_logits, segmentation_loss
from ..models.monai_networks import MonaiConfig
from ..models.unet import TimmUNetForSemanticSegmentation
from .base import DEMO_ARGUMENTS, LOGGING, Task
from .metrics import build_dice_metrics, predicted_classes
from .registry import get_task, register_task

DEMO_IMAGE_SIZE = 96


@register_task("segmentation")
class Segmentation(Task):
    """A class a pixel; see [`~metalr_hf.tasks.base.Task`] for its methods."""

    pipeline_tag = "image-segmentation"
    data_arguments = MaskArguments
    # Masks are counted as they come: those of a whole test split need not fit into memory.
    training_arguments: ClassVar[Mapping[str, Any]] = {"batch_eval_metrics": True}
    # Networks for masks need more memory for an image than classifiers do: batches are Trainer's, of eight.
    default_arguments = LOGGING
    demo_name = "cells"
    demo_description = "generated micrographs of cells"
    demo_model_name = "U-Net on EfficientNet-Lite0"
    demo_augment = "flip"
    demo_arguments: ClassVar[Mapping[str, Any]] = {
        **DEMO_ARGUMENTS,
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 16,
        "logging_steps": 12,
    }
    auto_class = AutoModelForSemanticSegmentation
    metric = "dice"

    def for_data(self, folder: str | None) -> Task:
        return get_task("segmentation_3d") if holds_volumes(folder) else self

    def load_splits(self, data: MaskArguments, *, seed: int = 42, keep_columns: Sequence[str] = ()) -> MaskSplits:
        return load_masks(data, seed=seed, keep_columns=keep_columns)

    def load_model(
        self,
        arguments: ModelArguments,
        id2label: Mapping[int, str],
        image_size: int | None = None,
        num_channels: int | None = None,
    ) -> PreTrainedModel:
        name = arguments.model_name_or_path
        if name is None:
            from ..models.demo import demo_unet

            return demo_unet(id2label, num_channels or RGB)
        with naming_the_model(name, "model"):
            return load_segmentation_model(
                name, id2label, image_size, num_channels, trust_remote_code=arguments.trust_remote_code
            )

    def make_processor(
        self, model: PreTrainedModel, name: str | None, image_size: int | None, **kwargs: Any
    ) -> BaseImageProcessor:
        return load_mask_processor(model, name, image_size, **kwargs)

    def transforms(
        self, splits: MaskSplits, processor: BaseImageProcessor, augment: str
    ) -> tuple[Transform, Transform]:
        set_window(processor, splits.window)
        return MaskTransform(processor, splits.classes, augment), MaskTransform(processor, splits.classes)

    def trainer_arguments(self, class_names: Sequence[str], metrics: Sequence[str]) -> dict[str, Any]:
        return segmentation_trainer_arguments(class_names)

    def score(self, output: PredictionOutput, class_names: Sequence[str]) -> dict[str, Any]:
        found = {name.removeprefix("test_"): value for name, value in (output.metrics or {}).items()}
        if not math.isfinite(found["loss"]):
            return {"dice": None, "test_loss": None, "class_dice": {}}
        return {
            "dice": round(found["dice"], 6),
            "test_loss": round(found["loss"], 6),
            "class_dice": {name: round(found[f"dice_{name}"], 6) for name in class_names},
        }

    def made(self, config: Any) -> bool:
        # Those of MONAI take volumes.
        kinds = [name for name in config.architectures or () if "ForSemanticSegmentation" in name]
        return bool(kinds) and config.model_type != MonaiConfig.model_type

    def load_trained(self, arguments: ModelArguments) -> tuple[PreTrainedModel, BaseImageProcessor]:
        model, processor = super().load_trained(arguments)
        # Those on the Hub were not saved by this package.
        _show_whole_images(processor)
        return model, processor

    def read(self, entry: Any, processor: BaseImageProcessor) -> tuple[Tensor, Any]:
        content = file_bytes(entry)
        pixels, size = super().read({**entry, "bytes": content}, processor)
        is_nifti = format_of(content, str(entry.get("path") or "")) == "nifti"
        # A mask lies where its image does, which a PNG cannot say.
        return pixels, NiftiSlice.of(content) if is_nifti else size

    def answer_columns(self, class_names: Sequence[str]) -> list[str]:
        return ["mask", *(f"share_{name}" for name in class_names)]

    def answers(self, logits: Tensor, class_names: Sequence[str], sources: Sequence[Any]) -> list[dict[str, Any]]:
        columns, rows = self.answer_columns(class_names), []
        for one, source in zip(logits.float(), sources, strict=True):
            is_nifti = isinstance(source, NiftiSlice)
            size = source.size if is_nifti else source
            mask = resize_logits(one[None], torch.Size(size))[0].argmax(0).to(torch.uint8).cpu().numpy()
            shares = np.bincount(mask.ravel(), minlength=len(class_names)) / mask.size
            rows.append(dict(zip(columns, [source.mask(mask) if is_nifti else mask, *shares.tolist()], strict=True)))
        return rows


def segmentation_trainer_arguments(class_names: Sequence[str]) -> dict[str, Any]:
    """The arguments of a Trainer for segmentation: cross-entropy plus Dice as the loss, Dice as the metric.

    Args:
        class_names (`Sequence[str]`): Name of class 0, 1, ...

    Returns:
        `dict[str, Any]`: `data_collator`, `compute_loss_func`, `compute_metrics` and `preprocess_logits_for_metrics`.

    Example:

    ```python
    >>> from metalr_hf.tasks.segmentation import segmentation_trainer_arguments
    >>> list(segmentation_trainer_arguments(["background", "lesion"]))  # MetaLRTrainer(model, args, ..., **these)
    ['data_collator', 'compute_loss_func', 'compute_metrics', 'preprocess_logits_for_metrics']

    ```
    """
    return {
        "data_collator": collate_masks,
        "compute_loss_func": segmentation_loss,
        "compute_metrics": build_dice_metrics(class_names),
        "preprocess_logits_for_metrics": predicted_classes,
    }


def load_segmentation_model(
    name: str,
    id2label: Mapping[int, str],
    image_size: int | None = None,
    num_channels: int | None = None,
    *,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Loads a pretrained segmentation network with a head for given classes.

    Args:
        name (`str`):
            Hub id or local folder: of a model of `AutoModelForSemanticSegmentation`, SegFormer for one, or of a timm
            model, which becomes the encoder of a U-Net.
        id2label (`Mapping[int, str]`): Class number to class name.
        image_size (`int`, *optional*): For timm models that are built for one size of images.
        num_channels (`int`, *optional*): How many channels the images have; by default the network's own number.
        trust_remote_code (`bool`, *optional*, defaults to `False`): Run the code that the repository brings along.

    Returns:
        `transformers.PreTrainedModel`

    Raises:
        OSError, ValueError: if there is no such model, or none for such images.
    """
    labels: dict[str, Any] = {"id2label": dict(id2label), "label2id": {label: i for i, label in id2label.items()}}
    config: Any = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
    if isinstance(config, TimmWrapperConfig):
        encoder_args = {
            key: value for key, value in (config.model_args or {}).items() if key in ("img_size", "in_chans")
        }
        is_built_for_it = bool((config.pretrained_cfg or {}).get("fixed_input_size")) and image_size is not None
        if is_built_for_it:
            encoder_args["img_size"] = image_size
        if num_channels is not None and num_channels != encoder_args.get("in_chans", RGB):
            encoder_args["in_chans"] = num_channels
        source = "local-dir" if os.path.isdir(name) else "hf-hub"
        try:
            return TimmUNetForSemanticSegmentation.from_encoder(f"{source}:{name}", encoder_args=encoder_args, **labels)
        except RuntimeError as error:
            if not is_built_for_it:
                raise
            raise ValueError(
                f"image_size={image_size}: no encoder for such images can be made of {config.architecture} "
                f"({first_line(error)}). Leave image_size out, or choose another size or network."
            ) from error
    config.id2label, config.label2id = labels["id2label"], labels["label2id"]
    if getattr(config, "use_auxiliary_head", False):
        # It only takes part in the model's own loss.
        config.use_auxiliary_head = False

    def load(config: Any) -> PreTrainedModel:
        return AutoModelForSemanticSegmentation.from_pretrained(
            name, config=config, ignore_mismatched_sizes=True, trust_remote_code=trust_remote_code
        )

    return load_with_channels(load, config, num_channels)


def load_mask_processor(
    model: PreTrainedModel, name_or_path: str | None = None, image_size: int | None = None, **kwargs: Any
) -> BaseImageProcessor:
    """Loads the image processor that belongs to a segmentation network.

    A U-Net on a fresh timm encoder gets a `SegformerImageProcessor` with the scale of the encoder's images: it resizes
    images and masks, and turns outputs into masks (`post_process_semantic_segmentation`). A processor that cuts out the
    centre of images is changed to one that resizes the whole image to the size of the centre.

    Args:
        model (`transformers.PreTrainedModel`): The model.
        name_or_path (`str`, *optional*): Hub id or folder to load from; not needed for U-Nets on fresh encoders.
        image_size (`int`, *optional*): Height and width of the output in pixels; by default the processor's own.
        **kwargs: To `AutoImageProcessor.from_pretrained`.

    Returns:
        `transformers.BaseImageProcessor`

    Raises:
        ValueError: if the processor cannot give the size.

    Example:

    ```python
    >>> from metalr_hf.models.demo import demo_unet
    >>> from metalr_hf.tasks.segmentation import load_mask_processor
    >>> dict(load_mask_processor(demo_unet({0: "inside", 1: "membrane"})).size)
    {'height': 96, 'width': 96}

    ```
    """
    pretrained_cfg = getattr(getattr(model, "encoder", None), "pretrained_cfg", None)
    saved = name_or_path is not None and not isinstance(
        AutoConfig.from_pretrained(name_or_path, **kwargs), TimmWrapperConfig
    )
    if saved or pretrained_cfg is None:
        processor: Any = load_image_processor(model, name_or_path, image_size, **kwargs)
        # Checkpoints trained on ADE20K would take class 0 for pixels that do not count.
        processor.do_reduce_labels = False
        _show_whole_images(processor)
        return processor
    if image_size is None:
        image_size = DEMO_IMAGE_SIZE if name_or_path is None else pretrained_cfg["input_size"][-1]
    bicubic = pretrained_cfg.get("interpolation") == "bicubic"
    processor = SegformerImageProcessor(
        size={"height": image_size, "width": image_size},
        resample=Image.Resampling.BICUBIC if bicubic else Image.Resampling.BILINEAR,
        image_mean=list(pretrained_cfg["mean"]),
        image_std=list(pretrained_cfg["std"]),
        do_reduce_labels=False,
    )
    set_channels(processor, input_channels(model.config))
    return processor


def _show_whole_images(processor: Any) -> None:
    """Masks of a centre would be stretched over the whole image when they are brought to its size."""
    if getattr(processor, "do_center_crop", False):
        processor.do_center_crop, processor.do_resize = False, True
        processor.size = type(processor.size)(**{edge: dict(processor.crop_size)[edge] for edge in ("height", "width")})

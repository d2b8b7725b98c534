"""Images to model inputs: the model's own image processor, and an augmented version of it for training."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import datasets
import torch
import transformers
from PIL import Image
from torchvision.transforms import v2
from transformers import AutoImageProcessor, BaseImageProcessor, BitImageProcessor, PreTrainedModel

from ..models.channels import input_channels, spread
from ..settings import check_choice
from .columns import IMAGE, LABEL
from .intensity import WHITE, channels_of, processed, set_window, to_input, window_of
from .loading import AUGMENTATIONS, SHUFFLE_BUFFER_SIZE
from .splits import ImageSplits, Splits

Transform = Callable[[Mapping[str, Sequence[Any]]], dict[str, list[Any]]]


def load_image_processor(
    model: PreTrainedModel, name_or_path: str | None = None, image_size: int | None = None, **kwargs: Any
) -> BaseImageProcessor:
    """Loads the image processor that belongs to a model.

    timm models have theirs in the configuration; it becomes an equal `BitImageProcessor`, which can be saved.

    Args:
        model (`transformers.PreTrainedModel`):
            The model. With a timm model, `image_size` is also written into its configuration.
        name_or_path (`str`, *optional*):
            Hub id or folder to load from; not needed for timm models.
        image_size (`int`, *optional*):
            Height and width of the output in pixels; by default the processor's own.
        **kwargs:
            To `AutoImageProcessor.from_pretrained`.

    Returns:
        `transformers.BaseImageProcessor`: gives `pixel_values` of one size for images of all sizes.

    Raises:
        ValueError: if the processor cannot give the size.

    Example:

    ```python
    from transformers import AutoModelForImageClassification
    from metalr_hf.data.transforms import load_image_processor

    name = "microsoft/resnet-18"
    processor = load_image_processor(AutoModelForImageClassification.from_pretrained(name), name, image_size=96)
    ```
    """
    pretrained_cfg = getattr(model.config, "pretrained_cfg", None)
    if pretrained_cfg is not None:
        if image_size is not None:
            pretrained_cfg["input_size"] = [input_channels(model.config), image_size, image_size]
        timm_processor = timm_image_processor(pretrained_cfg)
        set_channels(timm_processor, input_channels(model.config))
        return timm_processor
    processor = AutoImageProcessor.from_pretrained(name_or_path, **kwargs)
    set_channels(processor, input_channels(model.config))
    if image_size is not None:
        _resize_output(processor, image_size)
        if output_size(processor) != (image_size, image_size):
            raise ValueError(
                f"image_size={image_size}: {type(processor).__name__} gives {output_size(processor)} instead. Leave "
                "image_size out, or set the size in the model's preprocessor_config.json."
            )
    return processor


def set_channels(processor: Any, channels: int) -> None:
    """Makes an image processor one for images of a number of channels; its saved configuration then has it.

    Args:
        processor (`transformers.BaseImageProcessor`): The model's image processor.
        channels (`int`): How many channels the model takes.
    """
    if channels == channels_of(processor):
        return
    processor.num_channels = channels
    # It would make three channels of one.
    processor.do_convert_rgb = False
    for name in ("image_mean", "image_std"):
        values = getattr(processor, name, None)
        if isinstance(values, (list, tuple)):
            setattr(processor, name, spread(list(values), channels))


def timm_image_processor(pretrained_cfg: Mapping[str, Any]) -> BitImageProcessor:
    """What timm does to images at evaluation, as an image processor of transformers.

    Args:
        pretrained_cfg (`Mapping[str, Any]`):
            timm's `pretrained_cfg`: input size, mean, standard deviation, interpolation and `crop_pct` (how much of
            the resized image the centre crop keeps).

    Returns:
        `transformers.BitImageProcessor`: resize, centre crop, rescale and normalise.

    Example:

    ```python
    >>> from metalr_hf.data.transforms import timm_image_processor
    >>> processor = timm_image_processor({"input_size": (3, 224, 224), "crop_pct": 0.875})
    >>> dict(processor.size), dict(processor.crop_size)
    ({'shortest_edge': 256}, {'height': 224, 'width': 224})

    ```
    """
    from timm.data import resolve_data_config

    config = resolve_data_config(pretrained_cfg=dict(pretrained_cfg))
    height, width = config["input_size"][-2:]
    resized = math.floor(min(height, width) / config["crop_pct"])
    squash = config["crop_mode"] == "squash"
    resample = Image.Resampling.BICUBIC if config["interpolation"] == "bicubic" else Image.Resampling.BILINEAR
    return BitImageProcessor(
        size={"height": height, "width": width} if squash else {"shortest_edge": resized},
        do_center_crop=not squash,
        crop_size={"height": height, "width": width},
        resample=resample,
        image_mean=list(config["mean"]),
        image_std=list(config["std"]),
    )


def prepare_images(
    splits: ImageSplits, processor: BaseImageProcessor, augment: str = "crop_flip", *, seed: int = 42
) -> ImageSplits:
    """Turns images into model inputs at the moment they are read.

    The test split goes through the model's own image processor and nothing else, so that whoever loads the saved
    model with its saved processor sees the same inputs. Training and meta images are augmented, to the size and scale
    that the processor gives.

    Args:
        splits ([`ImageSplits`]): As [`load_images`] gives them.
        processor (`transformers.BaseImageProcessor`): The model's image processor.
        augment (`str`, *optional*, defaults to `"crop_flip"`): `none`, `flip`, `crop` or `crop_flip`.
        seed (`int`, *optional*, defaults to 42): Of the shuffling of streams; all others are shuffled by the Trainer.

    Returns:
        [`ImageSplits`]: rows of `pixel_values` (float32, `(channels, height, width)`) and `labels`.

    Example:

    ```python
    >>> from metalr_hf.data.loading import DataArguments, load_images
    >>> from metalr_hf.models.demo import demo_image_processor
    >>> from metalr_hf.data.transforms import prepare_images
    >>> splits = prepare_images(load_images(DataArguments()), demo_image_processor(), augment="crop")
    >>> splits.train[0]["pixel_values"].shape
    torch.Size([3, 64, 64])

    ```
    """
    set_window(processor, splits.window)
    return prepare_splits(splits, ImageTransform(processor, augment), ImageTransform(processor), seed)


def prepare_splits(splits: Splits, training: Transform, evaluation: Transform, seed: int) -> Splits:
    """Applies transforms at the moment rows are read, and shuffles a training set that is a stream.

    Args:
        splits ([`ImageSplits`]): As they were loaded.
        training (`Callable`): Columns to columns, of the training and meta images, and of those that are held back.
        evaluation (`Callable`): The same, of the test images.
        seed (`int`): Of the shuffling.

    Returns:
        [`ImageSplits`], of the class that was given
    """

    def prepared(dataset: Any, transform: Transform) -> Any:
        if isinstance(dataset, datasets.IterableDataset):
            return dataset.map(transform, batched=True, batch_size=32, remove_columns=[IMAGE, LABEL])
        return dataset.with_transform(transform)

    train, meta = splits.train, splits.meta
    if isinstance(train, datasets.IterableDataset):
        train = train.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER_SIZE)
    return replace(
        splits,
        train=prepared(train, training),
        test=prepared(splits.test, evaluation),
        validation=None if splits.validation is None else prepared(splits.validation, evaluation),
        meta=None if meta is None else prepared(meta, training),
        held_back=None if splits.held_back is None else prepared(splits.held_back, training),
    )


class ImageTransform:
    """Rows of images and labels to model inputs: the image processor, or an augmented version of it.

    Args:
        processor (`transformers.BaseImageProcessor`): The model's image processor.
        augment (`str`, *optional*, defaults to `"none"`):
            `none`: what the processor does. `flip`: then mirrored in half of the cases. `crop`: a random part of 60 to
            100 % of the area, stretched to the processor's output size. `crop_flip`: both.

    Example:

    ```python
    >>> from PIL import Image
    >>> from metalr_hf.models.demo import demo_image_processor
    >>> from metalr_hf.data.transforms import ImageTransform
    >>> transform = ImageTransform(demo_image_processor(), "crop_flip")
    >>> transform({"image": [Image.new("L", (300, 200))], "label": [0]})["pixel_values"][0].shape
    torch.Size([3, 64, 64])

    ```
    """

    def __init__(self, processor: BaseImageProcessor, augment: str = "none"):
        check_choice("augment", augment, AUGMENTATIONS)
        steps: list[Callable[..., Any]] = []
        if "crop" in augment:
            steps += [*random_crop(processor)]
        else:
            steps += [partial(processed, processor)]
        if "flip" in augment:
            steps += [v2.RandomHorizontalFlip()]
        self.transform = v2.Compose(steps)
        self.window, self.channels = window_of(processor), channels_of(processor)

    def __call__(self, rows: Mapping[str, Sequence[Any]]) -> dict[str, list[Any]]:
        """Transforms a batch of rows.

        Args:
            rows (`Mapping[str, Sequence]`): `image` (`PIL.Image.Image` or `numpy.ndarray`, as
                [`~metalr_hf.data.files.read_image`] gives it) and `label` (`int`).

        Returns:
            `dict[str, list]`: `pixel_values` (float32 tensors `(channels, height, width)`) and `labels`.

        Raises:
            ValueError: if an image has more than 8 bits, and the processor no window for it.
        """
        return {
            "pixel_values": [self.transform(to_input(image, self.window, self.channels)) for image in rows[IMAGE]],
            "labels": list(rows[LABEL]),
        }


def pixels_at_test(image: Any, processor: BaseImageProcessor) -> torch.Tensor:
    """What a model sees of an image when it is tested, and when it predicts.

    Args:
        image (`PIL.Image.Image` or `numpy.ndarray`): As [`~metalr_hf.data.files.read_image`] gives it.
        processor (`transformers.BaseImageProcessor`): The model's image processor.

    Returns:
        `torch.Tensor` of shape `(channels, height, width)`

    Raises:
        ValueError: if an image has more than 8 bits, and the processor no window for it.
    """
    return processed(processor, to_input(image, window_of(processor), channels_of(processor)))


def load_saved_processor(model: PreTrainedModel, name_or_path: str, **kwargs: Any) -> BaseImageProcessor:
    """Loads the image processor that a trained model was saved with, its window of intensities included.

    Args:
        model (`transformers.PreTrainedModel`): The model.
        name_or_path (`str`): Hub id or folder.
        **kwargs: To `AutoImageProcessor.from_pretrained`.

    Returns:
        `transformers.BaseImageProcessor`
    """
    if getattr(model.config, "pretrained_cfg", None) is None:
        return load_image_processor(model, name_or_path, **kwargs)
    # `AutoImageProcessor` makes one from the configuration of a timm model, and does not look at what was saved.
    try:
        saved, _ = BitImageProcessor.get_image_processor_dict(name_or_path)
    except OSError:
        return load_image_processor(model, name_or_path)
    kind = getattr(transformers, str(saved.get("image_processor_type")), BitImageProcessor)
    return kind.from_dict(saved)


def output_size(processor: BaseImageProcessor) -> tuple[int, int]:
    """Height and width in pixels of what an image processor gives for a square image.

    Args:
        processor (`transformers.BaseImageProcessor`): An image processor.

    Returns:
        `tuple[int, int]`: height and width.

    Example:

    ```python
    >>> from metalr_hf.models.demo import demo_image_processor
    >>> from metalr_hf.data.transforms import output_size
    >>> output_size(demo_image_processor())
    (64, 64)

    ```
    """
    height, width = model_input(processor).shape[-2:]
    return height, width


def model_input(processor: BaseImageProcessor) -> torch.Tensor:
    """What an image processor makes of a black square.

    Args:
        processor (`transformers.BaseImageProcessor`): An image processor.

    Returns:
        `torch.Tensor` of shape `(channels, height, width)`
    """
    return processed(processor, to_input(Image.new("L", (64, 64)), None, channels_of(processor)))


def random_crop(processor: BaseImageProcessor) -> list[Callable[..., Any]]:
    """Transforms of torchvision that cut out a random part and bring it to a processor's output size and scale.

    Args:
        processor (`transformers.BaseImageProcessor`): The model's image processor.

    Returns:
        `list[Callable]`: to be applied one after the other.
    """
    # Processors name and combine their settings in many ways. What one makes of black and of white says it all.
    channels = channels_of(processor)
    black, white = (
        processed(processor, torch.full((channels, 64, 64), value, dtype=torch.uint8)) for value in (0, int(WHITE))
    )
    offset, scale = black.mean(dim=(1, 2)), (white - black).mean(dim=(1, 2))
    resample = getattr(processor, "resample", None)
    interpolation = (
        v2.InterpolationMode.BICUBIC if resample == Image.Resampling.BICUBIC else v2.InterpolationMode.BILINEAR
    )
    return [
        v2.Lambda(_unit_floats),
        v2.ToImage(),
        v2.RandomResizedCrop(list(black.shape[-2:]), scale=(0.6, 1.0), ratio=(0.8, 1.25), interpolation=interpolation),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(mean=(-offset / scale).tolist(), std=(1 / scale).tolist()),
        v2.ToPureTensor(),
    ]


def _unit_floats(image: Any) -> Any:
    """Floats from 0 to 255 to those from 0 to 1 that torchvision makes of bytes."""
    return image / WHITE if isinstance(image, torch.Tensor) and image.is_floating_point() else image


def _resize_output(processor: Any, image_size: int) -> None:
    size = dict(processor.size)
    crop = getattr(processor, "crop_size", None) if getattr(processor, "do_center_crop", False) else None
    if crop:
        # As much around the crop as before.
        factor = image_size / min(dict(crop)[edge] for edge in ("height", "width"))
        processor.crop_size = type(crop)(height=image_size, width=image_size)
    else:
        factor = None
    resized = {edge: image_size if factor is None else round(value * factor) for edge, value in size.items() if value}
    processor.size = type(processor.size)(**resized)

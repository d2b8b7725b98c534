"""Images and masks to model inputs: both resized, cropped and mirrored alike."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2
from transformers import BaseImageProcessor

from ...settings import check_choice
from ..columns import IMAGE, LABEL, place
from ..intensity import channels_of, to_input, window_of
from ..loading import AUGMENTATIONS
from ..transforms import random_crop
from .loading import MaskClasses, check_size
from .reading import read_mask


class MaskTransform:
    """Rows of images and masks to model inputs: the image processor, or an augmented version of it.

    Args:
        processor (`transformers.BaseImageProcessor`): The model's image processor.
        classes ([`~metalr_hf.data.masks.MaskClasses`]): What the values of the masks mean.
        augment (`str`, *optional*, defaults to `"none"`):
            `none`: what the processor does. `flip`: then mirrored in half of the cases. `crop`: a random part of 60 to
            100 % of the area, stretched to the processor's output size. `crop_flip`: both. Masks are resized to the
            nearest pixel.

    Raises:
        ValueError: if the processor does not take masks.

    Example:

    ```python
    >>> from metalr_hf.data.masks import MaskTransform
    >>> from metalr_hf.data.masks import MaskArguments, load_masks
    >>> from transformers import SegformerImageProcessor
    >>> splits = load_masks(MaskArguments())
    >>> processor = SegformerImageProcessor(size={"height": 64, "width": 64})
    >>> transform = MaskTransform(processor, splits.classes, "crop_flip")
    >>> rows = transform(splits.train[:2])
    >>> rows["pixel_values"][0].shape, rows["labels"][0].shape
    (torch.Size([3, 64, 64]), torch.Size([64, 64]))

    ```
    """

    def __init__(self, processor: BaseImageProcessor, classes: MaskClasses, augment: str = "none"):
        check_choice("augment", augment, AUGMENTATIONS)
        if "segmentation_maps" not in inspect.signature(processor.preprocess).parameters:
            raise ValueError(
                f"{type(processor).__name__} is no image processor for segmentation: it does not take masks "
                "(segmentation_maps). Use the one that belongs to the model."
            )
        self.processor: Any = processor
        self.classes = classes
        self.window, self.channels = window_of(processor), channels_of(processor)
        self.crop = v2.Compose(random_crop(processor)) if "crop" in augment else None
        self.flip = v2.RandomHorizontalFlip() if "flip" in augment else None

    def __call__(self, rows: Mapping[str, Sequence[Any]]) -> dict[str, list[Any]]:
        """Transforms a batch of rows.

        Args:
            rows (`Mapping[str, Sequence]`):
                `image` (`PIL.Image.Image` or `numpy.ndarray`, as [`~metalr_hf.data.files.read_image`] gives it) and
                `label`, the encoded mask.

        Returns:
            `dict[str, list]`: `pixel_values` (float32 tensors `(channels, height, width)`) and `labels` (int64
                tensors `(height, width)`, 255 where a pixel does not count).

        Raises:
            ValueError: if a mask is of another size than its image or holds a value that is no class.
        """
        pairs = [self._pair(image, entry) for image, entry in zip(rows[IMAGE], rows[LABEL], strict=True)]
        return {"pixel_values": [pixels for pixels, _ in pairs], "labels": [mask.long() for _, mask in pairs]}

    def _pair(self, image: Any, entry: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        where = place("A row", entry)
        try:
            ids = self.classes.ids(read_mask(entry))
            picture = to_input(image, self.window, self.channels)
        except ValueError as error:
            raise ValueError(f"{where}: {error}.") from error
        height, width = picture.shape[-2:] if isinstance(picture, Tensor) else (picture.height, picture.width)
        check_size(where, ids.shape, (height, width))
        if self.crop is not None:
            pixels, mask = self.crop(picture, tv_tensors.Mask(torch.from_numpy(ids)))
        else:
            given = {"input_data_format": "channels_first"} if isinstance(picture, Tensor) else {}
            inputs = self.processor(picture, segmentation_maps=ids, return_tensors="pt", **given)
            pixels, mask = inputs["pixel_values"][0], inputs["labels"][0]
        if self.flip is not None:
            pixels, mask = self.flip(pixels, tv_tensors.Mask(mask))
        return torch.as_tensor(pixels), mask.as_subclass(Tensor)


def collate_masks(rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """Stacks prepared rows to a batch: the data collator of a segmentation network.

    Args:
        rows (`Sequence[Mapping[str, Any]]`): Rows of `pixel_values` and `labels`, in two or three dimensions.

    Returns:
        `dict[str, torch.Tensor]`: `pixel_values` float32 `(batch, channels, ...)`, `labels` int64 `(batch, ...)`.

    Example:

    ```python
    >>> import torch
    >>> from metalr_hf.data.masks import collate_masks
    >>> rows = [{"pixel_values": torch.zeros(3, 32, 32), "labels": torch.zeros(32, 32)} for _ in range(4)]
    >>> collate_masks(rows)["labels"].shape
    torch.Size([4, 32, 32])

    ```
    """
    return {
        "pixel_values": torch.stack([torch.as_tensor(row["pixel_values"]) for row in rows]),
        "labels": torch.stack([torch.as_tensor(row["labels"]).long() for row in rows]),
    }

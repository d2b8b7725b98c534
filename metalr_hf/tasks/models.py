"""Pretrained models and their image processors, by name."""

from __future__ import annotations

from collections.abc import Mapping

from transformers import AutoConfig, AutoModelForImageClassification, BaseImageProcessor, PreTrainedModel

from ..cli.arguments import ModelArguments
from ..data.loading import DataArguments
from ..data.transforms import load_image_processor
from ..messages import first_line
from .segmentation import load_mask_processor, load_segmentation_model


def load_model(
    arguments: ModelArguments, id2label: Mapping[int, str], task: str = "classification", image_size: int | None = None
) -> PreTrainedModel:
    """Loads a pretrained model with a head for given classes.

    Args:
        arguments ([`ModelArguments`]): Which model.
        id2label (`Mapping[int, str]`): Class number to class name.
        task (`str`, *optional*, defaults to `"classification"`): `classification` or `segmentation`.
        image_size (`int`, *optional*): For encoders of U-Nets that are built for one size of images.

    Returns:
        `transformers.PreTrainedModel`: with a fresh head if the pretrained one has another number of classes.

    Raises:
        FileNotFoundError: if there is no such model, or no network to fetch it.
    """
    if arguments.model_name_or_path is None:
        from .demo import demo_model, demo_unet

        return demo_unet(id2label) if task == "segmentation" else demo_model(dict(id2label))
    name = arguments.model_name_or_path
    try:
        if task == "segmentation":
            return load_segmentation_model(name, id2label, image_size, trust_remote_code=arguments.trust_remote_code)
        config = AutoConfig.from_pretrained(name, trust_remote_code=arguments.trust_remote_code)
        config.id2label = dict(id2label)
        config.label2id = {label: i for i, label in id2label.items()}
        if hasattr(config, "label_names"):
            # timm's own list of the classes, which would be saved instead of the new ones.
            config.label_names = list(id2label.values())
        return AutoModelForImageClassification.from_pretrained(
            name, config=config, ignore_mismatched_sizes=True, trust_remote_code=arguments.trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise _not_loaded(name, "model", error) from error


def load_processor(arguments: ModelArguments, data: DataArguments, model: PreTrainedModel) -> BaseImageProcessor:
    """Loads the image processor of a pretrained model.

    Args:
        arguments ([`~metalr_hf.cli.arguments.ModelArguments`]): Which model.
        data ([`~metalr_hf.data.loading.DataArguments`]): The task, and the size that images are to have.
        model (`transformers.PreTrainedModel`): What [`load_model`] gave.

    Returns:
        `transformers.BaseImageProcessor`

    Raises:
        FileNotFoundError: if there is none, or no network to fetch it.
    """
    name = arguments.model_name_or_path
    load = load_mask_processor if data.task == "segmentation" else load_image_processor
    try:
        return load(model, name, data.image_size, trust_remote_code=arguments.trust_remote_code)
    except OSError as error:
        raise _not_loaded(str(name), "image processor", error) from error


def _not_loaded(name: str, what: str, error: Exception) -> ValueError | FileNotFoundError:
    if isinstance(error, ValueError):
        return ValueError(f"model_name_or_path={name!r}: its {what} could not be loaded: {first_line(error)}")
    return FileNotFoundError(
        f"model_name_or_path={name!r}: no {what} there. It must be a local folder or a model that can be reached on "
        f"the Hub: check the name and the network; private ones need `hf auth login`. ({first_line(error)})"
    )

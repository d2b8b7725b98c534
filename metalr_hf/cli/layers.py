"""`metalr-hf layers`: the layers of a model as a table, without its weights."""

from __future__ import annotations

import argparse
from typing import Any

import torch
from rich.console import Console
from torch import nn
from transformers import (
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
    MODEL_FOR_OBJECT_DETECTION_MAPPING,
    MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING,
    AutoModelForImageClassification,
    AutoModelForObjectDetection,
    AutoModelForSemanticSegmentation,
    PreTrainedConfig,
)

from ..layers.groups import layer_groups
from ..messages import first_line

# The package's own networks are known to transformers, without code from the folder, once their modules are imported.
from ..models import monai_networks, unet  # noqa: F401
from ..models.loading import load_config
from ..models.timm import architecture_of
from ..settings import LAYER_GRANULARITIES

TASKS: tuple[tuple[Any, Any], ...] = (
    (AutoModelForImageClassification, MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING),
    (AutoModelForSemanticSegmentation, MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING),
    (AutoModelForObjectDetection, MODEL_FOR_OBJECT_DETECTION_MAPPING),
)


def main(argv: list[str]) -> int:
    """Prints which layers a model has: name, tensors, parameters and their share.

    Args:
        argv (`list[str]`): The arguments of `metalr-hf layers`.

    Returns:
        `int`: the exit code.

    Raises:
        ValueError: if there is no such model, granularity or head.
        FileNotFoundError: if a model can be read neither from a folder nor from the Hub.
    """
    parser = argparse.ArgumentParser(
        prog="metalr-hf layers", description="Lists the layers of a model, each of which gets a learning rate."
    )
    parser.add_argument(
        "--model",
        "--model_name_or_path",
        help="Hub id, local folder or timm/...; by default the model of `metalr-hf train`",
    )
    parser.add_argument("--granularity", choices=LAYER_GRANULARITIES, default="block", help="default: block")
    parser.add_argument("--head", nargs="+", help="the module or modules that are the head, where not recognised")
    parser.add_argument("--trust_remote_code", action="store_true", help="run the code that a repository brings")
    given = parser.parse_args(argv)
    model = empty_model(given.model, trust_remote_code=given.trust_remote_code)
    Console().print(layer_groups(model, given.granularity, given.head))
    return 0


def empty_model(name: str | None, *, trust_remote_code: bool = False) -> nn.Module:
    """Builds a model on the meta device: all its modules and no numbers.

    Args:
        name (`str`, *optional*):
            A Hub id, a local folder, or `timm/` and the name of an architecture, which needs no network. The model of
            the demo by default.
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Whether to run model code that a repository brings along.

    Returns:
        `torch.nn.Module`: the model.

    Raises:
        ValueError: if timm has no such architecture, or transformers no vision model with an output for the config.
        FileNotFoundError: if the config can be read neither from a folder nor from the Hub.

    Example:

    ```python
    >>> from metalr_hf.cli.layers import empty_model
    >>> next(empty_model("timm/test_vit").parameters()).device
    device(type='meta')

    ```
    """
    if name is None:
        from ..models.demo import ARCHITECTURE

        name = f"timm/{ARCHITECTURE}"
    if (architecture := architecture_of(name)) is not None:
        import timm

        with torch.device("meta"):
            return timm.create_model(architecture)
    try:
        config = load_config(name, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"--model={name!r}: no configuration there. It must be a local folder, a model that can be reached on the "
            f"Hub, or timm/ and the name of one of timm's architectures. ({first_line(error)})"
        ) from error
    if config.num_labels == 0:
        # timm saves backbones without a head, which transformers does not build.
        config.num_labels = 2
    auto_class = _auto_class(config, name)
    with torch.device("meta"):
        return auto_class.from_config(config, trust_remote_code=trust_remote_code)


def _auto_class(config: PreTrainedConfig, name: str) -> Any:
    kind, saved = type(config), (config.architectures or [""])[0]
    candidates = [(auto, mapping[kind].__name__) for auto, mapping in TASKS if kind in mapping]
    if not candidates and not hasattr(config, "auto_map"):
        raise ValueError(
            f"--model={name!r} is a {config.model_type} model, for which transformers has neither image "
            "classification, segmentation nor object detection."
        )
    # A checkpoint says which of its family's models it is.
    fitting = [auto for auto, class_name in candidates if class_name == saved]
    return [*fitting, *(auto for auto, _ in candidates), AutoModelForImageClassification][0]

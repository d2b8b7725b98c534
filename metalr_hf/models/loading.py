"""Pretrained models by name: which one is meant, and what is said where it cannot be loaded."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from transformers import AutoConfig, PreTrainedConfig, TimmWrapperConfig
from transformers.utils import ADAPTER_CONFIG_NAME, CONFIG_NAME

from ..messages import first_line

TRAINING_ARGS_NAME = "training_args.bin"
WEIGHT_ENDINGS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")


@dataclass
class ModelArguments:
    """Which model is fine-tuned.

    Args:
        model_name_or_path (`str`, *optional*):
            Hub id, local folder or `timm/...`. By default EfficientNet-Lite0 with ImageNet weights that come with pip.
            For segmentation, timm models become the encoder of a U-Net.
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Run the model code that the repository brings along.
    """

    model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "Hub id, local folder or `timm/...`. By default EfficientNet-Lite0 with ImageNet weights that come "
            "with pip. For segmentation, timm models become the encoder of a U-Net."
        },
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run the model code that the repository brings along."}
    )


@contextmanager
def naming_the_model(name: str | None, what: str, argument: str = "model_name_or_path") -> Iterator[None]:
    """Makes errors of loading name the argument, what was given and what to do.

    Args:
        name (`str`, *optional*): The model that was asked for.
        what (`str`): What is loaded: `"model"` or `"image processor"`.
        argument (`str`, *optional*, defaults to `"model_name_or_path"`): What asked for it.

    Raises:
        FileNotFoundError: if there is no such thing, or no network to fetch it.
        ValueError: if it is there and cannot be loaded.
    """
    try:
        yield
    except (ValueError, OSError) as error:
        if _is_weights_alone(name):
            raise ValueError(
                f"{argument}={name!r}: weights alone do not say which network they are of. Give a folder that also has "
                "the config.json of the network; for a timm network, timm.models.save_for_hf(network, folder) and "
                "timm.models.push_to_hf_hub write both."
            ) from error
        if isinstance(error, ValueError):
            raise ValueError(f"{argument}={name!r}: its {what} could not be loaded: {first_line(error)}") from error
        raise FileNotFoundError(
            f"{argument}={name!r}: no {what} there. It must be a local folder or a model that can be reached "
            f"on the Hub: check the name and the network; private ones need `hf auth login`. ({first_line(error)})"
        ) from error


def _is_weights_alone(name: str | None) -> bool:
    if name is None or not os.path.isdir(name):
        return name is not None and os.path.isfile(name) and name.endswith(WEIGHT_ENDINGS)
    files = {*os.listdir(name)} - {TRAINING_ARGS_NAME}
    # The configuration of an adapter says which network it is for.
    return not files & {CONFIG_NAME, ADAPTER_CONFIG_NAME} and any(file.endswith(WEIGHT_ENDINGS) for file in files)


def load_config(name: str, *, trust_remote_code: bool = False) -> PreTrainedConfig:
    """Loads the configuration of a pretrained model, so that the model can be made with it.

    Args:
        name (`str`): Hub id or local folder.
        trust_remote_code (`bool`, *optional*, defaults to `False`): Run the code that the repository brings along.

    Returns:
        `transformers.PreTrainedConfig`: of a timm model without `num_classes` among the model's arguments.

    Raises:
        OSError, ValueError: if there is none.
    """
    config: PreTrainedConfig = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
    if isinstance(config, TimmWrapperConfig) and config.model_args:
        # timm may save it there too. transformers hands timm its own number of labels beside these arguments.
        config.model_args = {key: value for key, value in config.model_args.items() if key != "num_classes"}
    return config

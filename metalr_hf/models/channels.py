"""How many channels the images of a network have, and a pretrained first convolution for another number of them."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

RGB = 3


def input_channels(config: Any) -> int:
    """How many channels a network's images have.

    Args:
        config (`transformers.PreTrainedConfig`): Its configuration.

    Returns:
        `int`: three where the configuration does not tell.

    Example:

    ```python
    >>> from transformers import ViTConfig
    >>> from metalr_hf.models.channels import input_channels
    >>> input_channels(ViTConfig(num_channels=1))
    1

    ```
    """
    pretrained_cfg = getattr(config, "pretrained_cfg", None)
    if pretrained_cfg is not None:
        given = (getattr(config, "model_args", None) or {}).get("in_chans")
        return int(given or (pretrained_cfg.get("input_size") or [RGB])[0])
    if hasattr(config, "encoder_args"):
        return int(config.encoder_args.get("in_chans", RGB))
    owner = _owner(config)
    return RGB if owner is None else owner.num_channels


def load_with_channels(
    load: Callable[[Any], PreTrainedModel], config: Any, channels: int | None = None
) -> PreTrainedModel:
    """Loads a pretrained network for images of another number of channels.

    The weights of the first convolution are adapted as timm does it: summed for one channel, repeated and scaled for
    more than three.

    Args:
        load (`Callable`): Takes a configuration and loads the network with it; weights of another shape stay fresh.
        config (`transformers.PreTrainedConfig`): The network's configuration.
        channels (`int`, *optional*): How many channels; by default the network's own.

    Returns:
        `transformers.PreTrainedModel`

    Raises:
        ValueError: if the network cannot take them.
    """
    own = input_channels(config)
    if channels is None or channels == own:
        return load(config)
    pretrained = load(deepcopy(config))
    changed = deepcopy(config)
    _set_channels(changed, channels)
    model = load(changed)
    before = dict(pretrained.named_parameters())
    adapted = False
    with torch.no_grad():
        for name, weight in model.named_parameters():
            old = before.get(name)
            if old is not None and _differ_in_channels(weight, old):
                weight.copy_(adapt_weight(old, channels, own))
                adapted = True
    if not adapted:
        raise ValueError(
            f"num_channels={channels}: {type(model).__name__} has no first convolution that could be adapted. Choose "
            "another network, or leave num_channels out."
        )
    return model


def adapt_weight(weight: Tensor, channels: int, own: int = RGB) -> Tensor:
    """The weight of a pretrained first convolution for another number of channels, as timm makes it.

    Args:
        weight (`torch.Tensor` of shape `(outputs, channels, height, width)`): The pretrained one.
        channels (`int`): How many channels.
        own (`int`, *optional*, defaults to 3): How many the images had that it was trained on.

    Returns:
        `torch.Tensor`

    Example:

    ```python
    >>> import torch
    >>> from metalr_hf.models.channels import adapt_weight
    >>> adapt_weight(torch.ones(8, 3, 7, 7), channels=1).shape
    torch.Size([8, 1, 7, 7])

    ```
    """
    from timm.models import adapt_input_conv

    try:
        return adapt_input_conv(channels, weight.detach().clone(), own)
    except (NotImplementedError, AssertionError, ValueError) as error:
        raise ValueError(
            f"num_channels={channels}: a first convolution for {own} channels cannot be adapted to them. Choose a "
            f"network for images of three channels, or give {own}."
        ) from error


def _differ_in_channels(one: Tensor, other: Tensor) -> bool:
    return (
        one.dim() == other.dim() == 4
        and one.shape[1] != other.shape[1]
        and one.shape[:1] + one.shape[2:] == other.shape[:1] + other.shape[2:]
    )


def _set_channels(config: Any, channels: int) -> None:
    pretrained_cfg = getattr(config, "pretrained_cfg", None)
    if pretrained_cfg is not None:
        config.model_args = {**(getattr(config, "model_args", None) or {}), "in_chans": channels}
        size = list(pretrained_cfg.get("input_size") or [RGB, 224, 224])
        new: dict[str, Any] = {"input_size": [channels, *size[1:]]}
        for name in ("mean", "std"):
            if values := pretrained_cfg.get(name):
                new[name] = spread(list(values), channels)
        config.pretrained_cfg = {**pretrained_cfg, **new}
        return
    if hasattr(config, "encoder_args"):
        config.encoder_args = {**config.encoder_args, "in_chans": channels}
        return
    owner = _owner(config)
    if owner is not None:
        owner.num_channels = channels


def _owner(config: Any) -> Any:
    """The part of a configuration of transformers that says how many channels there are, if one does."""
    parts = (config, getattr(config, "backbone_config", None), getattr(config, "vision_config", None))
    return next((part for part in parts if isinstance(getattr(part, "num_channels", None), int)), None)


def spread(values: list[float], channels: int) -> list[float]:
    """Means or deviations of channels for another number of them: all the mean of the given ones, as timm has it.

    Args:
        values (`list[float]`): One for each channel that a network was trained on.
        channels (`int`): How many channels.

    Returns:
        `list[float]`

    Example:

    ```python
    >>> from metalr_hf.models.channels import spread
    >>> spread([0.25, 0.5, 0.75], channels=1)
    [0.5]

    ```
    """
    return values if len(values) == channels else [sum(values) / len(values)] * channels

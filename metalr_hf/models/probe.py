"""Whether a network can take the images that its processor gives, found out before training."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from ..messages import first_line


def check_input(model: PreTrainedModel, pixels: torch.Tensor, image_size: int | None = None) -> None:
    """Gives a network one image, without training it and without touching the random numbers of a run.

    Args:
        model (`transformers.PreTrainedModel`): The network.
        pixels (`torch.Tensor` of shape `(channels, height, width)`): An image as the processor gives it.
        image_size (`int`, *optional*): The argument that was given, for the message.

    Raises:
        ValueError: if it cannot take the image, with the network's own reason.
    """
    channels, height, width = pixels.shape
    parameter = next(model.parameters())
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            model(pixel_values=pixels[None].to(parameter.device, parameter.dtype))
    except (ValueError, RuntimeError, AssertionError, TypeError, IndexError) as error:
        given = "" if image_size is None else f"image_size={image_size}: "
        own = getattr(model.config, "image_size", None)
        advice = (
            f"Leave image_size out{f' (the network is made for {own})' if own else ''}, or choose another network."
            if image_size is not None
            else "Choose a network for images of three channels, or set the size that it takes with image_size."
        )
        raise ValueError(
            f"{given}{type(model).__name__} cannot take images of {height} × {width} pixels and {channels} channels "
            f"({first_line(error)}). {advice}"
        ) from error
    finally:
        model.train(training)

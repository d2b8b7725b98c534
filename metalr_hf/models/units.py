"""A network whose last layer learns standardised numbers, and answers and is saved in the units of the data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .losses import first_logits


def answer_in_units(
    model: nn.Module, pixels: Tensor, mean: Sequence[float], scale: Sequence[float], *, was_trained: bool = False
) -> None:
    """Makes a network answer in the units of the data, while its weights learn standardised numbers.

    A learning rate that suits numbers of mean 0 and deviation 1 suits no others. The last layer keeps such weights
    while it is trained, and its output is brought to the units. In `state_dict()`, and so in every file that is saved,
    mean and scale are part of its weight and bias: whoever loads the model gets the units without knowing of this.
    `load_state_dict` takes them out again.

    Args:
        model (`torch.nn.Module`): A network of transformers that answers with a number for each mean.
        pixels (`torch.Tensor` of shape `(channels, height, width)`): An image, for its size.
        mean (`Sequence[float]`): Mean of every number.
        scale (`Sequence[float]`): Standard deviation of every number.
        was_trained (`bool`, *optional*, defaults to `False`): Whether the last layer already answers in units.

    Raises:
        ValueError: if the network does not end in a linear layer with a bias.

    Example:

    ```python
    >>> import torch
    >>> from transformers import ViTConfig, ViTForImageClassification
    >>> from metalr_hf.models.units import answer_in_units
    >>> small = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "image_size": 8, "patch_size": 4}
    >>> model = ViTForImageClassification(ViTConfig(**small, num_labels=1)).eval()
    >>> answer_in_units(model, torch.zeros(3, 8, 8), mean=[45.0], scale=[10.0])
    >>> bool((model(torch.zeros(1, 3, 8, 8)).logits - 45.0).abs() < 10.0)
    True
    >>> model.classifier.bias.item(), model.state_dict()["classifier.bias"].item()
    (0.0, 45.0)

    ```
    """
    for head in _heads(model, pixels, len(mean)):
        device = head.weight.device
        head.register_buffer("target_mean", torch.tensor(mean, dtype=torch.float32, device=device), persistent=False)
        head.register_buffer("target_scale", torch.tensor(scale, dtype=torch.float32, device=device), persistent=False)
        if was_trained:
            taken_out = {"weight": head.weight.detach(), "bias": head.bias.detach()}
            _take_out(head, taken_out, "")
            with torch.no_grad():
                head.weight.copy_(taken_out["weight"])
                head.bias.copy_(taken_out["bias"])
        head.register_forward_hook(_bring_to_units)
        head.register_state_dict_post_hook(_put_in)
        head.register_load_state_dict_pre_hook(_take_out)


def _heads(model: nn.Module, pixels: Tensor, numbers: int) -> list[Any]:
    """The layers whose output, or the mean of whose outputs, the network's answer is."""
    outputs: dict[Any, Tensor] = {}
    kinds = (nn.Linear, nn.Conv2d)
    found = [module for module in model.modules() if isinstance(module, kinds) and module.weight.shape[0] == numbers]
    hooks = [module.register_forward_hook(lambda m, args, output: outputs.update({m: output})) for module in found]
    training, parameter = model.training, next(model.parameters())
    model.eval()
    try:
        with torch.no_grad():
            image = torch.randn(1, *pixels.shape, generator=torch.Generator().manual_seed(0))
            logits = first_logits(model(pixel_values=image.to(parameter.device, parameter.dtype))).reshape(-1)
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    flat = {module: output.reshape(-1) for module, output in outputs.items() if output.numel() == numbers}
    heads = [module for module, output in flat.items() if _same(output, logits)]
    if not heads and flat and _same(torch.stack(list(flat.values())).mean(0), logits):
        # Distilled networks average two.
        heads = list(flat)
    if not heads or any(head.bias is None for head in heads):
        raise ValueError(
            f"{type(model).__name__} cannot be trained on numbers: it does not end in a linear layer with a bias, "
            "which takes their mean and scale. Choose another network."
        )
    return heads


def _same(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one, other, rtol=1e-4, atol=1e-5)


def _along_output(values: Tensor, like: Tensor) -> Tensor:
    """One value an output, in the shape that broadcasts against a weight."""
    return values.reshape(-1, *[1] * (like.dim() - 1)).to(like.device)


def _bring_to_units(head: Any, args: Any, output: Tensor) -> Tensor:
    shape = (1, -1, *[1] * (output.dim() - 2)) if isinstance(head, nn.Conv2d) else (-1,)
    return output * head.target_scale.reshape(shape) + head.target_mean.reshape(shape)


def _put_in(head: Any, state_dict: Any, prefix: str, local_metadata: Any) -> None:
    weight, bias = state_dict[f"{prefix}weight"], state_dict[f"{prefix}bias"]
    scale, mean = _along_output(head.target_scale, weight), _along_output(head.target_mean, bias)
    state_dict[f"{prefix}weight"] = (weight * scale).to(weight.dtype)
    state_dict[f"{prefix}bias"] = (bias * _along_output(head.target_scale, bias) + mean).to(bias.dtype)


def _take_out(head: Any, state_dict: Any, prefix: str, *args: Any) -> None:
    names = [f"{prefix}weight", f"{prefix}bias"]
    if not all(name in state_dict for name in names):
        return
    weight, bias = (state_dict[name] for name in names)
    scale = _along_output(head.target_scale, weight)
    state_dict[names[0]] = (weight / scale).to(weight.dtype)
    shifted = bias - _along_output(head.target_mean, bias)
    state_dict[names[1]] = (shifted / _along_output(head.target_scale, bias)).to(bias.dtype)

"""Encoder-decoders whose levels lie inside each other, in the branch of a skip connection."""

from __future__ import annotations

from torch import nn

Child = tuple[str, nn.Module]


def nested_levels(network: nn.Module) -> dict[str, str]:
    """Names for the levels of a network that is built from the outside in, as MONAI's `UNet` is.

    Each of its levels is a sequence of three: the way down, a skip connection around the next level, and the way up. A
    parameter of the third level is called `model.1.submodule.1.submodule.0. ...`, which says little.

    Args:
        network (`torch.nn.Module`): Any network, out of its wrappers.

    Returns:
        `dict[str, str]`: layer name (`encoder.0` ..., `bottleneck`, `decoder.0` ..., `head`) to the path of a module,
            in the order in which data pass them; empty for other networks.

    Example:

    ```python
    >>> from torch import nn
    >>> from metalr_hf.layers.nested import nested_levels
    >>> class Skip(nn.Module):
    ...     def __init__(self, submodule):
    ...         super().__init__()
    ...         self.submodule = submodule
    >>> level = nn.Sequential(nn.Conv2d(1, 4, 3), Skip(nn.Conv2d(4, 4, 3)), nn.Conv2d(8, 2, 3))
    >>> nested_levels(level)
    {'encoder.0': '0', 'bottleneck': '1.submodule', 'head': '2'}

    ```
    """
    path, level = "", network
    down: list[str] = []
    up: list[str] = []
    while (parts := _level(level)) is not None:
        (before, _), (around, skip), (after, _) = parts
        down.append(path + before)
        up.insert(0, path + after)
        path, level = f"{path}{around}.submodule.", skip.get_submodule("submodule")
    if not down:
        return {}
    *decoder, head = up
    return {
        **{f"encoder.{i}": part for i, part in enumerate(down)},
        "bottleneck": path.removesuffix("."),
        **{f"decoder.{i}": part for i, part in enumerate(decoder)},
        "head": head,
    }


def _level(module: nn.Module) -> list[Child] | None:
    parts = list(module.named_children())
    if not isinstance(module, nn.Sequential) or len(parts) != 3:
        return None
    return parts if [name for name, _ in parts[1][1].named_children()] == ["submodule"] else None

"""Which parameters form which layer: timm and Hugging Face models, and any other module by its structure."""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

GRANULARITIES = ("block", "stage", "tensor")
HEAD_NAMES = ("head", "heads", "classifier", "fc", "linear", "decode_head", "score", "lm_head", "projection_head")
NOTHING_TO_TRAIN = "The model has no trainable parameter: every requires_grad is False. Unfreeze at least the head."
STEM_NAMES = ("stem", "conv_stem", "embeddings", "embedder", "patch_embed", "patch_embeddings", "conv1")


def layer_groups(model: nn.Module, granularity: str = "block") -> dict[str, list[str]]:
    """Groups a model's trainable parameters into layers.

    timm models are grouped by timm's own `group_matcher` (`timm.models.group_parameters`), all others by their module
    structure: the elements of lists of blocks are layers, and so is every part outside such a list. Wrappers that hold
    a single module are looked through. A normalisation after a layer goes with it.

    Args:
        model (`torch.nn.Module`):
            The model, bare or inside wrappers (DDP, `torch.compile`, PEFT, transformers' `TimmWrapper`).
        granularity (`str`, *optional*, defaults to `"block"`):
            `"block"`: a layer a block. `"stage"`: a layer a stage of blocks, where there are stages. `"tensor"`: a
            layer a parameter.

    Returns:
        `dict[str, list[str]]`: layer name to parameter names as in `model.named_parameters()`, input side first and
        the head last. Every trainable parameter is in exactly one layer, a frozen one in none, a tied one once.

    Raises:
        ValueError: if the model has no trainable parameter, or `granularity` is unknown.

    Example:

    ```python
    >>> import timm
    >>> from metalr_hf import layer_groups
    >>> list(layer_groups(timm.create_model("test_vit", num_classes=3)))
    ['stem', 'blocks.0', 'blocks.1', 'blocks.2', 'blocks.3', 'blocks.4', 'blocks.5', 'head']

    ```
    """
    if granularity not in GRANULARITIES:
        raise ValueError(f"granularity={granularity!r} must be one of {', '.join(map(repr, GRANULARITIES))}.")
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    if not trainable:
        raise ValueError(
            "The model has no trainable parameter: every requires_grad is False. Unfreeze at least the head."
        )
    network, prefix = _look_through_wrappers(model)
    layers = _timm_layers(network, granularity) or _structural_layers(network, granularity)
    if granularity == "tensor":
        layers = {name: [name] for members in layers.values() for name in members}
    else:
        layers = _name_ends(layers, _classifier_names(network))
    known = set(trainable)
    grouped = {
        layer: [prefix + name for name in members if prefix + name in known] for layer, members in layers.items()
    }
    outside = known.difference(*grouped.values())
    if outside:
        # Parameters of the wrappers themselves.
        grouped = {**grouped, "outside": [name for name in trainable if name in outside]}
    return {layer: members for layer, members in grouped.items() if members}


def check_layer_groups(model: nn.Module, groups: Mapping[str, Sequence[str]]) -> None:
    """Raises unless a map of layers holds every trainable parameter of a model exactly once.

    Args:
        model (`torch.nn.Module`): The model.
        groups (`Mapping[str, Sequence[str]]`): Layer name to parameter names.

    Raises:
        ValueError: naming the parameter that is missing, doubled, frozen or not there.
    """
    parameters = dict(model.named_parameters())
    if not any(p.requires_grad for p in parameters.values()):
        raise ValueError(
            "The model has no trainable parameter: every requires_grad is False. Unfreeze at least the head."
        )
    layer_of: dict[str, str] = {}
    for layer, members in groups.items():
        for name in members:
            if name not in parameters:
                near = difflib.get_close_matches(name, parameters, n=2)
                hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
                raise ValueError(
                    f"layer_groups names {name!r} in layer {layer!r}, which the model does not have.{hint}"
                )
            if not parameters[name].requires_grad:
                raise ValueError(f"layer_groups names {name!r} in layer {layer!r}, which is frozen. Leave it out.")
            if name in layer_of:
                raise ValueError(f"layer_groups names {name!r} twice, in layers {layer_of[name]!r} and {layer!r}.")
            layer_of[name] = layer
    missing = [name for name, p in parameters.items() if p.requires_grad and name not in layer_of]
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise ValueError(
            f"layer_groups misses the trainable {', '.join(map(repr, missing[:3]))}{more}. Put each trainable "
            "parameter into one layer, or freeze it."
        )


def split_param_groups(
    param_groups: Iterable[Mapping[str, Any]], layers: Mapping[str, Sequence[Tensor]]
) -> list[dict[str, Any]]:
    """Splits an optimizer's param groups by layer.

    Args:
        param_groups (`Iterable[Mapping[str, Any]]`):
            Param groups of an optimizer, such as one with and one without weight decay.
        layers (`Mapping[str, Sequence[torch.Tensor]]`):
            Layer name to parameters.

    Returns:
        `list[dict[str, Any]]`: new param groups in the order of the layers, with the options of the group they come
        from and the name of their layer as `"layer"`.

    Raises:
        ValueError: if a parameter of the optimizer belongs to no layer.
    """
    position = {layer: i for i, layer in enumerate(layers)}
    layer_of = {id(p): layer for layer, parameters in layers.items() for p in parameters}
    split = []
    for group in param_groups:
        by_layer: dict[str, list[Tensor]] = {}
        for parameter in group["params"]:
            layer = layer_of.get(id(parameter))
            if layer is None:
                raise ValueError(
                    f"The optimizer holds a parameter of shape {tuple(parameter.shape)} that belongs to no layer: it "
                    "is frozen, or not of this model. Build the optimizer from the model's trainable parameters."
                )
            by_layer.setdefault(layer, []).append(parameter)
        split += [{**group, "params": parameters, "layer": layer} for layer, parameters in by_layer.items()]
    return sorted(split, key=lambda group: position[group["layer"]])


def _look_through_wrappers(model: nn.Module) -> tuple[nn.Module, str]:
    """The network inside modules that hold a single module, and the prefix of its parameter names."""
    network, prefix = model, ""
    while not hasattr(network, "group_matcher") and next(network.parameters(recurse=False), None) is None:
        children = [(name, child) for name, child in network.named_children() if _has_parameters(child)]
        if len(children) != 1 or isinstance(network, nn.ModuleList):
            break
        name, network = children[0]
        prefix += f"{name}."
    return network, prefix


def _timm_layers(network: nn.Module, granularity: str) -> dict[str, list[str]]:
    """Layers by timm's group matcher; empty if there is none that works."""
    matcher: Any = getattr(network, "group_matcher", None)
    if matcher is None:
        return {}
    from timm.models import group_parameters

    try:
        layer_ids = group_parameters(network, matcher(coarse=granularity == "stage"), reverse=True)
    except (AttributeError, NotImplementedError, KeyError, TypeError):
        # Some architectures inherit the method but do not support it, or only one of its granularities.
        return {}
    by_id: dict[int, list[str]] = {}
    for name, _ in network.named_parameters():
        by_id.setdefault(layer_ids[name], []).append(name)
    layers: dict[str, list[str]] = {}
    for layer_id in sorted(by_id):
        name = _module_of(by_id[layer_id])
        if not layers and not any(part.isdigit() for part in name.split(".")):
            name = "stem"
        layers[name if name not in layers else f"{name}.{layer_id}"] = by_id[layer_id]
    return layers


def _structural_layers(network: nn.Module, granularity: str) -> dict[str, list[str]]:
    """Layers by module structure: lists of blocks are taken apart, everything else is a layer."""
    depth = 1 if granularity == "stage" else 2
    heads = [(name, child) for name, child in network.named_children() if name in HEAD_NAMES]
    rest = [(name, child) for name, child in network.named_children() if name not in HEAD_NAMES]
    backbones = [name for name, child in rest if _holds_blocks(child)]
    dimensions = {name: p.ndim for name, p in network.named_parameters(remove_duplicate=False)}
    layers: dict[str, list[str]] = {}
    own = [name for name, _ in network.named_parameters(recurse=False)]
    if own:
        layers["stem"] = own
    for name, child in rest:
        if not _has_parameters(child):
            continue
        if _holds_blocks(child) or (isinstance(network, nn.Sequential) and _is_block_list(child)):
            parts = _split(child, name, depth, dimensions)
            if backbones == [name] and not _is_block_list(child):
                # The only backbone: its own name says nothing.
                short = {part.removeprefix(f"{name}."): members for part, members in parts.items()}
                parts = short if not set(short) & set(layers) else parts
        else:
            parts = {name: _names(child, name)}
        layers = _append(layers, parts, dimensions)
    for name, child in heads:
        if _has_parameters(child):
            layers.setdefault(name, []).extend(_names(child, name))
    return layers


def _split(module: nn.Module, path: str, depth: int, dimensions: dict[str, int]) -> dict[str, list[str]]:
    """Takes a module apart down to its blocks."""
    layers: dict[str, list[str]] = {}
    own = [f"{path}.{name}" for name, _ in module.named_parameters(recurse=False)]
    if own:
        layers[path] = own
    is_list = _is_block_list(module)
    for name, child in _children_in_order(module):
        child_path = f"{path}.{name}"
        if not _has_parameters(child):
            continue
        if _holds_blocks(child) and (depth > 1 or not is_list):
            parts = _split(child, child_path, depth - is_list, dimensions)
        else:
            parts = {child_path: _names(child, child_path)}
        layers = _append(layers, parts, dimensions)
    return layers


def _children_in_order(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """The children, lists of equal length side by side: patch embedding 0, block 0, patch embedding 1, block 1 ..."""
    children = list(module.named_children())
    lists = [
        (name, child)
        for name, child in children
        if isinstance(child, nn.ModuleList) and len(child) > 1 and all(map(_has_weight, child))
    ]
    if len(lists) < 2 or len({len(child) for _, child in lists}) > 1:
        return children
    together = [(f"{name}.{i}", child[i]) for i in range(len(lists[0][1])) for name, child in lists]
    first = children.index(lists[0])
    return children[:first] + together + [pair for pair in children[first:] if pair not in lists]


def _append(
    layers: dict[str, list[str]], parts: dict[str, list[str]], dimensions: dict[str, int]
) -> dict[str, list[str]]:
    """Adds parts; one that is only a normalisation goes with the layer before it."""
    for name, members in parts.items():
        is_norm = len(members) <= 2 and all(dimensions[member] < 2 for member in members)
        target = next(reversed(layers)) if layers and is_norm and name not in layers else name
        layers.setdefault(target, []).extend(members)
    return layers


def _is_block_list(module: nn.Module) -> bool:
    """Whether a module is a list of blocks: of two or more with several weights each, or of four or more weights."""
    if not isinstance(module, (nn.ModuleList, nn.Sequential, nn.ModuleDict)):
        return False
    weights = [sum(p.ndim > 1 for p in child.parameters()) for child in module.children()]
    return sum(count > 1 for count in weights) > 1 or sum(count > 0 for count in weights) > 3


def _holds_blocks(module: nn.Module) -> bool:
    return any(_is_block_list(part) for part in module.modules())


def _has_weight(module: nn.Module) -> bool:
    return any(p.ndim > 1 for p in module.parameters())


def _has_parameters(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def _names(module: nn.Module, path: str) -> list[str]:
    return [f"{path}.{name}" for name, _ in module.named_parameters()]


def _module_of(names: Sequence[str]) -> str:
    """The module that holds a layer's parameters: most of them, where a block and its surroundings are one layer."""
    top = names[0].split(".")[0]
    paths = [name.split(".")[:-1] for name in names if name.split(".")[0] == top]
    common = _common_start(paths)
    below: dict[str, list[list[str]]] = {}
    for path in paths:
        below.setdefault(".".join(path[: len(common) + 1]), []).append(path)
    most = _common_start(max(below.values(), key=len))
    if len(most) > len(common) and most[-1].isdigit():
        common = most
    return ".".join(common) or top


def _common_start(paths: Sequence[list[str]]) -> list[str]:
    same = itertools.takewhile(lambda parts: len(set(parts)) == 1, zip(*paths, strict=False))
    return [parts[0] for parts in same]


def _classifier_names(network: nn.Module) -> tuple[str, ...]:
    """Where timm's configuration says the classifier is; several names for networks with a second, distilled one."""
    named = (getattr(network, "pretrained_cfg", None) or {}).get("classifier") or ()
    return (named,) if isinstance(named, str) else tuple(named)


def _name_ends(layers: dict[str, list[str]], classifiers: tuple[str, ...]) -> dict[str, list[str]]:
    """Calls the first layer `stem` and the last `head` where they are."""
    first, last = next(iter(layers)), next(reversed(layers))
    is_head = last.split(".")[-1] in HEAD_NAMES or any(
        name.startswith(f"{classifier}.") for name in layers[last] for classifier in classifiers
    )
    new = {last: "head"} if is_head else {}
    if first != last and (first.split(".")[0] in STEM_NAMES or first.split(".")[-1] in STEM_NAMES):
        new[first] = "stem"
    new = {old: name for old, name in new.items() if name == old or name not in layers}
    return {new.get(layer, layer): members for layer, members in layers.items()}

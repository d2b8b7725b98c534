"""Where layers come from: timm's own group matcher, or else the structure of the modules."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from torch import nn

from .names import HEAD, NESTED_HEAD, OUTPUT, STAGE, STEM, clean, exclusive_paths, without_prefix
from .nested import nested_levels
from .structure import (
    Child,
    children_with_parameters,
    has_group_matcher,
    holds_blocks,
    in_order,
    is_norm,
    look_through,
    weight_count,
)

Layers = dict[str, list[str]]


def find_layers(network: nn.Module, prefix: str, granularity: str) -> Layers:
    """The layers of a network, input side first and the head last; parameters outside all layers are left out.

    Args:
        network (`torch.nn.Module`): The network, out of its wrappers.
        prefix (`str`): The prefix of its parameter names in the model.
        granularity (`str`): `"block"` or `"stage"`.

    Returns:
        `dict[str, list[str]]`: layer name to parameter names in the model. A tied parameter may be in several layers.

    Example:

    ```python
    >>> from torch import nn
    >>> from metalr_hf.layers.sources import find_layers
    >>> network = nn.ModuleDict({"stem": nn.Linear(4, 4), "head": nn.Linear(4, 2)})
    >>> find_layers(network, "network.", "block")
    {'stem': ['network.stem.weight', 'network.stem.bias'], 'head': ['network.head.weight', 'network.head.bias']}

    ```
    """
    if has_group_matcher(network):
        return _timm_layers(network, prefix, granularity)
    if levels := nested_levels(network):
        found = {
            name: parameter_names(network.get_submodule(path), f"{prefix}{path}.") for name, path in levels.items()
        }
        return {name: members for name, members in found.items() if members}
    return _network_layers(network, prefix, granularity)


def parameter_names(module: nn.Module, prefix: str) -> list[str]:
    """The names of a module's parameters in the model; a tied parameter is listed under each of its names.

    Args:
        module (`torch.nn.Module`): Any module.
        prefix (`str`): The prefix of these names.

    Returns:
        `list[str]`

    Example:

    ```python
    >>> from torch import nn
    >>> from metalr_hf.layers.sources import parameter_names
    >>> parameter_names(nn.Linear(4, 2), "head.")
    ['head.weight', 'head.bias']

    ```
    """
    # Of the base class: the wrapper of activation checkpointing leaves its own name out of its answer, but not out of
    # the names of the model around it.
    return [prefix + name for name, _ in nn.Module.named_parameters(module, remove_duplicate=False)]


def _timm_layers(network: nn.Module, prefix: str, granularity: str) -> Layers:
    """Layers by timm's group matcher, or by structure where timm has none that works."""
    full = {clean(name): name for name, _ in network.named_parameters()}
    members = _matched(network, list(full), granularity == "stage")
    if members is None:
        return _network_layers(network, prefix, granularity)
    stages_only = granularity == "block" and members == _matched(network, list(full), True)
    _move_early(members, list(full))
    members = _join_norms(members, network, full)
    names = exclusive_paths(members)
    if len(set(names)) < len(names) or len(names) < 2:
        return _network_layers(network, prefix, granularity)
    *parents, own = names[0].split(".")
    if not own.isdigit() or STEM.fullmatch(parents[-1]) or any(not n.startswith(f"{names[0]}.") for n in members[0]):
        names[0] = "stem"
    classifier = (getattr(network, "pretrained_cfg", None) or {}).get("classifier") or ()
    classifiers = (classifier,) if isinstance(classifier, str) else tuple(classifier)
    if any(HEAD.fullmatch(n.split(".")[0]) or n.startswith(tuple(f"{c}." for c in classifiers)) for n in members[-1]):
        names[-1] = "head"
    layers = {name: [prefix + full[n] for n in group] for name, group in zip(names, members, strict=True)}
    return _finer(layers, network, prefix) if stages_only else layers


def _matched(network: nn.Module, names: list[str], coarse: bool) -> list[list[str]] | None:
    from timm.models import group_parameters

    # timm's patterns know nothing of wrappers around blocks: it sees the names without them.
    names_only: Any = SimpleNamespace(named_parameters=lambda: ((name, None) for name in names))
    try:
        by_id = group_parameters(names_only, network.group_matcher(coarse=coarse))  # type: ignore[operator]
    except (AttributeError, AssertionError, NotImplementedError, KeyError, TypeError, ValueError):
        # Some classes inherit the method from one whose structure they do not share, or support one granularity.
        return None
    return [by_id[i] for i in sorted(by_id)]


def _move_early(members: list[list[str]], names: list[str]) -> None:
    """Moves modules before the blocks to the first layer: timm puts what no pattern matches into the last."""
    order = {name: i for i, name in enumerate(names)}
    blocks = min(order[name] for name in members[min(1, len(members) - 1)])
    early = [name for name in members[-1] if "." in name and order[name] < blocks]
    if len(members) > 2 and early:
        members[0] = members[0] + early
        members[-1] = [name for name in members[-1] if name not in early]


def _join_norms(members: list[list[str]], network: nn.Module, full: dict[str, str]) -> list[list[str]]:
    """Merges a norm that the matcher counts as a layer of its own into the layer before it."""
    joined: list[list[str]] = []
    for group in members:
        owners = {full[name].rpartition(".")[0] for name in group}
        if joined and all(is_norm(network.get_submodule(owner)) for owner in owners):
            joined[-1] = joined[-1] + group
        else:
            joined.append(group)
    return joined


def _finer(layers: Layers, network: nn.Module, prefix: str) -> Layers:
    """Splits stages into blocks where timm does not."""
    finer: Layers = {}
    modules = dict(network.named_modules())
    for layer, members in layers.items():
        stage, path = modules.get(layer), f"{prefix}{layer}."
        parts: Layers = {}
        # A block according to timm is not split further.
        if stage is not None and STAGE.fullmatch(layer) and holds_blocks(stage, True):
            for name, child, left, inside in in_order(stage, list(children_with_parameters(stage)), 1, True):
                _take_apart(child, f"{path}{name}.", left, inside, "block", parts)
        parts = {name.removeprefix(prefix): names for name, names in parts.items()}
        if len(parts) > 1:
            taken = {name for names in parts.values() for name in names}
            parts[next(reversed(parts))] += [name for name in members if name not in taken]
        finer |= parts if len(parts) > 1 else {layer: members}
    return finer


def _network_layers(network: nn.Module, prefix: str, granularity: str) -> Layers:
    """Layers by structure: the children of the network, those that hold blocks taken apart, the head last."""
    heads, body = _heads_and_body(network)
    lists = 1 if granularity == "stage" else 2
    layers: Layers = {}
    for name, child, left, entered in in_order(network, body, lists, False):
        _take_apart(child, f"{prefix}{name}.", left, entered, granularity, layers)
    head = [name for path, module in heads for name in parameter_names(module, f"{prefix}{path}.")]
    taken = set(head)
    layers = {layer: [name for name in names if name not in taken] for layer, names in layers.items()}
    layers = _well_named({layer: names for layer, names in layers.items() if names}, network, prefix, body)
    first = next(iter(layers), "")
    if STEM.fullmatch(first.split(".")[-1]) and len(layers) + len(heads) > 1 and "stem" not in layers:
        layers = {"stem" if layer == first else layer: members for layer, members in layers.items()}
    if heads:
        layers = {"backbone.head" if layer == "head" else layer: members for layer, members in layers.items()}
        layers["head"] = head
    return layers


def _well_named(layers: Layers, network: nn.Module, prefix: str, body: list[Child]) -> Layers:
    """Removes uninformative prefixes from layer names: the name of the only backbone, or of the base model."""
    backbones = [pair for pair in body if holds_blocks(pair[1], False)]
    base = getattr(network, "base_model_prefix", "")
    paths = []
    if len(backbones) == 1:
        name, child = backbones[0]
        paths.append(look_through(child, f"{prefix}{name}.")[1])
    elif base:
        paths.append(f"{prefix}{base}.")
    for path in paths:
        layers = without_prefix(layers, path)
    return {clean(layer.removeprefix(prefix)): members for layer, members in layers.items()}


def _heads_and_body(network: nn.Module) -> tuple[list[Child], list[Child]]:
    """The modules that make the outputs, by their path, and the other children."""
    children = _without_repeats(list(children_with_parameters(network)))
    heads = [(name, child) for name, child in children if HEAD.fullmatch(name)]
    body = [pair for pair in children if pair not in heads]
    for name, child in body:
        heads += [
            (f"{name}.{path}", part)
            for path, part in child.named_modules()
            if NESTED_HEAD.fullmatch(path.split(".")[-1]) and next(part.parameters(), None) is not None
        ]
    if not heads and body:
        heads = _inner_head(*body[-1])
    # transformers' backbones say so themselves if they have a head.
    last_is_output = len(body) > 1 and not hasattr(network, "base_model_prefix") and _is_projection(body[-1][1])
    if not heads and body and (last_is_output or OUTPUT.fullmatch(body[-1][0])):
        heads = [body.pop()]
    if not body:
        heads, body = [], heads
    return heads, body


def _without_repeats(children: list[Child]) -> list[Child]:
    """Leaves out children that only hold what earlier ones hold, such as MONAI's DynUNet has for its forward pass."""
    seen: set[int] = set()
    kept = []
    for name, child in children:
        own = {id(parameter) for parameter in child.parameters()}
        if not own <= seen:
            kept.append((name, child))
        seen |= own
    return kept


def _inner_head(path: str, module: nn.Module) -> list[Child]:
    """The head inside a decoder that is the last child."""
    while not holds_blocks(module, False):
        children = list(children_with_parameters(module))
        heads = [(f"{path}.{name}", part) for name, part in children if HEAD.fullmatch(name) or OUTPUT.fullmatch(name)]
        if heads or not children:
            return heads
        path, module = f"{path}.{children[-1][0]}", children[-1][1]
    return []


def _is_projection(module: nn.Module) -> bool:
    """Whether a module is a single linear or convolutional layer, as the last of a network is."""
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    return weight_count(module) == 1 and any(isinstance(part, kinds) for part in module.modules())


def _take_apart(module: nn.Module, path: str, lists: int, entered: bool, granularity: str, layers: Layers) -> None:
    """Adds a module to the layers: as one layer, or as its parts, through at most `lists` lists inside each other."""
    if has_group_matcher(module):
        layers |= {path + layer: members for layer, members in _timm_layers(module, path, granularity).items()}
    elif is_norm(module) and layers:
        layers[next(reversed(layers))] += parameter_names(module, path)
    elif lists and holds_blocks(module, entered):
        for name, child, left, inside in in_order(module, list(children_with_parameters(module)), lists, entered):
            _take_apart(child, f"{path}{name}.", left, inside, granularity, layers)
    else:
        layers[path[:-1]] = parameter_names(module, path)

"""Which parameters form which layer: timm and Hugging Face models, and any other module by its structure."""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

from torch import Tensor, nn

GRANULARITIES = ("block", "stage", "tensor")
HEAD = re.compile(r"(\w+_)?(heads?|classifiers?|predictor|score|logits)(_\w+)?|fc|linear|(class|bbox)_embed")
NOTHING_TO_TRAIN = "The model has no trainable parameter: every requires_grad is False. Unfreeze at least the head."
STEM = re.compile(r".*(stem|embed|patch).*|conv[01]|conv_(proj|first|in)")
# FSDP, torch.compile and activation checkpointing put these into the names of whatever they wrap, blocks included.
WRAPPERS = ("_fsdp_wrapped_module", "_orig_mod", "_checkpoint_wrapped_module")

Layers = dict[str, list[str]]


def layer_groups(model: nn.Module, granularity: str = "block") -> Layers:
    """Groups a model's trainable parameters into layers.

    timm models are grouped by timm's own `group_matcher` (as in `timm.models.group_parameters`), wherever in the model
    they sit. All other modules are grouped by their structure: the elements of lists of blocks are layers, lists of
    stages are taken apart into their blocks, and every other part is a layer of its own. The outputs of a network
    (children called `head`, `classifier`, `fc`, `decode_head` ...) are one layer, `head`, the last; if no child is
    called so, the last child is the last layer and keeps its name. A normalisation goes with the layer before it, the
    final one with the last block (in timm models, where the matcher puts it). Parameters that a module holds itself,
    such as a class token, go with the parameter before them, or with the first layer. Adapters of PEFT are parts of
    the block they sit in.

    Args:
        model (`torch.nn.Module`):
            The model, bare or inside wrappers (DDP, FSDP, `torch.compile`, PEFT, transformers' `TimmWrapper`).
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
        raise ValueError(NOTHING_TO_TRAIN)
    network, prefix = _look_through(model, "")
    if _has_matcher(network):
        layers = _timm_layers(network, prefix, granularity)
    else:
        layers = _network_layers(network, prefix, granularity)
    layers = _with_held(layers, [name for name, _ in model.named_parameters()])
    kept = set(trainable)
    layers = {layer: [name for name in members if name in kept] for layer, members in layers.items()}
    if granularity == "tensor":
        names = [name for members in layers.values() for name in members]
        return {_clean(name.removeprefix(prefix)): [name] for name in names}
    return {layer: members for layer, members in layers.items() if members}


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
        raise ValueError(NOTHING_TO_TRAIN)
    layer_of: dict[str, str] = {}
    for layer, members in groups.items():
        if not members or isinstance(members, str):
            raise ValueError(
                f"layer_groups has {members!r} for layer {layer!r}: give a list of one or more parameter names, or "
                "leave the layer out."
            )
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
                raise ValueError(
                    f"layer_groups names {name!r} twice, in layers {layer_of[name]!r} and {layer!r}. Keep it in one."
                )
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
    layer_of = {id(p): layer for layer, parameters in layers.items() for p in parameters}
    split: list[dict[str, Any]] = []
    for group in param_groups:
        positions: dict[str, list[int]] = {layer: [] for layer in layers}
        for position, parameter in enumerate(group["params"]):
            if id(parameter) not in layer_of:
                name = group["param_names"][position] if "param_names" in group else "a parameter"
                raise ValueError(
                    f"The optimizer holds {name} of shape {tuple(parameter.shape)} that belongs to no layer: it is "
                    "frozen, or not of this model. Build the optimizer from the model's trainable parameters."
                )
            positions[layer_of[id(parameter)]].append(position)
        # Optimizers that were given names keep them beside the parameters.
        beside = [key for key in ("params", "param_names") if key in group]
        for layer, chosen in positions.items():
            parts = {key: [group[key][position] for position in chosen] for key in beside}
            split += [{**group, **parts, "layer": layer}] if chosen else []
    order = {layer: i for i, layer in enumerate(layers)}
    return sorted(split, key=lambda group: order[group["layer"]])


def _look_through(module: nn.Module, path: str) -> tuple[nn.Module, str]:
    """The network inside modules that do nothing but hold it, and the prefix of its parameter names."""
    while not _has_matcher(module) and next(module.parameters(recurse=False), None) is None:
        children = list(_children(module))
        if len(children) != 1 or _only_numbers(children[0][1]):
            break
        path, module = f"{path}{children[0][0]}.", children[0][1]
    return module, path


def _only_numbers(module: nn.Module) -> bool:
    names = [name for name, _ in _children(module)]
    return len(names) > 1 and all(name.isdigit() for name in names)


def _has_matcher(module: nn.Module) -> bool:
    # Asked of the class: PEFT, FSDP and torch.compile hand attributes of the module inside through, but with it not
    # the parameter names that timm's patterns are written for.
    return hasattr(type(module), "group_matcher")


def _children(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    return ((name, child) for name, child in module.named_children() if next(child.parameters(), None) is not None)


def _names(module: nn.Module, prefix: str) -> list[str]:
    return [prefix + name for name, _ in module.named_parameters(remove_duplicate=False)]


def _clean(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def _timm_layers(network: nn.Module, prefix: str, granularity: str) -> Layers:
    """Layers by timm's group matcher, or by structure where timm has none that works."""
    from timm.models import group_parameters

    full = {_clean(name): name for name, _ in network.named_parameters()}
    # timm's patterns know nothing of wrappers around blocks: it sees the names without them.
    names_only: Any = SimpleNamespace(named_parameters=lambda: ((name, None) for name in full))
    try:
        by_id = group_parameters(names_only, network.group_matcher(coarse=granularity == "stage"))  # type: ignore[operator]
    except (AttributeError, AssertionError, NotImplementedError, KeyError, TypeError, ValueError):
        # Some classes inherit the method from one whose structure they do not share, or support one granularity.
        return _network_layers(network, prefix, granularity)
    members = [by_id[i] for i in sorted(by_id)]
    _move_early(members, list(full))
    names = _exclusive_paths(members)
    if len(set(names)) < len(names) or len(names) < 2:
        return _network_layers(network, prefix, granularity)
    *parents, own = names[0].split(".")
    if not own.isdigit() or STEM.fullmatch(parents[-1]) or any(not n.startswith(f"{names[0]}.") for n in members[0]):
        names[0] = "stem"
    classifier = (getattr(network, "pretrained_cfg", None) or {}).get("classifier") or ()
    classifiers = (classifier,) if isinstance(classifier, str) else tuple(classifier)
    if any(HEAD.fullmatch(n.split(".")[0]) or n.startswith(tuple(f"{c}." for c in classifiers)) for n in members[-1]):
        names[-1] = "head"
    return {name: [prefix + full[n] for n in group] for name, group in zip(names, members, strict=True)}


def _move_early(members: list[list[str]], names: list[str]) -> None:
    """Moves modules before the blocks to the first layer: what no pattern matches, timm puts into the last."""
    order = {name: i for i, name in enumerate(names)}
    blocks = min(order[name] for name in members[min(1, len(members) - 1)])
    early = [name for name in members[-1] if "." in name and order[name] < blocks]
    if len(members) > 2 and early:
        members[0] = members[0] + early
        members[-1] = [name for name in members[-1] if name not in early]


def _exclusive_paths(groups: list[list[str]]) -> list[str]:
    """Names each group by the module path that holds most of its parameters and none of another's."""
    paths = [
        Counter(path for name in group for path in (name[: m.start()] for m in re.finditer(r"\.|$", name)))
        for group in groups
    ]
    owners = Counter(path for counts in paths for path in counts)
    own = [{path: count for path, count in counts.items() if owners[path] == 1} for counts in paths]
    best = [max(counts, key=lambda path: (counts[path], -len(path))) for counts in own]
    # The only block of a stage is called as the blocks of other stages are.
    depth = max(map(_depth, best))
    for i, (name, counts) in enumerate(zip(best, own, strict=True)):
        same = [path for path in counts if path.startswith(f"{name}.") and counts[path] == counts[name]]
        numbered = [path for path in same if path.split(".")[-1].isdigit() and _depth(path) <= depth]
        best[i] = max(numbered, key=len, default=name)
    return best


def _depth(path: str) -> int:
    return sum(part.isdigit() for part in path.split("."))


def _network_layers(network: nn.Module, prefix: str, granularity: str) -> Layers:
    """Layers by structure: the children of the network, those that hold blocks taken apart, the head last."""
    heads = [(name, child) for name, child in _children(network) if HEAD.fullmatch(name)]
    body = [pair for pair in _children(network) if pair not in heads]
    if not body:
        heads, body = [], heads
    lists = 1 if granularity == "stage" else 2
    layers: Layers = {}
    for name, child, left, entered in _in_order(network, body, lists, False):
        _take_apart(child, f"{prefix}{name}.", left, entered, granularity, layers)
    backbones = [pair for pair in body if _holds_blocks(pair[1], False)]
    if len(backbones) == 1:
        # The only backbone: its own name says nothing.
        name, child = backbones[0]
        path = _look_through(child, f"{prefix}{name}.")[1]
        short = [layer.removeprefix(path) for layer in layers]
        if len(set(short)) == len(short) and not any(layer[0].isdigit() for layer in short):
            layers = dict(zip(short, layers.values(), strict=True))
    layers = {_clean(layer.removeprefix(prefix)): members for layer, members in layers.items()}
    first = next(iter(layers), "")
    if STEM.fullmatch(first.split(".")[-1]) and len(layers) + len(heads) > 1 and "stem" not in layers:
        layers = {"stem" if layer == first else layer: members for layer, members in layers.items()}
    if heads:
        layers = {"backbone.head" if layer == "head" else layer: members for layer, members in layers.items()}
        layers["head"] = [name for key, child in heads for name in _names(child, f"{prefix}{key}.")]
    return layers


def _take_apart(module: nn.Module, path: str, lists: int, entered: bool, granularity: str, layers: Layers) -> None:
    """Adds a module to the layers: as one layer, or as its parts, through at most `lists` lists inside each other."""
    if _has_matcher(module):
        layers |= {path + layer: members for layer, members in _timm_layers(module, path, granularity).items()}
    elif _is_norm(module) and layers:
        layers[next(reversed(layers))] += _names(module, path)
    elif lists and _holds_blocks(module, entered):
        for name, child, left, inside in _in_order(module, list(_children(module)), lists, entered):
            _take_apart(child, f"{path}{name}.", left, inside, granularity, layers)
    else:
        layers[path[:-1]] = _names(module, path)


def _in_order(
    module: nn.Module, children: list[tuple[str, nn.Module]], lists: int, entered: bool
) -> Iterator[tuple[str, nn.Module, int, bool]]:
    """The children as data pass them, with how many lists may still be entered and whether one has been.

    Where a list of stages has patch embeddings (before it) or norms in lists of the same length beside it, these take
    turns: embedding 0, stage 0, norm 0, embedding 1 ...
    """
    is_list = _is_list(module, entered)
    stages = [i for i, (_, child) in enumerate(children) if _is_list(child, False) and _holds_lists(child)]
    beside = []
    if len(stages) == 1 and isinstance(children[stages[0]][1], nn.ModuleList):
        size = len(list(children[stages[0]][1].children()))
        beside = [
            (name, list(child.children()))
            for i, (name, child) in enumerate(children)
            if isinstance(child, nn.ModuleList) and len(child) == size and (i <= stages[0] or _is_norm(child))
        ]
    turns = {name for name, _ in beside} if len(beside) > 1 else set()
    for name, child in children:
        if name not in turns:
            yield name, child, lists - is_list, entered or is_list
        elif name == beside[0][0]:
            for i in range(size):
                yield from ((f"{other}.{i}", parts[i], lists - 1, True) for other, parts in beside)


def _is_list(module: nn.Module, entered: bool) -> bool:
    """Whether the children are blocks, or stages: of one class and with two or more weights each.

    Outside of any list these may also be the children of an ordinary module (`layer1`, `layer2` ...), or a plain
    sequence of single convolutions.
    """
    weights = [(type(child), _weights(child)) for child in module.children()]
    alike = max(Counter(kind for kind, count in weights if count > 1).values(), default=0)
    enough = 3
    if isinstance(module, nn.ModuleList):
        enough = 1
    elif isinstance(module, (nn.Sequential, nn.ModuleDict)):
        enough = 2
    if alike >= enough:
        return enough < 3 or not entered
    return enough < 3 and not entered and sum(count > 0 for _, count in weights) > 3


def _holds_lists(module: nn.Module) -> bool:
    return any(_holds_blocks(child, True) for child in module.children())


def _holds_blocks(module: nn.Module, entered: bool) -> bool:
    return any(_has_matcher(part) or _is_list(part, entered) for part in module.modules())


def _weights(module: nn.Module) -> int:
    """How many weights a module holds, norms aside; an adapted layer of PEFT counts as the one that it adapts."""
    children = dict(module.named_children())
    if "base_layer" in children:
        return 1
    own = next(module.parameters(recurse=False), None) is not None and "norm" not in type(module).__name__.lower()
    return own + sum(_weights(child) for child in children.values())


def _is_norm(module: nn.Module) -> bool:
    return not _weights(module) and next(module.parameters(), None) is not None


def _with_held(layers: Layers, names: list[str]) -> Layers:
    """Adds the parameters that modules above the layers hold: to the layer of the one before, or to the first."""
    layers = {layer: list(members) for layer, members in layers.items()} or {"model": []}
    layer_of = {name: layer for layer, members in layers.items() for name in members}
    current = next(iter(layers))
    for name in names:
        if name in layer_of:
            current = layer_of[name]
        else:
            layers[current].append(name)
    return layers

"""Which parameters form which layer: timm and Hugging Face models, and any other module by its structure."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate, compress
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.optim import Optimizer

from ..messages import did_you_mean
from ..settings import LAYER_GRANULARITIES, check_choice
from .names import clean, tensor_names
from .sources import Layers, find_layers
from .structure import look_through

if TYPE_CHECKING:
    from rich.table import Table

NOTHING_TO_TRAIN = "The model has no trainable parameter: every requires_grad is False. Unfreeze at least the head."


class LayerGroups(dict[str, list[str]]):
    """Layers, as [`layer_groups`] gives them: a dictionary that prints as a table.

    Args:
        layers (`Mapping[str, list[str]]`):
            Layer name to parameter names.
        sizes (`Mapping[str, int]`):
            Parameter name to its number of elements.

    Example:

    ```python
    >>> from metalr_hf.layers.groups import LayerGroups
    >>> layers = LayerGroups({"stem": ["conv.weight"], "head": ["fc.weight", "fc.bias"]}, {
    ...     "conv.weight": 90, "fc.weight": 9, "fc.bias": 1
    ... })
    >>> layers.parameters
    {'stem': 90, 'head': 10}
    >>> print(layers)
    ┏━━━━━━━━━━┳━━━━━━━━━┳━━━━━━━━━━━━┳━━━━━━━┓
    ┃ layer    ┃ tensors ┃ parameters ┃ share ┃
    ┡━━━━━━━━━━╇━━━━━━━━━╇━━━━━━━━━━━━╇━━━━━━━┩
    │ stem     │       1 │         90 │ 90.0% │
    │ head     │       2 │         10 │ 10.0% │
    ├──────────┼─────────┼────────────┼───────┤
    │ 2 layers │       3 │        100 │       │
    └──────────┴─────────┴────────────┴───────┘

    ```
    """

    def __init__(self, layers: Mapping[str, list[str]], sizes: Mapping[str, int]):
        super().__init__(layers)
        self.sizes = dict(sizes)

    @property
    def parameters(self) -> dict[str, int]:
        """Layer name to its number of trainable parameters."""
        return {layer: sum(self.sizes[name] for name in members) for layer, members in self.items()}

    def __rich__(self) -> Table:
        """The table: layer, tensors, parameters and their share of all trainable ones."""
        from rich.table import Table

        table = Table()
        table.add_column("layer", overflow="fold")
        for title in ("tensors", "parameters", "share"):
            table.add_column(title, justify="right")
        parameters = self.parameters
        total = sum(parameters.values())
        for layer, members in self.items():
            count = parameters[layer]
            table.add_row(layer, f"{len(members)}", f"{count:,}", f"{count / max(1, total):.1%}")
        table.add_section()
        tensors = sum(map(len, self.values()))
        table.add_row(f"{len(self)} layer{'s' * (len(self) != 1)}", f"{tensors}", f"{total:,}", "")
        return table

    def __str__(self) -> str:
        from rich.console import Console

        # In a notebook rich would show an empty output beside the string.
        console = Console(width=100, color_system=None, force_jupyter=False)
        with console.capture() as capture:
            console.print(self)
        return capture.get().rstrip()


def layer_groups(model: nn.Module, granularity: str = "block", head: str | Sequence[str] | None = None) -> LayerGroups:
    """Groups a model's trainable parameters into layers.

    timm models are grouped by timm's own `group_matcher` (as in `timm.models.group_parameters`), wherever in the model
    they sit; where that tells stages apart but not their blocks, the blocks come from the structure. All other modules
    are grouped by their structure: the elements of lists of blocks are layers, lists of stages are taken apart into
    their blocks, and every other part is a layer of its own. The outputs of a network (children called `head`,
    `classifier`, `fc`, `decode_head` ..., or a single linear or convolutional layer at its end) are one layer, `head`,
    the last. A normalisation goes with the layer before it, the final one with the last block (in timm models, where
    the matcher puts it). Parameters that a module holds itself, such as a class token, go with the parameter before
    them, or with the first layer. Adapters of PEFT are parts of the block they sit in.

    Args:
        model (`torch.nn.Module`):
            The model, bare or inside wrappers (DDP, FSDP, `torch.compile`, PEFT, transformers' `TimmWrapper`).
        granularity (`str`, *optional*, defaults to `"block"`):
            `"block"`: a layer a block. `"stage"`: a layer a stage of blocks, where there are stages. `"tensor"`: a
            layer a parameter; those of the head are called `head. ...`.
        head (`str` or `Sequence[str]`, *optional*):
            The module or modules that are the head, by their names in `model.named_modules()` or in that of the network
            inside the wrappers, where they are not recognised.

    Returns:
        `dict[str, list[str]]`: layer name to parameter names as in `model.named_parameters()`, input side first and
        the head last. Every trainable parameter is in exactly one layer, a frozen one in none, a tied one once.
        Printed, it is a table of the layers and their sizes.

    Raises:
        ValueError: if the model has no trainable parameter, `granularity` is unknown, or there is no module `head`.

    Example:

    ```python
    >>> import timm
    >>> from metalr_hf import layer_groups
    >>> list(layer_groups(timm.create_model("test_vit", num_classes=3)))
    ['stem', 'blocks.0', 'blocks.1', 'blocks.2', 'blocks.3', 'blocks.4', 'blocks.5', 'head']

    ```
    """
    check_choice("granularity", granularity, LAYER_GRANULARITIES)
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not trainable:
        raise ValueError(NOTHING_TO_TRAIN)
    network, prefix = look_through(model, "")
    layers = _once(find_layers(network, prefix, "stage" if granularity == "stage" else "block"), model)
    layers = _with_held(layers, [name for name, _ in model.named_parameters()])
    if head is not None:
        layers = _with_head(layers, model, [head] if isinstance(head, str) else list(head), prefix)
    elif len(layers) > 1 and "head" not in layers:
        warnings.warn(
            f"No head recognised in {type(network).__name__}: its last layer, {list(layers)[-1]!r}, is taken for it by "
            "what treats a head apart (the calibration of the start rates, head_lr_multiplier, head_hold_epochs). If "
            "another module is the head, name it as named_modules() does: layer_groups(model, head=...), or "
            "head_module=... in MetaLRTrainingArguments.",
            stacklevel=2,
        )
    head_is_there = "head" in layers
    layers = {layer: [name for name in members if name in trainable] for layer, members in layers.items()}
    if head_is_there and not layers["head"] and sum(map(bool, layers.values())) > 1:
        last = [layer for layer, members in layers.items() if members][-1]
        warnings.warn(
            f"The head of {type(network).__name__} is frozen: {last!r}, the last layer that is trained, is taken for "
            "it by what treats a head apart (the calibration of the start rates, head_lr_multiplier, "
            "head_hold_epochs). Unfreeze the head, with PEFT by modules_to_save, unless it was trained for these "
            "classes.",
            stacklevel=2,
        )
    if granularity == "tensor":
        layers = {
            tensor: [name]
            for layer, members in layers.items()
            for tensor, name in zip(tensor_names(layer, members, prefix), members, strict=True)
        }
    layers = {layer: members for layer, members in layers.items() if members}
    return LayerGroups(layers, {name: parameter.numel() for name, parameter in trainable.items()})


def check_layer_groups(model: nn.Module, groups: Mapping[str, Sequence[str]]) -> None:
    """Raises unless a map of layers holds every trainable parameter of a model exactly once.

    Args:
        model (`torch.nn.Module`): The model.
        groups (`Mapping[str, Sequence[str]]`): Layer name to parameter names.

    Raises:
        TypeError: if they are no mapping.
        ValueError: naming the parameter that is missing, doubled, frozen or not there.

    Example:

    ```python
    >>> import torch
    >>> from metalr_hf.layers.groups import check_layer_groups
    >>> check_layer_groups(torch.nn.Linear(4, 2), {"head": ["weight"]})
    Traceback (most recent call last):
        ...
    ValueError: layer_groups misses the trainable 'bias'. Put each trainable parameter into one layer, or freeze it.

    ```
    """
    if not isinstance(groups, Mapping):
        raise TypeError(
            f"layer_groups is a {type(groups).__name__}: give a dictionary from the name of a layer to the names of "
            "its parameters, as metalr_hf.layer_groups(model) does."
        )
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
                hint = did_you_mean(name, parameters)
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

    Example:

    ```python
    >>> import torch
    >>> from metalr_hf.layers.groups import split_param_groups
    >>> stem, head = torch.nn.Linear(4, 4), torch.nn.Linear(4, 2)
    >>> optimizer = torch.optim.AdamW([*stem.parameters(), *head.parameters()], lr=1e-4)
    >>> layers = {"stem": list(stem.parameters()), "head": list(head.parameters())}
    >>> [group["layer"] for group in split_param_groups(optimizer.param_groups, layers)]
    ['stem', 'head']

    ```
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


def split_optimizer(optimizer: Optimizer, layers: Mapping[str, Sequence[Tensor]]) -> None:
    """Splits the param groups of an optimizer by layer, in place; see [`split_param_groups`].

    Args:
        optimizer (`torch.optim.Optimizer`): The optimizer.
        layers (`Mapping[str, Sequence[torch.Tensor]]`): Layer name to parameters.

    Raises:
        ValueError: if a parameter of the optimizer belongs to no layer.

    Example:

    ```python
    >>> import torch
    >>> from metalr_hf.layers.groups import split_optimizer
    >>> stem, head = torch.nn.Linear(4, 4), torch.nn.Linear(4, 2)
    >>> optimizer = torch.optim.AdamW([*stem.parameters(), *head.parameters()], lr=1e-4)
    >>> split_optimizer(optimizer, {"stem": list(stem.parameters()), "head": list(head.parameters())})
    >>> [group["layer"] for group in optimizer.param_groups]
    ['stem', 'head']

    ```
    """
    groups = split_param_groups(optimizer.param_groups, layers)
    optimizer.param_groups.clear()
    for group in groups:
        optimizer.add_param_group(group)


def drop_frozen(optimizer: Optimizer) -> None:
    """Takes frozen parameters, which belong to no layer, out of the param groups of an optimizer, in place.

    Args:
        optimizer (`torch.optim.Optimizer`): The optimizer.

    Example:

    ```python
    >>> import torch
    >>> from metalr_hf.layers.groups import drop_frozen
    >>> model = torch.nn.Linear(4, 2)
    >>> optimizer = torch.optim.AdamW(model.parameters())
    >>> _ = model.bias.requires_grad_(False)
    >>> drop_frozen(optimizer)
    >>> [tuple(p.shape) for p in optimizer.param_groups[0]["params"]]
    [(2, 4)]

    ```
    """
    for group in optimizer.param_groups:
        kept = [p.requires_grad for p in group["params"]]
        # Optimizers that were given names keep them beside the parameters.
        for key in group.keys() & {"params", "param_names"}:
            group[key] = list(compress(group[key], kept))


def _once(layers: Layers, model: nn.Module) -> Layers:
    """Lists a parameter once, by its name in `model.named_parameters()`: in the head if it is there, or the first."""
    by_id = {id(p): name for name, p in model.named_parameters()}
    names = {alias: by_id[id(p)] for alias, p in model.named_parameters(remove_duplicate=False)}
    embeddings = {
        id(module.weight)
        for module in model.modules()
        if isinstance(module, nn.Embedding) and module.weight is not None
    }
    tied_to_input = {name for key, name in by_id.items() if key in embeddings}
    layer_of: dict[str, str] = {}
    for layer in sorted(layers, key=lambda layer: layer != "head"):
        for alias in layers[layer]:
            # A weight that the head shares with the input embedding stays in the layer of the embedding.
            if layer != "head" or alias == names[alias] or names[alias] not in tied_to_input:
                layer_of.setdefault(names[alias], layer)
    once: Layers = {layer: [] for layer in layers}
    for layer, members in layers.items():
        once[layer] = [name for name in dict.fromkeys(names[alias] for alias in members) if layer_of[name] == layer]
    return {layer: members for layer, members in once.items() if members}


def _with_held(layers: Layers, names: list[str]) -> Layers:
    """Adds parameters of modules outside all layers: to the layer of the parameter before, or to the first layer."""
    layers = {layer: list(members) for layer, members in layers.items()} or {"model": []}
    layer_of = {name: layer for layer, members in layers.items() for name in members}
    current = next(iter(layers))
    for name in names:
        if name in layer_of:
            current = layer_of[name]
        else:
            layers[current].append(name)
    return layers


def _with_head(layers: Layers, model: nn.Module, modules: list[str], prefix: str) -> Layers:
    """Moves the parameters of given modules out of their layers into the head."""
    # A user names the modules of a network as they were before the Trainer wrapped it.
    wrappers = list(accumulate(f"{part}." for part in prefix.split(".") if part))
    names = [name for name, _ in model.named_parameters()]
    known = [clean(name) for name, _ in model.named_modules() if name]
    head = []
    for module in modules:
        paths = [f"{clean(wrapper + module)}." for wrapper in ("", *wrappers)]
        found = next(filter(None, ([n for n in names if f"{clean(n)}.".startswith(path)] for path in paths)), [])
        if not found:
            hint = did_you_mean(module, known, "model.named_modules() lists them.")
            raise ValueError(f"{module!r}, named as the head, is no module of the model with parameters.{hint}")
        head += found
    layers = {"backbone.head" if layer == "head" else layer: members for layer, members in layers.items()}
    layers = {layer: [name for name in members if name not in head] for layer, members in layers.items()}
    return {**{layer: members for layer, members in layers.items() if members}, "head": list(dict.fromkeys(head))}

"""The structure of a module: which parts are blocks or lists of blocks, and in which order data pass its children."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

Child = tuple[str, nn.Module]

# Names tell where a part of an encoder-decoder stands, whatever the order in which it was written down.
SIDES = (
    re.compile(
        r"(\w+_)?(enc(oders?)?|downs?|contract\w*|backbone|down_?(blocks?|layers?|path|convs?)|encode\w*)[\d_]*"
    ),
    re.compile(r"(\w+_)?(bottle_?necks?|bridge|mid(dle)?|cent(er|re)|neck)(_\w+)?[\d_]*"),
    re.compile(r"(\w+_)?(dec(oders?)?|ups?|expan\w*|up_?(blocks?|layers?|path|convs?|samples?)|decode\w*)[\d_]*"),
)
# Modules that are created after the blocks that they precede in the forward pass.
BEFORE_BLOCKS = re.compile(r"(query_pos|ref_point)_head|interpolation|readout_projects|\w*input_proj(ections?)?")


def children_with_parameters(module: nn.Module) -> Iterator[Child]:
    """The children that hold parameters.

    Args:
        module (`torch.nn.Module`): Any module.

    Returns:
        `Iterator[tuple[str, torch.nn.Module]]`: name and child.

    Example:

    ```python
    >>> from torch import nn
    >>> from metalr_hf.layers.structure import children_with_parameters
    >>> [name for name, _ in children_with_parameters(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)))]
    ['0', '2']

    ```
    """
    return ((name, child) for name, child in module.named_children() if next(child.parameters(), None) is not None)


def has_group_matcher(module: nn.Module) -> bool:
    """Whether a module is a timm network that knows its own layers.

    Args:
        module (`torch.nn.Module`): Any module.

    Returns:
        `bool`

    Example:

    ```python
    >>> import timm
    >>> from metalr_hf.layers.structure import has_group_matcher
    >>> network = timm.create_model("test_resnet")
    >>> has_group_matcher(network), has_group_matcher(network.layer1)
    (True, False)

    ```
    """
    # Asked of the class: PEFT, FSDP and torch.compile hand attributes of the module inside through, but with it not
    # the parameter names that timm's patterns are written for.
    return hasattr(type(module), "group_matcher")


def look_through(module: nn.Module, path: str) -> tuple[nn.Module, str]:
    """Unwraps a network from modules that only contain it.

    Args:
        module (`torch.nn.Module`): A model, possibly in wrappers.
        path (`str`): The prefix of its parameter names.

    Returns:
        `tuple[torch.nn.Module, str]`: the network and the prefix of its parameter names.

    Example:

    ```python
    >>> from torch import nn
    >>> from metalr_hf.layers.structure import look_through
    >>> network = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    >>> found, prefix = look_through(nn.ModuleDict({"wrapper": nn.ModuleDict({"network": network})}), "")
    >>> found is network, prefix
    (True, 'wrapper.network.')

    ```
    """
    while not has_group_matcher(module) and next(module.parameters(recurse=False), None) is None:
        children = list(children_with_parameters(module))
        # A list has no forward pass: what holds it is the network.
        if len(children) != 1 or isinstance(children[0][1], nn.ModuleList):
            break
        path, module = f"{path}{children[0][0]}.", children[0][1]
    return module, path


def in_order(
    module: nn.Module, children: Sequence[Child], lists: int, entered: bool
) -> Iterator[tuple[str, nn.Module, int, bool]]:
    """The children as data pass them, with how many lists may still be entered and whether one has been.

    Where a list of stages has patch embeddings (before it) or norms in lists of the same length beside it, these take
    turns: embedding 0, stage 0, norm 0, embedding 1 ... Parts of an encoder and a decoder go by their names.

    Args:
        module (`torch.nn.Module`): The parent.
        children (`Sequence[tuple[str, torch.nn.Module]]`): Those of its children that are to be put in order.
        lists (`int`): How many lists of blocks may still be taken apart.
        entered (`bool`): Whether the parent is in such a list.

    Returns:
        `Iterator[tuple[str, torch.nn.Module, int, bool]]`: name, child, lists that may still be entered, and whether
            one has been.

    Example:

    ```python
    >>> from torch import nn
    >>> from metalr_hf.layers.structure import in_order
    >>> sides = {name: nn.Linear(4, 4) for name in ("up1", "bottleneck", "down1")}
    >>> [name for name, *_ in in_order(nn.ModuleDict(sides), list(sides.items()), lists=2, entered=False)]
    ['down1', 'bottleneck', 'up1']

    ```
    """
    children = _by_side(_early_first(children))
    inside = is_list(module, entered)
    turns = _taking_turns(children)
    for name, child in children:
        if name not in turns:
            yield name, child, lists - inside, entered or inside
        elif name == next(iter(turns)):
            for i in range(len(turns[name])):
                yield from ((f"{other}.{i}", parts[i], lists - 1, True) for other, parts in turns.items())


def _taking_turns(children: Sequence[Child]) -> dict[str, list[nn.Module]]:
    lists = {name: list(child.children()) for name, child in children if isinstance(child, nn.ModuleList)}
    stages = [i for i, (_, child) in enumerate(children) if is_list(child, False) and _holds_lists(child)]
    beside: dict[str, list[nn.Module]] = {}
    if "readout_projects" in lists:
        beside = {name: parts for name, parts in lists.items() if len(parts) == len(lists["readout_projects"])}
    elif len(stages) == 1 and children[stages[0]][0] in lists:
        size = len(lists[children[stages[0]][0]])
        beside = {
            name: lists[name]
            for i, (name, child) in enumerate(children)
            if name in lists and len(lists[name]) == size and (i <= stages[0] or is_norm(child))
        }
    return beside if len(beside) > 1 else {}


def _early_first(children: Sequence[Child]) -> list[Child]:
    # `enc_output`: the first guesses of two-stage detectors.
    starts = (i for i, (name, child) in enumerate(children) if is_list(child, False) or name == "enc_output")
    blocks = next(starts, 0)
    early = [pair for pair in children[blocks:] if BEFORE_BLOCKS.fullmatch(pair[0])]
    return [*children[:blocks], *early, *(pair for pair in children[blocks:] if pair not in early)]


def _by_side(children: Sequence[Child]) -> list[Child]:
    """Encoder, bottleneck, decoder; a part with another name stays behind the one before it."""
    sides = [next((i for i, side in enumerate(SIDES) if side.fullmatch(name)), None) for name, _ in children]
    if not {0, 2} <= set(sides):
        return list(children)
    last = -1
    for i, side in enumerate(sides):
        last = sides[i] = last if side is None else side
    return [children[i] for i in sorted(range(len(children)), key=lambda i: int(sides[i] or 0))]


def is_list(module: nn.Module, entered: bool) -> bool:
    """Whether the children are blocks, or stages: of one class and with two or more weights each.

    Outside of any list these may also be the children of an ordinary module (`layer1`, `layer2` ...), or a plain
    sequence of single convolutions.

    Args:
        module (`torch.nn.Module`): Any module.
        entered (`bool`): Whether it is itself in a list.

    Returns:
        `bool`

    Example:

    ```python
    >>> from torch import nn
    >>> from metalr_hf.layers.structure import is_list
    >>> block = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    >>> is_list(nn.ModuleList([block, block]), entered=False), is_list(block, entered=False)
    (True, False)

    ```
    """
    weights = [(type(child), weight_count(child)) for child in module.children()]
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
    return any(holds_blocks(child, True) for child in module.children())


def holds_blocks(module: nn.Module, entered: bool) -> bool:
    """Whether a list of blocks, or a timm network, is somewhere in a module.

    Args:
        module (`torch.nn.Module`): Any module.
        entered (`bool`): Whether it is itself in a list.

    Returns:
        `bool`

    Example:

    ```python
    >>> from torch import nn
    >>> from metalr_hf.layers.structure import holds_blocks
    >>> block = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    >>> encoder = nn.ModuleDict({"stem": nn.Linear(4, 4), "layers": nn.ModuleList([block, block])})
    >>> holds_blocks(encoder, entered=False), holds_blocks(encoder["stem"], entered=False)
    (True, False)

    ```
    """
    return any(has_group_matcher(part) or is_list(part, entered) for part in module.modules())


def weight_count(module: nn.Module) -> int:
    """How many weights a module holds, norms aside; an adapted layer of PEFT counts as the one that it adapts.

    Args:
        module (`torch.nn.Module`): Any module.

    Returns:
        `int`

    Example:

    ```python
    >>> from torch import nn
    >>> from metalr_hf.layers.structure import weight_count
    >>> weight_count(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3)))
    2

    ```
    """
    children: dict[str, Any] = dict(module.named_children())
    if "base_layer" in children:
        return 1
    own = next(module.parameters(recurse=False), None) is not None and "norm" not in type(module).__name__.lower()
    return own + sum(weight_count(child) for child in children.values())


def is_norm(module: nn.Module) -> bool:
    """Whether a module holds parameters, but none other than those of norms.

    Args:
        module (`torch.nn.Module`): Any module.

    Returns:
        `bool`

    Example:

    ```python
    >>> from torch import nn
    >>> from metalr_hf.layers.structure import is_norm
    >>> is_norm(nn.Sequential(nn.LayerNorm(4))), is_norm(nn.ReLU()), is_norm(nn.Linear(4, 4))
    (True, False, False)

    ```
    """
    return not weight_count(module) and next(module.parameters(), None) is not None

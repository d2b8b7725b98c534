"""The names of layers, taken from the names in the model's own code; logs, CSV, plots and card use the same ones."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

HEAD = re.compile(
    r"(?!enc_|query_|ref_|denoising_)"  # the first guesses of two-stage detectors, and positions
    r"((\w+_)?(heads?|classifiers?|predictor|score|logits)(_\w+)?|fc|linear|criterion|(class|bbox|mask)_embed(der)?)"
)
# These may also be feature extractors; they count as the head only if nothing else does.
OUTPUT = re.compile(r"(final|out|output)(_?(conv|layer|proj|projection|block|tr))?")
# Detectors register these modules inside their decoders.
NESTED_HEAD = re.compile(r"(class|bbox|mask)_embed(der)?")
STEM = re.compile(r".*(stem|embed|patch).*|conv[01]|conv_(proj|first|in)")
STAGE = re.compile(r"(.+\.)?(stages?|layers?)[._]?\d+")
# FSDP, torch.compile and activation checkpointing put these into the names of whatever they wrap, blocks included.
WRAPPERS = ("_fsdp_wrapped_module", "_orig_mod", "_checkpoint_wrapped_module")


def clean(name: str) -> str:
    """A parameter's or a module's name without what wrappers put into it.

    Args:
        name (`str`): A dotted name.

    Returns:
        `str`

    Example:

    ```python
    >>> from metalr_hf.layers.names import clean
    >>> clean("_orig_mod.encoder.0._checkpoint_wrapped_module.weight")
    'encoder.0.weight'

    ```
    """
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def head_layers(layers: Sequence[str]) -> list[str]:
    """The layers that are the head: those at the end called `head` or `head. ...`, at least the last.

    Args:
        layers (`Sequence[str]`): Layer names, input side first.

    Returns:
        `list[str]`

    Example:

    ```python
    >>> from metalr_hf.layers.names import head_layers
    >>> head_layers(["stem.weight", "head.weight", "head.bias"])
    ['head.weight', 'head.bias']
    >>> head_layers(["0", "2"])
    ['2']

    ```
    """
    first = len(layers)
    while first and layers[first - 1].split(".")[0] == "head":
        first -= 1
    return list(layers[min(first, len(layers) - 1) :])


def tensor_names(layer: str, members: Sequence[str], prefix: str) -> list[str]:
    """The layer names to use when every parameter of a layer becomes a layer of its own.

    Args:
        layer (`str`): The layer.
        members (`Sequence[str]`): Its parameters.
        prefix (`str`): The prefix of all parameter names of the model.

    Returns:
        `list[str]`: their names as in the model; those of the head start with `head.`.

    Example:

    ```python
    >>> from metalr_hf.layers.names import tensor_names
    >>> tensor_names("head", ["classifier.dense.weight", "classifier.out.weight"], prefix="")
    ['head.dense.weight', 'head.out.weight']

    ```
    """
    names = [clean(name.removeprefix(prefix)) for name in members]
    if layer != "head":
        # `head.` is kept for the tensors of the head, as `head` is among whole layers.
        return [f"backbone.{name}" if name.split(".")[0] == "head" else name for name in names]
    modules = [name.split(".")[:-1] for name in names]
    shared = 0
    while all(len(parts) > shared and parts[shared] == modules[0][shared] for parts in modules):
        shared += 1
    return [f"head.{'.'.join(name.split('.')[shared:])}" for name in names]


def exclusive_paths(groups: list[list[str]]) -> list[str]:
    """Names each group by the module path that holds most of its parameters and none of another's.

    Args:
        groups (`list[list[str]]`): Parameter names by group.

    Returns:
        `list[str]`: a name a group.

    Example:

    ```python
    >>> from metalr_hf.layers.names import exclusive_paths
    >>> exclusive_paths([["blocks.0.fc1.weight", "blocks.0.fc2.weight"], ["blocks.1.fc1.weight", "norm.weight"]])
    ['blocks.0', 'norm']

    ```
    """
    paths = [
        Counter(path for name in group for path in (name[: m.start()] for m in re.finditer(r"\.|$", name)))
        for group in groups
    ]
    owners = Counter(path for counts in paths for path in counts)
    own = [{path: count for path, count in counts.items() if owners[path] == 1} for counts in paths]
    best = [max(counts, key=lambda path: (counts[path], -len(path))) for counts in own]
    # The only block of a stage gets a name of the same form as the blocks of other stages.
    depth = max(map(_depth, best))
    for i, (name, counts) in enumerate(zip(best, own, strict=True)):
        same = [path for path in counts if path.startswith(f"{name}.") and counts[path] == counts[name]]
        numbered = [path for path in same if path.split(".")[-1].isdigit() and _depth(path) <= depth]
        best[i] = max(numbered, key=len, default=name)
    return best


def _depth(path: str) -> int:
    return sum(part.isdigit() for part in path.split("."))


def without_prefix(layers: dict[str, list[str]], prefix: str) -> dict[str, list[str]]:
    """Removes a prefix from the names of layers, if all names stay different and none becomes a mere number.

    Args:
        layers (`dict[str, list[str]]`): Layer name to parameter names.
        prefix (`str`): The prefix, with its dot.

    Returns:
        `dict[str, list[str]]`

    Example:

    ```python
    >>> from metalr_hf.layers.names import without_prefix
    >>> list(without_prefix({"vit.layers.0": [], "vit.layers.1": []}, "vit."))
    ['layers.0', 'layers.1']
    >>> list(without_prefix({"layers.0": [], "layers.1": []}, "layers."))
    ['layers.0', 'layers.1']

    ```
    """
    short = [layer.removeprefix(prefix) for layer in layers]
    if len(set(short)) < len(short) or any(name[:1].isdigit() or not name for name in short):
        return layers
    return dict(zip(short, layers.values(), strict=True))

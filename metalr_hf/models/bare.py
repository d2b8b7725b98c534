"""Modules that know nothing of transformers in the Trainer: from images to logits, or with a loss of their own."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from ..layers.groups import check_layer_groups
from .losses import IGNORE_INDEX, resize_logits

NETWORK = "network."


class Classifier(nn.Module):
    """A network from images to logits with the loss that transformers' models have: what Trainer can train.

    Of images or of their pixels: cross-entropy, for masks on logits brought to their size and without pixels of the
    class 255. The tensors of its `state_dict()` have the names that they have in the network, so that what Trainer
    saves loads into the network itself.

    Args:
        network (`torch.nn.Module`):
            Takes images of shape `(batch, channels, height, width)`, or volumes, and returns logits of shape
            `(batch, classes)`, or `(batch, classes, ...)` for masks. What else it returns is handed through: a loss, or
            a tuple or a dictionary with one.

    Example:

    ```python
    >>> import torch
    >>> from metalr_hf.models.bare import Classifier
    >>> network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 2))
    >>> outputs = Classifier(network)(torch.zeros(4, 3, 2, 2), torch.tensor([0, 1, 0, 1]))
    >>> outputs["loss"].shape, outputs["logits"].shape
    (torch.Size([]), torch.Size([4, 2]))

    ```
    """

    # The loss is the mean of a batch; Trainer does the accumulation.
    accepts_loss_kwargs = False

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network
        self.register_state_dict_post_hook(_without_prefix)
        self.register_load_state_dict_pre_hook(_with_prefix)

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> Any:
        """Loss (if there are labels) and logits.

        Args:
            pixel_values (`torch.Tensor` of shape `(batch, channels, ...)`): Images or volumes.
            labels (`torch.Tensor` of shape `(batch,)` or `(batch, ...)`, *optional*): Class ids.
        """
        outputs = self.network(pixel_values)
        if isinstance(outputs, (tuple, list)) and not (isinstance(outputs[0], Tensor) and outputs[0].dim() == 0):
            raise TypeError(
                f"{type(self.network).__name__} returns a {type(outputs).__name__} that does not begin with a loss. "
                "Return logits or (loss, logits), or tell the Trainer how to get at the loss with compute_loss_func."
            )
        if not isinstance(outputs, Tensor) or outputs.dim() == 0:
            return outputs
        if labels is None:
            return {"logits": outputs}
        if labels.dim() == 1:
            loss = functional.cross_entropy(outputs, labels)
        else:
            logits = resize_logits(outputs, labels.shape[1:])
            loss = functional.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX)
        return {"loss": loss, "logits": outputs}


def wrap_bare_module(
    model: nn.Module, groups: Mapping[str, Sequence[str]] | None, dataset: Any = None, *, own_loss: bool = False
) -> tuple[nn.Module, Mapping[str, Sequence[str]] | None]:
    """Puts a module into what Trainer needs to feed it: a timm network into transformers' wrapper, others into ours.

    Args:
        model (`torch.nn.Module`): Any model.
        groups (`Mapping[str, Sequence[str]]`, *optional*): Its layers, with the names of its parameters.
        dataset (optional): The training set. If it has a column for the module's only argument, such as `images`, the
            module has a loss of its own and is left alone.
        own_loss (`bool`, *optional*, defaults to `False`): Whether the Trainer computes the loss from the outputs.

    Returns:
        `tuple`: the model and its layers, both as they were if nothing was needed.

    Example:

    ```python
    >>> import torch
    >>> from metalr_hf.models.bare import wrap_bare_module
    >>> model, layers = wrap_bare_module(torch.nn.Linear(4, 2), {"head": ["weight", "bias"]})
    >>> type(model).__name__, layers
    ('Classifier', {'head': ['network.weight', 'network.bias']})

    ```
    """
    if hasattr(model, "pretrained_cfg"):
        from .timm import PREFIX, is_timm_model, wrap_timm_model

        if is_timm_model(model):
            return wrap_timm_model(model), _prefixed(model, groups, PREFIX)
    if own_loss or not needs_loss(model):
        return model, groups
    argument = next(iter(inspect.signature(_forward(model)).parameters))
    if argument != "pixel_values" and argument in (getattr(dataset, "column_names", None) or ()):
        return model, groups
    return Classifier(model), _prefixed(model, groups, NETWORK)


def _prefixed(
    model: nn.Module, groups: Mapping[str, Sequence[str]] | None, prefix: str
) -> Mapping[str, Sequence[str]] | None:
    if groups is None:
        return None
    check_layer_groups(model, groups)
    return {layer: [prefix + name for name in names] for layer, names in groups.items()}


def needs_loss(model: nn.Module) -> bool:
    """Whether a module is one from images to something, without labels: `forward` has a single required argument.

    Args:
        model (`torch.nn.Module`): Any module. One of transformers, PEFT, or with a `config` is taken as it is.

    Returns:
        `bool`

    Example:

    ```python
    >>> import torch
    >>> from metalr_hf.models.bare import needs_loss
    >>> needs_loss(torch.nn.Linear(4, 2)), needs_loss(torch.nn.CrossEntropyLoss())
    (True, False)

    ```
    """
    if isinstance(model, PreTrainedModel) or hasattr(model, "config"):
        return False
    parameters = list(inspect.signature(_forward(model)).parameters.values())
    if any(p.kind is p.VAR_KEYWORD or "label" in p.name for p in parameters):
        return False
    required = [p for p in parameters if p.default is p.empty and p.kind is not p.VAR_POSITIONAL]
    return len(required) == 1 and not isinstance(model, nn.parallel.DistributedDataParallel)


def _forward(model: nn.Module) -> Any:
    # torch.compile's wrapper takes any arguments.
    return getattr(model, "_orig_mod", model).forward


class LossAlone:
    """Calls a model, and puts a loss that it returns alone into a dictionary, as Trainer looks for it.

    Args:
        model (`torch.nn.Module`): Any model.
        n_gpu (`int`, *optional*, defaults to 1): Over how many devices DataParallel divides a batch. It gathers their
            losses in a vector, of which Trainer takes the mean.

    Raises:
        ValueError: when it is called, if the model returns a tensor that is not a loss.

    Example:

    ```python
    >>> import torch
    >>> from metalr_hf.models.bare import LossAlone
    >>> LossAlone(torch.nn.L1Loss())(input=torch.zeros(2), target=torch.ones(2))
    {'loss': tensor(1.)}

    ```
    """

    def __init__(self, model: nn.Module, n_gpu: int = 1):
        self.model, self.n_gpu = model, n_gpu

    def __call__(self, **inputs: Any) -> Any:
        """The model's outputs."""
        outputs = self.model(**inputs)
        if not isinstance(outputs, Tensor):
            return outputs
        alone = outputs.numel() == 1
        if not alone and (self.n_gpu <= 1 or outputs.dim() > 1):
            # Trainer would take its first element for the loss.
            name = type(getattr(self.model, "module", self.model)).__name__
            raise ValueError(
                f"{name} returns a tensor of shape {tuple(outputs.shape)} where its loss is expected, which is one "
                "number: return its .mean(), or (loss, logits), or tell the Trainer how to get at the loss with "
                "compute_loss_func."
            )
        return {"loss": outputs.reshape(()) if alone else outputs}


def logits_of(outputs: Any) -> Tensor | None:
    """The logits of a classifier's outputs, of shape `(batch, classes)`: by name, or after the loss; else none.

    Args:
        outputs (`Any`): What a model returned.

    Returns:
        `torch.Tensor` of shape `(batch, classes)`, *optional*

    Example:

    ```python
    >>> import torch
    >>> from metalr_hf.models.bare import logits_of
    >>> logits_of((torch.tensor(0.5), torch.zeros(4, 2))).shape
    torch.Size([4, 2])

    ```
    """
    if isinstance(outputs, Mapping):
        found = outputs.get("logits")
    else:
        found = outputs[1] if isinstance(outputs, (tuple, list)) and len(outputs) > 1 else None
    return found if isinstance(found, Tensor) and found.dim() == 2 else None


def _without_prefix(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    for name in [name for name in state_dict if name.startswith(prefix + NETWORK)]:
        state_dict[prefix + name.removeprefix(prefix + NETWORK)] = state_dict.pop(name)


def _with_prefix(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    for name in [name for name in state_dict if name.startswith(prefix)]:
        state_dict[prefix + NETWORK + name.removeprefix(prefix)] = state_dict.pop(name)

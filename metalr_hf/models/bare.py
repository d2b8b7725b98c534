"""Plain PyTorch modules in the Trainer: those that map images to logits, and those that compute their own loss."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import IterableDataset
from transformers import PreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutput

from ..layers.groups import check_layer_groups
from ..tuning.contexts import preserve_random_state
from .losses import IGNORE_INDEX, resize_logits

NETWORK = "network."
# What rounding, in half precision too, leaves of the sum of shares.
SHARES_ADD_UP = 0.01


class Classifier(nn.Module):
    """Wraps a network from images to logits so that it returns a loss as models of transformers do, for Trainer.

    Of images or of their pixels: cross-entropy, for masks on logits brought to their size and without pixels of the
    class 255; of numbers, the mean squared error. The tensors of its `state_dict()` have the names that they have in
    the network, so that what Trainer saves loads into the network itself.

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

    # The loss is the mean over a batch; Trainer handles gradient accumulation.
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
            labels (`torch.Tensor`, *optional*):
                Class ids `(batch,)`, masks of class ids `(batch, height, width)`, shares of the classes
                `(batch, classes)` as MixUp gives them (floats that add up to 1), or numbers to predict, floats of the
                shape of the logits, where these are one an image.

        Returns:
            `transformers.modeling_outputs.ImageClassifierOutput`: or what else the network returns.

        Raises:
            ValueError: if the labels could mean several things.
        """
        outputs = self.network(pixel_values)
        if isinstance(outputs, (tuple, list)) and not (isinstance(outputs[0], Tensor) and outputs[0].dim() == 0):
            raise TypeError(
                f"{type(self.network).__name__} returns a {type(outputs).__name__} that does not begin with a loss. "
                "Return logits or (loss, logits), or tell the Trainer how to get at the loss with compute_loss_func."
            )
        if not isinstance(outputs, Tensor) or outputs.dim() == 0:
            return outputs
        return ImageClassifierOutput(loss=None if labels is None else label_loss(outputs, labels), logits=outputs)


def label_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """The loss that the form of labels asks for.

    Args:
        logits (`torch.Tensor` of shape `(batch, classes)` or `(batch, classes, ...)`): What the network answers.
        labels (`torch.Tensor`): See [`Classifier`].

    Returns:
        `torch.Tensor` of shape `()`

    Raises:
        ValueError: if the labels could mean several things.

    Example:

    ```python
    >>> import torch
    >>> from metalr_hf.models.bare import label_loss
    >>> mixed = torch.tensor([[0.5, 0.5]])
    >>> round(label_loss(torch.zeros(1, 2), mixed).item(), 4), label_loss(torch.zeros(1, 1), torch.tensor([2.0]))
    (0.6931, tensor(4.))

    ```
    """
    if not labels.is_floating_point():
        if labels.dim() == 1 and logits.dim() > 1 and logits.shape[1] > 1:
            return functional.cross_entropy(logits, labels.long())
        if 1 < labels.dim() == logits.dim() - 1:
            sized = resize_logits(logits, labels.shape[1:])
            return functional.cross_entropy(sized, labels.long(), ignore_index=IGNORE_INDEX)
    elif logits.shape[1:].numel() == 1 and labels.numel() == logits.numel():
        return functional.mse_loss(logits.reshape(-1), labels.reshape(-1))
    elif labels.shape == logits.shape and bool((labels.sum(1) - 1).abs().max() < SHARES_ADD_UP):
        return functional.cross_entropy(logits, labels)
    raise ValueError(
        f"Labels of shape {tuple(labels.shape)} and type {labels.dtype} for logits of shape {tuple(logits.shape)}: "
        "class ids, masks of class ids, shares of the classes that add up to 1, or one number an image have a loss of "
        "their own here. For any other, such as several labels an image, say which with compute_loss_func="
        "lambda outputs, labels, num_items_in_batch=None: binary_cross_entropy_with_logits(outputs.logits, labels)."
    )


def wrap_bare_module(
    model: nn.Module,
    groups: Mapping[str, Sequence[str]] | None,
    dataset: Any = None,
    *,
    own_loss: bool = False,
    label_names: Sequence[str] = (),
) -> tuple[nn.Module, Mapping[str, Sequence[str]] | None]:
    """Wraps a module so that Trainer can feed it: a timm network in transformers' wrapper, others in [`Classifier`].

    Args:
        model (`torch.nn.Module`): Any model.
        groups (`Mapping[str, Sequence[str]]`, *optional*): Its layers, with the names of its parameters.
        dataset (optional): The training set. If it has a column for the module's only argument, such as `images`, the
            module has a loss of its own and is left alone.
        own_loss (`bool`, *optional*, defaults to `False`):
            Whether the Trainer computes the loss from the outputs: of a module that takes what the rows hold, such as
            `pixel_values`, these then stay what the module returns.
        label_names (`Sequence[str]`, *optional*): Arguments of the module that are targets.

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
    argument, known = next(iter(inspect.signature(_forward(model)).parameters), None), _columns(dataset)
    if hasattr(model, "pretrained_cfg") and not (own_loss and argument in known):
        from .timm import PREFIX, is_timm_model, wrap_timm_model

        if is_timm_model(model):
            return wrap_timm_model(model), _prefixed(model, groups, PREFIX)
    if not needs_loss(model, label_names):
        return model, groups
    fed = argument in known or (argument == "pixel_values" and not known)
    if fed if own_loss else argument in known and argument != "pixel_values":
        return model, groups
    return Classifier(model), _prefixed(model, groups, NETWORK)


def _columns(dataset: Any) -> Sequence[str]:
    columns = getattr(dataset, "column_names", None)
    by_row = hasattr(dataset, "__getitem__") and not isinstance(dataset, (Mapping, IterableDataset))
    if columns is None and by_row and hasattr(dataset, "__len__") and len(dataset):
        # A random augmentation of the row is not to change the run.
        with preserve_random_state():
            row = dataset[0]
        columns = list(row) if isinstance(row, Mapping) else None
    return columns or ()


def _prefixed(
    model: nn.Module, groups: Mapping[str, Sequence[str]] | None, prefix: str
) -> Mapping[str, Sequence[str]] | None:
    if groups is None:
        return None
    check_layer_groups(model, groups)
    return {layer: [prefix + name for name in names] for layer, names in groups.items()}


def needs_loss(model: nn.Module, label_names: Sequence[str] = ()) -> bool:
    """Whether a module takes images and no labels: its `forward` has a single required argument.

    Args:
        model (`torch.nn.Module`): Any module. One of transformers, PEFT, or with a `config` is taken as it is.
        label_names (`Sequence[str]`, *optional*): Arguments that are targets, whatever they are called.

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
    if any(p.kind is p.VAR_KEYWORD or "label" in p.name or p.name in label_names for p in parameters):
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


def logits_of(outputs: Any, has_loss: bool = True) -> Tensor | None:
    """The logits in a classifier's outputs: the entry `logits`, or what follows the loss; `None` if there are none.

    Args:
        outputs (`Any`): What a model returned.
        has_loss (`bool`, *optional*, defaults to `True`): Whether a tuple begins with a loss, as with labels.

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
        place = int(has_loss)
        found = outputs[place] if isinstance(outputs, (tuple, list)) and len(outputs) > place else None
    return found if isinstance(found, Tensor) and found.dim() == 2 else None


def outputs_and_logits(
    model: nn.Module, inputs: Mapping[str, Any], has_own_loss: bool = True
) -> tuple[Any, Tensor | None]:
    """A classifier's outputs for a batch, and the logits in them.

    Args:
        model (`torch.nn.Module`): The model.
        inputs (`Mapping`): A batch.
        has_own_loss (`bool`, *optional*, defaults to `True`): Whether the model computes the loss. If not, it gets no
            labels, as from Trainer: a model may not take them, or compute a loss of its own of labels for another.

    Returns:
        `tuple`: the outputs, and what [`logits_of`] finds in them.

    Example:

    ```python
    >>> import torch
    >>> from metalr_hf.models.bare import outputs_and_logits
    >>> class Network(torch.nn.Linear):
    ...     def forward(self, pixel_values):
    ...         return {"logits": super().forward(pixel_values)}
    >>> batch = {"pixel_values": torch.zeros(4, 3), "labels": torch.zeros(4, dtype=torch.int64)}
    >>> outputs_and_logits(Network(3, 2), batch, has_own_loss=False)[1].shape
    torch.Size([4, 2])

    ```
    """
    given = {name: value for name, value in inputs.items() if has_own_loss or name != "labels"}
    outputs = model(**given)
    return outputs, logits_of(outputs, has_own_loss)


def _without_prefix(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    for name in [name for name in state_dict if name.startswith(prefix + NETWORK)]:
        state_dict[prefix + name.removeprefix(prefix + NETWORK)] = state_dict.pop(name)


def _with_prefix(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    for name in [name for name in state_dict if name.startswith(prefix)]:
        state_dict[prefix + NETWORK + name.removeprefix(prefix)] = state_dict.pop(name)

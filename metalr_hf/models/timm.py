"""Bare timm models in and out of the Trainer and the Hub."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import TimmWrapperConfig, TimmWrapperForImageClassification
from transformers.utils import SAFE_WEIGHTS_NAME

from ..messages import did_you_mean

PREFIX = "timm_model."
HUB_PREFIX = "timm/"


def architecture_of(name: str) -> str | None:
    """The architecture that the name of a timm model of the Hub stands for.

    Args:
        name (`str`): Of any model; one of timm begins with `timm/`, and may end with the tag of its weights.

    Returns:
        `str`, *optional*: `None` for other models, and for a local folder.

    Raises:
        ValueError: if timm has no such architecture. It names the near ones.

    Example:

    ```python
    >>> from metalr_hf.models.timm import architecture_of
    >>> architecture_of("timm/resnet18.a1_in1k")
    'resnet18'

    ```
    """
    if not name.startswith(HUB_PREFIX) or os.path.isdir(name):
        return None
    # Takes seconds, and other models do not need it.
    import timm

    architecture = name.removeprefix(HUB_PREFIX).split(".")[0]
    if not timm.is_model(architecture):
        hint = did_you_mean(architecture, timm.list_models(), "timm.list_models() names them.")
        raise ValueError(f"--model={name!r}: timm has no such architecture.{hint}")
    return architecture


def is_timm_model(model: nn.Module) -> bool:
    """Whether a module is a timm network with a classifier, as `timm.create_model` gives it.

    Args:
        model (`torch.nn.Module`): Any module.

    Returns:
        `bool`

    Example:

    ```python
    >>> import timm
    >>> from metalr_hf.models.timm import is_timm_model
    >>> network = timm.create_model("test_resnet", num_classes=2)
    >>> is_timm_model(network), is_timm_model(network.layer1)
    (True, False)

    ```
    """
    return isinstance(getattr(model, "pretrained_cfg", None), Mapping) and hasattr(model, "forward_head")


def wrap_timm_model(model: nn.Module, id2label: Mapping[int, str] | None = None) -> TimmWrapperForImageClassification:
    """Puts a timm network into transformers' wrapper: Trainer can feed, save and publish it.

    The network itself is taken, not a copy: an optimizer over its parameters stays valid. What was given to
    `timm.create_model` (an image size, a depth, input channels, pooling, drop rates) goes into the configuration as
    timm's `get_model_args` tells it, so that the saved model is built alike. Two things cannot be known: arguments
    that JSON cannot represent (`act_layer=torch.nn.SiLU`; `act_layer="silu"` is fine), and modules replaced after the
    network was made. Of the first, and of any tensor that differs in name or shape, a warning tells.

    Args:
        model (`torch.nn.Module`):
            A network from `timm.create_model`, with a classifier.
        id2label (`Mapping[int, str]`, *optional*):
            Class number, from 0 on without a gap and in any order, to class name. Numbers by default.

    Returns:
        `TimmWrapperForImageClassification`: takes `pixel_values` and `labels`.

    Raises:
        ValueError: if the network has no classifier, or `id2label` another number of classes or other numbers than
            0, 1, 2 ...

    Example:

    ```python
    >>> import timm
    >>> from metalr_hf.models.timm import wrap_timm_model
    >>> network = timm.create_model("test_resnet", num_classes=2)
    >>> model = wrap_timm_model(network, {0: "benign", 1: "malignant"})
    >>> model.timm_model is network
    True

    ```
    """
    classes = int(getattr(model, "num_classes", 0))
    if classes == 0:
        raise ValueError(
            "This timm model has no classifier (num_classes=0). Create it with the number of your classes: "
            "timm.create_model(name, pretrained=True, num_classes=3)."
        )
    if id2label is None:
        id2label = {i: f"LABEL_{i}" for i in range(classes)}
    if len(id2label) != classes:
        raise ValueError(f"id2label names {len(id2label)} classes, but the timm model has {classes}.")
    id2label = _in_order(id2label)
    pretrained_cfg, model_args = _description(model)
    settings: dict[str, Any] = {
        "architecture": pretrained_cfg["architecture"],
        "pretrained_cfg": pretrained_cfg,
        "model_args": model_args,
        "num_labels": classes,
        "id2label": id2label,
        "label2id": {name: i for i, name in id2label.items()},
    }
    config = TimmWrapperConfig(**settings)
    with torch.device("meta"):
        wrapper = TimmWrapperForImageClassification(config)
    _warn_of_other_tensors(model, wrapper.timm_model)
    wrapper.timm_model = model
    return wrapper


def make_portable(folder: str | os.PathLike[str]) -> None:
    """Makes a saved timm model loadable by both libraries.

    After this, `AutoModelForImageClassification.from_pretrained(folder)` and
    `timm.create_model("local-dir:" + folder, pretrained=True)` give the same logits. timm wants a `pretrained_cfg`,
    model arguments that are an object, and tensors without the wrapper's prefix; transformers fails if the arguments
    hold `num_classes`, and takes tensors with the prefix or without.

    Args:
        folder (`str` or `os.PathLike`): Where `save_pretrained` of a `TimmWrapper` wrote to.

    Raises:
        ValueError: if the folder does not hold a timm model, or holds it in several files.

    Example:

    ```python
    >>> import tempfile
    >>> import timm
    >>> from metalr_hf.models.timm import make_portable, wrap_timm_model
    >>> network = timm.create_model("test_resnet", num_classes=2)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     wrap_timm_model(network).save_pretrained(folder)
    ...     make_portable(folder)
    ...     timm.create_model(f"local-dir:{folder}", pretrained=True).num_classes
    2

    ```
    """
    file = Path(folder) / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    if "architecture" not in config:
        raise ValueError(f"{file} is not the configuration of a timm model: it names no architecture.")
    weights = Path(folder) / SAFE_WEIGHTS_NAME
    if not weights.is_file():
        raise ValueError(
            f"{folder} holds no {SAFE_WEIGHTS_NAME}, and timm reads a model from one file only. Save it with a larger "
            'max_shard_size: model.save_pretrained(folder, max_shard_size="500GB").'
        )
    model_args = {name: value for name, value in (config.get("model_args") or {}).items() if name != "num_classes"}
    pretrained_cfg = config.get("pretrained_cfg") or _default_cfg(config["architecture"])
    config |= {"model_args": model_args, "pretrained_cfg": pretrained_cfg}
    file.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    with safe_open(weights, framework="pt") as saved:
        prefixed = any(name.startswith(PREFIX) for name in saved.keys())  # noqa: SIM118
    if prefixed:
        tensors = {name.removeprefix(PREFIX): value for name, value in load_file(weights).items()}
        save_file(tensors, weights, {"format": "pt"})


def _in_order(id2label: Mapping[int, str]) -> dict[int, str]:
    """The names by class number: the saved form is a plain list, which would take them in the order given."""
    by_number = {int(number): name for number, name in id2label.items()}
    if sorted(by_number) != list(range(len(id2label))):
        raise ValueError(
            f"id2label has the class numbers {list(id2label)}. They have to be 0 to {len(id2label) - 1}, each once."
        )
    return dict(sorted(by_number.items()))


def _description(model: nn.Module) -> tuple[dict[str, Any], dict[str, Any]]:
    """The network's `pretrained_cfg` as it is saved, and the arguments to build the network again."""
    own: Any = model.pretrained_cfg
    pretrained_cfg = {**_default_cfg(own["architecture"]), **own}
    model_args = _model_args(model)
    channels, *size = pretrained_cfg["input_size"]
    new_size = model_args.get("img_size", size)
    new_size = [new_size, new_size] if isinstance(new_size, int) else list(new_size)
    new_channels = model_args.get("in_chans", channels)
    pretrained_cfg["input_size"] = [new_channels, *new_size]
    for name in ("mean", "std"):
        values = pretrained_cfg.get(name)
        # As timm exports it: the mean of the three where they do not fit, else the image processor fails.
        if values is not None and len(values) not in (1, new_channels):
            pretrained_cfg[name] = [sum(values) / len(values)] * new_channels
    if new_size != size:
        for name in ("test_input_size", "pool_size", "test_pool_size"):
            pretrained_cfg.pop(name, None)
    # The source and file format of the pretrained weights do not describe the weights that will be saved.
    for name in ("url", "file", "hf_hub_id", "hf_hub_filename", "source", "state_dict", "num_classes", "label_offset"):
        pretrained_cfg.pop(name, None)
    pretrained_cfg["custom_load"] = False
    return json.loads(json.dumps(pretrained_cfg)), model_args


def _model_args(model: nn.Module) -> dict[str, Any]:
    """The arguments of `timm.create_model` that build the network again, as far as known and representable."""
    from timm.models import get_model_args

    # timm's function leaves out drop rates, but who trains the reloaded model further wants them.
    given = getattr(model, "_model_args", {})
    known = {name: value for name, value in given.items() if "drop" in name} | get_model_args(model)
    known.pop("num_classes", None)
    model_args = {}
    for name, value in known.items():
        try:
            model_args[name] = json.loads(json.dumps(value))
        except TypeError:
            warnings.warn(
                f"{name}={value!r} was given to timm.create_model and cannot be written to config.json: the saved "
                "model will be built without it. Give it by its name if timm has one, as in act_layer='silu'.",
                stacklevel=4,
            )
    return model_args


def _warn_of_other_tensors(model: nn.Module, rebuilt: nn.Module) -> None:
    own, other = ({name: value.shape for name, value in m.state_dict().items()} for m in (model, rebuilt))
    different = sorted(name for name in own.keys() | other.keys() if own.get(name) != other.get(name))
    if different:
        cfg: Any = model.pretrained_cfg
        warnings.warn(
            f"{len(different)} tensors of this network are not those of {cfg['architecture']} made with "
            f"its known arguments (first: {different[0]}). It can be trained, but what is saved will not load "
            "with from_pretrained or timm.create_model; keep the code that makes it.",
            stacklevel=3,
        )


def _default_cfg(architecture: str) -> dict[str, Any]:
    from timm.models import get_pretrained_cfg

    known = get_pretrained_cfg(architecture, allow_unregistered=True)
    return {} if known is None else known.to_dict(remove_source=True)

"""Bare timm models in and out of the Trainer and the Hub."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import TimmWrapperConfig, TimmWrapperForImageClassification
from transformers.utils import SAFE_WEIGHTS_NAME

PREFIX = "timm_model."


def is_timm_model(model: nn.Module) -> bool:
    """Whether a module is a timm network with a classifier, as `timm.create_model` gives it.

    Args:
        model (`torch.nn.Module`): Any module.
    """
    return isinstance(getattr(model, "pretrained_cfg", None), Mapping) and hasattr(model, "forward_head")


def wrap_timm_model(model: nn.Module, id2label: Mapping[int, str] | None = None) -> TimmWrapperForImageClassification:
    """Puts a timm network into transformers' wrapper: Trainer can feed, save and publish it.

    The network itself is taken, not a copy: an optimizer over its parameters stays valid. What was given to
    `timm.create_model` is known as far as the network tells: the input size of one with a fixed size is kept, so that
    the saved model is built alike; others (a depth, a drop rate) are not, and a network whose tensors differ for it has
    to be saved and loaded by its maker.

    Args:
        model (`torch.nn.Module`):
            A network from `timm.create_model`, with a classifier.
        id2label (`Mapping[int, str]`, *optional*):
            Class number to class name. Numbers by default.

    Returns:
        `TimmWrapperForImageClassification`: takes `pixel_values` and `labels`.

    Raises:
        ValueError: if the network has no classifier, or another number of classes than `id2label`.

    Example:

    ```python
    >>> import timm
    >>> from metalr_hf.timm_models import wrap_timm_model
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
    pretrained_cfg, model_args = _description(model)
    settings: dict[str, Any] = {
        "architecture": pretrained_cfg["architecture"],
        "pretrained_cfg": pretrained_cfg,
        "model_args": model_args,
        "num_labels": classes,
        "id2label": dict(id2label),
        "label2id": {name: i for i, name in id2label.items()},
    }
    config = TimmWrapperConfig(**settings)
    with torch.device("meta"):
        wrapper = TimmWrapperForImageClassification(config)
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
        ValueError: if the folder does not hold a timm model.
    """
    file = Path(folder) / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    if "architecture" not in config:
        raise ValueError(f"{file} is not the configuration of a timm model: it names no architecture.")
    model_args = {name: value for name, value in (config.get("model_args") or {}).items() if name != "num_classes"}
    pretrained_cfg = config.get("pretrained_cfg") or _default_cfg(config["architecture"])
    config |= {"model_args": model_args, "pretrained_cfg": pretrained_cfg}
    file.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    weights = Path(folder) / SAFE_WEIGHTS_NAME
    tensors = load_file(weights)
    if any(name.startswith(PREFIX) for name in tensors):
        save_file({name.removeprefix(PREFIX): value for name, value in tensors.items()}, weights, {"format": "pt"})


def _description(model: nn.Module) -> tuple[dict[str, Any], dict[str, Any]]:
    """The network's `pretrained_cfg` as its saved form has it, and the arguments it was visibly made with."""
    own: Any = model.pretrained_cfg
    pretrained_cfg = {**_default_cfg(own["architecture"]), **own}
    model_args: dict[str, Any] = {}
    size = getattr(getattr(model, "patch_embed", None), "img_size", None)
    if size is not None and list(size) != list(pretrained_cfg["input_size"][-2:]):
        model_args["img_size"] = list(size)
        pretrained_cfg["input_size"] = [3, *size]
    # Where its first weights came from says nothing about the ones it will be saved with.
    for name in ("url", "file", "hf_hub_id", "hf_hub_filename", "source", "state_dict", "num_classes"):
        pretrained_cfg.pop(name, None)
    return json.loads(json.dumps(pretrained_cfg)), model_args


def _default_cfg(architecture: str) -> dict[str, Any]:
    from timm.models import get_pretrained_cfg

    known = get_pretrained_cfg(architecture, allow_unregistered=True)
    return {} if known is None else known.to_dict(remove_source=True)

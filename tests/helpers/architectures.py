"""All architectures that timm and transformers know, without weights, and the order in which a forward uses them."""

from contextlib import contextmanager

import timm
import torch
import transformers
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers.initialization import no_init_weights
from transformers.models.auto import modeling_auto

TASKS = {
    "image classification": modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    "semantic segmentation": modeling_auto.MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES,
    "universal segmentation": modeling_auto.MODEL_FOR_UNIVERSAL_SEGMENTATION_MAPPING_NAMES,
    "object detection": modeling_auto.MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES,
    "backbone": modeling_auto.MODEL_FOR_BACKBONE_MAPPING_NAMES,
}
# What the default configuration lacks.
SETTINGS = {
    "BeitForSemanticSegmentation": {"out_indices": [3, 5, 7, 11]},
    "PerceiverForImageClassificationConvProcessing": {"num_cross_attention_heads": 1, "num_self_attention_heads": 1},
    "PerceiverForImageClassificationFourier": {"num_cross_attention_heads": 1, "num_self_attention_heads": 1},
    "TimmBackbone": {"backbone": "test_resnet"},
}


class _WithoutInitialisation(TorchFunctionMode):
    """Leaves out what writes into tensors: on the meta device most of the time of building a network goes there."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        writes = name.endswith("_") and not name.endswith("__") and name != "requires_grad_"
        return args[0] if writes and args and isinstance(args[0], torch.Tensor) else function(*args, **(kwargs or {}))


@contextmanager
def without_weights():
    with torch.device("meta"), _WithoutInitialisation(), no_init_weights():
        yield


def timm_network(name):
    with without_weights():
        return timm.create_model(name, num_classes=10).eval()


def hugging_face_classes(*tasks):
    """Model type and class name of every class behind the auto classes of some tasks."""
    pairs = [
        (kind, name)
        for task in tasks
        for kind, names in TASKS[task].items()
        for name in (names if isinstance(names, (tuple, list)) else (names,))
    ]
    return [pair for pair in dict.fromkeys(pairs) if pair[0] != "timm_wrapper"]


def hugging_face_network(kind, name, **settings):
    config = transformers.AutoConfig.for_model(kind, **SETTINGS.get(name, {}), **settings)
    if hasattr(config, "use_pretrained_backbone"):
        config.use_pretrained_backbone = False
    with without_weights():
        return getattr(transformers, name)(config).eval()


def image_shape(model):
    """Of an image that the model takes: channels, height, width."""
    if hasattr(model, "pretrained_cfg"):
        return tuple(model.pretrained_cfg["input_size"])
    config = model.config
    size = getattr(config, "image_size", None) or getattr(getattr(config, "vision_config", None), "image_size", 224)
    return (getattr(config, "num_channels", 3), *((size, size) if isinstance(size, int) else size))


class _FirstUses(TorchFunctionMode):
    def __init__(self, model):
        super().__init__()
        self.names = {id(p): name for name, p in model.named_parameters()}
        self.found = {}

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        # Reading a parameter's shape is no use of it.
        if getattr(function, "__name__", "") != "__get__":
            for value in (*args, *kwargs.values()):
                for tensor in value if isinstance(value, (list, tuple)) else (value,):
                    if isinstance(tensor, nn.Parameter) and id(tensor) in self.names:
                        self.found.setdefault(self.names[id(tensor)], len(self.found))
        return function(*args, **kwargs)


def layers_by_first_use(model, groups, *inputs):
    """The layers in the order in which a forward first uses a parameter of each; those it does not use are left out.

    On the meta device this costs no arithmetic.
    """
    device = next(model.parameters()).device
    with torch.no_grad(), torch.device(device), _FirstUses(model) as uses:
        model(*inputs or (torch.zeros(1, *image_shape(model), device=device),))
    used = {
        layer: min(uses.found[name] for name in members if name in uses.found)
        for layer, members in groups.items()
        if any(name in uses.found for name in members)
    }
    return sorted(used, key=used.get)

"""Small networks of one kind each: a module written by hand, and U-Nets."""

import torch
from torch import nn

from metalr_hf.models import MonaiConfig, MonaiForSemanticSegmentation, TimmUNetForSemanticSegmentation


class Network(nn.Module):
    """A small CNN, written by hand, whose argument is not called as the data's column is."""

    def __init__(self, outputs=3):
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.block = nn.Sequential(nn.Conv2d(8, 8, 3, stride=2), nn.ReLU(), nn.Conv2d(8, 8, 3))
        self.head = nn.Linear(8, outputs)

    def forward(self, x):
        return self.head(self.block(self.norm(self.stem(x))).mean((2, 3)))


NAMES = {0: "background", 1: "liver", 2: "lesion"}


def unet(encoder="test_resnet", **kwargs):
    torch.manual_seed(0)
    labels = {"id2label": NAMES, "label2id": {name: i for i, name in NAMES.items()}}
    return TimmUNetForSemanticSegmentation.from_encoder(encoder, pretrained=False, **labels, **kwargs)


def volume_network(**kwargs):
    torch.manual_seed(0)
    options = {"network_args": {"filters": [4, 8, 8]}, "patch_size": (16, 16, 8), "num_labels": 3}
    return MonaiForSemanticSegmentation(MonaiConfig(**options, **kwargs))

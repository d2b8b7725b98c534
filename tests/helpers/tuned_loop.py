"""A small model with its optimizer and scheduler, for loops written by hand."""

import torch
from torch import nn

from metalr_hf import MetaLRScheduler

IMAGES = torch.randn(96, 6, generator=torch.Generator().manual_seed(1))


LABELS = torch.randint(0, 3, (96,), generator=torch.Generator().manual_seed(2))


def make(seed=0, lr=1e-2, optimizer_class=torch.optim.AdamW, **kwargs):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 3))
    groups = [
        {"params": [model[0].weight], "layer": "stem", "weight_decay": 0.1},
        {"params": [model[0].bias, *model[1].parameters()], "layer": "stem", "weight_decay": 0.0},
        {"params": model[4].parameters(), "layer": "head"},
    ]
    optimizer = optimizer_class(groups, lr=lr)
    return model, optimizer, MetaLRScheduler(optimizer, **kwargs)


def loss_of(model, rows):
    return nn.functional.cross_entropy(model(IMAGES[rows]), LABELS[rows])

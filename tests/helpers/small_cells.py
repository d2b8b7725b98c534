"""Cells of a comparison that run in a second."""

import datasets
import numpy as np
import torch
from torch import nn

from metalr_hf.compare import Cell, Comparison


class Network(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3)
        self.layer1 = nn.Sequential(*[nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 1)) for _ in range(2)])
        self.fc = nn.Linear(4, classes)

    def forward(self, x):
        return self.fc(self.layer1(self.conv1(x).relu()).relu().mean((2, 3)))


def rows(n, seed):
    generator = np.random.default_rng(seed)
    labels = np.arange(n) % 3
    images = generator.normal(size=(n, 3, 8, 8)).astype("float32")
    images[np.arange(n), labels] += 1
    features = datasets.Features(
        image=datasets.Array3D((3, 8, 8), "float32"),
        label=datasets.ClassLabel(names=["red", "green", "blue"]),
        patient=datasets.Value("int64"),
    )
    return datasets.Dataset.from_dict(
        {"image": images, "label": labels, "patient": np.arange(n) // 4}, features=features
    )


def transform(batch):
    return {"pixel_values": [torch.as_tensor(image) for image in batch["image"]], "labels": batch["label"]}


def cell(name="small", train=48, test=30):
    return Cell(name, lambda classes: Network(len(classes)), rows(train, 0), rows(test, 1), transform, transform)


def comparison(**kwargs):
    defaults = {
        "strategies": ["cosine", "metalr_uncalibrated"],
        "learning_rates": [1e-3, 1e-2],
        "seeds": [0],
        "steps": 4,
    }
    return Comparison(**{**defaults, "batch_size": 8, **kwargs})

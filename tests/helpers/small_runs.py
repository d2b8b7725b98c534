"""Small images, models and runs for the tests, and what two runs are compared by."""

import datasets
import torch
from torch.utils.data import DataLoader, IterableDataset
from transformers import (
    ResNetConfig,
    ResNetForImageClassification,
    TrainerCallback,
    ViTConfig,
    ViTForImageClassification,
    set_seed,
)

from metalr_hf import MetaLRTrainer, MetaLRTrainingArguments
from metalr_hf.tuning.rules import Rule


class Keep(Rule):
    """Leaves the rates alone: all of tuning but for what comes of it."""

    def __call__(self, lr, hypergradient):
        return lr


LABELS = [i % 3 for i in range(48)]


def images(n=48, seed=0):
    pixels = torch.randn(n, 3, 16, 16, generator=torch.Generator().manual_seed(seed))
    for i in range(n):
        pixels[i, LABELS[i]] += 1.0
    return datasets.Dataset.from_dict(
        {"pixel_values": pixels.numpy(), "labels": LABELS[:n]},
        features=datasets.Features(
            pixel_values=datasets.Array3D((3, 16, 16), "float32"), labels=datasets.ClassLabel(names=["a", "b", "c"])
        ),
    ).with_format("torch")


def vit(dropout=0.1):
    set_seed(0)
    return ViTForImageClassification(
        ViTConfig(
            hidden_size=16,
            num_hidden_layers=3,
            num_attention_heads=2,
            intermediate_size=32,
            image_size=16,
            patch_size=8,
            num_labels=3,
            hidden_dropout_prob=dropout,
        )
    )


def resnet():
    set_seed(0)
    return ResNetForImageClassification(
        ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=3)
    )


STOPPING = {
    "stop_when_converged": True,
    "max_steps": -1,
    "save_strategy": "steps",
    "logging_steps": 1000,
    "learning_rate": 3e-3,
    "per_device_train_batch_size": 16,
}


def arguments(folder, **kwargs):
    defaults = {
        "max_steps": 6,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "calibrate": False,
        "meta_every": 1,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return MetaLRTrainingArguments(str(folder), **{**defaults, **kwargs})


OF_TRAINER = ("layer_groups", "optimizers", "compute_loss_func", "callbacks")


def trainer(folder, model=None, train_dataset=None, meta_dataset=None, eval_dataset=None, **kwargs):
    own = {key: kwargs.pop(key) for key in OF_TRAINER if key in kwargs}
    return MetaLRTrainer(
        model=vit() if model is None else model,
        args=arguments(folder, **kwargs),
        train_dataset=images() if train_dataset is None else train_dataset,
        meta_dataset=meta_dataset,
        eval_dataset=eval_dataset,
        **own,
    )


def noisy(n=24):
    """Images a third of which have the label of another class: to learn them all is to overfit."""
    rows = images(n)
    labels = [(label + (i % 8 < 3)) % 3 for i, label in enumerate(torch.tensor(rows["labels"]).tolist())]
    return rows.remove_columns("labels").add_column("labels", labels)


class OwnLoader:
    """Makes a Trainer one whose images only the loader knows, as the library's maintainers recommend."""

    def get_train_dataloader(self):
        rows = images()
        return DataLoader([dict(rows[i]) for i in range(len(rows))], batch_size=self._train_batch_size)


class Kill(TrainerCallback):
    """Sets all weights to zero before a step: a network that answers every image alike."""

    def __init__(self, at):
        self.at = at

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == self.at:
            with torch.no_grad():
                for p in model.parameters():
                    p.zero_()


class ReadOnce(IterableDataset):
    """Rows that are gone when they have been read."""

    def __init__(self, rows):
        self.rows = iter(rows)

    def __iter__(self):
        return self.rows


def streamed(rows):
    return rows.to_iterable_dataset(num_shards=4).shuffle(seed=0, buffer_size=8)


def losses(trained):
    return [row["loss"] for row in trained.state.log_history if "loss" in row]


def same_weights(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))

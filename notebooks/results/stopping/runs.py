"""Runs that stop by themselves, beside runs of 60, 240 and 1,000 steps.

`python notebooks/results/stopping/runs.py` runs EfficientNet-Lite0 on the digits, with two seeds, and adds what is
missing to `runs.jsonl`. `runs_of_cell` does it for another network and other images.
"""

import json
import tempfile
from pathlib import Path

import torch
from transformers import PrinterCallback, TrainerCallback, set_seed

from metalr_hf import MetaLRTrainer, MetaLRTrainingArguments
from metalr_hf.compare.hunt import Pixels
from metalr_hf.models.bare import Classifier

HERE = Path(__file__).parent
IMAGES, HELD_BACK, LENGTHS = 500, 50, (60, 240, 1000)


def rows_of(pixels, labels):
    return [{"pixel_values": image, "labels": int(label)} for image, label in zip(pixels, labels, strict=True)]


def training_rows(pixels, seed, noise):
    """Images drawn at random, of which each tenth is to be held back, and a share of which has another label."""
    generator, classes = torch.Generator().manual_seed(seed), pixels.classes
    drawn = torch.randperm(len(pixels.train_labels), generator=generator)[:IMAGES]
    labels = pixels.train_labels[drawn].clone()
    flipped = torch.randperm(len(labels), generator=generator)[: round(noise * len(labels))]
    labels[flipped] = (labels[flipped] + torch.randint(1, classes, (len(flipped),), generator=generator)) % classes
    # Of each class its share.
    order = labels.sort(stable=True).indices
    return rows_of(pixels.train[drawn][order], labels[order])


def balanced_accuracy(predicted):
    hits, labels = torch.tensor(predicted.predictions.argmax(1) == predicted.label_ids), predicted.label_ids
    return {"balanced": float(torch.stack([hits[labels == k].float().mean() for k in sorted(set(labels))]).mean())}


class LooksAtTheAverage(TrainerCallback):
    """Notes the test accuracy of the average at some steps, and where all images are let in."""

    def __init__(self, test, lengths=()):
        self.trainer, self.test, self.lengths, self.found = None, test, lengths, {}

    def look(self, name):
        self.found[name] = round(self.trainer.predict(self.test).metrics["test_balanced"], 4)

    def on_step_begin(self, args, state, control, **kwargs):
        if getattr(self.trainer, "all_images_from", None) == state.global_step > 0:
            self.look("450 images")

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step in self.lengths:
            self.look(f"{state.global_step:,} steps")


def train(network, looks, train_dataset, arguments, **options):
    with tempfile.TemporaryDirectory() as scratch:
        args = MetaLRTrainingArguments(
            scratch,
            per_device_eval_batch_size=50,
            weight_decay=0.01,
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            dataloader_pin_memory=False,
            **arguments,
        )
        trainer = MetaLRTrainer(
            Classifier(network), args, train_dataset=train_dataset, compute_metrics=balanced_accuracy, **options
        )
        looks.trainer = trainer
        trainer.add_callback(looks)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return trainer


def runs_of_cell(
    cell, make_network, pixels, seeds=(0, 1), batch=32, noise=0.0, lengths=LENGTHS, output=HERE / "runs.jsonl"
):
    """Two runs for each seed that is missing: one that stops by itself, and one that is looked at after some steps.

    Args:
        cell (`str`): What it is called.
        make_network (`Callable[[int], torch.nn.Module]`): The number of classes to a network with a fresh head.
        pixels ([`~metalr_hf.compare.hunt.Pixels`]): The images.
        seeds (`Sequence[int]`): Draw the training images and the fresh head.
        batch (`int`): Images of a step.
        noise (`float`): Share of the labels that is flipped.
        lengths (`Sequence[int]`): Steps after which the long run is looked at.
        output (`Path`): Gets a line for each seed.
    """
    lines = output.read_text(encoding="utf-8").splitlines() if output.exists() else []
    done = {(row["cell"], row["seed"]) for row in map(json.loads, lines)}
    test = rows_of(pixels.test, pixels.test_labels)
    for seed in seeds:
        if (cell, seed) in done:
            continue
        rows = training_rows(pixels, seed, noise)
        held_back = rows[:: IMAGES // HELD_BACK]
        kept = [row for place, row in enumerate(rows) if place % (IMAGES // HELD_BACK)]
        arguments = {"per_device_train_batch_size": batch, "seed": seed}
        set_seed(seed)
        fixed = LooksAtTheAverage(test, lengths)
        train(make_network(pixels.classes), fixed, rows, arguments | {"max_steps": max(lengths), "save_strategy": "no"})
        set_seed(seed)
        looks = LooksAtTheAverage(test)
        network, arguments = make_network(pixels.classes), arguments | {"stop_when_converged": True}
        trainer = train(network, looks, kept, arguments, eval_dataset=held_back, held_back=held_back)
        looks.look("stops by itself")
        row = {
            "cell": cell,
            "seed": seed,
            "steps": trainer.state.global_step,
            "model": trainer.state.best_global_step,
            "converged": trainer.all_images_from,
        }
        with output.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row | looks.found | fixed.found) + "\n")


if __name__ == "__main__":
    from torchvision.transforms.functional import resize, to_tensor

    from metalr_hf.data import demo_dataset
    from metalr_hf.models import demo_model

    parts = []
    for split in demo_dataset().values():
        images = [resize(to_tensor(image.convert("RGB")), [32, 32], antialias=True) for image in split["image"]]
        parts += [2 * torch.stack(images) - 1, torch.tensor(split["label"])]

    def network(classes):
        return demo_model({k: str(k) for k in range(classes)}).timm_model

    runs_of_cell("EfficientNet-Lite0 → digits", network, Pixels(*parts))

"""The hunt for dead runs: short runs over cells that vary what can fool a calibration, against a small grid."""

from __future__ import annotations

import os
import random
import tempfile
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PrinterCallback, set_seed

from ..layers.groups import layer_groups
from ..models.bare import Classifier
from .results import RESULTS, append_line, keep_settings, mend_lines, only_process
from .strategies import Job, get_strategy

STEPS, TEST_IMAGES = 60, 1000
RATES = {"adamw": (1e-4, 3e-4, 1e-3, 3e-3), "sgd": (1e-3, 1e-2, 1e-1)}
OPTIMIZERS: dict[str, dict[str, str]] = {"adamw": {}, "sgd": {"optim": "sgd", "optim_args": "momentum=0.9"}}
# A run is dead if it ends this far below the best run of its cell's grid, or this share of the way to chance.
DEAD_POINTS, DEAD_SHARE = 0.05, 0.2


@dataclass(frozen=True)
class Trap:
    """A cell of the hunt.

    Args:
        backbone (`str`): Name of the pretrained network.
        data (`str`): Name of the data set.
        images (`int`, *optional*, defaults to 500): Training images.
        batch (`int`, *optional*, defaults to 32): Images a step.
        head (`float`, *optional*, defaults to 1.0): Factor of the fresh head's weights.
        imbalance (`int`, *optional*, defaults to 1): So many times as many images of the first class as of all others.
            With 1 the shares are those of the data set.
        noise (`float`, *optional*, defaults to 0.0): Share of the training labels that is flipped to another class.
        optim (`str`, *optional*, defaults to `"adamw"`): `"adamw"`, or `"sgd"` with a momentum of 0.9.
        decay (`float`, *optional*, defaults to 0.01): Weight decay.

    Example:

    ```python
    >>> from metalr_hf.compare.hunt import Trap
    >>> Trap("vit", "digits", head=10, optim="sgd").name
    'vit-digits-500-b32-head10x-sgd'

    ```
    """

    backbone: str
    data: str
    images: int = 500
    batch: int = 32
    head: float = 1.0
    imbalance: int = 1
    noise: float = 0.0
    optim: str = "adamw"
    decay: float = 0.01

    @property
    def name(self) -> str:
        """What it is called in the results."""
        parts = [self.backbone, self.data, str(self.images), f"b{self.batch}"]
        parts += [f"head{self.head:g}x"] * (self.head != 1) + [f"{self.imbalance}to1"] * (self.imbalance != 1)
        parts += [f"flip{self.noise:g}"] * (self.noise != 0) + [self.optim] * (self.optim != "adamw")
        return "-".join(parts + [f"wd{self.decay:g}"] * (self.decay != 0.01))


@dataclass
class Pixels:
    """A data set in memory, so that images cost nothing: normalised pixels, and the class of every image.

    Args:
        train (`torch.Tensor` of shape `(images, channels, height, width)`): Training images.
        train_labels (`torch.Tensor` of shape `(images,)`, int64): Their classes.
        test (`torch.Tensor`), test_labels (`torch.Tensor`): The same to test on.
    """

    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor

    @property
    def classes(self) -> int:
        """How many there are."""
        return int(self.train_labels.max()) + 1


def hunt(
    traps: Sequence[Trap],
    make_model: Callable[[Trap, int], nn.Module],
    data: Callable[[Trap], Pixels],
    output_dir: str | os.PathLike[str],
    strategies: Mapping[str, Sequence[int]],
) -> list[dict[str, Any]]:
    """Runs what is missing of a hunt.

    Args:
        traps (`Sequence[Trap]`): The cells.
        make_model (`Callable[[Trap, int], torch.nn.Module]`): A cell and the number of classes to a pretrained network
            from pixels to logits, with a fresh head.
        data (`Callable[[Trap], Pixels]`): The data set of a cell.
        output_dir (`str` or `os.PathLike`): Gets `results.jsonl`, a line per run, appended when it ends, and
            `settings.json`.
        strategies (`Mapping[str, Sequence[int]]`): Names of strategies to the seeds that they are run with. One that
            looks at the learning rate is run at every rate of the grid.

    Returns:
        `list[dict]`: the results of all runs.
    """
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    with only_process(folder):
        keep_settings(folder, {"steps": STEPS, "test_images": TEST_IMAGES})
        rows = mend_lines(folder / RESULTS)
        done = {(row["cell"], row["strategy"], row["learning_rate"], row["seed"]) for row in rows}
        runs = [
            (trap, name, rate, seed)
            for name, seeds in strategies.items()
            for seed, trap in product(seeds, traps)
            for rate in (RATES[trap.optim] if get_strategy(name).uses_learning_rate else (None,))
        ]
        for trap, name, rate, seed in runs:
            if (trap.name, name, rate, seed) not in done:
                row = run_trap(trap, name, rate, seed, make_model, data(trap))
                append_line(folder / RESULTS, row)
                rows.append(row)
    return rows


def halves(traps: Sequence[Trap], seed: int) -> tuple[list[Trap], list[Trap]]:
    """Draws the half of the cells that settings are developed on, and the one that is left untouched.

    Every backbone's cells are halved by themselves; of odd numbers of cells each half gets the larger part in turn.

    Args:
        traps (`Sequence[Trap]`): The cells.
        seed (`int`): Of the draw.

    Returns:
        `tuple[list[Trap], list[Trap]]`: the half to develop on, and the one to hold out.

    Example:

    ```python
    >>> from metalr_hf.compare.hunt import Trap, halves
    >>> develop, held_out = halves([Trap("vit", "digits", images=n) for n in (100, 200, 300, 400)], seed=0)
    >>> len(develop), len(held_out)
    (2, 2)

    ```
    """
    draw, odd = random.Random(seed), 0
    by_backbone: dict[str, list[Trap]] = defaultdict(list)
    for trap in traps:
        by_backbone[trap.backbone].append(trap)
    develop: list[Trap] = []
    held_out: list[Trap] = []
    for members in by_backbone.values():
        draw.shuffle(members)
        half = (len(members) + odd) // 2
        odd ^= len(members) % 2
        develop += members[:half]
        held_out += members[half:]
    return develop, held_out


def run_trap(
    trap: Trap,
    strategy: str,
    learning_rate: float | None,
    seed: int,
    make_model: Callable[[Trap, int], nn.Module],
    pixels: Pixels,
) -> dict[str, Any]:
    """One run of the hunt.

    Args:
        trap (`Trap`): The cell.
        strategy (`str`): Name of a registered strategy.
        learning_rate (`float`, *optional*): Of a strategy that looks at it.
        seed (`int`): Draws the training images, the flipped labels, the head and the order.
        make_model (`Callable`): See [`hunt`].
        pixels (`Pixels`): The data set.

    Returns:
        `dict`: the run, its balanced accuracy on the test images, chance, the rates that it calibrated and what it
            cost in training passes over those of a plain run.
    """
    images, labels = _training_set(trap, pixels, seed)
    set_seed(seed)
    network = make_model(trap, pixels.classes)
    _scale_head(network, trap.head)
    arguments = {
        "max_steps": STEPS,
        "per_device_train_batch_size": trap.batch,
        "weight_decay": trap.decay,
        "seed": seed,
        "save_strategy": "no",
        "logging_strategy": "no",
        "logging_nan_inf_filter": False,
        "report_to": "none",
        "disable_tqdm": True,
        "log_level": "error",
        "dataloader_pin_memory": False,
        **OPTIMIZERS[trap.optim],
    }
    rows = [{"pixel_values": image, "labels": int(label)} for image, label in zip(images, labels, strict=True)]
    with tempfile.TemporaryDirectory() as scratch:
        model, rate = Classifier(network), learning_rate or 5e-5
        trainer = get_strategy(strategy).make_trainer(
            Job(model, rate, {"output_dir": scratch, **arguments}, {"train_dataset": rows})
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    scheduler = trainer.lr_scheduler
    found = getattr(scheduler, "calibration", None)
    return {
        "cell": trap.name,
        "strategy": strategy,
        "learning_rate": learning_rate,
        "seed": seed,
        "balanced_accuracy": round(_balanced_accuracy(network, pixels), 4),
        "chance": round(1 / pixels.classes, 4),
        "backbone_lr": None if found is None else float(f"{found.backbone_lr:.3g}"),
        "head_lr": None if found is None else float(f"{found.head_lr:.3g}"),
        "restarted_at": getattr(scheduler, "restarted_at", 0),
        "cost": round(1 + getattr(scheduler, "extra_passes", 0.0) / STEPS, 3),
    }


def is_dead(accuracy: float, best: float, chance: float) -> bool:
    """Whether a run ended so far below the best of its cell's grid that it counts as dead.

    Args:
        accuracy (`float`): Of the run.
        best (`float`): Of the best run of the grid.
        chance (`float`): Of an answer by chance.

    Returns:
        `bool`

    Example:

    ```python
    >>> from metalr_hf.compare.hunt import is_dead
    >>> is_dead(0.78, best=0.8, chance=0.1), is_dead(0.74, best=0.8, chance=0.1), is_dead(0.54, best=0.56, chance=0.5)
    (False, True, True)

    ```
    """
    return accuracy < best - DEAD_POINTS or accuracy < chance + (1 - DEAD_SHARE) * (best - chance)


def dead_runs(rows: Sequence[dict[str, Any]], grid: str = "cosine") -> dict[str, list[dict[str, Any]]]:
    """The dead runs of every strategy but the grid's.

    Args:
        rows (`Sequence[dict]`): What [`hunt`] returned.
        grid (`str`, *optional*, defaults to `"cosine"`): The strategy whose best run a run is held against.

    Returns:
        `dict[str, list[dict]]`: strategy to its dead runs, each with `best`, the accuracy that it fell short of.

    Example:

    ```python
    >>> from metalr_hf.compare.hunt import dead_runs
    >>> run = {"cell": "vit-digits", "chance": 0.1}
    >>> rows = [{**run, "strategy": "cosine", "balanced_accuracy": 0.8}]
    >>> rows += [{**run, "strategy": "metalr", "balanced_accuracy": accuracy} for accuracy in (0.78, 0.1)]
    >>> [run["balanced_accuracy"] for run in dead_runs(rows)["metalr"]]
    [0.1]

    ```
    """
    best: dict[str, float] = defaultdict(float)
    for row in rows:
        if row["strategy"] == grid:
            best[row["cell"]] = max(best[row["cell"]], row["balanced_accuracy"])
    dead: dict[str, list[dict[str, Any]]] = {row["strategy"]: [] for row in rows if row["strategy"] != grid}
    for row in rows:
        held_against_grid = row["strategy"] != grid and row["cell"] in best
        if held_against_grid and is_dead(row["balanced_accuracy"], best[row["cell"]], row["chance"]):
            dead[row["strategy"]].append({**row, "best": best[row["cell"]]})
    return dead


def balanced_subset(pixels: Tensor, labels: Tensor, size: int = TEST_IMAGES) -> tuple[Tensor, Tensor]:
    """As many images of every class, the same in every run.

    Args:
        pixels (`torch.Tensor` of shape `(images, ...)`): Images.
        labels (`torch.Tensor` of shape `(images,)`): Their classes.
        size (`int`, *optional*, defaults to 1000): How many, all classes together, if there are enough.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: images and their classes.
    """
    generator, classes = torch.Generator().manual_seed(1), int(labels.max()) + 1
    rows = [_drawn(labels, k, max(1, size // classes), generator) for k in range(classes)]
    return pixels[torch.cat(rows)], labels[torch.cat(rows)]


def _training_set(trap: Trap, pixels: Pixels, seed: int) -> tuple[Tensor, Tensor]:
    generator, classes, labels = torch.Generator().manual_seed(1000 + seed), pixels.classes, pixels.train_labels
    shares = torch.bincount(labels, minlength=classes).float()
    if trap.imbalance > 1:
        shares = torch.ones(classes)
        shares[0] = trap.imbalance * (classes - 1)
    shares = shares / shares.sum()
    sizes = [max(1, round(float(share) * trap.images)) for share in shares]
    rows = torch.cat([_drawn(labels, k, size, generator) for k, size in enumerate(sizes)])
    images, labels = pixels.train[rows], labels[rows].clone()
    if trap.noise:
        generator = torch.Generator().manual_seed(2000 + seed)
        flipped = torch.randperm(len(labels), generator=generator)[: round(trap.noise * len(labels))]
        others = torch.randint(1, classes, (len(flipped),), generator=generator)
        labels[flipped] = (labels[flipped] + others) % classes
    return images, labels


def _drawn(labels: Tensor, k: int, size: int, generator: torch.Generator) -> Tensor:
    rows = (labels == k).nonzero()[:, 0]
    return rows[torch.randperm(len(rows), generator=generator)][:size]


@torch.no_grad()
def _scale_head(network: nn.Module, factor: float) -> None:
    head = set(list(layer_groups(network).values())[-1])
    for name, parameter in network.named_parameters():
        if name in head and parameter.dim() > 1:
            parameter.mul_(factor)


@torch.no_grad()
def _balanced_accuracy(network: nn.Module, pixels: Pixels) -> float:
    images, labels = balanced_subset(pixels.test, pixels.test_labels)
    network.eval()
    device = next(network.parameters()).device
    logits = torch.cat([network(batch.to(device)).cpu() for batch in images.split(100)])
    if not logits.isfinite().all():
        return 1 / pixels.classes
    hits = (logits.argmax(-1) == labels).float()
    return float(torch.stack([hits[labels == k].mean() for k in range(pixels.classes)]).mean())

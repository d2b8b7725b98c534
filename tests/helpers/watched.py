"""One run of a strategy on small rows, and what its optimizer did at every step."""

import math

import torch
from small_cells import Network, rows, transform
from transformers import Trainer, TrainerCallback, TrainingArguments, default_data_collator

from metalr_hf import layer_groups
from metalr_hf.compare.strategies import HeldOut, Job, get_strategy
from metalr_hf.models.bare import Classifier

LAYERS = ["stem", "layer1.0", "layer1.1", "head"]


class Watch(TrainerCallback):
    """The rates that the optimizer uses and the gradients that it gets, at every step."""

    def __init__(self):
        self.rates, self.gradients, self.weights = [], [], []

    def on_pre_optimizer_step(self, args, state, control, model, optimizer, **kwargs):
        self.rates.append({group.get("layer", i): group["lr"] for i, group in enumerate(optimizer.param_groups)})
        parameters = dict(model.named_parameters())
        self.gradients.append({name: None if p.grad is None else p.grad.clone() for name, p in parameters.items()})
        self.weights.append({name: p.detach().clone() for name, p in parameters.items()})


def run(tmp_path, name, steps=6, learning_rate=1e-2, **options):
    torch.manual_seed(0)
    # Where a strategy tries rates, there is one that it may have.
    search = {
        "learning_rates": (learning_rate,),
        "hold_out": lambda: HeldOut(prepared(12, 0), lambda trained: (1.0, 0.0)),
    }
    job = Job(
        **{**search, **options},
        model=Classifier(Network(3)),
        learning_rate=learning_rate,
        arguments={
            "output_dir": str(tmp_path),
            "max_steps": steps,
            "per_device_train_batch_size": 8,
            "weight_decay": 0.1,
            "remove_unused_columns": False,
            "save_strategy": "no",
            "report_to": "none",
            "use_cpu": True,
            "disable_tqdm": True,
        },
        trainer_arguments={"train_dataset": prepared(16, 0), "data_collator": default_data_collator},
    )
    groups = layer_groups(job.model)
    trainer, watch = get_strategy(name).make_trainer(job), Watch()
    trainer.add_callback(watch)
    watch.trainer = trainer
    before = {name: p.detach().clone() for name, p in job.model.named_parameters()}
    trainer.train()
    moved = {name: not torch.equal(before[name], p) for name, p in job.model.named_parameters()}
    by_layer = {layer: any(moved[name] for name in names) for layer, names in groups.items()}
    return watch, groups, by_layer


def cosine(step, steps=6):
    return 0.5 * (1 + math.cos(math.pi * step / steps))


def prepared(n, seed):
    return rows(n, seed).select_columns(["image", "label"]).with_transform(transform)


def trainer_of(tmp_path, model):
    args = TrainingArguments(
        str(tmp_path), max_steps=2, weight_decay=0.1, report_to="none", use_cpu=True, remove_unused_columns=False
    )
    return Trainer(model, args, train_dataset=prepared(16, 0), data_collator=default_data_collator)


def batches(n):
    data = prepared(8 * n, 3)
    return [default_data_collator([data[8 * i + k] for k in range(8)]) for i in range(n)]

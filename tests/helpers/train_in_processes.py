"""Some runs, one after the other, in several processes: `python train_in_processes.py RUNS.json PROCESSES`."""

import json
import os
import socket
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from safetensors.torch import save_file
from small_runs import Kill, images, resnet, streamed, vit
from torch import multiprocessing, nn
from torch.profiler import profile
from torch.utils.data import IterableDataset
from transformers import TrainerCallback, default_data_collator, set_seed

from metalr_hf import MetaLRTrainer, MetaLRTrainingArguments
from metalr_hf.models.target_losses import ClassLoss
from metalr_hf.trainer.stopping import convergence
from metalr_hf.tuning.sharding import local, whole

torch.set_num_threads(1)


def vit_with_an_unused_layer():
    model = vit(dropout=0.0)
    model.vit.unused = nn.Linear(4, 4)
    return model


MODELS = {
    "vit": lambda: vit(dropout=0.0),
    "vit with dropout": vit,
    "vit with an unused layer": vit_with_an_unused_layer,
    "resnet": resnet,
}
# Does not divide evenly by two processes.
META_ROWS = 21


class Rows(IterableDataset):
    def __iter__(self):
        yield from images(META_ROWS, seed=1)


TRAINING_SETS = {"table": images, "stream": lambda: streamed(images())}
META_SETS = {None: lambda: None, "stream": lambda: streamed(images(META_ROWS, seed=1)), "rows": Rows}


def without_the_last(rows):
    """As a collator does that leaves out an image it cannot use."""
    return default_data_collator(rows[:-1])


def names(inputs):
    """A figure that tells every image from the others."""
    return inputs["pixel_values"][:, 0, 0, 0].tolist()


class TrainerOfTheTest(MetaLRTrainer):
    """accelerate shards on accelerators only; torch's `fully_shard`, which it calls, is at home on a CPU."""

    spoiled_step = None
    slow_to_save = False

    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        if self.args.fsdp:
            state = self.accelerator.state
            state.distributed_type = DistributedType.FSDP
            state.fsdp_plugin = FullyShardedDataParallelPlugin(**self.args.fsdp_plugin_args)
            self.is_fsdp_enabled = True

    def training_step(self, model, inputs, *args, **kwargs):
        self.train_rows += names(inputs)
        return super().training_step(model, inputs, *args, **kwargs)

    def _save_rng_state(self, output_dir):
        if self.slow_to_save and self.args.process_index == 1:
            time.sleep(0.2)
        super()._save_rng_state(output_dir)

    def compute_meta_loss(self, inputs):
        # The same batch is looked at several times where it calibrates.
        if self.meta_rows[-len(inputs["labels"]) :] != names(inputs):
            self.meta_rows += names(inputs)
        loss = super().compute_meta_loss(inputs)
        spoiled = self.args.process_index == 1 and self.state.global_step == self.spoiled_step
        return loss * float("nan") if spoiled else loss


class Rates(TrainerCallback):
    """Every step's learning rates, as this process has them."""

    def __init__(self):
        self.rates = []

    def on_step_end(self, args, state, control, lr_scheduler=None, **kwargs):
        self.rates.append(lr_scheduler.learning_rates.tolist())


class SaveAlone(TrainerCallback):
    """One process saves, as in many a script."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.is_world_process_zero and state.global_step == 3:
            self.trainer.save_model(str(Path(args.output_dir) / "alone"))


def run(
    folder,
    model="vit",
    train="table",
    meta=None,
    resume=None,
    spoiled_step=None,
    slow_to_save=False,
    profiled=False,
    evaluated_on=0,
    holds_back=False,
    first_stop=convergence.FIRST_STOP,
    saves_alone=False,
    class_loss=False,
    killed_at=None,
    shorter_in_one=False,
    **arguments,
):
    folder = Path(folder)
    set_seed(0)
    defaults = {
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "max_steps": 12,
        "meta_every": 1,
    }
    args = MetaLRTrainingArguments(str(folder), **{**defaults, **arguments})
    rates = Rates()
    trainer = TrainerOfTheTest(
        model=MODELS[model](),
        args=args,
        train_dataset=TRAINING_SETS[train](),
        eval_dataset=images(evaluated_on, seed=1) if evaluated_on else None,
        meta_dataset=META_SETS[meta](),
        held_back=images(evaluated_on, seed=1) if holds_back else None,
        callbacks=[rates],
        compute_loss_func=ClassLoss([1.0, 1.0, 1.0]) if class_loss else None,
        data_collator=without_the_last if shorter_in_one and args.process_index == 1 else None,
    )
    if killed_at is not None:
        trainer.add_callback(Kill(at=killed_at))
    if saves_alone:
        trainer.add_callback(save := SaveAlone())
        save.trainer = trainer
    trainer.spoiled_step, trainer.slow_to_save = spoiled_step, slow_to_save
    trainer.train_rows, trainer.meta_rows = [], []
    with profile(record_shapes=True) if profiled else nullcontext() as profiler, pytest.MonkeyPatch.context() as patch:
        patch.setattr(convergence, "FIRST_STOP", first_stop)
        trainer.train(resume_from_checkpoint=resume)
    events = profiler.events() if profiled else []
    model = trainer.accelerator.unwrap_model(trainer.model_wrapped)
    weights = {name: whole(local(p), p).clone() for name, p in model.state_dict().items()}
    result = {
        "rates": rates.rates,
        "steps": [trainer.state.global_step, trainer.state.best_global_step],
        "calibration_forwards": trainer.lr_scheduler.calibration_forwards,
        "stopped_because": trainer.stopped_because,
        "fitted_to": trainer.fresh_head.images,
        "refined_on": trainer.last_features.images,
        "restarted_at": trainer.lr_scheduler.restarted_at,
        "reduced": [event.input_shapes for event in events if event.name == "gloo:all_reduce"],
        "non_finite": trainer.lr_scheduler.guard.non_finite,
        "history": trainer.lr_history.learning_rates.tolist(),
        "train_rows": trainer.train_rows,
        "meta_rows": trainer.meta_rows,
        "sharded": sum(p is not local(p) and p.shape != local(p).shape for p in model.parameters()),
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"process_{args.process_index}.json").write_text(json.dumps(result))
    if args.process_index == 0:
        save_file(weights, folder / "weights.safetensors")


def run_all(rank, port, runs, processes):
    """The part of one process, which `torchrun` would start with these variables."""
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": processes}
    os.environ.update({name: str(value) for name, value in {**address, "RANK": rank, "LOCAL_RANK": rank}.items()})
    for options in runs:
        run(**options)


if __name__ == "__main__":
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    runs, processes = json.loads(Path(sys.argv[1]).read_text()), int(sys.argv[2])
    # Importing takes longer than most runs. Forked processes need not do it again.
    multiprocessing.start_processes(run_all, (port, runs, processes), processes, start_method="fork")

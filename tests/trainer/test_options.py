"""Options of Trainer that tuning meets, each in a run of a few tuned steps."""

import datasets
import pytest
import torch
from small_runs import LABELS, arguments, images, losses, same_weights, trainer, vit
from transformers import EarlyStoppingCallback, TrainerCallback, TrainingArguments, set_seed

from metalr_hf import MetaLRTrainer
from metalr_hf.trainer.batches import create_meta_stream
from metalr_hf.tuning.guard import TuningGuard

SOURCES = ("stream", "next_batch")


def trained(folder, model=None, callbacks=None, **options):
    run = trainer(folder, model or vit(), eval_dataset=images(24, seed=1), **{"calibrate": True, **options})
    for callback in callbacks or []:
        run.add_callback(callback)
    run.train()
    return run


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize(
    "options",
    [
        pytest.param(
            {"activation_checkpointing": True},
            marks=pytest.mark.skipif(
                not hasattr(TrainingArguments, "activation_checkpointing"), reason="newer than this transformers"
            ),
        ),
        {"torch_empty_cache_steps": 1},
        {"dataloader_num_workers": 2, "dataloader_persistent_workers": True},
    ],
    ids=lambda options: "-".join(options),
)
def test_what_changes_nothing_for_the_model_changes_nothing_for_the_rates(tmp_path, source, options):
    plain = trained(tmp_path / "a", meta_source=source)
    other = trained(tmp_path / "b", meta_source=source, **options)
    assert same_weights(plain.model, other.model)
    assert (plain.lr_history.learning_rates == other.lr_history.learning_rates).all()


@pytest.mark.parametrize("source", SOURCES)
def test_a_compiled_model_is_tuned(tmp_path, source):
    # The eager backend traces without a C++ compiler.
    run = trained(tmp_path, meta_source=source, torch_compile=True, torch_compile_backend="eager")
    assert len(run.lr_history) == 6
    rates = run.lr_history.learning_rates
    assert (rates[-1] != rates[0]).all()


@pytest.mark.parametrize("source", SOURCES)
def test_several_gpus_of_one_process(tmp_path, source):
    # Without GPUs DataParallel hands everything on to the module: what is met is Trainer's code for several GPUs.
    plain = trained(tmp_path / "a", meta_source=source, meta_batch_size=6)
    args = arguments(tmp_path / "b", meta_source=source, per_device_train_batch_size=4, meta_batch_size=3)
    args.calibrate, args._n_gpu = True, 2
    run = MetaLRTrainer(model=vit(), args=args, train_dataset=images())
    run.train()
    assert isinstance(run.model_wrapped, torch.nn.DataParallel)
    rates = run.lr_history.learning_rates
    assert rates[0] == pytest.approx(plain.lr_history.learning_rates[0])
    assert (rates[-1] != rates[0]).all()
    if source == "stream":
        assert run.lr_history.meta_losses == pytest.approx(plain.lr_history.meta_losses, rel=0.02, nan_ok=True)


@pytest.mark.parametrize("source", SOURCES)
def test_training_twice_is_twice_the_same_run(tmp_path, source):
    run = trainer(tmp_path, vit(), meta_source=source, calibrate=True)
    start, ends, histories = {name: value.clone() for name, value in run.model.state_dict().items()}, [], []
    for _ in range(2):
        run.model.load_state_dict(start)
        set_seed(1)
        run.train()
        ends.append({name: value.clone() for name, value in run.model.state_dict().items()})
        histories.append(run.lr_history)
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in start)
    assert histories[0] is not histories[1]
    assert (histories[0].learning_rates == histories[1].learning_rates).all()
    assert histories[1].steps.tolist() == list(range(6))


@pytest.mark.parametrize("source", SOURCES)
def test_a_batch_that_does_not_fit_is_halved_and_the_run_starts_over(tmp_path, source):
    class Full(MetaLRTrainer):
        def training_step(self, model, inputs, *args, **kwargs):
            if len(inputs["labels"]) > 8 and self.state.global_step == 2:
                raise RuntimeError("CUDA out of memory.")
            return super().training_step(model, inputs, *args, **kwargs)

    options = {"per_device_train_batch_size": 16, "auto_find_batch_size": True, "meta_source": source}
    run = Full(model=vit(), args=arguments(tmp_path, calibrate=True, **options), train_dataset=images())
    run.train()
    assert run.lr_history.steps.tolist() == list(range(6))
    assert run.lr_scheduler.calibration is not None


@pytest.mark.parametrize("source", SOURCES)
def test_evaluating_in_the_middle_changes_nothing(tmp_path, source):
    # Without dropout: an evaluation draws random numbers, with the stock Trainer too.
    plain = trained(tmp_path / "a", vit(dropout=0.0), meta_source=source)
    looked = trained(tmp_path / "b", vit(dropout=0.0), meta_source=source, eval_strategy="steps", eval_steps=1)
    assert same_weights(plain.model, looked.model)
    assert losses(plain) == losses(looked)
    assert looked.predict(images(24, seed=1)).metrics["test_loss"] == pytest.approx(looked.evaluate()["eval_loss"])


@pytest.mark.parametrize("source", SOURCES)
def test_the_best_model_is_loaded_and_the_history_is_that_of_the_whole_run(tmp_path, source):
    saving = {"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 2, "save_steps": 2}
    run = trained(tmp_path, meta_source=source, load_best_model_at_end=True, **saving)
    assert len(run.lr_history) == 6
    rows = [row["eval_loss"] for row in run.state.log_history if "eval_loss" in row]
    assert run.evaluate()["eval_loss"] == pytest.approx(min(rows))


@pytest.mark.parametrize("source", SOURCES)
def test_early_stopping_ends_the_history(tmp_path, source):
    saving = {"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 1, "save_steps": 1}
    stop = EarlyStoppingCallback(early_stopping_patience=1, early_stopping_threshold=100.0)
    run = trained(tmp_path, callbacks=[stop], meta_source=source, load_best_model_at_end=True, **saving)
    assert run.state.global_step == len(run.lr_history) == 2


class Embeddings(TrainerCallback):
    """Freezes and thaws the embeddings, and notes where they are."""

    def __init__(self, trained_at):
        self.trained_at, self.weights = trained_at, []

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        model.vit.embeddings.requires_grad_(self.trained_at(state.global_step))
        self.weights.append(model.vit.embeddings.cls_token.detach().clone())


def rates_of(run, layer):
    return run.lr_history.learning_rates[:, run.lr_history.layers.index(layer)]


@pytest.mark.parametrize("source", SOURCES)
def test_a_layer_frozen_on_the_way_stays_where_it_was(tmp_path, source):
    callback = Embeddings(lambda step: step < 3)
    run = trained(tmp_path, callbacks=[callback], meta_source=source, calibrate=False, max_steps=8)
    assert (rates_of(run, "stem")[4:] == rates_of(run, "stem")[4]).all()
    assert not (rates_of(run, "layers.1")[4:] == rates_of(run, "layers.1")[4]).all()
    assert torch.equal(callback.weights[3], callback.weights[7])
    assert not torch.equal(callback.weights[2], callback.weights[3])


@pytest.mark.parametrize("source", SOURCES)
def test_a_layer_thawed_on_the_way_is_trained_and_tuned_from_then_on(tmp_path, source):
    callback = Embeddings(lambda step: step >= 3)
    run = trained(tmp_path, callbacks=[callback], meta_source=source, calibrate=False, max_steps=8)
    assert (rates_of(run, "stem")[:3] == rates_of(run, "stem")[0]).all()
    assert not (rates_of(run, "stem")[4:] == rates_of(run, "stem")[4]).all()
    assert torch.equal(callback.weights[0], callback.weights[3])
    assert not torch.equal(callback.weights[3], callback.weights[4])


def test_a_layer_thawed_that_the_optimizer_does_not_hold_is_noticed(tmp_path):
    model = vit()
    model.vit.embeddings.requires_grad_(False)
    with pytest.raises(ValueError, match=r"vit.embeddings.cls_token and \d more parameters were frozen"):
        trained(tmp_path, model, callbacks=[Embeddings(lambda step: step >= 3)])


class Add(TrainerCallback):
    """What people write who give the optimizer a layer later."""

    def on_step_begin(self, args, state, control, optimizer=None, **kwargs):
        if state.global_step == 2:
            optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(1))]})


def test_a_group_added_to_the_optimizer_is_noticed(tmp_path):
    with pytest.raises(ValueError, match=r"has \d+ param groups, but had \d+ when MetaLRScheduler took it over"):
        trained(tmp_path, callbacks=[Add()])


class Lower(TrainerCallback):
    """What people write who change a learning rate by hand."""

    def on_step_begin(self, args, state, control, optimizer=None, **kwargs):
        for group in optimizer.param_groups:
            group["lr"] = 1e-6


def test_a_rate_written_by_a_callback_is_noticed(tmp_path):
    with pytest.raises(ValueError, match="changed from 0.001 to 1e-06"):
        trained(tmp_path, callbacks=[Lower()], calibrate=False)


def test_the_calibration_reads_no_batch_but_those_that_are_trained_on(tmp_path):
    read = []

    def transform(row):
        read.append(row)
        return row

    def rows():
        read.clear()
        return datasets.concatenate_datasets([images().with_format(None)] * 10).to_iterable_dataset().map(transform)

    trainer(tmp_path / "a", vit(), rows(), hyper_lr=0.0, max_steps=12).train()
    without = len(read)
    run = trainer(tmp_path / "b", vit(), rows(), calibrate=True, fit_head=False, max_steps=12)
    run.train()
    assert run.lr_scheduler.calibration is not None
    assert len(read) == without


@pytest.mark.parametrize("source", SOURCES)
def test_a_streamed_training_set(tmp_path, source):
    rows = images().to_iterable_dataset(num_shards=4).shuffle(seed=0, buffer_size=8)
    run = trainer(tmp_path, vit(), rows, meta_source=source, calibrate=True, max_steps=10)
    run.train()
    assert len(run.lr_history) == 10


@pytest.mark.parametrize("source", SOURCES)
def test_a_last_batch_of_one_image_and_one_of_a_single_class(tmp_path, source):
    rows = datasets.concatenate_datasets([images(), images(1)])
    run = trainer(tmp_path / "a", vit(), rows, meta_source=source, calibrate=True, max_steps=8)
    run.train()
    single = images().select([i for i, label in enumerate(LABELS) if label == 0])
    run = trainer(tmp_path / "b", vit(), single, meta_source=source, calibrate=True, max_steps=8)
    run.train()
    assert all(bool(torch.isfinite(p).all()) for p in run.model.parameters())


class Harm(TrainerCallback):
    """Makes any loss at two steps look like harm: a run that began at almost none."""

    def on_step_begin(self, args, state, control, lr_scheduler=None, **kwargs):
        if state.global_step in (3, 10):
            lr_scheduler.guard.first_loss = lr_scheduler.guard.mean_loss = 1e-9


@pytest.mark.parametrize("source", SOURCES)
def test_steps_taken_back_are_logged_and_the_first_is_warned_of(tmp_path, source, caplog, monkeypatch):
    # Whatever the steps did: those of this run go down at their end.
    harmful = TuningGuard.harmful
    monkeypatch.setattr(TuningGuard, "harmful", lambda guard, loss, slope: harmful(guard, loss))
    run = trained(tmp_path, callbacks=[Harm()], meta_source=source, calibrate=False, max_steps=12)
    assert sum("was taken back" in message for message in caplog.messages) == 1
    counts = [row.get("meta_refused", 0) for row in run.state.log_history if "loss" in row]
    assert counts[2] == 0
    assert counts[4] == 1
    assert counts[-1] == run.lr_scheduler.guard.refused > 1


@pytest.mark.skipif(torch.accelerator.is_available(), reason="says so by torch's warning that there is no accelerator")
def test_validation_batches_are_pinned_as_training_batches_are(tmp_path):
    run = trainer(tmp_path, meta_source="stream")
    next(create_meta_stream(run))
    run.args.dataloader_pin_memory = True
    with pytest.warns(UserWarning, match="pin_memory"):
        next(create_meta_stream(run))

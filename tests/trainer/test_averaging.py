"""A run with an average of the weights: what is evaluated, saved and resumed."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from small_runs import Kill, ReadOnce, arguments, images, resnet, same_weights, trainer, vit
from transformers import TrainerCallback, TrainingArguments

from metalr_hf import MetaLRTrainer, MetaLRTrainingArguments
from metalr_hf.trainer.averaging import AVERAGE_FILE, AveragingTrainer

# What is made of the average's head is in test_last_features.py.
AVERAGED = {"average_weights": "polynomial", "calibrate": True, "fit_head": False}
SAVING = {
    **AVERAGED,
    "fit_head": None,
    "logging_strategy": "no",
    "save_strategy": "steps",
    "save_steps": 3,
    "max_steps": 12,
}


class Notes(TrainerCallback):
    """The weights after each step."""

    def __init__(self):
        self.weights = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.weights.append({name: value.clone() for name, value in model.state_dict().items()})


def averaged(notes, names):
    """The average as a plain loop over the weights of each step."""
    result = dict(notes[0])
    for t, weights in enumerate(notes[1:], start=2):
        for name in names:
            result[name] = result[name].lerp(weights[name], 4 / (t + 3))
    return result


def trained_names(model):
    return [name for name, p in model.named_parameters() if p.requires_grad]


@pytest.mark.parametrize("options", [{}, {"gradient_accumulation_steps": 2}, {"meta_source": "stream"}], ids=str)
def test_evaluate_predict_and_what_is_saved_are_of_the_average(tmp_path, options):
    eval_dataset = images(24, seed=1)
    run = trainer(
        tmp_path, vit(), eval_dataset=eval_dataset, eval_strategy="steps", eval_steps=3, **AVERAGED, **options
    )
    run.add_callback(notes := Notes())
    run.train()
    # One update a step, whatever it accumulates; the run itself goes on from its own weights.
    assert len(notes.weights) == 6
    ours = run.model.state_dict()
    expected = averaged(notes.weights, trained_names(run.model))
    for name, value in expected.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-5, atol=1e-7)
    assert not same_weights(run.model, Loaded(notes.weights[-1]))
    evaluations = [row["eval_loss"] for row in run.state.log_history if "eval_loss" in row]
    model = vit()
    model.load_state_dict(averaged(notes.weights[:3], trained_names(model)))
    other = trainer(tmp_path / "other", model)
    assert evaluations[0] == pytest.approx(other.evaluate(eval_dataset)["eval_loss"], rel=1e-5)
    assert evaluations[1] == run.evaluate()["eval_loss"] == run.predict(eval_dataset).metrics["test_loss"]
    run.save_model(tmp_path / "saved")
    saved = type(run.model).from_pretrained(tmp_path / "saved")
    assert same_weights(saved, run.model)


def test_a_callback_of_an_evaluation_sees_the_weights_that_were_evaluated(tmp_path):
    class Keeps(TrainerCallback):
        def __init__(self):
            self.kept = []

        def on_evaluate(self, args, state, control, model=None, metrics=None, **kwargs):
            if state.global_step < state.max_steps:
                self.kept.append((metrics["eval_loss"], copy.deepcopy(model.state_dict())))

    eval_dataset = images(24, seed=1)
    run = trainer(tmp_path, resnet(), eval_dataset=eval_dataset, eval_strategy="steps", eval_steps=2, **AVERAGED)
    run.add_callback(keeps := Keeps())
    run.add_callback(notes := Notes())
    run.train()
    assert len(keeps.kept) == 2
    for loss, weights in keeps.kept:
        run.model.load_state_dict(weights)
        assert run.evaluate()["eval_loss"] == pytest.approx(loss, abs=1e-6)
    # The run itself goes on from its own.
    assert not all(torch.equal(value, notes.weights[1][name]) for name, value in keeps.kept[0][1].items())


def test_a_callback_at_the_end_of_training_sees_the_average(tmp_path):
    class AtTheEnd(TrainerCallback):
        def on_train_end(self, args, state, control, model=None, **kwargs):
            self.weights = {name: p.detach().clone() for name, p in model.state_dict().items()}

    run = trainer(tmp_path, resnet(), **AVERAGED)
    run.add_callback(seen := AtTheEnd())
    run.train()
    assert same_weights(run.model, Loaded(seen.weights))


class Loaded:
    def __init__(self, weights):
        self.weights = weights

    def state_dict(self):
        return self.weights


def test_the_steps_are_bitwise_those_of_a_run_without_it(tmp_path):
    runs = []
    for options in ({}, {"average_weights": "polynomial", "eval_strategy": "steps", "eval_steps": 2}):
        run = trainer(tmp_path, resnet(), calibrate=True, eval_dataset=images(24, seed=1), **options)
        run.add_callback(notes := Notes())
        run.train()
        runs.append((run, notes.weights))
    (plain, own), (_, others) = runs
    assert all(same_weights(Loaded(a), Loaded(b)) for a, b in zip(own, others, strict=True))
    assert same_weights(plain.model, Loaded(own[-1]))


@pytest.mark.parametrize(
    ("make_model", "options"),
    [(resnet, {}), (vit, {"gradient_accumulation_steps": 2}), (resnet, {"average_weights": "0.9"})],
)
def test_a_resumed_run_ends_bitwise_as_if_never_interrupted(tmp_path, make_model, options):
    whole = trainer(tmp_path / "a", make_model(), **{**SAVING, **options})
    whole.add_callback(notes := Notes())
    whole.train()
    for step in (3, 9):
        again = trainer(tmp_path / "b", make_model(), **{**SAVING, **options})
        again.add_callback(resumed := Notes())
        again.train(resume_from_checkpoint=str(tmp_path / "a" / f"checkpoint-{step}"))
        assert same_weights(Loaded(notes.weights[-1]), Loaded(resumed.weights[-1])), step
        assert same_weights(whole.model, again.model), step


def test_a_checkpoint_holds_both(tmp_path):
    run = trainer(tmp_path, vit(), **{**SAVING, "fit_head": False})
    run.add_callback(notes := Notes())
    run.train()
    folder = tmp_path / "checkpoint-6"
    state = torch.load(folder / AVERAGE_FILE, weights_only=True)
    assert all(torch.equal(value, notes.weights[5][name]) for name, value in state["weights"].items())
    saved = type(run.model).from_pretrained(folder).state_dict()
    assert all(torch.equal(value, saved[name]) for name, value in state["average"].items())
    # A run without the average goes on from its own weights, not from the average.
    plain = trainer(tmp_path / "plain", vit(), **{**SAVING, "fit_head": False, "average_weights": None})
    plain.add_callback(without := Notes())
    plain.train(resume_from_checkpoint=str(folder))
    assert same_weights(Loaded(notes.weights[-1]), Loaded(without.weights[-1]))
    assert same_weights(plain.model, Loaded(without.weights[-1]))


def test_the_best_checkpoint_is_the_average_of_its_step(tmp_path):
    class WorseAndWorse(MetaLRTrainer):
        def evaluate(self, *args, **kwargs):
            metrics = super().evaluate(*args, **kwargs)
            return metrics | {"eval_loss": float(self.state.global_step)}

    args = arguments(tmp_path, **SAVING, eval_strategy="steps", eval_steps=3, load_best_model_at_end=True)
    run = WorseAndWorse(model=vit(), args=args, train_dataset=images(), eval_dataset=images(24, seed=1))
    run.add_callback(notes := Notes())
    run.train()
    assert run.state.best_global_step == 3
    for name, value in averaged(notes.weights[:3], trained_names(run.model)).items():
        torch.testing.assert_close(run.model.state_dict()[name], value, rtol=1e-5, atol=1e-7)


def test_statistics_of_batch_norm_are_estimated_at_the_average(tmp_path):
    run = trainer(tmp_path, resnet(), **AVERAGED, meta_source="next_batch")
    run.add_callback(notes := Notes())
    torch.manual_seed(0)
    run.train()
    model = copy.deepcopy(run.model)
    pixels = torch.stack(list(images()["pixel_values"]))
    model.eval()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum, module.num_batches_tracked = None, torch.tensor(0)
            module.train()
    with torch.no_grad():
        # All images a few times, in batches as large as those of the estimate: near, for other batches.
        for _ in range(16):
            model(pixels[torch.randperm(48)[:32]])
    for name, value in model.state_dict().items():
        if "running_mean" in name:
            torch.testing.assert_close(value, run.model.state_dict()[name], rtol=0.1, atol=0.1)
            assert not torch.equal(value, notes.weights[-1][name])


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning", "ignore:The head of .* is frozen")
def test_an_adapter_is_averaged_and_the_rest_left_alone(tmp_path):
    model = get_peft_model(vit(), LoraConfig(target_modules=["q_proj", "v_proj"], r=2))
    run = trainer(tmp_path, model, **SAVING)
    run.add_callback(notes := Notes())
    run.train()
    state = torch.load(tmp_path / "checkpoint-6" / AVERAGE_FILE, weights_only=True)
    assert state["average"].keys() == set(trained_names(model))
    expected = averaged(notes.weights[:6], trained_names(model))
    saved = load_file(tmp_path / "checkpoint-6" / "adapter_model.safetensors")
    for name, value in saved.items():
        own = next(key for key in expected if key.replace(".default", "").endswith(name))
        torch.testing.assert_close(value, expected[own], rtol=1e-5, atol=1e-7)


def test_a_collapse_restarts_it(tmp_path):
    args = arguments(tmp_path, max_steps=30, learning_rate=1e-2, average_weights="polynomial")
    run = MetaLRTrainer(vit(0.0), args, train_dataset=images(), callbacks=[Kill(at=2), notes := Notes()])
    run.train()
    restarted_at = run.lr_scheduler.restarted_at
    assert restarted_at > 2
    for name, value in averaged(notes.weights[restarted_at:], trained_names(run.model)).items():
        torch.testing.assert_close(run.model.state_dict()[name], value, rtol=1e-5, atol=1e-7)


def test_a_second_run_begins_its_own_average(tmp_path):
    run = trainer(tmp_path, vit(), **AVERAGED)
    run.train()
    assert run.weight_average is None
    run.add_callback(notes := Notes())
    run.train()
    for name, value in averaged(notes.weights, trained_names(run.model)).items():
        torch.testing.assert_close(run.model.state_dict()[name], value, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("none", ["none", False])
def test_it_can_be_left_out_by_a_search(tmp_path, none):
    run = trainer(tmp_path, vit(), **AVERAGED)
    run.args.average_weights = none
    run.add_callback(notes := Notes())
    run.train()
    assert all(torch.equal(value, run.model.state_dict()[name]) for name, value in notes.weights[-1].items())


def test_a_kind_that_is_none_is_refused_at_once(tmp_path):
    with pytest.raises(ValueError, match=r"average_weights='mean' must be"):
        arguments(tmp_path, average_weights="mean")


EVALUATED = {"eval_strategy": "steps", "eval_steps": 2}


class SharedFile(ReadOnce):
    def __iter__(self):
        yield from self.rows


@pytest.mark.parametrize("kind", [ReadOnce, SharedFile])
def test_rows_that_can_be_read_once_are_all_trained_on(tmp_path, kind):
    """Batch norm's statistics are estimated from training rows, which must not be taken from the training."""
    rows = [images(8)[i % 8] for i in range(6 * 8)]
    options = {"max_steps": 6, "per_device_train_batch_size": 8, "lr_scheduler_type": None}
    run = trainer(tmp_path, resnet(), train_dataset=kind(rows), **options)
    run.train()
    assert run.state.global_step == 6
    assert run.statistics_passes == 0
    run = trainer(tmp_path, resnet(), train_dataset=kind(rows), eval_dataset=images(8), **options, **EVALUATED)
    run.train()
    assert run.state.global_step == 6, "an evaluation in the middle takes no rows either"
    assert all(bool(buffer.isfinite().all()) for buffer in run.model.buffers())


def test_a_loader_of_ones_own_is_not_gone_round(tmp_path):
    class Own(MetaLRTrainer):
        def get_train_dataloader(self):
            return super().get_train_dataloader()

    args = arguments(tmp_path, max_steps=4, lr_scheduler_type=None)
    run = Own(resnet(), args, train_dataset=images())
    run.train()
    assert run.average_weights == "polynomial"
    assert run.statistics_passes == 0


def test_it_is_the_default_where_no_schedule_is_chosen(tmp_path, monkeypatch):
    def chosen(**given):
        args = MetaLRTrainingArguments(str(tmp_path), report_to="none", use_cpu=True, **given)
        return args.lr_scheduler_type.value, args.average_weights

    assert chosen() == chosen(hyper_lr=0.0) == ("constant_with_warmup", "polynomial")
    assert chosen(warmup_steps=3) == ("constant_with_warmup", "polynomial")
    assert chosen(average_weights="0.9") == ("constant_with_warmup", "0.9")
    for name in ("constant", "cosine", "warmup_stable_decay"):
        assert chosen(lr_scheduler_type=name) == (name, None)
        assert chosen(lr_scheduler_type=name, average_weights="polynomial") == (name, "polynomial")
        assert chosen(lr_scheduler_type=name, average_weights="none") == (name, None)
    assert chosen(average_weights="none") == chosen(average_weights=False) == ("warmup_stable_decay", None)
    assert chosen(preset="paper") == ("constant", None)
    assert chosen(lr_scheduler_kwargs={"decay_type": "cosine"}) == ("warmup_stable_decay", None)
    assert chosen(fsdp="full_shard") == ("constant_with_warmup", "polynomial")


def test_a_schedule_free_optimizer_is_refused(tmp_path):
    args = TrainingArguments(str(tmp_path), optim="schedule_free_adamw", report_to="none", use_cpu=True)
    with pytest.raises(ValueError, match=r"a schedule-free optimizer averages the weights itself"):
        AveragingTrainer(vit(), args, train_dataset=images(), average_weights="0.9")


def test_in_bfloat16_the_average_is_in_float32(tmp_path):
    run = trainer(tmp_path, vit().to(torch.bfloat16), **SAVING)
    run.train()
    state = torch.load(tmp_path / "checkpoint-6" / AVERAGE_FILE, weights_only=True)
    assert {value.dtype for value in state["average"].values()} == {torch.float32}
    assert {value.dtype for value in state["weights"].values()} == {torch.bfloat16}
    assert next(run.model.parameters()).dtype == torch.bfloat16


def test_what_looking_at_it_costs_is_counted(tmp_path):
    run = trainer(tmp_path, resnet(), eval_dataset=images(24, seed=1), **AVERAGED)
    run.train()
    # Four batches of four times as many images.
    assert run.statistics_passes == pytest.approx(4 * 4 / 3)
    plain = trainer(tmp_path, vit(), **AVERAGED)
    plain.train()
    assert plain.statistics_passes == 0


def test_a_search_averages_as_each_trial_says(tmp_path):
    def trained(trial=(), **given):
        args = arguments(tmp_path, **{"lr_scheduler_type": None, **given})
        run = MetaLRTrainer(args=args, model_init=lambda: vit(0.0), train_dataset=images())
        # As the backends of a search set what a trial has drawn.
        for name, value in trial:
            setattr(run.args, name, value)
        run.train()
        return run.model

    cosine = trained([("lr_scheduler_type", "cosine")])
    assert same_weights(cosine, trained(lr_scheduler_type="cosine"))
    assert same_weights(trained([("average_weights", "0.5")]), trained(average_weights="0.5"))
    both = trained([("average_weights", "0.5"), ("lr_scheduler_type", "cosine")])
    assert same_weights(both, trained(lr_scheduler_type="cosine", average_weights="0.5"))
    assert not same_weights(both, cosine)
    late = trained([("average_weights", "0.5")], lr_scheduler_type="cosine")
    assert same_weights(both, late)

import math

import pytest
import torch
from small_runs import arguments, images, resnet, same_weights, trainer, vit
from torch import nn
from transformers import TrainerCallback

from metalr_hf import MetaLRScheduler, MetaLRTrainer

# Of the largest hypergradient of a step. bfloat16 has eight bits, float16 has eleven.
TOLERANCE, FLOAT16_TOLERANCE = 0.1, 0.05
ACCELERATOR = torch.cuda.is_available()


class Float16Trainer(MetaLRTrainer):
    """Trains in float16 with a scaler. accelerate does so on accelerators only; torch's autocast and scaler, which it
    uses, are at home on a CPU too.
    """

    first_scale = 2.0**10

    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        device = "cuda" if ACCELERATOR else "cpu"
        self.accelerator.scaler = torch.amp.GradScaler(device, init_scale=self.first_scale)
        self.accelerator.native_amp = True
        self.accelerator.state._mixed_precision = "fp16"


def float16_trainer(folder, model, first_scale=2.0**10, **options):
    args = arguments(folder, use_cpu=not ACCELERATOR, fp16=ACCELERATOR, **options)
    return type("Scaled", (Float16Trainer,), {"first_scale": first_scale})(
        model=model, args=args, train_dataset=images()
    )


def to_bfloat16(rows):
    pixels = [torch.tensor(pixels).to(torch.bfloat16) for pixels in rows["pixel_values"]]
    return {"pixel_values": pixels, "labels": list(rows["labels"])}


@pytest.mark.parametrize("source", ["stream", "next_batch"])
@pytest.mark.parametrize("make_model", [lambda: vit(dropout=0.0), resnet], ids=["vit", "resnet"])
@pytest.mark.parametrize("way", ["autocast", "weights"])
def test_bfloat16_gives_the_hypergradients_of_float32(tmp_path, make_model, source, way):
    options = {"meta_source": source, "max_steps": 3, "remove_unused_columns": False}
    exact = trainer(tmp_path / "a", make_model(), **options)
    exact.train()
    if way == "autocast":
        rough = trainer(tmp_path / "b", make_model(), bf16=True, **options)
    else:
        rows = images().with_transform(to_bfloat16)
        rough = trainer(tmp_path / "b", make_model().to(torch.bfloat16), rows, **options)
    rough.train()
    # Steps part company after the first few.
    expected, found = (run.lr_history.hypergradients[-2:] for run in (exact, rough))
    assert abs(found - expected).max() <= TOLERANCE * abs(expected).max()
    assert not math.isnan(abs(expected).max())


@pytest.mark.parametrize("source", ["stream", "next_batch"])
@pytest.mark.parametrize("make_model", [lambda: vit(dropout=0.0), resnet], ids=["vit", "resnet"])
def test_float16_gives_the_hypergradients_of_float32(tmp_path, make_model, source):
    options = {"meta_source": source, "max_steps": 3}
    exact = trainer(tmp_path / "a", make_model(), **options, use_cpu=not ACCELERATOR)
    exact.train()
    rough = float16_trainer(tmp_path / "b", make_model(), **options)
    rough.train()
    expected, found = (run.lr_history.hypergradients[-2:] for run in (exact, rough))
    assert 0 < abs(found - expected).max() <= FLOAT16_TOLERANCE * abs(expected).max()


class Steps(TrainerCallback):
    """The weights and learning rates after every step, and whether it met an overflow."""

    def __init__(self):
        self.weights, self.rates, self.skipped = [], [], []
        self.accelerator = None

    def on_step_end(self, args, state, control, model=None, lr_scheduler=None, **kwargs):
        self.weights.append(torch.cat([p.detach().flatten().cpu() for p in model.parameters()]))
        self.rates.append(lr_scheduler.learning_rates.clone())
        if self.accelerator is not None:
            # A fused optimizer looks for overflows itself.
            self.skipped.append(self.accelerator.optimizer_step_was_skipped or lr_scheduler.overflowed)


@pytest.mark.parametrize("source", ["stream", "next_batch"])
@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused"])
def test_steps_that_overflow_in_the_trainer_tune_nothing_and_calibration_waits_for_a_step(tmp_path, source, optim):
    steps = Steps()
    options = {"meta_source": source, "optim": optim, "max_steps": 16, "calibrate": True}
    run = float16_trainer(tmp_path, vit(dropout=0.0), first_scale=2.0**21, **options)
    start = torch.cat([p.detach().flatten().cpu() for p in run.model.parameters()])
    steps.accelerator = run.accelerator
    run.add_callback(steps)
    run.train()
    unmoved = [torch.equal(a, b) for a, b in zip([start, *steps.weights], steps.weights, strict=False)]
    first = unmoved.index(False)
    assert first >= 2
    # The calibrated head grows, and with it the gradients, until the scale is small enough: 2**16 at the most. With the
    # next batch, a calibration that is late moves the weights all the same.
    assert any(steps.skipped[first:])
    assert sum(steps.skipped) >= 4
    if source == "stream":
        assert any(unmoved[first:])
        assert sum(unmoved) >= 4
    changed = [not torch.equal(a, b) for a, b in zip(steps.rates, steps.rates[1:], strict=False)]
    # With the next batch, the calibration comes when the step after the first that moved begins.
    calibrated = first - 1 if source == "stream" else first
    assert not any(changed[:calibrated])
    assert changed[calibrated]
    stood = [*unmoved[1 : calibrated + 1], False, *unmoved[calibrated + 2 :]]
    assert not any(change and still for change, still in zip(changed, stood, strict=True))
    assert any(changed[first:])
    assert run.lr_scheduler.calibration is not None
    assert run.lr_scheduler.guard.non_finite == 0
    assert steps.weights[-1].isfinite().all()


@pytest.mark.parametrize("source", ["stream", "next_batch"])
def test_the_scale_is_part_of_the_checkpoint(tmp_path, source):
    options = {"meta_source": source, "max_steps": 8, "save_strategy": "steps", "save_steps": 4, "calibrate": True}
    whole = float16_trainer(tmp_path, vit(), first_scale=2.0**21, **options)
    whole.train()
    again = float16_trainer(tmp_path, vit(), **options)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert same_weights(whole.model, again.model)
    assert (whole.lr_history.learning_rates == again.lr_history.learning_rates).all()


@pytest.mark.parametrize("source", ["stream", "next_batch"])
@pytest.mark.parametrize("fused", [False, True])
def test_a_step_whose_gradients_overflow_tunes_nothing(source, fused):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    groups = [{"params": model[0].parameters(), "layer": "stem"}, {"params": model[2].parameters(), "layer": "head"}]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, fused=fused)
    scheduler = MetaLRScheduler(optimizer, meta_source=source)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    batches = [(torch.randn(16, 4), torch.randint(2, (16,))) for _ in range(12)]
    overflow = 5

    def loss(step):
        rows, labels = batches[step]
        return nn.functional.cross_entropy(model(rows), labels)

    rates, weights = [], []
    for step in range(10):
        scaled = scaler.scale(loss(step))
        (scaled * float("inf") if step == overflow else scaled).backward()
        weights.append(model[0].weight.detach().clone())
        scaler.step(optimizer)
        scaler.update()
        if source == "stream":
            scheduler.step(lambda step=step: loss(step + 1))
        else:
            scheduler.step()
        optimizer.zero_grad()
        rates.append(scheduler.learning_rates.clone())
    assert torch.equal(weights[overflow + 1], weights[overflow])
    assert torch.equal(rates[overflow], rates[overflow - 1])
    # A step that was not taken has no hypergradient either.
    tuned_again = overflow + (1 if source == "stream" else 2)
    assert not torch.equal(rates[tuned_again], rates[overflow])
    assert scheduler.guard.non_finite == 0
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())


@pytest.mark.parametrize("fused", [False, True])
def test_a_scaled_loss_gives_the_hypergradient_of_the_loss(fused):
    def rates(scale):
        torch.manual_seed(0)
        model = nn.Linear(4, 2)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=fused)
        scheduler = MetaLRScheduler(optimizer, meta_source="next_batch")
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        for _ in range(4):
            scaler.scale(model(torch.randn(8, 4)).square().mean()).backward()
            scaler.step(optimizer)
            scaler.update()
            scheduler.step()
            optimizer.zero_grad()
        return scheduler.learning_rates

    torch.testing.assert_close(rates(1.0), rates(2.0**12))


class Empty(TrainerCallback):
    """Sets all weights to zero after two steps: a network that answers every image alike."""

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == 2:
            with torch.no_grad():
                for p in model.parameters():
                    p.zero_()


@pytest.mark.parametrize("source", ["stream", "next_batch"])
def test_a_collapse_in_float16_is_undone(tmp_path, source):
    run = float16_trainer(tmp_path, vit(dropout=0.0), max_steps=14, meta_source=source, learning_rate=1e-2)
    run.add_callback(Empty())
    run.train()
    assert run.lr_scheduler.restarted_at == 10
    assert run.lr_history.learning_rates[10].max() <= 2e-3
    assert all(p.isfinite().all() and p.any() for p in run.model.parameters())


def pixelwise(half, scale):
    """The hypergradient of a loss that is a mean over very many pixels."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 1), nn.Conv2d(4, 2, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    scheduler = MetaLRScheduler(optimizer)
    scheduler.meta_loss_scale = scale
    pixels = torch.randn(8, 1, 256, 256)

    def loss():
        with torch.autocast("cpu", torch.float16, enabled=half):
            logits = model(4 * pixels)
        return nn.functional.cross_entropy(8 * logits.float(), (pixels[:, 0] > 0).long())

    loss().backward()
    optimizer.step()
    scheduler.step(loss)
    return scheduler.history.hypergradients[0, 0]


def test_a_scaled_validation_backward_keeps_small_gradients_in_float16():
    exact = pixelwise(False, 1.0)
    assert pixelwise(False, 2.0**16) == exact
    assert pixelwise(True, torch.tensor(2.0**16)) == pytest.approx(exact, rel=3e-3)
    assert pixelwise(True, 1.0) != pytest.approx(exact, rel=1e-2)


def test_the_trainer_gives_the_validation_backward_the_scale(tmp_path):
    run = float16_trainer(tmp_path, vit(), first_scale=2.0**9, meta_source="stream", max_steps=2)
    run.train()
    # Below the one that the training gradients just bear.
    assert run.lr_scheduler.meta_loss_scale == 2.0**6

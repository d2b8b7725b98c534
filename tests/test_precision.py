import math

import pytest
import torch
from test_trainer import images, resnet, trainer, vit
from torch import nn

from metalr_hf import MetaLRScheduler

# Of the largest hypergradient of a step. bfloat16 has eight bits.
TOLERANCE = 0.1


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

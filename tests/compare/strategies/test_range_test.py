import math

import pytest
import torch
from small_cells import Network
from torch.nn import functional
from watched import batches, run, trainer_of

from metalr_hf.compare.strategies.range_test import range_test, valley
from metalr_hf.models.bare import Classifier


def test_the_range_test_is_training_at_growing_rates_until_the_loss_explodes_and_leaves_no_trace(tmp_path):
    torch.manual_seed(0)
    model, plain = Classifier(Network(3)), Network(3)
    plain.load_state_dict(model.network.state_dict())
    before, given = {name: p.clone() for name, p in plain.named_parameters()}, batches(100)
    trainer = trainer_of(tmp_path, model)
    random = torch.get_rng_state()
    rates, losses = range_test(trainer, given)
    assert all(torch.equal(before[name], p) for name, p in model.network.named_parameters())
    assert torch.equal(torch.get_rng_state(), random)
    assert rates == pytest.approx([1e-7 * 10 ** (8 * i / 100) for i in range(len(rates))])
    # The same, written out: AdamW with Trainer's choice of what decays, and fastai's average of the losses.
    decayed = [p for name, p in plain.named_parameters() if not name.endswith("bias")]
    others = [p for name, p in plain.named_parameters() if name.endswith("bias")]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer, average, expected = torch.optim.AdamW(groups), 0.0, []
    for i, (rate, batch) in enumerate(zip(rates, given, strict=False), start=1):
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad()
        loss = functional.cross_entropy(plain(batch["pixel_values"]), batch["labels"])
        loss.backward()
        optimizer.step()
        average = 0.98 * average + 0.02 * loss.item()
        expected.append(average / (1 - 0.98**i))
    assert losses == pytest.approx(expected, rel=1e-4)
    exploded = [loss > 4 * min(losses[: i + 1]) for i, loss in enumerate(losses)]
    assert not any(exploded[:-1])
    assert exploded[-1] == (len(losses) < 100)


def test_the_valley_rule_stands_in_the_middle_of_the_longest_fall():
    rates = [float(i) for i in range(100)]
    # Behind the ten that are left out: a fall of 10, a rise, a fall of 30 with a bump in it, and the end.
    losses = [9.0] * 10 + [5 - i / 100 for i in range(10)] + [6.0] * 10
    losses += [4 - i / 10 for i in range(15)] + [3.9] + [2.5 - i / 10 for i in range(15)] + [7.0] * 39
    # It counts 41 losses, from the 9th to the last of the second fall at 60: 10 of the first fall, a 6 (at 20) or none
    # of it, and 30 of the second. Counted from the tenth on: last = 50, how many = 40, a third of it 13 and a half 6.
    assert valley(rates, losses) == 10 + (50 - 40) + 13 + 6
    assert valley(rates, [float(i) for i in range(100)]) == 10.0, "where nothing falls, the first"
    assert valley(rates, [*losses[:45], *[math.nan] * 55]) < 45
    with pytest.raises(ValueError, match="saw the loss explode at once"):
        valley(rates[:12], losses[:12])


def test_lr_finder_trains_with_the_rate_that_it_found_and_counts_the_passes(tmp_path):
    watch, _, moved = run(tmp_path, "lr_finder")
    found = watch.rates[0][0]
    assert 1e-7 < found < 10
    assert [rates[0] for rates in watch.rates] == pytest.approx(
        [found * 0.5 * (1 + math.cos(math.pi * step / 6)) for step in range(6)]
    )
    assert 15 < watch.trainer.extra_passes <= 100
    assert all(moved.values())

"""The strategies of others do what their sources say."""

import math

import pytest
import torch
from small_cells import Network, rows, transform
from torch import nn
from torch.nn import functional
from transformers import Trainer, TrainingArguments, default_data_collator
from watched import LAYERS, run

from metalr_hf.compare.range_test import range_test, valley
from metalr_hf.compare.rate_free import Parabola
from metalr_hf.compare.strategies import STRATEGIES, Strategy
from metalr_hf.models.bare import Classifier


def trainer_of(tmp_path, model):
    args = TrainingArguments(
        str(tmp_path), max_steps=2, weight_decay=0.1, report_to="none", use_cpu=True, remove_unused_columns=False
    )
    data = rows(16, 0).select_columns(["image", "label"]).with_transform(transform)
    return Trainer(model, args, train_dataset=data, data_collator=default_data_collator)


def batches(n):
    data = rows(8 * n, 3).select_columns(["image", "label"]).with_transform(transform)
    return [default_data_collator([data[8 * i + k] for k in range(8)]) for i in range(n)]


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


def test_schedule_free_radam_is_trainer_s(tmp_path):
    schedulefree = pytest.importorskip("schedulefree")
    watch, _, moved = run(tmp_path, "schedule_free_radam")
    assert isinstance(watch.trainer.optimizer.optimizer, schedulefree.RAdamScheduleFree)
    assert [rates[0] for rates in watch.rates] == [1e-2] * 6
    assert all(moved.values())


def test_lp_ft_trains_the_head_first_and_then_everything_with_a_decay_each(tmp_path):
    watch, groups, moved = run(tmp_path, "lp_ft", steps=8)
    thawed = [
        [layer for layer, names in groups.items() if any(step[name] is not None for name in names)]
        for step in watch.gradients
    ]
    assert thawed == [["head"]] * 4 + [LAYERS] * 4
    assert [rates[0] for rates in watch.rates] == pytest.approx(
        [1e-2 * 0.5 * (1 + math.cos(math.pi * (step % 4) / 4)) for step in range(8)]
    )
    stem = groups["stem"]
    assert all(torch.equal(watch.weights[0][name], watch.weights[4][name]) for name in stem)
    assert all(moved.values())


def test_autogluon_s_recipe_has_its_rates_whatever_is_given(tmp_path):
    watch, _, _ = run(tmp_path, "autogluon_recipe", steps=20, learning_rate=1.0)
    for step, rates in enumerate(watch.rates):
        shape = step / 2 if step < 2 else 0.5 * (1 + math.cos(math.pi * (step - 2) / 18))
        assert rates == pytest.approx({layer: 1e-4 * 0.9 ** (3 - j) * shape for j, layer in enumerate(LAYERS)})


def test_prodigy_plus_estimates_a_step_size_for_every_layer(tmp_path):
    pytest.importorskip("prodigyplus")
    watch, groups, moved = run(tmp_path, "prodigy_plus", steps=12)
    optimizer = watch.trainer.optimizer.optimizer
    assert [group["layer"] for group in optimizer.param_groups] == LAYERS == list(groups)
    sizes = [float(group["d"]) for group in optimizer.param_groups]
    assert len(set(sizes)) > 1
    assert all(1e-6 <= size <= 1e-6 * 2 ** (12 / 4) * 1.001 for size in sizes), "a fourth root of two a step at most"
    assert [set(rates.values()) for rates in watch.rates] == [{1.0}] * 12
    assert watch.trainer.args.max_grad_norm == 0
    assert all(moved.values())


def test_l_dog_steps_by_distance_over_gradients_and_ends_with_the_average(tmp_path):
    pytest.importorskip("dog")
    watch, groups, _ = run(tmp_path, "l_dog", steps=6)
    final = dict(watch.trainer.model.named_parameters())
    for name in [name for names in groups.values() for name in names]:
        start = watch.weights[0][name].double()
        point, average = start, torch.zeros_like(start)
        distance, gradients = 1e-6 * (1 + start.norm()), torch.tensor(1e-8).double()
        for step in range(6):
            assert watch.weights[step][name].double() == pytest.approx(point, rel=1e-4, abs=1e-7)
            point = watch.weights[step][name].double()
            gradient = watch.gradients[step][name].double() + 0.1 * point
            distance = torch.maximum(distance, (point - start).norm())
            gradients = gradients + gradient.square().sum()
            point = point - distance / gradients.sqrt() * gradient
            # Shamir and Zhang's average with the weight (γ + 1) / (γ + t), γ = 8.
            average = average + 9 / (8 + step + 1) * (point - average)
        assert final[name].detach().double() == pytest.approx(average, rel=1e-4, abs=1e-7)


class Quadratic(nn.Module):
    """A loss whose best step is known: ½ · 4 · ‖w - 1‖², so that gradient descent is there at a rate of ¼."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([3.0, -2.0], dtype=torch.float64))

    def forward(self, pixel_values, labels):
        return {"loss": 2 * (self.weight - 1).square().sum()}


@pytest.mark.parametrize(("rate", "wanted"), [(0.2, 0.25), (0.3, 0.25), (0.01, 0.02), (1.0, 0.5)])
def test_gen_goes_a_tenth_of_the_way_to_the_minimum_within_a_factor_of_two(tmp_path, rate, wanted):
    pytest.importorskip("GeN")
    model = Quadratic()
    trainer, optimizer = trainer_of(tmp_path, model), torch.optim.SGD(model.parameters(), rate)
    start = model.weight.detach().clone()
    trainer.compute_loss(model, batches(1)[0]).backward()
    for scale in (1.0, 0.5):
        optimizer.param_groups[0]["lr"] = rate
        Parabola(iter(batches(1)), trainer).look_ahead(model, optimizer, scale, "cpu")
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.9 * rate + 0.1 * scale * wanted, rel=1e-5)
        assert model.weight.detach() == pytest.approx(start), "the step is not taken yet"


def test_gen_looks_ahead_at_every_fourth_step_from_its_own_rate(tmp_path):
    pytest.importorskip("GeN")
    watch, _, moved = run(tmp_path, "gen", steps=10)
    rates = [rates[0] for rates in watch.rates]
    assert set(rates[:3]) == {1e-4}
    assert len(set(rates[3:7])) == len(set(rates[7:])) == 1
    assert len(set(rates)) > 1
    assert watch.trainer.extra_passes == 2
    assert all(moved.values())


def test_what_is_missing_is_asked_for_by_the_name_that_pip_knows():
    strategy = Strategy("theirs", lambda job: job.trainer(), packages={"no_such_module": "no-such-package"})
    with pytest.raises(ImportError, match="strategies='theirs' needs a package more: pip install no-such-package"):
        strategy.check_packages()
    assert STRATEGIES["prodigy_plus"].packages == {"prodigyplus": "prodigy-plus-schedule-free"}

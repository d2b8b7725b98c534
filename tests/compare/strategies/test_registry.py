import pytest
import torch
from watched import LAYERS, run

from metalr_hf.compare.strategies.registry import CALIBRATED, STRATEGIES, Strategy, get_strategy, strategies_table


def test_tuned_strategies_tune(tmp_path):
    for name in ("metalr", "metalr_paper"):
        watch, _, _ = run(tmp_path / name, name, learning_rate=1e-3)
        assert list(watch.rates[0]) == LAYERS
        assert len(set(watch.rates[-1].values())) > 1


def test_rates_that_stay_up_to_the_end(tmp_path):
    watch, _, _ = run(tmp_path, "metalr_constant", steps=50)
    decayed, _, _ = run(tmp_path, "metalr_decay", steps=50)
    assert watch.rates[41:] == [watch.rates[41]] * 9
    assert decayed.rates[-1]["head"] < 0.1 * watch.rates[-1]["head"]


def test_the_default_is_constant_rates_and_their_average(tmp_path):
    ours, _, _ = run(tmp_path / "a", "metalr")
    same, _, _ = run(tmp_path / "b", "metalr_constant+average")
    assert ours.rates == same.rates
    for one, other in zip(ours.trainer.model.parameters(), same.trainer.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_the_fitted_head_alone_with_the_schedule_of_cosine_decay(tmp_path):
    fitted, _, _ = run(tmp_path / "a", "fitted_cosine", learning_rate=1e-3)
    plain, _, _ = run(tmp_path / "b", "cosine", learning_rate=1e-3)
    assert [set(rates.values()) for rates in fitted.rates] == [set(rates.values()) for rates in plain.rates]
    same = [
        all(torch.equal(a[name], b[name]) for name in a) for a, b in zip(fitted.weights, plain.weights, strict=True)
    ]
    # Until the fourth step they are the same run, to the bit.
    assert all(same[:3])
    assert not any(same[3:])
    assert fitted.trainer.fresh_head.images > 0


def test_without_the_fitted_head(tmp_path):
    ours, _, _ = run(tmp_path / "a", "metalr")
    fresh, _, _ = run(tmp_path / "b", "metalr_fresh_head")
    assert ours.trainer.fresh_head.images > 0
    assert fresh.trainer.fresh_head.images == 0
    assert list(ours.rates[2].values()) == list(fresh.rates[2].values())


@pytest.mark.parametrize("name", [name for name, strategy in STRATEGIES.items() if not strategy.averages])
def test_every_strategy_can_have_the_average_of_its_weights(tmp_path, name):
    for module in get_strategy(name).pip_names:
        pytest.importorskip(module)
    # A head that is fitted between two steps is not among the weights after each.
    options = {"tuning_arguments": {"fit_head": False}}
    plain, _, _ = run(tmp_path / "a", name, **options)
    watch, _, _ = run(tmp_path / "b", f"{name}+average", **options)
    # It takes the same steps.
    assert watch.rates == plain.rates
    for one, other in zip(plain.weights, watch.weights, strict=True):
        assert all(torch.equal(value, other[parameter]) for parameter, value in one.items())
    # It ends with Shamir and Zhang's average of the weights after each, of the weight (η + 1) / (t + η), η = 3.
    after = [*plain.weights[1:], {parameter: p.detach() for parameter, p in plain.trainer.model.named_parameters()}]
    for parameter, p in watch.trainer.model.named_parameters():
        average = torch.zeros_like(p)
        for t, weights in enumerate(after, start=1):
            average += 4 / (t + 3) * (weights[parameter] - average)
        # A calibration takes the first step anew after it has been averaged; its weights have a share of .008 here.
        near = 1e-3 if get_strategy(name).cost == CALIBRATED else 1e-5
        torch.testing.assert_close(p.detach(), average, rtol=near, atol=near)
    assert get_strategy(f"{name}+average").uses_learning_rate == get_strategy(name).uses_learning_rate


@pytest.mark.parametrize("name", [name for name, strategy in STRATEGIES.items() if strategy.averages])
def test_what_averages_already_is_not_averaged(name):
    with pytest.raises(ValueError, match=rf"strategies='{name}\+average': {name} averages the weights itself"):
        get_strategy(f"{name}+average")


def test_an_average_of_an_unknown_strategy_is_refused():
    with pytest.raises(ValueError, match=r"strategies='cosin\+average' is not one"):
        get_strategy("cosin+average")


def test_what_is_missing_is_asked_for_by_the_name_that_pip_knows():
    strategy = Strategy("theirs", lambda job: job.trainer(), packages={"no_such_module": "no-such-package"})
    with pytest.raises(ImportError, match="strategies='theirs' needs a package more: pip install no-such-package"):
        strategy.check_packages()
    assert STRATEGIES["prodigy_plus"].packages == {"prodigyplus": "prodigy-plus-schedule-free"}


def test_the_table_of_strategies_says_what_has_to_be_given():
    lines = {line.split(" | ")[0].strip("| `"): line for line in strategies_table().splitlines()}
    assert lines["schedule_free"] == "| `schedule_free` | yes |  |  | yes | 1 | `schedulefree` |"
    assert lines["l_dog"] == "| `l_dog` |  |  | yes | yes | 1 | `dog-optimizer` |"
    assert lines["metalr"].startswith("| `metalr` |  |  | yes | yes | 1, and")
    assert lines["gen"].endswith("| 1.25: three forward passes at every fourth step | `gen-optim` |")

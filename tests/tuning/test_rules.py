import io
import math

import pytest
import torch

from metalr_hf.tuning import rules
from metalr_hf.tuning.rules import RULES, AdamRule, Additive, Proportional, Rule, get_rule, limit_change, register_rule


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


LR = tensor(1e-5, 1e-3, 0.5)
H = tensor(-40.0, 2.0, 0.01)


def hypergradients(steps):
    generator = torch.Generator().manual_seed(0)
    # Layers of very different sizes, and signs that change.
    return torch.randn(steps, 3, generator=generator, dtype=torch.float64) * tensor(100.0, 1.0, 1e-4) + 0.5 * H


def assert_close(actual, expected, relative=1e-14):
    torch.testing.assert_close(actual, expected, rtol=relative, atol=0.0)


def test_additive_is_its_equation():
    assert_close(Additive(1e-4)(LR, H), tensor(1e-5 + 4e-3, 1e-3 - 2e-4, 0.5 - 1e-6))


def test_proportional_is_its_equation():
    assert_close(Proportional(0.1)(LR, H), tensor(1e-5 * 5, 1e-3 * 0.8, 0.5 * 0.999))


def test_proportional_is_additive_with_a_step_size_that_follows_the_rate():
    assert_close(
        Proportional(0.1)(LR, H), torch.stack([Additive(0.1 * float(a))(a, h) for a, h in zip(LR, H, strict=True)])
    )


def test_first_adam_step_changes_every_rate_by_the_factor_exp_hyper_lr():
    # At the first step Adam is the sign of its gradient, so the size of the loss and of the layer drop out.
    new = AdamRule(0.2, eps=0.0)(LR, H)
    assert_close(new / LR, tensor(math.exp(0.2), math.exp(-0.2), math.exp(-0.2)), 1e-12)
    assert_close(AdamRule(0.2, eps=0.0)(LR, 1e6 * H), new, 1e-12)


@pytest.mark.parametrize("options", [{}, {"betas": (0.5, 0.7), "eps": 1e-3}])
def test_adam_rule_is_torch_adam_on_the_logarithm_of_the_rate(options):
    log_lr = torch.nn.Parameter(LR.log())
    optimizer = torch.optim.Adam([log_lr], lr=0.05, **options)
    rule, lr = AdamRule(0.05, **options), LR
    for h in hypergradients(20):
        log_lr.grad = log_lr.detach().exp() * h
        optimizer.step()
        lr = rule(lr, h)
        assert_close(lr, log_lr.detach().exp(), 1e-12)
    assert ((lr / LR - 1).abs() > 1e-3).all()


def test_adam_rule_follows_the_rates_that_limits_made_of_its_own():
    # Bounds and trust region change the rate after the rule: the next step starts there, with α h of that rate.
    log_lr = torch.nn.Parameter(LR.log())
    optimizer = torch.optim.Adam([log_lr], lr=0.5)
    rule, lr = AdamRule(0.5), LR
    for h in hypergradients(10):
        with torch.no_grad():
            log_lr.copy_(lr.log())
        log_lr.grad = lr * h
        optimizer.step()
        lr = rule(lr, h)
        assert_close(lr, log_lr.detach().exp(), 1e-12)
        lr = lr.clamp(1e-4, 1e-1)


def test_limits_hold_the_change_within_the_trust_region():
    lr = tensor(1e-2, 1e-2, 1e-2, 1e-2, 1e-2)
    new = limit_change(lr, tensor(1.0, 1.1e-2, 1e-2, 0.9e-2, -3.0), 1.25, 0.0, math.inf)
    assert_close(new, tensor(1.25e-2, 1.1e-2, 1e-2, 0.9e-2, 0.8e-2))


def test_limits_hold_the_bounds():
    new = limit_change(tensor(1e-4, 1e-2, 0.9), tensor(-1.0, 2e-2, 40.0), None, 1e-5, 1.0)
    assert_close(new, tensor(1e-5, 2e-2, 1.0))


def test_bounds_win_over_the_trust_region():
    new = limit_change(tensor(1e-6, 5.0), tensor(1e-6, 5.0), 1.25, 1e-5, 1.0)
    assert_close(new, tensor(1e-5, 1.0))


def test_limits_can_be_switched_off():
    new = tensor(1e-30, 7.0, 1e9)
    assert torch.equal(limit_change(LR, new, None, 0.0, math.inf), new)


def test_limits_leave_a_rate_of_zero_at_zero():
    assert limit_change(tensor(0.0), tensor(0.0), 1.25, 0.0, 1.0).tolist() == [0.0]


def test_the_table_of_rules_is_the_documented_one():
    assert {"additive": Additive, "proportional": Proportional, "adam": AdamRule}.items() <= RULES.items()


@pytest.mark.parametrize("name", RULES)
def test_every_registered_rule_goes_downhill(name):
    for hyper_lr in (1e-6, 0.1):
        new = get_rule(name, hyper_lr)(LR, tensor(-1.0, 0.0, 1.0))
        assert new.dtype == torch.float64
        assert new.shape == LR.shape
        assert new.isfinite().all()
        assert new[0] > LR[0]
        assert new[1] == LR[1]
        assert new[2] < LR[2]


@pytest.mark.parametrize("name", RULES)
def test_every_registered_rule_leaves_its_arguments_and_with_hyper_lr_zero_the_rates_alone(name):
    lr, h = LR.clone(), H.clone()
    get_rule(name, 0.1)(lr, h)
    assert torch.equal(lr, LR)
    assert torch.equal(h, H)
    assert torch.equal(get_rule(name, 0.0)(LR, H), LR)


@pytest.mark.parametrize("name", RULES)
def test_every_registered_rule_resumes_from_a_weights_only_file_bitwise(name):
    whole, lr = get_rule(name, 0.01), LR
    for h in hypergradients(5):
        lr = whole(lr, h)
    file = io.BytesIO()
    torch.save(whole.state_dict(), file)
    after_saving = lr
    expected = []
    for h in hypergradients(10)[5:]:
        lr = whole(lr, h)
        expected.append(lr)
    file.seek(0)
    resumed, lr = get_rule(name, 0.01), after_saving
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for h, value in zip(hypergradients(10)[5:], expected, strict=True):
        lr = resumed(lr, h)
        assert torch.equal(lr, value)


@pytest.mark.parametrize("name", RULES)
def test_a_saved_state_does_not_change_with_the_rule_that_gave_it(name):
    rule = get_rule(name, 0.01)
    rule(LR, H)
    state = rule.state_dict()
    kept = {key: value.clone() if isinstance(value, torch.Tensor) else value for key, value in state.items()}
    rule(LR, -3 * H)
    for key, value in kept.items():
        assert torch.equal(state[key], value) if isinstance(value, torch.Tensor) else state[key] == value


@pytest.mark.parametrize("name", RULES)
def test_every_registered_rule_saves_and_loads_before_its_first_call(name):
    fresh = get_rule(name, 0.1)
    used = get_rule(name, 0.1)
    used(LR, H)
    used.load_state_dict(fresh.state_dict())
    assert torch.equal(used(LR, H), get_rule(name, 0.1)(LR, H))


@pytest.mark.parametrize(
    ("name", "near"), [("proportionel", "'proportional'"), ("add", "'additive'"), ("Adam", "'adam'")]
)
def test_an_unknown_rule_names_the_near_ones_and_all(name, near):
    with pytest.raises(
        ValueError, match=f"{name!r} is not a learning-rate rule.*{near}.*additive, proportional"
    ) as error:
        get_rule(name, 0.1)
    assert all(registered in str(error.value) for registered in RULES)


def test_an_unknown_rule_that_is_near_to_none_lists_all_and_suggests_none():
    with pytest.raises(ValueError, match="'xyz' is not a learning-rate rule") as error:
        get_rule("xyz", 0.1)
    assert "Did you mean" not in str(error.value)
    assert all(registered in str(error.value) for registered in RULES)


def test_a_rule_of_ones_own_is_found_by_name(monkeypatch):
    monkeypatch.setattr(rules, "RULES", dict(RULES))

    @register_rule("sign")
    class Sign(Rule):
        def __call__(self, lr, hypergradient):
            return lr * (1 - self.hyper_lr * hypergradient.sign())

    rule = get_rule("sign", 0.5)
    assert type(rule) is Sign
    assert_close(rule(LR, H), LR * tensor(1.5, 0.5, 0.5))
    assert "sign" not in RULES


def test_a_rule_without_an_equation_says_so():
    with pytest.raises(NotImplementedError, match="Rule does not define __call__"):
        Rule()(LR, H)


def test_an_infinite_trust_region_is_none():
    new = tensor(0.0, 7.0, 1e9)
    assert torch.equal(limit_change(tensor(0.0, 1e-3, 0.0), new, math.inf, 0.0, math.inf), new)


def test_a_rule_starts_anew():
    rule = AdamRule(0.1)
    rule(LR, H)
    rule.reset()
    assert torch.equal(rule(LR, -H), AdamRule(0.1)(LR, -H))


def test_a_rule_that_is_built_is_taken_as_it_is_and_has_its_own_hyper_lr():
    rule = Proportional(0.5)
    assert get_rule(rule) is rule
    with pytest.raises(ValueError, match=r"hyper_lr=0.1 is given beside a rule.*has its own, 0.5.*Proportional\("):
        get_rule(rule, 0.1)
    assert get_rule("proportional").hyper_lr == 0.1


def test_a_rule_whose_init_keeps_nothing_has_a_hyper_lr(monkeypatch):
    monkeypatch.setattr(rules, "RULES", dict(RULES))

    @register_rule("momentum")
    class Momentum(Rule):
        def __init__(self, hyper_lr=0.1):
            self.velocity = 0.0

    assert Momentum().hyper_lr == 0.1
    assert get_rule("momentum", 0.0).hyper_lr == 0.0

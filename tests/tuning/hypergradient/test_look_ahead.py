import copy
import functools
import math

import prodigyopt
import pytest
import schedulefree
import timm.optim
import torch
import transformers
from reference import UPDATES, finite_difference, reference_hypergradient, update
from torch import nn
from torch.func import functional_call

from metalr_hf import MetaLRScheduler

STEPS = 7  # RAdam takes its adaptive branch from the sixth step on.
HYPER_LR = 0.3
MAX_LR_CHANGE = 1.25

CASES = {
    "sgd": ("SGD", {"lr": 0.1}),
    "sgd_maximize": ("SGD", {"lr": 0.01, "maximize": True}),
    "momentum": ("SGD", {"lr": 0.05, "momentum": 0.9}),
    "dampening": ("SGD", {"lr": 0.1, "momentum": 0.9, "dampening": 0.4}),
    "nesterov": ("SGD", {"lr": 0.05, "momentum": 0.9, "nesterov": True}),
    "adam": ("Adam", {"lr": 0.01, "betas": (0.8, 0.95)}),
    "amsgrad": ("Adam", {"lr": 0.01, "amsgrad": True}),
    "adamw": ("AdamW", {"lr": 0.01}),
    "adamw_fused": ("AdamW", {"lr": 0.01, "fused": True}),
    "adamw_foreach": ("AdamW", {"lr": 0.01, "foreach": True}),
    "rmsprop": ("RMSprop", {"lr": 0.003}),
    "rmsprop_centered": ("RMSprop", {"lr": 0.003, "centered": True, "alpha": 0.9}),
    "rmsprop_momentum": ("RMSprop", {"lr": 0.003, "centered": True, "momentum": 0.8}),
    "adagrad": ("Adagrad", {"lr": 0.02, "lr_decay": 0.1, "initial_accumulator_value": 0.01}),
    "nadam": ("NAdam", {"lr": 0.01}),
    "nadam_decoupled": ("NAdam", {"lr": 0.01, "decoupled_weight_decay": True}),
    "radam": ("RAdam", {"lr": 0.01}),
    "radam_decoupled": ("RAdam", {"lr": 0.01, "decoupled_weight_decay": True}),
    "adamax": ("Adamax", {"lr": 0.01}),
    "adadelta": ("Adadelta", {"lr": 0.7, "eps": 1e-3}),
    "muon": ("Muon", {"lr": 0.05}),
    "muon_plain": ("Muon", {"lr": 0.05, "nesterov": False, "adjust_lr_fn": "match_rms_adamw"}),
}
# Warm-up and decay; no step of length zero, which says nothing about the learning rate.
SHAPES = {"constant": lambda step: 1.0, "shaped": lambda step: [0.2, 0.6, 1.0, 0.9, 0.7, 0.5, 0.3, 0.1, 0.05][step]}
RUNS = [(case, "shaped") for case in CASES] + [(case, "constant") for case in ("nesterov", "adamw", "muon")]
RULE = {"rule": "proportional", "hyper_lr": HYPER_LR, "max_lr_change": MAX_LR_CHANGE, "lr_max": math.inf}


@pytest.fixture(autouse=True)
def float64():
    # Models, and what optimizers keep a parameter (NAdam's product of momenta), in float64 throughout.
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


class Network(nn.Module):
    """Convolution and linear layers with batch-norm, and nothing with a kink, which finite differences would feel."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 3, 3, bias=False), nn.BatchNorm2d(3), nn.GELU(), nn.Flatten())
        self.neck = nn.Sequential(nn.Linear(27, 6, bias=False), nn.BatchNorm1d(6), nn.Tanh())
        self.block = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 5, bias=False), nn.BatchNorm1d(5))
        self.head = nn.Linear(5, 3)

    def forward(self, images):
        return self.head(self.block(self.neck(self.stem(images))))


@functools.cache
def batch(index):
    generator = torch.Generator().manual_seed(100 + index)
    images = torch.randn(12, 1, 5, 5, generator=generator)
    return images, torch.randint(0, 3, (12,), generator=generator)


def loss_of(model, data, params=None):
    images, labels = data
    logits = model(images) if params is None else functional_call(model, params, (images,))
    return nn.functional.cross_entropy(logits, labels)


def layer_of(name):
    return name.split(".")[0]


def build(case, seed=0):
    """The network and its optimizer: the groups that decay first, the others after, so that layers interleave."""
    name, options = CASES[case]
    torch.manual_seed(seed)
    model = Network()
    tuned = [n for n, p in model.named_parameters() if p.ndim == 2 or name != "Muon"]
    decayed = [n for n in tuned if model.get_parameter(n).ndim > 1 and n != "block.2.weight"]
    groups = []
    for names, decay in ((decayed, 0.1), ([n for n in tuned if n not in decayed], 0.0)):
        for layer in dict.fromkeys(map(layer_of, names)):
            own = [n for n in names if layer_of(n) == layer]
            params = [model.get_parameter(n) for n in own]
            groups.append({"params": params, "names": own, "layer": layer, "weight_decay": decay})
    return model, getattr(torch.optim, name)(groups, **options)


def names_of(optimizer):
    return [name for group in optimizer.param_groups for name in group["names"]]


def params_of(model, optimizer):
    return {name: model.get_parameter(name).detach().clone() for name in names_of(optimizer)}


def options_of(optimizer):
    return {name: group for group in optimizer.param_groups for name in group["names"]}


def rates_of(scheduler):
    return dict(zip(scheduler.layers, scheduler.learning_rates.tolist(), strict=True))


def snapshot(model, optimizer):
    return {name: value.clone() for name, value in model.state_dict().items()}, cloned(optimizer.state_dict())


def cloned(state_dict):
    """`copy.deepcopy` for an optimizer's state, which takes most of the time here otherwise."""
    state = {
        index: {key: value.clone() if isinstance(value, torch.Tensor) else value for key, value in own.items()}
        for index, own in state_dict["state"].items()
    }
    return {"state": state, "param_groups": [dict(group) for group in state_dict["param_groups"]]}


def step_from(spare, before, grads, rates):
    """Moves a spare model and optimizer to a snapshot, and takes the step with those learning rates there."""
    model, optimizer = spare
    model.load_state_dict(before[0])
    optimizer.load_state_dict(cloned(before[1]))
    for group in optimizer.param_groups:
        group["lr"] = rates[group["layer"]]
        for name, p in zip(group["names"], group["params"], strict=True):
            p.grad = grads[name]
    optimizer.step()
    return model, optimizer


def train_step(model, optimizer, scheduler, data, validation=None, clip=None):
    """A training step as users write it; gives where it began and the gradients that the optimizer saw."""
    before = snapshot(model, optimizer)
    loss_of(model, data).backward()
    if clip is not None:
        nn.utils.clip_grad_norm_(model.parameters(), clip)
    grads = {name: model.get_parameter(name).grad.clone() for name in names_of(optimizer)}
    optimizer.step()
    scheduler.step(None if validation is None else lambda: loss_of(model, validation))
    if validation is not None:
        assert all(model.get_parameter(name).grad is None for name in grads), "the validation gradient is left behind"
    optimizer.zero_grad()
    return before, grads


def slopes_of(spare, before, grads, rates, shape, validation):
    """Central differences in every learning rate, through the steps of torch's own optimizer."""

    @torch.no_grad()
    def loss_after_step(rates):
        scaled = {layer: a * shape for layer, a in rates.items()}
        return loss_of(step_from(spare, before, grads, scaled)[0], validation).item()

    return finite_difference(loss_after_step, rates)


def rule(rates, hypergradients):
    """The proportional rule in its trust region, from the equations."""
    new = {}
    for (layer, a), h in zip(rates.items(), hypergradients.tolist(), strict=True):
        new[layer] = min(max(a * (1 - HYPER_LR * h), a / MAX_LR_CHANGE), a * MAX_LR_CHANGE)
    return new


class Reference:
    """A run of its own, with nothing from the package and nothing from torch.optim but the numbers of the groups."""

    def __init__(self, case, shape=lambda step: 1.0):
        self.name = CASES[case][0]
        self.model, optimizer = build(case)
        self.params = params_of(self.model, optimizer)
        self.options = options_of(optimizer)
        self.rates = {group["layer"]: CASES[case][1]["lr"] for group in optimizer.param_groups}
        self.state = {}
        self.shape = shape

    def gradients(self, data):
        leaves = {name: p.clone().requires_grad_() for name, p in self.params.items()}
        grads = torch.autograd.grad(loss_of(self.model, data, leaves), list(leaves.values()))
        return dict(zip(leaves, grads, strict=True))

    def step(self, step, grads, rates, state=None):
        lr = {name: rates[layer_of(name)] * self.shape(step) for name in self.params}
        return update(self.name, self.params, grads, self.state, lr, self.options)

    def hypergradient(self, step, grads, validation):
        return reference_hypergradient(
            lambda params: loss_of(self.model, validation, params),
            lambda rates: self.step(step, grads, rates)[0],
            self.rates,
        )


def assert_close(actual, expected, relative, absolute=0.0):
    torch.testing.assert_close(torch.as_tensor(actual, dtype=torch.float64), expected, rtol=relative, atol=absolute)


def assert_same_step(model, optimizer, expected, expected_optimizer, absolute=1e-15):
    for name, value in params_of(expected, expected_optimizer).items():
        assert_close(model.get_parameter(name).detach(), value, 1e-12, absolute)
    # Momentum and second moments never see the learning rate, so they agree to the last bit.
    own, other = optimizer.state_dict()["state"], expected_optimizer.state_dict()["state"]
    assert own.keys() == other.keys()
    for index, state in own.items():
        assert state.keys() == other[index].keys()
        for key, value in state.items():
            assert value is other[index][key] is None or torch.equal(value, other[index][key]), key


def assert_all_moved(scheduler):
    rates = scheduler.history.learning_rates / [[scheduler.shape(step)] for step in range(STEPS)]
    assert (rates.max(0) > 1.01 * rates.min(0)).all()
    assert len(set(rates[-1])) > 1


@pytest.mark.parametrize("case", CASES)
def test_the_reference_steps_like_torch(case):
    model, optimizer = build(case)
    reference = Reference(case)
    for step in range(STEPS):
        grads = reference.gradients(batch(step))
        for name, g in grads.items():
            model.get_parameter(name).grad = g.clone()
        optimizer.step()
        reference.params, reference.state = reference.step(step, grads, reference.rates)
        for name, p in reference.params.items():
            assert_close(model.get_parameter(name).detach(), p, 1e-11, 1e-14)


@pytest.mark.parametrize(("case", "shape"), RUNS)
def test_stream_equals_autograd_finite_differences_and_the_repeated_step(case, shape):
    shape = SHAPES[shape]
    model, optimizer = build(case)
    spare = build(case)
    scheduler = MetaLRScheduler(optimizer, shape=shape, **RULE)
    reference = Reference(case, shape)
    assert scheduler.layers == list(reference.rates)
    assert len(scheduler.layers) >= 3
    for step in range(STEPS):
        data, validation, old_rates = batch(2 * step), batch(2 * step + 1), rates_of(scheduler)
        before, grads = train_step(model, optimizer, scheduler, data, validation)
        new_rates = rates_of(scheduler)

        measured = scheduler.history.hypergradients[step]
        reference_grads = reference.gradients(data)
        expected = reference.hypergradient(step, reference_grads, validation)
        assert_close(measured, expected, 1e-9, 1e-12)
        slopes = slopes_of(spare, before, grads, old_rates, shape(step), validation)
        assert_close(measured, slopes, 1e-5, 1e-9)

        reference.rates = rule(reference.rates, expected)
        reference.params, reference.state = reference.step(step, reference_grads, reference.rates)
        assert new_rates == pytest.approx(reference.rates, rel=1e-9)

        used = {layer: a * shape(step) for layer, a in new_rates.items()}
        assert_close(scheduler.history.learning_rates[step], torch.tensor(list(used.values())), 1e-15)
        assert_same_step(model, optimizer, *step_from(spare, before, grads, used))
        assert [group["lr"] for group in optimizer.param_groups] == [
            new_rates[group["layer"]] * shape(step + 1) for group in optimizer.param_groups
        ]
    assert_all_moved(scheduler)
    for name, p in reference.params.items():
        assert_close(model.get_parameter(name).detach(), p, 1e-8, 1e-11)


@pytest.mark.parametrize(("case", "shape"), RUNS)
def test_next_batch_equals_autograd_and_finite_differences_and_rescales_nothing(case, shape):
    shape = SHAPES[shape]
    model, optimizer = build(case)
    spare = build(case)
    scheduler = MetaLRScheduler(optimizer, meta_source="next_batch", shape=shape, **RULE)
    reference = Reference(case, shape)
    last = None
    for step in range(STEPS):
        data, old_rates = batch(step), rates_of(scheduler)
        before, grads = train_step(model, optimizer, scheduler, data)
        measured = scheduler.history.hypergradients[step]
        if last is None:
            assert all(math.isnan(h) for h in measured)
            assert rates_of(scheduler) == old_rates
        else:
            # The loss of this batch, by the learning rates of the step before, from where that step began.
            last_reference, last_reference_grads, last_before, last_grads = last
            expected = last_reference.hypergradient(step - 1, last_reference_grads, data)
            assert_close(measured, expected, 1e-9, 1e-12)
            slopes = slopes_of(spare, last_before, last_grads, old_rates, shape(step - 1), data)
            assert_close(measured, slopes, 1e-5, 1e-9)
            reference.rates = rule(reference.rates, expected)

        # The rates have moved for this step already, and it is taken with them once.
        assert rates_of(scheduler) == pytest.approx(reference.rates, rel=1e-9)
        used = {layer: a * shape(step) for layer, a in rates_of(scheduler).items()}
        assert_close(scheduler.history.learning_rates[step], torch.tensor(list(used.values())), 1e-15)
        again, again_optimizer = step_from(spare, before, grads, used)
        assert_same_step(model, optimizer, again, again_optimizer)
        assert all(torch.equal(model.get_parameter(n), again.get_parameter(n)) for n in grads), "nothing is rescaled"

        reference_grads = reference.gradients(data)
        last = copy.copy(reference), reference_grads, before, grads
        reference.params, reference.state = reference.step(step, reference_grads, reference.rates)
    assert_all_moved(scheduler)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("case", ["sgd", "nesterov", "adamw", "rmsprop_momentum", "muon"])
def test_sgd_lookahead_is_the_papers(case, shape):
    shape = SHAPES[shape]
    model, optimizer = build(case)
    spare, oracle = build(case), build(case)[0]
    scheduler = MetaLRScheduler(optimizer, lookahead="sgd", shape=shape, **RULE)
    for step in range(STEPS):
        rates, theta, validation = rates_of(scheduler), params_of(model, optimizer), batch(2 * step + 1)
        before, g = train_step(model, optimizer, scheduler, batch(2 * step), validation)
        oracle.load_state_dict(before[0])

        def raw_step(rates, theta=theta, g=g, step=step):
            return {name: p - rates[layer_of(name)] * shape(step) * g[name] for name, p in theta.items()}

        def validation_loss(params, validation=validation):
            return loss_of(oracle, validation, params)

        measured = scheduler.history.hypergradients[step]
        expected = reference_hypergradient(validation_loss, raw_step, rates)
        assert_close(measured, expected, 1e-9, 1e-12)
        slopes = finite_difference(lambda rates: validation_loss(raw_step(rates)).item(), rates)
        assert_close(measured, slopes, 1e-5, 1e-9)
        # Step 2 of the paper as it stands there: h_j = -<grad L_val(θ - α g), g_j>.
        looked_ahead = {name: p.requires_grad_() for name, p in raw_step(rates).items()}
        meta_grads = torch.autograd.grad(validation_loss(looked_ahead), list(looked_ahead.values()))
        by_layer = dict.fromkeys(scheduler.layers, 0.0)
        for name, meta_grad in zip(looked_ahead, meta_grads, strict=True):
            by_layer[layer_of(name)] -= shape(step) * (meta_grad * g[name]).sum().item()
        assert_close(measured, torch.tensor(list(by_layer.values())), 1e-9, 1e-12)

        assert rates_of(scheduler) == pytest.approx(rule(rates, expected), rel=1e-9)
        used = {layer: a * shape(step) for layer, a in rates_of(scheduler).items()}
        assert_same_step(model, optimizer, *step_from(spare, before, g, used))
    assert_all_moved(scheduler)


def test_sgd_and_optimizer_lookahead_agree_for_plain_sgd_without_decay():
    runs = []
    for lookahead in ("sgd", "optimizer"):
        model, optimizer = build("sgd")
        for group in optimizer.param_groups:
            group["weight_decay"] = 0.0
        scheduler = MetaLRScheduler(optimizer, lookahead=lookahead, **RULE)
        for step in range(STEPS):
            train_step(model, optimizer, scheduler, batch(2 * step), batch(2 * step + 1))
        runs.append(torch.from_numpy(scheduler.history.hypergradients))
    assert_close(runs[0], runs[1], 1e-9, 1e-12)


@pytest.mark.parametrize("lookahead", ["optimizer", "sgd"])
@pytest.mark.parametrize("rule_name", ["additive", "adam"])
@pytest.mark.parametrize("case", ["nesterov", "adamw"])
def test_the_step_is_that_of_the_new_rate_whatever_the_rule_and_however_far_it_goes(case, rule_name, lookahead):
    model, optimizer = build(case)
    spare = build(case)
    hyper_lr = {"additive": 1.0, "adam": 2.0}[rule_name]
    scheduler = MetaLRScheduler(
        optimizer, rule_name, hyper_lr, lookahead=lookahead, max_lr_change=None, lr_min=1e-4, lr_max=0.2
    )
    ratios = []
    for step in range(STEPS):
        old = rates_of(scheduler)
        before, grads = train_step(model, optimizer, scheduler, batch(2 * step), batch(2 * step + 1))
        new = rates_of(scheduler)
        ratios += [new[layer] / old[layer] for layer in old]
        # The step was noted to the last digit of the parameters, and is stretched by the ratio.
        stretched = 1e-15 * max(1.0, *ratios[-len(old) :])
        assert_same_step(model, optimizer, *step_from(spare, before, grads, new), absolute=stretched)
    assert max(ratios) > 3
    assert min(ratios) < 1 / 3


def test_clipping_between_backward_and_step_is_part_of_the_step():
    model, optimizer = build("adamw")
    scheduler = MetaLRScheduler(optimizer, **RULE)
    reference = Reference("adamw")
    for step in range(STEPS):
        train_step(model, optimizer, scheduler, batch(2 * step), batch(2 * step + 1), clip=0.05)
        grads = reference.gradients(batch(2 * step))
        norm = torch.stack([g.norm() for g in grads.values()]).norm()
        assert norm > 0.1
        clipped = {name: g * 0.05 / (norm + 1e-6) for name, g in grads.items()}
        expected = reference.hypergradient(step, clipped, batch(2 * step + 1))
        assert_close(scheduler.history.hypergradients[step], expected, 1e-9, 1e-12)
        reference.rates = rule(reference.rates, expected)
        reference.params, reference.state = reference.step(step, clipped, reference.rates)


def test_parameters_without_a_gradient_are_left_where_they_are():
    case = "adamw"
    model, optimizer = build(case)
    scheduler = MetaLRScheduler(optimizer, **RULE)
    reference = Reference(case)
    for step in range(STEPS):
        # Another set of parameters is left out at each step, a whole layer among them.
        out = [n for i, n in enumerate(reference.params) if i % 4 == step % 4 or (step == 3 and layer_of(n) == "neck")]
        loss_of(model, batch(2 * step)).backward()
        for name in out:
            model.get_parameter(name).grad = None
        optimizer.step()
        scheduler.step(lambda step=step: loss_of(model, batch(2 * step + 1)))
        optimizer.zero_grad()

        grads = {n: g for n, g in reference.gradients(batch(2 * step)).items() if n not in out}

        def stepped(rates, step=step, grads=grads):
            return {**reference.params, **reference.step(step, grads, rates)[0]}

        leaves = {layer: torch.tensor(a, requires_grad=True) for layer, a in reference.rates.items()}
        loss = loss_of(reference.model, batch(2 * step + 1), stepped(leaves))
        slopes = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        expected = torch.stack([torch.zeros(()) if s is None else s for s in slopes])
        assert_close(scheduler.history.hypergradients[step], expected, 1e-9, 1e-12)
        reference.rates = rule(reference.rates, expected)
        params, state = reference.step(step, grads, reference.rates)
        reference.params, reference.state = {**reference.params, **params}, {**reference.state, **state}
        for name, p in reference.params.items():
            assert_close(model.get_parameter(name).detach(), p, 1e-9, 1e-12)


REFUSED = {
    "ASGD": "linear",  # takes the rate of the step before, and its averages see it
    "Adafactor": "linear",  # takes min(lr, 1 / sqrt(t)), so a rate above that changes nothing
    "LBFGS": "closure",
    "Rprop": "linear",  # has step sizes of its own
    "SparseAdam": "[Ss]parse",
}


def one_of_each_shape():
    return [nn.Parameter(torch.linspace(-1, 1, 12).reshape(shape)) for shape in ((3, 4), (12,))]


def test_every_optimizer_of_torch_is_classified():
    found = {
        name
        for name, value in vars(torch.optim).items()
        if isinstance(value, type) and issubclass(value, torch.optim.Optimizer) and value is not torch.optim.Optimizer
    }
    tested = {name for name, _ in CASES.values()}
    assert tested == UPDATES.keys()
    assert not tested & REFUSED.keys()
    assert found == tested | REFUSED.keys()


@pytest.mark.parametrize("name", REFUSED)
def test_nonlinear_optimizers_of_torch_are_refused(name):
    optimizer = getattr(torch.optim, name)(one_of_each_shape(), lr=0.01)
    with pytest.raises(ValueError, match=rf"{name} cannot be tuned.*{REFUSED[name]}"):
        MetaLRScheduler(optimizer)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        pytest.param(lambda p: schedulefree.AdamWScheduleFree(p, lr=0.01), "AdamWScheduleFree", id="schedule_free"),
        pytest.param(lambda p: schedulefree.SGDScheduleFree(p, lr=0.01), "SGDScheduleFree", id="schedule_free_sgd"),
        pytest.param(
            lambda p: schedulefree.RAdamScheduleFree(p, lr=0.01), "RAdamScheduleFree", id="schedule_free_radam"
        ),
        pytest.param(lambda p: prodigyopt.Prodigy(p, lr=1.0), "Prodigy", id="prodigy"),
        pytest.param(
            lambda p: transformers.Adafactor(p, lr=0.01, relative_step=False, scale_parameter=False, beta1=0.9),
            "Adafactor",
            id="adafactor_whose_momentum_holds_the_rate",
        ),
        pytest.param(lambda p: transformers.Adafactor(p), "Adafactor", id="adafactor_with_rates_of_its_own"),
        pytest.param(lambda p: timm.optim.RMSpropTF(p, lr=0.01, momentum=0.9), "RMSpropTF", id="rmsprop_tf"),
        pytest.param(lambda p: timm.optim.MADGRAD(p, lr=0.01), "MADGRAD", id="madgrad"),
        pytest.param(lambda p: timm.optim.Lars(p, lr=0.01, weight_decay=0.01, trust_clip=True), "Lars", id="larc"),
        pytest.param(
            lambda p: timm.optim.NAdamW(p, lr=0.01, weight_decay=0.01, corrected_weight_decay=True),
            "NAdamW",
            id="decay_by_the_square_of_the_rate",
        ),
        pytest.param(
            lambda p: timm.optim.Lookahead(torch.optim.AdamW(p, lr=0.01)), "Lookahead", id="lookahead_wrapper"
        ),
    ],
)
@pytest.mark.parametrize("training", [False, True])
def test_nonlinear_optimizers_of_others_are_refused(make, name, training):
    optimizer = make(one_of_each_shape())
    if training and hasattr(optimizer, "train"):
        optimizer.train()
    with pytest.raises(ValueError, match=f"{name} cannot be tuned: "):
        MetaLRScheduler(optimizer)


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(
            lambda p: transformers.Adafactor(p, lr=0.01, relative_step=False, scale_parameter=False, weight_decay=0.1),
            id="adafactor",
        ),
        pytest.param(lambda p: transformers.Adafactor(p, lr=0.01, relative_step=False), id="adafactor_scaled"),
        pytest.param(lambda p: timm.optim.Lion(p, lr=0.01, weight_decay=0.1), id="lion"),
        pytest.param(lambda p: timm.optim.RMSpropTF(p, lr=0.01, momentum=0.9, lr_in_momentum=False), id="rmsprop_tf"),
        pytest.param(lambda p: timm.optim.Lamb(p, lr=0.01), id="lamb"),
    ],
)
def test_linear_optimizers_of_others_are_taken_and_exact(make):
    def loss(params, data):
        return nn.functional.cross_entropy(torch.tanh(data[0].flatten(1)[:, :3] @ params[0]) + params[1][:4], data[1])

    params = one_of_each_shape()
    optimizer = make([{"params": [params[0]], "layer": "matrix"}, {"params": [params[1]], "layer": "vector"}])
    scheduler = MetaLRScheduler(optimizer, **RULE)
    for step in range(STEPS):
        before = copy.deepcopy([p.detach() for p in params]), copy.deepcopy(optimizer.state_dict())
        rates = rates_of(scheduler)
        loss(params, batch(2 * step)).backward()
        optimizer.step()
        scheduler.step(lambda step=step: loss(params, batch(2 * step + 1)))
        optimizer.zero_grad()

        def again(rates, before=before, step=step):
            params = [p.clone().requires_grad_() for p in before[0]]
            optimizer = make([{"params": [p], "layer": layer} for p, layer in zip(params, rates, strict=True)])
            optimizer.load_state_dict(copy.deepcopy(before[1]))
            for group in optimizer.param_groups:
                group["lr"] = rates[group["layer"]]
            loss(params, batch(2 * step)).backward()
            optimizer.step()
            return params

        def loss_after(rates, again=again, step=step):
            return loss(again(rates), batch(2 * step + 1)).item()

        measured = scheduler.history.hypergradients[step]
        assert_close(measured, finite_difference(loss_after, rates), 1e-5, 1e-9)
        for p, expected in zip(params, again(rates_of(scheduler)), strict=True):
            assert_close(p.detach(), expected.detach(), 1e-12, 1e-15)
    assert all(a != 0.01 for a in rates_of(scheduler).values())


def test_the_check_moves_neither_parameters_nor_state_nor_random_numbers():
    model, optimizer = build("adamw")
    loss_of(model, batch(0)).backward()
    optimizer.step()
    before, random = snapshot(model, optimizer), torch.get_rng_state()
    grads = [p.grad.clone() for p in model.parameters()]
    MetaLRScheduler(optimizer)
    assert all(torch.equal(a, b) for a, b in zip(before[0].values(), model.state_dict().values(), strict=True))
    assert str(before[1]["state"]) == str(optimizer.state_dict()["state"])
    assert all(torch.equal(g, p.grad) for g, p in zip(grads, model.parameters(), strict=True))
    assert torch.equal(random, torch.get_rng_state())


class SignDescent(torch.optim.Optimizer):
    """Linear in its learning rate, with a setting that is no option of its groups, as 8-bit optimizers have."""

    def __init__(self, params, lr, scale):
        super().__init__(params, {"lr": lr})
        self.scale = scale

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(p.grad.sign() * group["lr"] * self.scale)


def test_a_linear_optimizer_with_attributes_of_its_own_is_taken():
    scheduler = MetaLRScheduler(SignDescent(one_of_each_shape(), lr=0.01, scale=2.0))
    assert scheduler.layers == ["group_0"]


class Inner(torch.optim.Optimizer):
    """Hands the step on to an optimizer that it holds, as wrappers do."""

    def __init__(self, optimizer):
        self.held = optimizer
        super().__init__(optimizer.param_groups, optimizer.defaults)
        self.param_groups = optimizer.param_groups

    def step(self, closure=None):
        return self.held.step(closure)


def test_a_wrapper_that_hides_its_optimizer_is_refused_and_its_parameters_stay():
    params = one_of_each_shape()
    for p in params:
        p.grad = torch.ones_like(p)
    before = [p.detach().clone() for p in params]
    with pytest.raises(ValueError, match="Inner cannot be tuned"):
        MetaLRScheduler(Inner(torch.optim.SGD(params, lr=0.1)))
    assert all(torch.equal(a, b) for a, b in zip(before, params, strict=True))

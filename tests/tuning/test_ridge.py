"""A head in closed form: against heads that are really fitted without each image, one by one."""

import math

import pytest
import torch
from torch.nn.functional import cross_entropy, linear, one_hot

from metalr_hf.tuning.ridge import LOGIT_STD, PENALTIES, SCALES, fit_head


def examples(n=24, features=5, classes=3, noise=2.5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % classes
    means = 2 * torch.randn(classes, features, generator=generator)
    return means[labels] + noise * torch.randn(n, features, generator=generator), labels


def test_labels_may_be_of_any_integer_type():
    x, labels = examples()
    assert torch.equal(fit_head(x, labels.to(torch.uint8), 3).weight, fit_head(x, labels, 3).weight)


def ridge(x, targets, counts, penalty):
    """Weighted ridge regression with an intercept that is not penalised, from its normal equations."""
    x = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], 1)
    penalties = torch.full((x.shape[1],), penalty, dtype=x.dtype)
    penalties[-1] = 0
    gram = x.T @ (counts[:, None] * x) + penalties.diag()
    return torch.linalg.solve(gram, x.T @ (counts[:, None] * targets))


@pytest.mark.parametrize("weights", [None, torch.tensor([0.5, 1.0, 3.0])], ids=["alike", "weighted"])
@pytest.mark.parametrize("features", [5, 40], ids=["few features", "more features than images"])
def test_the_loss_is_that_of_heads_fitted_without_each_image(features, weights):
    x, labels = examples(features=features)
    head = fit_head(x, labels, 3, weights)
    x, targets = x.double(), one_hot(labels).double()
    counts = torch.ones(len(x)).double() if weights is None else weights.double()[labels]
    center = (counts @ x) / counts.sum()
    largest = torch.linalg.svdvals(counts.sqrt()[:, None] * (x - center))[0] ** 2
    losses = []
    for penalty in (PENALTIES * largest).tolist():
        answers = []
        for i in range(len(x)):
            others = torch.arange(len(x)) != i
            solution = ridge(x[others], targets[others], counts[others], penalty)
            answers.append(torch.cat([x[i], torch.ones(1).double()]) @ solution)
        for scale in SCALES.tolist():
            each = cross_entropy(scale * torch.stack(answers), labels, reduction="none")
            losses.append(float((counts * each).mean()))
    assert head.loss == pytest.approx(min(losses), rel=1e-6)


def test_the_head_is_the_ridge_solution_at_a_moderate_scale():
    x, labels = examples(n=60, noise=0.5)
    head = fit_head(x, labels, 3)
    logits = linear(x, head.weight, head.bias)
    assert (logits.argmax(1) == labels).float().mean() > 0.95
    spread = (logits - logits.mean(1, keepdim=True)).std(0).square().mean().sqrt()
    assert spread.item() == pytest.approx(LOGIT_STD, rel=1e-4)
    counts, targets = torch.ones(60).double(), one_hot(labels).double()
    largest = torch.linalg.svdvals(x.double() - x.double().mean(0))[0] ** 2

    def direction(weight):
        return weight.flatten() / weight.norm()

    solutions = [direction(ridge(x.double(), targets, counts, float(p * largest))[:-1].T) for p in PENALTIES]
    assert min((direction(head.weight).double() - solution).norm().item() for solution in solutions) < 1e-5


def test_features_that_say_nothing_have_the_loss_of_a_constant_answer():
    generator = torch.Generator().manual_seed(1)
    x, labels = torch.randn(60, 4, generator=generator), torch.arange(60) % 3
    assert fit_head(x, labels, 3).loss == pytest.approx(math.log(3), rel=0.05)


def test_features_of_another_size_give_the_same_answers():
    x, labels = examples()
    one, other = fit_head(x, labels, 3), fit_head(1000 * x + 7, labels, 3)
    torch.testing.assert_close(
        linear(x, one.weight, one.bias), linear(1000 * x + 7, other.weight, other.bias), atol=1e-3, rtol=1e-3
    )
    assert one.loss == pytest.approx(other.loss, rel=1e-4)


def test_classes_without_an_image_and_features_that_do_not_vary_give_a_finite_head():
    x, labels = examples()
    head = fit_head(x, labels, 7)
    assert head.weight.shape == (7, 5)
    assert head.weight.isfinite().all()
    assert linear(x, head.weight, head.bias).argmax(1).max() <= 2
    head = fit_head(torch.ones(6, 4), torch.arange(6) % 2, 2)
    assert head.weight.isfinite().all()
    assert head.loss > math.log(2)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_features_that_are_not_finite_give_no_head(value):
    x, labels = examples()
    x[3, 1] = value
    assert fit_head(x, labels, 3).loss == math.inf


def test_half_precision_features_are_fitted_in_full():
    x, labels = examples()
    head = fit_head(x.to(torch.bfloat16), labels, 3)
    assert head.weight.dtype == torch.float32
    assert head.loss < math.log(3)


@pytest.mark.parametrize(("labels", "classes"), [([1] * 24, 3), ([0, 1] * 12, 25)], ids=["one class", "many classes"])
def test_images_that_do_not_tell_classes_apart_give_no_head(labels, classes):
    head = fit_head(examples()[0], torch.tensor(labels), classes)
    assert head.loss == math.inf
    assert not head.weight.any()
    assert not head.bias.any()

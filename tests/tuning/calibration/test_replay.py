import copy

import pytest
import timm
import torch
from small_runs import arguments, images, resnet, vit
from torch import nn
from torch.nn.functional import linear
from transformers import SegformerConfig, SegformerForSemanticSegmentation

from metalr_hf import MetaLRTrainer, layer_groups
from metalr_hf.layers.names import head_layers
from metalr_hf.tuning.calibration import replay, search
from metalr_hf.tuning.calibration.replay import ReplayedLoss
from metalr_hf.tuning.contexts import preserve_random_state, untouched

PIXELS = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def segmenter():
    config = SegformerConfig(hidden_sizes=[8, 16], depths=[1, 1], num_encoder_blocks=2, sr_ratios=[2, 1])
    config.update({"patch_sizes": [3, 3], "strides": [2, 2], "num_attention_heads": [1, 2], "mlp_ratios": [2, 2]})
    config.update({"decoder_hidden_size": 16, "num_labels": 3, "classifier_dropout_prob": 0.0})
    return SegformerForSemanticSegmentation(config)


class InPlace(nn.Module):
    """Works in place on what a module gave, calls one module twice, and has a loss that is a module."""

    def __init__(self):
        super().__init__()
        self.stem, self.mix, self.head = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1), nn.Linear(4, 2)
        self.loss = nn.Tanh()

    def forward(self, pixels):
        features = self.stem(pixels)
        features += 1
        features = self.mix(self.mix(features)).mean((2, 3))
        features.mul_(2)
        return self.loss(self.head(features))


class Functional(InPlace):
    """Uses the weights of its head without calling it, and a module behind it."""

    def forward(self, pixels):
        return self.loss(linear(self.stem(pixels).mean((2, 3)), self.head.weight))


class Hooked(nn.Module):
    """Reads the features of its backbone by a hook on a part of it."""

    def __init__(self):
        super().__init__()
        self.backbone, self.head = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), nn.Linear(4, 2)
        self.backbone[0].register_forward_hook(lambda module, given, output: self.found.append(output.mean((2, 3))))

    def forward(self, pixels):
        self.found = []
        self.backbone(pixels)
        return self.head(self.found[0])


class DropoutBehind(InPlace):
    """Draws random numbers behind its head, which are those that its backbone leaves."""

    def __init__(self, drop=0.5):
        super().__init__()
        self.drop = nn.Dropout(drop)

    def forward(self, pixels):
        return nn.functional.dropout(self.head(self.drop(self.stem(pixels)).mean((2, 3))), 0.5)


class GivesItsHead(InPlace):
    """Hands the weights of its head to a part that comes before it."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Bilinear(4, 4, 4)

    def forward(self, pixels):
        features = self.stem(pixels).mean((2, 3))
        return self.head(self.scale(features, self.head.weight.mean(0).expand_as(features)))


class Sparse(InPlace):
    """Has a part that gives a sparse tensor."""

    def __init__(self):
        super().__init__()
        self.thin = nn.Identity()
        self.thin.forward = lambda features: features.to_sparse()

    def forward(self, pixels):
        return self.head(self.thin(self.stem(pixels).mean((2, 3))).to_dense())


class AnswersTwice(InPlace):
    """Answers once more to images that its first answer has changed."""

    @property
    def logits_of(self):
        return lambda pixels: self(pixels * (1 + self(pixels).sum()))


class AnswersSome(InPlace):
    """Answers once more where its first answer is a small one."""

    @property
    def logits_of(self):
        return lambda pixels: self(pixels) if (first := self(pixels)).abs().mean() > 0.05 else first


def head_of(model):
    if hasattr(model, "head") and isinstance(model.head, nn.Linear):
        return list(model.head.parameters())
    parameters, layers = dict(model.named_parameters()), layer_groups(model)
    return [parameters[name] for layer in head_layers(list(layers)) for name in layers[layer]]


def losses(model, calls=3, batches=2):
    """The losses with heads of other sizes, the last with the first one; as they come out and in full."""
    head = head_of(model)

    def plain():
        answer = getattr(model, "logits_of", model)
        outputs = [answer(pixels) for pixels in PIXELS.split(len(PIXELS) // batches)]
        return sum(
            (output if isinstance(output, torch.Tensor) else output.logits).square().mean() for output in outputs
        )

    def all_of(loss):
        found = []
        for factor in [1.0, *[0.5] * calls, 2.0**calls]:
            torch._foreach_mul_(head, factor)
            with preserve_random_state():
                found.append(float(loss()))
        return found

    replayed = ReplayedLoss(model, head, plain)
    with torch.no_grad(), untouched(model):
        model.train()
        expected = all_of(plain)
        with replayed.backbone_kept():
            found = all_of(replayed)
    return found, expected, replayed


@pytest.mark.parametrize("name", ["test_vit", "test_resnet", "test_efficientnet", "test_convnext"])
def test_the_losses_of_timm_are_those_in_full_without_its_blocks(name):
    torch.manual_seed(0)
    size = {"img_size": 32} if name == "test_vit" else {}
    model, calls = timm.create_model(name, num_classes=3, **size), []
    # One inside a larger part: the hooks of such a part itself are called with what it gave before.
    inner = [module for module in model.modules() if isinstance(module, nn.Conv2d)][:2][-1]
    inner.register_forward_hook(lambda *_: calls.append(1))
    before = copy.deepcopy(model.state_dict())
    found, expected, loss = losses(model)
    assert found == expected
    assert len(set(found)) == len(found) - 1
    assert loss.replays == len(found) - 1
    # Two batches each: those in full, and the first one.
    assert len(calls) == 2 * (len(found) + 1)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any("forward" in module.__dict__ for module in model.modules())
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("make", [segmenter, InPlace, lambda: DropoutBehind(drop=0.0)])
def test_other_models(make):
    torch.manual_seed(0)
    found, expected, loss = losses(make())
    assert found == expected
    assert loss.replays == len(found) - 1


@pytest.mark.parametrize("make", [Functional, Hooked, DropoutBehind, GivesItsHead, Sparse, AnswersTwice])
def test_what_cannot_be_replayed_runs_in_full(make):
    torch.manual_seed(0)
    found, expected, loss = losses(make())
    assert found == expected
    assert loss.replays == 0


def test_a_pass_that_is_another_one_runs_in_full_and_so_do_those_after_it():
    torch.manual_seed(0)
    found, expected, loss = losses(AnswersSome())
    assert found == expected
    assert 0 < loss.replays < len(found) - 1


def test_a_model_with_too_much_to_note_runs_in_full(monkeypatch):
    # Six images of 30 x 30 pixels in four channels, in four bytes each, come out of three convolutions and go into two.
    needed = 4 * (6 * 3 * 32 * 32 + 5 * 6 * 4 * 30 * 30)
    for limit, is_replayed in ((needed, True), (needed - 1, False)):
        monkeypatch.setattr(replay, "LARGEST_NOTES", limit)
        found, expected, loss = losses(InPlace())
        assert found == expected
        assert bool(loss.replays) is is_replayed


def test_a_model_with_a_forward_of_its_own_keeps_it():
    model = InPlace()
    own = model.mix.forward = lambda features, forward=model.mix.forward: -forward(features)
    found, expected, loss = losses(model)
    assert found == expected
    assert loss.replays
    assert model.mix.forward is own


def test_without_a_head_every_pass_is_in_full():
    model, passes = InPlace(), []
    loss = ReplayedLoss(model, (), lambda: passes.append(1) or model(PIXELS).mean())
    with loss.backbone_kept():
        assert loss() == loss()
    assert (len(passes), loss.replays) == (2, 0)


@pytest.mark.parametrize(("make_model", "source"), [(vit, "next_batch"), (resnet, "next_batch"), (resnet, "stream")])
def test_a_run_is_the_same_bit_for_bit_and_costs_less(tmp_path, make_model, source, monkeypatch):
    def run(folder):
        args = arguments(tmp_path / folder, calibrate=None, meta_source=source)
        trainer = MetaLRTrainer(make_model(), args, train_dataset=images())
        trainer.train()
        return trainer

    replayed = run("replayed")
    monkeypatch.setattr(search, "ReplayedLoss", type(None))
    in_full = run("full")
    assert all(torch.equal(a, b) for a, b in zip(replayed.model.parameters(), in_full.model.parameters(), strict=True))
    assert replayed.lr_scheduler.calibration == in_full.lr_scheduler.calibration
    # A forward pass counts as a third, and the head is walked over three rungs at least.
    assert in_full.lr_scheduler.extra_passes - replayed.lr_scheduler.extra_passes >= 1


def test_a_compiled_model_runs_in_full(tmp_path):
    def forwards(model):
        args = arguments(tmp_path, calibrate=None, meta_source="next_batch", fit_head=False, max_steps=4)
        trainer = MetaLRTrainer(model, args, train_dataset=images())
        trainer.train()
        return trainer.lr_scheduler.calibration_forwards

    model = resnet()
    model.compile(backend="eager")
    assert forwards(model) >= forwards(resnet()) + 3

"""Networks that learn standardised numbers, and are saved so that others get answers in units."""

import pytest
import torch
from digits import save_timm, save_vit
from transformers import AutoModelForImageClassification, DeiTConfig, DeiTForImageClassificationWithTeacher, set_seed

from metalr_hf.models.units import answer_in_units

MEAN, SCALE = [40.0, -3.0], [12.0, 0.5]
PIXELS = torch.zeros(3, 16, 16)
IMAGES = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def answers(model):
    with torch.no_grad():
        return model.eval()(pixel_values=IMAGES).logits


def distilled(folder):
    set_seed(0)
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16, "patch_size": 4}
    DeiTForImageClassificationWithTeacher(DeiTConfig(**small, num_labels=2)).save_pretrained(folder)


KINDS = {"vit": lambda f: save_vit(f, classes=2), "timm": lambda f: save_timm(f, classes=2)}


@pytest.mark.parametrize("kind", KINDS)
def test_it_answers_in_units_is_saved_in_units_and_goes_on_from_there(kind, tmp_path):
    KINDS[kind](tmp_path / "start")
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "start")
    plain = answers(model)
    answer_in_units(model, PIXELS, MEAN, SCALE)
    expected = plain * torch.tensor(SCALE) + torch.tensor(MEAN)
    torch.testing.assert_close(answers(model), expected)
    model.save_pretrained(tmp_path / "saved")
    torch.testing.assert_close(answers(AutoModelForImageClassification.from_pretrained(tmp_path / "saved")), expected)
    # As a checkpoint is gone on from.
    state = {name: value.clone() for name, value in model.state_dict().items()}
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    model.load_state_dict(state)
    torch.testing.assert_close(answers(model), expected)
    torch.testing.assert_close(dict(model.named_parameters()), weights)
    # As one that was trained is trained again, in other units.
    again = AutoModelForImageClassification.from_pretrained(tmp_path / "saved")
    answer_in_units(again, PIXELS, [1.0, 2.0], [3.0, 4.0], was_trained=True)
    torch.testing.assert_close(answers(again), expected, rtol=1e-4, atol=1e-4)


def test_a_distilled_network_has_two_heads(tmp_path):
    distilled(tmp_path / "start")
    model = DeiTForImageClassificationWithTeacher.from_pretrained(tmp_path / "start")
    plain = answers(model)
    answer_in_units(model, PIXELS, MEAN, SCALE)
    expected = plain * torch.tensor(SCALE) + torch.tensor(MEAN)
    torch.testing.assert_close(answers(model), expected)
    model.save_pretrained(tmp_path / "saved")
    saved = DeiTForImageClassificationWithTeacher.from_pretrained(tmp_path / "saved")
    torch.testing.assert_close(answers(saved), expected)


def test_a_network_without_such_a_head_is_refused(tmp_path):
    model = AutoModelForImageClassification.from_pretrained(save_vit(tmp_path, classes=2))
    model.classifier = torch.nn.Linear(32, 2, bias=False)
    with pytest.raises(ValueError, match="does not end in a linear layer with a bias"):
        answer_in_units(model, PIXELS, MEAN, SCALE)
    # Nothing is left behind by looking.
    assert not any(module._forward_hooks for module in model.modules())

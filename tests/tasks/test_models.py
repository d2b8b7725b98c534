"""Models by name: a head for the classes at hand, and errors that name the argument."""

import pytest
import torch
from digits import save_vit

from metalr_hf.cli.arguments import ModelArguments
from metalr_hf.data.loading import DataArguments
from metalr_hf.tasks.models import load_model, load_processor

pytestmark = pytest.mark.usefixtures("offline")
CLASSES = {0: "benign", 1: "malignant"}


def test_a_model_gets_a_head_for_the_classes_and_keeps_its_other_weights(tmp_path):
    arguments = ModelArguments(str(save_vit(tmp_path)))
    two, three = load_model(arguments, CLASSES), load_model(arguments, {**CLASSES, 2: "normal"})
    assert (two.config.id2label, three.classifier.out_features) == (CLASSES, 3)
    assert torch.equal(two.vit.layernorm.weight, three.vit.layernorm.weight)
    with pytest.raises(FileNotFoundError, match="model_name_or_path='/no/such/model': no model there"):
        load_model(ModelArguments("/no/such/model"), CLASSES)


def test_of_the_demo_s_digits_nothing_is_cropped_away():
    model = load_model(ModelArguments(), CLASSES)
    load_processor(ModelArguments(), DataArguments(), model)
    assert model.config.pretrained_cfg["crop_pct"] == 1.0

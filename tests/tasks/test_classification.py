"""Models by name: a head for the classes at hand, and errors that name the argument."""

import pytest
import torch
from digits import save_vit

from metalr_hf.models.loading import ModelArguments
from metalr_hf.tasks import Classification

pytestmark = pytest.mark.usefixtures("offline")
TASK = Classification()
CLASSES = {0: "benign", 1: "malignant"}


def test_a_model_gets_a_head_for_the_classes_and_keeps_its_other_weights(tmp_path):
    arguments = ModelArguments(str(save_vit(tmp_path)))
    two, three = TASK.load_model(arguments, CLASSES), TASK.load_model(arguments, {**CLASSES, 2: "normal"})
    assert (two.config.id2label, three.classifier.out_features) == (CLASSES, 3)
    assert torch.equal(two.vit.layernorm.weight, three.vit.layernorm.weight)
    with pytest.raises(FileNotFoundError, match="model_name_or_path='/no/such/model': no model there"):
        TASK.load_model(ModelArguments("/no/such/model"), CLASSES)


def test_of_the_demo_s_digits_nothing_is_cropped_away():
    model = TASK.load_model(ModelArguments(), CLASSES)
    TASK.load_processor(ModelArguments(), model)
    assert model.config.pretrained_cfg["crop_pct"] == 1.0

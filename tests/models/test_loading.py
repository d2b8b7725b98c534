"""Configurations of pretrained models: what timm writes down and transformers cannot read."""

import json

import pytest
import timm
import torch
from safetensors.torch import save_file
from transformers import AutoModelForImageClassification

from metalr_hf.cli.layers import empty_model
from metalr_hf.models.loading import ModelArguments, load_config
from metalr_hf.models.timm import make_portable
from metalr_hf.tasks import Classification

pytestmark = pytest.mark.usefixtures("offline")
TASK = Classification()


@pytest.fixture
def folder(tmp_path):
    """As timm itself saves a network."""
    network = timm.create_model("test_resnet", num_classes=3, drop_rate=0.3)
    timm.models.save_for_hf(network, tmp_path / "timm", model_args={"drop_rate": 0.3})
    assert json.loads((tmp_path / "timm" / "config.json").read_text())["model_args"]["num_classes"] == 3
    return str(tmp_path / "timm")


def test_a_folder_that_timm_saved_can_be_trained_and_what_is_saved_loads_in_both_libraries(tmp_path, folder):
    assert load_config(folder).num_labels == 3
    model = TASK.load_model(ModelArguments(folder), {0: "a", 1: "b"}).eval()
    assert (model.timm_model.num_classes, model.timm_model.drop_rate) == (2, 0.3)
    pretrained = timm.create_model(f"local-dir:{folder}", pretrained=True)
    assert torch.equal(model.timm_model.conv1[0].weight, pretrained.conv1[0].weight)
    model.save_pretrained(tmp_path / "saved")
    make_portable(tmp_path / "saved")
    pixels = torch.rand(2, 3, 32, 32)
    ours = AutoModelForImageClassification.from_pretrained(tmp_path / "saved").eval()
    theirs = timm.create_model(f"local-dir:{tmp_path / 'saved'}", pretrained=True).eval()
    with torch.no_grad():
        torch.testing.assert_close(ours(pixels).logits, model(pixels).logits)
        torch.testing.assert_close(theirs(pixels), model(pixels).logits)
    assert "num_classes" not in json.loads((tmp_path / "saved" / "config.json").read_text())["model_args"]


def test_its_own_head_is_loaded_and_its_layers_are_listed(folder):
    model, _ = TASK.load_trained(ModelArguments(folder))
    pretrained = timm.create_model(f"local-dir:{folder}", pretrained=True)
    assert torch.equal(model.timm_model.fc.weight, pretrained.fc.weight)
    assert empty_model(folder).timm_model.num_classes == 3


@pytest.mark.parametrize("name", ["weights", "weights/model.safetensors"])
def test_weights_alone_are_told_what_they_lack(tmp_path, name):
    (tmp_path / "weights").mkdir()
    save_file(timm.create_model("test_resnet").state_dict(), tmp_path / "weights" / "model.safetensors")
    with pytest.raises(ValueError, match=r"model_name_or_path='.*weights alone .* config.json .*save_for_hf") as error:
        TASK.load_model(ModelArguments(str(tmp_path / name)), {0: "a", 1: "b"})
    assert "\n" not in str(error.value)


def test_an_adapter_is_not_taken_for_weights_alone(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    save_file({"lora_A.weight": torch.zeros(1)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="model_name_or_path=") as error:
        TASK.load_model(ModelArguments(str(tmp_path)), {0: "a", 1: "b"})
    assert "weights alone" not in str(error.value)

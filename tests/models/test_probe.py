import pytest
import torch
from digits import save_timm, save_vit
from transformers import ResNetConfig, ResNetForImageClassification

from metalr_hf.models.loading import ModelArguments
from metalr_hf.models.probe import check_input
from metalr_hf.tasks import get_task

pytestmark = pytest.mark.usefixtures("offline")


def load(name, size=None, task="classification"):
    arguments = ModelArguments(model_name_or_path=str(name))
    model = get_task(task).load_model(arguments, {0: "a", 1: "b"}, size)
    return get_task(task).load_processor(arguments, model, size)


def test_a_size_that_the_network_cannot_take_is_refused(tmp_path):
    load(save_vit(tmp_path / "vit"), 16)
    with pytest.raises(ValueError, match=r"image_size=20: ViTFor.* cannot take images of 20 × 20 .*is made for 16"):
        load(tmp_path / "vit", 20)


def test_a_size_below_a_patch_of_an_encoder_is_refused(tmp_path):
    save_timm(tmp_path / "encoder", "test_vit")
    load(tmp_path / "encoder", 32, "segmentation")
    with pytest.raises(ValueError, match=r"image_size=8: no encoder for such images can be made of test_vit \(.*\)"):
        load(tmp_path / "encoder", 8, "segmentation")


def test_a_network_for_one_channel_is_refused():
    model = ResNetForImageClassification(ResNetConfig(num_channels=1, embedding_size=8, hidden_sizes=[8], depths=[1]))
    with pytest.raises(
        ValueError, match=r"ResNetFor.* cannot take images of 16 × 16 pixels and 3 channels \(.*channel"
    ):
        check_input(model, torch.zeros(3, 16, 16))


def test_the_network_and_the_random_numbers_stay_as_they_were():
    model = ResNetForImageClassification(ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1])).train()
    before, state = {name: value.clone() for name, value in model.state_dict().items()}, torch.get_rng_state()
    check_input(model, torch.ones(3, 16, 16))
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())

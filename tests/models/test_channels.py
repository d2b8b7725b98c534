import json

import numpy as np
import pytest
import timm
import torch
from digits import digit_images, save_image_folder, save_timm, save_vit
from transformers import (
    AutoModelForImageClassification,
    ResNetConfig,
    SegformerConfig,
    SegformerForSemanticSegmentation,
)

from metalr_hf.cli import main
from metalr_hf.data.intensity import channels_of
from metalr_hf.models.channels import adapt_weight, input_channels, spread
from metalr_hf.models.loading import ModelArguments
from metalr_hf.tasks import get_task

pytestmark = pytest.mark.usefixtures("offline")
CLASSES = {0: "a", 1: "b"}
QUICK = [
    *("--learning_rate", "1e-3", "--per_device_train_batch_size", "8", "--use_cpu", "true", "--disable_tqdm", "true"),
    *("--max_steps", "2", "--save_strategy", "no", "--report_to", "none"),
]


def load(name, channels, task="classification"):
    arguments = ModelArguments(model_name_or_path=None if name is None else str(name))
    model = get_task(task).load_model(arguments, CLASSES, None, channels)
    return model.eval(), get_task(task).load_processor(arguments, model)


@pytest.mark.parametrize("channels", [1, 4, 5])
def test_the_first_convolution_is_adapted_as_timm_does_it(tmp_path, channels):
    folder = save_timm(tmp_path / "timm", classes=2)
    model, processor = load(folder, channels)
    theirs = timm.create_model(f"local-dir:{folder}", pretrained=True, in_chans=channels).eval()
    pixels = torch.rand(2, channels, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(model(pixels).logits, theirs(pixels))
    assert channels_of(processor) == channels == input_channels(model.config)
    assert len(processor.image_mean) == channels
    vit, processor = load(save_vit(tmp_path / "vit", classes=2), channels)
    original = AutoModelForImageClassification.from_pretrained(tmp_path / "vit")
    names = [name for name, weight in original.named_parameters() if weight.dim() == 4]
    assert len(names) == 1
    adapted, weight = dict(vit.named_parameters())[names[0]], dict(original.named_parameters())[names[0]]
    assert torch.equal(adapted, adapt_weight(weight, channels))
    assert channels_of(processor) == channels


def test_grey_images_mean_the_same_to_a_network_of_one_channel(tmp_path):
    """The sum of the weights sees in one channel what the three saw in three equal ones."""
    folder = save_timm(tmp_path, classes=2)
    three, one = load(folder, None)[0], load(folder, 1)[0]
    pixels = torch.rand(2, 1, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(one(pixels).logits, three(pixels.repeat(1, 3, 1, 1)).logits)


@pytest.mark.parametrize("task", ["classification", "segmentation", "regression", "multi_label"])
def test_every_task_has_a_demo_of_one_channel(task):
    model, processor = load(None, 1, task)
    assert channels_of(processor) == input_channels(model.config) == 1


def test_segformer_takes_four_channels(tmp_path):
    small = {"hidden_sizes": [8, 8], "depths": [1, 1], "num_encoder_blocks": 2, "sr_ratios": [2, 1], "strides": [4, 2]}
    small |= {"patch_sizes": [7, 3], "num_attention_heads": [1, 1], "mlp_ratios": [2, 2], "decoder_hidden_size": 8}
    SegformerForSemanticSegmentation(SegformerConfig(**small)).save_pretrained(tmp_path)
    from transformers import SegformerImageProcessor

    SegformerImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    model, processor = load(tmp_path, 4, "segmentation")
    assert input_channels(model.config) == channels_of(processor) == 4


def test_what_was_adapted_can_be_adapted_again(tmp_path):
    model, _ = load(save_timm(tmp_path / "three", classes=2), 4)
    model.save_pretrained(tmp_path / "four")
    assert input_channels(load(tmp_path / "four", 5)[0].config) == 5
    assert input_channels(ResNetConfig()) == 3
    assert spread([0.1, 0.2, 0.3], 3) == [0.1, 0.2, 0.3]


def test_a_network_without_a_first_convolution_is_refused(tmp_path):
    with pytest.raises(ValueError, match="num_channels=2: a first convolution for 3 channels cannot be adapted"):
        adapt_weight(torch.zeros(8, 48), 2)


@pytest.mark.parametrize("save_model", [save_vit, save_timm])
def test_grey_photographs_train_a_network_of_one_channel(tmp_path, save_model):
    images, model = save_image_folder(tmp_path / "images"), save_model(tmp_path / "model")
    where = ["--dataset_name", str(images), "--model_name_or_path", str(model)]
    more = ["--num_channels", "1", "--augment", "crop_flip", "--output_dir", str(tmp_path / "run")]
    assert main(["train", *where, *more, *QUICK]) == 0
    trained = AutoModelForImageClassification.from_pretrained(tmp_path / "run")
    assert input_channels(trained.config) == 1
    assert json.loads((tmp_path / "run" / "preprocessor_config.json").read_text())["num_channels"] == 1
    # Trained further, it takes what it took before.
    more = ["--output_dir", str(tmp_path / "more")]
    assert (
        main(["train", "--dataset_name", str(images), "--model_name_or_path", str(tmp_path / "run"), *more, *QUICK])
        == 0
    )


def test_arrays_of_five_channels_are_trained_on(tmp_path):
    pictures, names = digit_images(30)
    for i, (picture, name) in enumerate(zip(pictures, names, strict=True)):
        folder = tmp_path / "images" / ("train" if i < 20 else "test") / name
        folder.mkdir(parents=True, exist_ok=True)
        grey = np.asarray(picture.convert("L"), dtype="uint16")
        np.save(folder / f"{i}.npy", np.stack([grey * (k + 1) for k in range(5)]))
    where = ["--dataset_name", str(tmp_path / "images"), "--model_name_or_path", str(save_timm(tmp_path / "model"))]
    more = ["--num_channels", "5", "--augment", "crop_flip", "--output_dir", str(tmp_path / "run")]
    assert main(["train", *where, *more, *QUICK]) == 0
    assert input_channels(AutoModelForImageClassification.from_pretrained(tmp_path / "run").config) == 5

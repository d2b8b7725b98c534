import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from networks import NAMES, unet, volume_network
from transformers import AutoModelForSemanticSegmentation

from metalr_hf import layer_groups
from metalr_hf.models.losses import segmentation_loss
from metalr_hf.models.unet import TimmUNetConfig, TimmUNetForSemanticSegmentation


def reload(model, folder):
    model.save_pretrained(folder)
    again = AutoModelForSemanticSegmentation.from_pretrained(folder).eval()
    for parameter in again.parameters():
        # They lie in the file as they come, and kernels round otherwise where tensors are not aligned in memory.
        parameter.data = parameter.data.clone()
    return again


@pytest.mark.parametrize(
    ("encoder", "size", "kwargs"),
    [
        ("test_resnet", (64, 64), {}),
        ("test_efficientnet", (64, 64), {}),
        ("test_efficientnet", (61, 50), {}),  # No multiple of any stride.
        ("test_convnext", (64, 64), {}),
        ("test_vit", (64, 64), {"encoder_args": {"img_size": 64}}),
        ("test_resnet", (64, 64), {"encoder_args": {"in_chans": 1}, "decoder_channels": (8, 4)}),
        ("test_resnet", (64, 64), {"encoder_args": {"out_indices": [1, 3]}}),
    ],
)
def test_logits_have_the_size_of_the_image_and_reload_equal(tmp_path, encoder, size, kwargs):
    model = unet(encoder, **kwargs).eval()
    pixels = torch.randn(2, kwargs.get("encoder_args", {}).get("in_chans", 3), *size)
    with torch.no_grad():
        logits = model(pixels).logits
        assert logits.shape == (2, 3, *size)
        again = reload(model, tmp_path)
        assert type(again) is TimmUNetForSemanticSegmentation
        assert torch.equal(again(pixels).logits, logits)
    assert again.config.id2label == NAMES


@pytest.mark.parametrize(
    ("encoder", "encoder_args"),
    [
        # Features with the channels last.
        ("swin_tiny_patch4_window7_224", {"embed_dim": 12, "depths": [2, 1, 1, 1]}),
        # Positions in buffers that are not saved.
        ("vit_small_patch16_dinov3", {"embed_dim": 24, "depth": 2, "num_heads": 2, "out_indices": [0, 1]}),
    ],
)
def test_encoders_with_other_features_and_unsaved_buffers_reload_equal(tmp_path, encoder, encoder_args):
    model = TimmUNetForSemanticSegmentation(TimmUNetConfig(encoder, {"img_size": 64, **encoder_args})).eval()
    pixels = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert model(pixels).logits.shape == (1, 2, 64, 64)
        torch.testing.assert_close(reload(model, tmp_path)(pixels).logits, model(pixels).logits)


def test_the_encoder_is_timms_and_keeps_its_pretrained_weights(tmp_path):
    source = timm.create_model("test_resnet", num_classes=5)
    from metalr_hf.models.timm import make_portable, wrap_timm_model

    wrap_timm_model(source).save_pretrained(tmp_path)
    make_portable(tmp_path)
    model = TimmUNetForSemanticSegmentation.from_encoder(f"local-dir:{tmp_path}", num_labels=2)
    assert model.config.encoder == "test_resnet"
    own, weights = model.encoder.state_dict(), source.state_dict()
    assert len(own) > 50
    assert all(torch.equal(value, weights[name]) for name, value in own.items())


def test_another_number_of_classes_gets_a_fresh_head_and_keeps_the_rest(tmp_path):
    model = unet()
    model.save_pretrained(tmp_path)
    again = AutoModelForSemanticSegmentation.from_pretrained(tmp_path, num_labels=7, ignore_mismatched_sizes=True)
    assert again.head.weight.shape[0] == 7
    assert 0 < again.head.weight.std() < 1
    assert torch.equal(again.decoder[0].conv1.weight, model.decoder[0].conv1.weight)


def test_the_loss_is_cross_entropy_plus_dice_without_ignored_pixels():
    model = unet().eval()
    pixels, labels = torch.randn(2, 3, 32, 32), torch.randint(0, 3, (2, 32, 32))
    labels[:, 0] = 255
    outputs = model(pixels, labels)
    assert outputs.loss == segmentation_loss(outputs.logits, labels)
    assert torch.equal(model(pixels, labels, return_dict=False)[1], outputs.logits)
    outputs.loss.backward()
    assert all(p.grad is not None for p in model.parameters())


def test_layers_from_the_stem_to_the_head():
    assert list(layer_groups(unet())) == [
        "stem",
        *(f"layer{i}" for i in (1, 2, 3, 4)),
        *(f"decoder.{i}" for i in range(5)),
        "head",
    ]


SAVED_UNET3D = Path(__file__).parents[1] / "helpers" / "saved_unet3d"


def test_a_saved_network_brings_its_code_along(tmp_path):
    """For those who have transformers and timm, but not this package, and for networks that it had once."""
    unet().save_pretrained(tmp_path / "unet")
    volume_network().save_pretrained(tmp_path / "volumes")
    folders = [str(folder) for folder in (tmp_path / "unet", tmp_path / "volumes", SAVED_UNET3D)]
    code = (
        "import sys, torch; sys.modules['metalr_hf'] = None\n"
        "from transformers import AutoModelForSemanticSegmentation as Auto\n"
        f"models = [Auto.from_pretrained(name, trust_remote_code=True).eval() for name in {folders}]\n"
        "volume = torch.linspace(-1, 1, 256).reshape(1, 1, 4, 8, 8)\n"
        "print(*(model.config.model_type for model in models), *models[-1](volume).logits.mean((0, 2, 3, 4)).tolist())"
    )
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    *names, background, first, second = run.stdout.split()
    assert names == ["timm_unet", "monai", "unet3d"]
    # As when it was saved.
    assert [float(mean) for mean in (background, first, second)] == pytest.approx(
        [0.38793, -0.34589, 0.42014], abs=1e-3
    )

import subprocess
import sys

import pytest
import timm
import torch
from layered import vit
from timm.models import save_for_hf
from transformers import SegformerConfig, SegformerForSemanticSegmentation

from metalr_hf.cli import main
from metalr_hf.cli.layers import empty_model
from metalr_hf.models.monai_networks import MonaiConfig, MonaiForSemanticSegmentation
from metalr_hf.models.unet import TimmUNetConfig, TimmUNetForSemanticSegmentation


def rows(text):
    lines = [line.replace("│", " ").split() for line in text.splitlines() if line.startswith("│")]
    return {cells[0]: cells[1:] for cells in lines}


def test_the_layers_of_a_timm_model_are_listed_without_weights(capsys):
    assert main(["layers", "--model", "timm/test_vit"]) == 0
    table = rows(capsys.readouterr().out)
    assert list(table)[:-1] == ["stem", *(f"blocks.{i}" for i in range(6)), "head"]
    assert table["head"] == ["2", "65,000", "17.5%"]
    assert empty_model("timm/test_vit.r160_in1k").head.weight.device == torch.device("meta")


def test_granularity_and_head(capsys):
    assert main(["layers", "--model", "timm/test_resnet", "--granularity", "stage"]) == 0
    assert "layer3" in rows(capsys.readouterr().out)
    assert main(["layers", "--model", "timm/test_resnet", "--granularity", "tensor", "--head", "layer4"]) == 0
    table = rows(capsys.readouterr().out)
    assert "head.conv1.weight" in table
    assert "backbone.head.weight" not in table
    assert main(["layers", "--model", "timm/test_resnet", "--head", "layer9"]) == 2
    assert "'layer9', named as the head, is no module of the model" in capsys.readouterr().err


def test_a_saved_model_is_listed_as_what_it_is(tmp_path, capsys):
    vit().save_pretrained(tmp_path / "classifier")
    assert main(["layers", "--model", str(tmp_path / "classifier")]) == 0
    assert list(rows(capsys.readouterr().out))[:-1] == ["stem", "layers.0", "layers.1", "layers.2", "head"]
    config = SegformerConfig(hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1], decoder_hidden_size=8)
    SegformerForSemanticSegmentation(config).save_pretrained(tmp_path / "segmenter")
    assert type(empty_model(str(tmp_path / "segmenter"))) is SegformerForSemanticSegmentation


def test_a_run_of_the_packages_own_networks_needs_no_code_of_its_folder(tmp_path):
    args = {"channels": (4, 8), "strides": (2,)}
    models = {
        "unet": TimmUNetForSemanticSegmentation(TimmUNetConfig(encoder="test_resnet", num_labels=2)),
        "volumes": MonaiForSemanticSegmentation(MonaiConfig("UNet", args, patch_size=(16, 16, 16), num_labels=2)),
    }
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
        assert "auto_map" in (tmp_path / name / "config.json").read_text()
    # In a process of its own: here these networks are known to transformers.
    code = f"from metalr_hf.cli import main; print([main(['layers', '--model', name]) for name in {list(models)}])"
    command = [sys.executable, "-c", code]
    shown = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    *tables, codes = shown.splitlines()
    assert codes == "[0, 0]"
    assert len(rows("\n".join(tables))) > 2


def test_a_saved_backbone_gets_a_head(tmp_path, capsys):
    save_for_hf(timm.create_model("test_vit", num_classes=0), tmp_path, model_config={"num_classes": 0})
    assert main(["layers", "--model", str(tmp_path)]) == 0
    assert "head" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("timm/resnet1", "timm has no such architecture. Did you mean 'resnet10t'"),
        ("./nowhere", "no configuration there. It must be a local folder"),
    ],
)
def test_a_model_that_is_not_there(model, message, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert main(["layers", "--model", model]) == 2
    assert message in capsys.readouterr().err

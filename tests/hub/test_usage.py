import dataclasses

import pytest
import timm
import torch
from digits import save_timm
from PIL import Image
from small_runs import arguments, images, vit
from transformers import ViTImageProcessor

from metalr_hf import MetaLRTrainer
from metalr_hf.data.intensity import IntensityWindow
from metalr_hf.hub.card import RunFacts, model_card
from metalr_hf.hub.facts import run_facts
from metalr_hf.hub.usage import usage

FACTS = RunFacts("timm", "image-classification", "resnet18", [], {}, "")


def test_a_photograph_that_lies_on_its_side_is_turned_as_in_training(tmp_path, capsys):
    model = save_timm(tmp_path / "model")
    upright = Image.linear_gradient("L").resize((64, 48))
    upright.save(tmp_path / "upright.png")
    exif = Image.Exif()
    # To be turned by 90 degrees clockwise.
    exif[0x0112] = 6
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    torch.manual_seed(0)
    shown = []
    for name in ("upright.png", "turned.png"):
        code = usage(FACTS).replace("hf-hub:your-name/your-model", f"local-dir:{model}")
        exec(code.replace("image.png", str(tmp_path / name)), {})
        shown.append(capsys.readouterr().out)
    assert shown[0] == shown[1] != ""


@pytest.mark.parametrize("name", ["vit", "timm"])
def test_without_a_processor_it_is_left_to_the_user_how_images_are_prepared(tmp_path, name, capsys):
    model = vit() if name == "vit" else timm.create_model("test_vit", num_classes=3, img_size=16)
    run = MetaLRTrainer(model, arguments(tmp_path, max_steps=1), train_dataset=images())
    run.train()
    run.save_model()
    code = usage(run_facts(run))
    assert "images have to be prepared as those" in code
    capsys.readouterr()
    exec(code.replace("your-name/your-model", str(tmp_path)), {})
    assert "tensor([[0." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"intensity_window": dataclasses.asdict(IntensityWindow(0.0, 4095.0, "given"))}, "more than 8 bits"),
        ({"num_channels": 1}, "1 channels"),
    ],
)
def test_images_that_a_pipeline_would_misread_are_left_to_the_package(tmp_path, settings, why):
    processor = ViTImageProcessor(size={"height": 16, "width": 16})
    for name, value in settings.items():
        setattr(processor, name, value)
    run = MetaLRTrainer(vit(), arguments(tmp_path, max_steps=1), train_dataset=images(), processing_class=processor)
    run.train()
    facts = run_facts(run)
    text = model_card(facts).text
    assert "pipeline(" not in text
    assert "```bash" in text
    assert "metalr-hf predict your-name/your-model IMAGES --output" in text
    assert why in text
    processor.intensity_window, processor.num_channels = None, 3
    text = model_card(run_facts(run)).text
    assert "```python\nfrom transformers import pipeline" in text

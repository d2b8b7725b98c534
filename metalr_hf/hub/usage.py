"""How the model of a run is used: the example that its card shows."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .card import RunFacts

# A placeholder in the card of a run, replaced by the repository's name when it is published.
UNPUBLISHED = "your-name/your-model"
# What makes answers of logits, in the code that the card shows.
ACTIVATIONS = {"softmax": ".softmax(-1)", "sigmoid": ".sigmoid()", "none": ""}
USAGE = {
    "transformers": """
from transformers import pipeline

model = pipeline("{task}", model="{model_id}"{code})
print(model("image.png"))
""",
    "volumes": """
import torch
from transformers import {auto_class}

model = {auto_class}.from_pretrained("{model_id}"{code}).eval()
volume = torch.zeros(1, {channels}, 64, 64, 64)  # batch, channels, x, y, z
print(model(volume).logits.argmax(1))
""",
    "nifti": """
from transformers import AutoImageProcessor, {auto_class}

processor = AutoImageProcessor.from_pretrained("{model_id}"{code})
model = {auto_class}.from_pretrained("{model_id}"{code}).eval()
outputs = model(**processor("volume.nii.gz", return_tensors="pt"))
mask, = processor.post_process_semantic_segmentation(outputs, ["volume.nii.gz"])
mask.to_filename("mask.nii.gz")
""",
    "tensors": """
import torch
from transformers import {auto_class}

model = {auto_class}.from_pretrained("{model_id}"{code}).eval()
# No image processor was saved with the model: images have to be prepared as those that it was trained on.
images = torch.zeros{input_shape}
print(model(images).logits{activation})
""",
    "timm": """
import timm
from PIL import Image, ImageOps

model = timm.create_model("hf-hub:{model_id}", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
image = ImageOps.exif_transpose(Image.open("image.png")).convert("RGB")
print(model(transform(image)[None]){activation})
""",
    "predict": """
# {why}
pip install "metalr-hf[medical]"
metalr-hf predict {model_id} IMAGES --output predictions.csv
""",
    "peft": """
from peft import PeftModel
from transformers import {auto_class}

base = {auto_class}.from_pretrained("{base_model}", num_labels={classes}, ignore_mismatched_sizes=True)
model = PeftModel.from_pretrained(base, "{model_id}")
""",
}


def usage(facts: RunFacts) -> str:
    """The lines with which the model of a run is used.

    Args:
        facts ([`~metalr_hf.hub.card.RunFacts`]): What the run knows.

    Returns:
        `str`: empty where they are not known.
    """
    example = example_of(facts)
    if example is None:
        return ""
    return (
        USAGE[example]
        .strip()
        .format(
            task=facts.task,
            model_id=UNPUBLISHED,
            auto_class=facts.auto_class,
            code=", trust_remote_code=True" if facts.has_own_code else "",
            channels=facts.volume_channels,
            input_shape=(1, *(facts.input_shape or ())),
            base_model=facts.base_model,
            classes=len(facts.classes),
            activation=ACTIVATIONS[facts.activation],
            why=facts.own_reader,
        )
    )


def example_of(facts: RunFacts) -> str | None:
    """Which of the examples shows how the model of a run is used.

    Args:
        facts ([`~metalr_hf.hub.card.RunFacts`]): What the run knows.

    Returns:
        `str`, *optional*: `"predict"` is a command, all others are Python.
    """
    # The task, library or base model that the code example would need is not known.
    if not facts.task or not facts.library or (facts.library == "peft" and not facts.base_model):
        return None
    if facts.reads_nifti:
        return "nifti"
    if facts.volume_channels:
        return "volumes"
    if facts.library != "peft" and facts.input_shape:
        return "tensors"
    return "predict" if facts.own_reader and facts.library != "peft" else facts.library

"""Real images and small models for the tests: handwritten digits in folders, a ViT and a timm network on disk."""

import json

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor, set_seed

from metalr_hf.cli import main

NAMES = ("nil", "one", "two")


def digit_images(count, start=0):
    """Images of the digits 0, 1, 2 and their names."""
    digits = load_digits()
    rows = np.flatnonzero(digits.target < 3)[start : start + count]
    images = [Image.fromarray((digits.images[i] * 15.9).astype("uint8")).resize((20, 16)) for i in rows]
    return images, [NAMES[digits.target[i]] for i in rows]


def save_image_folder(folder, train=60, test=30):
    """A folder a split, in it a folder of images a class."""
    for split, count, start in (("train", train, 0), ("test", test, train)):
        for i, (image, name) in enumerate(zip(*digit_images(count, start), strict=True)):
            path = folder / split / name
            path.mkdir(parents=True, exist_ok=True)
            image.save(path / f"{i}.png")
    return folder


def save_vit(folder, classes=5):
    """A ViT with another number of classes, and its image processor, as on the Hub."""
    set_seed(0)
    config = ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        image_size=16,
        patch_size=4,
        num_labels=classes,
    )
    ViTForImageClassification(config).save_pretrained(folder)
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder)
    return folder


def save_timm(folder, architecture="test_resnet", classes=5):
    """A timm network saved through transformers' wrapper."""
    import timm

    from metalr_hf.models.timm import make_portable, wrap_timm_model

    set_seed(0)
    wrap_timm_model(timm.create_model(architecture, num_classes=classes)).save_pretrained(folder)
    make_portable(folder)
    return folder


def save_images_and_vit(root):
    """What [`train_vit`] trains on, and with."""
    save_image_folder(root / "images")
    save_vit(root / "vit")
    return root


def train_vit(root, output, *more, images="images"):
    """`metalr-hf train` on what [`save_images_and_vit`] saved."""
    names = ["--dataset_name", str(root / images), "--model_name_or_path", str(root / "vit"), "--use_cpu", "true"]
    return main(["train", "--output_dir", str(output), *names, "--report_to", "none", *more])


def save_with_metadata(folder, columns, train=60, test=30):
    """A folder a split, in it images and a metadata.jsonl; `columns` takes a digit's name, image and number of row."""
    for split, count, start in (("train", train, 0), ("test", test, train)):
        (folder / split).mkdir(parents=True, exist_ok=True)
        rows = []
        for i, (image, name) in enumerate(zip(*digit_images(count, start), strict=True)):
            image.save(folder / split / f"{i}.png")
            rows.append({"file_name": f"{i}.png", **columns(name, image, i)})
        # One of CSV is left open by `datasets`.
        (folder / split / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def findings(name, image, row):
    """Three columns of 0 and 1, some entries of the second unknown."""
    loop = None if row % 10 == 7 else int(name == "nil")
    return {"even": int(name != "one"), "loop": loop, "bent": int(name == "two")}

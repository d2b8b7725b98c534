from dataclasses import replace

import datasets
import pytest
import timm
import torch
from digits import digit_images, save_timm, save_vit
from PIL import Image
from torch.utils.data import DataLoader
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    BitImageProcessor,
    CLIPImageProcessor,
    ConvNextImageProcessor,
    EfficientNetImageProcessor,
    ViTImageProcessor,
    default_data_collator,
)

from metalr_hf.data.splits import ImageSplits
from metalr_hf.data.transforms import (
    ImageTransform,
    load_image_processor,
    output_size,
    prepare_images,
    timm_image_processor,
)

PROCESSORS = [
    BitImageProcessor(size={"shortest_edge": 40}, crop_size={"height": 32, "width": 32}),
    CLIPImageProcessor(size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24}),
    ConvNextImageProcessor(size={"shortest_edge": 32}),
    EfficientNetImageProcessor(size={"height": 20, "width": 20}),
    ViTImageProcessor(size={"height": 16, "width": 16}),
]


def splits(count=12):
    images, names = digit_images(count)
    label = datasets.ClassLabel(names=["nil", "one", "two"])
    rows = datasets.Dataset.from_dict(
        {"image": images, "label": label.str2int(names)},
        features=datasets.Features(image=datasets.Image(), label=label),
    )
    return ImageSplits(rows, rows, rows, tuple(label.names))


@pytest.mark.parametrize("processor", PROCESSORS, ids=lambda processor: type(processor).__name__)
def test_augmentation_keeps_the_size_and_scale_of_the_processor(processor):
    color = (30, 120, 250)
    image = Image.new("L", (50, 40), 120)
    for picture in (image.convert("RGB"), Image.new("RGB", (50, 40), color)):
        plain = ImageTransform(processor).transform(picture)
        assert plain.shape[-2:] == output_size(processor)
        for augment in ("flip", "crop", "crop_flip"):
            augmented = ImageTransform(processor, augment).transform(picture)
            assert augmented.shape == plain.shape
            assert augmented.dtype == torch.float32
            torch.testing.assert_close(augmented, plain, atol=1e-4, rtol=0)


def test_what_the_augmentations_do():
    processor = PROCESSORS[-1]
    image = digit_images(1)[0][0]
    torch.manual_seed(0)
    seen = {
        augment: {
            ImageTransform(processor, augment)({"image": [image], "label": [0]})["pixel_values"][0].numpy().tobytes()
            for _ in range(20)
        }
        for augment in ("none", "flip", "crop")
    }
    assert [len(kinds) for kinds in seen.values()][:2] == [1, 2]
    assert len(seen["crop"]) > 10
    plain = processor(image.convert("RGB"), return_tensors="pt")["pixel_values"][0]
    assert seen["none"] == {plain.numpy().tobytes()}
    assert seen["flip"] == {plain.numpy().tobytes(), plain.flip(-1).contiguous().numpy().tobytes()}


def test_an_unknown_augmentation():
    with pytest.raises(ValueError, match="augment='mirror' must be one of"):
        ImageTransform(PROCESSORS[0], "mirror")


def test_prepared_rows_are_batches_for_the_model():
    given = splits()
    prepared = prepare_images(replace(given, validation=given.test, held_back=given.test), PROCESSORS[-1])
    batch = next(iter(DataLoader(prepared.test, batch_size=5, collate_fn=default_data_collator)))
    assert batch["pixel_values"].shape == (5, 3, 16, 16)
    assert batch["labels"].tolist() == splits().test[:5]["label"]
    assert batch["labels"].dtype == torch.int64
    # What is trained on or tuned by is augmented, and what is evaluated is not, if it is the same images.
    augmented = {
        name: not torch.equal(*(getattr(prepared, name)[0]["pixel_values"] for _ in range(2)))
        for name in ("train", "meta", "held_back", "validation", "test")
    }
    assert augmented == {"train": True, "meta": True, "held_back": True, "validation": False, "test": False}


def test_a_stream_is_shuffled_and_prepared():
    given = splits()
    streams = ImageSplits(given.train.to_iterable_dataset(), given.test.to_iterable_dataset(), None, given.class_names)
    prepared = prepare_images(streams, PROCESSORS[-1], "none")
    labels = [[row["labels"] for row in split] for split in (prepared.train, prepared.test)]
    assert labels[1] == list(given.test["label"])
    assert labels[0] != labels[1]
    assert sorted(labels[0]) == sorted(labels[1])
    assert set(next(iter(prepared.train))) == {"pixel_values", "labels"}
    assert prepared.meta is None


@pytest.mark.parametrize("processor", PROCESSORS, ids=lambda processor: type(processor).__name__)
def test_another_image_size(tmp_path, processor):
    save_vit(tmp_path)
    processor.save_pretrained(tmp_path)
    model = AutoModelForImageClassification.from_pretrained(tmp_path)
    resized = load_image_processor(model, str(tmp_path), 48)
    assert output_size(resized) == (48, 48)
    if isinstance(processor, BitImageProcessor):
        assert resized.size["shortest_edge"] == 60
    assert output_size(load_image_processor(model, str(tmp_path))) == output_size(processor)


def test_a_size_that_the_processor_cannot_give(tmp_path):
    save_vit(tmp_path)
    ViTImageProcessor(do_resize=False).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"image_size=48: ViTImageProcessor gives \(64, 64\) instead"):
        load_image_processor(AutoModelForImageClassification.from_pretrained(tmp_path), str(tmp_path), 48)


@pytest.mark.parametrize("image_size", [None, 48])
def test_a_timm_model_sees_what_timm_would_show_it(tmp_path, image_size):
    model = AutoModelForImageClassification.from_pretrained(save_timm(tmp_path / "model"))
    processor = load_image_processor(model, image_size=image_size)
    edge = image_size or model.config.pretrained_cfg["input_size"][-1]
    assert output_size(processor) == (edge, edge)
    image = digit_images(1)[0][0].resize((200, 170)).convert("RGB")
    ours = processor(image, return_tensors="pt")["pixel_values"][0]
    config = timm.data.resolve_data_config(pretrained_cfg=model.config.pretrained_cfg)
    theirs = timm.data.create_transform(**config)(image)
    assert (ours - theirs).abs().mean() < 0.01
    # Also when the saved model is loaded by name.
    model.save_pretrained(tmp_path / "saved")
    saved = AutoImageProcessor.from_pretrained(tmp_path / "saved")(image, return_tensors="pt")["pixel_values"][0]
    assert (ours - saved).abs().mean() < 0.01


def test_squashed_timm_images():
    processor = timm_image_processor({"input_size": (3, 32, 32), "crop_mode": "squash", "crop_pct": 0.9})
    bar = Image.new("RGB", (100, 40), "black")
    bar.paste((255, 255, 255), (0, 0, 10, 40))
    # Nothing is cut off at the sides.
    assert processor(bar, return_tensors="pt")["pixel_values"][0, 0, 0, 0] > 1

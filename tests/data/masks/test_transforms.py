import io

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import ConvNextImageProcessor, SegformerImageProcessor

from metalr_hf.data.loading import AUGMENTATIONS
from metalr_hf.data.masks import MaskClasses, MaskTransform, collate_masks

CLASSES = MaskClasses(("dark", "bright"), (0, 1), 7)


def processor(size=32):
    return SegformerImageProcessor(size={"height": size, "width": size})


def encoded(mask):
    file = io.BytesIO()
    Image.fromarray(mask.astype("uint8")).save(file, format="png")
    return {"bytes": file.getvalue(), "path": "scans/12_mask.png"}


def row(width=40, height=48):
    """An image whose bright pixels are those of class 1, in blocks that survive resizing, not symmetric."""
    generator = np.random.default_rng(0)
    mask = np.kron(generator.integers(0, 2, (height // 8, width // 8)), np.ones((8, 8), int))
    return {"image": [Image.fromarray((mask * 255).astype("uint8"))], "label": [encoded(mask)]}


@pytest.mark.parametrize("augment", AUGMENTATIONS)
def test_images_and_masks_are_changed_alike(augment):
    torch.manual_seed(0)
    transform = MaskTransform(processor(), CLASSES, augment)
    seen = set()
    for _ in range(8):
        batch = transform(row())
        pixels, mask = batch["pixel_values"][0], batch["labels"][0]
        assert (pixels.shape, pixels.dtype) == ((3, 32, 32), torch.float32)
        assert (mask.shape, mask.dtype) == ((32, 32), torch.int64)
        assert type(mask) is torch.Tensor
        bright = pixels[0] > 0
        # Interpolation blurs the edges of the image, not those of the mask.
        assert (bright == mask.bool()).float().mean() > 0.9
        seen.add(mask.numpy().tobytes())
    assert len(seen) == {"none": 1, "flip": 2}.get(augment, 8)


def test_without_augmentation_it_is_the_processor_and_nothing_else():
    batch = MaskTransform(processor(), CLASSES)(row())
    picture = row()["image"][0].convert("RGB")
    assert torch.equal(batch["pixel_values"][0], processor()(picture, return_tensors="pt")["pixel_values"][0])


def test_ignored_values_become_255():
    mask = np.zeros((32, 32), int)
    mask[:8] = 7
    batch = MaskTransform(processor(), CLASSES)({"image": [Image.new("L", (32, 32))], "label": [encoded(mask)]})
    assert (batch["labels"][0][:8] == 255).all()
    assert (batch["labels"][0][8:] == 0).all()


def test_bad_masks_of_a_stream_are_refused_with_their_file_and_the_value():
    transform = MaskTransform(processor(), CLASSES)
    with pytest.raises(ValueError, match=r"\(scans/12_mask.png\): the mask holds the class id 3, .*ignore_index=7"):
        transform({"image": [Image.new("L", (8, 8))], "label": [encoded(np.full((8, 8), 3))]})
    with pytest.raises(ValueError, match=r"\(scans/12_mask.png\): the mask is 8 × 9 pixels .*its image 8 × 8"):
        transform({"image": [Image.new("L", (8, 8))], "label": [encoded(np.zeros((9, 8)))]})


def test_a_processor_without_masks_is_refused():
    with pytest.raises(ValueError, match="ConvNextImageProcessor is no image processor for segmentation"):
        MaskTransform(ConvNextImageProcessor(), CLASSES)


@pytest.mark.parametrize("shape", [(8, 8), (4, 8, 8)])
def test_images_and_volumes_are_stacked(shape):
    rows = [{"pixel_values": torch.rand(1, *shape), "labels": np.ones(shape, "uint8")} for _ in range(3)]
    batch = collate_masks(rows)
    assert batch["pixel_values"].shape == (3, 1, *shape)
    assert (batch["labels"].shape, batch["labels"].dtype) == ((3, *shape), torch.int64)

import pytest
import torch
from torch.nn import functional

from metalr_hf.models.losses import resize_logits, segmentation_loss


def by_hand(logits, labels):
    """Cross-entropy plus one minus the mean Dice of the classes there, pixel by pixel."""
    probabilities = logits.double().softmax(1)
    pixels = [
        (p, int(t))
        for image, mask in zip(probabilities, labels, strict=True)
        for p, t in zip(image.flatten(1).T, mask.flatten(), strict=True)
        if 0 <= t != 255
    ]
    entropy = -sum(p[t].log() for p, t in pixels) / len(pixels)
    dice = []
    for c in {t for _, t in pixels}:
        overlap, size = sum(p[c] for p, t in pixels if t == c), sum(p[c] + (t == c) for p, t in pixels)
        dice.append(2 * overlap / size)
    return float(entropy + 1 - sum(dice) / len(dice))


@pytest.mark.parametrize("size", [(5, 6), (2, 3, 4)])
def test_the_loss_agrees_with_one_by_hand_with_ignored_pixels_and_an_absent_class(size):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 4, *size, generator=generator)
    labels = torch.randint(0, 3, (2, *size), generator=generator)
    labels[0, 0], labels[1, 1, 1] = 255, -100
    assert segmentation_loss(logits, labels).item() == pytest.approx(by_hand(logits, labels), rel=1e-5)
    for outputs in ({"logits": logits, "loss": None}, (logits, "more")):
        assert segmentation_loss(outputs, labels) == segmentation_loss(logits, labels)


def test_the_parts_of_an_accumulated_batch_weigh_as_their_pixels():
    logits, labels = torch.randn(3, 2, 4, 4), torch.randint(0, 2, (3, 4, 4))
    parts = [segmentation_loss(logits[i : i + 1], labels[i : i + 1], num_items_in_batch=48) for i in range(3)]
    means = [segmentation_loss(logits[i : i + 1], labels[i : i + 1]) for i in range(3)]
    assert sum(parts).item() == pytest.approx(sum(means).item() / 3)


def test_the_pixels_that_trainer_does_not_count_weigh_nothing():
    logits, labels = torch.randn(2, 2, 4, 4), torch.randint(0, 2, (2, 4, 4))
    labels[0, 1:] = -100
    parts = [segmentation_loss(logits[i : i + 1], labels[i : i + 1], num_items_in_batch=20) for i in range(2)]
    means = [segmentation_loss(logits[i : i + 1], labels[i : i + 1]) for i in range(2)]
    assert sum(parts).item() == pytest.approx((4 * means[0].item() + 16 * means[1].item()) / 20)


def test_logits_are_brought_to_the_size_of_the_masks():
    logits, labels = torch.randn(2, 3, 4, 4), torch.randint(0, 3, (2, 16, 16))
    upsampled = functional.interpolate(logits, size=(16, 16), mode="bilinear", align_corners=False)
    assert segmentation_loss(logits, labels) == segmentation_loss(upsampled, labels)
    assert resize_logits(torch.zeros(1, 2, 2, 3, 4), torch.Size((4, 6, 8))).shape == (1, 2, 4, 6, 8)
    with pytest.raises(ValueError, match=r"logits have the shape \(2, 3, 4, 4\) and the masks \(2, 4, 4\) each"):
        segmentation_loss(logits, torch.zeros(2, 2, 4, 4, dtype=torch.long))


def test_masks_without_a_pixel_that_counts_teach_nothing():
    logits = torch.randn(1, 2, 4, 4, requires_grad=True)
    loss = segmentation_loss(logits, torch.full((1, 4, 4), 255))
    loss.backward()
    assert loss == 0
    assert (logits.grad == 0).all()

"""Volumes to patches and to whole inputs."""

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader
from volumes import save_folder

from metalr_hf.data.volumes import VolumeArguments, VolumeTransform, collate_volumes, load_volumes


@pytest.fixture(scope="module")
def splits(tmp_path_factory):
    return load_volumes(VolumeArguments(dataset_name=str(save_folder(tmp_path_factory.mktemp("scans")))))


def transform(splits, augment=None, **settings):
    processor = splits.plan.processor()
    for name, value in settings.items():
        setattr(processor, name, value)
    return VolumeTransform(processor, splits.classes, augment)


def test_volumes_to_test_on_come_whole_with_masks_at_their_own_voxel_size(splits):
    rows = transform(splits, spacing=[2.0, 2.0, 2.0])(splits.test[:2])
    assert [tuple(volume.shape) for volume in rows["pixel_values"]] == [(1, 9, 8, 10), (1, 8, 9, 12)]
    assert [tuple(mask.shape) for mask in rows["labels"]] == [(18, 16, 10), (16, 18, 12)]
    assert rows["spacing"][0].tolist() == pytest.approx([1.0, 1.0, 2.0])


def test_however_a_volume_is_stored_the_body_lies_in_the_same_way(splits):
    rows = transform(splits)(splits.train[:3])
    for volume, mask in zip(rows["pixel_values"], rows["labels"], strict=True):
        assert (mask[7, 6, 4], mask[4, 3, 2], mask[2, 2, 1]) == (2, 1, 0)
        assert volume[0][mask == 2].mean() > volume[0][mask == 1].mean() > volume[0][mask == 0].mean()


def test_patches_are_of_one_size_and_what_is_outside_does_not_count(splits):
    rows = transform(splits, "flip", patch_size=[24, 8, 16])(splits.train[:4])
    for volume, mask in zip(rows["pixel_values"], rows["labels"], strict=True):
        assert (volume.shape, mask.shape) == ((1, 24, 8, 16), (24, 8, 16))
        assert set(mask.unique().tolist()) <= {0, 1, 2, 255}
        assert (volume[0][mask == 255] == 0).all()
        assert (mask == 255).any()


def test_a_small_class_is_in_a_quarter_of_the_patches_or_more(splits):
    draw = transform(splits, "none", patch_size=[4, 4, 4])
    masks = [mask for _ in range(20) for mask in draw(splits.train[:6])["labels"]]
    # The lesion is 1.7 % of a volume.
    assert np.mean([bool((mask == 2).any()) for mask in masks]) > 0.25
    assert np.mean([bool((mask == 0).any()) for mask in masks]) > 0.3


def test_patches_are_those_of_torchs_seed(splits):
    draws = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        draws.append(transform(splits, "flip", patch_size=[8, 8, 8])(splits.train[:3])["pixel_values"])
    assert all(torch.equal(a, b) for a, b in zip(draws[0], draws[1], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(draws[0], draws[2], strict=True))


def test_workers_draw_patches_of_their_own(splits):
    rows = splits.train.select([0, 0]).with_transform(transform(splits, "none", patch_size=[8, 8, 8]))
    torch.manual_seed(0)
    first, second = DataLoader(rows, batch_size=1, num_workers=2, collate_fn=collate_volumes)
    assert not torch.equal(first["pixel_values"], second["pixel_values"])


def test_a_volume_is_prepared_once(splits, monkeypatch):
    draw = transform(splits, "none", patch_size=[8, 8, 8])
    draw(splits.train[:1])
    monkeypatch.setattr("nibabel.load", None)
    draw(splits.train[:1])


def test_volumes_of_two_sizes_are_no_batch(splits):
    columns = transform(splits)(splits.test[:2])
    rows = [{name: column[i] for name, column in columns.items()} for i in range(2)]
    assert collate_volumes(rows[:1])["spacing"].shape == (1, 3)
    with pytest.raises(ValueError, match="per_device_eval_batch_size=1"):
        collate_volumes(rows)


def test_voxels_that_do_not_count_are_never_drawn_for(tmp_path):
    folder = save_folder(tmp_path, train=2, test=1, labels={"background": 0, "organ": 1, "ignore": 2})
    splits = load_volumes(VolumeArguments(dataset_name=str(folder)))
    masks = transform(splits, "none", patch_size=[8, 8, 8])(splits.train[:2])["labels"]
    assert set(torch.stack(masks).unique().tolist()) <= {0, 1, 255}
    assert transform(splits)(splits.test[:1])["labels"][0][7, 6, 4] == 255

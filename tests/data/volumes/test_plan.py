"""Voxel size, patches and intensities that the training volumes suggest."""

import nibabel
import numpy as np
import pytest
from volumes import save_folder

from metalr_hf.data.volumes import VolumeArguments, load_volumes
from metalr_hf.data.volumes.plan import MOST_VOXELS, patch_size_for


def plan(folder, **kwargs):
    return load_volumes(VolumeArguments(dataset_name=str(folder), **kwargs)).plan


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_folder(tmp_path_factory.mktemp("plan"), train=3, test=1, channel="CT")


def test_spacing_is_the_median_in_the_order_of_the_body(folder):
    assert plan(folder).spacing == (1.0, 1.0, 2.0)
    assert plan(folder, spacing=[2.0, 2.0, 2.0]).spacing == (2.0, 2.0, 2.0)


def test_patches_are_as_large_as_the_volumes_and_can_be_halved(folder):
    assert plan(folder).patch_size == (20, 16, 10)
    assert plan(folder, patch_size=[8, 8, 8]).patch_size == (8, 8, 8)
    assert np.prod(patch_size_for([512, 512, 300], (0.8, 0.8, 1.0))) <= 1.3 * MOST_VOXELS


def test_ct_is_cut_at_percentiles_of_the_foreground(folder):
    found = plan(folder)
    inside = np.concatenate(
        [
            np.asanyarray(nibabel.load(image).dataobj)[np.asanyarray(nibabel.load(mask).dataobj) > 0]
            for image, mask in zip(
                sorted((folder / "imagesTr").iterdir()), sorted((folder / "labelsTr").iterdir()), strict=True
            )
        ]
    )
    assert found.window == pytest.approx(np.percentile(inside, (0.5, 99.5)))
    assert (found.mean, found.std) == pytest.approx((inside.mean(), inside.std()))
    assert not found.given


def test_a_window_is_taken_as_it_is_given(folder):
    found = plan(folder, intensity_window=["-160", "240"])
    assert (found.window, found.mean, found.std) == ((-160.0, 240.0), 40.0, 200.0)
    assert found.given == {"window", "mean", "std"}


def test_zscore_is_the_volumes_own(folder):
    found = plan(folder, normalization="zscore")
    assert (found.window, found.mean, found.std) == (None, None, None)

"""What is wrong with volumes is told before training: which file, and what to do."""

import gzip
import json

import nibabel
import numpy as np
import pytest
from volumes import save_folder, volume

from metalr_hf.data.volumes import VolumeArguments, load_volumes
from metalr_hf.data.volumes.checks import geometry_of


@pytest.fixture
def folder(tmp_path):
    return save_folder(tmp_path / "scans", train=3, test=1)


def load(folder, **kwargs):
    return load_volumes(VolumeArguments(dataset_name=str(folder), **kwargs))


def change(path, voxels=None, affine=None):
    old = nibabel.load(path)
    voxels = np.asanyarray(old.dataobj) if voxels is None else voxels
    nibabel.save(nibabel.Nifti1Image(voxels, old.affine if affine is None else affine), path)


def refusal(folder, path, **kwargs):
    with pytest.raises(ValueError, match="Split '(train|test)', row 0") as error:
        load(folder, **kwargs)
    message = str(error.value)
    assert str(path) in message
    assert "\n" not in message
    return message


def test_a_mask_of_another_affine_than_its_image(folder):
    path = folder / "labelsTr" / "case_000.nii.gz"
    affine = nibabel.load(path).affine.copy()
    affine[0, 3] += 5
    change(path, affine=affine)
    message = refusal(folder, path)
    assert "the mask lies elsewhere than its image: up to 5 mm apart" in message
    assert "Resample one to the other, or copy the affine" in message


def test_an_affine_that_is_rounded_is_the_same(folder):
    path = folder / "labelsTr" / "case_000.nii.gz"
    change(path, affine=nibabel.load(path).affine + 1e-3)
    assert len(load(folder).train) == 3


def test_a_mask_of_another_size_than_its_image(folder):
    path = folder / "labelsTr" / "case_000.nii.gz"
    change(path, voxels=np.zeros((18, 16, 9), dtype=np.uint8))
    assert "the mask has 18 × 16 × 9 voxels, its image 18 × 16 × 10. Resample one" in refusal(folder, path)


@pytest.mark.parametrize("kind", ["size", "affine"])
def test_a_channel_that_does_not_fit_the_first(tmp_path, kind):
    folder = save_folder(tmp_path, train=2, test=1, channels=2)
    path = folder / "imagesTr" / "case_000_0001.nii.gz"
    if kind == "size":
        change(path, voxels=np.zeros((9, 8, 5), dtype=np.int16))
        assert "the channel has 9 × 8 × 5 voxels" in refusal(folder, path)
    else:
        change(path, affine=np.diag([2.0, 2.0, 2.0, 1.0]))
        assert "the channel lies elsewhere" in refusal(folder, path)


def test_volumes_of_different_numbers_of_channels(tmp_path):
    folder = save_folder(tmp_path, train=2, test=1, channels=2)
    (folder / "imagesTr" / "case_001_0001.nii.gz").unlink()
    with pytest.raises(ValueError, match=r"row 1 .*the volume has 1 channels, but .*row 0 .* has 2"):
        load(folder)


def test_volumes_of_other_sizes_and_voxel_sizes_are_fine(tmp_path):
    folder = save_folder(tmp_path, train=3, test=1)
    image, mask = volume(9, (8, 30, 12), (2.0, 0.5, 2.0), "PIR")
    nibabel.save(image, folder / "imagesTr" / "case_000_0000.nii.gz")
    nibabel.save(mask, folder / "labelsTr" / "case_000.nii.gz")
    splits = load(folder)
    assert splits.plan.spacing == (1.0, 1.0, 2.0)
    geometry = geometry_of(splits.train[0])
    assert (geometry.shape, geometry.spacing) == ((8, 30, 12), (2.0, 0.5, 2.0))


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"no NIfTI", "no NIfTI file that can be read"),
        (None, r"(no NIfTI file that can be read|the voxels cannot be read)"),
    ],
)
def test_a_file_that_is_broken(folder, content, match):
    path = folder / "imagesTr" / "case_000_0000.nii.gz"
    whole = gzip.decompress(path.read_bytes())
    path.write_bytes(gzip.compress(content) if content else gzip.compress(whole)[:-400])
    with pytest.raises(ValueError, match=match) as error:
        load(folder)
    assert str(path) in str(error.value)


def test_a_slice_is_no_volume(folder):
    path = folder / "imagesTr" / "case_000_0000.nii.gz"
    change(path, voxels=np.zeros((18, 16, 1), dtype=np.int16))
    assert "18 × 16 × 1 voxels, which is no volume of three axes" in refusal(folder, path)


@pytest.mark.parametrize(
    ("value", "match"),
    [(1.5, "the value 1.5, but a mask holds class ids"), (7, "the class id 7, which is none of the 3 classes")],
)
def test_a_mask_that_holds_something_else_than_classes(folder, value, match):
    path = folder / "labelsTr" / "case_000.nii.gz"
    voxels = np.asanyarray(nibabel.load(path).dataobj).astype(np.float32)
    voxels[0, 0, 0] = value
    change(path, voxels=voxels)
    assert match in refusal(folder, path)


def test_a_voxel_that_is_not_a_number(folder):
    path = folder / "imagesTr" / "case_000_0000.nii.gz"
    voxels = np.asanyarray(nibabel.load(path).dataobj).astype(np.float32)
    voxels[1, 2, 3] = np.nan
    change(path, voxels=voxels)
    assert "values that are not finite" in refusal(folder, path)


def test_without_the_extra_the_error_names_it(folder, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "monai" else object())
    with pytest.raises(ImportError, match=r'Volumes need monai: pip install "metalr-hf\[medical\]"'):
        load(folder)


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"spacing": [1.0]}, "spacing=.* three positive numbers"),
        ({"patch_size": [16, 16, 0]}, "patch_size=.* three positive numbers"),
        ({"intensity_window": ["240", "-160"]}, "is no window: give two numbers, the lower one first"),
        ({"intensity_window": ["a", "b"]}, "is no window: give two numbers"),
        ({"intensity_window": ["voi"]}, "volumes take two numbers"),
        ({"num_channels": 2}, "the channels that their files have"),
        ({"normalization": "zscore", "intensity_window": ["0", "1"]}, "belongs to normalization='ct'"),
        ({"normalization": "minmax"}, "normalization"),
        ({"network_args": "{"}, "is no JSON"),
        ({"network_args": "[1]"}, "must be a JSON object"),
        ({"image_size": 64}, "set with patch_size"),
        ({"streaming": True}, "streaming"),
        ({"metrics": ["accuracy"]}, "measured by dice and hausdorff95"),
    ],
)
def test_arguments_that_make_no_sense(given, match):
    with pytest.raises(ValueError, match=match):
        VolumeArguments(**given)


def test_classes_are_named_by_the_folder_or_by_the_argument(folder):
    assert load(folder).class_names == ("background", "organ", "lesion")
    assert load(folder, class_names=["a", "b", "c"]).class_names == ("a", "b", "c")
    (folder / "dataset.json").write_text(json.dumps({"labels": {"background": 0, "organ": 1}}))
    assert "the class id 2" in refusal(folder, folder / "labelsTr" / "case_000.nii.gz")

"""Which volumes are predicted: files, folders, channels in files of their own, columns."""

import datasets
import pytest
from volumes import save_folder, volume

from metalr_hf.data.volumes.listing import list_volumes


def touched(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return [str(folder)]


def test_files_numbered_up_to_the_channels_of_the_model_are_one_volume(tmp_path):
    files = ["b/x_0001.nii.gz", "b/x_0000.nii.gz", "a_0000.nii.gz", "whole.nii", "b/notes.txt", "a.png"]
    given = touched(tmp_path, *files)
    volumes = list_volumes(given, 2)
    assert volumes.names == ["a.nii.gz", "whole.nii", "b/x.nii.gz"]
    assert [entry["path"][-11:-7] for entry in volumes.entry(2)] == ["0000", "0001"]
    assert volumes.entry(1)["path"] == str(tmp_path / "whole.nii")
    # For one channel these are two volumes, and the one that ends in _0000 as nnU-Net has it is called as its mask.
    assert list_volumes(given, 1).names == ["a.nii.gz", "whole.nii", "b/x_0000.nii.gz", "b/x_0001.nii.gz"]


def test_numbers_of_volumes_are_no_channels(tmp_path):
    given = touched(tmp_path, *(f"scan_{i:04}.nii.gz" for i in range(4)))
    assert len(list_volumes(given, 2).names) == 4
    given = touched(tmp_path / "both", "scan.nii.gz", "scan_0000.nii.gz")
    assert list_volumes(given, 1).names == ["scan.nii.gz", "scan_0000.nii.gz"]


def test_of_a_folder_of_nnu_net_the_images_are_meant(tmp_path):
    folder = save_folder(tmp_path, train=2, test=1, channels=2)
    (folder / "imagesTs" / "._case_000_0000.nii.gz").write_text("left by macOS")
    assert list_volumes([str(folder)], 2).names == [
        "imagesTr/case_000.nii.gz",
        "imagesTr/case_001.nii.gz",
        "imagesTs/case_000.nii.gz",
    ]
    assert list_volumes([str(folder / "imagesTs")], 2).names == ["case_000.nii.gz"]
    assert list_volumes([str(folder / "labelsTs")], 2).names == ["case_000.nii.gz"]


def test_masks_of_an_earlier_run_are_left_out(tmp_path):
    given = touched(tmp_path, "a.nii.gz", "p_masks/a.nii.gz", "p_masks_of_others/b.nii.gz")
    found = list_volumes(given, 1, leave_out=str(tmp_path / "p_masks"))
    assert found.names == ["a.nii.gz", "p_masks_of_others/b.nii.gz"]


def test_two_volumes_with_one_mask_are_refused(tmp_path):
    with pytest.raises(ValueError, match="2 of the images are called 'a.nii.gz'"):
        list_volumes(touched(tmp_path, "a.nii", "a.nii.gz"), 1)
    with pytest.raises(ValueError, match="2 of the images are called 'b.nii.gz'"):
        list_volumes(touched(tmp_path / "b", "b_0000.nii", "b.nii.gz"), 1)
    with pytest.raises(FileNotFoundError, match="there are no NIfTI files in that folder, nor in those below"):
        list_volumes(touched(tmp_path / "png", "a.png"), 1)


def test_a_split_of_a_folder_is_refused(tmp_path):
    with pytest.raises(
        ValueError, match="split='test': of a folder of images, such as .*Give the folder of that split"
    ):
        list_volumes(touched(tmp_path, "a.nii"), 1, split="test")


def test_a_column_of_nifti_that_is_no_mask_is_taken(tmp_path):
    pairs = [volume(i) for i in range(2)]
    rows = {"scan": [i.to_bytes() for i, _ in pairs], "mask": [m.to_bytes() for _, m in pairs]}
    features = datasets.Features(scan=datasets.Nifti(), mask=datasets.Nifti())
    datasets.Dataset.from_dict(rows, features=features).to_parquet(str(tmp_path / "test.parquet"))
    volumes = list_volumes([str(tmp_path / "test.parquet")], 1)
    assert volumes.names == ["test/0", "test/1"]
    assert volumes.entry(1)["bytes"] == rows["scan"][1]
    masks = list_volumes([str(tmp_path / "test.parquet")], 1, image_column_name="mask")
    assert masks.entry(0)["bytes"] == rows["mask"][0]
    several = {"scan": [[volume(0)[0].to_bytes(), volume(1)[0].to_bytes()]]}
    features = datasets.Features(scan=datasets.List(datasets.Nifti()))
    datasets.Dataset.from_dict(several, features=features).save_to_disk(str(tmp_path / "saved"))
    assert [entry["bytes"] for entry in list_volumes([str(tmp_path / "saved")], 2).entry(0)] == several["scan"][0]
